"""Checks of the arguments of `make_step` and its results; free in a compiled step."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jmp_train.loss_scales.states import NoOpLossScale, check_loss_scale
from jmp_train.optim.loss_scaling import scales_of
from jmp_train.sharding.sharded import Sharded
from jmp_train.step.devices import DataParallel
from jmp_train.step.donation import DONATED, was_donated
from jmp_train.step.state import TrainState
from jmp_train.types import PyTree

_OPTIMIZERS = [
    "adabelief",
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "adan",
    "amsgrad",
    "lamb",
    "lars",
    "lbfgs",
    "lion",
    "nadam",
    "nadamw",
    "novograd",
    "polyak_sgd",
    "radam",
    "rmsprop",
    "rprop",
    "sgd",
    "sign_sgd",
    "sm3",
    "yogi",
]


def check_make_step(loss_fn: Any, optimizer: Any, loss_scale: Any, parallel: Any) -> None:
    """Raise TypeError if `loss_fn` is not callable, or if another argument has the wrong type."""
    if _is_optimizer(loss_fn) and callable(optimizer):
        raise TypeError(
            "make_step got an optimizer first and a function second; expected "
            "make_step(loss_fn, optimizer)"
        )
    if not callable(loss_fn):
        raise TypeError(
            f"loss_fn is {_short(loss_fn)}; expected a function loss_fn(params, batch) that returns "
            "the loss"
        )
    if not _is_optimizer(optimizer):
        name = optimizer if isinstance(optimizer, str) else getattr(optimizer, "__name__", "")
        close = difflib.get_close_matches(name.lower(), _OPTIMIZERS, n=1)
        name = close[0] if close else "adam"
        raise TypeError(
            f"optimizer is {_short(optimizer)}; expected an Optax transformation such as "
            f"optax.{name}(1e-3)"
        )
    if loss_scale is not None:
        check_loss_scale(loss_scale)
    if parallel is None or isinstance(parallel, Sharded):
        return
    if not isinstance(parallel, DataParallel):
        raise TypeError(
            f"parallel is a {type(parallel).__name__}; expected DataParallel(mesh), or "
            "sharding.Sharded(mesh)"
        )
    if not isinstance(parallel.mesh, Mesh):
        raise TypeError(
            f"the mesh of DataParallel is a {type(parallel.mesh).__name__}; expected a "
            "jax.sharding.Mesh, such as jax.make_mesh((8,), ('data',))"
        )
    if not isinstance(parallel.axis_name, str):
        raise TypeError(f"axis_name is {parallel.axis_name!r}; expected the name of one mesh axis")


def check_key(key: Any) -> None:
    """Raise TypeError if `key` is not None and not a PRNG key, typed or raw."""
    if key is None:
        return
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and shape == ()
    raw = dtype == jnp.uint32 and shape is not None and len(shape) == 1
    if not (typed or raw):
        raise TypeError(f"key is {_short(key)}; expected a PRNG key such as jax.random.key(0)")


def check_state(state: PyTree) -> None:
    """Raise TypeError if `state` is not a `TrainState`, and ValueError if it was donated."""
    if not isinstance(state, TrainState):
        raise TypeError(
            f"the state is a {type(state).__name__}; expected the TrainState that stepper.init "
            "or the last step returned: stepper.step(state, batch)"
        )
    if was_donated(state):
        raise ValueError(DONATED)


def check_scaled_once(opt_state: PyTree) -> None:
    """Raise ValueError if the optimizer itself divides gradients by a loss scale."""
    if any(not isinstance(scale, NoOpLossScale) for scale in scales_of(opt_state)):
        raise ValueError(
            "the optimizer is inside loss_scaling and make_step scales the loss itself, so gradients "
            "would be unscaled twice; expected the optimizer alone: "
            "make_step(loss_fn, optimizer, policy, loss_scale=...)"
        )


@contextlib.contextmanager
def explain_missing_arguments() -> Iterator[None]:
    """Name the arguments that a step passes, if the optimizer's update requires others."""
    try:
        yield
    except TypeError as error:
        missing = re.search(r"missing \d+ required keyword-only arguments?: (.*)", str(error))
        if missing is None:
            raise
        raise TypeError(
            f"the optimizer's update needs {missing[1]}; expected one that needs at most value, "
            "grad and value_fn, which a step passes"
        ) from error


def _is_optimizer(x: Any) -> bool:
    return callable(getattr(x, "init", None)) and callable(getattr(x, "update", None))


def _short(x: Any) -> str:
    text = repr(x)
    return text if len(text) <= 60 else f"a {type(x).__name__}"
