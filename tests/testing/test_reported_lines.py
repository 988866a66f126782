"""An operation in a library's jitted function, loop or branch is reported where the user calls it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax

import jmp_train as jt
from jmp_train import testing

X = jax.ShapeDtypeStruct((4, 4), jnp.float32)
HALF = jax.ShapeDtypeStruct((4, 4), jnp.bfloat16)
DENSE = linen.Dense(4)


def failure(assertion, *args, **options):
    with pytest.raises(AssertionError) as caught:
        assertion(*args, **options)
    return str(caught.value)


def place_of(fn, line=1):
    """How a message names a line of a function, counted from its `def`."""
    return f"{__file__}:{fn.__code__.co_firstlineno + line} ({fn.__qualname__})"


def cumulative(x):
    return jnp.cumsum(x * 2, 0)


def activated(x):
    return jax.nn.silu(x)


def interpolated(x):
    return jax.image.resize(x, (8, 8), "linear")


def recomputed(x):
    return jax.checkpoint(DENSE.apply)(zeros(), x)


def jitted(x):
    return jax.jit(DENSE.apply)(zeros(), x)


def branched(x):
    return lax.cond(x[0, 0] > 0, DENSE.apply, lambda _, x: x, zeros(), x)


def zeros():
    return {"params": {"kernel": jnp.zeros((4, 4)), "bias": jnp.zeros(4)}}


@pytest.mark.parametrize(
    "fn,name",
    [
        (cumulative, "cumsum"),
        (activated, "logistic"),
        (interpolated, "dot_general"),
        (recomputed, "dot_general"),
        (jitted, "dot_general"),
        (branched, "dot_general"),
    ],
)
def test_an_operation_inside_a_library_is_named_at_its_call(fn, name):
    for program in (fn, jax.vmap(fn, axis_size=2, in_axes=None), jax.jit(fn)):
        message = failure(testing.assert_no_dtype, program, X, only=[name])
        assert re.search(rf"\n  {name}  .*  inside .*  at {re.escape(place_of(fn))}$", message)


def test_each_call_of_a_stored_function_has_its_line():
    def twice(x):
        x = jnp.cumsum(x, 0)
        return jnp.cumsum(x, 0)

    lines = failure(testing.assert_reductions_in, twice, HALF).splitlines()[1:]
    found = [line.rpartition("  at ")[2] for line in lines]
    assert found == [place_of(twice, 1), place_of(twice, 2)]


class Recomputed(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.remat(linen.Dense)(4)(x)


class Jitted(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.jit(linen.Dense)(4)(x)


class Recurrent(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.RNN(linen.SimpleCell(4))(x)


@pytest.mark.parametrize("module", [Recomputed, Jitted, Recurrent])
def test_a_transformed_layer_of_linen_is_named_at_its_call(module):
    net = module()
    params = jax.eval_shape(net.init, jax.random.key(0), X)
    message = failure(testing.assert_contractions_in, net.apply, params, X)
    places = re.findall(rf"  in {module.__name__}/.*  at (.*)", message)
    line = module.__call__.__wrapped__.__code__.co_firstlineno + 2  # after the decorator
    assert places and all(place.startswith(f"{__file__}:{line} (") for place in places)


class Net(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        x = nnx.remat(nnx.Linear.__call__)(self.linear, x)
        return jax.nn.silu(x)


@pytest.mark.parametrize(
    "line,name,module", [(1, "dot_general", "Net/Linear"), (2, "logistic", "Net")]
)
def test_a_module_of_nnx_is_named_outside_the_body(line, name, module):
    fn = nnx.jit(lambda net, x: net(x))
    message = failure(testing.assert_no_dtype, fn, Net(), X, only=[name])
    assert f"  in {module}  inside " in message
    assert message.endswith(place_of(Net.__call__, line))


def variance(x):
    return jnp.var(x)


def test_an_overflow_inside_a_library_is_named_at_its_call():
    large = np.array([-6e4, 6e4, 6e4, 6e4], np.float16)
    assert place_of(variance) in failure(testing.assert_no_overflow, variance, large)


def test_the_worst_operation_inside_a_library_is_named_at_its_call():
    x = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    message = failure(testing.assert_close_to_float64, activated, x, rtol=0.0)
    assert place_of(activated) in message.partition("Worst operation")[2]


def test_a_nonfinite_operation_inside_a_library_is_named_at_its_call():
    ops = jt.debug.first_nonfinite(variance, np.array([np.float32(3e38), -3e38])).ops
    assert ops and {op.source for op in ops} == {place_of(variance)}
