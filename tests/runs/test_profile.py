"""`profile`: a trace that Perfetto reads, of as many steps as were asked for, and nothing else."""

import collections
import gzip
import json
from pathlib import Path

import jax
import pytest

from benchmarks.gpu.profile import by_kind
from jmp_train.cli.main import main

pytestmark = pytest.mark.usefixtures("quick_runs")
SMALL = [
    "--model.hidden",
    "8",
    "--steps",
    "4",
    "--batch-size",
    "32",
    "--compilation-cache",
    "False",
]


def profile(capsys, run_dir, *options):
    """The events of a trace, read without JAX."""
    words = ["--model.hidden", "8", "--batch-size", "32", "--run-dir", str(run_dir), *options]
    status = main(["profile", "mlp_bf16", *words])
    out, err = capsys.readouterr()
    assert status == 0, err
    first, second = out.splitlines()
    assert "https://ui.perfetto.dev" in second
    path = Path(first.rpartition(": ")[2])
    assert path.is_relative_to(run_dir / "profile") and path.name.endswith(".json.gz")
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def operations(events):
    """How often each operation of the step ran."""
    args = [event.get("args", {}) for event in events if event.get("ph") == "X"]
    return collections.Counter(a["hlo_op"] for a in args if a.get("hlo_module") == "jit_step")


def test_a_trace_has_each_step_and_its_operations(capsys, tmp_path):
    events = profile(capsys, tmp_path, "--profile-steps", "4")
    steps = [e["args"]["step_num"] for e in events if e.get("name") == "train"]
    assert sorted(map(int, steps)) == [3, 4, 5, 6]  # three calls come before
    if jax.default_backend() == "cpu":  # a GPU runs some operations as several kernels
        assert set(operations(events).values()) == {4}
    kinds = {row["kind"]: row["ms"] for row in by_kind(events, steps=4)}
    assert kinds["matrix product"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["profile"]


def test_calls_of_several_steps_are_traced_whole(capsys, tmp_path):
    options = ["--profile-steps", "3", "--steps-per-call", "2", "--steps", "4", "--log-every", "2"]
    events = profile(capsys, tmp_path, *options, "--eval-every", "2", "--checkpoint-every", "2")
    assert len([e for e in events if e.get("name") == "train"]) == 2


@pytest.mark.slow
def test_a_profile_leaves_a_run_alone_and_a_run_may_begin_beside_it(capsys, tmp_path):
    train = ["train", "mlp_bf16", *SMALL, "--run-dir", str(tmp_path)]
    profile(capsys, tmp_path, "--profile-steps", "1")
    assert main(train) == 0
    capsys.readouterr()
    files = lambda: {
        p: p.read_bytes()
        for p in tmp_path.rglob("*")
        if p.is_file() and "profile" not in p.relative_to(tmp_path).parts
    }
    before = files()
    assert any(path.name == "summary.json" for path in before)
    profile(capsys, tmp_path, "--profile-steps", "1")
    assert files() == before
    assert len([*tmp_path.rglob("perfetto_trace.json.gz")]) == 2
    assert main(train) == 0  # finished, and still a run


def test_a_profile_of_no_step_is_refused(capsys, tmp_path):
    status = main(["profile", "mlp_bf16", "--profile-steps", "0", "--run-dir", str(tmp_path)])
    assert status == 2
    assert capsys.readouterr().err == "jmp-train: profile_steps is 0; expected at least 1\n"
