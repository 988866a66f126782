"""Wrong arguments and files: one line, status 2, and nothing is touched."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from bad_arguments import CASES
from bad_files import CONFIGS, EXPERIMENTS, make_data
from helpers.command_line import call

from jmp_train.cli.main import main

ROOT = Path(__file__).resolve().parents[2]


def listing(folder):
    """Every path below a folder with its file's identity, size and time of change."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            if name == "lock":
                continue  # written by whoever opens a run, even in vain
            state = os.lstat(path)
            own = (state.st_ino, state.st_size, state.st_mtime_ns) if name in files else ()
            found[os.path.relpath(path, folder)] = own
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with files of every fault, and one run without."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "experiments").mkdir()
    for name, text in EXPERIMENTS.items():
        (folder / "experiments" / f"{name}.py").write_text(text)
    (folder / "experiments" / "a_folder.py").mkdir()
    (folder / "experiments" / "dangling.py").symlink_to("nowhere.py")
    make_data(folder)
    for name, text in CONFIGS.items():
        (folder / "configs" / name).mkdir(parents=True)
        (folder / "configs" / name / "config.json").write_bytes(
            text.encode("utf-8", errors="surrogateescape")
        )
    (folder / "file").write_text("mine")
    (folder / "full").mkdir()
    (folder / "full" / "thesis.txt").write_text("mine")
    files = listing(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "dont_write_bytecode", True)
        assert main(["train", "own", "--run-dir", "done"]) == 0
    new = {path: digest for path, digest in listing(folder).items() if path not in files}
    assert listing(folder) == files | new  # what there was is as it was
    assert all(path.split("/")[0] == "done" for path in new)
    return folder


def check(status, out, err, line):
    assert status == 2, (status, err)
    assert err.startswith("jmp-train: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert err[:-1].isprintable() and "Traceback" not in out + err
    assert re.search(line, err), err


def _cases():
    """Every case; a third of them is quick."""
    for index, (words, line) in enumerate(CASES):
        marks = (pytest.mark.slow,) if index % 3 else ()
        yield pytest.param(words, line, id=" ".join(words)[:60], marks=marks)


@pytest.mark.parametrize("words,line", list(_cases()))
def test_bad_input_gets_one_line_and_status_2_and_changes_nothing(
    world, capsys, monkeypatch, words, line
):
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # experiments/ is the user's
    before = listing(world)
    check(*call(capsys, *words), line)
    assert listing(world) == before


def test_separate_process_prints_the_same_error(world):
    before = listing(world)
    done = subprocess.run(
        [sys.executable, "-m", "jmp_train", "train", "own", "--data.path", "flipped.npz"],
        cwd=world,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    check(done.returncode, done.stdout, done.stderr, "'x' is damaged: Bad CRC-32")
    assert listing(world) == before
