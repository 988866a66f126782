"""Functions that autocast calls again, with arrays in half precision."""

import contextvars
import functools
import gc
import re
import types
import weakref
from collections import Counter
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.arrays import rounded
from jax import lax
from jax.sharding import Mesh, PartitionSpec

import jmp_train as jt
from jmp_train.models import attention
from jmp_train.models.blockwise import blockwise_attention
from jmp_train.testing import assert_costs_nothing, assert_same_bits
from tests import test_gpu_first

HALF = ["bfloat16", "float16"]


def choosing(q, k):
    """Tells by its result in which dtype it was traced: the sum of products, or twice it in float32."""
    product = jnp.einsum("...ij,...jk->...ik", q, k)
    return product if q.dtype in (jnp.bfloat16, jnp.float16) else 2 * product


marked = jt.traced_in_half(choosing)


def arrays():
    return jnp.asarray(rounded((4, 4))), jnp.asarray(rounded((4, 4)) * 2)


def by_hand(q, k, dtype):
    """What the function does with arrays in half precision, in float32."""
    return choosing(q.astype(dtype), k.astype(dtype)).astype(jnp.float32)


def on_a_mesh(f):
    return jax.shard_map(
        f,
        mesh=Mesh(np.array(jax.devices()[:1]), "d"),
        in_specs=(PartitionSpec("d"), PartitionSpec()),
        out_specs=PartitionSpec("d"),
    )


WAYS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "remat in jit": lambda f: jax.jit(jax.checkpoint(f)),
    "scan": lambda f: lambda q, k: lax.scan(lambda c, _: (c, f(c, k)), q, None, length=1)[1][0],
    "while": lambda f: (
        lambda q, k: lax.fori_loop(
            0, 1, lambda i, c: jnp.asarray(f(q, k), c.dtype), jnp.zeros_like(q)
        )
    ),
    "cond": lambda f: lambda q, k: lax.cond(q[0, 0] < 1e9, f, lambda q, k: q, q, k),
    "region": lambda f: jt.with_precision("bfloat16")(f),
}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("way", WAYS)
def test_it_is_called_with_half_arrays_wherever_it_is(way, dtype):
    q, k = arrays()
    expected = "bfloat16" if way == "region" else dtype
    eps = jnp.finfo(expected).eps  # XLA may leave out the rounding of the result
    got = jax.jit(jt.autocast(WAYS[way](marked), dtype))(q, k)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, by_hand(q, k, expected), rtol=eps)
    # The same function, not marked, is traced in float32.
    unmarked = jax.jit(jt.autocast(WAYS[way](choosing), dtype))(q, k)
    np.testing.assert_allclose(unmarked, 2 * got, rtol=2 * eps)


def test_it_is_called_with_half_arrays_in_a_shard_map_around_autocast():
    q, k = arrays()
    got = jax.jit(on_a_mesh(jt.autocast(marked)))(q, k)
    np.testing.assert_allclose(got, by_hand(q, k, jnp.bfloat16), rtol=1e-2)
    gradient = jax.grad(lambda q, k: on_a_mesh(jt.autocast(marked))(q, k).sum())(q, k)
    np.testing.assert_allclose(
        gradient, jax.grad(lambda q, k: by_hand(q, k, jnp.bfloat16).sum())(q, k), rtol=1e-2
    )


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("way", ["plain", "jit", "remat", "scan"])
def test_its_gradient_is_the_one_of_the_function_in_half(way, dtype):
    q, k = arrays()

    def gradients(f):  # cotangents that are exact in half precision
        signs = jnp.asarray([[1.0, -2.0, 0.5, 1.0]])
        return jax.jit(jax.grad(lambda q, k: jnp.sum(f(q, k) * signs), argnums=(0, 1)))(q, k)

    got = gradients(jt.autocast(WAYS[way](marked), dtype))
    expected = gradients(lambda q, k: by_hand(q, k, dtype))
    chex.assert_trees_all_close(got, expected, rtol=2 * float(jnp.finfo(dtype).eps))


def test_both_modes_and_second_derivatives_are_those_of_the_function():
    q, k = arrays()
    for f, plain in [
        (marked, choosing),
        (jt.autocast(marked), lambda q, k: by_hand(q, k, jnp.bfloat16)),
    ]:
        scalar, expected = (lambda q, k, g=g: jnp.sum(g(q, k) ** 2) for g in (f, plain))
        chex.assert_trees_all_close(
            jax.jvp(scalar, (q, k), (k, q)), jax.jvp(expected, (q, k), (k, q)), rtol=1e-2
        )
        hessians = jax.hessian(scalar)(q, k), jax.hessian(expected)(q, k)
        chex.assert_trees_all_close(*hessians, rtol=1e-2, atol=1e-2)


def of_matrices(q, k):
    product = jnp.einsum("ij,jk->ik", q, k)
    return 2 * product if q.dtype == jnp.float32 else product


def highest(q, k):
    with jax.default_matmul_precision("highest"):
        return marked(q, k)


def nested_highest(q, k):
    with jax.default_matmul_precision("highest"):
        return jt.traced_in_half(jax.jit(choosing))(q, k)


summed = jt.traced_in_half(lambda q, k: lax.psum(choosing(q, k), "d"))
NO_PRODUCTS = jt.default_op_rules.extend(as_written=["dot_general"])
INSIDE = {  # where the lists apply inside
    "vmap": (jax.vmap(jt.traced_in_half(of_matrices)), {}),
    "vmap over another axis": (jax.vmap(marked, in_axes=(1, 0)), {}),
    "shard_map": (lambda q, k: on_a_mesh(marked)(q, k), {}),
    "shard_map with psum": (on_a_mesh(lambda q, k: summed(q, k) + 0 * q), {}),
    "with_precision": (jt.with_precision("float32")(marked), {}),
    "highest": (highest, {}),
    "highest in jit": (nested_highest, {}),
    "rules": (marked, {"rules": NO_PRODUCTS}),
    "float32": (marked, {"compute_dtype": "float32"}),
}


@pytest.mark.parametrize("case", INSIDE)
def test_where_the_lists_apply_inside(case):
    f, options = INSIDE[case]
    q, k = (jnp.asarray(rounded((4, 4, 4))) for _ in range(2))
    got, expected = jax.jit(jt.autocast(f, **options))(q, k), jax.jit(f)(q, k)
    np.testing.assert_allclose(got, expected, rtol=2 * jnp.finfo(jnp.bfloat16).eps)


def test_a_derivative_inside_is_one_of_the_function_in_float32():
    q, k = arrays()
    gradient = lambda f: jax.grad(lambda q: jnp.sum(f(q, k)))
    got = jax.jit(jt.autocast(gradient(marked)))(q)
    np.testing.assert_allclose(got, 2 * gradient(jnp.matmul)(q), rtol=1e-2)


def test_arrays_that_are_not_float32_stay():
    seen = []

    @jt.traced_in_half
    def f(a, b, c, d):
        seen.append([x.dtype.name for x in (a, b, c, d)])
        return a @ b, c, d

    q, k = arrays()
    index = jnp.arange(4)
    jt.autocast(f)(q, k.astype(jnp.float16), index, index > 1)
    assert seen[-1] == ["bfloat16", "float16", "int32", "bool"]
    seen.clear()
    jt.autocast(f)(q.astype(jnp.float16), k.astype(jnp.float16), index, index > 1)
    assert all(dtypes[:2] == ["float16", "float16"] for dtypes in seen)


def test_results_count_in_the_dtype_that_they_have():
    @jt.traced_in_half
    def f(q):
        return q @ q, jnp.sum(q.astype(jnp.float32))

    def g(q):
        product, total = f(q)
        return jnp.tanh(product), jnp.tanh(total)

    rows = jt.debug.explain_autocast(g, arrays()[0]).rows
    assert [(row.op, row.dtype, row.rule) for row in rows] == [
        ("f", "bfloat16", "compute"),
        ("tanh", "bfloat16", "promote"),
        ("tanh", "float32", "promote"),
    ]
    assert rows[0].note == "traced in half" and "test_traced_in_half.py" in rows[0].source


def test_a_path_shows_the_name_of_the_function():
    rows = jt.debug.explain_autocast(highest, *arrays()).rows
    assert {row.path for row in rows} == {"jit:choosing"}


def test_trees_and_arguments_that_are_no_arrays_reach_it():
    @jt.traced_in_half
    def f(params, x, table, *, power, names=None):
        assert names == {"layer"} and power is POWER and isinstance(table, np.ndarray | jax.Array)
        assert table.dtype == x.dtype  # a float32 array that is not traced is cast too
        y = (x @ params["w"]) ** power.times if x.dtype == jnp.bfloat16 else x
        return {"y": y, "text": "done", "number": 3, "nothing": None, "same": x}

    POWER, table = types.SimpleNamespace(times=3), np.eye(4, dtype=np.float32)
    q, k = arrays()

    def model(q, k):
        outs = f({"w": k}, q, table, power=POWER, names={"layer"})
        assert outs["text"] == "done" and outs["number"] is 3 and outs["nothing"] is None  # noqa: F632
        return outs["y"], outs["same"]

    expected = ((q.astype(jnp.bfloat16) @ k.astype(jnp.bfloat16)) ** 3).astype(jnp.float32)
    got, same = jt.autocast(model)(q, k)
    np.testing.assert_allclose(got, expected, rtol=1e-2)
    np.testing.assert_array_equal(jax.jit(model)(q, k)[0], q)
    np.testing.assert_allclose(same, q, rtol=1e-2)


def test_keywords_keep_their_order():
    @jt.traced_in_half
    def f(**arrays):
        return jnp.stack(list(arrays.values()))

    got = jax.jit(lambda b, a: f(b=b, a=a))(0.0, 1.0)
    np.testing.assert_array_equal(got, [0.0, 1.0])


def test_the_lists_apply_where_traced_arrays_are_closed_over():

    def loss(mark):
        def run(w, x):
            f = mark(lambda x: x @ w["kernel"] if x.dtype == jnp.float32 else x / 0)
            return f(x).sum()

        return run

    w, x = {"kernel": arrays()[0]}, arrays()[1]
    ours, plain = loss(jt.traced_in_half), loss(lambda f: f)
    for way in (jax.grad, lambda f: jax.jit(jax.grad(f)), lambda f: jax.grad(jax.jit(f))):
        chex.assert_trees_all_close(way(ours)(w, x), way(plain)(w, x))
        cast = [way(jt.autocast(f))(w, x) for f in (ours, plain)]
        chex.assert_trees_all_close(*cast)


def test_functions_of_one_name_that_are_the_same_in_float32_are_told_apart():

    def make(factor):
        @jt.traced_in_half
        def f(x):
            return x @ x if x.dtype == jnp.float32 else factor * (x @ x)

        return f

    x, functions = jnp.eye(4), [make(factor) for factor in range(2, 7)]
    got = jt.autocast(lambda x: [f(x) for f in functions])(x)
    for factor, y in enumerate(got, 2):
        np.testing.assert_array_equal(y, factor * x)


def test_constants_of_the_function_keep_their_values():
    table = np.arange(16.0, dtype=np.float32).reshape(4, 4)

    @jt.traced_in_half
    def f(x):
        return x @ jnp.asarray(table, x.dtype) if x.dtype == jnp.bfloat16 else x @ table * 5

    np.testing.assert_array_equal(jt.autocast(f)(jnp.eye(4)), table)


OTHERS = {
    "shape": lambda y: y[:2],
    "integers": lambda y: y.astype(jnp.int32),
    "two": lambda y: (y, y),
    "structure": lambda y: [y],
    "text": str,
}


@pytest.mark.parametrize("in_half", OTHERS.values(), ids=OTHERS)
def test_results_that_are_others_in_half_are_not_taken(in_half):
    @jt.traced_in_half
    def f(x):
        return x @ x if x.dtype == jnp.float32 else in_half(x @ x)

    x = jnp.eye(4)
    np.testing.assert_array_equal(jt.autocast(lambda x: f(x) * 2)(x), 2 * x)


def test_without_autocast_it_costs_nothing():
    q, k = arrays()
    assert_same_bits(jax.jit(marked)(q, k), jax.jit(choosing)(q, k))
    loss = lambda f: lambda q, k: jnp.sum(f(q, k) ** 2)
    assert_costs_nothing(loss(marked), loss(choosing), q, k)
    assert_costs_nothing(jax.grad(loss(marked)), jax.grad(loss(choosing)), q, k)


def test_it_is_traced_once_per_call_of_a_jitted_step():
    count = Counter()

    @jt.traced_in_half
    def f(x):
        count[x.dtype.name] += 1
        return x @ x

    step = jax.jit(jt.autocast(lambda x: f(f(x))))
    for _ in range(3):
        step(jnp.eye(4))
    traced = dict(count)
    assert traced == {"float32": 4, "bfloat16": 4}  # planned, and run
    step(jnp.eye(4) * 2)
    assert count == traced


def test_nothing_is_kept_of_a_program_that_is_gone():
    from jmp_train._autocast.traced_in_half import _CALLS

    class Table:
        """Not a pytree, so that the call keeps it."""

        def __init__(self):
            self.scale = 2.0

    table = Table()
    gone = weakref.ref(table)
    f = jt.traced_in_half(lambda x, t: x @ x * t.scale)
    traced = functools.partial(f, t=table)
    program, before = jax.make_jaxpr(traced)(jnp.eye(2)), len(_CALLS)
    assert before and program
    del program, traced, table
    jax.clear_caches()
    gc.collect()
    assert len(_CALLS) < before and gone() is None


def test_without_a_program_it_is_called_as_it_is_and_not_compiled():

    @jt.traced_in_half
    def f(x):
        return x @ x if x.sum() > 0 else x

    x = jnp.eye(4)
    assert_same_bits(f(x), x)
    assert_same_bits(jax.grad(lambda x: f(x).sum())(x), jax.grad(lambda x: (x @ x).sum())(x))
    assert_same_bits(jax.jvp(f, (x,), (x,))[1], 2 * x)
    with jax.disable_jit():
        assert_same_bits(jax.jit(f)(x), x)
        assert_same_bits(jt.autocast(lambda x: x @ x)(x), x)


def with_inner_rule(x, y):
    """Has a derivative rule for reverse mode alone."""
    return blockwise_attention(x, y, y, block=4)


@pytest.mark.parametrize(
    "way",
    [
        lambda f: jax.grad(lambda x: jax.vmap(f)(x, x).sum()),
        lambda f: jax.jit(jax.grad(lambda x: jax.vmap(jax.checkpoint(f))(x, x).sum())),
        lambda f: jax.grad(jt.autocast(lambda x: jax.vmap(f)(x, x).sum())),
        lambda f: jt.autocast(jax.grad(lambda x: jax.vmap(f)(x, x).sum())),
        lambda f: jax.grad(jt.autocast(jt.autocast(lambda x: f(x[0], x[0]).sum(), "float16"))),
        lambda f: jax.grad(lambda x: jax.lax.map(lambda x: f(x, x), x, batch_size=2).sum()),
    ],
)
def test_derivative_rules_inside_stay_in_use(way):
    x = jax.random.normal(jax.random.key(0), (2, 2, 8, 1, 4))
    got, expected = way(jt.traced_in_half(with_inner_rule))(x), way(with_inner_rule)(x)
    np.testing.assert_allclose(got, expected, rtol=0.05, atol=0.05)


def test_what_the_code_around_a_call_has_set_applies():
    factor = contextvars.ContextVar("factor", default=1.0)

    @jt.traced_in_half
    def f(x):
        return jnp.sum(x @ x) * factor.get()

    def highest(x):
        token = factor.set(5.0)
        with jax.default_matmul_precision("highest"):
            y = f(x)
        factor.reset(token)
        return y

    scaled = lambda x: contextvars.copy_context().run(lambda: (factor.set(5.0), f(x))[1])
    x = jnp.eye(4)
    for way in (jax.jit, jax.checkpoint, jt.autocast, lambda f: jt.autocast(jax.jit(f))):
        value, gradient = jax.value_and_grad(way(scaled))(x)
        assert value == 20
        np.testing.assert_array_equal(gradient, 5.0 * jax.grad(lambda x: jnp.sum(x @ x))(x))
    rough = jax.random.normal(jax.random.key(0), (64, 64))
    expected = jax.grad(highest)(rough)
    for way in (jt.autocast, lambda f: jax.jit(jt.autocast(f))):
        np.testing.assert_array_equal(jax.grad(way(highest))(rough), expected)


def test_a_function_that_has_read_what_changed_since_is_not_called_again():
    def total(x):
        y = 0
        for factor in (1.0, 2.0, 3.0):

            @jt.traced_in_half
            def f(x):
                return x @ x * factor  # noqa: B023

            y += f(x)
        return y

    np.testing.assert_array_equal(jax.jit(jt.autocast(total))(jnp.eye(4)), 6 * jnp.eye(4))


def test_a_region_inside_stays_one():
    def f(q):
        with jt.with_precision("float32"):
            return jnp.sum(jnp.exp(q * 20)), q @ q

    x = jnp.eye(4) * 2
    marked = jax.jit(jt.autocast(jt.traced_in_half(f), "float16"))
    assert_same_bits(marked(x), jax.jit(jt.autocast(f, "float16"))(x))
    assert np.isfinite(marked(x)[0])


def test_a_value_that_is_passed_through_stays_one():
    f = jt.traced_in_half(lambda x, flag: (x @ x, flag))
    flag = jnp.asarray(True)

    def g(x):
        y, same = f(x, flag)
        return 2 * y if same else y

    for way in (jax.jit, jt.autocast):
        np.testing.assert_array_equal(way(g)(jnp.eye(4)), 2 * jnp.eye(4))


def test_no_tracer_is_kept():
    with jax.checking_leaks():
        jax.jit(lambda x, w: jt.traced_in_half(lambda x: x @ w)(x))(*arrays())


def test_arguments_that_are_not_differentiated_have_no_derivative():
    f = jt.traced_in_half(lambda x, t: x * jnp.sqrt(t))
    zero, one = jnp.float32(0), jnp.float32(1)
    for way in (lambda f: f, jax.jit):
        assert jax.jvp(way(lambda x: f(x, zero)), (one,), (one,))[1] == 0


def test_float64_and_complex_numbers_are_not_rounded():
    f, x = jnp.matmul, jax.random.normal(jax.random.key(0), (8, 8))
    for wide in (np.complex64, np.float64):
        with jax.enable_x64(True):
            a = jnp.asarray(x, wide)
            got = jt.autocast(jt.traced_in_half(f))(a, x)
            np.testing.assert_array_equal(got, jt.autocast(f)(a, x))
            np.testing.assert_allclose(got, a @ x, rtol=1e-5)


def test_lines_inside_stay_under_autocast():
    @jt.traced_in_half
    def f(q):
        return jnp.exp(q) @ q  # this line

    found = jt.debug.first_nonfinite(jt.autocast(lambda q: f(q), "float16"), 90 * jnp.ones((4, 4)))
    lines = Path(__file__).read_text().splitlines()
    line = next(i for i, text in enumerate(lines, 1) if text.endswith("# this line"))
    assert f"test_traced_in_half.py:{line} " in str(found)
    inside = jax.make_jaxpr(lambda q: jt.traced_in_half(jnp.matmul)(q, q))(jnp.ones((4, 4)))
    assert "flat.py" not in inside.pretty_print(source_info=True)


@pytest.mark.parametrize("policy", test_gpu_first.HALF)
@pytest.mark.parametrize("way", test_gpu_first.WAYS)
def test_attention_is_cudnns_in_each_way_to_half_precision(monkeypatch, way, policy):
    """Lowered for CUDA: its checks for the library and the GPU pass here."""
    from jax._src.cudnn import fused_attention_stablehlo as checks

    monkeypatch.setattr(checks, "check_cudnn_version", lambda: 91_000)
    monkeypatch.setattr(checks, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(checks, "is_cuda_compute_capability_equal", lambda _: False)
    monkeypatch.setattr(attention, "_fused_attention", lambda: True)
    with attention.compiled_for("gpu"):
        stepper, state, batch = test_gpu_first.abstract_step(way, policy)
        traced = jax.jit(stepper.pure_step).trace(state, batch)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    kernels = Counter(re.findall(r"__cudnn\$\w+", text))
    assert kernels == {"__cudnn$fmhaSoftmax": 1, "__cudnn$fmhaSoftmaxBackward": 1}  # one, scanned
