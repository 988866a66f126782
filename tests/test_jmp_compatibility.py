"""`import jmp_train as jmp` serves code written for jmp: its own tests and Haiku's pass."""

import importlib.util
import inspect
import json
import os
import pathlib
import subprocess
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers.marks import slow

import jmp_train

RUNNER = pathlib.Path(__file__).with_name("helpers") / "run_as_jmp.py"
ROOT = RUNNER.parents[2]


def python(*arguments):
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done


def run_as_jmp(path):
    done = python(RUNNER, path)
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.parametrize(
    "package,file,tests",
    [
        slow("jmp", "_src/loss_scale_test.py", 25),
        ("jmp", "_src/policy_test.py", 72),
        slow("haiku", "_src/mixed_precision_test.py", 13),
    ],
)
def test_the_tests_published_with_jmp_and_haiku_pass(package, file, tests):
    pytest.importorskip("jmp")
    pytest.importorskip(package)
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    outcome, output = run_as_jmp(pathlib.Path(spec.origin).parent / file)
    assert outcome["failed"] == [], output
    assert outcome["skipped"] == []
    assert outcome["run"] >= tests  # of jmp 0.0.4 and dm-haiku 0.0.17


def test_the_runner_reports_a_test_that_fails(tmp_path):
    wrong = tmp_path / "wrong_test.py"
    wrong.write_text(
        "import unittest, jmp\n"
        "class Wrong(unittest.TestCase):\n"
        "    def test_right(self):\n"
        "        self.assertEqual(jmp.__name__, 'jmp_train')\n"
        "    def test_wrong(self):\n"
        "        self.assertEqual(str(jmp.get_policy('c=f16')), 'p=full,c=f16,o=f32')\n"
    )
    outcome, _ = run_as_jmp(wrong)
    assert outcome["run"] == 2
    assert len(outcome["failed"]) == 1 and "test_wrong" in outcome["failed"][0]


def public_names() -> dict[str, Any]:
    jmp = pytest.importorskip("jmp")
    return {name: getattr(jmp, name) for name in jmp.__all__}


def positional(function):
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p for p in inspect.signature(function).parameters.values() if p.kind in kinds]


def assert_takes_what_the_other_takes(ours, theirs):
    """Every positional call of `theirs` is one of `ours`, with the same defaults."""
    our_parameters, their_parameters = positional(ours), positional(theirs)
    assert len(our_parameters) >= len(their_parameters)
    for our, their in zip(our_parameters, their_parameters, strict=False):
        optional = their.default is not inspect.Parameter.empty
        assert optional <= (our.default is not inspect.Parameter.empty)
    assert all(
        parameter.default is not inspect.Parameter.empty
        for parameter in our_parameters[len(their_parameters) :]
    )


def test_every_public_name_of_jmp_takes_what_it_takes_in_jmp():
    names = public_names()
    assert len(names) == 11
    for name, theirs in names.items():
        ours = getattr(jmp_train, name)
        assert name in jmp_train.__all__
        if isinstance(theirs, types.FunctionType):
            assert_takes_what_the_other_takes(ours, theirs)


def test_the_classes_have_jmps_fields_in_jmps_order_and_its_methods():
    for name, theirs in public_names().items():
        if not isinstance(theirs, type):
            continue
        ours: Any = getattr(jmp_train, name)
        their_fields = list(theirs.__dataclass_fields__)
        our_fields = list(ours.__dataclass_fields__)
        assert our_fields[: len(their_fields)] == their_fields
        assert_takes_what_the_other_takes(ours, theirs)
        for method, function in inspect.getmembers(theirs, inspect.isfunction):
            # How a pytree is flattened is not jmp's API, and ours holds more.
            if not method.startswith(("_", "tree_")):
                assert_takes_what_the_other_takes(getattr(ours, method), function)
    assert set(jmp_train.LossScale.__args__) == {
        jmp_train.NoOpLossScale,
        jmp_train.StaticLossScale,
        jmp_train.DynamicLossScale,
    }


def test_defaults_are_those_of_jmp():
    theirs = public_names()["DynamicLossScale"](jnp.float32(2))
    ours = jmp_train.DynamicLossScale(jnp.float32(2))
    for name in ("loss_scale", "counter", "period", "factor", "min_loss_scale"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_a_policy_set_on_a_haiku_module_is_obeyed():
    pytest.importorskip("haiku")
    code = """
import sys, jmp_train
sys.modules["jmp"] = jmp_train
import haiku as hk, jax, jax.numpy as jnp
policy = jmp_train.get_policy("params=float32,compute=float16,output=bfloat16")
hk.mixed_precision.set_policy(hk.Linear, policy)
network = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(3)(x)))
params = network.init(jax.random.key(0), jnp.ones((2, 4)))
assert {p.dtype.name for p in jax.tree.leaves(params)} == {"float32"}, params
jaxpr = str(jax.make_jaxpr(network.apply)(params, jnp.ones((2, 4))))
assert "f16[2,3] = dot_general" in jaxpr, jaxpr
assert network.apply(params, jnp.ones((2, 4))).dtype == jnp.bfloat16
"""
    python("-c", code)


def test_a_training_step_written_for_jmp_gives_the_same_numbers():
    """Scaled loss, unscaled gradients, adjusted scale, selected update: the loop of jmp's README."""
    jmp = pytest.importorskip("jmp")

    def train(library):
        policy = library.get_policy("params=float32,compute=float16,output=float32")
        loss_scale = library.DynamicLossScale(jnp.asarray(2.0**10), period=3)
        params = {"w": jnp.array([0.5, -0.25]), "n": jnp.int32(1)}
        x = jnp.array([[1.0, 2.0], [3.0, -1.0]])
        seen = []
        for step in range(8):

            def loss_fn(w, step=step, loss_scale=loss_scale):
                w, inputs = policy.cast_to_compute((w, x))
                output = policy.cast_to_output(inputs @ w)
                bad = jnp.where(step == 4, jnp.inf, 1.0)
                return loss_scale.scale(jnp.mean(output**2)) * bad

            grads = loss_scale.unscale(jax.grad(loss_fn)(params["w"]))
            finite = library.all_finite(grads)
            loss_scale = loss_scale.adjust(finite)
            updated = params | {"w": params["w"] - 0.1 * grads}
            params = library.select_tree(finite, updated, params)
            seen.append((bool(finite), float(loss_scale.loss_scale), *params["w"].tolist()))
        return seen

    ours, theirs = train(jmp_train), train(jmp)
    assert ours == theirs
    assert [finite for finite, *_ in ours] == [True] * 4 + [False] + [True] * 3
