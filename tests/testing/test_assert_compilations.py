"""A function compiles once, or the message says which argument made it compile again."""

import functools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmp_train as jt
from jmp_train.testing import assert_one_compilation, compilations


def make(**options):
    return jt.make_step(
        lambda params, batch: jnp.mean((batch @ params["w"]) ** 2),
        optax.adam(0.1),
        "mixed_float16",
        **options,
    )


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_compiles_once_though_its_scale_changes(micro_batches):
    stepper = make(micro_batches=micro_batches)
    state = stepper.init({"w": jnp.ones(3)})
    scales = set()
    with assert_one_compilation(stepper.step) as step:
        for value in (1.0, np.inf, 2.0, np.nan):
            state, info = step(state, np.full((2, 3), value, np.float32))
            scales.add(float(info.loss_scale))
    assert len(scales) > 1 and stepper.step._cache_size() == 1


def test_a_changed_number_of_a_jitted_function_compiles_nothing():
    with assert_one_compilation(jax.jit(lambda x, rate: x * rate)) as fn:
        fn(jnp.ones(3), 1.0)
        fn(jnp.zeros(3), 2.0)


@pytest.mark.parametrize(
    "calls,words",
    [
        ([(jnp.ones(3), 1.0), (jnp.ones(4), 1.0)], ["x: float32[4]", "before float32[3]"]),
        ([(jnp.ones(3), 1.0), (jnp.ones(3, jnp.bfloat16), 1.0)], ["x: bfloat16[3]"]),
        ([(jnp.asarray(1.0), 1.0), (jnp.ones(()), 1.0)], ["x: float32[]", "weakly typed"]),
        ([({"a": 1.0}, 1.0), ({"a": 1.0, "b": 2.0}, 1.0)], ["x/b: float, before missing"]),
        ([({"a": 1.0, "b": 2.0}, 1.0), ({"a": 1.0}, 1.0)], ["x/b: missing"]),
        ([(jnp.ones(3), 1.0), (jnp.ones(4), 2.0)], ["x: float32[4]"]),  # a number is traced
        ([([jnp.ones(3)], 1.0), ((jnp.ones(3),), 1.0)], ["structure: "]),
    ],
    ids=[
        "shape",
        "dtype",
        "weak_type",
        "new_leaf",
        "missing_leaf",
        "shape_and_number",
        "structure",
    ],  # "dtype", "weak_type", "new_leaf", "missing_leaf", "structure"],
)
def test_what_changed_is_named(calls, words):
    with (
        pytest.raises(AssertionError, match="no compilation after the first call") as caught,
        assert_one_compilation(jax.jit(lambda x, rate: jax.tree.map(jnp.sin, x))) as fn,
    ):
        for args in calls:
            fn(*args)
    lines = str(caught.value).splitlines()
    assert "found 1 in 2 calls" in lines[0] and "call 2 compiled" in lines[1]
    assert len(lines) == 3 and all(word in lines[2] for word in words), lines


def test_a_static_value_is_named():
    @functools.partial(jax.jit, static_argnames="mode")
    def fn(x, mode):
        return x * 2 if mode == "train" else x

    with (
        pytest.raises(AssertionError, match="mode: 'eval', before 'train'"),
        assert_one_compilation(fn) as called,
    ):
        called(1.0, mode="train")
        called(1.0, mode="eval")


def test_an_argument_passed_by_keyword_is_named():
    with (
        pytest.raises(AssertionError, match=r"by keyword: \['rate'\], before \[\]"),
        assert_one_compilation(jax.jit(lambda x, rate: x * rate)) as fn,
    ):
        fn(1.0, 2.0)
        fn(1.0, rate=3.0)


def test_a_function_that_is_made_anew_at_each_call_is_found():
    @jax.jit
    def inner(x):
        return jnp.sin(x)

    def outer(x):
        return jax.jit(lambda x: inner(x) * 2)(x)

    with (
        pytest.raises(AssertionError, match="no argument differs"),
        assert_one_compilation(outer) as fn,
    ):
        fn(jnp.ones(3))
        fn(jnp.ones(3))


def test_an_optimizer_that_drops_a_weak_type_is_found():
    @jax.jit
    def step(w, x):
        return w - 0.1 * x

    w = jnp.asarray(2.0)  # weakly typed; the result is not
    with (
        pytest.raises(AssertionError, match="w: float32.*before float32.*weakly typed"),
        assert_one_compilation(step) as fn,
    ):
        for _ in range(3):
            w = fn(w, jnp.ones(()))


@pytest.mark.parametrize("count", [0, 1])
def test_less_than_two_calls_check_nothing(count):
    with (
        pytest.raises(AssertionError, match=f"expected at least 2 calls, found {count}"),
        assert_one_compilation(jax.jit(jnp.sin)) as fn,
    ):
        for _ in range(count):
            fn(1.0)


def test_an_error_inside_is_not_replaced():
    with pytest.raises(KeyError), assert_one_compilation(jax.jit(jnp.sin)):
        raise KeyError


def test_something_else_than_a_function_is_refused():
    with pytest.raises(TypeError, match="expected a function, got int"), assert_one_compilation(3):
        pass


def test_a_call_that_compiles_and_then_fails_is_counted():
    jitted = jax.jit(jnp.sin)

    def fn(x, fails=False):
        jitted(x)
        if fails:
            raise KeyError

    with (
        pytest.raises(AssertionError, match="found 1 in 3 calls") as caught,
        assert_one_compilation(fn) as called,
    ):
        called(jnp.ones(3))
        with pytest.raises(KeyError):
            called(jnp.ones(4), fails=True)
        called(jnp.ones(3))
    assert "call 2 compiled " in str(caught.value)


def test_a_call_that_fails_before_it_compiles_is_not_counted():
    with assert_one_compilation(jax.jit(jnp.sin)) as fn:
        fn(jnp.ones(3))
        with pytest.raises(TypeError):
            fn("text")
        fn(jnp.ones(3))


def test_compilations_of_other_threads_are_not_counted():
    other, double = jax.jit(lambda x: x + 1), jax.jit(lambda x: x * 2)
    with ThreadPoolExecutor(1) as pool:

        def fn(x):
            pool.submit(other, np.ones(x.shape, np.float32)).result()
            return double(x[0])

        with assert_one_compilation(fn) as called:
            called(np.ones(3, np.float32))
            called(np.ones(4, np.float32))
    assert other._cache_size() == 2


def test_without_jit_the_compilations_of_operations_count():
    compilations._check_recorded.cache_clear()
    with jax.disable_jit():
        with assert_one_compilation(jax.jit(jnp.sin)) as fn:
            fn(jnp.ones(3))
            fn(jnp.zeros(3))
        with (
            pytest.raises(AssertionError, match="call 2 compiled"),
            assert_one_compilation(jax.jit(jnp.cos)) as fn,
        ):
            fn(jnp.ones(3))
            fn(np.ones((2, 5, 7, 3), np.float32))  # a shape of this test alone
