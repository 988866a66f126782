"""What the command line answers to a newcomer: hints, short forms, lists of what there is."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from helpers.command_line import call as run

ROOT = Path(__file__).resolve().parents[2]
SHORT = ("--steps", "2", "--model.hidden", "4", "--compilation-cache", "False")


def refused(capsys, *words):
    status, _, err = run(capsys, *words)
    assert status == 2 and err.startswith("jmp-train: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    "words,hint",
    [
        (["--optimizer", "adam"], "--optimizer.name adam"),
        (["--optimizer=adam"], "--optimizer.name adam"),
        (["--optimizer", "adamw2"], "--optimizer.name"),
        (["--optimizer", "0.1"], "--optimizer.learning-rate 0.1"),
        (["--optimizer"], "--optimizer.name"),
        (["--optimizer", "--steps", "3"], "--optimizer.name"),
        (["--loss-scale", "dynamic"], "--loss-scale.kind dynamic"),
        (["--loss_scale", "1024"], "--loss-scale.initial 1024"),
        (["--model", "64"], "--model.hidden 64"),
        (["--steps", "3", "--data", "0.3"], "--data.eval-share 0.3"),
    ],
)
def test_a_group_of_fields_suggests_the_field_for_the_value(capsys, words, hint):
    assert refused(capsys, "train", "mlp_bf16", *words).endswith(f"; did you mean {hint}?\n")


def test_compare_refuses_a_group_too(capsys):
    hint = "did you mean --optimizer.name adam?"
    assert hint in refused(capsys, "compare", "mlp", "--optimizer", "adam")


@pytest.mark.parametrize("words", [["--lr", "0.25"], ["--lr=0.25"]])
@pytest.mark.slow
def test_lr_sets_the_learning_rate(capsys, tmp_path, words):
    run_dir = tmp_path / "run"
    status, _, err = run(capsys, "train", "mlp_bf16", *SHORT, *words, "--run-dir", str(run_dir))
    assert status == 0, err
    config = json.loads((run_dir / "config.json").read_text())
    assert config["optimizer"]["learning_rate"] == 0.25


def test_lr_is_in_the_help_and_in_errors_by_its_full_name(capsys):
    assert "--lr" in run(capsys, "train", "mlp_bf16", "--help")[1]
    line = refused(capsys, "train", "mlp_bf16", "--lr", "fast")
    assert "--optimizer.learning-rate: expected a number, got 'fast'" in line
    assert "expected a value" in refused(capsys, "train", "mlp_bf16", "--lr")


@pytest.mark.parametrize("word", ["--version", "-V", "version"])
def test_version_prints_the_versions_of_the_program_and_of_jax(capsys, word):
    status, out, _ = run(capsys, word)
    assert status == 0
    assert out == f"jmp-train {importlib.metadata.version('jmp-train')} (jax {jax.__version__})\n"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Five runs, the first the oldest, one of a comparison, beside folders that hold none."""
    monkeypatch.chdir(tmp_path)
    folders = [
        "mlp_bf16/20260101-000000",
        "compare/linear/20260102-000000/runs/fp32-seed0",
        "gpt_fp16/20260103-000000",
        "linear_fp32/20260104-000000",
        "gpt_fp32/20260105-000000",
    ]
    names = ["mlp_bf16", "linear_fp32", "gpt_fp16", "linear_fp32", "gpt_fp32"]
    for age, (folder, name) in enumerate(zip(folders, names, strict=True)):
        config = Path("runs", folder, "config.json")
        config.parent.mkdir(parents=True)
        config.write_text(json.dumps({"experiment": name}))
        os.utime(config, (age, age))
    Path("runs/mlp_bf16/empty").mkdir()
    Path("runs/mlp_bf16/broken").mkdir()
    Path("runs/mlp_bf16/broken/config.json").write_text("{")


@pytest.mark.parametrize("command", ["eval", "predict"])
@pytest.mark.parametrize("words", [[], ["--seed", "3"]])
def test_no_directory_lists_the_newest_runs(capsys, runs, command, words):
    line = refused(capsys, command, *words)
    assert f"expected the directory of a run: jmp-train {command} RUN_DIR" in line
    assert line.endswith(
        "; the newest runs are runs/gpt_fp32/20260105-000000 (gpt_fp32), "
        "runs/linear_fp32/20260104-000000 (linear_fp32), "
        "runs/gpt_fp16/20260103-000000 (gpt_fp16)\n"
    )


def test_without_any_run_eval_says_how_to_make_one(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "runs/ has no runs; start one with jmp-train train NAME" in refused(capsys, "eval")


def test_the_usage_fits_80_columns(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0 and max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("words", [["train", "--help"], ["train", "-h"]])
def test_train_help_leads_to_the_fields(capsys, words):
    status, out, _ = run(capsys, *words)
    assert status == 0 and out.startswith("usage: jmp-train train NAME")
    (example,) = re.findall(r"^  jmp-train (train \w+ --help)$", out, re.MULTILINE)
    status, fields, _ = run(capsys, *example.split())
    assert status == 0 and "--optimizer.learning-rate" in fields
    assert "mlp_fp16" in out and max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    "name,size,examples",
    [("mlp_bf16", "20000", 1438), ("mlp_bf16", "1439", 1438), ("gpt_bf16", "99999", None)],
)
def test_a_batch_above_the_examples_is_refused(capsys, tmp_path, monkeypatch, name, size, examples):
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, "train", name, "--batch-size", size)
    count = examples or int(re.findall(r"at most (\d+)", line)[0])
    assert f"batch_size is {size}; expected --batch-size of at most {count}" in line
    assert not list(tmp_path.iterdir())


def test_a_text_has_as_many_examples_as_windows_side_by_side(capsys, tmp_path):
    (tmp_path / "text").write_bytes(b"spam and eggs. " * 100)  # 1,350 bytes to train on
    words = ("--data.path", str(tmp_path / "text"), "--data.length", "16", "--batch-size", "84")
    # 84 windows of 16 bytes would need 1,344 bytes and the one after them: they fit; the 85th not.
    line = refused(capsys, "train", "gpt_bf16", *words[:-1], "85")
    assert "at most 83" in line or "at most 84" in line


def test_list_keeps_a_broken_experiment_out_of_the_table(capsys, tmp_path, monkeypatch):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "bad.py").write_text("EXPERIMENT = 1 / 0\n")
    monkeypatch.chdir(tmp_path)
    whole = run(capsys, "list")[1]
    (tmp_path / "experiments" / "bad.py").unlink()
    table = run(capsys, "list")[1]
    assert whole.startswith(table)  # a broken one moves no column
    (line,) = whole.removeprefix(table).splitlines()
    assert line.startswith("bad: ") and "cannot be run: ZeroDivisionError" in line


def devices_said(count, tmp_path):
    """What a process with so many CPU devices says of them."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "jmp_train",
            "train",
            "linear_fp32",
            "--steps",
            "2",
            "--run-dir",
            "run",
        ],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    return [line for line in done.stdout.splitlines() if line.startswith("device ")]


@pytest.mark.slow
def test_train_says_how_several_devices_share_the_work(tmp_path):
    (line,) = devices_said(4, tmp_path)
    assert line.split() == ["device", "4", "x", "cpu,", "mesh", "data=4"]


@pytest.mark.slow
def test_nothing_is_said_of_a_single_device(capsys, tmp_path):
    assert jax.device_count() == 1
    words = ("train", "mlp_bf16", *SHORT, "--run-dir", str(tmp_path / "run"))
    status, out, _ = run(capsys, *words)
    assert status == 0 and "devices" not in out
