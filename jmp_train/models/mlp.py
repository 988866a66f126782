"""A multilayer perceptron; with no hidden layer, a linear classifier."""

from __future__ import annotations

import dataclasses
import itertools
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jmp_train.fields import check_fields
from jmp_train.spec import DataSpec
from jmp_train.types import DTypeLike


class Mlp(nnx.Module):
    """A multilayer perceptron for flattened examples, with GELU after each hidden layer.

    Args:
      widths: size of an example, width of each hidden layer, number of outputs.
      dropout: dropout rate of each hidden layer's outputs.
      dtype: dtype of the compute; None promotes inputs and parameters, as Flax does.
      param_dtype: dtype of the parameters.
      rngs: random streams of the initial parameters.

    >>> Mlp((64, 16, 10), rngs=nnx.Rngs(0))(jnp.ones((3, 8, 8))).shape
    (3, 10)
    """

    def __init__(
        self,
        widths: tuple[int, ...],
        *,
        dropout: float = 0.0,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.layers = nnx.List(
            nnx.Linear(a, b, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
            for a, b in itertools.pairwise(widths)
        )
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, x: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Map (batch, ...) to (batch, outputs); without `rngs`, dropout is disabled."""
        x_BxI = x.reshape(len(x), -1)
        for layer in self.layers[:-1]:
            x_BxI = nnx.gelu(layer(x_BxI))
            x_BxI = self.dropout(x_BxI, deterministic=rngs is None, rngs=rngs)
        return self.layers[-1](x_BxI)


@dataclasses.dataclass(frozen=True)
class MlpConfig:
    """Multilayer perceptron."""

    task: ClassVar[str] = "classification"

    hidden: tuple[int, ...] = (256, 256)
    """Width of each hidden layer; an empty list makes a linear classifier."""
    dropout: float = 0.0
    """Dropout rate of hidden outputs in training: 0 <= rate < 1."""

    def __post_init__(self) -> None:
        check_fields(self)
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden is {self.hidden}; expected widths of at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; expected 0 <= dropout < 1")

    def network(
        self, spec: DataSpec, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> Mlp:
        """Construct the network for the images of a data set."""
        widths = (spec.size("image"), *self.hidden, spec.class_count)
        return Mlp(widths, dropout=self.dropout, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
