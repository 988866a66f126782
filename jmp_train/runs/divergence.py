"""The report of a run that had to stop: what went non-finite first, and what to try."""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
from collections.abc import Callable, Sequence
from typing import Any

from jmp_train.debug import NonFiniteOp, NonFiniteReport

_SHOWN = 6  # of each kind; the JSON holds all


@dataclasses.dataclass(frozen=True)
class Float32Gradients:
    """The gradients of the last batch, formed again in float32 and not scaled.

    Attributes:
      loss: the loss in float32.
      finite: whether all of them are finite.
      largest: their largest finite magnitude.
      count: how many numbers they are.
      format: the narrowest compute dtype of the run.
      shares: what that format would make of them at the loss scale; see `FormatShares`.
      shares_unscaled: the same without the scale.
      exponents: how many of them, unscaled, have which exponent, floor(log2 |x|).
    """

    loss: float
    finite: bool
    largest: float
    count: int
    format: str
    shares: dict[str, float]
    shares_unscaled: dict[str, float]
    exponents: dict[int, int]


@dataclasses.dataclass(frozen=True)
class Divergence:
    """What is known of a run that diverged; `str()` of it is the report.

    Attributes:
      experiment: its name.
      reason: why it was stopped.
      step: steps taken.
      policy: of the run.
      rules: of the run; empty without.
      loss_scale: that the last step was taken under.
      skips: whether non-finite steps are skipped.
      history: the last train records, oldest first.
      gradients: the paths of the gradients that were not finite in the last skipped step, and under
        `model_state/` those of the model state that became so.
      parameters: the paths of the parameters that are not finite now.
      operations: the replay of the last step; None where there could be none.
      float32: the same step's gradients in float32; None where they could not be formed.
      problems: why something above is missing.
      advice: pairs of a reason and the words to type, in the order to try them.
      checkpoint: the step of the newest checkpoint; None without.
    """

    experiment: str
    reason: str
    step: int
    policy: str
    rules: tuple[str, ...]
    loss_scale: float
    skips: bool
    history: tuple[dict[str, Any], ...]
    gradients: tuple[str, ...]
    parameters: tuple[str, ...]
    operations: NonFiniteReport | None
    float32: Float32Gradients | None
    problems: tuple[str, ...]
    advice: tuple[tuple[str, str], ...]
    checkpoint: int | None

    def __str__(self) -> str:
        lines = [self.reason]
        if self.gradients:
            lines.append(f"not finite in the last skipped step: {_some(self.gradients)}")
        if self.parameters:
            lines.append(f"parameters that are not finite: {_some(self.parameters)}")
        if self.operations is not None:
            lines += _operation_lines(self.operations)
        lines += _scale_lines(self.history, self.loss_scale)
        if self.float32 is not None:
            lines += _float32_lines(self.float32, self.loss_scale)
        lines += self.problems
        if self.advice:
            lines += ["to try:", *(f"  {words}\n      {why}" for why, words in self.advice)]
        there = "no checkpoint" if self.checkpoint is None else f"step {self.checkpoint}"
        lines.append(f"newest checkpoint: {there}; nothing was saved after it")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return dataclasses.asdict(self) | {
            "advice": [{"why": why, "words": words} for why, words in self.advice]
        }


def advise(
    *,
    experiment: Any,
    operations: NonFiniteReport | None,
    float32: Float32Gradients | None,
    skips: bool,
    loss_scale: float,
    fits: Callable[[tuple[str, ...]], bool],
) -> tuple[tuple[str, str], ...]:
    """What to try, as pairs of a reason and the words to type.

    Args:
      experiment: the settings of the run.
      operations: the replay of the last step.
      float32: the same step's gradients in float32.
      skips: whether non-finite steps are skipped.
      loss_scale: that the last step was taken under.
      fits: whether the model has the modules that rules name.
    """
    ops = operations.ops if operations else ()
    narrow = [op for op in ops if op.kind == "overflow" and op.dtype not in ("float32", "float64")]
    tips = []
    given = [name for name in (operations.arguments if operations else ()) if "batch" in name]
    if given:
        tips.append((f"the data is not finite: {_some(given)}", "(look at the data)"))
    if narrow and float32 is not None and float32.finite:
        if experiment.loss_scale.kind == "static":
            fitting = int(_scale_that_fits(narrow, float32, loss_scale))
            words = f"--loss-scale.kind dynamic --loss-scale.initial {fitting}"
            tips.append(("a scale that follows the gradients, from one that they fit", words))
        rules = _rules_for(narrow, experiment)
        forward = any(not op.backward for op in narrow)  # else a lower scale is enough
        if rules and (forward or experiment.loss_scale.kind != "static") and fits(rules):
            words = " ".join(map(shlex.quote, rules))
            tips.append(("float32 in the layers named above", f"--rules {words}"))
        if any(op.dtype == "float16" for op in narrow):
            rest = [_bfloat16(rule) for rule in experiment.rules]
            words = " ".join(map(shlex.quote, rest))
            tips.append(
                (
                    "bfloat16 has float32's range and needs no loss scale",
                    f"--rules {words}" if rest else f"--policy {_bfloat16(experiment.policy)}",
                )
            )
    if not skips:
        tips.append(
            (
                "skips such steps, which keeps the last good state, and names the operations",
                "--nonfinite skip",
            )
        )
    rate = experiment.optimizer.learning_rate / 10
    tips.append(("a tenth of the learning rate", f"--optimizer.learning-rate {rate:g}"))
    if experiment.optimizer.max_grad_norm is None:
        tips.append(("clips the gradients", "--optimizer.max-grad-norm 1.0"))
    return tuple(tips)


def _scale_that_fits(
    ops: Sequence[NonFiniteOp], float32: Float32Gradients, loss_scale: float
) -> float:
    """A power of two under which the results that overflowed and the gradients are half of float16's
    largest number at most; 65,536 at most."""
    wide = [op.wide for op in ops if op.wide and op.backward]
    largest = max([*wide, float32.largest * loss_scale], default=0.0) / loss_scale
    fitting = 65504 / 2 / largest if largest else 2.0**16
    return 2.0 ** min(16, max(0, math.floor(math.log2(fitting))))


def _bfloat16(words: str) -> str:
    """A policy or rule with bfloat16 for float16.

    >>> _bfloat16("mixed_float16"), _bfloat16("p=f32,c=f16"), _bfloat16("16-mixed")
    ('mixed_bfloat16', 'p=f32,c=bfloat16', 'bf16-mixed')
    """
    words = re.sub(r"(?<![a-z0-9])(float16|fp16|f16|half)\b", "bfloat16", words)
    words = words.replace("mixed_float16", "mixed_bfloat16")
    return re.sub(r"(?<![a-z0-9])16-(mixed|true)", r"bf16-\1", words)


def _rules_for(ops: Sequence[NonFiniteOp], experiment: Any) -> tuple[str, ...]:
    """The run's rules behind ones that put the modules of operations in float32."""
    modules = dict.fromkeys(filter(None, map(module_of, ops)))
    rest = experiment.rules or (f"**={experiment.policy}",)
    return (*(f"{module}=float32" for module in modules), *rest) if modules else ()


def module_of(op: NonFiniteOp) -> str:
    """The path of the module that an operation belongs to, by the parameter that names it; '' where
    none does.

    >>> import dataclasses
    >>> op = NonFiniteOp("dot_general", "overflow", "float16", (2,), 1, False,
    ...                  "params/layers/2/kernel", "", "net.py:3 (call)", (), 1e5, ())
    >>> module_of(op)
    'layers/2'
    """
    found = re.fullmatch(r"(?:after )?(?:params|gradient)/(.+)/[^/]+", op.module)
    return found[1] if found else ""


def _operation_lines(report: NonFiniteReport) -> list[str]:
    if not report.results:
        return ["run operation by operation the last step is finite: a rounding tips it over"]
    lines = [f"not finite as it was given: {_some(report.arguments)}"] if report.arguments else []
    if report.ops:
        lines.append("the operations that went non-finite first, of the last step:")
        lines += [f"  {i}. {op}" for i, op in enumerate(report.ops[:_SHOWN], 1)]
        if len(report.ops) > _SHOWN:
            lines.append(f"  and {len(report.ops) - _SHOWN} more")
    return lines


def _scale_lines(history: Sequence[dict[str, Any]], last: float) -> list[str]:
    if all(record.get("loss_scale") == 1.0 for record in history):
        return []
    points = [f"{r['loss_scale']:g} at step {r['step']}" for r in history[-_SHOWN:]]
    return [f"loss scale: {', '.join(points)}" if points else f"loss scale: {last:g}"]


def _float32_lines(float32: Float32Gradients, scale: float) -> list[str]:
    if not float32.finite:
        return ["the gradients are not finite in float32 either: a wider format does not help"]
    shares = {k: v for k, v in float32.shares.items() if v}
    words = {"zero": "zero already", "flushed": "flushed to zero", "overflow": "above its largest"}
    parts = [f"{100 * v:.3g} % {words.get(k, k)}" for k, v in shares.items()]
    return [
        f"in float32 the loss is {float32.loss:.4g} and the gradients are finite, the largest "
        + f"{float32.largest:.3g}; times {scale:g}, in {float32.format}: {', '.join(parts)}"
    ]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
