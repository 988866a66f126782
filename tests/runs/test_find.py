"""Runs that are found by `runs/NAME`, `latest` and --resume."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from jmp_train.config.find import find_experiment
from jmp_train.config.warmup import fit_warmup
from jmp_train.errors import UsageError
from jmp_train.runs.directory import write_config
from jmp_train.runs.find import find_resumable, find_run

NAME = "linear_bf16"


def make(folder, age, name=NAME, **fields):
    """Make a run directory whose config.json has a modification time."""
    run_dir = Path(folder)
    run_dir.mkdir(parents=True)
    experiment = dataclasses.replace(find_experiment(name), **fields)
    write_config(run_dir, name, fit_warmup(experiment)[0])
    os.utime(run_dir / "config.json", (age, age))
    return run_dir


def resumable(force=False, name=NAME, **fields):
    return find_resumable(name, dataclasses.replace(find_experiment(name), **fields), force=force)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_run_directory_is_itself():
    run_dir = make("elsewhere/run", 1)
    make(f"runs/{NAME}/new", 2)
    assert find_run("elsewhere/run") == run_dir


def test_the_folder_of_an_experiment_is_its_newest_run():
    make(f"runs/{NAME}/z", 1)
    newest = make(f"runs/{NAME}/a", 3)
    make(f"runs/{NAME}/b", 2)
    make("runs/mlp_bf16/new", 4, "mlp_bf16")
    assert find_run(f"runs/{NAME}") == find_run(f"runs/{NAME}/") == newest


def test_latest_is_the_newest_run_of_all():
    make(f"runs/{NAME}/a", 1)
    newest = make("runs/mlp_bf16/a", 2, "mlp_bf16")
    assert find_run("latest") == newest
    named = make("runs/mine", 3)
    assert find_run("latest") == named


def test_runs_of_a_comparison_are_not_the_latest():
    run_dir = make(f"runs/{NAME}/a", 1)
    make("runs/compare/linear/20260101-000000/runs/bf16-seed0", 2)
    assert find_run("latest") == run_dir


def test_runs_of_the_same_time_are_ordered_by_number():
    for number in ("", "-2", "-10", "-9"):
        make(f"runs/{NAME}/20260101-000000{number}", 1)
    assert find_run("latest").name == "20260101-000000-10"
    assert find_run(f"runs/{NAME}").name == "20260101-000000-10"
    assert resumable().name == "20260101-000000-10"


def test_a_run_directory_named_latest_is_chosen_by_that_word():
    make(f"runs/{NAME}/a", 2)
    own = make("latest", 1)
    assert find_run("latest") == own


def test_a_folder_named_latest_without_a_run_leaves_the_word():
    run_dir = make(f"runs/{NAME}/a", 2)
    Path("latest").mkdir()
    assert find_run("latest") == run_dir


def test_links_to_runs_and_to_folders_are_followed():
    run_dir = make(f"runs/{NAME}/a", 1)
    Path("latest").symlink_to(run_dir)
    Path("mine").symlink_to(run_dir.parent)
    assert find_run("latest") == Path("latest")
    assert find_run("mine") == Path("mine/a")


def test_a_link_beside_its_run_gives_the_run():
    run_dir = make(f"runs/{NAME}/a", 1)
    (run_dir.parent / "newest").symlink_to("a")
    (run_dir.parent / "broken").symlink_to("nothing")
    assert find_run(f"runs/{NAME}") == find_run("latest") == resumable() == run_dir


def test_a_damaged_newest_run_is_reported_not_passed_over():
    make(f"runs/{NAME}/a", 1)
    bad = make(f"runs/{NAME}/b", 2)
    (bad / "config.json").write_text("{")
    for word in ("latest", f"runs/{NAME}"):
        with pytest.raises(UsageError, match="b/config.json is damaged"):
            raise_for(word)


def raise_for(word):
    from jmp_train.runs.directory import read_config

    read_config(find_run(word))


@pytest.mark.parametrize(
    "word,hint",
    [
        ("runs/linear_bf15", "did you mean 'runs/linear_bf16'?"),
        ("linear_bf16", "did you mean 'runs/linear_bf16'?"),
        ("lastest", "did you mean 'latest'?"),
        ("/nowhere", "expected one of latest, runs/linear_bf16"),
    ],
)
def test_a_wrong_word_gets_the_nearest_choice(word, hint):
    make(f"runs/{NAME}/a", 1)
    with pytest.raises(UsageError) as error:
        find_run(word)
    assert f"{word} is not a run directory" in str(error.value) and hint in str(error.value)


@pytest.mark.parametrize("word", ["latest", "runs/linear_bf16", "a\0b", "x" * 300])
def test_without_a_run_the_message_says_how_to_make_one(word):
    with pytest.raises(UsageError, match="runs/ has no runs; start one with jmp-train train NAME"):
        find_run(word)


def test_resume_takes_the_newest_run_with_the_settings():
    make(f"runs/{NAME}/a", 1)
    wanted = make(f"runs/{NAME}/b", 2)
    make(f"runs/{NAME}/c", 3, seed=1)
    assert resumable() == wanted
    assert resumable(steps=50, log_every=7) == wanted  # these may change on resume
    assert resumable(seed=1).name == "c"


def test_resume_passes_over_runs_of_other_experiments():
    wanted = make(f"runs/{NAME}/a", 1)
    make(f"runs/{NAME}/b", 2, "mlp_bf16")
    assert resumable() == wanted


def test_resume_compares_the_warmup_that_fits_the_steps():
    optimizer = dataclasses.replace(find_experiment(NAME).optimizer, warmup_steps=100)
    wanted = make(f"runs/{NAME}/a", 1, steps=60, optimizer=optimizer)  # warm-up 6
    assert resumable(steps=60, optimizer=optimizer) == wanted
    assert resumable(steps=1000, optimizer=optimizer) == wanted


def test_resume_without_a_match_says_what_differs():
    make(f"runs/{NAME}/a", 1, seed=1)
    make(f"runs/{NAME}/b", 2, seed=2, batch_size=64)
    with pytest.raises(UsageError) as error:
        resumable(seed=3)
    text = str(error.value)
    assert "\n" not in text and f"no run in runs/{NAME} has these settings" in text
    assert f"runs/{NAME}/b" in text and "seed 2 -> 3" in text and "batch_size 64 -> 128" in text
    assert "--force" in text


def test_resume_with_force_takes_the_newest_run():
    make(f"runs/{NAME}/a", 1)
    newest = make(f"runs/{NAME}/b", 2, seed=2)
    assert resumable(force=True) == newest


def test_resume_passes_over_damaged_runs_and_names_them_without_a_match(caplog):
    wanted = make(f"runs/{NAME}/a", 1)
    bad = make(f"runs/{NAME}/b", 2)
    (bad / "config.json").write_text("{")
    assert resumable() == wanted
    assert f"runs/{NAME}/b/config.json is damaged" in caplog.text
    (wanted / "config.json").write_text(json.dumps({"steps": 3}))
    os.utime(wanted / "config.json", (1, 1))
    with pytest.raises(UsageError, match=f"runs/{NAME}/b/config.json is damaged"):
        resumable()


@pytest.mark.parametrize("others", [False, True])
def test_resume_without_a_run_says_how_to_start_one(others):
    if others:
        Path(f"runs/{NAME}/20260101-000000/profile").mkdir(parents=True)
    message = f"runs/{NAME} has no runs to resume; start one with jmp-train train {NAME}"
    with pytest.raises(UsageError, match=message):
        resumable()
