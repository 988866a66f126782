"""Strategies, against ml_dtypes and the bit patterns of the formats."""

import collections
import math

import jax
import ml_dtypes
import numpy as np
import pytest
from helpers.bits import bits, every_pattern
from hypothesis import HealthCheck, find, given, settings
from hypothesis import strategies as st

from jmp_train.testing import strategies

FORMATS = {
    name: np.dtype(getattr(ml_dtypes, name, None) or name)
    for name in ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
}
each_format = pytest.mark.parametrize("name", FORMATS)
quiet = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None)


pytestmark = pytest.mark.filterwarnings("ignore:(invalid|overflow) .*:RuntimeWarning")


def drawn(strategy, count=500):
    found = []

    @settings(quiet, max_examples=count)
    @given(strategy)
    def collect(x):
        found.append(x)

    collect()
    return found


@each_format
def test_floats_are_finite_not_zero_and_of_their_format(name):
    for x in drawn(strategies.floats(name), 100):
        assert np.asarray(x).dtype == FORMATS[name]
        assert np.isfinite(np.float64(x))
        assert np.float64(x) != 0


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float8_e5m2"])
def test_floats_are_drawn_at_every_exponent(name):
    patterns = every_pattern(name if name == "float16" else FORMATS[name]).view(FORMATS[name])
    values = patterns.astype(np.float64)
    values = values[np.isfinite(values)]
    expected = {math.frexp(v)[1] for v in values if v}
    numbers = list(map(float, drawn(strategies.floats(name), 600)))
    found = collections.Counter(math.frexp(x)[1] for x in numbers)
    assert found.keys() <= expected
    assert len(found) > 0.7 * len(expected)
    assert {x > 0 for x in numbers} == {True, False}
    # Uniform over exponents: no more in the upper half than in the lower one, but for shrinking.
    middle = (min(expected) + max(expected)) / 2
    share = sum(n for e, n in found.items() if e > middle) / len(numbers)
    assert 0.3 < share < 0.7


def test_no_exponent_is_drawn_much_more_often_than_another():
    numbers = drawn(strategies.floats("float16"), 800)
    found = collections.Counter(math.frexp(float(x))[1] for x in numbers)
    mean = len(numbers) / 40
    assert max(found.values()) < 2.5 * mean  # `integers` draws one of them ten times as often
    assert min(found[e] for e in range(-23, 17)) > 0.1 * mean  # 2 of 20 by chance: 1 in 50,000


@pytest.mark.parametrize(
    "shape,expected",
    [
        (3, (3,)),
        (np.int64(3), (3,)),
        ([2, 3], (2, 3)),
        (np.array([2, 3]), (2, 3)),
        ((), ()),
        (st.just(3), (3,)),
        (st.just([2, 3]), (2, 3)),
    ],
)
def test_arrays_of_a_length_or_a_shape(shape, expected):
    strategy = strategies.arrays("float16", shape)
    assert find(strategy, lambda x: True, settings=quiet).shape == expected


def test_a_size_that_is_no_integer_is_refused():
    with pytest.raises(TypeError, match="'float' object cannot be interpreted as an integer"):
        strategies.arrays("float16", (2, 1.5))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_floats_reach_every_number_of_a_small_format(name):
    patterns = every_pattern(FORMATS[name]).view(FORMATS[name])
    values = np.float64(patterns)
    expected = set(values[np.isfinite(values) & (values != 0)])
    found = set(map(float, drawn(strategies.floats(name), 1200)))
    assert found <= expected
    assert len(found) > 0.8 * len(expected)


def test_subnormal_numbers_are_left_out_on_request():
    tiny = float(np.finfo(np.float16).smallest_normal)
    assert min(abs(float(x)) for x in drawn(strategies.floats("float16"))) < tiny
    without = drawn(strategies.floats("float16", subnormal=False))
    assert min(abs(float(x)) for x in without) >= tiny


def test_floats_shrink_to_one():
    assert find(strategies.floats("bfloat16"), lambda x: True, settings=quiet) == 1
    assert find(strategies.floats("float32"), lambda x: abs(x) > 5, settings=quiet) == 8


@each_format
def test_special_values_are_those_of_the_format(name):
    dtype = FORMATS[name]
    values = strategies.special_array(name)
    assert values.dtype == dtype
    patterns = set(bits(values).tolist())
    assert len(patterns) == len(values)
    unsigned = np.dtype(f"u{dtype.itemsize}")
    sign = 1 << (8 * dtype.itemsize - 1)
    of = lambda x: int(np.asarray(x).astype(dtype).view(unsigned))
    one, largest = of(1), of(float(ml_dtypes.finfo(dtype).max))
    normal = of(float(ml_dtypes.finfo(dtype).smallest_normal))
    expected = {0, 1, normal - 1, normal, one - 1, one, one + 1, largest}
    assert expected | {sign | p for p in expected} <= patterns
    wide = values.astype(np.float64)
    has_infinity = name != "float8_e4m3fn"
    assert np.isinf(wide).sum() == (2 if has_infinity else 0)
    assert np.isnan(wide).sum() >= 2


@pytest.mark.parametrize("narrow", ["bfloat16", "float16"])
def test_special_values_of_float32_have_the_ties_of_narrow_formats(narrow):
    dtype = FORMATS[narrow]
    values = every_pattern(narrow if narrow == "float16" else dtype).view(dtype)
    finite = np.sort(np.float64(values[np.isfinite(np.float64(values))]))
    ties = set(((finite[1:] + finite[:-1]) / 2).tolist())
    special = strategies.special_array("float32")
    found = {float(x) for x in special if float(x) in ties and x != 0}
    eps = float(ml_dtypes.finfo(dtype).eps)
    assert {1 + eps / 2, 1 + 3 * eps / 2, 2 - eps / 2} <= found
    assert {math.frexp(x)[1] for x in found} >= {1, math.frexp(finite[finite > 0][0])[1] - 1}
    limit = float(np.nextafter(np.float32(ml_dtypes.finfo(dtype).max), np.float32(np.inf)))
    assert any(
        np.isinf(np.float32(dtype.type(x))) and np.isfinite(x) and x < limit * 1.01 for x in special
    )


def test_nan_payloads_survive():
    payloads = {int(bits(x)) for x in drawn(strategies.special_values("float32")) if np.isnan(x)}
    assert {0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFF800001} <= payloads
    nan = strategies.special_values("bfloat16").filter(lambda x: np.isnan(np.float32(x)))
    arrays = drawn(strategies.arrays("bfloat16", (2,), elements=nan), 100)
    assert len({int(b) for array in arrays for b in bits(array)}) >= 4


@each_format
@quiet
@given(st.data())
def test_arrays_have_their_dtype_and_shape(name, data):
    x = data.draw(strategies.arrays(name, (2, 3)))
    assert (x.dtype, x.shape) == (FORMATS[name], (2, 3))
    y = data.draw(strategies.arrays(name, st.sampled_from([(), (0, 2), (4,)])))
    assert y.shape in [(), (0, 2), (4,)]
    y[...] = 1  # writable


def test_trees_have_mixed_dtypes_in_nested_containers():
    trees = drawn(strategies.trees(), 150)
    dtypes = [{x.dtype.name for x in jax.tree.leaves(tree)} for tree in trees]
    assert set().union(*dtypes) == {"float32", "bfloat16", "float16", "int32", "uint8", "bool"}
    assert any(len(d) > 1 for d in dtypes)
    assert max(len(jax.tree.leaves(tree)) for tree in trees) > 3
    assert {type(tree) for tree in trees} >= {dict, list, tuple}
    only = drawn(strategies.trees(("float16",), others=False), 100)
    assert {x.dtype.name for tree in only for x in jax.tree.leaves(tree)} == {"float16"}


@pytest.mark.parametrize("strategy", [strategies.floats, strategies.special_values])
def test_unknown_formats_are_errors(strategy):
    with pytest.raises(ValueError, match="did you mean 'float16'"):
        strategy("float17")
