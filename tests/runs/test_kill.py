"""Runs killed at random moments, saves included: they end as the undisturbed run, to the bit."""

import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.saved_arrays import assert_same_arrays, final_arrays

from jmp_train.records.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
EVERY = 4  # steps between checkpoints
VARIANTS = {
    "fp32": ("mlp_fp32",),
    "bf16": ("mlp_bf16",),
    "fp16": ("mlp_fp16",),
    "fp16, micro-batches": ("mlp_fp16", "--micro-batches", "4"),
    "fp16, steps per call": ("mlp_fp16", "--steps-per-call", "2"),
    "fp32, waiting": ("mlp_fp32", "--checkpoint-wait", "True"),
    "own model and data": ("own",),
}
#: A user's experiment file: batch statistics and dropout, a list of examples, a random transform.
OWN = """
import numpy as np
from flax import nnx

import jmp_train as jt


class Net(nnx.Module):
    def __init__(self, hidden: tuple[int, ...] = (8,), dropout: float = 0.0, *, rngs: nnx.Rngs):
        self.first = nnx.Linear(6, hidden[0], rngs=rngs)
        self.norm = nnx.BatchNorm(hidden[0], rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.last = nnx.Linear(hidden[0], 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


def examples():
    rng = np.random.default_rng(0)
    return [{"x": rng.normal(size=6), "label": i % 3} for i in range(300)]


def noise(batch, rng):
    return {**batch, "x": batch["x"] + rng.normal(size=batch["x"].shape).astype(np.float32)}


EXPERIMENT = jt.Experiment(
    model=Net,
    data=jt.Data(examples, classes=3, batch_transform=noise),
    task=jt.tasks.classification(inputs="x"),
    policy="mixed_float16",
    batch_size=32,
)
"""
#: In all, over the variants.
KILLS = int(os.environ.get("JMP_TRAIN_KILLS", "20"))


def command(run_dir, steps, name, *options):
    log_every = 2 if "--steps-per-call" in options else 1
    fields = {
        "--steps": steps, "--log-every": log_every, "--eval-every": 2 * EVERY,
        "--checkpoint-every": EVERY, "--model.hidden": 16, "--model.dropout": 0.25,
        "--optimizer.warmup-steps": 5, "--loss-scale.growth-interval": 7,
    }  # fmt: skip
    words = [str(word) for field in fields.items() for word in field]
    return [
        sys.executable,
        "-m",
        "jmp_train",
        "train",
        name,
        "--run-dir",
        run_dir,
        *words,
        *options,
    ]


def start(words, run_dir):
    folder = run_dir.parent / "experiments"
    folder.mkdir(exist_ok=True)
    (folder / "own.py").write_text(OWN)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",  # a killed process loses what it buffers
        "JAX_COMPILATION_CACHE_DIR": str(run_dir.parent / "cache"),  # to start sooner
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(words, cwd=run_dir.parent, env=environment, **streams)


def half_written(run_dir):
    """Whether a save is under way, or was at the time of a kill."""
    return any("tmp" in path.name for path in (run_dir / "checkpoints").glob("*"))


def records(run_dir):
    file = run_dir / "metrics.jsonl"
    return read_metrics(file) if file.exists() else []


def wait(process, until):
    deadline = time.monotonic() + 120
    while process.poll() is None and not until() and time.monotonic() < deadline:
        time.sleep(0.001)


def data_position(run_dir, step):
    file = run_dir / "checkpoints" / str(step) / "_CHECKPOINT_METADATA"
    return json.loads(file.read_text())["custom_metadata"]["extra"]["data"]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_killed_at_random_moments_ends_as_the_undisturbed_one(tmp_path, variant):
    kills = -(-KILLS // len(VARIANTS))
    steps = 40 * (kills + 1)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    process = start(command(whole, steps, *VARIANTS[variant]), whole)
    output = process.communicate(timeout=600)[0].decode()
    assert process.returncode == 0, output
    rng = random.Random(f"{variant} {os.environ.get('JMP_TRAIN_KILL_SEED', '')}")

    moments = {"start-up": 0, "training": 0, "a save": 0}
    losses, in_save, at, saving = [], 0, 0, False
    while True:
        process = start(command(cut, steps, *VARIANTS[variant]), cut)
        if sum(moments.values()) < kills:
            moment = rng.choices([*moments], weights=[1, 2, 2])[0]
            if moment == "start-up":  # while it imports, cleans up, loads and compiles
                time.sleep(rng.uniform(0.0, 5.0))
            else:
                wait(process, lambda at=at: any(r["step"] > at for r in records(cut)[-2:]))
                if moment == "training":
                    time.sleep(rng.uniform(0.0, 0.3))
                else:
                    wait(process, lambda: half_written(cut))
                    time.sleep(rng.uniform(0.0, 0.03))
            process.kill()
        output = process.communicate(timeout=600)[0].decode()
        resumed = re.search(r" is at step (\d+)\n", output)
        if resumed or process.returncode == 0 or moment != "start-up":
            losses.append((at - int(resumed[1] if resumed else 0), saving))
        if process.returncode == 0:
            break
        assert process.returncode == -9, output
        assert "Traceback" not in output and "cannot be loaded" not in output, output
        moments[moment] += 1
        in_save += half_written(cut)
        before, at = at, max([r["step"] for r in records(cut)], default=0)
        saving = half_written(cut) or (saving and at == before)  # it cleans up before it goes on

    print(f"{variant}: killed in {moments}, {in_save} of them with a save half written;")
    print(f"  {len(losses)} resumed; steps lost: {[loss for loss, _ in losses]}")
    # A save under way is lost, and what came after it, but no more: the next one waits for it.
    behind = EVERY * ("--checkpoint-wait" not in VARIANTS[variant])
    assert all(loss <= EVERY + behind * saving for loss, saving in losses), losses

    seen = [(r["step"], r["split"], r["loss"]) for r in records(cut)]
    assert seen == [(r["step"], r["split"], r["loss"]) for r in records(whole)]
    assert len((cut / "metrics.jsonl").read_text().splitlines()) == len(seen)
    assert_same_arrays(final_arrays(whole), final_arrays(cut))
    assert data_position(whole, steps) == data_position(cut, steps)
    left = [path.name for path in (cut / "checkpoints").iterdir()]
    assert all(name.isdigit() for name in left), left
