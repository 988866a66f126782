"""A multilayer perceptron; with no hidden layer, a linear classifier."""

from __future__ import annotations

import itertools
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jmp_train.types import DTypeLike


class Mlp(nnx.Module):
    """A multilayer perceptron for flattened examples, with GELU after each hidden layer.

    Args:
      inputs: number of values in an example.
      outputs: number of outputs.
      hidden: width of each hidden layer; an empty list makes a linear classifier.
      dropout: dropout rate of hidden outputs in training: 0 <= rate < 1.
      dtype: dtype of the compute; None promotes inputs and parameters, as Flax does.
      param_dtype: dtype of the parameters.
      rngs: random streams of the initial parameters.

    Raises:
      ValueError: for a width or a rate that is not possible.

    >>> Mlp(64, 10, hidden=(16,), rngs=nnx.Rngs(0))(jnp.ones((3, 8, 8))).shape
    (3, 10)
    """

    placement: ClassVar[tuple[str, ...]] = (
        r"re:layers/\d*[02468]/kernel=-,tensor",
        r"re:layers/\d*[02468]/bias=tensor+fsdp",
        r"re:layers/\d*[13579]/kernel=tensor,-",
    )
    """Placement of the parameters on a mesh with an axis `tensor`: of each pair of layers, a device
    computes a share of the features between the two."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        hidden: tuple[int, ...] = (256, 256),
        dropout: float = 0.0,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if any(width < 1 for width in hidden):
            raise ValueError(f"hidden is {hidden}; expected widths of at least 1")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; expected 0 <= dropout < 1")
        widths = (inputs, *hidden, outputs)
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
