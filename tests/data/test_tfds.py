"""Data that TFDS prepared: equal to the arrays written, without TensorFlow; and what is refused."""

import json
import subprocess
import sys

import numpy as np
import pytest
from helpers.hub_data import PIXELS, assert_written, prepare_tfds
from PIL import Image

import jmp_train as jt
from jmp_train.data import DataError, iterate, tfds_data, train_batches

SIZE = PIXELS.shape[1]
NUMBERS = ("image", "points", "number")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare_tfds(tmp_path_factory.mktemp("tfds"))


@pytest.fixture
def changeable(tmp_path):
    return prepare_tfds(tmp_path / "tfds"), tmp_path / "tfds" / "trees" / "1.0.0"


def read(data_dir, **options):
    return tfds_data("trees", data_dir=data_dir, **{"columns": NUMBERS, "size": SIZE, **options})


def assert_shuffled(batch):
    assert batch["number"].dtype == np.int32
    assert_written(batch, batch["number"])  # TFDS shuffles examples when it prepares them


def test_examples_at_random_are_the_arrays_that_were_written(prepared):
    train, held_out = read(prepared, held_out="test")
    assert (len(train), len(held_out), train.classes, held_out.classes) == (24, 6, 3, 3)
    batch = train.take(np.random.default_rng(0).permutation(24))
    assert_shuffled(batch)
    assert sorted(batch["number"]) == list(range(24))
    rest = held_out.take(np.arange(6))
    assert_shuffled(rest)
    assert sorted(rest["number"]) == list(range(24, 30))
    one = train[7]
    np.testing.assert_array_equal(one["number"], train.take(np.array([7]))["number"][0])
    with pytest.raises(IndexError, match="expected 0 to 23"):
        train[24]


def test_a_part_of_a_split_is_read(prepared):
    whole = read(prepared).take(np.arange(24))["number"]
    part = read(prepared, split="train[6:]")
    np.testing.assert_array_equal(part.take(np.arange(18))["number"], whole[6:])


def test_the_latest_version_is_read_and_another_can_be_named(prepared, tmp_path):
    for version in ("9.0.0", "10.0.0"):
        prepare_tfds(tmp_path, version=version)
    assert tfds_data("trees", data_dir=str(tmp_path), columns=NUMBERS)._folder.name == "10.0.0"
    named = tfds_data("trees:9.0.0", data_dir=str(tmp_path), columns=NUMBERS)
    assert named._folder.name == "9.0.0"


@pytest.mark.slow
def test_tensorflow_is_not_imported(prepared):
    code = f"""
import sys

from jmp_train.data import tfds_data

data = tfds_data("trees", data_dir={prepared!r}, columns=("image", "points"))
assert len(data) == 24 and data[3]["image"].shape == (32, 32, 3)
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def refused(match, **options):
    with pytest.raises(DataError, match=match) as caught:
        jt.Data(tfds_data, **options).load()
    assert str(caught.value).count("\n") == 0


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    refused(r"expected tensorflow-datasets: pip install 'jmp-train\[tfds\]'", name="trees")


@pytest.mark.parametrize(
    "options,match",
    [
        ({}, "'text' is Text; expected numbers or images: choose columns"),
        (
            {"name": "tree"},
            r"tree is not prepared in .*; did you mean 'trees'\?; to prepare it: python",
        ),
        ({"name": "trees:2.0.0"}, "did you mean '1.0.0'.*tfds.builder.'trees:2.0.0'"),
        ({"name": "../trees"}, "the name is '../trees'; expected one such as mnist"),
        ({"split": "tran", "columns": NUMBERS}, "has no split 'tran'; did you mean 'train'"),
        ({"columns": ("imag",)}, "has no column 'imag'; did you mean 'image'"),
        ({"label": "points"}, "'points' is float32; expected integers as labels"),
        ({"image": "points"}, "'points' is float32; expected a column of images"),
        ({"channels": 2, "columns": NUMBERS}, "channels is 2; expected 1, 3 or 4"),
    ],
)
def test_wrong_options_are_one_line(prepared, options, match):
    refused(match, **{"name": "trees", "data_dir": prepared, **options})


def test_files_of_another_format_are_refused_with_the_command(changeable):
    data_dir, folder = changeable
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    refused(
        "has tfrecord files; expected ArrayRecord .*array_record'", name="trees", data_dir=data_dir
    )


def test_features_of_other_modules_are_not_imported(changeable, monkeypatch):
    data_dir, folder = changeable
    (folder.parent / "evil_feature.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(folder.parent))
    text = (folder / "features.json").read_text()
    own = "tensorflow_datasets.core.features.text_feature.Text"
    (folder / "features.json").write_text(text.replace(own, "evil_feature.Text"))
    refused(
        "has the feature 'evil_feature.Text'; expected those of TFDS",
        name="trees",
        data_dir=data_dir,
    )


def test_files_outside_of_the_folder_are_refused(changeable):
    data_dir, folder = changeable
    info = json.loads((folder / "dataset_info.json").read_text())
    for split in info["splits"]:
        split["filepathTemplate"] = "../../{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match="dataset_info.json names the file .*; expected one in"):
        read(data_dir)


def test_damaged_files_are_one_line(changeable):
    data_dir, folder = changeable
    (folder / "features.json").write_text("{")
    refused("features.json cannot be read", name="trees", data_dir=data_dir)
    (folder / "dataset_info.json").write_text("[]")
    refused("expected ArrayRecord files", name="trees", data_dir=data_dir)


def test_the_image_reader_of_predict_reads_as_in_training(prepared, tmp_path):
    config = jt.Data(tfds_data, name="trees", data_dir=prepared, columns=NUMBERS, size=4)
    example = read(prepared, size=4)[3]
    Image.fromarray(PIXELS[example["number"]]).save(tmp_path / "x.png")
    np.testing.assert_array_equal(config.image_reader(tmp_path / "x.png"), example["image"])


@pytest.mark.slow
def test_workers_make_the_same_batches(prepared):
    data = jt.Data(tfds_data, name="trees", data_dir=prepared, columns=NUMBERS, size=SIZE).load()
    plain, working = (
        iterate(train_batches(data.train, 4, seed=0, workers=workers)) for workers in (0, 2)
    )
    for _ in range(8):
        expected, found = next(plain), next(working)
        assert_shuffled(found)
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)
    working.close()
