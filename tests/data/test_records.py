"""ArrayRecord files: read back bitwise and at random, written whole or not at all, untrusted."""

import json
import os
import pickle
import re
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.command_line import call
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jmp_train as jt
from jmp_train.data import (
    DataError,
    Records,
    array_records,
    iterate,
    pack,
    train_batches,
    write_records,
)

COUNT = 11
DTYPES = ("bool", "int8", "uint8", "int16", "int32", "uint32", "float16", "float32")


def rows(count=COUNT):
    rng = np.random.default_rng(0)
    return [
        {"x": rng.normal(size=(2, 3)).astype(np.float32), "label": np.int32(i % 3)}
        for i in range(count)
    ]


def assert_same(example, expected):
    assert example.keys() == expected.keys()
    for name, array in expected.items():
        found, array = np.asarray(example[name]), np.asarray(array)
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert found.tobytes() == array.tobytes()


@pytest.fixture
def folder(tmp_path):
    write_records(rows(), tmp_path / "records", shards=3, classes=3)
    return tmp_path / "records"


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    arrays=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3).flatmap(
        lambda dtypes: st.tuples(
            *(
                hnp.arrays(d, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
                for d in dtypes
            )
        )
    )
)
def test_arrays_of_every_dtype_and_shape_come_back_bitwise(tmp_path_factory, arrays):
    example = {f"name {n}": array for n, array in enumerate(arrays)}
    folder = tmp_path_factory.mktemp("records") / "out"
    write_records([example], folder)
    assert_same(Records(folder)[0], example)


@pytest.mark.parametrize("shards", [1, 2, 3, COUNT])
def test_examples_are_read_in_any_order_from_any_number_of_files(tmp_path, shards):
    files = write_records(rows(), tmp_path / "out", shards=shards)
    assert len(files) == shards + 1 and all(file.is_file() for file in files)
    records, expected = Records(tmp_path / "out"), rows()
    assert len(records) == COUNT
    for index in np.random.default_rng(1).permutation(COUNT):
        assert_same(records[int(index)], expected[index])
    for index in (-1, COUNT):
        with pytest.raises(IndexError, match=f"the index is {index}; expected 0 to 10"):
            records[index]


def test_records_are_read_in_another_process_as_here(folder):
    records = Records(folder)
    records[0]  # opens a file
    assert_same(pickle.loads(pickle.dumps(records))[5], rows()[5])  # as a worker gets it


def test_the_data_know_their_classes_and_the_parts_that_were_packed(folder, tmp_path):
    dataset = jt.Data(array_records, path=str(folder)).load()
    assert (len(dataset.train), len(dataset.eval), dataset.spec.classes) == (9, 2, 3)
    pack(dataset, tmp_path / "packed", shards=2)
    packed = jt.Data(array_records, path=str(tmp_path / "packed")).load()
    assert packed.spec == dataset.spec
    for part in ("train", "eval"):
        own, other = getattr(packed, part), getattr(dataset, part)
        assert len(own) == len(other)
        for index in range(len(own)):
            assert_same(own.one(index), other.one(index))
    with pytest.raises(DataError, match="has held-out examples in .*; expected no held_out"):
        array_records(str(tmp_path / "packed"), held_out=str(folder))


def test_batches_of_packed_arrays_are_those_of_the_arrays(tmp_path):
    examples = rows(40)
    arrays = {name: np.stack([row[name] for row in examples]) for name in examples[0]}
    dataset = jt.Data(lambda: arrays).load()
    pack(dataset, tmp_path / "packed")
    packed = jt.Data(array_records, path=str(tmp_path / "packed")).load()
    one, other = (iterate(train_batches(d.train, 8, seed=3)) for d in (dataset, packed))
    for _ in range(9):  # more than two epochs
        assert_same(next(other), next(one))


def test_transforms_stay_in_the_experiment(tmp_path):
    double = lambda example: {**example, "x": 2 * example["x"]}
    dataset = jt.Data(rows, transform=double, eval_share=0.1).load()
    pack(dataset, tmp_path / "packed")
    again = jt.Data(array_records, path=str(tmp_path / "packed"), transform=double).load()
    assert_same(again.train.one(4), dataset.train.one(4))


def test_a_stream_is_refused(tmp_path):
    def batches():
        yield {"x": np.ones((4, 2), np.float32)}

    dataset = jt.Data(lambda: (batches, rows())).load()
    with pytest.raises(DataError, match="the data are a stream, .*; expected data with len"):
        pack(dataset, tmp_path / "packed")
    assert list(tmp_path.iterdir()) == []


class Failing:
    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 3:
            raise OSError("the disk vanished")
        return {"x": np.ones(2)}


@pytest.mark.parametrize(
    "examples,shards,match",
    [
        (Failing(), 2, "example 3 cannot be read: OSError: the disk vanished"),
        ([*rows(3), {"x": 1}], 1, "example 3 has x; expected x, label"),
        ([*rows(3), {"x": "text", "label": 0}], 1, "example 3: 'x' has dtype <U4; expected numbers"),
        ([{"x": np.ones(2, "complex64")}], 1, "'x' has dtype complex64; expected one of bool"),
        ([{"__metadata__": 1}], 1, "has the name '__metadata__'; expected a printable one"),
        ([{"a\ud800": 1}], 1, "expected a printable one"),
        ([{"x": np.ones(2, jnp.bfloat16)}], 1, "'x' has dtype bfloat16; expected one of bool"),
        (rows(), 0, "shards is 0; expected 1 to 11"),
        (rows(), 12, "shards is 12; expected 1 to 11, the number of examples"),
        ([], 1, "shards is 1; expected 1 to 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_leaves_nothing(tmp_path, examples, shards, match):
    with pytest.raises(DataError, match=re.escape(match)):
        write_records(examples, tmp_path / "out", shards=shards)
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_not_replaced(folder):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(DataError, match="exists; expected a new folder"):
        write_records(rows(), folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    (folder.parent / "empty").mkdir()
    write_records(rows(), folder.parent / "empty")
    with pytest.raises(DataError, match=r"records\.json exists; expected a new folder"):
        write_records(rows(), folder / "records.json")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match="cannot be written: no folder can be made in .*file"):
        write_records(rows(), tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_name_that_is_too_long_is_one_line(tmp_path):
    with pytest.raises(DataError, match="cannot be written: File name too long"):
        write_records(rows(), tmp_path / ("x" * 300))


def test_any_number_of_files_is_read_with_few_of_them_open(tmp_path):
    write_records(rows(150), tmp_path / "out", shards=150)
    expected, before = rows(150), len(os.listdir("/proc/self/fd"))
    records = Records(tmp_path / "out")

    def read(seed):
        order = np.random.default_rng(seed).permutation(150).tolist()
        for index in order:
            assert_same(records[index], expected[index])
        return len(os.listdir("/proc/self/fd"))

    with ThreadPoolExecutor(8) as threads:
        assert max(threads.map(read, range(16))) - before < 90


def test_a_limit_of_open_files_is_not_called_damage(tmp_path):
    write_records(rows(60), tmp_path / "out", shards=60)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, limits[1])
        )
        with pytest.raises(
            DataError, match="cannot be read: Too many open files; expected a larger"
        ):
            Records(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(Records(tmp_path / "out")) == 60


def test_a_label_out_of_range_is_named_with_its_record(tmp_path):
    write_records([*rows(10), {**rows(1)[0], "label": np.int32(5)}], tmp_path / "out", shards=2)
    path = str(tmp_path / "out")
    loaded = jt.Data(array_records, path=path, held_out=path, classes=3).load()
    file = "00001-of-00002.array_record"
    with pytest.raises(DataError, match=rf"^example 10 \(.*{file}: record 5\): 'label' is 5; exp"):
        loaded.train.draw(np.array([2, 10]), np.random.default_rng(0))
    dropping = jt.Data(
        array_records, path=path, held_out=path, transform=lambda e: {"x": e["x"][: e["label"]]}
    )
    with pytest.raises(
        DataError, match=r"^example 2 \(.*record 2\): 'x' has the shape .*, as in ex"
    ):
        dropping.load().train.draw(np.array([2, 1]), np.random.default_rng(0))


def test_names_of_classes_are_kept(tmp_path):
    write_records(rows(), tmp_path / "out", classes=3, class_names=("a", "b", "c"))
    dataset = jt.Data(array_records, path=str(tmp_path / "out")).load()
    assert dataset.spec.class_names == ("a", "b", "c")
    pack(dataset, tmp_path / "packed")
    again = jt.Data(array_records, path=str(tmp_path / "packed")).load()
    assert again.spec == dataset.spec


def changed(**changes):
    return lambda index: json.dumps({**index, **changes})


def first_shard(**changes):
    return lambda index: json.dumps(
        {**index, "shards": [{**index["shards"][0], **changes}, *index["shards"][1:]]}
    )


@pytest.mark.parametrize(
    "write,match",
    [
        (lambda index: "{", "records.json cannot be read"),
        (lambda index: "[1]", "records.json is damaged"),
        (lambda index: '{"a": 1' * 5000, "records.json cannot be read"),
        (changed(version=2), "has the version 2; expected 1"),
        (changed(version="1"), "is damaged"),
        (changed(classes=1), "is damaged"),
        (changed(classes=10**30), "is damaged"),
        (changed(class_names=["a", "b"]), "is damaged"),
        (changed(class_names=[1, 2, 3]), "is damaged"),
        (changed(class_names="abc"), "is damaged"),
        (lambda index: "[" * 100_000, "records.json cannot be read"),
        (changed(shards=[]), "is damaged"),
        (changed(shards=[1]), "is damaged"),
        (first_shard(file="../secret"), "is damaged"),
        (first_shard(file="/etc/passwd"), "is damaged"),
        (first_shard(file=3), "is damaged"),
        (
            first_shard(file="other"),
            "other is missing from the folder; expected the files that records.json",
        ),
        (first_shard(file="records.json"), "has 0 records; expected 3|is no ArrayRecord file"),
        (first_shard(examples=-1), "is damaged"),
        (first_shard(examples=True), "is damaged"),
        (first_shard(examples=10**9), "has 3 records; expected 1000000000, as records.json says"),
    ],
)
def test_an_index_is_not_trusted(folder, write, match):
    index = json.loads((folder / "records.json").read_text())
    (folder / "records.json").write_text(write(index))
    with pytest.raises(DataError, match=match) as caught:
        Records(folder)
    assert str(caught.value).count("\n") == 0


def test_another_folder_is_one_line(tmp_path):
    with pytest.raises(DataError, match=r"has no records\.json; expected a folder that jmp-train"):
        Records(tmp_path)
    with pytest.raises(DataError, match="nowhere does not exist"):
        array_records(str(tmp_path / "nowhere"))


def damages(content):
    """Damaged contents of a file, and where."""
    used = len(content.rstrip(b"\0"))
    for place in {*range(0, min(used, 4000), 7), *range(0, len(content), 1999)}:
        changed = bytearray(content)
        changed[place] ^= 0x10
        yield place, bytes(changed)
    for length in (0, 10, 1000, len(content) // 2, len(content) - 1):
        yield length, content[:length]
    yield -1, os.urandom(len(content))


def test_a_damaged_file_gives_its_examples_or_is_named(tmp_path):
    file = write_records(rows(), tmp_path / "out")[0]
    content, expected, refused = file.read_bytes(), rows(), 0
    for _, damaged in damages(content):
        file.write_bytes(damaged)
        try:
            found = [Records(file.parent)[i] for i in range(COUNT)]
        except DataError as error:
            assert file.name in str(error) and str(error).count("\n") == 0
            refused += 1
            continue
        for example, one in zip(found, expected, strict=True):
            assert_same(example, one)
    assert refused > 100


EXPERIMENT = """
import jmp_train as jt
import numpy as np
from jmp_train.data import array_records
from jmp_train.models import Mlp, Model

def points(examples: int = 40):
    x = np.random.default_rng(0).normal(size=(examples, 4)).astype(np.float32)
    return [{"image": x[i], "label": int(x[i, 0] > 0)} for i in range(examples)]

NETWORK = Model(
    Mlp, inputs=lambda spec: spec.size("image"), outputs=lambda spec: spec.classes, hidden=(8,)
)
EXPERIMENT = jt.Experiment(
    NETWORK, jt.Data(DATA), steps=8, batch_size=4, checkpoint_every=4, log_every=1
)
"""


@pytest.fixture
def here(tmp_path, monkeypatch, quick_runs):
    monkeypatch.chdir(tmp_path)
    Path("experiments").mkdir()
    for name, data in {
        "points": "points, classes=2",
        "packed": 'array_records, path="out"',
    }.items():
        Path(f"experiments/{name}.py").write_text(EXPERIMENT.replace("DATA)", f"{data})"))


def losses(run):
    lines = Path(run, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.slow
def test_the_command_packs_what_an_experiment_trains_on(here, capsys):
    status, out, err = call(
        capsys, "pack", "points", "out", "--shards", "2", "--data.examples", "20"
    )
    assert (status, out) == (0, "16 training examples, 4 held out  out\n"), err
    for name in ("points", "packed"):
        options = ["--data.examples", "20"] if name == "points" else []
        status, _, err = call(capsys, "train", name, "--run-dir", name, *options)
        assert status == 0, err
    assert losses("points") == losses("packed") and len(losses("packed")) > 8
    status, _, err = call(capsys, "pack", "points", "out")
    assert (status, err) == (2, "jmp-train: out exists; expected a new folder\n")
    status, out, _ = call(capsys, "pack", "points", "--help")
    assert status == 0 and "--shards" in out and "--data.examples" in out


@pytest.mark.parametrize(
    "words,line",
    [
        ([], "expected the name of an experiment: jmp-train pack NAME"),
        (["points"], "expected a folder to write: jmp-train pack points OUT"),
        (["pionts", "new"], "unknown experiment 'pionts'; did you mean 'points'?"),
        (["points", "new", "--shards", "0"], "shards is 0; expected at least 1"),
        (["points", "new", "--data.exmaples", "9"], "--data.examples"),
        (["points", "new", "--data.examples", "1"], "points: eval_share 0.2 of 1 examples is 0"),
        (["points", ""], "the path is ''; expected the name of a file or a folder"),
    ],
)
def test_wrong_words_are_one_line_and_write_nothing(here, capsys, words, line):
    status, out, err = call(capsys, "pack", *words)
    assert (status, out) == (2, "") and line in err and err.count("\n") == 1
    assert not Path("new").exists()
