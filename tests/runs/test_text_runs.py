"""Runs on documents: the tokenizer that a run keeps, bits per byte, and texts that it continues."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.command_line import call
from helpers.saved_arrays import assert_same_arrays, final_arrays
from rich.console import Console

import jmp_train as jt
from jmp_train.data import DataError, TextConfig
from jmp_train.data.text import documentation
from jmp_train.errors import UsageError
from jmp_train.models import Gpt, Model
from jmp_train.results.export import export_run

EXPERIMENT = """
import os
import re
import signal

import jmp_train as jt
from jmp_train.data import TextConfig
from jmp_train.models import Gpt, Model


def stop(record, state):
    if os.path.exists("kill") and record["step"] == 9:
        os.kill(os.getpid(), signal.SIGKILL)


EXPERIMENT = jt.Experiment(
    Model(Gpt, vocabulary=lambda spec: spec.classes, width=16, depth=1, heads=2),
    TextConfig(path="texts", length=32, tokenizer="bpe", vocabulary=400),
    task="language_modelling",
    steps=16,
    batch_size=4,
    log_every=1,
    checkpoint_every=4,
    on_record=stop,
)
"""


def write_texts(folder):
    folder.mkdir(exist_ok=True)
    text = documentation()
    for number in range(12):
        part = text[number * 3000 : number * 3000 + 500 * (number % 5 + 1)]
        (folder / f"{number}.txt").write_bytes(part)


def experiment(folder, **data):
    options = {"path": str(folder), "length": 32, "tokenizer": "bpe", "vocabulary": 300}
    return jt.Experiment(
        Model(Gpt, vocabulary=lambda spec: spec.classes, width=8, depth=1, heads=2),
        TextConfig(**{**options, **data}),
        task="language_modelling",
        steps=2,
        batch_size=4,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory, quick_runs):
    """A folder with texts and a run of two steps on them, packed."""
    folder = tmp_path_factory.mktemp("trained")
    write_texts(folder / "texts")
    own = experiment(folder / "texts", packed=True)
    jt.train(own, folder / "run")
    return folder, own


@pytest.fixture
def run(trained, tmp_path):
    """Returns a copy of the run, and its experiment."""
    folder, own = trained
    shutil.copytree(folder / "run", tmp_path / "run")
    return tmp_path / "run", own


@pytest.mark.slow
def test_bits_per_byte_are_the_loss_of_all_tokens_over_the_bytes(trained):
    """From the loss in nats per token alone, and the held-out files."""
    folder, _ = trained
    summary = json.loads((folder / "run" / "summary.json").read_text())
    from tokenizers import Tokenizer

    bpe = Tokenizer.from_file(str(folder / "run" / "tokenizer.json"))
    paths = sorted((folder / "texts").iterdir(), key=lambda path: path.name)
    whole = b"".join(path.read_bytes() for path in paths)
    size = round(0.1 * len(whole))
    lengths, documents = [], []
    for path in reversed(paths):
        text = path.read_bytes()
        documents.insert(0, text[-(size - sum(lengths)) :] if sum(lengths) + len(text) > size else text)  # fmt: skip
        lengths.append(len(documents[0]))
        if sum(lengths) == size:
            break
    tokens = sum(len(bpe.encode(text.decode()).ids) + 1 for text in documents)  # and the end
    bits = summary["eval"]["loss"] * tokens / math.log(2) / size
    assert summary["eval"]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert (summary["data"]["held_out_bytes"], summary["data"]["documents"]) == (size, 12)
    assert summary["data"]["vocabulary"] == 300


@pytest.mark.slow
def test_a_run_continues_texts_with_its_own_tokenizer(run):
    folder, own = run
    loaded = jt.load_run(folder, experiment=own)
    assert loaded.tokenizer is not None
    text = loaded.generate("The naïve ", 12, temperature=1.0)
    raw = loaded.generate("The naïve ".encode(), 12, temperature=1.0)
    assert isinstance(text, str) and raw.decode("utf-8", "backslashreplace") == text and raw
    # The same as the tokens that follow the end of a document and the prompt's.
    prompt = np.array([0, *next(iter(loaded.tokenizer.encode(["The naïve ".encode()])))])
    ids = loaded.generate(prompt, 12, temperature=1.0)
    assert loaded.tokenizer.decode(ids[: [*ids, 0].index(0)]) == raw
    for prompt, error, match in [
        (b"\xff", DataError, "the text is not UTF-8 at byte 0"),
        ("", ValueError, "the prompt is empty"),
    ]:
        with pytest.raises(error, match=match):
            loaded.generate(prompt)


@pytest.mark.slow
def test_a_resumed_run_uses_its_tokenizer_and_says_what_changed(run, capsys):
    folder, own = run
    before = (folder / "tokenizer.json").read_bytes()
    console = Console(width=200)
    values = json.loads(before)
    (folder / "tokenizer.json").write_text(json.dumps(values))  # other bytes, the same tokens
    longer = jt.train(experiment(own.data.path, packed=True), folder, force=True, console=console)
    said = capsys.readouterr().out
    assert longer["steps"] == 2 and said.count("differs from the one that the run began with") == 1
    assert json.loads((folder / "tokenizer.json").read_bytes()) == values
    (folder / "tokenizer.json").write_bytes(before)
    texts = folder.parent / "other"
    write_texts(texts)
    (texts / "0.txt").write_text("Another text. " * 50)
    jt.train(experiment(texts, packed=True), folder, force=True, console=console)
    said = capsys.readouterr().out
    assert said.count("was trained on another text than this one; it is used") == 1
    assert (folder / "tokenizer.json").read_bytes() == before
    (folder / "tokenizer.json").unlink()
    jt.train(own, folder, force=True, console=console)
    assert "had no tokenizer.json; it was trained again" in capsys.readouterr().out


@pytest.mark.slow
def test_an_export_has_the_tokenizer(run, tmp_path):
    folder, own = run
    loaded = jt.load_run(folder, experiment=own)
    files = export_run(loaded, "safetensors", tmp_path / "out")
    names = ["model.safetensors", "tokenizer.json", "model.safetensors.json"]
    assert [file.name for file in files] == names
    assert files[1].read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert json.loads(files[2].read_text())["files"] == ["tokenizer.json"]
    with pytest.raises(UsageError, match="exists; expected another name, or --force"):
        export_run(loaded, "safetensors", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    "change,match",
    [
        (lambda file: file.write_text("{"), "tokenizer.json is damaged: Expecting property"),
        (lambda file: file.unlink(), "tokenizer.json cannot be read: No such file"),
        (lambda file: file.write_text(fewer(file)), r"has 299 tokens; expected 300"),
    ],
    ids=["damaged", "missing", "another"],
)
def test_a_damaged_tokenizer_is_one_line(run, tmp_path, change, match):
    folder, own = run
    change(folder / "tokenizer.json")
    loaded = jt.load_run(folder, experiment=own)
    for use in (lambda: loaded.generate("The "), lambda: export_run(loaded, "safetensors", tmp_path / "out")):  # fmt: skip
        with pytest.raises(UsageError, match=match) as caught:
            use()
        assert str(caught.value).count("\n") == 0
    assert not (tmp_path / "out").exists()


def fewer(file):
    """The tokenizer without its last pair."""
    values = json.loads(file.read_text())
    a, b = values["model"]["merges"].pop()
    del values["model"]["vocab"][a + b]
    return json.dumps(values)


@pytest.mark.slow
def test_bytes_of_documents_are_continued_up_to_their_end(tmp_path, quick_runs):
    write_texts(tmp_path / "texts")
    own = experiment(tmp_path / "texts", tokenizer="bytes", packed=True)
    jt.train(own, tmp_path / "run")
    assert not (tmp_path / "run" / "tokenizer.json").exists()
    loaded = jt.load_run(tmp_path / "run", experiment=own)
    ids = loaded.generate(np.frombuffer(b"\0The ", np.uint8), 300, temperature=1.0)
    text = loaded.generate(b"The ", 300, temperature=1.0)
    assert text == bytes(ids.astype(np.uint8)).partition(b"\0")[0]
    with pytest.raises(DataError, match="has a zero at byte 1"):
        loaded.generate(b"a\0b")


@pytest.mark.slow
@pytest.mark.parametrize("packed", ["True", "False"])
def test_a_killed_run_on_a_folder_resumes_bitwise_and_predicts(
    tmp_path, monkeypatch, capsys, quick_runs, packed
):
    monkeypatch.chdir(tmp_path)
    write_texts(Path("texts"))
    Path("experiments").mkdir()
    Path("experiments", "own.py").write_text(EXPERIMENT)
    words = ["train", "own", "--data.packed", packed, "--run-dir"]
    status, _, err = call(capsys, *words, "whole")
    assert status == 0, err
    Path("kill").touch()
    done = subprocess.run(
        [sys.executable, "-m", "jmp_train", *words, "cut"],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(jt.__file__).parents[1])},
    )
    assert done.returncode == -9, done.stderr
    Path("kill").unlink()
    kept = Path("cut", "tokenizer.json").read_bytes()
    assert kept == Path("whole", "tokenizer.json").read_bytes()
    status, out, err = call(capsys, *words, "cut")
    assert status == 0 and re.search("cut is at step [48]\n", out), err  # 8 may not be whole yet
    assert_same_arrays(final_arrays(Path("cut")), final_arrays(Path("whole")))
    summaries = [json.loads(Path(run, "summary.json").read_text()) for run in ("cut", "whole")]
    assert summaries[0]["eval"] == summaries[1]["eval"]
    assert Path("cut", "tokenizer.json").read_bytes() == kept
    status, out, err = call(capsys, "eval", "cut")
    assert status == 0 and f"{summaries[0]['eval']['bits_per_byte']:.4g}"[:4] in out, err
    status, out, err = call(capsys, "predict", "cut", "--prompt", "The with", "--length", "30", "--output", "x.txt")  # fmt: skip
    assert status == 0 and out.startswith("The with"), err
    text = Path("x.txt").read_bytes()
    assert text.startswith(b"The with") and len(text) > len(b"The with")
    status, out, err = call(capsys, "export", "cut")
    assert status == 0 and Path("cut", "export", "tokenizer.json").read_bytes() == kept
