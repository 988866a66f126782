"""Every source of data on disk: trained from the command line, killed, and resumed bitwise."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers.command_line import call
from helpers.hub_data import prepare_tfds, save_hugging_face
from helpers.saved_arrays import assert_same_arrays, final_arrays
from PIL import Image
from pyarrow import parquet

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
    jt.Data(data.SOURCE, OPTIONS),
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


def write_row_groups():
    Path("files").mkdir()
    columns = {"label": [i % 3 for i in range(30)]}
    columns |= {f"c{i}": IMAGES.reshape(30, -1)[:, i] for i in range(9)}
    parquet.write_table(pa.table(columns), "files/1.parquet", row_group_size=5)


def write_arrays():
    np.savez("files.npz", image=IMAGES, label=np.arange(30) % 3)


SOURCES = {
    "array_records": (write_array_records, 'path="files"'),
    "image_folder": (write_images, 'path="files"'),
    "table": (write_table, 'path="files", label="label", inputs="image"'),
    "row_groups": (
        write_row_groups,
        'path="files", label="label", inputs="image", in_memory=False',
    ),
    "arrays_on_disk": (write_arrays, 'path="files.npz"'),
}
_COLUMNS = 'columns=("image",), size=6'
HUBS = {
    "rows": ("hugging_face", partial(save_hugging_face, "files"), f'path="files", {_COLUMNS}'),
    "stream": (
        "hugging_face",
        partial(save_hugging_face, "files"),
        f'path="files", {_COLUMNS}, streaming=True, held_out="test", buffer=6',
    ),
    "tfds": (
        "tfds_data",
        partial(prepare_tfds, "files"),
        f'name="trees", data_dir="files", {_COLUMNS}',
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("workers", ("0", "2"))
@pytest.mark.parametrize("source", SOURCES)
def test_a_killed_run_resumes_bitwise(tmp_path, monkeypatch, capsys, quick_runs, source, workers):
    monkeypatch.chdir(tmp_path)
    write, options = SOURCES[source]
    write()
    function = "table" if source == "row_groups" else source
    assert_resumes_bitwise(capsys, function, options, workers)


@pytest.mark.slow
@pytest.mark.parametrize("workers", ("0", "2"))
@pytest.mark.parametrize("kind", HUBS)
def test_a_killed_run_on_a_hub_resumes_bitwise(
    tmp_path, monkeypatch, capsys, quick_runs, kind, workers
):
    monkeypatch.chdir(tmp_path)
    source, write, options = HUBS[kind]
    write()
    assert_resumes_bitwise(capsys, source, options, workers)


@pytest.mark.slow
def test_bad_images_end_a_run_or_are_left_out_and_counted(
    tmp_path, monkeypatch, capsys, quick_runs
):
    monkeypatch.chdir(tmp_path)
    write_images()
    for damaged in ("class0/3.png", "class1/4.png", "class2/5.png", "class0/6.png"):
        path = Path("files", damaged)
        path.write_bytes(path.read_bytes()[:300])
    Path("experiments").mkdir()
    code = EXPERIMENT.replace("SOURCE", "image_folder").replace("OPTIONS", 'path="files"')
    Path("experiments", "own.py").write_text(code)
    status, _, err = call(capsys, "train", "own", "--run-dir", "stopped")
    assert status == 2 and ".png cannot be read" in err and len(err.splitlines()) == 1
    words = ["train", "own", "--data.on-bad", "skip", "--run-dir"]
    status, out, err = call(capsys, *words, "whole")
    assert status == 0, err
    assert "left out training examples that cannot be used, the first: example" in out
    records = [json.loads(line) for line in Path("whole", "metrics.jsonl").read_text().splitlines()]
    counts = [r.get("skipped_examples", 0) for r in records if r["split"] == "train"]
    assert counts == sorted(counts) and counts[-1] >= 4  # each is met once in an epoch of 24
    assert json.loads(Path("whole", "summary.json").read_text())["skipped_examples"] == counts[-1]
    Path("kill").touch()
    assert call(capsys, *words, "cut")[0] == 143
    Path("kill").unlink()
    assert call(capsys, *words, "cut")[0] == 0
    assert_same_arrays(final_arrays(Path("cut")), final_arrays(Path("whole")))
    assert json.loads(Path("cut", "summary.json").read_text())["skipped_examples"] == counts[-1]


def assert_resumes_bitwise(capsys, source, options, workers):
    code = EXPERIMENT.replace("SOURCE", source).replace("OPTIONS", options)
    Path("experiments").mkdir()
    Path("experiments", "own.py").write_text(code)
    words = ["train", "own", "--data.workers", workers, "--run-dir"]
    status, _, err = call(capsys, *words, "whole")
    assert status == 0, err
    Path("kill").touch()
    assert call(capsys, *words, "cut")[0] == 143
    Path("kill").unlink()
    status, out, _ = call(capsys, *words, "cut")
    assert status == 0 and "step 16/16" in out and "again" not in out
    assert_same_arrays(final_arrays(Path("cut")), final_arrays(Path("whole")))
    assert losses("cut") == losses("whole")


def losses(run):
    lines = Path(run, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]
