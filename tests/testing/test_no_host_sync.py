"""A function does not wait for the host, or the line that does is shown."""

import bdb
import dataclasses
import logging
import pprint
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import absl.logging
import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rich
from flax import nnx
from flax.core import freeze
from helpers.models import Dropped
from jax import device_get, lax
from jax.experimental import io_callback

import jmp_train as jt
from jmp_train.testing import assert_no_host_sync

X = jnp.ones((4, 4))
SHAPE = jax.ShapeDtypeStruct(X.shape, X.dtype)


def line_of(words):
    """The number of the line of this file that has a comment."""
    with open(__file__, encoding="utf8") as file:
        return next(
            n for n, line in enumerate(file, 1) if f"# {words}" in line and "line_of" not in line
        )


def with_rule(rule):
    """A function whose derivative rule, not the function itself, runs `rule`."""

    @jax.custom_vjp
    def fn(x):
        return jnp.sin(x)

    fn.defvjp(lambda x: (fn(x), x), lambda x, ct: (rule(x) * ct,))
    return lambda x: fn(x).sum()  # call of the rule


def test_a_train_step_waits_for_no_host():
    def loss_fn(params, batch):
        return jnp.mean((batch @ params) ** 2)

    stepper = jt.make_step(loss_fn, optax.adam(0.1), "mixed_float16")
    assert_no_host_sync(stepper.step, stepper.init(X), X)
    assert_no_host_sync(stepper.step, jax.eval_shape(stepper.init, X), X)


def printed(x):
    jax.debug.print("{}", x.sum())  # printed
    return x


def looked_up(x):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(np.sin, shape, x)  # looked up


def counted(x):
    io_callback(print, None, x)  # counted
    return x


CALLS = {
    "printed": ("debug_print", printed),
    "looked up": ("pure_callback", looked_up),
    "counted": ("io_callback", counted),
}
WRAPS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "scan": lambda f: lambda x: lax.scan(lambda c, _: (f(c), None), x, None, length=2)[0],
    "cond": lambda f: lambda x: lax.cond(x.sum() > 0, f, jnp.sin, x),
    "remat": lambda f: jax.checkpoint(f),
    "custom rule": lambda f: jax.grad(with_rule(f)),
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("words", CALLS)
def test_a_callback_is_named_with_its_line(words, wrap):
    name, fn = CALLS[words]
    with pytest.raises(AssertionError, match="no call of the host") as caught:
        assert_no_host_sync(WRAPS[wrap](fn), X)
    assert f"{name}  " in str(caught.value)
    line = line_of("call of the rule" if wrap == "custom rule" else words)
    assert f"{__file__}:{line} (" in str(caught.value)


def test_a_rule_that_does_not_run_is_not_checked():
    assert_no_host_sync(with_rule(printed), X)


def branches(x):
    if x.sum() > 0:  # branches
        return x
    return -x


def converts(x):
    return x * np.asarray(x).max()  # converts


def as_float(x):
    return x * float(x.sum())  # as a float


def indexes(x):
    return x * [1.0, 2.0][x[0, 0].astype(int)]  # indexes


def averages(x):
    return x * np.median(x)  # averages


def gets(x):
    return jax.tree.map(jnp.sin, device_get(x))  # gets


def waits(x):
    return jax.block_until_ready({"x": x * 2})["x"]  # waits for a tree


def waits_by_method(x):
    return (x * 2).block_until_ready()  # waits by itself


def formats(x):
    return x if f"{x[0, 0]:.2f}" else -x  # formats


def shows(x):
    return x if f"{x[0, 0]}" else -x  # shows


def logs(x):
    logging.getLogger(__name__).warning("sum %s", x.sum())  # logs
    return x


@dataclasses.dataclass
class Metrics:
    loss: jax.Array


def logs_by_absl(x):
    absl.logging.warning("sum %s", x.sum())  # logs by absl
    return x


def prints_richly(x):
    rich.print({"loss": x.sum()})  # prints richly
    return x


def prints_metrics(x):
    print({"loss": x.sum()})  # prints metrics
    return x


def prints_a_dataclass(x):
    print(Metrics(x.sum()))  # prints a dataclass
    return x


def prints_in_lines(x):
    pprint.pprint([x.sum()])  # prints in lines
    return x


class Shown:
    """A class of the user's with a text; JAX takes it for the name of a function."""

    def __init__(self, value):
        self.value = value

    def __call__(self, x):
        return x

    def __repr__(self):
        return f"Shown({self.value})"


def prints_an_object(x):
    print(Shown(x))  # prints an object
    return x


def prints_a_variable(x):
    print(nnx.Param(x))  # prints a variable
    return x


def shows_frozen_variables(x):
    return x if f"{freeze({'loss': x})}" else -x  # shows frozen variables


def shows_variables_prettily(x):
    return x if freeze({"loss": x}).pretty_repr() else -x  # shows variables prettily


def displays_a_variable(x):
    nnx.display(nnx.Param(x))  # displays a variable
    return x


def shows_leaves_of_a_module(x):
    return x if equinox.tree_pformat({"loss": x}, short_arrays=False) else -x  # shows leaves


def shows_every_leaf(x):
    return x if jax.tree.map(str, {"loss": x}) else -x  # shows every leaf


def joins_every_leaf(x):
    return x if jax.tree.reduce("{}{}".format, [x, x]) else -x  # joins every leaf


def shows_objects(x):
    objects = np.empty(1, object)
    objects[0] = x
    return x if str(objects) else -x  # shows objects


def shows_as_typed(x):
    return x if f"{x[0]!r}" else -x  # shows as typed


def masks(x):
    return x[x > 1].sum() * x  # masks


READS = {
    "gets": gets,
    "waits for a tree": waits,
    "waits by itself": waits_by_method,
    "formats": formats,
    "shows": shows,
    "logs": logs,
    "logs by absl": logs_by_absl,
    "prints richly": prints_richly,
    "prints metrics": prints_metrics,
    "prints a dataclass": prints_a_dataclass,
    "prints in lines": prints_in_lines,
    "prints an object": prints_an_object,
    "prints a variable": prints_a_variable,
    "shows frozen variables": shows_frozen_variables,
    "shows variables prettily": shows_variables_prettily,
    "displays a variable": displays_a_variable,
    "shows leaves": shows_leaves_of_a_module,
    "shows every leaf": shows_every_leaf,
    "joins every leaf": joins_every_leaf,
    "shows objects": shows_objects,
    "shows as typed": shows_as_typed,
    "masks": masks,
    "branches": branches,
    "converts": converts,
    "as a float": as_float,
    "indexes": indexes,
    "averages": averages,
}


@pytest.mark.parametrize("wrap", ["plain", "jit", "scan", "custom rule"])
@pytest.mark.parametrize("words", READS)
def test_a_read_on_the_host_is_shown_with_its_line(words, wrap):
    fn = READS[words]
    with pytest.raises(AssertionError, match="no read of an array on the host") as caught:
        assert_no_host_sync(WRAPS[wrap](fn), X)
    assert f"{__file__}:{line_of(words)} ({fn.__name__})" in str(caught.value)


def test_shapes_and_dtypes_are_shown_without_a_read():
    shown = lambda x: x if f"{x.shape} {x.dtype}" else -x
    assert_no_host_sync(shown, X)


def test_a_value_shown_by_a_debugger_is_no_read():
    def stopped(x):
        __return__ = x  # noqa: F841
        assert "->" in bdb.Bdb().format_stack_entry((sys._getframe(), 1))
        return x

    assert_no_host_sync(stopped, SHAPE)  # not run, where a GPU would report the transfer


@pytest.mark.parametrize(
    "name", ["<stdin>", "<string>", "<doctest net[3]>", "<ipython-input-2-0a1b>", "<console>"]
)
def test_a_text_in_code_without_a_file_is_found(name):
    code = compile("def fn(x):\n    print('loss', x)\n    return x", name, "exec")
    for module in ({}, {"__name__": "__main__"}, {"__name__": __name__}):
        exec(code, module)  # noqa: S102
        with pytest.raises(AssertionError, match="a text of the value") as caught:
            assert_no_host_sync(module["fn"], X)
        assert str(caught.value).splitlines()[1] == f"  {name}:2 (fn)"


def test_a_text_in_generated_code_of_a_package_is_not_found():
    module = {"__name__": "optax"}
    exec("def fn(x):\n    str(x)\n    return x", module)  # noqa: S102
    assert_no_host_sync(module["fn"], SHAPE)


def test_a_text_that_a_package_makes_for_itself_is_not_found():
    module = {"__name__": "optax"}
    exec("def check(x):\n    if not repr([x]):\n        raise ValueError(x)", module)  # noqa: S102

    def fn(x):
        module["check"](nnx.Param(x))
        module["check"](Shown(x))
        jax.tree.map(module["check"], {"x": x})
        return jax.jit(Shown(x))(x)

    assert_no_host_sync(fn, SHAPE)


@pytest.mark.parametrize("held", [lambda x: x, Shown])
def test_the_text_of_an_error_of_a_tree_is_not_found(held):
    def has_structure_of(x):
        try:
            jax.tree.map(lambda *_: 0, {"w": (1, 2)}, {"w": held(x)})
        except ValueError:
            return x
        raise AssertionError("no error")

    assert_no_host_sync(has_structure_of, SHAPE)


def test_a_package_that_numpy_calls_makes_texts_for_itself():
    module = {"__name__": "optax", "np": np}
    exec("@np.errstate(all='ignore')\ndef check(x):\n    return repr(x)", module)  # noqa: S102

    def fn(x):
        module["check"](x)
        shown = Shown(x)
        np.testing.assert_equal(shown, shown)  # makes its message before it compares
        return x

    assert_no_host_sync(fn, SHAPE)


def test_a_record_that_a_handler_of_a_package_shows_is_found():
    module = {"__name__": "optax", "logging": logging}
    code = (
        "class Handler(logging.Handler):\n    def emit(self, record):\n        record.getMessage()"
    )
    exec(code, module)  # noqa: S102
    logger = logging.getLogger("test_no_host_sync.handler")
    logger.addHandler(module["Handler"]())

    def fn(x):
        logger.warning("sum %s", x.sum())
        return x

    with pytest.raises(AssertionError, match="a text of the value"):
        assert_no_host_sync(fn, X)


def test_values_that_the_host_has_are_shown_without_a_read():
    constant = X + 1
    str(constant)  # the host has its values from now on
    assert_no_host_sync(lambda x: x if f"{constant}" else -x, X)


def test_arrays_and_traced_arrays_are_as_before_afterwards():
    before = dict(vars(jax.core.Tracer))
    with pytest.raises(AssertionError):
        assert_no_host_sync(branches, X)
    assert dict(vars(jax.core.Tracer)) == before
    assert f"{X[0, 0]:.2f}" == "1.00" and device_get(X).shape == X.shape


def test_checks_that_overlap_in_threads_leave_traced_arrays_as_before():
    before = dict(vars(jax.core.Tracer))
    inside, ended = threading.Event(), threading.Event()

    def first(x):
        assert inside.wait(30)  # until the second is traced
        return x

    def second(x):
        inside.set()
        assert ended.wait(30)  # until the first has ended
        print(x)
        return x

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(assert_no_host_sync, first, X)
        two = pool.submit(assert_no_host_sync, second, X)
        one.result()
        ended.set()
        with pytest.raises(AssertionError, match="a text of the value"):
            two.result()
    assert dict(vars(jax.core.Tracer)) == before


def test_a_check_inside_another_leaves_the_outer_one_intact():
    def outer(x):
        assert_no_host_sync(jnp.sin, X)
        print(x)
        return x

    with pytest.raises(AssertionError, match=r"print\(x\)"):
        assert_no_host_sync(outer, X)


def test_traced_arrays_of_other_threads_are_not_the_functions():
    def shown(y):
        assert str(y) and not hasattr(y, "block_until_ready")
        jax.block_until_ready(y)
        return y

    with ThreadPoolExecutor(1) as pool:

        def fn(x):
            pool.submit(jax.make_jaxpr(shown), 1.0).result()
            return x

        assert_no_host_sync(fn, X)


def test_a_traced_program_is_checked_and_a_compiled_one_refused():
    assert_no_host_sync(jax.jit(jnp.sin).trace(X))
    with pytest.raises(AssertionError, match="no call of the host"):
        assert_no_host_sync(nnx.jit(printed).trace(X))
    with pytest.raises(TypeError, match="expected a function or a traced program, got Compiled"):
        assert_no_host_sync(jax.jit(jnp.sin).lower(X).compile())


@pytest.mark.parametrize("wrap", [lambda f: f, equinox.filter_jit])
def test_leaves_of_a_module_that_are_not_arrays_are_static(wrap):
    module = Dropped(X, jnp.tanh, True)
    assert_no_host_sync(wrap(lambda module, x: module(x)), module, X)
    with pytest.raises(AssertionError, match="no read of an array"):
        assert_no_host_sync(wrap(lambda module, x: branches(module(x))), module, X)


def test_an_error_of_the_function_itself_is_not_hidden(monkeypatch):
    with pytest.raises(TypeError, match="dot_general"):
        assert_no_host_sync(lambda x: x @ jnp.ones(3), X)

    def out_of_memory(x):
        if not isinstance(x, jax.core.Tracer):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return x

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(jax.errors.JaxRuntimeError, match="out of memory"):
        assert_no_host_sync(out_of_memory, X)


@pytest.mark.parametrize("donated", [False, True])
def test_on_an_accelerator_it_also_runs_under_the_transfer_guard(monkeypatch, donated):
    # Simulated: on a CPU, JAX never refuses a transfer. The read is of an array that is not traced.
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    double = jax.jit(lambda x: x * 2, donate_argnums=0 if donated else ())
    guards, refused = [], []

    def fn(x):
        guards.append(jax.config.jax_transfer_guard_device_to_host)
        if refused and not isinstance(x, jax.core.Tracer):
            raise jax.errors.JaxRuntimeError("Disallowed device-to-host transfer")  # refused
        return double(x)

    x = jnp.ones(3)
    assert_no_host_sync(fn, x)
    assert guards == [None, "disallow"] and not x.is_deleted()
    assert_no_host_sync(fn, jax.ShapeDtypeStruct((3,), jnp.float32))
    assert guards == [None, "disallow", None]
    refused.append(True)
    with pytest.raises(AssertionError, match="no read of an array on the host") as caught:
        assert_no_host_sync(fn, x)
    assert f"{__file__}:{line_of('refused')} (fn)" in str(caught.value)


def test_something_else_than_a_function_is_refused():
    with pytest.raises(TypeError, match="expected a function or a compiled program, got int"):
        assert_no_host_sync(3)
