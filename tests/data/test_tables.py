"""CSV and Parquet files: the numbers that are in them, and what is refused."""

import csv
import sys

import numpy as np
import pyarrow as pa
import pytest
from helpers.command_line import call
from helpers.marks import slow
from pyarrow import parquet

import jmp_train as jt
from jmp_train.data import DataError, iterate, table, train_batches

COUNT = 40
RNG = np.random.default_rng(0)
NUMBERS = {
    "length": RNG.normal(size=COUNT),
    "width": RNG.normal(size=COUNT).astype(np.float32),
    "count": RNG.integers(-5, 5, COUNT),
    "wild": RNG.integers(0, 2, COUNT).astype(bool),
}
NAMES = np.array(["rose", "aster", "tulip"])[np.arange(COUNT) % 3]
COLUMNS = {**NUMBERS, "name": NAMES}
SORTED = ["aster", "rose", "tulip"]


def write_csv(path, columns=COLUMNS):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*(np.asarray(c).tolist() for c in columns.values()), strict=True))
    return path


def write_parquet(path, columns=COLUMNS):
    parquet.write_table(
        pa.table({k: pa.array(v) for k, v in columns.items()}), path, row_group_size=7
    )
    return path


WRITERS = {".csv": write_csv, ".parquet": write_parquet}
each_kind = pytest.mark.parametrize("ending", WRITERS)


def expected(columns=tuple(NUMBERS)):
    return np.stack([NUMBERS[name].astype(np.float32) for name in columns], 1)


def numbered(names=NAMES):
    return [SORTED.index(name) for name in names]


@each_kind
def test_numbers_become_float32_and_texts_classes_in_sorted_order(tmp_path, ending):
    file = WRITERS[ending](tmp_path / f"flowers{ending}")
    arrays = table(str(file), label="name")
    assert arrays["x"].dtype == np.float32 and arrays["label"].dtype == np.int32
    np.testing.assert_array_equal(arrays["x"], expected())
    np.testing.assert_array_equal(arrays["label"], numbered())
    assert jt.Data(table, path=str(file), label="name").load().spec.classes == 3


@each_kind
def test_columns_and_a_target_are_chosen(tmp_path, ending):
    file = WRITERS[ending](tmp_path / f"flowers{ending}")
    arrays = table(str(file), target="length", columns=("count", "width"), inputs="measures")
    assert sorted(arrays) == ["measures", "target"]
    np.testing.assert_array_equal(arrays["measures"], expected(("count", "width")))
    np.testing.assert_array_equal(arrays["target"], NUMBERS["length"].astype(np.float32))


@each_kind
def test_the_files_of_a_folder_are_read_in_order(tmp_path, ending):
    (tmp_path / "parts").mkdir()
    for part in range(3):
        rows = slice(part * 15, (part + 1) * 15)
        columns = {name: column[rows] for name, column in COLUMNS.items()}
        WRITERS[ending](tmp_path / "parts" / f"{part}{ending}", columns)
    (tmp_path / "parts" / "README").write_text("no table")
    arrays = table(str(tmp_path / "parts"), label="name")
    np.testing.assert_array_equal(arrays["x"], expected())
    np.testing.assert_array_equal(arrays["label"], numbered())


def test_held_out_rows_have_the_classes_of_the_training_rows(tmp_path):
    train = write_csv(tmp_path / "train.csv")
    held_out = {name: column[1:2] for name, column in COLUMNS.items()}  # an aster alone
    other = write_parquet(tmp_path / "test.parquet", held_out)
    _, arrays = table(str(train), held_out=str(other), label="name")
    assert arrays["label"].tolist() == [0]
    write_parquet(other, {**held_out, "name": np.array(["asters"])})
    with pytest.raises(
        DataError, match="row 1: 'name' is 'asters', no class .*; did you mean 'aster'"
    ):
        table(str(train), held_out=str(other), label="name")


def test_integer_and_dictionary_labels(tmp_path):
    ids = np.arange(COUNT) % 4
    file = write_parquet(tmp_path / "x.parquet", {**NUMBERS, "id": ids})
    np.testing.assert_array_equal(table(str(file), label="id")["label"], ids)
    columns = {"length": pa.array(NUMBERS["length"]), "name": pa.array(NAMES).dictionary_encode()}
    parquet.write_table(pa.table(columns), file)
    np.testing.assert_array_equal(table(str(file), label="name")["label"], numbered())


def refused(path, match, **options):
    with pytest.raises(ValueError, match=match) as caught:
        table(str(path), **options)
    assert str(caught.value).count("\n") == 0


@each_kind
@pytest.mark.parametrize(
    "change,options,match",
    [
        ({}, {"label": "nmae"}, r"flowers.* has no column 'nmae'; did you mean 'name'"),
        ({}, {"label": "name", "columns": ("with",)}, "no column 'with'; did you mean 'width'"),
        ({}, {}, r"'name' is string; expected numbers: choose columns \(--data.columns\)"),
        (
            {},
            {"label": "length", "columns": ("width",)},
            "'length' is double; expected integers or texts as labels",
        ),
        ({}, {"label": "name", "target": "name"}, "label and target are both 'name'"),
        ({}, {"label": "name", "inputs": "mask"}, "inputs is 'mask'; expected another name"),
        (
            {"length": [1.0, float("nan")] * 20},
            {"label": "name"},
            r"row 2(: 'length' is nan| has no 'length'); expected",
        ),
        ({"length": [1.0, 2.0, 1e39, 3.0] * 10}, {"label": "name"}, r"row 3: 'length' is 1e\+39"),
    ],
)
def test_what_a_table_does_not_have_is_one_line(tmp_path, ending, change, options, match):
    file = WRITERS[ending](tmp_path / f"flowers{ending}", {**COLUMNS, **change})
    refused(file, match, **options)


def test_labels_of_another_type_than_the_training_rows_are_refused(tmp_path):
    texts = write_csv(tmp_path / "texts.csv", {"a": [1.0, 2.0], "label": ["1", "x"]})
    numbers = write_csv(tmp_path / "numbers.csv", {"a": [1.0, 2.0], "label": ["1", "2"]})
    for one, other in ((texts, numbers), (numbers, texts)):
        refused(one, "expected (texts|integers), as in the training rows", held_out=str(other),
                label="label")  # fmt: skip
    refused(tmp_path, "texts.csv: 'label' has another type than in numbers.csv", label="label")


def test_a_column_is_used_once_and_a_label_is_there(tmp_path):
    file = write_csv(tmp_path / "x.csv", {"a": [1.0, 2.0], "label": ["cat", ""]})
    refused(file, "'a' is named twice", label="label", columns=("a", "a"))
    refused(file, "'label' is named twice", label="label", columns=("a", "label"))
    refused(file, "row 2 has no 'label'", label="label")


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "tables").mkdir()
    write_csv(tmp_path / "secret.csv")
    (tmp_path / "tables" / "1.csv").symlink_to(tmp_path / "secret.csv")
    refused(tmp_path / "tables", "is a link that leads out of", label="name")


def test_a_label_out_of_range_is_named_with_file_and_row(tmp_path):
    (tmp_path / "parts").mkdir()
    for part, labels in enumerate(([0, 1, 0, 1], [1, 0, 7])):
        columns = {"a": np.arange(len(labels)) / 2, "label": labels}
        write_parquet(tmp_path / "parts" / f"{part}.parquet", columns)
    path = str(tmp_path / "parts")
    where = r"\(.*1\.parquet: row 3\)"
    for options in ({"eval_share": 0.5}, {"held_out": path}):
        data = jt.Data(table, path=path, label="label", classes=2, **options)
        with pytest.raises(DataError, match=f"the first 7 {where}; expected 0 to 1"):
            data.load()
        with pytest.raises(DataError, match=rf"^example 6 {where}: 'label' is 7"):
            data = jt.Data(table, path=path, label="label", classes=2, in_memory=False, **options)
            part = data.load()
            for source in (part.train, part.eval):
                source.draw(np.arange(len(source)), np.random.default_rng(0))
        shifted = lambda e: {**e, "label": e["label"] - (e["label"] == 7) * 9}
        data = jt.Data(table, path=path, label="label", transform=shifted, **options)
        with pytest.raises(DataError, match=rf"^example 6 {where}: 'label' is -2"):
            part = data.load()
            for source in (part.train, part.eval):
                source.draw(np.arange(len(source)), np.random.default_rng(0))


@pytest.mark.parametrize("dtype,bad", [("int64", -1), ("uint64", 2**63 + 1), ("int64", 2**31)])
def test_an_integer_that_is_no_class_is_named_with_its_row(tmp_path, dtype, bad):
    columns = {"a": [1.0, 2.0], "label": np.array([0, bad], dtype)}
    file = write_parquet(tmp_path / "x.parquet", columns)
    refused(file, f"row 2: 'label' is {bad}; expected an integer from 0", label="label")


def test_texts_of_every_arrow_type_are_labels(tmp_path):
    for kind in (pa.string(), pa.large_string(), pa.string_view()):
        columns = {"a": pa.array([1.0, 2.0]), "label": pa.array(["b", "a"], kind)}
        parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
        arrays = table(str(tmp_path / "x.parquet"), label="label")
        assert arrays["label"].tolist() == [1, 0] and arrays.class_names == ("a", "b")


@each_kind
@pytest.mark.parametrize("name", ["", "__index_level_0__"])
def test_an_index_of_pandas_is_no_input(tmp_path, ending, name):
    columns = {name: np.arange(3), "a": [1.0, 2.0, 3.0], "label": [0, 1, 0]}
    file = WRITERS[ending](tmp_path / f"x{ending}", columns)
    refused(
        file, rf"has the column '{name}', an index of pandas; expected index=False", label="label"
    )
    assert table(str(file), label="label", columns=("a",))["x"].shape == (3, 1)


def test_missing_values_are_named_with_their_row(tmp_path):
    columns = {"length": pa.array([1.0, None]), "name": pa.array(["a", "b"])}
    parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
    refused(tmp_path / "x.parquet", "row 2 has no 'length'; expected a value", label="name")
    (tmp_path / "x.csv").write_text("length,name\n1,a\n2,b\n,a\n")
    refused(tmp_path / "x.csv", "row 3 has no 'length'; expected a value", label="name")


@pytest.mark.parametrize(
    "content,match",
    [
        ("", "cannot be read: Empty CSV file"),
        ("a,b\n1,2\n3\n", "cannot be read: CSV parse error: Expected 2 columns, got 1"),
        ("a,a\n1,2\n", "has the column 'a' twice"),
        ("a,b\n", "x.csv has no rows; expected at least one"),
        (b"caf\xe9,b\n1,2\n", "x.csv cannot be read: 'utf-8' codec can't decode byte 0xe9"),
        ("a\n1\n", "has no columns beside a; expected inputs"),
    ],
)
def test_a_damaged_csv_file_is_one_line(tmp_path, content, match):
    (tmp_path / "x.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(tmp_path / "x.csv", match, label="a")


@pytest.mark.parametrize("step", [97, slow(3)])
def test_a_damaged_parquet_file_gives_numbers_or_one_line(tmp_path, step):
    file = write_parquet(tmp_path / "x.parquet")
    content, damaged = file.read_bytes(), 0
    for length in (0, 3, 50, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        refused(file, "x.parquet cannot be read", label="name")
    for place in range(0, len(content), step):
        changed = bytearray(content)
        changed[place] ^= 0x41
        file.write_bytes(changed)
        try:
            table(str(file), label="name")
        except ValueError as error:
            assert "x.parquet" in str(error) and str(error).count("\n") == 0
            damaged += 1
    assert damaged > 0


def test_files_of_another_kind_are_one_line(tmp_path):
    refused("", "the path is ''; expected the name of a file or a folder")
    with pytest.raises(DataError, match=r"^/.*flowers.csv does not exist; its folder has no"):
        jt.Data(table, path=str(tmp_path / "flowers.csv")).load()
    refused(tmp_path / "flowers.csv", "does not exist; its folder has no .csv files")
    (tmp_path / "x.xlsx").write_text("")
    refused(tmp_path / "x.xlsx", "expected a .csv or .parquet file")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "has no .csv and no .parquet files; expected files of one kind")
    write_csv(tmp_path / "folder" / "a.csv")
    write_parquet(tmp_path / "folder" / "b.parquet")
    refused(tmp_path / "folder", "has both .csv and .parquet files")
    (tmp_path / "folder" / "b.parquet").unlink()
    write_csv(tmp_path / "folder" / "c.csv", {"length": [1.0], "name": ["rose"]})
    refused(
        tmp_path / "folder", "c.csv has the inputs length; expected length, width", label="name"
    )


def test_a_table_larger_than_the_memory_is_refused_unread(tmp_path, monkeypatch):
    file = write_parquet(tmp_path / "x.parquet")
    monkeypatch.setattr("jmp_train.sources.files.available_memory", lambda: 100)
    refused(file, "needs .* GiB of memory; expected at most the", label="name")


def test_without_pyarrow_the_package_to_install_is_named(tmp_path, monkeypatch):
    file = write_csv(tmp_path / "x.csv")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(file, r"expected PyArrow: pip install 'jmp-train\[tables\]'", label="name")


EXPERIMENT = """
import jmp_train as jt
from jmp_train.data import table
from jmp_train.models import Mlp, Model

EXPERIMENT = jt.Experiment(
    Model(
        Mlp, inputs=lambda spec: spec.size("image"), outputs=lambda spec: spec.classes, hidden=(8,)
    ),
    jt.Data(table, path="flowers.csv", label="name", inputs="image"),
    steps=4,
    batch_size=8,
)
"""


@pytest.mark.slow
def test_the_command_line_chooses_files_and_columns(tmp_path, monkeypatch, capsys, quick_runs):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "own.py").write_text(EXPERIMENT)
    write_csv(tmp_path / "flowers.csv")
    write_parquet(tmp_path / "flowers.parquet")
    status, out, err = call(capsys, "train", "own", "--run-dir", "one")
    assert status == 0 and "table: 32 training examples, 8 held out" in out, err
    words = ["--data.path", "flowers.parquet", "--data.columns", "length", "width"]
    status, _, err = call(capsys, "train", "own", "--run-dir", "two", *words)
    assert status == 0, err
    assert jt.load_run("two").spec.example["image"].shape == (2,)
    status, _, err = call(capsys, "train", "own", "--data.label", "nmae")
    assert (status, err.count("\n")) == (2, 1) and "did you mean 'name'" in err


def row_groups(tmp_path, **options):
    folder = tmp_path / "groups"
    folder.mkdir()
    for part in range(3):  # of 7 + 7 + 6 rows each, in groups of 7
        rows = slice(part * 13, 40 if part == 2 else (part + 1) * 13)
        write_parquet(folder / f"{part}.parquet", {k: v[rows] for k, v in COLUMNS.items()})
    return table(str(folder), label="name", in_memory=False, **options)


def test_row_groups_have_the_rows_of_the_arrays_in_memory(tmp_path):
    source = row_groups(tmp_path, target="count")
    memory = table(str(tmp_path / "groups"), label="name", target="count")
    assert len(source) == COUNT and source.classes == 3
    rows = np.random.default_rng(0).permutation(COUNT)
    for start in range(0, COUNT, 9):
        part = rows[start : start + 9]
        found = source.take(part)
        assert found.keys() == memory.keys()
        for name, array in found.items():
            np.testing.assert_array_equal(array, memory[name][part])
    np.testing.assert_array_equal(source[11]["x"], memory["x"][11])
    starts, together = source.blocks
    assert starts.tolist() == [0, 7, 13, 20, 26, 33, 40] and together == 4


@pytest.mark.parametrize("workers", [0, slow(2)])
def test_row_groups_are_shuffled_in_blocks_and_split_by_rows(tmp_path, workers):
    row_groups(tmp_path)
    options = {"path": str(tmp_path / "groups"), "label": "name", "in_memory": False}
    loaded = jt.Data(table, eval_share=0.25, workers=workers, **options).load()
    assert (len(loaded.train), len(loaded.eval), loaded.spec.classes) == (30, 10, 3)
    batches = iterate(train_batches(loaded.train, 10, seed=0, workers=workers))
    seen = np.concatenate([next(batches)["x"] for _ in range(3)])
    batches.close()
    held_out, _ = loaded.eval.held_out(0, 10)
    both = np.concatenate([seen, held_out["x"]])
    np.testing.assert_array_equal(np.sort(both, 0), np.sort(expected(), 0))


def test_a_parquet_file_cut_during_a_run_is_one_line(tmp_path):
    source = row_groups(tmp_path)
    file = tmp_path / "groups" / "1.parquet"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match=r"^\S*1\.parquet cannot be read: "):
        source.take(np.array([14]))


def test_a_number_that_is_not_finite_is_named_by_its_row_in_the_file(tmp_path):
    lengths = np.arange(20.0)
    lengths[16] = np.inf
    write_parquet(tmp_path / "t.parquet", {"length": lengths, "width": np.arange(20.0)})
    source = table(str(tmp_path / "t.parquet"), in_memory=False)
    source.take(np.r_[0:16, 17:20])
    with pytest.raises(DataError, match=r"t\.parquet: row 17: 'length' is inf; expected a finite"):
        source.take(np.array([3, 16]))


def test_one_bad_row_of_a_row_group_is_left_out_alone(tmp_path):
    lengths = np.arange(40.0)
    lengths[9] = np.nan
    write_parquet(tmp_path / "t.parquet", {"length": lengths, "width": np.arange(40.0)})
    options = {"path": str(tmp_path / "t.parquet"), "in_memory": False, "eval_share": 0.1}
    loaded = jt.Data(table, on_bad="skip", **options).load()
    held_out, left_out = loaded.eval.held_out(0, 4)
    batches = iterate(train_batches(loaded.train, 12, seed=0))
    rows = np.concatenate([next(batches)["x"][:, 1] for _ in range(3)])
    assert batches.bad.count + left_out.count == 1
    both = np.concatenate([rows, held_out["x"][:, 1]])
    assert set(range(40)) - set(both.astype(int).tolist()) == {9}
    batches.close()


def test_csv_files_are_not_read_in_parts(tmp_path):
    write_csv(tmp_path / "t.csv")
    with pytest.raises(
        DataError, match=r"t\.csv is read whole; expected in_memory, or a \.parquet"
    ):
        table(str(tmp_path / "t.csv"), label="name", in_memory=False)
