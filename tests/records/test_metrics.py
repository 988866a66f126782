"""Records: strict JSON, no torn line, no step twice."""

import errno
import json
import math
import os
import resource

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmp_train.records.metrics import MetricsWriter, read_metrics, strict_json, write_json


def reject_constant(token):
    raise AssertionError(f"bare token {token}")


@given(st.recursive(
    st.floats() | st.integers() | st.text() | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
))  # fmt: skip
def test_records_are_strict_json(value):
    text = json.dumps(strict_json(value), allow_nan=False)
    json.loads(text, parse_constant=reject_constant)


def test_arrays_become_numbers_and_lists():
    value = {"a": np.float32(1.5), "b": jnp.arange(3), "c": np.array(float("nan")), 4: (1, 2)}
    assert strict_json(value) == {"a": 1.5, "b": [0, 1, 2], "c": "nan", "4": [1, 2]}


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_records_come_back_and_a_resume_drops_later_and_torn_ones(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write(step, "train", {"loss": 1.0 / step})
    writer.write(3, "eval", {"loss": float("inf")})
    writer.close()
    path = tmp_path / "metrics.jsonl"
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 3]
    assert read_metrics(path)[-1] == {"step": 3, "split": "eval", "loss": "inf"}
    assert math.isinf(float(read_metrics(path)[-1]["loss"]))

    with path.open("a") as file:
        file.write('{"step": 4, "spl')
    writer = MetricsWriter(tmp_path, resume_step=2)
    writer.write(3, "train", {"loss": 9.0})
    writer.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(path)] == [(1, 1.0), (2, 0.5), (3, 9.0)]


def test_damage_before_the_last_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n[2]\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"line 2: expected a record, got '\[2\]'"):
        read_metrics(path)


def test_tensorboard_events_are_written(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, "train", {"loss": 1.0, "bad": float("nan")})
    writer.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in file.read_bytes()


def test_a_record_can_be_read_before_the_writer_is_closed(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, "train", {"loss": 1.0, "step": 99, "split": "mine"})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "split": "train", "loss": 1.0}]
    writer.close()


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

    writer = MetricsWriter(tmp_path)
    file, writer._lines = writer._lines, Disk()
    writer.write(1, "train", {"loss": 1.0})
    writer.write(2, "train", {"loss": 2.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == []  # a torn line, which is left out
    assert caplog.text.count("metrics.jsonl cannot be written, and waits: No space left") == 1
    with pytest.raises(OSError, match="No space left"):
        writer.flush()
    writer._lines.room = 1000
    writer.write(3, "train", {"loss": 3.0})
    writer.close()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["loss"]) for r in records] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_disk_that_is_full_to_the_end_leaves_a_warning_and_no_traceback(tmp_path, caplog):
    writer = MetricsWriter(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))  # no file may have more than a byte
    try:
        for step in range(40):  # more than tensorboardX's queue holds
            writer.write(step, "train", {"loss": 1.0})
        writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "metrics.jsonl lacks its last records" in caplog.text
    assert caplog.text.count("TensorBoard's events end here") == 1
    assert MetricsWriter(tmp_path, resume_step=3) and not read_metrics(tmp_path / "metrics.jsonl")
