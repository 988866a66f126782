"""`predict`: classes, numbers and texts for files, folders and prompts."""

import csv
import io
import json
import re
import sys

import numpy as np
import pytest
from helpers.command_line import call
from helpers.trained_runs import (
    LABELS,
    POINTS,
    LinenNet,
    experiment,
    tiny_mlp,
    write_experiment_file,
)

import jmp_train as jt
from jmp_train.data import DigitsConfig


@pytest.fixture(scope="module")
def trained(tmp_path_factory, quick_runs):
    """A folder with an experiment and a run of it, and runs of digits and of texts."""
    folder = tmp_path_factory.mktemp("trained")
    write_experiment_file(folder, "points")
    write_experiment_file(folder, "gone")
    digits = "from jmp_train.config import Experiment\nfrom jmp_train.data import DigitsConfig\n"
    digits += "from helpers.trained_runs import tiny_mlp\n"
    digits += "EXPERIMENT = Experiment(tiny_mlp(), DigitsConfig(), steps=2)\n"
    (folder / "experiments" / "tiny_digits.py").write_text(digits)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        jt.train(experiment(LinenNet), "runs/points/1", name="points")
        jt.train(experiment(LinenNet), "runs/gone", name="gone")
        (folder / "experiments" / "gone.py").unlink()
        small = jt.Experiment(tiny_mlp(), DigitsConfig(), steps=2)
        jt.train(small, "runs/digits", name="tiny_digits")
        language = [
            "--model.width",
            "16",
            "--model.depth",
            "1",
            "--model.heads",
            "2",
            "--steps",
            "2",
        ]
        language += ["--data.length", "16", "--batch-size", "4", "--run-dir", "runs/text"]
        from jmp_train.cli.main import main

        assert main(["train", "gpt_fp32", *language]) == 0
    return folder


@pytest.fixture
def here(trained, tmp_path, monkeypatch):
    """The current folder has the experiments and runs, and files to predict on."""
    for name in ("experiments", "runs"):
        (tmp_path / name).symlink_to(trained / name)
    np.savez(tmp_path / "points.npz", x=POINTS, label=LABELS)
    np.savez(tmp_path / "other.npz", measurements=POINTS.astype(np.float64))
    np.save(tmp_path / "points.npy", POINTS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def expected(here):
    return jt.load_run("runs/points/1").predict(POINTS)


def rows_of(out):
    return [line.split() for line in out.splitlines()[1:11]]


@pytest.mark.parametrize("file", ["points.npz", "other.npz", "points.npy"])
@pytest.mark.parametrize("run", ["runs/points", "runs/points/1"])
def test_classes_with_their_probabilities_are_printed(capsys, here, expected, run, file):
    status, out, _ = call(capsys, "predict", run, file)
    assert status == 0
    best = expected["probability"].max(-1)
    shown = [[str(i), str(expected["class"][i]), f"{best[i]:.4f}"] for i in range(10)]
    assert out.splitlines()[0].split() == ["example", "class", "probability"]
    assert rows_of(out) == shown
    assert re.fullmatch(r"120 examples, step \d+  runs/points/1", out.splitlines()[11])


def read(path):
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return file["class"].tolist(), file["probability"].tolist()
    if path.suffix == ".csv":
        rows = list(csv.DictReader(path.open()))
        both = [[float(r["probability.0"]), float(r["probability.1"])] for r in rows]
        return [int(r["class"]) for r in rows], both
    text = path.read_text()
    rows = json.loads(text) if path.suffix == ".json" else list(map(json.loads, text.splitlines()))
    return [r["class"] for r in rows], [r["probability"] for r in rows]


@pytest.mark.parametrize("ending", ["npz", "csv", "json", "jsonl"])
def test_every_prediction_is_written_exactly(capsys, here, expected, ending):
    output = here / f"out.{ending}"
    words = ["predict", "runs/points", "points.npz", "--output", str(output)]
    assert call(capsys, *words)[0] == 0
    classes, probability = read(output)
    assert classes == expected["class"].tolist()
    np.testing.assert_array_equal(np.float32(probability), expected["probability"])
    before = output.read_bytes()
    status, out, err = call(capsys, *words)
    assert status == 2 and "exists; expected another name, or --force" in err and not out
    assert output.read_bytes() == before
    assert call(capsys, *words, "--force")[0] == 0
    assert sorted(p.name for p in here.glob("out*")) == [output.name]


def test_batch_size_policy_and_checkpoint_are_options(capsys, here):
    words = ["--batch-size", "7", "--policy", "bf16", "--checkpoint", "8"]
    status, out, _ = call(capsys, "predict", *["runs/points", "points.npz"], *words)
    assert status == 0 and "step 8 " in out
    half = jt.load_run("runs/points/1", 8, policy="bf16").predict(POINTS[:10])
    best = half["probability"].max(-1)
    np.testing.assert_allclose([float(r[2]) for r in rows_of(out)], best, atol=2e-2)


def test_a_folder_of_arrays_names_its_files(capsys, here, expected):
    (here / "folder").mkdir()
    for i in (2, 0, 1):
        np.save(here / "folder" / f"p{i}.npy", POINTS[i])
    (here / "folder" / "notes.txt").write_text("no example")
    status, out, _ = call(capsys, "predict", "runs/points", "folder", "--output", "o.csv")
    assert status == 0
    assert [r[:2] for r in rows_of(out)[:3]] == [
        [f"p{i}.npy", str(expected["class"][i])] for i in range(3)
    ]
    assert (here / "o.csv").read_text().splitlines()[1].startswith("p0.npy,")


def test_images_are_read_as_numbers_from_zero_to_one(capsys, here):
    from PIL import Image

    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8)
    (here / "images").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(here / "images" / f"{i}.png")
    np.savez(here / "images.npz", image=images)
    expected = jt.load_run("runs/digits").predict(images / np.float32(255))
    for given in ("images", "images.npz"):
        status, out, err = call(capsys, "predict", "runs/digits", given)
        assert status == 0 and "uint8 was divided by 255" in err
        assert [r[1] for r in rows_of(out)[:3]] == [str(c) for c in expected["class"]]


@pytest.mark.parametrize(
    "words,message",
    [
        (["runs/points"], "whose model does not continue texts; expected INPUT: .* with x"),
        (["runs/points", "points.nzp"], "points.nzp|does not continue texts"),
        (["runs/points", "pionts.npz"], "did you mean 'points.npz'"),
        (["runs/points", "wrong.npz"], r"'x' has shape \(120, 5\); expected \(examples, 6\)"),
        (["runs/points", "named.npz"], "has no array 'x'; expected one of a, b"),
        (["runs/points", "int.npy"], "'x' has dtype int64; expected float32, as in training"),
        (["runs/points", "objects.npy"], "contains Python objects, which are not read"),
        (["runs/points", "torn.npy"], "'torn' is damaged"),
        (["runs/points", "empty"], "has no .npy files and no images"),
        (["runs/points", "points.npz", "--output", "out.xls"], "expected one of .npz, .csv"),
        (["runs/points", "points.npz", "--output", "no/file/out.csv"], None),
        (["runs/points", "points.npz", "--output", "points.npy/out.csv"], "cannot be written"),
        (["runs/points", "points.npz", "--policy", "float17"], "float17"),
        (["runs/points", "points.npz", "--checkpoint", "9"], "no checkpoint '9'; expected best"),
        (["runs/points", "points.npz", "--batch-size", "0"], "batch_size is 0"),
        (["runs/points", "points.npz", "--prompt", "x"], "expected one of the two"),
        (["runs/gone", "points.npz"], "holds a run of the unknown experiment 'gone'"),
        (["runs/nowhere", "points.npz"], "is not a run directory"),
        (["runs/text", "missing.md"], "missing.md does not exist"),
        (["runs/text", "--output", "out.csv"], "expected '.txt'"),
    ],
)
def test_a_wrong_call_is_one_line(capsys, here, words, message):
    np.savez(here / "wrong.npz", x=POINTS[:, :5])
    np.savez(here / "named.npz", a=POINTS, b=POINTS)
    np.save(here / "int.npy", np.zeros((3, 6), np.int64))
    np.save(here / "objects.npy", np.array([{}, 3], object))
    (here / "torn.npy").write_bytes((here / "points.npy").read_bytes()[:-9])
    (here / "empty").mkdir()
    status, _, err = call(capsys, "predict", *words)
    if message is None:  # a missing folder is made
        assert status == 0 and (here / words[-1]).exists()
        return
    assert status == 2 and err.count("\n") <= 2 and re.search(message, err.splitlines()[-1]), err
    assert not list(here.rglob("*.partial"))


@pytest.mark.parametrize("full", [28, 30])  # no space, read-only
def test_a_full_disk_leaves_no_half_file(capsys, here, monkeypatch, full):
    def fsync(file):
        raise OSError(full, "No space left on device")

    monkeypatch.setattr("jmp_train.results.outputs.os.fsync", fsync)
    status, _, err = call(capsys, "predict", "runs/points", "points.npz", "--output", "out.csv")
    assert status == 2 and "out.csv cannot be written: No space" in err.splitlines()[-1]
    assert not list(here.glob("out*"))


@pytest.mark.slow
def test_a_text_is_continued_from_a_prompt_a_file_or_the_input(capsys, here, monkeypatch):
    (here / "start.md").write_bytes(b"The with")
    options = ["--length", "6", "--temperature", "0"]
    texts = []
    stdin = io.TextIOWrapper(io.BytesIO(b"The with"))
    monkeypatch.setattr(sys, "stdin", stdin)
    for words in (["--prompt", "The with"], ["start.md"], ["-"]):
        status, out, err = call(capsys, "predict", "runs/text", *words, *options)
        assert status == 0, err
        texts.append(out)
    assert texts[0] == texts[1] == texts[2] and texts[0].startswith("The with")
    call(capsys, "predict", "runs/text", "start.md", *options, "--output", "out.txt")
    added = jt.load_run("runs/text").generate(b"The with", 6, temperature=0.0)
    assert (here / "out.txt").read_bytes() == b"The with" + added
    status, out, _ = call(capsys, "predict", "runs/text", *options)
    assert status == 0 and out.startswith("The ")


def test_help_shows_the_input_and_the_endings(capsys, monkeypatch, here):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = call(capsys, "predict", "runs/points", "--help")
    text = " ".join(out.replace("│", " ").split())
    assert status == 0 and max(map(len, out.splitlines())) <= 80
    for words in ("INPUT", "--output", ".npz, .csv, .json or .jsonl", "--checkpoint", "--policy"):
        assert words in text
