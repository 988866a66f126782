"""Exponents and shares against NumPy's frexp and ml_dtypes' casts, over every 16-bit number."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jmp_train as jt
from jmp_train.numerics.histograms import EXPONENTS
from jmp_train.tree import nonfinite_leaves, path_names

PATTERNS = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
EVERY = {"float16": PATTERNS.view(np.float16), "bfloat16": PATTERNS.view(ml_dtypes.bfloat16)}
pytestmark = pytest.mark.filterwarnings(
    "ignore:invalid value encountered in cast"
)  # NumPy, of a NaN

TARGETS = ("float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz")

histogram = jax.jit(jt.numerics.exponent_histogram)


def near_the_edges():
    """float32 numbers around every place where a format's rounding changes its mind."""
    edges = [np.float32(s * 2.0**e) for e in range(-149, 128) for s in (1.0, 1.25, 1.5, 1.75)]
    edges += [np.float32(x) for x in (65504, 65519, 65520, 448, 464, 57344, 61440, 240, 248)]
    edges += [np.float32(2**-14 - 2**-25), np.float32(2**-6 - 2**-10), np.float32(2**-7 - 2**-11)]
    bits = np.array(edges, np.float32).view(np.uint32).astype(np.int64)
    near = (bits[:, None] + np.arange(-2, 3)).clip(0, 0x7F800000).astype(np.uint32).view(np.float32)
    return np.concatenate([near.ravel(), -near.ravel(), [np.nan, np.inf]]).astype(np.float32)


def exponents_of(x):
    x = np.abs(x.astype(np.float64))
    finite = x[np.isfinite(x) & (x > 0)]
    exponents, counts = np.unique(np.frexp(finite)[1] - 1, return_counts=True)
    return dict(zip(exponents.tolist(), counts.tolist(), strict=True))


@pytest.mark.parametrize("x", [*EVERY.values(), near_the_edges()], ids=["f16", "bf16", "f32"])
def test_every_exponent_is_counted(x):
    got = histogram({"x": x, "step": np.arange(3)})
    counts = {e: int(n) for e, n in zip(EXPONENTS, np.asarray(got.counts), strict=True) if n}
    assert counts == exponents_of(x)
    wide = x.astype(np.float64)
    assert int(got.zero) == (wide == 0).sum()
    assert int(got.inf) == np.isinf(wide).sum()
    assert int(got.nan) == np.isnan(wide).sum()


def shares_by_casting(x, target):
    """Counts from the cast itself; float32 holds every `x` given here."""
    x = x.astype(np.float32)
    dtype = jnp.dtype(target)
    with np.errstate(over="ignore"):
        cast = np.abs(x.astype(dtype).astype(np.float64))
    given, finite = x != 0, np.isfinite(x)
    kept = finite & given & np.isfinite(cast) & (cast > 0)
    normal = cast >= float(jnp.finfo(dtype).smallest_normal)
    return {
        "zero": (x == 0).sum(),
        "flushed": (given & (cast == 0)).sum(),
        "subnormal": (kept & ~normal).sum(),
        "normal": (kept & normal).sum(),
        "overflow": (finite & ~np.isfinite(cast)).sum(),
        "inf": np.isinf(x).sum(),
        "nan": np.isnan(x).sum(),
    }


@pytest.mark.parametrize("target", TARGETS)
def test_the_shares_are_those_of_the_cast(target):
    for x in (*EVERY.values(), near_the_edges()):
        got = jt.numerics.shares_in(x, target)
        expected = shares_by_casting(x, target)
        # The shares are counts over the size, in float32: exact to a unit in the last place.
        counts = {k: round(float(v) * x.size) for k, v in got._asdict().items()}
        assert counts == expected
        assert sum(counts.values()) == x.size


def test_a_scale_moves_gradients_into_the_format():
    x = np.random.default_rng(0).lognormal(-18.0, 4.0, 5000).astype(np.float32)
    for scale in (1.0, 1024.0, 65536.0):
        got = jt.numerics.shares_in({"g": x}, "float16", scale=scale)
        expected = shares_by_casting(x * np.float32(scale), "float16")
        assert {k: round(float(v) * x.size) for k, v in got._asdict().items()} == expected
    assert float(jt.numerics.shares_in(x, "float16").flushed) > 0.3 > float(got.flushed)


def test_a_format_wider_than_float32_is_refused():
    with pytest.raises(ValueError, match="no wider than float32"):
        jt.numerics.shares_in(jnp.ones(2), "float64")


def test_a_tree_without_numbers_has_no_shares():
    assert float(jt.numerics.shares_in({}, "float16").normal) == 0.0
    assert int(histogram({"n": jnp.arange(3)}).counts.sum()) == 0
    assert nonfinite_leaves({}).shape == (0,)


def test_the_leaves_that_are_not_finite_have_names():
    from flax import nnx

    params = nnx.state(nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0))), nnx.Param)
    assert path_names(params) == ["layers/0/bias", "layers/0/kernel"]
    bad = jax.tree_util.tree_map_with_path(
        lambda path, x: x / 0 if "kernel" in str(path) else x, params
    )
    assert nonfinite_leaves(bad).tolist() == [False, True]
