"""The questions: rows of `gpt_124m` that differ in one option, and a sentence that answers each.

JAX is imported by `make` alone, after the flags of XLA are set; `verdict` needs the standard library.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

from benchmarks.gpu.results import LOSS_BOUND

if TYPE_CHECKING:
    from benchmarks.gpu.measure import Trainer
    from benchmarks.gpu.table import Row, Workload

FLAGS = {
    "none": "",
    "latency_hiding": "--xla_gpu_enable_latency_hiding_scheduler=true",
    "no_command_buffers": "--xla_gpu_enable_command_buffer=",
    "no_triton_gemm": "--xla_gpu_enable_triton_gemm=false",
}
MICRO_BATCHES = 4
_STATIC_SCALE = 2.0**10  # small enough for every step to be finite, though none is checked
_BASELINE = "gpt_124m/bf16/jmp_train"

Rows = Mapping[str, Mapping[str, Any]]


def make(row: Row, workload: Workload, batch: int, toy: bool) -> Trainer:
    """The trainer of a question's row.

    Args:
      row: with the one option that it differs in.
      workload: sizes.
      batch: windows of a step.
      toy: whether the sizes are the toy ones.

    Raises:
      RuntimeError: for cuDNN's attention on a device that is not an NVIDIA GPU, and for a flag of XLA
        in a process that has imported JAX.
    """
    del toy
    ((option, value),) = row.options
    if option == "flags":
        _set_flags(FLAGS[value])
    import jax

    from benchmarks.gpu import jax_rows

    if value == "cudnn" and jax.default_backend() != "gpu":
        raise RuntimeError("cuDNN's attention needs an NVIDIA GPU")
    jax_rows.set_precision(row.precision)
    task = jax_rows.task_of(row, workload, **({"remat": value} if option == "remat" else {}))
    # Patched while the step is traced and compiled, which `trainer` does; JAX keeps the program.
    with contextlib.ExitStack() as patches:
        for target, new in _patches(option, value).items():
            patches.enter_context(mock.patch(target, new))
        step = jax_rows.step_of(_stepper(row, workload, task))
        return jax_rows.trainer(step, task, workload, batch)


def _set_flags(flags: str) -> None:
    """Adds flags to the environment, which XLA reads once, when JAX starts a device."""
    if flags and "jax" in sys.modules:
        raise RuntimeError(f"JAX is imported; expected to set {flags} in a process before it is")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()


def _stepper(row: Row, workload: Workload, task: Any) -> Any:
    import jmp_train as jt
    from benchmarks.gpu import jax_rows

    ((option, value),) = row.options
    arguments: dict[str, Any] = {}
    if (option, value) == ("skip", "none"):
        arguments = {"loss_scale": jt.StaticLossScale(_STATIC_SCALE), "skip_nonfinite": False}
    if option == "accumulate":
        arguments = {"micro_batches": MICRO_BATCHES}
    optimizer, policy = jax_rows.optimizer_of(workload), jax_rows.POLICIES[row.precision]
    return jt.make_step(task.loss_fn, optimizer, policy, **arguments)


def _patches(option: str, value: str) -> dict[str, Any]:
    """What to replace in the package, by its dotted name."""
    import jax
    import jax.numpy as jnp

    import jmp_train as jt

    return {
        ("skip", "select"): {
            "jmp_train.step.step._move_or_skip": lambda finite, move, skip, kept: jt.select_tree(
                finite, move(kept), skip(kept)
            )
        },
        ("skip", "cond"): {"jmp_train.step.step._move_or_skip": jax.lax.cond},
        ("naming", "off"): {
            "jmp_train.step.step.nonfinite_leaves": lambda grads: jnp.zeros(
                len(jax.tree.leaves(grads)), jnp.bool_
            )
        },
        ("attention", value): {"jmp_train.models.attention._implementation": lambda *_: value},
        ("accumulate", "bfloat16"): {"jmp_train.step.gradients.combine": _combine_in_bfloat16},
    }.get((option, value), {})


def _combine_in_bfloat16(
    run: Callable[..., Any], params: Any, batch: Any, kwargs: Any, *, micro_batches: int, **_: Any
) -> Any:
    """`jmp_train.step.accumulation.combine` of one device, the gradients' sum in bfloat16."""
    import jax
    import jax.numpy as jnp

    from jmp_train.step.accumulation import interleave, micro_batch

    rows = interleave(batch, micro_batches)

    def body(sums: Any, number: Any) -> Any:
        part = run(micro_batch(rows, number), kwargs)
        sums = jax.tree.map(lambda s, g: s + g.astype(s.dtype), sums, part.grads)
        return sums, part._replace(grads=None)

    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.bfloat16), params)
    sums, parts = jax.lax.scan(body, zeros, jnp.arange(micro_batches))
    mean = jax.tree.map(lambda x: x.mean(0), parts)
    grads = jax.tree.map(lambda s: s.astype(jnp.float32) / micro_batches, sums)
    return mean._replace(grads=grads), parts.loss.dtype


GAIN = 0.02
"""Share of a step's time that a change has to save to be recommended."""


class _Question(NamedTuple):
    """How a question is answered from the rows by their option's value."""

    prefix: str
    """What the rows' identifiers begin with."""
    base: str
    """The value, or the whole identifier, that the others are compared with."""
    others: tuple[str, ...]
    conclude: Callable[[dict[str, Mapping[str, Any]]], str]
    """The end of the sentence, given the measured rows by value, the base among them."""
    memory: bool = False
    """Whether peak memory matters too."""
    named: str = ""
    """What the sentence calls the base, if not by its value."""


def _quicker(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether a row is quicker than another by `GAIN`, beyond the quartiles, at the same loss."""
    own, others = row.get("loss_100"), other.get("loss_100")
    if own is not None and others is not None and abs(own - others) > LOSS_BOUND:
        return False
    beyond = row["step_ms"]["q3"] < other["step_ms"]["q1"]
    return beyond and _ms(row) <= (1 - GAIN) * _ms(other)


def _ms(row: Mapping[str, Any]) -> float:
    return row["step_ms"]["median"]


def _percent(row: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    return f"{100 * (_ms(row) / _ms(other) - 1):+.1f} %"


def _loss_scale(found: dict[str, Mapping[str, Any]]) -> str:
    says = []
    if "none" in found:
        says.append(f"the dynamic scale costs {_percent(found['select'], found['none'])}")
    if "cond" in found:
        better = _quicker(found["cond"], found["select"])
        says.append("use cond" if better else "keep select")
    return "; ".join(says)


def _naming(found: dict[str, Mapping[str, Any]]) -> str:
    cost = f"naming costs {_percent(found['on'], found['off'])}"
    within = found["off"]["step_ms"]["q3"] >= found["on"]["step_ms"]["q1"]
    return f"{cost}, {'within' if within else 'beyond'} the quartiles of the steps"


def _quickest(found: dict[str, Mapping[str, Any]], base: str) -> str:
    """The value with the least time, where that is quicker than the base beyond the quartiles."""
    best = min(found, key=lambda value: _ms(found[value]))
    return best if _quicker(found[best], found[base]) else base


def _remat(found: dict[str, Mapping[str, Any]]) -> str:
    best = _quickest(found, "dots")
    return "keep dots" if best == "dots" else f"use {best} where its memory is there"


def _attention(found: dict[str, Mapping[str, Any]]) -> str:
    return "use xla" if _quickest(found, "cudnn") == "xla" else "keep cudnn"


def _accumulation(found: dict[str, Mapping[str, Any]]) -> str:
    if "bfloat16" not in found:
        return ""
    wide, narrow = found["float32"], found["bfloat16"]
    says = [f"a sum in bfloat16 changes the step by {_percent(narrow, wide)}"]
    if None not in (loss := (wide.get("loss_100"), narrow.get("loss_100"))):
        says.append(f"the loss after 100 steps is {loss[1]:.4f} against {loss[0]:.4f} in float32")
    says.append("use bfloat16" if _quicker(narrow, wide) else "keep float32")
    return "; ".join(says)


def _xla_flags(found: dict[str, Mapping[str, Any]]) -> str:
    helps = [FLAGS[v] for v in found if v != "none" and _quicker(found[v], found["none"])]
    return f"set {' '.join(helps)}" if helps else "set none of them"


_QUESTIONS = {
    "loss_scale": _Question(
        "gpt_124m/fp16/jmp_train/skip=", "select", ("cond", "none"), _loss_scale
    ),
    "naming": _Question("gpt_124m/fp16/jmp_train/naming=", "off", ("on",), _naming),
    "remat": _Question(f"{_BASELINE}/remat=", "dots", ("none", "full"), _remat, memory=True),
    "attention": _Question(f"{_BASELINE}/attention=", "cudnn", ("xla",), _attention, memory=True),
    "accumulation": _Question(
        f"{_BASELINE}/accumulate=",
        _BASELINE,
        ("float32", "bfloat16"),
        _accumulation,
        memory=True,
        named="the whole batch at once",
    ),
    "xla_flags": _Question(
        f"{_BASELINE}/flags=",
        "none",
        ("latency_hiding", "no_command_buffers", "no_triton_gemm"),
        _xla_flags,
    ),
}


def verdict(question: str, rows: Rows) -> str:
    """One sentence that answers a question with figures, as far as its rows are measured.

    A change is only recommended where it saves 2 % of a step, more than two processes of one program
    differ by, the upper quartile of its steps is below the lower quartile of those without it, and
    the losses after 100 steps are within 0.05 nats.

    Args:
      question: a key of the table.
      rows: of a result file, by identifier.

    >>> step = {"median": 100.0, "q1": 99.5, "q3": 100.5}
    >>> on, off = ({"status": "ok", "step_ms": step} for _ in range(2))
    >>> prefix = "gpt_124m/fp16/jmp_train/naming="
    >>> verdict("naming", {prefix + "on": on, prefix + "off": off})
    'on takes 1.000 times off (100.0 against 100.0 ms); naming costs +0.0 %, within the quartiles \
of the steps.'
    >>> verdict("naming", {prefix + "on": on})
    'not measured yet'
    """
    asked = _QUESTIONS[question]
    key_of = {v: v if "/" in v else asked.prefix + v for v in (asked.base, *asked.others)}
    found = {v: rows[key] for v, key in key_of.items() if _is_ok(rows.get(key))}
    failed = [
        f"{asked.named if v == asked.base and asked.named else v} has no figures ({_reason(rows[key])})"
        for v, key in key_of.items()
        if key in rows and v not in found
    ]
    base = found.get(asked.base)
    others = [v for v in asked.others if v in found]
    if base is None or not others:
        return "; ".join(["not measured yet", *failed])
    says = [_compared(v, found[v], base, asked) for v in others]
    says += [*failed, asked.conclude(found)]
    says += [f"not measured yet: {v}" for v, key in key_of.items() if key not in rows]
    return "; ".join(filter(None, says)) + "."


def _is_ok(row: Mapping[str, Any] | None) -> bool:
    return row is not None and row.get("status") == "ok" and bool(row.get("step_ms"))


def _reason(row: Mapping[str, Any]) -> str:
    lines = str(row.get("reason") or row.get("status")).strip().splitlines()
    return lines[0][:160] if lines else "failed"


def _compared(value: str, row: Mapping[str, Any], base: Mapping[str, Any], asked: _Question) -> str:
    named = asked.named or asked.base
    says = f"{value} takes {_ms(row) / _ms(base):.3f} times {named} "
    says += f"({_ms(row):.1f} against {_ms(base):.1f} ms)"
    own, other = (r.get("peak_memory_bytes") for r in (row, base))
    if asked.memory and own and other:
        says += f" and {own / other:.2f} times its memory"
    return says
