"""Whether a launcher started this process as one of several; without JAX, for a quick start."""

from __future__ import annotations

import importlib.util
import os

MARK = "JMP_TRAIN_ATTENDED"
"""Environment variable with the process that attends to this one (`jmp_train.cli.attend`)."""


def is_attended() -> bool:
    """Return whether another process attends to this one."""
    return os.environ.get(MARK) == str(os.getppid())


def launched() -> bool:
    """Return whether the environment is that of one of several processes that a launcher started."""
    counts = ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
    found = [os.environ.get(name, "") for name in counts]
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    pod = "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ
    if (
        pod and importlib.util.find_spec("kubernetes") is not None
    ):  # JAX asks its API for the others
        return True
    return any(text.isdigit() and int(text) > 1 for text in found) or "," in hosts
