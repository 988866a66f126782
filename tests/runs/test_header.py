"""The header of a run and its stages, before the first step."""

import dataclasses
import io
import re

import jax
import pytest
from rich.console import Console

from jmp_train.config.find import find_experiment
from jmp_train.runs.train import train

pytestmark = pytest.mark.usefixtures("quick_runs")


def small(name, **fields):
    experiment = find_experiment(name)
    optimizer = dataclasses.replace(experiment.optimizer, warmup_steps=0)
    return dataclasses.replace(experiment, steps=4, optimizer=optimizer, **fields)


def printed(tmp_path, name, **fields):
    out = io.StringIO()
    train(small(name, **fields), tmp_path / "run", name=name, console=Console(file=out, width=40))
    return out.getvalue()


def test_header_and_stages_come_before_the_first_step(tmp_path):
    head, step, _ = printed(tmp_path, "linear_bf16").partition("step 4/4")
    assert step
    stages = re.findall(r"^([a-z ]+) \.\.\. \d+\.\d s$", head, re.MULTILINE)
    assert stages == ["loading data", "initialising", "compiling"]
    rows = dict(re.findall(r"^(\w+)  +(.*)$", head, re.MULTILINE))
    assert rows == {
        "experiment": "linear_bf16",
        "device": jax.devices()[0].device_kind,
        "precision": "mixed_bfloat16",
        "parameters": "650 in float32, 2.539 KiB",  # 64 x 10 + 10, of 4 bytes
        "data": "digits: 1,438 training examples, 359 held out",  # scikit-learn's 1,797
        "run": str(tmp_path / "run"),
    }


def test_header_shows_rules_in_place_of_the_policy(tmp_path):
    out = printed(tmp_path, "linear_bf16", rules=("layers/0=float32", "**=mixed_bfloat16"))
    assert "precision   by rules, the first match:\n            layers/0=float32\n" in out


def test_a_resumed_run_says_that_it_restores(tmp_path):
    printed(tmp_path, "linear_bf16")
    again = printed(tmp_path, "linear_bf16")
    assert re.search(r"restoring a checkpoint \.\.\. \d+\.\d s\n.* is at step 4\n$", again)


def test_without_a_console_training_prints_nothing(tmp_path, capfd):
    assert train(small("linear_bf16"), tmp_path / "run", name="linear_bf16")["steps"] == 4
    assert capfd.readouterr() == ("", "")
