"""A run of four processes, one of which is killed or stopped, twenty times; it loses nothing."""

import os
import random
import signal
import subprocess
import time

import pytest
from helpers.processes import curve, end, start
from helpers.saved_arrays import assert_same_arrays, final_arrays

pytestmark = pytest.mark.slow

KILLS, INTERVAL, STEPS = 20, 10, 1500
BOUND = 60  # seconds in which a process notices that another is lost; the heartbeat is of 10


def newest(run_dir):
    saved = (run_dir / "checkpoints").glob("*")
    return max((int(path.name) for path in saved if path.name.isdigit()), default=0)


def wait_beyond(run_dir, step, processes):
    until = time.monotonic() + 200
    while newest(run_dir) <= step:
        assert all(p.poll() is None for p in processes), [p.communicate() for p in processes]
        assert time.monotonic() < until
        time.sleep(0.02)


def test_twenty_processes_are_lost_one_after_the_other(tmp_path):
    draw = random.Random(7)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = ["--steps", str(STEPS), "--eval-every", "100", "--log-every", "5"]
    step = 0
    for number in range(KILLS):
        processes = start(cut, 4, *options)
        wait_beyond(cut, step, processes)
        time.sleep(draw.uniform(0, 1))
        victim = draw.randrange(4)
        trainer = int(
            subprocess.check_output(["pgrep", "-P", str(processes[victim].pid)]).split()[0]
        )
        how = signal.SIGSTOP if number % 5 == 4 else signal.SIGKILL
        os.kill(trainer, how)
        began = time.monotonic()
        others = [p for i, p in enumerate(processes) if i != victim]
        for other in others:
            other.wait(timeout=BOUND)
        assert time.monotonic() - began < BOUND
        if how == signal.SIGSTOP:
            os.kill(trainer, signal.SIGKILL)
        statuses, _, errors = end(processes)
        assert not (cut / "summary.json").exists(), "the run was over before it was cut"
        assert [status for i, status in enumerate(statuses) if i != victim] == [5] * 3, "\n".join(
            errors
        )
        for error in (error for i, error in enumerate(errors) if i != victim):
            assert error.splitlines()[-1].startswith("jmp-train: another process of the run ended")
        recorded = max(at for at, _ in curve(cut))
        assert newest(cut) > step and recorded - newest(cut) <= INTERVAL
        step = newest(cut)
    for run_dir in (cut, whole):
        statuses, _, errors = end(start(run_dir, 4, *options), timeout=400)
        assert statuses == [0] * 4, errors
    assert_same_arrays(final_arrays(whole), final_arrays(cut))
    assert curve(whole) == curve(cut)
