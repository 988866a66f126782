"""Arrays that stay in their files: bitwise those of NumPy, and what is refused."""

import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers.command_line import call
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jmp_train as jt
from jmp_train.data import DataError, arrays_on_disk, iterate, train_batches

COUNT = 30
RNG = np.random.default_rng(0)
ARRAYS = {
    "image": RNG.integers(0, 256, (COUNT, 4, 5), np.uint8),
    "weight": RNG.normal(size=(COUNT, 3)),  # float64
    "label": np.arange(COUNT) % 3,
}
DTYPES = (
    "bool",
    "int8",
    "uint8",
    ">i2",
    "int64",
    "uint32",
    "float16",
    "float32",
    ">f8",
    "complex64",
)


def write_folder(place, arrays=ARRAYS):
    place.mkdir()
    for name, array in arrays.items():
        np.save(place / f"{name}.npy", array)
    return place


def write_archive(place, arrays=ARRAYS):
    file = place.with_suffix(".npz")
    np.savez(file, **arrays)
    return file


each_form = pytest.mark.parametrize("write", [write_folder, write_archive])


def refused(match, path, **options):
    with pytest.raises(DataError, match=match) as caught:
        jt.Data(arrays_on_disk, path=str(path), **options).load()
    assert str(caught.value).count("\n") == 0


@each_form
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3))
def test_every_dtype_and_shape_is_read_as_numpy_reads_it(tmp_path_factory, write, data, dtypes):
    count = data.draw(st.integers(1, 5))
    inner = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
    saved = {
        f"a{n}": data.draw(hnp.arrays(dtype, (count, *data.draw(inner))))
        for n, dtype in enumerate(dtypes)
    }
    path = write(tmp_path_factory.mktemp("arrays") / "x", saved)
    source = arrays_on_disk(str(path))
    rows = np.array(data.draw(st.lists(st.integers(0, count - 1), max_size=6)), np.int64)
    found = source.take(rows)
    assert found.keys() == saved.keys()
    for name, array in saved.items():
        kept = np.load(path)[name] if path.suffix else np.load(path / f"{name}.npy")
        expected = kept[rows].astype(array.dtype.newbyteorder("="))
        assert (found[name].dtype, found[name].shape) == (expected.dtype, expected.shape)
        assert found[name].tobytes() == expected.tobytes()


@each_form
def test_batches_are_those_of_the_arrays_in_memory(tmp_path, write):
    memory = {**ARRAYS, "image": ARRAYS["image"].astype(np.float32) / np.float32(255)}
    whole = jt.Data(lambda: memory).load()
    disk = jt.Data(arrays_on_disk, path=str(write(tmp_path / "x"))).load()
    assert disk.spec.classes == 3
    assert {**disk.spec.example} == {**whole.spec.example}
    one, other = (iterate(train_batches(d.train, 8, seed=3)) for d in (whole, disk))
    for _ in range(7):  # more than two epochs
        assert_same(next(other), next(one))
    one.close()
    other.close()
    held_out, _ = disk.eval.held_out(0, len(disk.eval))
    assert_same(held_out, {k: v.astype(held_out[k].dtype) for k, v in whole.eval.items()})


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_other_arrays_are_divided_by_255_only_when_asked_for(tmp_path):
    path = str(write_folder(tmp_path / "x", {"pixels": ARRAYS["image"], "image": ARRAYS["weight"]}))
    plain = arrays_on_disk(path)[4]
    np.testing.assert_array_equal(plain["pixels"], ARRAYS["image"][4])
    np.testing.assert_array_equal(plain["image"], ARRAYS["weight"][4])  # not uint8
    scaled = arrays_on_disk(path, scaled=("pixels",))[4]["pixels"]
    np.testing.assert_array_equal(scaled, ARRAYS["image"][4].astype(np.float32) / np.float32(255))
    refused("has no array 'pixel' to scale; did you mean 'pixels'", path, scaled=("pixel",))


@each_form
def test_another_process_and_a_system_without_preadv_read_the_same(tmp_path, monkeypatch, write):
    source = arrays_on_disk(str(write(tmp_path / "x")))
    rows = np.array([7, 0, 29, 7])
    expected = source.take(rows)
    assert_same(pickle.loads(pickle.dumps(source)).take(rows), expected)
    monkeypatch.delattr(os, "preadv", raising=False)
    assert_same(source.take(rows), expected)
    np.testing.assert_array_equal(expected["label"], ARRAYS["label"][rows])


def test_reads_that_return_less_than_asked_for_are_completed(tmp_path, monkeypatch):
    source, real = arrays_on_disk(str(write_folder(tmp_path / "x"))), os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, parts, at: real(fd, [parts[0][:3]], at))
    np.testing.assert_array_equal(source[11]["weight"], ARRAYS["weight"][11])


def test_held_out_examples_of_their_own(tmp_path):
    train, other = write_folder(tmp_path / "a"), write_archive(tmp_path / "b")
    loaded = jt.Data(arrays_on_disk, path=str(train), held_out=str(other)).load()
    assert (len(loaded.train), len(loaded.eval)) == (COUNT, COUNT)


def test_a_label_out_of_range_is_named_with_its_place(tmp_path):
    path = write_folder(tmp_path / "x", {**ARRAYS, "label": np.arange(COUNT) - 2})
    loaded = jt.Data(arrays_on_disk, path=str(path), held_out=str(path)).load
    with pytest.raises(
        DataError, match=r"^example 0 \(.*label.npy\[0\]\): 'label' is -2; expected"
    ):
        loaded()


@each_form
def test_a_file_that_is_cut_later_is_one_line(tmp_path, write):
    path = write(tmp_path / "x")
    loaded = jt.Data(arrays_on_disk, path=str(path), held_out=str(path)).load()
    file = path if path.suffix else path / "weight.npy"
    with file.open("r+b") as stream:
        stream.truncate(400)
    with pytest.raises(DataError, match=f"{file.name} has become shorter; expected it") as caught:
        loaded.train.draw(np.array([COUNT - 1]), np.random.default_rng(0))
    assert str(caught.value).count("\n") == 0


def test_what_is_no_plain_array_is_refused(tmp_path):
    def one(name, array, match):
        refused(match, write_folder(tmp_path / name, {"x": array}))
        refused(match, write_archive(tmp_path / name, {"x": array}))

    one("a", np.array([{}, {}]), "'x' (has|contains) Python objects.*expected numbers")
    one("b", np.array(["a", "b"]), "'x' has dtype <U1; expected numbers")
    one("c", np.zeros(3, [("a", "i4")]), "'x' has dtype .*; expected numbers")
    one("d", np.float32(1), "'x' has no axes; expected a leading axis")
    one("e", np.zeros((0, 3)), "returned no examples")
    one("f", np.asfortranarray(np.zeros((3, 2))), "'x' is in Fortran order; expected numpy.asc")


def test_arrays_of_different_lengths_are_refused(tmp_path):
    arrays = {"label": np.zeros(4, int), "x": np.zeros((3, 2))}
    for write in (write_folder, write_archive):
        match = "'label' has 4, 'x' has 3 examples; expected the same number in every array"
        refused(match, write(tmp_path / "x", arrays))


def test_compressed_and_empty_archives_are_one_line(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", **ARRAYS)
    refused(
        "'image' is compressed or encrypted; expected numpy.savez, or NpzConfig", tmp_path / "x.npz"
    )
    with zipfile.ZipFile(tmp_path / "y.npz", "w") as archive:
        archive.writestr("README", "text")
    refused("has no arrays; expected a file that numpy.savez wrote", tmp_path / "y.npz")


def test_other_paths_are_one_line(tmp_path):
    folder = write_folder(tmp_path / "arrays")
    refused("array does not exist; did you mean 'arrays'", tmp_path / "array")
    refused(r"x.npz does not exist; its folder has no .npz files", tmp_path / "x.npz")
    refused("the path is ''; expected the name of a file or a folder", "")
    refused(r"label.npy is a file; expected a folder", folder / "label.npy")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "empty" / "pipe.npy")
    np.save(tmp_path / "empty" / ".hidden.npy", np.zeros(3))
    refused("empty has no .npy files; expected an array in each", tmp_path / "empty")
    np.save(tmp_path / "secret.npy", np.zeros(COUNT))
    (folder / "x.npy").symlink_to(tmp_path / "secret.npy")
    refused("x.npy is a link that leads out of .*arrays; expected a file in it", folder)


@each_form
def test_damaged_files_give_arrays_or_one_line(tmp_path, write):
    path = write(tmp_path / "x")
    file = path if path.suffix else path / "image.npy"
    content, damaged = file.read_bytes(), 0
    changes = [content[:length] for length in (0, 5, 80, 200, len(content) - 1)]
    for place in {*range(0, 400, 3), *range(len(content) - 400, len(content), 5)}:
        changed = bytearray(content)
        changed[place] ^= 0x41
        changes.append(bytes(changed))
    for changed in changes:
        file.write_bytes(changed)
        try:
            source = arrays_on_disk(str(path))
            source.take(np.arange(len(source)))
        except DataError as error:
            assert file.name in str(error) or "examples; expected the same number" in str(error)
            assert str(error).count("\n") == 0
            damaged += 1
    assert damaged > 40


EXPERIMENT = """
import jmp_train as jt
from jmp_train.data import arrays_on_disk
from jmp_train.models import Mlp, Model

EXPERIMENT = jt.Experiment(
    Model(
        Mlp, inputs=lambda spec: spec.size("image"), outputs=lambda spec: spec.classes, hidden=(8,)
    ),
    jt.Data(arrays_on_disk, path="arrays"),
    steps=8,
    batch_size=4,
    log_every=1,
)
"""


@pytest.mark.slow
def test_worker_processes_read_the_same_batches(tmp_path, monkeypatch, capsys, quick_runs):
    monkeypatch.chdir(tmp_path)
    Path("experiments").mkdir()
    Path("experiments", "own.py").write_text(EXPERIMENT)
    write_folder(Path("arrays"))
    losses = []
    for workers in ("0", "2"):
        words = ["train", "own", "--data.workers", workers, "--run-dir", f"run{workers}"]
        status, _, err = call(capsys, *words)
        assert status == 0, err
        lines = Path(f"run{workers}", "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == losses[1] and len(losses[0]) >= 8
