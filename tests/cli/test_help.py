"""The help of a command with an experiment: the common options first, and unbroken sentences."""

import re
import subprocess
import sys

import pytest

from jmp_train.cli.main import main

FIRST = [
    "--policy", "--steps", "--batch-size", "--lr", "--seed", "--run-dir", "--log-every",
    "--eval-every", "--checkpoint-every", "--micro-batches",
]  # fmt: skip
COMMANDS = [
    ("train", "mlp_bf16"),
    ("train", "gpt_fp16"),
    ("compare", "mlp"),
    ("profile", "mlp_bf16"),
]


@pytest.fixture
def lines_of(capsys, monkeypatch):
    """Returns the lines of a command's help at 80 columns, without the frame."""
    monkeypatch.setenv("COLUMNS", "80")

    def lines(command, name):
        with pytest.raises(SystemExit) as stop:
            main([command, name, "--help"])
        assert not stop.value.code
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= 80
        return [line.replace("│", " ").rstrip() for line in out.splitlines()]

    return lines


def options(lines):
    return [line.split()[0] for line in lines if re.match(r" *--\w", line)]


def test_the_help_of_train_shows_the_ten_common_options_first(lines_of):
    shown = options(lines_of("train", "mlp_bf16"))
    assert shown[:10] == FIRST
    # The others follow, each once, and the groups come last.
    assert len(set(shown)) == len(shown)
    assert {"--rules", "--nonfinite", "--force", "--optimizer.learning-rate"} <= set(shown[10:])
    grouped = ["." in option for option in shown]
    assert grouped == sorted(grouped)


@pytest.mark.parametrize("command", ["compare", "profile"])
def test_other_commands_show_the_common_options_first_too(lines_of, command):
    shown = options(lines_of(command, "mlp" if command == "compare" else "mlp_bf16"))
    own = [option for option in FIRST if command == "profile" or option != "--run-dir"]
    assert shown[: len(own)] == own


@pytest.mark.parametrize("command,name", COMMANDS)
def test_a_line_of_help_ends_only_where_the_next_word_would_not_fit(lines_of, command, name):
    lines = lines_of(command, name)
    text = [i for i, line in enumerate(lines) if line.startswith(" " * 8)]
    wrapped = [(lines[i], lines[i + 1].split()[0]) for i in text if i + 1 in text]
    assert len(wrapped) > 20
    # The frame takes two columns at the right, where the terminal has one.
    short = [pair for pair in wrapped if len(" ".join(pair)) <= 78]
    assert not short


def test_the_default_of_lr_is_the_learning_rate_of_the_experiment(lines_of):
    text = " ".join(" ".join(lines_of("train", "mlp_bf16")).split())
    assert (
        "--lr FLOAT Peak learning rate; short for --optimizer.learning-rate. (default: 0.002)"
        in text
    )


def test_the_help_names_what_a_command_does(lines_of):
    for command, name in COMMANDS:
        assert lines_of(command, name)[2].startswith(("Train ", "Trace "))


@pytest.mark.parametrize(
    "command,option", [("predict", "--output"), ("export", "--dtype"), ("new", "--linen")]
)
def test_help_of_a_command_without_its_argument_shows_its_options(capsys, command, option):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    out = capsys.readouterr().out
    assert not stop.value.code and out.startswith(f"usage: jmp-train {command} ") and option in out


@pytest.mark.slow
def test_a_closed_pipe_ends_without_a_traceback():
    command = f"{sys.executable} -m jmp_train predict --help | true"
    done = subprocess.run(command, shell=True, check=False, capture_output=True, text=True)
    assert done.stderr == ""
