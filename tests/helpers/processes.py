"""Runs of several processes on this machine, which have four simulated devices together."""

import json
import os
import socket
import subprocess
import sys
import time

OPTIONS = ["--steps", "40", "--log-every", "10", "--eval-every", "20", "--checkpoint-every", "10",
           "--mesh", "data=2,fsdp=2", "--checkpoint-wait", "True"]  # fmt: skip


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def environment(count):
    """Return the environment of one of so many processes, which have four devices together."""
    flags = f"--xla_force_host_platform_device_count={4 // count}"
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "NPROC": "16"}


def command(run_dir, *options, name="mlp_fp16"):
    words = [sys.executable, "-m", "jmp_train", "train", name, *OPTIONS, *options]
    return [*words, "--run-dir", str(run_dir), "--heartbeat", "10"]


def start(run_dir, count, *options, name="mlp_fp16"):
    """Start a run of so many processes, in the folder of its directory."""
    together = ["--coordinator", f"localhost:{free_port()}", "--processes", str(count), "--process"]
    return [
        subprocess.Popen(
            [*command(run_dir, *options, name=name), *([*together, str(i)] if count > 1 else [])],
            env=environment(count), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
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
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = {(line["step"], line["split"]): line["loss"] for line in lines}
    assert len(losses) == len(lines)  # one process writes records
    return losses
