"""The number of steps in a call: as many as the events of a run, latency and memory allow.

The choice depends on settings, shapes and the kind of device, never on a measured time, so the same
command makes the same choice. Every choice gives the same run, bit for bit, except for convolutions on a
CPU.
"""

from __future__ import annotations

import math
from typing import Any

import jax

from jmp_train._jaxpr.flops import count_flops, inner_jaxprs
from jmp_train.config.experiment import AnyExperiment
from jmp_train.types import PyTree

#: By platform: longest time of a call in seconds, because a signal waits for the end of the call. On a
#: CPU, large steps gain from sharing a call too: gpt_fp32, of 0.2 s, takes 24 % more steps a second.
_LATENCIES = {"cpu": 1.0}
_ACCELERATOR_LATENCY = 0.1

#: A step of an accelerator that takes longer, in seconds, gains nothing from sharing a call, because
#: the next one is dispatched while it computes.
_LARGE_STEP = 0.01

#: Largest size in bytes of what a call is sent and returns, as it grows with its steps.
_CALL_BYTES = 32 * 2**20

#: By platform: FLOP/s to expect of a small step, and its shortest time in seconds.
_SPEEDS = {"cpu": (5e10, 1e-4)}
_ACCELERATOR = (2e13, 2e-5)


def choose_steps_per_call(
    experiment: AnyExperiment, start: int, *, step: Any, step_bytes: int, platform: str
) -> int:
    """Return the number of steps in a call.

    It divides the log, evaluation and checkpoint intervals, the number of steps and the step of the
    start. A step with convolutions is alone in its call on a CPU: in a loop, XLA computes them 10 to 30
    times slower there.

    Args:
      experiment: its `steps_per_call` is returned, unless it is None.
      start: steps already taken.
      step: jaxpr of a step.
      step_bytes: bytes that a step adds to the arguments and results of its call.
      platform: of the device, as in JAX: "cpu", "gpu", "tpu".
    """
    e = experiment
    if e.steps_per_call is not None:
        return e.steps_per_call
    if platform == "cpu" and _convolves(step):
        return 1
    speed, shortest = _SPEEDS.get(platform, _ACCELERATOR)
    seconds = max(count_flops(step) / speed, shortest)
    if seconds > _LARGE_STEP and platform not in _LATENCIES:
        return 1
    latency = _LATENCIES.get(platform, _ACCELERATOR_LATENCY)
    limit = min(latency / seconds, _CALL_BYTES / max(step_bytes, 1))
    common = math.gcd(start, e.steps, e.log_every, e.eval_every, e.checkpoint_every)
    return max(
        (d for n in range(1, math.isqrt(common) + 1) if common % n == 0 for d in (n, common // n)
         if d <= limit),
        default=1,
    )  # fmt: skip


def _convolves(jaxpr: Any) -> bool:
    """Return whether a jaxpr has convolutions."""
    return any(
        equation.primitive.name == "conv_general_dilated"
        or any(map(_convolves, inner_jaxprs(equation.params)))
        for equation in jaxpr.eqns
    )


def bytes_of(tree: PyTree) -> int:
    """Return the size of the arrays of a tree, or of their specs."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
