"""`jmp-train new`: a first experiment that trains at once."""

import pytest
from helpers.marks import slow

from jmp_train.config.find import find_experiment
from tests.helpers.command_line import call

pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "options,library,policy",
    [
        ([], "nnx", "mixed_bfloat16"),
        slow(["--linen"], "linen", "mixed_float16"),
        slow([], "nnx", "float32"),
        slow([], "nnx", "mixed_float16"),
        slow(["--linen"], "linen", "float32"),
        slow(["--linen"], "linen", "mixed_bfloat16"),
    ],
)
def test_a_new_experiment_trains_and_evaluates(here, capsys, options, library, policy):
    status, out, err = call(capsys, "new", "flowers", *options)
    assert (status, err) == (0, "")
    assert out.splitlines()[-1] == "train it: jmp-train train flowers"
    text = (here / "experiments" / "flowers.py").read_text()
    assert f"from flax import {library}\n" in text and "{" + "name}" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert find_experiment("flowers").policy == "mixed_bfloat16"
    status, out, err = call(capsys, "train", "flowers", "--policy", policy, "--model.width", "32")
    assert (status, err) == (0, "")
    accuracy = float(out.split("flowers: accuracy ")[1].split(",")[0])
    assert accuracy > 0.85  # 30 flowers are held out; a linear classifier finds 27 or more
    status, evaluated, _ = call(capsys, "eval", "runs/flowers")
    assert status == 0 and f"accuracy {accuracy:.4f}" in evaluated


def test_help_shows_the_texts_of_the_networks_arguments(here, capsys):
    for options in ([], ["--linen"]):
        name = f"net{len(options)}"
        call(capsys, "new", name, *options)
        _, out, _ = call(capsys, "train", name, "--help")
        for text in ("--model.width INT", "Number of features in the hidden layer. (default: 64)",
                     "Two dense layers with batch statistics and dropout.",
                     "Standard deviation of Gaussian noise on the measurements."):  # fmt: skip
            assert text in out


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([], "expected a name for the experiment: jmp-train new NAME; such as flowers"),
        (["Flowers"], "the name is 'Flowers'; expected lower-case letters"),
        (["../x"], r"the name is '../x'; expected lower-case letters"),
        (["class"], "the name is 'class'; expected"),
        (["mlp_bf16"], "an experiment 'mlp_bf16' exists; expected another name"),
        (["flowers", "--lynen"], "--linen"),
    ],
)
def test_a_wrong_name_is_one_line_and_writes_nothing(here, capsys, arguments, message):
    status, out, err = call(capsys, "new", *arguments)
    assert (status, out) == (2, "") and message in err and len(err.splitlines()) == 1
    assert list(here.iterdir()) == []


def test_an_existing_file_is_never_overwritten(here, capsys):
    (here / "experiments").mkdir()
    (here / "experiments" / "helper.py").write_text("x = 1\n")
    status, _, err = call(capsys, "new", "helper")
    assert status == 2 and "helper.py exists; expected another name" in err
    assert (here / "experiments" / "helper.py").read_text() == "x = 1\n"


def test_the_task_is_no_option(here, capsys):
    call(capsys, "new", "flowers")
    status, _, err = call(capsys, "train", "flowers", "--task", "regression")
    assert status == 2 and "--task is not an option; expected the task in the experiment's" in err
