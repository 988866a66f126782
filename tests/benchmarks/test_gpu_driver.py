"""The GPU benchmark's driver: what it keeps, what it measures again, and what it stops."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import device, driver, table
from benchmarks.gpu.__main__ import _require_gpu, main

ROOT = Path(__file__).resolve().parents[2]
MISSING = ("tyro", "grain", "tensorboardX", "sklearn", "matplotlib", "orbax", "torch")
ANSWER = '{"status": "ok", "tflops": 1.5}'
CEILINGS = ["ceiling/fp32/jmp_train", "ceiling/fp16/jmp_train", "ceiling/bf16/jmp_train"]


def rows_of(out):
    return json.loads(out.read_text())["rows"]


@pytest.fixture
def drive(tmp_path, monkeypatch):
    """Runs the driver in this process over children that run the given code."""
    out = tmp_path / "gpu.json"

    def run(code, *rows, limit=60.0, words=(), toy=True):
        command = [sys.executable, "-c", code]
        monkeypatch.setattr(driver, "command_of", lambda *_, **__: command)
        monkeypatch.setattr(driver, "limit_of", lambda *_: limit)
        before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            size = ["--toy"] if toy else []
            assert main([*size, "--out", str(out), *words, "--only", *rows]) == 0
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return rows_of(out) if out.exists() else {}

    return run


def test_an_answer_is_kept_with_what_the_row_is(drive):
    row = drive(f"print('noise'); print('{ANSWER}')", CEILINGS[0])[CEILINGS[0]]
    assert (row["status"], row["reason"], row["tflops"]) == ("ok", "", 1.5)
    assert [row["workload"], row["precision"], row["program"]] == CEILINGS[0].split("/")
    assert row["measured"].startswith(time.strftime("%Y-"))


def test_a_hanging_child_is_stopped_with_what_it_started(drive, tmp_path):
    pid = tmp_path / "pid"
    code = (
        "import subprocess, time\n"
        "p = subprocess.Popen(['sleep', '600'])\n"
        f"open({str(pid)!r}, 'w').write(str(p.pid))\n"
        "time.sleep(600)"
    )
    row = drive(code, CEILINGS[0], limit=1.5)[CEILINGS[0]]
    assert (row["status"], row["reason"]) == ("timeout", "stopped after 2 s")
    assert row["seconds"] < 30
    wait_for(lambda: gone(int(pid.read_text())))  # the kernel takes a moment under load


def test_a_dead_child_failed_for_its_last_line(drive):
    rows = drive("print('words'); raise ValueError('too wide')", CEILINGS[0])
    assert rows[CEILINGS[0]]["status"] == "failed"
    assert rows[CEILINGS[0]]["reason"] == "ValueError: too wide"


def test_a_killed_child_failed_for_its_signal(drive):
    code = (
        "import os, sys; print('Allocating', file=sys.stderr, flush=True); os.kill(os.getpid(), 9)"
    )
    assert drive(code, CEILINGS[0])[CEILINGS[0]]["reason"] == "killed by SIGKILL: Allocating"


def test_a_failed_row_is_measured_again_on_retry_alone(drive):
    drive("raise SystemExit(3)", CEILINGS[0])
    assert drive(f"print('{ANSWER}')", CEILINGS[0])[CEILINGS[0]]["status"] == "failed"
    again = drive(f"print('{ANSWER}')", CEILINGS[0], words=["--retry"])
    assert again[CEILINGS[0]]["status"] == "ok"
    kept = drive("raise SystemExit(3)", CEILINGS[0], words=["--retry"])
    assert kept == again


def test_no_row_begins_once_the_time_is_over(drive):
    assert drive(f"print('{ANSWER}')", *CEILINGS, words=["--minutes", "0"]) == {}


def test_a_row_cut_off_by_the_end_stays_missing(drive):
    code = "import time; time.sleep(600)"
    assert drive(code, CEILINGS[0], words=["--minutes", "0.02"]) == {}


def start(out, *rows, code=None):
    """The driver as a process with a group of its own; its children take half a second."""
    code = code or f"import time; time.sleep(0.5); print('{ANSWER}')"
    script = (
        "import sys\nfrom benchmarks.gpu import __main__ as m, driver\n"
        f"driver.command_of = lambda *_, **__: [sys.executable, '-c', {code!r}]\n"
        f"sys.exit(m.main(['--toy', '--jobs', '1', '--out', {str(out)!r}, '--only', *{rows!r}]))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", script], env=env, start_new_session=True)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def gone(pid):
    """Whether a process ended; a zombie that nobody asks for counts."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.slow
def test_killed_run_resumes_with_the_missing_rows(tmp_path):
    out = tmp_path / "gpu.json"
    run = start(out, *CEILINGS)
    wait_for(lambda: out.exists() and rows_of(out))
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    kept = rows_of(out)
    assert 0 < len(kept) < len(CEILINGS)
    time.sleep(1.1)  # so that a row measured again would have another time
    assert start(out, *CEILINGS).wait(60) == 0
    rows = rows_of(out)
    assert rows.keys() == set(CEILINGS)
    assert {name: rows[name] for name in kept} == kept


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_and_its_child(tmp_path, number):
    out, pid = tmp_path / "gpu.json", tmp_path / "pid"
    code = (
        f"import os, pathlib, time; p = pathlib.Path({str(pid)!r})\n"
        f"first = not p.exists(); p.write_text(str(os.getpid()))\n"
        f"print('{ANSWER}') if first else time.sleep(600)"
    )
    run = start(out, *CEILINGS, code=code)
    wait_for(lambda: out.exists() and rows_of(out) and not gone(int(pid.read_text() or 1)))
    time.sleep(0.5)  # the second child, which sleeps
    run.send_signal(number)
    assert run.wait(20) == 128 + number
    assert len(rows_of(out)) == 1
    wait_for(lambda: gone(int(pid.read_text())))  # the kernel takes a moment under load


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own way is Linux's")
def test_a_child_ends_with_a_killed_driver():
    child = "from benchmarks.gpu import driver; driver.die_with_parent(); print(1, flush=True)"
    script = (
        "import subprocess, sys, time\n"
        f"c = [sys.executable, '-c', {child + '; import time; time.sleep(600)'!r}]\n"
        "p = subprocess.Popen(c, stdout=subprocess.PIPE, start_new_session=True)\n"
        "p.stdout.readline(); print(p.pid, flush=True); time.sleep(600)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    parent = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    wait_for(lambda: gone(pid), 10)


@pytest.fixture
def without_packages(tmp_path):
    """An environment whose Python finds none of the packages that a benchmark need not have."""
    lines = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in {MISSING}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""
    (tmp_path / "sitecustomize.py").write_text(lines)
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}


@pytest.mark.slow
def test_rows_are_measured_without_packages_they_do_not_need(without_packages, tmp_path):
    out = tmp_path / "gpu.json"
    needed = ["ceiling/bf16/jmp_train", "gpt_124m/bf16/jmp_train", "mlp_wide/bf16/apply_policy"]
    digits, torch = "mlp_digits/bf16/jmp_train", "gpt_124m/bf16/PyTorch"
    words = ["--toy", "--minutes", "5", "--out", str(out), "--only", digits, torch, *needed]
    command = [sys.executable, "-m", "benchmarks.gpu", *words]
    subprocess.run(command, cwd=ROOT, env=without_packages, check=True)
    rows = rows_of(out)
    assert {name: rows[name]["status"] for name in needed} == dict.fromkeys(needed, "ok")
    assert rows[digits]["reason"] == "sklearn is not installed"
    assert rows[torch]["reason"] == "torch is not installed"
    gpt = rows["gpt_124m/bf16/jmp_train"]
    assert gpt["batch"] == json.loads(out.read_text())["batches"]["gpt_124m"] > 1
    assert gpt["step_ms"]["steps"] >= 20
    assert gpt["step_ms"]["q1"] <= gpt["step_ms"]["median"] <= gpt["step_ms"]["q3"]
    tokens = gpt["batch"] * gpt["length"]
    assert gpt["per_second"] == pytest.approx(1e3 * tokens / gpt["step_ms"]["median"])
    assert gpt["loss_100"] < gpt["loss_first"]


def test_the_driver_imports_neither_jax_nor_torch():
    code = (
        "import sys, benchmarks.gpu.__main__; print({'jax', 'torch', 'numpy'} & set(sys.modules))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_each_part_is_planned_for_nine_minutes():
    for part in range(1, table.PARTS + 1):
        assert sum(row.planned_s for row in table.ROWS if row.part == part) <= 9 * 60


def test_row_names_are_unique():
    assert len({row.id for row in table.ROWS}) == len(table.ROWS)
    assert all(table.row(row.id) == row for row in table.ROWS)


def test_nvidia_smi_gives_the_device(tmp_path, monkeypatch):
    line = "NVIDIA H100 80GB HBM3, 81559, 580.65.06, 700.00, 1980, 1980, 2619, [N/A]"
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho '{line}'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = device.describe()
    assert found["kind"] == "NVIDIA H100 80GB HBM3"
    assert found["memory_bytes"] == 81559 * 2**20
    assert (found["driver"], found["power_limit_w"]) == ("580.65.06", 700.0)
    assert found["clocks_mhz"] == {
        "sm": 1980,
        "sm_max": 1980,
        "memory_clock": 2619,
        "memory_clock_max": None,
    }
    assert device.datasheet(found["kind"], "tf32") == 494.5


def test_clocks_are_sampled_while_a_row_runs(tmp_path, monkeypatch, drive):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\n"
        'case "$*" in *loop*) echo "345, 2619, 70, 30, 0"; while true; do '
        'echo "1980, 2619, 650, 50, 99"; echo "1410, 2619, [N/A], 60, 100"; sleep 0.05; done;; esac\n'
        "echo 'NVIDIA Z9, 81559, 580.65.06, 700.00, 345, 1980, 2619, 2619'\n"
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    code = f"import time; time.sleep(0.5); print('{ANSWER}')"
    state = drive(code, CEILINGS[0], toy=False)[CEILINGS[0]]["device"]
    assert state["sm_mhz_min"] == 1410 and 1410 <= state["sm_mhz"] <= 1980
    assert (state["memory_mhz"], state["power_w"]) == (2619, 650)
    assert state["samples"] >= 4
    assert "utilization" not in state


def test_a_missing_nvidia_smi_leaves_the_state_out(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with device.sampled() as state:
        pass
    assert state == {}


def test_a_batch_not_found_is_searched_again_until_used(tmp_path, monkeypatch):
    out, row = tmp_path / "gpu.json", "gpt_124m/bf16/jmp_train"
    codes = {}

    def command(name, *_, **__):
        return [sys.executable, "-c", codes["batch" if name.endswith("/batch") else "row"]]

    monkeypatch.setattr(driver, "command_of", command)

    def run(batch, answer):
        codes.update(batch=batch, row=answer)
        assert main(["--toy", "--out", str(out), "--retry", "--only", row]) == 0
        return json.loads(out.read_text())

    found = 'print(\'{"status": "ok", "batch": 7}\')'
    first = run("raise SystemExit(3)", "raise SystemExit(3)")
    assert (first["batches"], first["default_batches"]) == ({"gpt_124m": 4}, ["gpt_124m"])
    second = run(found, "raise SystemExit(3)")
    assert (second["batches"], second["default_batches"]) == ({"gpt_124m": 7}, [])
    # One that rows were measured with stays, so that all rows of a workload have the same.
    out.unlink()
    run("raise SystemExit(3)", f"print('{ANSWER}')")
    assert run(found, f"print('{ANSWER}')")["batches"] == {"gpt_124m": 4}


def test_full_sizes_need_a_gpu(capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert main([]) == 2
    assert "expected one, or --toy" in capsys.readouterr().err


def test_an_unreadable_file_is_set_aside(drive, tmp_path, capsys):
    drive(f"print('{ANSWER}')", CEILINGS[0])
    whole = (tmp_path / "gpu.json").read_text()
    (tmp_path / "gpu.json").write_text(whole[:-40])
    assert set(drive(f"print('{ANSWER}')", CEILINGS[1])) == {CEILINGS[1]}
    assert (tmp_path / "gpu.json.damaged").read_text() == whole[:-40]
    assert "cannot be read; it is now gpu.json.damaged" in capsys.readouterr().err


@pytest.mark.parametrize("other", [{"device": {"kind": "NVIDIA H100"}}, {"toy": False}])
def test_results_of_another_device_or_size_are_not_mixed(drive, tmp_path, capsys, other):
    drive(f"print('{ANSWER}')", CEILINGS[0])
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | other))
    before = file.read_text()
    with pytest.raises(SystemExit) as stop:
        drive(f"print('{ANSWER}')", CEILINGS[1])
    assert stop.value.code == 2 and file.read_text() == before
    assert "expected those of cpu: give another --out" in capsys.readouterr().err


def test_two_drivers_do_not_write_one_file(tmp_path, capsys):
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    try:
        assert main(["--toy", "--out", str(tmp_path / "gpu.json"), "--only", "ceiling/*"]) == 2
    finally:
        os.close(folder)
    assert "another run writes to" in capsys.readouterr().err


def test_a_row_that_sees_no_gpu_is_no_result_of_one(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(RuntimeError, match="ceiling/bf16/jmp_train sees no GPU; expected one"):
        _require_gpu(table.row("ceiling/bf16/jmp_train"))


def test_the_references_come_first():
    """Every figure needs the strict float32 row of its model."""
    first = [row.id for row in table.ROWS if row.part == 1]
    assert "gpt_124m/fp32/jmp_train" in first[:8]
    assert table.row("gpt_1b3/fp32/jmp_train").part <= 2
