"""Runs of several real processes, with the collectives of the CPU; the oracle is a run of one process."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers.saved_arrays import assert_same_arrays, final_arrays

from jmp_train.cli.main import main
from jmp_train.runs.processes import Address, launched

pytestmark = pytest.mark.slow

OPTIONS = ["--steps", "40", "--log-every", "10", "--eval-every", "20", "--checkpoint-every", "10",
           "--mesh", "data=2,fsdp=2", "--checkpoint-wait", "True"]  # fmt: skip


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def start(run_dir, count, *options, name="mlp_fp16", devices=4):
    """Start a run of so many processes, which share the devices."""
    port = free_port()
    flags = f"--xla_force_host_platform_device_count={devices // count}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "NPROC": "16"}
    words = [sys.executable, "-m", "jmp_train", "train", name, *OPTIONS, *options]
    words += ["--run-dir", str(run_dir), "--heartbeat", "10"]
    together = ["--coordinator", f"localhost:{port}", "--processes", str(count), "--process"]
    return [
        subprocess.Popen(
            [*words, *([*together, str(i)] if count > 1 else [])],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=run_dir.parent,
        )
        for i in range(count)
    ]  # fmt: skip


def end(processes, timeout=240):
    """Wait for processes; return their exit statuses, outputs and errors."""
    done = [p.communicate(timeout=timeout) for p in processes]
    return [p.returncode for p in processes], [out for out, _ in done], [err for _, err in done]


def wait_for_step(run_dir, step, processes):
    until = time.monotonic() + 200
    while not (run_dir / "checkpoints" / str(step)).is_dir() and time.monotonic() < until:
        assert all(p.poll() is None for p in processes), [p.communicate() for p in processes]
        time.sleep(0.05)


def curve(run_dir):
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {(line["step"], line["split"]): line["loss"] for line in lines}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of one process with four devices."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    statuses, _, errors = end(start(run_dir, 1))
    assert statuses == [0], errors
    return run_dir


def assert_same_curve(run_dir, other):
    """Sums over devices in another order: some dozens of roundings of 2^-11."""
    a, b = curve(run_dir), curve(other)
    assert a.keys() == b.keys()
    np.testing.assert_allclose([a[k] for k in a], [b[k] for k in a], rtol=2e-2)


@pytest.mark.parametrize("count,resident", [(2, "True"), (4, "False")])
def test_processes_train_as_one(tmp_path, alone, count, resident):
    run_dir = tmp_path / "run"
    statuses, outs, errors = end(start(run_dir, count, "--data-on-device", resident))
    assert statuses == [0] * count, errors
    assert_same_curve(run_dir, alone)
    assert "4 x cpu, mesh data=2,fsdp=2" in outs[0]
    spoken = [line for line in "".join(outs[1:]).splitlines() if line and "Gloo" not in line]
    assert spoken == []  # one process speaks for all
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["device"]["count"] == 4 and summary["steps"] == 40


def test_a_signal_to_one_process_saves_all(tmp_path, alone):
    run_dir = tmp_path / "run"
    processes = start(run_dir, 2, "--steps", "4000")
    wait_for_step(run_dir, 20, processes)
    processes[1].send_signal(signal.SIGTERM)
    statuses, outs, errors = end(processes)
    assert statuses == [143, 143], errors
    steps = sorted(int(p.name) for p in (run_dir / "checkpoints").iterdir() if p.name.isdigit())
    assert "stopped by SIGTERM at step" in errors[0] and str(steps[-1]) in errors[0]


@pytest.mark.parametrize("signum", ["SIGKILL", "SIGSTOP"])
def test_a_lost_process_ends_the_others_and_the_run_resumes(tmp_path, signum):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    statuses, _, errors = end(start(whole, 2, "--steps", "60"))
    assert statuses == [0, 0], errors
    processes = start(cut, 2, "--steps", "60", "--log-every", "5")
    wait_for_step(cut, 10, processes)
    trainer = int(subprocess.check_output(["pgrep", "-P", str(processes[1].pid)]).split()[0])
    os.kill(trainer, getattr(signal, signum))
    began = time.monotonic()
    processes[0].wait(timeout=90)
    assert time.monotonic() - began < 60
    if signum == "SIGSTOP":
        os.kill(trainer, signal.SIGKILL)
    statuses, _, errors = end(processes)
    finished = (cut / "summary.json").exists()  # it may have ended before the signal came
    if not finished:
        assert statuses[0] == 5, errors
        assert errors[0].splitlines()[-1].startswith("jmp-train: another process of the run ended")
    statuses, _, errors = end(start(cut, 2, "--steps", "60"))
    assert statuses == [0, 0], errors
    assert_same_arrays(final_arrays(whole), final_arrays(cut))


def test_a_run_resumes_on_another_number_of_processes(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for count, run_dir, steps in ((2, whole, "40"), (2, cut, "20"), (1, cut, "40")):
        statuses, _, errors = end(start(run_dir, count, "--steps", steps))
        assert statuses == [0] * count, errors
    a, b = curve(whole), curve(cut)
    np.testing.assert_allclose(a[40, "eval"], b[40, "eval"], rtol=5e-2)


@pytest.mark.parametrize(
    "options,line",
    [
        (["--processes", "2"], "several processes need --coordinator HOST:PORT, --processes N and"),
        (["--coordinator", "localhost:1", "--processes", "2", "--process", "2"],
         "process is 2; expected 0 to 1, for processes is 2"),
    ],
)  # fmt: skip
def test_an_address_in_parts_is_one_line(capsys, tmp_path, options, line):
    status = main(["train", "mlp_fp16", "--run-dir", str(tmp_path / "run"), *options])
    assert status == 2 and line in capsys.readouterr().err


@pytest.mark.parametrize(
    "variables,expected",
    [
        ({}, False),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "2"}, True),
        ({"SLURM_NTASKS": "2"}, False),  # a batch script, without srun
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ],
)
def test_launchers_are_recognised(monkeypatch, variables, expected):
    for name in (
        "OMPI_COMM_WORLD_SIZE",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_NTASKS",
        "TPU_WORKER_HOSTNAMES",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched() is expected
    assert Address().given is expected
    assert Address("localhost:1", 2, 0).given
