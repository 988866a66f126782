"""Every source of data on disk: trained from the command line, killed, and resumed bitwise."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.command_line import call
from helpers.marks import first_quick
from helpers.saved_arrays import assert_same_arrays, final_arrays
from PIL import Image

from jmp_train.data import write_records

EXPERIMENT = """
import os
import signal

import jmp_train as jt
from jmp_train import data
from jmp_train.models import Mlp, Model


def stop(record, state):
    if os.path.exists("kill") and record["step"] == 9:
        os.kill(os.getpid(), signal.SIGTERM)


EXPERIMENT = jt.Experiment(
    Model(
        Mlp, inputs=lambda spec: spec.size("image"), outputs=lambda spec: spec.classes, hidden=(8,)
    ),
    jt.Data(data.SOURCE, path="files", OPTIONS),
    steps=16,
    batch_size=4,
    log_every=1,
    on_record=stop,
)
"""
IMAGES = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), np.uint8)


def write_images():
    for index, pixels in enumerate(IMAGES):
        folder = Path("files", f"class{index % 3}")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{index}.png")


def write_array_records():
    rows = [{"image": image / np.float32(255), "label": i % 3} for i, image in enumerate(IMAGES)]
    write_records(rows, "files", shards=3, classes=3)


def write_table():
    Path("files").mkdir()
    rows = [",".join(["label", *(f"c{i}" for i in range(9))])]
    rows += [f"{i % 3}," + ",".join(map(str, IMAGES[i].ravel()[:9])) for i in range(30)]
    Path("files", "1.csv").write_text("\n".join(rows))


SOURCES = {"array_records": write_array_records, "image_folder": write_images, "table": write_table}


@pytest.mark.parametrize("workers", first_quick(("0", "2")))
@pytest.mark.parametrize("source", SOURCES)
def test_a_killed_run_resumes_bitwise(tmp_path, monkeypatch, capsys, quick_runs, source, workers):
    monkeypatch.chdir(tmp_path)
    SOURCES[source]()
    options = 'label="label", inputs="image"' if source == "table" else ""
    code = EXPERIMENT.replace("SOURCE", source).replace("OPTIONS", options)
    Path("experiments").mkdir()
    Path("experiments", "own.py").write_text(code)
    words = ["train", "own", "--data.workers", workers, "--run-dir"]
    assert call(capsys, *words, "whole")[0] == 0
    Path("kill").touch()
    assert call(capsys, *words, "cut")[0] == 143
    Path("kill").unlink()
    status, out, _ = call(capsys, *words, "cut")
    assert status == 0 and "step 16/16" in out
    assert_same_arrays(final_arrays(Path("cut")), final_arrays(Path("whole")))
    assert losses("cut") == losses("whole")


def losses(run):
    lines = Path(run, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]
