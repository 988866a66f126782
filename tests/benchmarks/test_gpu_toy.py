"""The whole table at toy size on the CPU: every row, a kill in the middle, and the report."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import report, table

ROOT = Path(__file__).resolve().parents[2]
ON_A_GPU_ALONE = {"gpt_124m/bf16/jmp_train/attention=cudnn"}


def start(out):
    """`make bench-gpu TOY=1`, as a process group of its own; two rows at a time."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--toy", "--minutes", "25"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, "--out", str(out)],
        cwd=ROOT,
        env=env,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )


def rows_of(out):
    return json.loads(out.read_text())["rows"] if out.exists() else {}


@pytest.mark.slow
def test_a_killed_toy_run_fills_every_row_when_started_again(tmp_path):
    out = tmp_path / "gpu-cpu.json"
    run = start(out)
    try:
        while len(rows_of(out)) < 6:
            assert run.poll() is None
            time.sleep(0.2)
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    kept = rows_of(out)
    assert len(kept) < len(table.ROWS)
    assert start(out).wait() == 0
    rows = rows_of(out)
    assert {name: rows[name] for name in kept} == kept
    assert rows.keys() == {row.id for row in table.ROWS}

    torch = importlib.util.find_spec("torch") is not None
    for row in table.ROWS:
        found = rows[row.id]
        if row.program == "PyTorch" and not torch:
            assert found["reason"] == "torch is not installed", row.id
        elif row.id in ON_A_GPU_ALONE:
            assert found["status"] == "failed" and "cuDNN" in found["reason"], found["reason"]
        else:
            assert found["status"] == "ok", (row.id, found["reason"])
    losses = {name: row["losses"] for name, row in rows.items() if "losses" in row}
    for name, by_step in losses.items():
        # Precisions and programs agree at the last step that both took in their time.
        reference = losses[f"{name.partition('/')[0]}/fp32/jmp_train"]
        step = max(by_step.keys() & reference.keys(), key=int)
        assert int(step) >= 10
        assert by_step[step] == pytest.approx(reference[step], abs=0.05), name

    report.main(["--toy", "--result", str(out)])
    page = (tmp_path / "benchmarks.md").read_text()
    speeds = page.partition("## Are the goals reached?")[0]
    assert "not measured yet" not in speeds
