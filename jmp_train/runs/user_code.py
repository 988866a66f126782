"""Errors of a user's network, task or data as one line that names the place."""

from __future__ import annotations

import contextlib
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jmp_train.errors import UsageError
from jmp_train.step.evaluation import NOTE

_PACKAGE = Path(__file__).resolve().parents[1]
_LIBRARIES = tuple(
    str(folder)
    for folder in (
        _PACKAGE,
        Path(jax.__file__).resolve().parent.parent,
        Path(jax.__file__).parent.parent,  # under a link to the environment
        Path(sysconfig.get_path("stdlib")).resolve(),
    )
)
_NETWORKS = str(_PACKAGE / "models")  # the bundled ones are as a user's
_TASKS = str(_PACKAGE / "tasks")
_EVALUATION = str(_PACKAGE / "step" / "evaluation.py")  # its errors name the metric


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn an error of shapes, types or arithmetic, raised while the network is constructed or the step
    is traced, into a UsageError.

    The message has the first line of the error and the last line of the user's own files that led to
    it. Errors of other kinds are mistakes in code, and keep their traceback, but those of a metric,
    which would otherwise appear at the first evaluation, have one line too.
    """
    try:
        yield
    except UsageError:  # it is one line
        raise
    except Exception as error:
        metric = next((n for n in getattr(error, "__notes__", ()) if n.startswith(NOTE)), "")
        flaxs = type(error).__module__.startswith("flax")
        fits = flaxs or isinstance(error, (TypeError, ValueError))
        if not (metric or fits or isinstance(error, ArithmeticError)):
            raise
        frames, own = _frames(error)
        if not (metric or own or frames[-1].filename.startswith((_TASKS, _EVALUATION))):
            raise
        text, place = _first_line(error), _place(own)
        if frames[-1].filename == _EVALUATION:
            raise UsageError(f"{text}{place}") from error
        if metric:
            kind = "" if fits else f"{type(error).__name__}: "
            name = metric.removeprefix(NOTE)
            raise UsageError(
                f"the metric {name} cannot be computed: {kind}{text}{place}"
            ) from error
        raise UsageError(f"the network and the data do not fit: {text}{place}") from error


def check_schedule(schedule: Callable[[Any], Any]) -> None:
    """Check that a learning rate schedule can be computed in a compiled step; nothing is computed.

    Raises:
      UsageError: if it raises, or does not return a number.

    >>> check_schedule(lambda count: 0.1 if count < 5 else 0.01)
    Traceback (most recent call last):
    jmp_train.errors.UsageError: the learning rate schedule cannot be computed: TracerBool...
    """
    count = jax.ShapeDtypeStruct((), jnp.int32)  # as Optax counts
    try:
        rate = jax.eval_shape(lambda count: jnp.asarray(schedule(count)), count)
    except Exception as error:
        raise UsageError(
            f"the learning rate schedule cannot be computed: {type(error).__name__}: "
            f"{_first_line(error)}{_place(_frames(error)[1])}; expected a function of the number of "
            "updates that JAX can trace, with jnp.where in place of if"
        ) from error
    real = jnp.issubdtype(rate.dtype, jnp.floating) or jnp.issubdtype(rate.dtype, jnp.integer)
    if rate.shape or not real:
        raise UsageError(
            f"the learning rate schedule returned shape {rate.shape} and dtype {rate.dtype}; expected "
            "one real number"
        )


def _frames(error: Exception) -> tuple[list[traceback.FrameSummary], list[traceback.FrameSummary]]:
    """Return the frames of an error, and those of networks and the user's own files."""
    frames = traceback.extract_tb(error.__traceback__)
    own = lambda name: name.startswith(_NETWORKS) or not name.startswith((*_LIBRARIES, "<"))
    return frames, [f for f in frames if own(f.filename)]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _place(own: list[traceback.FrameSummary]) -> str:
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
