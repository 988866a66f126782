"""The commands of the Makefile: what make would run, without running it."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not here")


def make(*words):
    given = ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "ARGS", "EXP", "RUN")  # of a make around this
    env = {name: value for name, value in os.environ.items() if name not in given}
    done = subprocess.run(
        ["make", *words], cwd=ROOT, capture_output=True, text=True, check=True, env=env
    )
    return done.stdout


def recipe(target, *words):
    """The command of a target, run by the shell with a Python that prints its words."""
    # With -o the stamp counts as up to date, so that nothing is installed.
    shown = ("-s", "-o", "installed", "STAMP=installed", r"PY=printf '<%s>'", *words)
    return re.findall("<([^>]*)>", make(target, *shown))[2:]


@pytest.mark.parametrize(
    "target,words,expected",
    [
        ("eval", ["RUN=runs/a b"], ["eval", "runs/a b"]),
        ("eval", [], ["eval"]),
        ("predict", ["RUN=r", "ARGS=--prompt 'The with' --length 3"],
         ["predict", "r", "--prompt", "The with", "--length", "3"]),
        ("predict", ["RUN=$$(touch nowhere)"], ["predict", "$(touch nowhere)"]),
        ("train", ["EXP=mlp_bf16"], ["train", "mlp_bf16"]),
    ],
)  # fmt: skip
def test_a_target_passes_its_words_on(target, words, expected):
    assert recipe(target, *words) == expected


def test_gpu_tests_begin_with_what_only_a_gpu_can_show():
    lines = make("-n", "-o", "installed", "STAMP=installed", "test-gpu").splitlines()
    chosen = [re.search(r"pytest -m ('[^']*'|\S+)", line) for line in lines]
    assert [match[1] for match in chosen if match] == [
        "gpu_first",
        "'not slow and not gpu_first and not compiled'",
    ]


def test_help_lists_every_command_of_the_program():
    listed = set(re.findall(r"^  (\S+) ", make("help"), re.MULTILINE))
    assert {"train", "eval", "predict", "compare", "profile", "test"} <= listed


def test_every_variable_is_set_once():
    names = re.findall(r"^(\w+) *[:?]?=", MAKEFILE, re.MULTILINE)
    assert len(names) == len(set(names))
