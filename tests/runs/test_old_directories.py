"""Run directories of an earlier version resume, and end as they would have ended then.

data/NAME.zip was written by commit d1f009f: `whole/` is a run of 20 steps, and `cut/` the same with
its last checkpoint removed, as if it had been stopped at step 10. The same CPU gives the same bits;
another may sum in another order, so there the comparison has a tolerance.
"""

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.saved_arrays import final_arrays

from jmp_train.records.metrics import read_metrics

DATA = Path(__file__).parent / "data"
ROOT = Path(__file__).resolve().parents[2]

COMMON = ["--steps", "20", "--log-every", "5", "--eval-every", "10", "--checkpoint-every", "10"]
OPTIONS = {
    "mlp_fp16": [
        "--batch-size", "32", "--model.hidden", "8", "--model.dropout", "0.1", "--ema-decay", "0.9",
        "--micro-batches", "2",
    ],
    "linear_bf16": [
        "--batch-size", "32", "--rules", "**=p=bf16,c=bf16,o=f32", "--optimizer.parameters", "kahan",
        "--steps-per-call", "5",
    ],
    "gpt_bf16": [
        "--batch-size", "4", "--model.width", "4", "--model.depth", "1", "--model.heads", "1",
        "--model.hidden", "4", "--data.length", "16", "--data.path", "bottles.txt",
    ],
}  # fmt: skip


def cpu_hash():
    """A hash of what the CPU can do, which decides how XLA sums."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    flags = re.search(r"^(?:flags|Features)\s*: (.*)$", text, re.MULTILINE)
    return hashlib.sha256(" ".join(sorted(flags[1].split())).encode()).hexdigest() if flags else ""


def same_bits_expected(whole):
    saved = json.loads((whole / "summary.json").read_text())["versions"]
    return (
        jax.default_backend() == "cpu"
        and cpu_hash() == (DATA / "cpu_flags.sha256").read_text().strip()
        and all(saved[name] == importlib.metadata.version(name) for name in ("jax", "jaxlib"))
    )


def records(run_dir):
    """The records after step 10, without times and what the earlier version did not record.

    Its train records held the values of the last batch, which now are `last_loss` and so on, beside
    the means.
    """
    found = []
    for record in read_metrics(run_dir / "metrics.jsonl"):
        if record["step"] <= 10:
            continue
        last = {k.removeprefix("last_"): v for k, v in record.items() if k.startswith("last_")}
        new = {"steps_per_second", "averaged_steps", "learning_rate"}
        found.append(
            {k: last.get(k, v) for k, v in record.items() if k not in new and k[:5] != "last_"}
        )
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ("linear_bf16", "mlp_fp16", "gpt_bf16"),
)
def test_a_directory_of_an_earlier_version_resumes_bitwise(tmp_path, name):
    with zipfile.ZipFile(DATA / f"{name}.zip") as file:
        file.extractall(tmp_path)
    shutil.copy(DATA / "bottles.txt", tmp_path)
    command = [sys.executable, "-m", "jmp_train", "train", name, "--run-dir", "cut", *COMMON]
    # Compiled as users do, which the quick tests are not.
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *OPTIONS[name]],
        cwd=tmp_path,
        env=env,
        check=True,
        capture_output=True,
        text=True,
    )
    assert "cut is at step 10" in done.stdout

    cut, whole = final_arrays(tmp_path / "cut"), final_arrays(tmp_path / "whole")
    assert cut.keys() == whole.keys() and len(whole) > 10
    now, then = records(tmp_path / "cut"), records(tmp_path / "whole")
    assert [r.keys() for r in now] == [r.keys() for r in then] and len(then) == 3
    exact = same_bits_expected(tmp_path / "whole")
    for path, array in whole.items():
        assert (cut[path].dtype, cut[path].shape) == (array.dtype, array.shape)
        if exact or not jnp.issubdtype(array.dtype, jnp.floating):
            assert cut[path].tobytes() == array.tobytes(), path
        else:
            # Ten steps of adamw, each of at most about the learning rate of 2e-3 or 3e-3, and in
            # either direction where rounding decides the sign of a gradient near zero.
            wide = [x.astype(np.float64) for x in (cut[path], array)]
            np.testing.assert_allclose(*wide, rtol=0.05, atol=0.06, err_msg=path)
    if exact:
        for new, old in zip(now, then, strict=True):
            # It was a quotient of the mean loss, and is the mean of 64 quotients in float32.
            bits = [r.pop("bits_per_byte", 0.0) for r in (new, old)]
            np.testing.assert_allclose(*bits, rtol=2**-21)
        assert now == then
    else:
        for new, old in zip(now, then, strict=True):
            numbers = [(new[k], old[k]) for k in old if k != "split"]
            np.testing.assert_allclose(*zip(*numbers, strict=True), rtol=0.05)
