"""Ctrl-C prints the command that resumes; --resume finds the run; eval and predict find theirs."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.command_line import call

from jmp_train.cli import resume_command
from jmp_train.reports.progress import RunProgress

ROOT = Path(__file__).resolve().parents[2]
NAME = "linear_bf16"
FEW = ("--steps", "12", "--log-every", "2", "--checkpoint-every", "4", "--eval-every", "6",
       "--optimizer.warmup-steps", "2")  # fmt: skip
LONG = ("--steps", "3000", "--log-every", "10", "--optimizer.warmup-steps", "2")


def environment(**more):
    """The environment of a child: nothing of a make around this, and this package."""
    given = ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "ARGS", "EXP", "RUN")
    env = {name: value for name, value in os.environ.items() if name not in given}
    return {**env, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **more}


def interrupted(words, folder, env, runs, signum=signal.SIGINT):
    """Start a command in a process group, send the group a signal once it trains, and return it."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    child = subprocess.Popen(words, cwd=folder, env=env, start_new_session=True, **pipes)
    deadline = time.monotonic() + 120
    while child.poll() is None and not any(f.stat().st_size for f in runs.rglob("metrics.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(child.pid, signum)
    out, err = child.communicate(timeout=120)
    return child.returncode, out, err


def command_in(err):
    (command,) = re.findall(r"^resume with:\n  (.*)$", err, re.MULTILINE)
    return command


def resumed(command, folder, env):
    """Run a printed command in a shell, as if it were pasted."""
    done = subprocess.run(
        ["sh", "-c", command], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "signum",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, marks=pytest.mark.slow),
    ],
)
def test_the_printed_command_resumes_the_run_when_pasted(tmp_path, signum):
    words = [*LONG, "--rules", "**=bf16", "--data.noise", "0.25"]
    words += ["--run-dir", "my runs/it's $HOME"] if signum == signal.SIGTERM else []
    start = [sys.executable, "-m", "jmp_train", "train", NAME, *words]
    status, _, err = interrupted(start, tmp_path, environment(), tmp_path, signum)
    assert status == 128 + signum
    stopped = int(re.findall(rf"stopped by {signum.name} at step (\d+)", err)[0])
    assert 0 < stopped < 3000
    out = resumed(command_in(err), tmp_path, environment())
    (config,) = tmp_path.rglob("config.json")
    assert f"{config.parent.relative_to(tmp_path)} is at step {stopped}\n" in out
    assert "changed:" not in out  # the options are those that were given
    assert json.loads((config.parent / "summary.json").read_text())["steps"] == 3000


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not here")
def test_the_command_that_make_train_prints_resumes_the_run(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    words = ["make", "-o", "installed", "STAMP=installed", f"PY={sys.executable}", "train"]
    words += [f"EXP={NAME}", f"ARGS={' '.join(LONG)} --rules '**=bf16'"]
    status, _, err = interrupted(words, tmp_path, environment(), tmp_path)
    assert status in (2, -signal.SIGINT) and "stopped by SIGINT at step" in err
    out = resumed(command_in(err), tmp_path, environment())
    assert " is at step " in out and "changed:" not in out
    (config,) = tmp_path.rglob("config.json")
    assert json.loads((config.parent / "summary.json").read_text())["steps"] == 3000


@pytest.mark.parametrize("where", ["PATH", "path", "module"])
def test_the_command_begins_as_the_program_was_started(tmp_path, monkeypatch, where):
    script = tmp_path / "jmp-train"
    script.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path) if where == "PATH" else "/nowhere")
    given = ["train", NAME, "--lr", "1"]
    python = [".venv/bin/python", "-X", "dev", "-m", "jmp_train"]
    typed = {"PATH": ["python3", str(script)], "path": ["python3", str(script)], "module": python}
    monkeypatch.setattr(sys, "orig_argv", [*typed[where], *given])
    first = "/x/jmp_train/__main__.py" if where == "module" else str(script)
    monkeypatch.setattr(sys, "argv", [first, *given])
    with pytest.raises(KeyboardInterrupt) as stop, \
            resume_command.tell_how_to_resume(given, ["--run-dir", "r"]):  # fmt: skip
        raise KeyboardInterrupt
    begin = {"PATH": "jmp-train", "path": str(script), "module": " ".join(python)}[where]
    assert stop.value.__notes__ == [f"resume with:\n  {begin} train {NAME} --lr 1 --run-dir r"]


@pytest.mark.parametrize(
    "word", ["a b", "$HOME", "it's", "*", "é", "", "a\nb", "\x1b[31m", "\\n", "~"]
)
@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not here")
def test_a_shell_reads_a_quoted_word_as_it_was(word):
    quoted = resume_command.quote(word)
    assert quoted.isprintable()
    done = subprocess.run(["bash", "-c", f"printf %s {quoted}"], capture_output=True, check=True)
    assert done.stdout == word.encode()


# --resume


@pytest.fixture
def here(tmp_path, monkeypatch, quick_runs):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stop_at(monkeypatch, step, action=lambda: os.kill(os.getpid(), signal.SIGINT)):
    """Does something once, when the record of a step is shown."""
    shown, waiting = RunProgress.train, [action]

    def then(self, at, values):
        shown(self, at, values)
        if at == step and waiting:
            waiting.pop()()

    monkeypatch.setattr(RunProgress, "train", then)


def config_times():
    return {path: path.stat().st_mtime_ns for path in Path("runs").rglob("config.json")}


def test_resume_continues_the_interrupted_run(capsys, here, monkeypatch):
    stop_at(monkeypatch, 6)
    assert call(capsys, "train", NAME, *FEW)[0] == 130
    (config,) = config_times()
    step = max(int(path.name) for path in (config.parent / "checkpoints").iterdir())
    status, out, _ = call(capsys, "train", NAME, "--resume", *FEW)
    assert 6 <= step < 12 and status == 0 and f"{config.parent} is at step {step}\n" in out
    assert out.splitlines()[-1] == str(config.parent)
    assert list(config_times()) == [config]


@pytest.mark.slow
def test_resume_of_a_finished_run_prints_its_results(capsys, here):
    assert call(capsys, "train", NAME, *FEW)[0] == 0
    status, out, _ = call(capsys, "train", NAME, *FEW, "--resume")
    assert status == 0 and "after 12 steps" in out and len(config_times()) == 1
    status, out, _ = call(capsys, "train", NAME, *FEW, "--resume", "--steps", "16")
    assert status == 0 and "changed: steps 12 -> 16" in out and "after 16 steps" in out


@pytest.mark.slow
def test_the_printed_command_names_the_run_in_place_of_resume(capsys, here, monkeypatch):
    assert call(capsys, "train", NAME, *FEW)[0] == 0
    (config,) = config_times()
    stop_at(monkeypatch, 14)
    status, _, err = call(capsys, "train", NAME, "--resume", *FEW, "--steps", "20")
    assert status == 130
    words = " ".join([*FEW, "--steps", "20"])
    assert command_in(err) == f"jmp-train train {NAME} {words} --run-dir {config.parent}"


def test_resume_with_other_settings_changes_nothing(capsys, here):
    assert call(capsys, "train", NAME, *FEW)[0] == 0
    before = config_times()
    status, _, err = call(capsys, "train", NAME, *FEW, "--resume", "--seed", "5")
    assert status == 2 and err.count("\n") == 1 and "seed 0 -> 5" in err
    assert config_times() == before and len(list(Path("runs", NAME).iterdir())) == 1
    status, out, err = call(capsys, "train", NAME, *FEW, "--resume", "--seed", "5", "--force")
    assert status == 0 and "changed: seed 0 -> 5" in out and len(config_times()) == 1


def test_resume_without_a_run_makes_no_folder(capsys, here):
    status, _, err = call(capsys, "train", NAME, "--resume")
    assert status == 2 and err.count("\n") == 1 and f"runs/{NAME} has no runs to resume" in err
    assert not list(here.iterdir())


def test_resume_and_a_run_directory_exclude_each_other(capsys, here):
    status, _, err = call(capsys, "train", NAME, "--resume", "--run-dir", "x")
    assert status == 2 and err.count("\n") == 1 and "expected one of the two" in err


def test_resume_of_a_run_in_progress_is_refused(capsys, here):
    for _ in range(2):
        assert call(capsys, "train", NAME, *FEW)[0] == 0
    newest = max(config_times(), key=lambda path: config_times()[path]).parent
    (newest / "lock").write_text("process 123 on node4\n")
    with (newest / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        status, _, err = call(capsys, "train", NAME, *FEW, "--resume", "--steps", "16")
    assert status == 2 and f"{newest} is in use by process 123 on node4" in err


@pytest.mark.slow
def test_a_stopped_comparison_prints_the_command_that_resumes(capsys, here, monkeypatch):
    stop_at(monkeypatch, 6)
    words = ("compare", "linear", *FEW, "--precisions", "bf16", "--seeds", "1")
    status, _, err = call(capsys, *words)
    (out,) = Path("runs/compare/linear").iterdir()
    assert status == 130
    assert command_in(err) == f"jmp-train {' '.join(words)} --out {out}"
    status, text, _ = call(capsys, *words, "--out", str(out))
    assert status == 0 and "bf16 seed 0: accuracy" in text


# eval and predict


@pytest.mark.parametrize("word", ["latest", f"runs/{NAME}"])
def test_eval_and_predict_name_the_run_that_they_choose(capsys, here, word):
    assert call(capsys, "train", NAME, *FEW)[0] == 0
    (config,) = config_times()
    status, out, err = call(capsys, "eval", word)
    assert status == 0 and out.startswith("step 12  ") and out.endswith(f"  {config.parent}\n")
    assert err == f"run {config.parent}, the newest of {word.replace('latest', 'runs')}\n"
    status, out, err = call(capsys, "predict", word)
    assert status == 2 and f"{config.parent} holds a run on digits" in err and out == ""


def test_a_wrong_word_for_a_run_gets_one_line(capsys, here):
    (Path("runs") / NAME / "a").mkdir(parents=True)
    (Path("runs") / NAME / "a" / "config.json").write_text(json.dumps({"experiment": NAME}))
    status, _, err = call(capsys, "eval", "runs/linear_bf61")
    assert status == 2 and err.count("\n") == 1 and f"did you mean 'runs/{NAME}'?" in err


def test_eval_shows_its_stages_on_a_terminal_alone(capsys, here, monkeypatch):
    assert call(capsys, "train", NAME, *FEW)[0] == 0
    (config,) = config_times()
    assert call(capsys, "eval", str(config.parent))[2] == ""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich takes the stream for a terminal
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    monkeypatch.setenv("TERM", "xterm")
    status, out, err = call(capsys, "eval", str(config.parent))
    assert status == 0 and out.count("\n") == 1
    for name in ("loading data", "restoring a checkpoint", "evaluating"):
        assert re.search(rf"{name} \.\.\. \d+\.\d s\n", err)
