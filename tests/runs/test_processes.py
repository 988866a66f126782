"""Runs of several real processes, with the collectives of the CPU; the oracle is a run of one process."""

import collections
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import time

import numpy as np
import pytest
from helpers.processes import command, curve, end, environment, free_port, start, wait_for_step
from helpers.saved_arrays import assert_same_arrays, final_arrays

from jmp_train.cli.attend import _copy, wants_attention
from jmp_train.cli.main import main
from jmp_train.runs.launched import launched
from jmp_train.runs.processes import Address

pytestmark = pytest.mark.slow


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
    assert "".join(outs[1:]) == ""  # one process speaks for all
    assert "[Gloo]" not in outs[0] + "".join(errors)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["device"]["count"] == 4 and summary["steps"] == 40


def test_a_signal_to_one_process_saves_all(tmp_path, alone):
    run_dir = tmp_path / "run"
    processes = start(run_dir, 2, "--steps", "4000")
    wait_for_step(run_dir, 20, processes)
    processes[1].send_signal(signal.SIGTERM)
    statuses, _, errors = end(processes)
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
    assert not (cut / "summary.json").exists(), "the run was over before the signal came"
    assert statuses[0] == 5, errors
    assert errors[0].splitlines()[-1].startswith("jmp-train: another process of the run ended")
    statuses, _, errors = end(start(cut, 2, "--steps", "60"))
    assert statuses == [0, 0], errors
    assert_same_arrays(final_arrays(whole), final_arrays(cut))


def test_a_run_resumes_on_another_number_of_processes(tmp_path, alone):
    run_dir = tmp_path / "run"
    processes = start(run_dir, 2, "--steps-per-call", "1")
    wait_for_step(run_dir, 10, processes)
    processes[0].send_signal(signal.SIGTERM)
    statuses, _, errors = end(processes)
    assert statuses == [143, 143], errors
    for count in (1, 4):
        statuses, _, errors = end(start(run_dir, count))
        assert statuses == [0] * count, errors
    resumed, whole = curve(run_dir), curve(alone)
    assert resumed.keys() >= whole.keys()  # and a record of where it was stopped
    evals = [key for key in whole if key[1] == "eval"]
    np.testing.assert_allclose([resumed[k] for k in evals], [whole[k] for k in evals], rtol=2e-2)


@pytest.mark.skipif(
    shutil.which("mpirun") is None, reason="Open MPI is not installed: apt-get install openmpi-bin"
)
def test_open_mpi_starts_a_run(tmp_path, alone):
    run_dir = tmp_path / "run"
    words = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2"]
    done = subprocess.run(
        [*words, *command(run_dir)], check=False, env=environment(2), capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "4 x cpu, mesh data=2,fsdp=2" in done.stdout
    assert_same_curve(run_dir, alone)


def test_slurm_starts_a_run(tmp_path, alone):
    """With the variables that srun sets, on a node whose name is localhost."""
    run_dir = tmp_path / "run"
    step = {"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}  # fmt: skip
    processes = [
        subprocess.Popen(
            command(run_dir), env={**environment(2), **step, "SLURM_PROCID": i, "SLURM_LOCALID": i},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in "01"
    ]  # fmt: skip
    statuses, _, errors = end(processes)
    assert statuses == [0, 0], errors
    assert_same_curve(run_dir, alone)


BROKEN = """
import numpy as np

import jmp_train as jt
from jmp_train.models import Mlp, Model


class Items:
    def __init__(self, count, every):
        self.count, self.every = count, every

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if self.every and i % self.every == 4:
            raise ValueError("broken")
        return {"image": np.full((4, 4), i % 7, np.float32) / 7, "label": i % 4}


FAMILY = jt.Experiment(
    Model(Mlp, inputs=lambda spec: 16, outputs=lambda spec: 4, hidden=(8,)),
    jt.Data(lambda: (Items(200, 9), Items(40, 0)), classes=4, on_bad="skip"),
    batch_size=24,
)
"""


def test_bad_examples_are_counted_in_all_processes(tmp_path):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "broken.py").write_text(BROKEN)
    counts = []
    for count, steps in ((1, 40), (2, 20), (2, 40)):
        run_dir = tmp_path / ("alone" if count == 1 else "two")
        processes = start(run_dir, count, "--steps", str(steps), name="broken_bf16")
        statuses, _, errors = end(processes)
        assert statuses == [0] * count, errors
        counts.append(json.loads((run_dir / "summary.json").read_text())["skipped_examples"])
    assert counts[0] == counts[2] > counts[1] > 0  # the third one resumed the second


@pytest.mark.parametrize("odd", [0, 1])
def test_an_error_of_one_process_ends_the_others(tmp_path, odd):
    """One has another batch size, which four devices do not divide; launchers compare the statuses."""
    run_dir = tmp_path / "run"
    together = ["--coordinator", f"localhost:{free_port()}", "--processes", "2", "--process"]
    processes = [
        subprocess.Popen(
            [*command(run_dir, *options), *together, str(i)], env=environment(2),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in (0, 1)
        for options in [("--batch-size", "66") if i == odd else ()]
    ]  # fmt: skip
    statuses, _, errors = end(processes, timeout=120)
    assert statuses == [2, 2], errors
    line = errors[odd].splitlines()[-1].removeprefix("jmp-train: ")
    assert "66" in line
    assert errors[1 - odd].splitlines()[-1] == f"jmp-train: process {odd} of the run ended: {line}"
    assert "Traceback" not in "".join(errors)


@pytest.mark.parametrize("odd", [0, 1])
def test_an_example_that_one_process_cannot_read_ends_all(tmp_path, odd):
    (tmp_path / "experiments").mkdir()
    text = BROKEN.replace('on_bad="skip"', "workers=0").replace(
        "if self.every and i % self.every == 4:",
        f"import jax\n        if self.every and i == 120 and jax.process_index() == {odd}:",
    )
    (tmp_path / "experiments" / "broken.py").write_text(text)
    processes = start(tmp_path / "run", 2, "--data-on-device", "False", name="broken_bf16")
    statuses, _, errors = end(processes, timeout=120)
    assert statuses == [2, 2], errors
    line = errors[odd].splitlines()[-1].removeprefix("jmp-train: ")
    assert "broken" in line
    assert errors[1 - odd].splitlines()[-1] == f"jmp-train: process {odd} of the run ended: {line}"


HOOK = """
import dataclasses

import jax

from jmp_train.config.find import find_experiment


def on_record(record, state):
    if record["step"] == 20 and jax.process_index() == ODD:
        THEN


FAMILY = dataclasses.replace(find_experiment("mlp_fp16"), on_record=on_record)
"""


def write_hook(folder, odd, then):
    (folder / "experiments").mkdir()
    text = HOOK.replace("ODD", str(odd)).replace("THEN", then)
    (folder / "experiments" / "hook.py").write_text(text)


@pytest.mark.parametrize("odd", [0, 1])
def test_a_hook_that_fails_in_one_process_ends_all(tmp_path, odd):
    write_hook(tmp_path, odd, "raise RuntimeError('no such service')")
    processes = start(tmp_path / "run", 2, name="hook_bf16")
    statuses, _, errors = end(processes, timeout=120)
    assert statuses == [1, 1], errors
    assert "Traceback" in errors[odd]
    line = f"jmp-train: process {odd} of the run ended: RuntimeError: no such service"
    assert errors[1 - odd].splitlines()[-1] == line
    assert (tmp_path / "run" / "checkpoints" / "20").is_dir()


def test_a_hook_that_stops_in_one_process_stops_all(tmp_path):
    write_hook(tmp_path, 1, "return 'stop'")
    statuses, _, errors = end(start(tmp_path / "run", 2, name="hook_bf16"))
    assert statuses == [0, 0], errors
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 20 and summary["stopped_early"]["by"] == "on_record"


@pytest.mark.parametrize(
    "options,line",
    [
        (["--processes", "2"], "several processes need --coordinator HOST:PORT, --processes N and"),
        (["--coordinator", "localhost:1", "--processes", "2", "--process", "2"],
         "process is 2; expected 0 to 1, for processes is 2"),
        (["--coordinator", "localhost:1", "--processes", "0", "--process", "0"],
         "processes is 0; expected at least 1"),
        (["--coordinator", "localhost", "--processes", "2", "--process", "1"],
         "coordinator is 'localhost'; expected HOST:PORT, such as localhost:1234"),
        (["--coordinator", "localhost:99999", "--processes", "2", "--process", "1"],
         "coordinator is 'localhost:99999'; expected HOST:PORT"),
        (["--heartbeat", "0"], "heartbeat is 0; expected at least 1 second"),
    ],
)  # fmt: skip
def test_an_address_in_parts_is_one_line(capsys, tmp_path, options, line):
    status = main(["train", "mlp_fp16", "--run-dir", str(tmp_path / "run"), *options])
    assert status == 2 and line in capsys.readouterr().err


def test_a_port_in_use_is_one_line(capsys, tmp_path):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        options = ["--coordinator", f"localhost:{port}", "--processes", "1", "--process", "0"]
        status = main(["train", "mlp_fp16", "--run-dir", str(tmp_path / "run"), *options])
    assert status == 2 and f"port {port} of the coordinator is in use" in capsys.readouterr().err


def test_a_port_that_is_not_open_to_the_user_is_one_line(capsys, tmp_path, monkeypatch):
    def refuse(self, address):
        raise PermissionError(13, "Permission denied")  # as for a port below 1024

    monkeypatch.setattr(socket.socket, "bind", refuse)
    options = ["--coordinator", "localhost:80", "--processes", "1", "--process", "0"]
    status = main(["train", "mlp_fp16", "--run-dir", str(tmp_path / "run"), *options])
    expected = "port 80 of the coordinator is not open to this user; expected 1024 to 65535"
    assert status == 2 and expected in capsys.readouterr().err


@pytest.mark.parametrize("signum,status", [("SIGINT", 130), ("SIGUSR1", 138)])
def test_a_signal_to_the_group_of_a_terminal_counts_once(tmp_path, signum, status):
    run_dir = tmp_path / "run"
    together = ["--coordinator", f"localhost:{free_port()}", "--processes", "1", "--process", "0"]
    process = subprocess.Popen(
        [*command(run_dir, "--steps", "100000"), *together], env=environment(1),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    wait_for_step(run_dir, 10, [process])
    os.killpg(process.pid, getattr(signal, signum))
    trainer = subprocess.run(["pgrep", "-P", str(process.pid)], check=False, capture_output=True)
    for pid in trainer.stdout.split():  # as SLURM does, to every process of a job
        os.kill(int(pid), getattr(signal, signum))
    statuses, _, errors = end([process])
    assert statuses == [status], errors
    step = int(errors[0].partition("at step ")[2].partition(";")[0])
    assert (run_dir / "checkpoints" / str(step)).is_dir()


def test_what_a_process_says_itself_is_shown(monkeypatch, capsys):
    lines = [
        "a line about the coordination of hosts\n", "12345\n", "  @ my note\n", "\n",
        "jmp-train: DataError in /data/grpc_logs/x.png\n", "plain\n",
    ]  # fmt: skip
    jax_says = [
        "E1126 12:00:00.000000    77 coordination_service_agent.cc:400] Failed\n",
        "Additional GRPC error information from remote target\n", ":UNKNOWN:Error received\n", "\n",
        "[Gloo] Rank [Gloo] Rank 1\n",
        "0 is connected to 3 peer ranks. Expected number of connected peer ranks is : 3\n",
    ]  # fmt: skip
    held = collections.deque(maxlen=30)
    _copy(io.StringIO("".join([*lines, *jax_says, *lines[4:]])), held)
    assert capsys.readouterr().err == "".join([*lines, *lines[4:]])
    assert list(held) == jax_says


@pytest.mark.parametrize(
    "variables,expected",
    [
        ({}, False),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "2"}, True),
        ({"SLURM_NTASKS": "2"}, False),  # a batch script, without srun
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),  # a pod of its own
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
    assert wants_attention(["train", "mlp_fp16"]) is expected
    assert not wants_attention(["eval", "runs/x"])
    assert wants_attention(["train", "mlp_fp16", "--process=1"])
    assert Address().given is expected
    assert Address("localhost:1", 2, 1).given
