"""Trackers: metrics.jsonl stays whole, and a tracker that fails ends nothing."""

import csv
import errno
import json
import math
import os
import resource
import struct
import time

import pytest

from jmp_train.errors import UsageError
from jmp_train.records.metrics import read_metrics
from jmp_train.records.trackers import Tracker, Trackers, make_trackers

CONFIG = {"experiment": "mlp_bf16", "steps": 40, "optimizer": {"name": "adamw", "b1": 0.9}}


def config_of(folder, step=0, run_id="abc123"):
    return CONFIG | {"run": {"id": run_id, "directory": str(folder), "step": step}}


def started(folder, step=0, names=("tensorboard",), own=()):
    trackers = Trackers(make_trackers(names, own))
    trackers.start(config_of(folder, step))
    return trackers


def test_records_come_back_and_a_resume_drops_later_and_torn_ones(tmp_path):
    writer = started(tmp_path)
    for step in (1, 2, 3):
        writer.record(step, "train", {"loss": 1.0 / step})
    writer.record(3, "eval", {"loss": float("inf")})
    writer.finish({})
    path = tmp_path / "metrics.jsonl"
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 3]
    assert read_metrics(path)[-1] == {"step": 3, "split": "eval", "loss": "inf"}
    assert math.isinf(float(read_metrics(path)[-1]["loss"]))

    with path.open("a") as file:
        file.write('{"step": 4, "spl')
    writer = started(tmp_path, 2)
    writer.record(3, "train", {"loss": 9.0})
    writer.finish({})
    assert [(r["step"], r["loss"]) for r in read_metrics(path)] == [(1, 1.0), (2, 0.5), (3, 9.0)]


def test_tensorboard_events_are_written(tmp_path):
    writer = started(tmp_path)
    writer.record(1, "train", {"loss": 1.0, "bad": float("nan")})
    writer.finish({})
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in file.read_bytes()


def test_a_record_can_be_read_before_the_writer_is_closed(tmp_path):
    writer = started(tmp_path)
    writer.record(1, "train", {"loss": 1.0, "step": 99, "split": "mine"})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "split": "train", "loss": 1.0}]
    writer.finish({})


def test_records_wait_for_a_full_disk_and_then_follow_whole(tmp_path, caplog):
    class Disk:  # takes a part of what it gets, then nothing, until there is room
        room = 30

        def write(self, data):
            if self.room == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            taken, self.room = data[: self.room], max(self.room - len(data), 0)
            return file.write(taken)

        def close(self):
            file.close()

    writer = started(tmp_path)
    file, writer._jsonl._lines = writer._jsonl._lines, Disk()
    writer.record(1, "train", {"loss": 1.0})
    writer.record(2, "train", {"loss": 2.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == []  # a torn line, which is left out
    assert caplog.text.count("metrics.jsonl cannot be written, and waits: No space left") == 1
    with pytest.raises(OSError, match="No space left"):
        writer.flush()
    writer._jsonl._lines.room = 1000
    writer.record(3, "train", {"loss": 3.0})
    writer.finish({})
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["loss"]) for r in records] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_disk_that_is_full_to_the_end_leaves_a_warning_and_no_traceback(tmp_path, caplog):
    writer = started(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))  # no file may have more than a byte
    try:
        for step in range(40):  # more than tensorboardX's queue holds
            writer.record(step, "train", {"loss": 1.0})
        writer.finish({})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "metrics.jsonl lacks its last records" in caplog.text
    assert caplog.text.count("tracker tensorboard ends here: OSError in record") == 1
    assert started(tmp_path, 3) and not read_metrics(tmp_path / "metrics.jsonl")


class Recorder:
    """A tracker that keeps its calls, and raises in one method."""

    def __init__(self, fails=None, error: BaseException | None = None):
        self.calls, self.fails, self.error = [], fails, error

    def _called(self, name, *arguments):
        self.calls.append((name, *arguments))
        if name == self.fails and self.error:
            raise self.error

    def start(self, config):
        self._called("start", config)

    def record(self, step, split, values):
        self._called("record", step, split, dict(values))
        values.clear()  # must not reach the other trackers

    def finish(self, summary):
        self._called("finish", summary)


def test_own_tracker_gets_start_records_and_finish(tmp_path):
    own = Recorder()
    assert isinstance(own, Tracker)
    trackers = started(tmp_path, 20, own=[own])
    trackers.record(30, "train", {"loss": 0.5, "nonfinite": ["layers/0"]})
    trackers.finish({"steps": 30})
    assert own.calls == [
        ("start", config_of(tmp_path, 20)),
        ("record", 30, "train", {"loss": 0.5, "nonfinite": ["layers/0"]}),
        ("finish", {"steps": 30}),
    ]


@pytest.mark.parametrize("method", ["start", "record", "finish"])
@pytest.mark.parametrize(
    "error", [RuntimeError("no network\nsecond line"), SystemExit("no network")]
)
def test_failing_tracker_warns_once_and_stops_getting_records(tmp_path, caplog, method, error):
    failing, working = Recorder(method, error), Recorder()
    trackers = started(tmp_path, own=[failing, working])
    for step in (1, 2):
        trackers.record(step, "train", {"loss": 1.0})
    trackers.finish({})
    kind = type(error).__name__
    assert caplog.messages == [f"tracker Recorder ends here: {kind} in {method}: no network"]
    assert failing.calls[-1][0] == method
    assert [c for c in working.calls if c[0] == "record"] == [
        ("record", 1, "train", {"loss": 1.0}), ("record", 2, "train", {"loss": 1.0}),
    ]  # fmt: skip
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_missing_package_names_the_extra(name, tmp_path, monkeypatch):
    (tmp_path / name).mkdir()  # as the client's own results folder, which is no package
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    with pytest.raises(UsageError, match=rf"expected pip install 'jmp-train\[{name}\]'"):
        make_trackers([name])


def rows_of(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_columns_grow_and_rows_keep_their_values(tmp_path):
    trackers = started(tmp_path, names=["csv"])
    trackers.record(10, "train", {"loss": 0.1 + 0.2, "nonfinite": ["a", "b, c"]})
    trackers.record(20, "eval", {"accuracy": float("nan")})
    trackers.finish({})
    first, second = rows_of(tmp_path)
    assert list(first) == ["step", "split", "loss", "nonfinite", "accuracy"]
    assert float(first["loss"]) == 0.1 + 0.2 and json.loads(first["nonfinite"]) == ["a", "b, c"]
    assert (first["accuracy"], second["loss"], second["accuracy"]) == ("", "", "nan")


def test_csv_resume_drops_later_and_torn_rows(tmp_path):
    trackers = started(tmp_path, names=["csv"])
    for step in (10, 20, 30):
        trackers.record(step, "train", {"loss": 1.0 / step, "norm": 2.0})
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("40,tra")
    trackers = started(tmp_path, 20, names=["csv"])
    trackers.record(30, "train", {"norm": 5.0, "rate": 1.0})
    assert [(r["step"], r["loss"], r["norm"], r["rate"]) for r in rows_of(tmp_path)] == [
        ("10", "0.1", "2.0", ""), ("20", "0.05", "2.0", ""), ("30", "", "5.0", "1.0"),
    ]  # fmt: skip
    started(tmp_path, names=["csv"])  # from the beginning
    assert rows_of(tmp_path) == []


def test_mlflow_run_is_resumed_in_a_folder_store(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="needs the extra mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    trackers = started(tmp_path, names=["mlflow"])
    trackers.record(10, "train", {"loss": 0.5, "nonfinite": ["layers/0"]})
    trackers.finish({})  # as after an error
    client = mlflow.MlflowClient()
    (experiment,) = [e for e in client.search_experiments() if e.name == "mlp_bf16"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED"
    trackers = started(tmp_path, 10, names=["mlflow"])
    assert client.get_run(run.info.run_id).info.status == "RUNNING"
    trackers.record(20, "eval", {"accuracy": 0.9})
    trackers.finish({"steps": 20})
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["optimizer.b1"] == "0.9" and "run.id" not in run.data.params
    history = [
        (m.key, m.value, m.step)
        for name in ("train/loss", "eval/accuracy")
        for m in client.get_metric_history(run.info.run_id, name)
    ]
    assert history == [("train/loss", 0.5, 10), ("eval/accuracy", 0.9, 20)]


def wandb_records(path):
    """The records that the client wrote for a later upload: blocks of LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole, records = path.read_bytes(), 7, b"", []  # after the file's own header
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:  # too little room in a block for a header
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)  # after a checksum
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a full record, or its last part
            records.append(wandb_internal_pb2.Record.FromString(whole))  # pyright: ignore
            whole = b""
    return records


@pytest.mark.slow
def test_wandb_offline_run_has_records_and_resumes_its_id(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs the extra wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for step in (10, 20):
        time.sleep(1.1 * (step > 10))  # the client names its folders by the second
        trackers = started(tmp_path, step - 10, names=["wandb"])
        trackers.record(step, "train", {"loss": 1.0 / step, "nonfinite": ["layers/0"]})
        trackers.record(step, "eval", {"accuracy": 0.5})
        trackers.finish({"steps": step})
    found = {}
    for file in tmp_path.glob("wandb/offline-run-*/run-*.wandb"):
        deadline = time.monotonic() + 30  # the client's own process writes after finish returns
        records = wandb_records(file)
        while not any(record.HasField("exit") for record in records):
            assert time.monotonic() < deadline
            time.sleep(0.1)
            records = wandb_records(file)
        (run,) = [r.run for r in records if r.HasField("run")][:1]
        assert run.run_id == "abc123"
        for record in [r.history for r in records if r.HasField("history")]:
            row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.item}
            found[row["_step"]] = {k: v for k, v in row.items() if not k.startswith("_")}
        assert [r.exit.exit_code for r in records if r.HasField("exit")] == [0]
    assert found == {
        10: {"train/loss": 0.1, "eval/accuracy": 0.5},
        20: {"train/loss": 0.05, "eval/accuracy": 0.5},
    }
