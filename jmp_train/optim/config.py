"""Settings of the optimizer: method, learning-rate schedule, clipping, narrow parameters."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Literal

from jmp_train.fields import check_fields


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer, learning-rate schedule and gradient clipping."""

    name: Literal["adamw", "adam", "sgd", "lion", "muon"] = "adamw"
    """Optimizer. Its state is float32 under every policy unless the field state says otherwise."""
    learning_rate: float = 1e-3
    """Peak learning rate; --lr is short for it."""
    schedule: Literal[
        "cosine",
        "linear",
        "constant",
        "exponential",
        "polynomial",
        "cosine_onecycle",
        "piecewise_constant",
        "wsd",
    ] = "cosine"
    """Learning rate after the warm-up, by Optax's name; wsd: constant, then a linear decay."""
    warmup_steps: int = 0
    """Steps of linear warm-up from zero to the peak learning rate; must be fewer than --steps."""
    end_factor: float = 0.0
    """Learning rate at the last step over its peak (cosine, linear, polynomial, wsd)."""
    decay_rate: float = 0.1
    """Factor over the whole run (exponential), or at each boundary (piecewise_constant)."""
    power: float = 2.0
    """Exponent of the decay; 1 is linear (polynomial)."""
    boundaries: tuple[float, ...] = (0.5, 0.75)
    """Fractions of the run at which the learning rate is multiplied (piecewise_constant)."""
    decay_fraction: float = 0.1
    """Fraction of the run that the linear decay takes at its end (wsd)."""
    weight_decay: float = 1e-4
    """Decoupled weight decay per unit of learning rate (adamw, lion, muon)."""
    b1: float = 0.9
    """Decay rate of the first moment (adamw, adam); weight of the momentum in the update (lion)."""
    b2: float = 0.999
    """Decay rate of the second moment (adamw, adam) or of the momentum (lion)."""
    eps: float = 1e-8
    """Constant added to the square root of the second moment (adamw, adam)."""
    momentum: float = 0.9
    """Nesterov momentum (sgd); 0 disables it."""
    max_grad_norm: float | None = 1.0
    """Global norm above which unscaled gradients are clipped; None disables clipping."""
    parameters: Literal["direct", "master", "remainder", "stochastic", "kahan"] = "direct"
    """Method for parameters narrower than float32: direct loses small updates; master keeps a
    float32 copy in the optimizer's state; remainder keeps the low 16 bits of each float32 value
    (bfloat16 only); kahan keeps the rounding error; stochastic rounds up or down at random."""
    state: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the optimizer's computation and state. bfloat16 and float16 exist to show what fails
    (docs/parameters.md)."""

    def __post_init__(self) -> None:
        check_fields(self)
        for field in ("learning_rate", "eps"):
            if not 0 < getattr(self, field) < math.inf:
                raise ValueError(f"{field} is {getattr(self, field)}; expected a number above 0")
        for field in ("b1", "b2", "momentum"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; expected 0 <= {field} < 1")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay is {self.weight_decay}; expected 0 or more")
        if not 0 <= self.end_factor <= 1:
            raise ValueError(f"end_factor is {self.end_factor}; expected 0 to 1")
        for field in ("decay_rate", "decay_fraction"):
            if not 0 < getattr(self, field) <= 1:
                raise ValueError(f"{field} is {getattr(self, field)}; expected above 0, up to 1")
        if not 0 < self.power < math.inf:
            raise ValueError(f"power is {self.power}; expected a number above 0")
        if not all(low < high for low, high in itertools.pairwise((0, *self.boundaries, 1))):
            raise ValueError(
                f"boundaries is {self.boundaries}; expected rising fractions between 0 and 1"
            )
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; expected 0 or more")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(
                f"max_grad_norm is {self.max_grad_norm}; expected a number above 0, or None"
            )
