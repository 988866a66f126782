"""A function of data with arguments that have the names of settings of all data."""

import dataclasses
import json

import grain
import numpy as np
import pytest
from helpers.command_line import call

import jmp_train as jt
from jmp_train.cli.help import help_texts
from jmp_train.config.settings import settings_in

EXPERIMENT = '''\
import numpy as np

import jmp_train as jt
from tests.helpers.models import mlp


def series(window: int = 20, workers: int = 2, classes: int = 3):
    """Windows of a series.

    Args:
      window: length of a window.
    """
    print(f"window {window}, workers {workers}, classes {classes}")
    x = np.arange(60.0 * window, dtype=np.float32).reshape(60, window) / 60
    return {"image": x, "label": np.arange(60) % 3}


EXPERIMENT = jt.Experiment(
    mlp(hidden=()), jt.Data(series), steps=4, batch_size=8
)
'''


def recorded(**defaults):
    """Return a function of data with these arguments, and a dict of what it is called with."""
    got = {}
    arguments = ", ".join(f"{name}=defaults[{name!r}]" for name in defaults)
    scope = {"defaults": defaults, "got": got, "np": np}
    exec(  # noqa: S102
        f"def load({arguments}):\n got.update(locals())\n return {{'x': np.ones(20), 'y': np.ones(20)}}",
        scope,
    )
    return scope["load"], got


@pytest.mark.parametrize(
    "defaults",
    [
        {"window": 20, "workers": 3, "classes": 7, "eval_share": 0.4, "on_bad": "skip"},
        {"window": "hann", "workers": None, "classes": ("a", "b"), "eval_share": None, "on_bad": 3},
        {"window": -1, "workers": -1, "classes": None, "on_bad": "raise"},
        {"window": np.hanning, "workers": (1, 2), "classes": {"a": 1}},
    ],
    ids=["the same types", "other types", "beyond the range", "no settings"],
)
def test_the_functions_own_defaults_hold(defaults):
    load, got = recorded(**defaults)
    dataset = jt.Data(load).load()
    assert got == defaults
    assert dataset.workers == 0
    assert len(dataset.eval["x"]) == (8 if defaults.get("eval_share") == 0.4 else 4)
    assert dataset.spec.class_count == (7 if defaults["classes"] == 7 else None)


@pytest.mark.parametrize(
    "name,value", [("window", 5), ("workers", 1), ("classes", 4), ("eval_share", 0.25),
                   ("on_bad", "skip"), ("window", 0), ("classes", None), ("on_bad", "stop")],
)  # fmt: skip
def test_given_values_reach_the_function(name, value):
    defaults = {"window": 20, "workers": 3, "classes": 7, "eval_share": 0.4, "on_bad": "skip"}
    load, got = recorded(**defaults)
    jt.Data(load, **{name: value}).load()
    assert got == {**defaults, name: value}
    if value is not None:
        dataclasses.replace(jt.Data(load), **{name: value}).load()
        assert got == {**defaults, name: value}


def test_a_default_that_is_no_setting_can_be_set():
    load, got = recorded(window=np.hanning)
    dataclasses.replace(jt.Data(load), window=5).load()
    assert got == {"window": 5}


def test_a_required_window_must_be_given():
    with pytest.raises(
        ValueError, match=r"^Data\(required\) lacks the argument 'window'; expected a"
    ):
        jt.Data(required)


def required(window, eval_share, classes):
    return {"x": np.full(20, window), "share": np.full(20, eval_share), "n": np.full(20, classes)}


def test_required_arguments_with_two_uses_have_the_defaults_of_data():
    dataset = jt.Data(required, window=5, classes=2).load()
    assert dataset.eval["x"].tolist() == [5] * 4 and dataset.spec.class_count == 2
    assert dataset.eval["share"][0] == np.float32(0.2)


def test_values_that_data_uses_too_are_checked():
    load, _ = recorded(classes=7, eval_share=0.4)
    with pytest.raises(ValueError, match="classes is 1; expected at least 2, or None"):
        jt.Data(load, classes=1)
    with pytest.raises(ValueError, match="eval_share is 1.5; expected 0 < eval_share < 1"):
        jt.Data(load, eval_share=1.5)


def test_window_and_workers_of_data_hold_where_the_function_has_none():
    rows = [{"x": float(i)} for i in range(20)]
    stream = lambda: (grain.MapDataset.source(rows).to_iter_dataset(), rows)
    order = [float(x) for x in jt.Data(stream, window=20).load().train.first()["x"]]
    assert jt.Data(stream, workers=3).load().workers == 3 and len(order) == 1
    with pytest.raises(ValueError, match="window is 20, and the data are read at random"):
        jt.Data(lambda: rows, window=20).load()


def test_a_dataset_keeps_its_workers_where_the_function_takes_them():
    made = jt.Data(lambda: {"x": np.ones(20)}).load()
    assert jt.Data(lambda workers=2: made._replace(workers=workers)).load().workers == 2
    assert jt.Data(lambda: made._replace(workers=2), workers=3).load().workers == 3


def test_help_describes_the_functions_argument():
    def load(window: int = 20, classes: int = 3):
        """Load a series.

        Args:
          window: length of a window.
        """

    texts = help_texts(type(jt.Data(load)))
    assert texts["window"] == "Length of a window." and "classes" not in texts
    assert texts["workers"].startswith("Number of processes")


def test_an_option_reaches_the_function_and_the_run_resumes(tmp_path, monkeypatch, capsys):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "series.py").write_text(EXPERIMENT)
    monkeypatch.chdir(tmp_path)
    status, out, _ = call(capsys, "train", "series", "--help")
    text = " ".join(out.replace("│", " ").split())
    assert status == 0 and "Length of a window. (default: 20)" in text
    assert "--data.classes INT (default: 3)" in text
    status, out, err = call(capsys, "train", "series", "--run-dir", "run", "--data.window", "6")
    assert (status, err) == (0, "") and "window 6, workers 2, classes 3" in out
    saved = json.loads((tmp_path / "run" / "config.json").read_text())["data"]
    assert saved["window"] == 6 and saved["workers"] == 2 and saved["classes"] == 3
    status, out, err = call(capsys, "eval", "run")
    assert (status, err) == (0, "") and "window 6, workers 2, classes 3" in out
    again = ("train", "series", "--run-dir", "run", "--data.window", "6", "--steps", "6")
    status, out, err = call(capsys, *again)
    assert (status, err) == (0, "") and "run is at step 4" in out
    status, _, err = call(capsys, "train", "series", "--run-dir", "run")
    assert status == 2 and "data.window" in err and "6" in err and "20" in err


def test_settings_are_the_functions_defaults():
    load, _ = recorded(window=20, workers=3)
    assert settings_in(jt.Data(load)) == {
        "eval_share": 0.2, "classes": None, "workers": 3, "on_bad": "stop", "window": 20,
    }  # fmt: skip
