"""Tests on several simulated devices, in processes of their own that have them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.simulated_devices import NEED_DEVICES

ROOT = Path(__file__).resolve().parents[1]
SLOW = ["optim/sharded_state.py", "step/sharded_steps.py"]


@pytest.mark.parametrize(
    "file,devices",
    [
        pytest.param(*each, marks=[pytest.mark.slow] if each[0] in SLOW else [])
        for each in NEED_DEVICES.items()
    ],
)
def test_what_needs_several_devices(file, devices):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short",
         str(Path(__file__).parent / file)],
        check=False, cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
