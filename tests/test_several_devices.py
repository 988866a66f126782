"""Tests on several simulated devices, in processes of their own that have them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.simulated_devices import NEED_DEVICES

ROOT = Path(__file__).resolve().parents[1]
SLOW = [
    "models/batch_norm_shares.py",
    "optim/sharded_state.py",
    "sharding/runs_on_devices.py",
    "sharding/tensor_parallel.py",
    "step/four_devices.py",
    "step/sharded_steps.py",
]
CHOICES = [
    pytest.param(file, devices, which, marks=[pytest.mark.slow] if which != "not slow" else [])
    for file, devices in NEED_DEVICES.items()
    for which in (["slow or not slow"] if file in SLOW else ["not slow", "slow"])
]


@pytest.mark.parametrize("file,devices,which", CHOICES)
def test_what_needs_several_devices(file, devices, which):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-m", which,
         str(Path(__file__).parent / file)],
        check=False, cwd=ROOT, capture_output=True, text=True,
        # On fewer threads than devices, XLA's collectives may wait for each other for ever.
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "NPROC": "32"},
    )  # fmt: skip
    nothing_slow = which == "slow" and done.returncode == 5
    assert done.returncode == 0 or nothing_slow, done.stdout + done.stderr
