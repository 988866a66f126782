"""Data of Hugging Face `datasets`: equal to the arrays written, and what is refused."""

import json
import sys

import datasets
import grain
import numpy as np
import pytest
from helpers.hub_data import PIXELS, POINTS, assert_written, png, rows, save_hugging_face
from PIL import Image
from pyarrow.parquet import write_table

import jmp_train as jt
from jmp_train.data import DataError, hugging_face, iterate, train_batches

SIZE = PIXELS.shape[1]
NUMBERS = ("image", "points")


@pytest.fixture
def saved(tmp_path):
    return save_hugging_face(tmp_path / "saved")


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "files"
    folder.mkdir()
    for number, part in enumerate((slice(0, 11), slice(11, 24))):
        rows(part).to_parquet(folder / f"train-{number}.parquet", batch_size=4)
    rows(slice(24, 30)).to_parquet(folder / "test-0.parquet")
    return str(folder)


def test_rows_at_random_are_the_arrays_that_were_written(saved):
    train, held_out = hugging_face(saved, held_out="test", columns=NUMBERS, size=SIZE)
    assert (len(train), len(held_out), train.classes, held_out.classes) == (24, 6, 3, 3)
    order = np.random.default_rng(0).permutation(24)
    assert_written(train.take(order), order)
    assert_written({k: v[None] for k, v in train[7].items()}, np.array([7]))
    assert_written(held_out.take(np.arange(6)), np.arange(24, 30))


def test_one_dataset_without_splits_is_read(saved):
    train, held_out = hugging_face(
        f"{saved}/train", held_out=f"{saved}/test", columns=NUMBERS, size=SIZE
    )
    assert_written(train.take(np.arange(24)), np.arange(24))
    assert_written(held_out.take(np.arange(6)), np.arange(24, 30))


def test_parquet_files_are_read_and_may_be_cut(parquet):
    train = hugging_face(parquet, split="train[5:]", columns=NUMBERS, size=SIZE)
    assert_written(train.take(np.arange(19)), np.arange(5, 24))


def test_folders_of_images_have_the_class_of_their_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for index in range(6):
        folder = tmp_path / "images" / f"class{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS[index]).save(folder / f"{index}.png")
    expected = PIXELS[[0, 2, 4, 1, 3, 5]] / np.float32(255)
    data = hugging_face(str(tmp_path / "images"), size=SIZE)
    assert data.classes == 2
    batch = data.take(np.arange(6))
    found = {image.tobytes(): int(label) for image, label in zip(*batch.values(), strict=True)}
    assert found == {image.tobytes(): index // 3 for index, image in enumerate(expected)}


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "float16", "float32", "bool"])
def test_numbers_keep_their_dtype_and_lists_their_shape(tmp_path, dtype):
    array = np.random.default_rng(0).integers(0, 2, (5, 2, 3)).astype(dtype)
    features = datasets.Features(
        {
            "fixed": datasets.Array2D((2, 3), dtype),
            "lists": datasets.List(datasets.List(datasets.Value(dtype))),
            "one": datasets.Value(dtype),
        }
    )
    columns = {"fixed": list(array), "lists": array.tolist(), "one": array[:, 0, 0].tolist()}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "it")
    batch = hugging_face(str(tmp_path / "it"), label=None).take(np.array([4, 0]))
    for name, expected in (("fixed", array), ("lists", array), ("one", array[:, 0, 0])):
        assert batch[name].dtype == dtype and batch[name].flags.writeable
        np.testing.assert_array_equal(batch[name], expected[[4, 0]])


def test_labels_without_names_are_counted(tmp_path):
    save(tmp_path / "it", {"x": [0.0, 1.0, 2.0], "kind": [2, 0, 1]})
    assert hugging_face(str(tmp_path / "it"), label="kind").classes == 3
    save(tmp_path / "from1", {"x": [0.0, 1.0], "kind": [1, 2]})
    assert hugging_face(str(tmp_path / "from1"), label="kind").classes is None


def save(folder, columns):
    datasets.Dataset.from_dict(columns).save_to_disk(folder)


def refused(match, path, **options):
    with pytest.raises(DataError, match=match) as caught:
        jt.Data(hugging_face, path=str(path), **options).load()
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize(
    "options,match",
    [
        ({}, "'text' is string; expected numbers or images: choose columns"),
        ({"split": "tran"}, "has no split 'tran'; did you mean 'train'"),
        ({"held_out": "tset", "columns": NUMBERS}, "has no split 'tset'; did you mean 'test'"),
        ({"columns": ("imag",)}, "has no column 'imag'; did you mean 'image'"),
        ({"label": "lable"}, "has no column 'lable'; did you mean 'label'"),
        ({"label": "points"}, "'points' is a list of float32; expected integers as labels"),
        ({"label": "text"}, "'text' is string; expected integers as labels"),
        ({"image": "points"}, "'points' is a list of float32; expected a column of images"),
        ({"streaming": True}, "a stream cannot be split; expected held_out"),
        ({"size": 0}, "size is 0; expected 1 to 16384"),
        ({"buffer": 0}, "buffer is 0; expected at least 1"),
    ],
)
def test_wrong_options_are_one_line(saved, options, match):
    refused(match, saved, **options)


def test_paths_of_no_data_are_one_line(saved, tmp_path):
    refused("save does not exist; did you mean 'saved'", tmp_path / "save")
    refused("pandas does not exist", "pandas")  # one of the library's readers, of pickles
    save(tmp_path / "no_label", {"x": [0.0, 1.0]})
    refused(r"has no column 'label'; .*label=None", tmp_path / "no_label")


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(r"expected datasets: pip install 'jmp-train\[hugging-face\]'", "saved")


def test_a_name_that_the_hub_does_not_have_is_one_line(monkeypatch):
    def offline(*args, **options):
        raise ConnectionError("no connection\nmore")

    monkeypatch.setattr(datasets, "load_dataset_builder", offline)
    refused("someone/some is no folder here; .* ConnectionError: no connection$", "someone/some")


def test_files_outside_of_the_folder_are_refused(saved, tmp_path):
    state = tmp_path / "saved" / "train" / "state.json"
    content = json.loads(state.read_text())
    content["_data_files"] = [{"filename": "../test/data-00000-of-00001.arrow"}]
    state.write_text(json.dumps(content))
    refused("names the file '../test/data-.*expected one in", saved)


def test_a_readme_cannot_name_other_files(parquet, tmp_path):
    (tmp_path / "secret.csv").write_text("x,label\n1,0\n")
    files = tmp_path / "files"
    (files / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: ../secret.csv\n---\n"
    )
    refused("names the file .*secret.csv; expected files in the folder", files)


def test_an_image_elsewhere_is_not_read(parquet, tmp_path):
    Image.fromarray(PIXELS[0]).save(tmp_path / "secret.png")
    image = [{"path": str(tmp_path / "secret.png"), "bytes": None}] * 5
    made = labelled_images(image)
    write_table(made.data.table, tmp_path / "files" / "train-0.parquet")  # without their bytes
    write_table(made.data.table, tmp_path / "files" / "train-1.parquet")
    write_table(made.data.table, tmp_path / "files" / "test-0.parquet")
    data = hugging_face(parquet)
    with pytest.raises(DataError, match="is the file .*secret.png; expected the bytes"):
        data.take(np.array([0]))


def labelled_images(images):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict(
        {"image": images, "label": [0, 1, 0, 1, 0]}, features=features
    )


@pytest.mark.parametrize(
    "column,match",
    [
        ({"x": [0.0, 1.0, None, 3.0, 4.0]}, "example 2: 'x' has no value"),
        ({"x": [[1.0], [2.0], [3.0, 4.0], [5.0], [6.0]]}, r"example 2: 'x' has the shape \(2,\)"),
        ({"x": [[1.0], [2.0], [None], [5.0], [6.0]]}, "example 2: 'x' has no value"),
    ],
)
def test_a_bad_row_is_named(tmp_path, column, match):
    save(tmp_path / "it", {**column, "label": [0, 1, 0, 1, 0]})
    refused_rows(str(tmp_path / "it"), match)


def test_a_damaged_image_is_named(tmp_path):
    images = [{"bytes": png(pixels), "path": None} for pixels in PIXELS[:5]]
    images[2]["bytes"] = images[2]["bytes"][:-40]
    labelled_images(images).save_to_disk(tmp_path / "it")
    refused_rows(str(tmp_path / "it"), "example 2: 'image' cannot be read")


def refused_rows(path, match):
    data = jt.Data(hugging_face, path=path, held_out=path).load()
    assert data.train.draw(np.array([0, 1]), None)["label"].tolist() == [0, 1]
    with pytest.raises(DataError, match=match) as caught:
        data.train.draw(np.array([1, 2, 3]), None)
    assert str(caught.value).count("\n") == 0


def test_the_image_reader_of_predict_reads_as_in_training(saved, tmp_path):
    data = jt.Data(hugging_face, path=saved, columns=NUMBERS, size=4)
    Image.fromarray(PIXELS[3]).save(tmp_path / "x.png")
    np.testing.assert_array_equal(
        data.image_reader(tmp_path / "x.png"),
        hugging_face(saved, columns=NUMBERS, size=4)[3]["image"],
    )


def stream(path, **options):
    return hugging_face(
        path, held_out="test", columns=NUMBERS, size=SIZE, streaming=True, buffer=7, **options
    )


@pytest.mark.parametrize("source", ["saved", "parquet"])
def test_a_pass_of_a_stream_has_every_row_once(request, source):
    path = request.getfixturevalue(source)
    train, held_out = stream(path)
    assert isinstance(train, grain.IterDataset) and train.classes == 3
    passed = list(train)
    order = np.array([np.flatnonzero((row["points"] == POINTS).all(1))[0] for row in passed])
    assert sorted(order) == list(range(24)) and order.tolist() != list(range(24))
    batch = {name: np.stack([row[name] for row in passed]) for name in passed[0]}
    assert_written(batch, order)
    batch = {name: np.stack([row[name] for row in held_out]) for name in passed[0]}
    assert_written(batch, np.arange(24, 30))


def test_passes_and_seeds_of_a_stream_differ(saved):
    orders = [points(saved, seed, steps=12) for seed in (0, 1)]
    assert not np.array_equal(*orders)
    first, second = np.split(orders[0], 2)
    assert not np.array_equal(first, second)
    for order in (first, second):
        np.testing.assert_array_equal(np.sort(order, 0), np.sort(POINTS[:24], 0))
    np.testing.assert_array_equal(points(saved, 0, steps=12), orders[0])


def batches(path, seed=0, workers=0):
    data = jt.Data(stream, path=path, workers=workers).load()
    return iterate(train_batches(data.train, 4, seed=seed, workers=workers))


def points(path, seed, steps):
    iterator = batches(path, seed)
    return np.concatenate([next(iterator)["points"] for _ in range(steps)])


@pytest.mark.slow
@pytest.mark.parametrize("source", ["saved", "parquet"])
def test_a_stream_resumes_bitwise_at_every_position(request, source):
    path = request.getfixturevalue(source)
    iterator, states, whole = batches(path), [], []
    for _ in range(14):
        states.append(json.dumps(iterator.get_state()))
        whole.append(next(iterator))
    for index, state in enumerate(states):
        again = batches(path)
        again.set_state(json.loads(state))
        assert again.can_seek and again.replayed == 0
        for expected in whole[index : index + 3]:
            found = next(again)
            for name, array in expected.items():
                np.testing.assert_array_equal(found[name], array)


@pytest.mark.slow
def test_workers_read_every_row_of_a_stream_once_and_resume(parquet):
    iterator = batches(parquet, workers=2)
    whole, states = [], []
    for _ in range(8):
        states.append(json.dumps(iterator.get_state()))
        whole.append(next(iterator)["points"])
    iterator.close()
    # 11 and 13 rows in two workers: two and three whole batches of 4.
    rows_of_pass = np.concatenate(whole[:5])
    assert len(np.unique(rows_of_pass, axis=0)) == 20
    again = batches(parquet, workers=2)
    again.set_state(json.loads(states[3]))
    for expected in whole[3:]:
        np.testing.assert_array_equal(next(again)["points"], expected)
    again.close()


@pytest.mark.slow
def test_workers_make_the_same_batches_of_rows(saved):
    data = jt.Data(hugging_face, path=saved, columns=NUMBERS, size=SIZE).load()
    plain, working = (
        iterate(train_batches(data.train, 4, seed=0, workers=workers)) for workers in (0, 2)
    )
    for _ in range(8):
        expected, found = next(plain), next(working)
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)
    working.close()
