"""`assert_equivalent_training` and `equivalence`, against scipy.stats."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jmp_train.testing import assert_equivalent_training, equivalence

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("count", [2, 3, 5, 30])
@pytest.mark.parametrize("shift", [0.0, 0.3, -0.6])
def test_equivalence_is_two_one_sided_tests_of_scipy(count, shift):
    reference = RNG.normal(size=count)
    ours = reference + shift + 0.3 * RNG.normal(size=count)
    found = equivalence(ours, reference, margin=0.5)
    difference = ours - reference
    above = stats.ttest_1samp(difference, -0.5, alternative="greater").pvalue
    below = stats.ttest_1samp(difference, 0.5, alternative="less").pvalue
    assert found.equivalent == (max(above, below) < 0.05)
    interval = stats.ttest_1samp(difference, 0).confidence_interval(0.9)
    np.testing.assert_allclose(found[:3], (difference.mean(), *interval), rtol=1e-9)


@pytest.mark.parametrize(
    "ours, reference, margin",
    [
        (np.float16([1e-4, -1e-4, 1e-4]), np.float16([0, 0, 0]), 1.2e-4),  # squares below its range
        (np.uint8([90, 92, 91]), np.uint8([91, 93, 92]), 3.0),  # differences below zero
        (np.float16([3e4, 3e4, 3e4]), np.float16([1, 2, 3]), 4e4),  # sums above its range
        (list(jnp.bfloat16([0.5, 0.25, 1])), [0.5, 0.25, 0.5], 1.0),
    ],
)
def test_numbers_of_any_dtype_are_compared_in_float64(ours, reference, margin):
    wide = [[float(x) for x in values] for values in (ours, reference)]
    assert equivalence(ours, reference, margin=margin) == equivalence(*wide, margin=margin)
    assert equivalence(*wide, margin=margin).difference == pytest.approx(
        np.mean(wide[0]) - np.mean(wide[1])
    )


def run(noise, shift=0.0):
    values = np.random.default_rng(1).normal(scale=noise, size=(2, 8))

    def make_run(policy, seed):
        ours = int(policy != "float32")
        return 0.9 + shift * ours + values[ours, seed]

    return make_run


def test_training_within_the_margin_passes():
    assert_equivalent_training(run(0.001), margin=0.01)
    by_seed = lambda _, seed: seed
    assert_equivalent_training(lambda p, n: n + 0.0099 * (p != "float32"), margin=0.01)
    for seeds in ([3, 4], np.arange(3), np.int64(3), (n for n in (3, 4)), range(2)):
        assert_equivalent_training(by_seed, ("float32", "mixed_float16"), seeds, margin=1e-9)


def test_results_that_ignore_the_seed_are_refused():
    ignores = lambda policy, seed: 0.9 if policy == "float32" else 0.91
    with pytest.raises(AssertionError) as error:
        assert_equivalent_training(ignores, margin=0.02)
    assert str(error.value) == (
        "assert_equivalent_training: expected results that depend on the seed; found 0.9 with float32 "
        "and 0.91 with mixed_bfloat16 for each of 5 seeds"
    )


@pytest.mark.parametrize("noise, shift", [(0.0, 0.011), (0.02, 0.0), (0.002, -0.01)])
def test_a_shift_or_noise_beyond_the_margin_fails(noise, shift):
    make_run = run(noise, shift)
    with pytest.raises(AssertionError, match="^assert_equivalent_training: expected ") as error:
        assert_equivalent_training(make_run, margin=0.01)
    pairs = [(make_run("float32", n), make_run("mixed_bfloat16", n)) for n in range(5)]
    message = str(error.value)
    assert "expected mixed_bfloat16 within 0.01 of float32" in message
    assert message.endswith(", ".join(f"{a:.5g} and {b:.5g}" for a, b in pairs))
    low, high = (float(x) for x in message.split("interval [")[1].split("]")[0].split(","))
    if noise:
        expected = stats.ttest_rel(*np.transpose(pairs)[::-1]).confidence_interval(0.9)
        np.testing.assert_allclose((low, high), expected, rtol=0.01)


def test_runs_are_paired_by_seed():
    calls = []
    assert_equivalent_training(
        lambda *args: calls.append(args) or args[1], ("a", "b"), seeds=[7, 9], margin=1
    )
    assert calls == [("a", 7), ("a", 9), ("b", 7), ("b", 9)]


def test_a_run_that_diverged_is_named():
    diverges = lambda policy, seed: math.nan if (policy, seed) == ("mixed_float16", 2) else 1.0
    with pytest.raises(AssertionError, match="found nan with policy 'mixed_float16' and seed 2"):
        assert_equivalent_training(diverges, ("float32", "mixed_float16"), margin=1)


@pytest.mark.parametrize("number", [np.float32, jnp.bfloat16, lambda n: np.full((1, 1), n)])
def test_an_array_of_one_number_is_a_number(number):
    assert_equivalent_training(lambda _, seed: number(seed), seeds=3, margin=0.1)
    assert_equivalent_training(lambda _, seed: jnp.asarray(number(seed)), seeds=3, margin=0.1)


@pytest.mark.parametrize(
    "returned, given",
    [
        (None, "NoneType"),
        ({"loss": 1.0}, "dict"),
        ((1.0, 2.0), "tuple"),
        ("high", "str"),
        (np.ones(2), r"ndarray of shape \(2,\)"),
        (jnp.ones((2, 1)), r"ArrayImpl of shape \(2, 1\)"),
    ],
    ids=["none", "dict", "tuple", "text", "numpy", "jax"],
)
def test_a_run_that_returns_no_number_is_named(returned, given):
    fails = lambda policy, seed: returned if (policy, seed) == ("fp16", 1) else seed
    message = f"^make_run returned {given} with policy 'fp16' and seed 1; expected one number$"
    with pytest.raises(TypeError, match=message):
        assert_equivalent_training(fails, ("float32", "fp16"), margin=1)


def test_an_error_of_a_run_is_not_replaced():
    def fails(policy, seed):
        raise TypeError("its own")

    with pytest.raises(TypeError, match="^its own$"):
        assert_equivalent_training(fails, margin=1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"policies": ("float32",)}, "expected two different policies"),
        ({"policies": "ab"}, "policies is 'ab'; expected two different policies"),
        ({"policies": ("fp16", "fp16")}, r"policies is \('fp16', 'fp16'\); expected two different"),
        ({"seeds": 1}, r"the seeds are \[0\]; expected at least two seeds, all different"),
        ({"seeds": [3, 3, 4]}, r"the seeds are \[3, 3, 4\]; expected .* all different"),
        *(({"margin": m}, "expected a positive, finite") for m in (0, -1, math.nan, math.inf)),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        assert_equivalent_training(lambda _, seed: seed, **{"margin": 1, **arguments})


def test_sequences_must_be_pairs():
    with pytest.raises(ValueError, match="1 and 1 values; expected at least two pairs"):
        equivalence([1], [1], margin=1)
    with pytest.raises(ValueError, match="3 and 2 values"):
        equivalence([1, 2, 3], [1, 2], margin=1)
    with pytest.raises(ValueError, match="expected finite numbers"):
        equivalence([1, math.nan], [1, 2], margin=1)
    with pytest.raises(ValueError, match="margin is -1; expected a positive"):
        equivalence([1, 2], [1, 2], margin=-1)
