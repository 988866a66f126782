"""Damaged checkpoints: a run resumes from the newest complete one, and loses nothing else."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from helpers.marks import first_quick, slow
from helpers.saved_arrays import assert_same_arrays, final_arrays
from rich.console import Console

import jmp_train as jt
from jmp_train.config.find import find_experiment
from jmp_train.records.checkpoints import NoUsableCheckpoint
from jmp_train.records.metrics import read_metrics
from jmp_train.runs.train import train

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("quick_runs")
#: Checkpoints at the steps 4, 8 and 12, the last.
FIELDS = {"steps": 12, "log_every": 2, "eval_every": 6, "checkpoint_every": 4}


class Net(nnx.Module):
    """A user's network, with batch statistics and dropout."""

    def __init__(self, width: int = 16, *, rngs: nnx.Rngs):
        self.first = nnx.Linear(6, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.last = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


def examples():
    """A user's data: a list, with a random transform."""
    rng = np.random.default_rng(0)
    return [{"x": rng.normal(size=6), "label": i % 3} for i in range(90)]


def noise(batch, rng):
    return {**batch, "x": batch["x"] + rng.normal(size=batch["x"].shape).astype(np.float32)}


def bundled(**fields):
    experiment = find_experiment("linear_bf16")
    optimizer = dataclasses.replace(experiment.optimizer, warmup_steps=2)
    return dataclasses.replace(experiment, optimizer=optimizer, **{**FIELDS, **fields})


def own(**fields):
    return jt.Experiment(
        model=Net,
        data=jt.Data(examples, classes=3, batch_transform=noise),
        task=jt.tasks.classification(inputs="x"),
        optimizer=jt.optim.OptimizerConfig(warmup_steps=2),
        policy="mixed_float16",
        batch_size=16,
        **{**FIELDS, **fields},
    )


EXPERIMENTS = {"linear_bf16": bundled, "own": own}


@pytest.fixture(scope="module", params=first_quick(EXPERIMENTS))
def finished(request, quick_runs, tmp_path_factory):
    """A finished run, to copy; its folder has the name of its experiment."""
    folder = tmp_path_factory.mktemp("finished") / request.param
    train(EXPERIMENTS[request.param](), folder, name=request.param)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / finished.name))


def trained(run, **fields):
    console = fields.pop("console", None)
    return train(EXPERIMENTS[run.name](**fields), run, name=run.name, console=console)


def files_of(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def losses(run):
    return [(r["step"], r["split"], r["loss"]) for r in read_metrics(run / "metrics.jsonl")]


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def replace_by_a_folder(file):
    file.unlink()
    file.mkdir()


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda file: os.truncate(file, file.stat().st_size // 2),
        lambda file: os.truncate(file, 0),
        Path.unlink,
        replace_by_a_folder,
    ],
    ids=["flipped", "truncated", "emptied", "missing", "a folder"],
)
def test_run_resumes_from_the_newest_complete_checkpoint(run, finished, caplog, damage):
    newest = run / "checkpoints" / "12"
    damage(max((newest / "state" / "d").iterdir(), key=lambda file: file.stat().st_size))
    assert trained(run)["steps"] == 12
    assert "checkpoint 12 cannot be loaded and is passed over: " in caplog.text
    assert_same_arrays(final_arrays(run), final_arrays(finished))
    assert losses(run) == losses(finished)
    assert (run / "checkpoints" / "damaged-12").is_dir()


def test_damaged_metrics_of_a_checkpoint_cost_no_state(run, caplog):
    (run / "checkpoints" / "12" / "metrics" / "metrics").write_text("")
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    assert trained(run, steps=16, console=console)["steps"] == 16
    assert "the metrics of checkpoint 12 are damaged" in caplog.text
    assert f"{run.name} is at step 12\n" in console.export_text()
    assert (run / "checkpoints" / "damaged-12-metrics").is_dir()


def garble(file):
    content = file.read_bytes()
    file.write_bytes(b"garbage" + content[7:20] + b"garbage" + content[27:])


@pytest.mark.parametrize("finished", ["linear_bf16"], indirect=True)
@pytest.mark.parametrize(
    "file,cause",
    [
        ("state/manifest.ocdbt", "state/manifest.ocdbt"),
        slow("state/array_metadatas/process_0", "invalid JSON: "),
        slow("state/d/*", "state/d/"),
        slow("state/ocdbt.process_0/d/*", "ZSTD_decompressStream() failed"),
        slow("state/_METADATA", "invalid JSON: "),
        slow("_CHECKPOINT_METADATA", "what was saved beside the state is damaged: "),
    ],
)
def test_each_damaged_checkpoint_prints_one_line(run, file, cause):
    damaged = lambda n: f"checkpoint {n} cannot be loaded and is passed over: "
    expected = [damaged(12)], [damaged(12), damaged(8), "none of the checkpoints at steps 8, 12 in"]
    for n, status, texts in zip((12, 8), (0, 4), expected, strict=True):
        for path in (run / "checkpoints" / str(n)).glob(file):
            garble(path)
        done = subprocess.run(
            [sys.executable, "-m", "jmp_train", "eval", str(run)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        lines = done.stderr.splitlines()
        assert (done.returncode, len(lines)) == (status, len(texts)), done.stderr
        assert all(text in line for text, line in zip(texts, lines, strict=True)), done.stderr
        assert cause in lines[0] and len(lines[0]) < 500


def test_where_all_checkpoints_are_damaged_nothing_is_changed(run):
    for file in (run / "checkpoints").rglob("*"):
        if file.is_file() and file.name != "metrics":
            file.write_bytes(b"")
    before = files_of(run)
    with pytest.raises(
        NoUsableCheckpoint, match="steps 8, 12 in .* can be loaded; they were not changed"
    ):
        trained(run)
    assert files_of(run) == before
