"""Roundings against NumPy's integers, ml_dtypes and float64; nothing here calls what it tests."""

import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers.bits import bits as patterns
from helpers.bits import every_pattern, unsigned
from hypothesis import given, settings

import jmp_train as jt
from jmp_train.numerics.rounding import add_float32, to_float32
from jmp_train.testing import strategies

FORMATS = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
each_format = pytest.mark.parametrize("name", FORMATS)
stochastic_round = jax.jit(jt.numerics.stochastic_round, static_argnums=1)
round_to_nearest = jax.jit(jt.numerics.round_to_nearest, static_argnums=1)
split, join = jax.jit(jt.numerics.split_bf16_remainder), jax.jit(jt.numerics.join_bf16_remainder)


@functools.cache
def finite_values(name):
    """Every finite value of a format from zero up, in float32; all four lie within its range."""
    dtype = FORMATS[name]
    count = 2 ** (8 * dtype.itemsize - 1)
    values = np.arange(count).astype(unsigned(dtype)).view(dtype).astype(np.float32)
    return values[np.isfinite(values)]


ANY_FLOAT32 = strategies.floats("float32") | strategies.special_values("float32")
numbers = strategies.arrays("float32", (16,), elements=ANY_FLOAT32)
examples = settings(max_examples=60, deadline=None)


def random_patterns(count, seed=0):
    return np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32)


# Rounding to nearest


@each_format
def test_nearest_is_the_cast_of_ml_dtypes_at_and_around_every_tie(name):
    values = finite_values(name)
    ties = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
    around = np.concatenate(
        [values, ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(0))]
    )
    x = np.concatenate([around, -around, random_patterns(200_000).view(np.float32)])
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(FORMATS[name])
    got = np.asarray(round_to_nearest(x, name))
    nan = np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(nan, np.isnan(got.astype(np.float32)))
    np.testing.assert_array_equal(patterns(got)[~nan], patterns(expected)[~nan])


# bfloat16 and its remainder


def expected_split(bits):
    """Round half away from zero by integer arithmetic on sign and magnitude; NaN made quiet."""
    sign, magnitude = bits >> 31 << 15, bits & np.uint32(0x7FFFFFFF)
    nan = magnitude > 0x7F800000
    high = (magnitude + np.uint32(0x8000)) >> 16
    if nan.any():
        high = np.where(nan, (magnitude >> 16) | np.uint32(0x40), high)
    return (sign | high).astype(np.uint16), bits.astype(np.uint16), nan


def check_split(bits):
    nearest, remainder = split(bits.view(np.float32))
    high, low, nan = expected_split(bits)
    assert np.array_equal(patterns(nearest), high)
    assert np.array_equal(np.asarray(remainder), low)
    joined = patterns(join(nearest, remainder))
    assert np.array_equal(joined, bits | (nan.astype(np.uint32) << 22))


def test_split_and_join_are_inverse_for_all_high_halves_and_the_low_ones_that_matter():
    """65,536 high halves, so every exponent, carry, infinity and NaN, by 167 low halves: the ends,
    the tie and what is beside it, powers of two, and random ones. 10.9 million in all."""
    near = [0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0x8002, 0xFFFE, 0xFFFF]
    powers = [sign * 2**n % 65536 for n in range(16) for sign in (1, -1)]
    low = {*near, *powers, *np.random.default_rng(0).integers(0, 65536, 128).tolist()}
    high = np.arange(65536, dtype=np.uint32) << 16
    bits = (high[:, None] | np.array(sorted(low), np.uint32)).reshape(-1)
    assert bits.size > 10**7
    check_split(bits)


@examples
@given(numbers)
def test_split_and_join_are_inverse_at_every_exponent_and_special_value(x):
    joined = np.asarray(join(*split(x)))
    nan = np.isnan(x)
    np.testing.assert_array_equal(patterns(joined)[~nan], patterns(x)[~nan])
    assert np.isnan(joined[nan]).all()


@pytest.mark.slow
def test_split_and_join_are_inverse_for_every_float32():
    for start in range(0, 2**32, 2**24):
        check_split(np.arange(start, start + 2**24, dtype=np.uint32))


def test_split_rounds_to_the_nearest_bfloat16_and_off_ties_as_every_cast_does():
    bits = random_patterns(2_000_000)
    bits[:65536] = np.arange(65536, dtype=np.uint32) << 16 | 0x7FFF
    x = bits.view(np.float32)
    x = x[np.isfinite(x)]
    ours = np.asarray(split(x)[0])
    with np.errstate(over="ignore"):
        cast = x.astype(ml_dtypes.bfloat16)
    tie = (patterns(x) & 0xFFFF) == 0x8000
    np.testing.assert_array_equal(patterns(ours)[~tie], patterns(cast)[~tie])
    assert tie.sum() > 10
    away = np.abs(ours[tie].astype(np.float64)) - np.abs(x[tie].astype(np.float64))
    assert (away > 0).all()


def test_ties_to_even_would_need_more_than_16_bits():
    """Why the tie goes away from zero: too many float32 values round to an even bfloat16."""
    bits = np.arange(0x3F7F0000, 0x3F820000, dtype=np.uint32)
    to_one = bits.view(np.float32).astype(ml_dtypes.bfloat16) == ml_dtypes.bfloat16(1)
    assert to_one.sum() == 65537
    ours = np.asarray(split(bits.view(np.float32))[0]) == ml_dtypes.bfloat16(1)
    assert ours.sum() == 65536


@pytest.mark.parametrize("bits", [0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000])
def test_nan_splits_into_nan_and_joins_into_nan(bits):
    x = np.array([bits], np.uint32).view(np.float32)
    nearest, remainder = split(x)
    assert np.isnan(np.asarray(nearest, np.float32)).all()
    assert np.isnan(np.asarray(join(nearest, remainder))).all()


def test_the_largest_float32_rounds_to_infinity_and_comes_back():
    x = np.array([3.4028235e38, -3.4028235e38, np.inf, -np.inf], np.float32)
    nearest, remainder = split(x)
    np.testing.assert_array_equal(np.asarray(nearest, np.float32), np.sign(x) * np.inf)
    np.testing.assert_array_equal(patterns(join(nearest, remainder)), patterns(x))


@pytest.mark.parametrize("dtypes", [(jnp.float16, jnp.uint16), (jnp.bfloat16, jnp.int16)])
def test_join_refuses_what_split_does_not_give(dtypes):
    with pytest.raises(TypeError, match="expected bfloat16 and uint16"):
        jt.numerics.join_bf16_remainder(jnp.zeros(1, dtypes[0]), jnp.zeros(1, dtypes[1]))


# Stochastic rounding


def neighbours(x, values):
    """For non-negative x: the value at or below it, and the next one."""
    index = np.searchsorted(values, x, side="right") - 1
    below = values[index]
    above = np.where(below == x, below, values[np.minimum(index + 1, len(values) - 1)])
    return below, above


@each_format
def test_stochastic_rounding_gives_a_neighbour_and_keeps_what_is_representable(name):
    values = finite_values(name)
    rng = np.random.default_rng(1)
    inside = random_patterns(300_000, seed=2).view(np.float32)
    inside = np.abs(inside[np.abs(inside) <= values[-1]])
    between = (values[:-1] + (values[1:] - values[:-1]) * rng.random(len(values) - 1)).astype(
        np.float32
    )
    x = np.concatenate([inside, between, values])
    below, above = neighbours(x, values)
    for sign in (1, -1):
        signed = (sign * x).astype(np.float32)
        got = np.asarray(stochastic_round(signed, name, jax.random.key(3)))
        np.testing.assert_array_equal(np.signbit(got.astype(np.float32)), np.signbit(signed))
        size = np.abs(got.astype(np.float32))
        assert ((size == below) | (size == above)).all()
        exact = below == x
        np.testing.assert_array_equal(size[exact], x[exact])


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_is_unbiased_in_every_interval(name):
    """Each interval between neighbours at five places, 10,000 draws each. The number of roundings
    up is binomial: its mean must be within 5 standard errors, and the squared errors' sum over
    all intervals within 5 of its own."""
    values = finite_values(name).astype(np.float64)
    share = np.array([1 / 64, 0.25, 0.5, 0.7, 63 / 64])
    gap = values[1:] - values[:-1]
    x = (values[:-1, None] + share * gap[:, None]).astype(np.float32)
    share = (x - values[:-1, None]) / gap[:, None]  # as float32 has it
    draws = 10_000
    keys = jax.random.split(jax.random.key(4), 10)
    up = sum(
        (np.asarray(stochastic_round(np.broadcast_to(x, (draws // 10, *x.shape)), name, key))
         .astype(np.float64) > values[:-1, None]).sum(axis=0)
        for key in keys
    )  # fmt: skip
    z = (up - draws * share) / np.sqrt(draws * share * (1 - share))
    assert np.abs(z).max() < 5
    assert abs((z**2).sum() - z.size) < 5 * math.sqrt(2 * z.size)


@each_format
@pytest.mark.parametrize("where", ["normal", "subnormal", "smallest", "below_two"])
def test_the_mean_of_many_roundings_is_the_value_within_five_standard_errors(name, where):
    info = ml_dtypes.finfo(FORMATS[name])
    x = np.float32(
        {
            "normal": 1.0 + float(info.eps) * 0.3,
            "subnormal": float(info.smallest_subnormal) * 2.37,
            "smallest": float(info.smallest_subnormal) * 0.04,
            "below_two": 2.0 - float(info.eps) * 0.1,  # its upper neighbour has a new exponent
        }[where]
    )
    n = 400_000
    got = np.asarray(stochastic_round(jnp.full(n, x), name, jax.random.key(5)), np.float64)
    low, high = got.min(), got.max()
    assert low < x < high
    share = (float(x) - low) / (high - low)
    error = (high - low) * math.sqrt(share * (1 - share) / n)
    assert abs(got.mean() - float(x)) < 5 * error


def test_a_bfloat16_rounds_up_in_exactly_its_share_of_the_random_words():
    """Unbiased exactly, not nearly: of the 65,536 words that may be drawn, as many round up as the
    low half says."""
    low = np.array([0, 1, 2, 77, 0x7FFF, 0x8000, 0xFFFF], np.uint32)
    x = (np.uint32(0x3F800000) | low).view(np.float32)
    words = jnp.arange(65536, dtype=jnp.uint16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.random, "bits", lambda key, shape, dtype: words[:, None])
        rounded = jt.numerics.stochastic_round(
            jnp.broadcast_to(x, (65536, len(x))), "bfloat16", None
        )
    np.testing.assert_array_equal((np.asarray(rounded, np.float32) > 1).sum(axis=0), low)


@pytest.mark.parametrize("name", ["float16", "float8_e4m3fn", "float8_e5m2"])
def test_the_64_bits_of_the_other_formats_are_compared_with_the_exact_share(name):
    """The threshold of a few values against Python's integers, whatever the number of bits that
    are cut off: a word one below it rounds up, the word itself does not."""
    smallest = float(ml_dtypes.finfo(FORMATS[name]).smallest_subnormal)
    for x in (
        1.0003,
        smallest * 1.7,
        smallest * 2.0**-7.3,
        smallest * 2.0**-20.9,
        smallest * 2e-12,
    ):
        x = float(np.float32(x))
        values = finite_values(name).astype(np.float64)
        below, above = neighbours(np.float64(x), values)
        threshold = (x - below) / (above - below) * 2.0**64
        assert threshold == int(threshold)
        for word, goes_up in ((int(threshold) - 1, True), (int(threshold), False)):
            draw = jnp.array([word >> 32, word % 2**32], jnp.uint32)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(jax.random, "bits", lambda *_, draw=draw: draw)
                got = float(jt.numerics.stochastic_round(x, name, None))
            assert got == (above if goes_up else below)


@each_format
def test_beyond_the_largest_value_stochastic_rounding_is_a_cast(name):
    largest = float(ml_dtypes.finfo(FORMATS[name]).max)
    factors = (1, 1 + 2**-12, 1.01, 1.03, 1.06, 1.1, 1.3)
    x = [largest * f for f in factors if largest * f < 3.4e38]
    x = np.array([*x, 3.4028235e38, np.inf, np.nan], np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = np.concatenate([x, -x]).astype(FORMATS[name]).astype(np.float32)
    for seed in range(3):
        got = stochastic_round(np.concatenate([x, -x]), name, jax.random.key(seed))
        np.testing.assert_array_equal(np.asarray(got).astype(np.float32), expected)


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_stochastic_rounding_is_reproducible_from_its_key(make_key):
    x = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    first = patterns(stochastic_round(x, "bfloat16", make_key(0)))
    again = patterns(jt.numerics.stochastic_round(x, "bfloat16", make_key(0)))  # without jit
    other = patterns(stochastic_round(x, "bfloat16", make_key(1)))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.2


def test_elements_are_rounded_independently():
    """The number of roundings up in a row of 1,000 ties has the binomial variance: 5 sigma."""
    x = jnp.full((2000, 1000), 1 + 2.0**-8)
    up = (np.asarray(stochastic_round(x, "bfloat16", jax.random.key(6)), np.float32) > 1).sum(1)
    assert abs(up.var(ddof=1) / 250 - 1) < 5 * math.sqrt(2 / 1999)


@pytest.mark.parametrize("function", [jt.numerics.round_to_nearest, functools.partial(jt.numerics.stochastic_round, key=jax.random.key(0))])  # fmt: skip
def test_other_formats_are_refused(function):
    with pytest.raises(ValueError, match="cannot round to float32; expected one of bfloat16"):
        function(jnp.ones(2), dtype=jnp.float32)
    with pytest.raises(TypeError, match="array of int32; expected float32"):
        function(jnp.ones(2, jnp.int32), dtype=jnp.bfloat16)
    with jax.enable_x64(True), pytest.raises(TypeError, match="float64; expected float32"):
        function(jnp.ones(2, jnp.float64), dtype=jnp.bfloat16)


# Sums


@pytest.mark.parametrize("jit", [True, False])
def test_a_sum_with_zero_is_the_other_subnormal(jit):
    """All of bfloat16's subnormals and 100,000 others; of two zeros the sum is NumPy's."""
    magnitudes = [np.arange(128) << 16, np.random.default_rng(0).integers(0, 2**23, 100_000)]
    x = np.concatenate(magnitudes).astype(np.uint32).view(np.float32)
    x = np.concatenate([x, -x])
    add = jax.jit(add_float32) if jit else add_float32
    for zero in (0.0, -0.0):
        y = np.full_like(x, zero)
        np.testing.assert_array_equal(patterns(add(x, y)), patterns(x + y))


def test_other_sums_are_those_of_numpy_but_for_flushed_subnormals():
    """A sum with a subnormal operand or result may lack that subnormal, less than 2^-126, and then
    be rounded otherwise: by 2^-23 of it."""
    x, y = (random_patterns(200_000, seed).view(np.float32) for seed in (0, 1))
    with np.errstate(over="ignore", invalid="ignore"):
        near = x * np.float32(-1 + 2**-20)
        x, y = np.concatenate([x, x, y]), np.concatenate([y, near, np.zeros_like(y)])
        expected = x + y
    got = np.asarray(jax.jit(add_float32)(x, y))
    normal = ~(np.abs(np.stack([x, y, expected])) < np.finfo(np.float32).tiny).any(axis=0)
    normal |= y == 0
    is_nan = np.isnan(expected)
    assert normal.mean() > 0.9 and np.isnan(got[is_nan]).all()
    same = normal & ~is_nan
    np.testing.assert_array_equal(patterns(got)[same], patterns(expected)[same])
    rest = ~normal & ~is_nan
    apart = np.abs(got[rest].astype(np.float64) - expected[rest])
    assert (apart <= np.maximum(2.0**-126, 2.0**-23 * np.abs(expected[rest]))).all()


# Kahan


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float8_e4m3fn"])
def test_kahan_addition_follows_float64(name):
    """From 1 to about 1.1. A step rounds the compensation, at most half the value's spacing, to
    bfloat16: an error evenly spread up to 2^-9 of that. 500 such add up to a normal one."""
    spacing = float(ml_dtypes.finfo(FORMATS[name]).eps)
    sigma = spacing / 2 * 2.0**-9 / math.sqrt(3) * math.sqrt(500)
    rng = np.random.default_rng(0)
    value = jnp.ones(200, name)
    lost = jnp.zeros(200, jnp.bfloat16)
    exact = np.ones(200)
    steps = (rng.normal(size=(500, 200)) * 1e-4 + 2e-4).astype(np.float32)
    add = jax.jit(jt.numerics.kahan_add)
    plain = np.asarray(value)
    for step in steps:
        value, lost = add(value, lost, step)
        exact = exact + step.astype(np.float64)
        plain = (plain.astype(np.float32) + step).astype(plain.dtype)
    together = np.asarray(value, np.float64) + np.asarray(lost, np.float64)
    assert np.abs(together - exact).max() < 5 * sigma
    nearest = exact.astype(FORMATS[name]).astype(np.float64)
    assert (np.abs(np.asarray(value, np.float64) - nearest) <= spacing).all()
    if name != "float16":  # where rounding alone loses every step
        assert (plain.astype(np.float64) == 1).all()


def test_the_compensation_is_what_the_rounding_lost_exactly():
    rng = np.random.default_rng(0)
    value = rng.normal(size=10_000).astype(ml_dtypes.bfloat16)
    step = (rng.integers(-128, 128, 10_000) * 2.0**-12).astype(np.float32)
    new, lost = jt.numerics.kahan_add(value, np.zeros(10_000, ml_dtypes.bfloat16), step)
    total = value.astype(np.float32) + step
    expected = total.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(patterns(new), patterns(expected))
    rest = (total.astype(np.float64) - expected.astype(np.float64)).astype(ml_dtypes.bfloat16)
    big = np.abs(value.astype(np.float32)) > 2.0**-4  # where float32 holds the total exactly
    np.testing.assert_array_equal(np.asarray(lost, np.float32)[big], rest.astype(np.float32)[big])
    assert (rest != 0).mean() > 0.5


def test_a_compensation_of_an_overflow_is_zero():
    new, lost = jt.numerics.kahan_add(jnp.float16(65504), jnp.bfloat16(0), 1e5)
    assert float(new) == np.inf and float(lost) == 0


@each_format
def test_widening_is_exact(name):
    bits = every_pattern(FORMATS[name])
    values = bits.view(FORMATS[name])
    expected = values.astype(np.float32)
    normal = ~np.isnan(expected)
    np.testing.assert_array_equal(
        patterns(jax.jit(to_float32)(values))[normal], patterns(expected)[normal]
    )
