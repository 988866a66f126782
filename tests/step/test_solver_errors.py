"""A solver that raises on non-finite values in the backward pass of a float16 step (in a child)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# The root y of y^3 + y = a, times 200 in float16: its cotangent overflows under a scale of 2^16.
PROGRAM = """
import jax.numpy as jnp, optax, optimistix as optx, jmp_train as jt

def loss(params, batch):
    a = params["a"].astype(jnp.float32)
    root = optx.root_find(lambda y, a: y**3 + y - a, optx.Newton(1e-4, 1e-4), jnp.ones(()), a)
    y = root.value.astype(jnp.float16)
    return (jnp.full(4, 200, jnp.float16) * y * params["w"]).sum().astype(jnp.float32)

stepper = jt.make_step(loss, optax.sgd(1e-6), "mixed_float16",
                       loss_scale=jt.DynamicLossScale(2.0**16))
state = stepper.init({"a": jnp.ones(()), "w": jnp.ones(4)})
for _ in range(16):
    state, info = stepper.step(state, jnp.ones(()))
print("skipped", int(state.skipped), "finite", bool(info.finite))
"""


def run(**environment):
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], check=False, capture_output=True, text=True, timeout=300,
        cwd=root, env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
    )  # fmt: skip


@pytest.mark.slow
def test_solver_that_raises_ends_a_run_unless_told_to_return_nan():
    pytest.importorskip("optimistix")
    raised = run(EQX_ON_ERROR="raise")
    assert raised.returncode != 0 and "EquinoxRuntimeError" in raised.stderr
    told = run(EQX_ON_ERROR="nan")
    # 200 * 4 * 2^k stays below 65504 up to a scale of 2^6: ten halvings, then finite steps.
    assert told.stdout.split() == ["skipped", "10", "finite", "True"], told.stderr
