"""Advice for a run that diverged: options to try, in the order to try them."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Sequence

from jmp_train.config.experiment import AnyExperiment
from jmp_train.debug import NonFiniteOp, NonFiniteReport
from jmp_train.reports.divergence import Float32Gradients, first_names


def advise(
    *,
    experiment: AnyExperiment,
    operations: NonFiniteReport | None,
    float32: Float32Gradients | None,
    skips: bool,
    loss_scale: float,
    accepts: Callable[[tuple[str, ...]], bool],
) -> tuple[tuple[str, str], ...]:
    """Return what to try, as pairs of a reason and the options to give.

    Args:
      experiment: the settings of the run.
      operations: the replay of the last step.
      float32: the same step's gradients in float32.
      skips: whether non-finite steps are skipped.
      loss_scale: the loss scale of the last step.
      accepts: whether the model has the modules that rules name.
    """
    ops = operations.ops if operations else ()
    narrow = [op for op in ops if op.kind == "overflow" and op.dtype not in ("float32", "float64")]
    tips = []
    given = [name for name in (operations.arguments if operations else ()) if "batch" in name]
    if given:
        tips.append((f"the data is not finite: {first_names(given)}", "(look at the data)"))
    if narrow and float32 is not None and float32.finite:
        if experiment.loss_scale.kind == "static":
            initial = int(_scale_without_overflow(narrow, float32, loss_scale))
            options = f"--loss-scale.kind dynamic --loss-scale.initial {initial}"
            tips.append(("a scale that follows the gradients, from one that they fit", options))
        rules = _rules_for(narrow, experiment)
        forward = any(not op.backward for op in narrow)  # else a lower scale is enough
        if rules and (forward or experiment.loss_scale.kind != "static") and accepts(rules):
            options = " ".join(map(shlex.quote, rules))
            tips.append(("float32 in the layers named above", f"--rules {options}"))
        if any(op.dtype == "float16" for op in narrow):
            rest = [_bfloat16(rule) for rule in experiment.rules]
            options = " ".join(map(shlex.quote, rest))
            tips.append(
                (
                    "bfloat16 has float32's range and needs no loss scale",
                    f"--rules {options}" if rest else f"--policy {_bfloat16(experiment.policy)}",
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


def _scale_without_overflow(
    ops: Sequence[NonFiniteOp], float32: Float32Gradients, loss_scale: float
) -> float:
    """Return the largest power of two, up to 65,536, under which the results that overflowed and the
    gradients are at most half of float16's largest number."""
    wide = [op.wide for op in ops if op.wide and op.backward]
    largest = max([*wide, float32.largest * loss_scale], default=0.0) / loss_scale
    highest = 65504 / 2 / largest if largest else 2.0**16
    return 2.0 ** min(16, max(0, math.floor(math.log2(highest))))


def _bfloat16(text: str) -> str:
    """Return a policy or rule with bfloat16 for float16.

    >>> _bfloat16("mixed_float16"), _bfloat16("p=f32,c=f16"), _bfloat16("16-mixed")
    ('mixed_bfloat16', 'p=f32,c=bfloat16', 'bf16-mixed')
    """
    text = re.sub(r"(?<![a-z0-9])(float16|fp16|f16|half)\b", "bfloat16", text)
    text = text.replace("mixed_float16", "mixed_bfloat16")
    return re.sub(r"(?<![a-z0-9])16-(mixed|true)", r"bf16-\1", text)


def _rules_for(ops: Sequence[NonFiniteOp], experiment: AnyExperiment) -> tuple[str, ...]:
    """Return rules that put the modules of operations in float32, before the rules of the run."""
    modules = dict.fromkeys(filter(None, map(module_of, ops)))
    rest = experiment.rules or (f"**={experiment.policy}",)
    return (*(f"{module}=float32" for module in modules), *rest) if modules else ()


def module_of(op: NonFiniteOp) -> str:
    """Return the path of the module of an operation, taken from the parameter that names it; '' where
    no parameter does.

    >>> import dataclasses
    >>> op = NonFiniteOp("dot_general", "overflow", "float16", (2,), 1, False,
    ...                  "params/layers/2/kernel", "", "net.py:3 (call)", (), 1e5, ())
    >>> module_of(op)
    'layers/2'
    """
    found = re.fullmatch(r"(?:after )?(?:params|gradient)/(.+)/[^/]+", op.module)
    return found[1] if found else ""
