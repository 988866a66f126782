"""`jmp_train.testing`, and what the project rounds, on the programs that XLA makes for an H100 that is not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests.helpers.gpu_programs import COUNTS, programs_of_a_gpu

pytestmark = pytest.mark.compiled

ROOT = Path(__file__).resolve().parents[2]
X = np.random.default_rng(0).normal(size=(24, 40)).astype(np.float32)


def test_what_runs_is_the_program_of_the_gpu():
    def there_and_back(x):
        return x.astype(jnp.bfloat16).astype(jnp.float32)

    rounded = X.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(there_and_back)(X), rounded)
    before = COUNTS["run"]
    with programs_of_a_gpu():
        program = jax.jit(lambda x: there_and_back(x)).lower(X).compile()
        np.testing.assert_array_equal(program(X), X)  # XLA for GPUs leaves the two casts out
        assert "bf16" not in program.as_text()
        barrier = jax.lax.optimization_barrier
        kept = jax.jit(lambda x: barrier(x.astype(jnp.bfloat16)).astype(jnp.float32))
        np.testing.assert_array_equal(kept(X), rounded)
    assert COUNTS["run"] == before + 2
    np.testing.assert_array_equal(jax.jit(lambda x: there_and_back(x))(X), rounded)


def test_layouts_and_fusions_of_the_gpu_keep_values():
    def fn(x):
        y = jnp.tanh(x.reshape(4, 6, 40).transpose(2, 0, 1))
        sums = y.reshape(40, 24).T.sum(1) + jnp.cumsum(x, 0).max(1)
        return (x.T @ jnp.sort(x, 0)).reshape(20, 80)[::-1], sums, y.view(jnp.int32) >> 31

    with programs_of_a_gpu():
        product, sums, signs = jax.jit(lambda x: fn(x))(X)
    wide = X.astype(np.float64)
    expected = (wide.T @ np.sort(wide, 0)).reshape(20, 80)[::-1]
    np.testing.assert_allclose(product, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        sums, np.tanh(wide).sum(1) + np.cumsum(wide, 0).max(1), rtol=1e-5, atol=1e-5
    )
    y = np.tanh(X.reshape(4, 6, 40).transpose(2, 0, 1))
    np.testing.assert_array_equal(signs, -np.signbit(y).astype(int))


@pytest.mark.parametrize("folder", ["tests/testing"])
def test_our_tests_hold_on_the_programs_of_a_gpu(folder, tmp_path):
    counts = tmp_path / "counts.json"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short",
         "-p", "tests.helpers.gpu_programs", "-m", "not slow and not compiled", folder],
        check=False, cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "COUNTS_OF_PROGRAMS": str(counts)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(counts.read_text())
    assert found["run"] > 300
    assert found["run"] > 0.95 * sum(found.values())
