"""A multilayer perceptron; with no hidden layer, a linear classifier."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, ClassVar

import jax
from flax import nnx

from jmp_train.fields import check_fields
from jmp_train.flax import apply_policy
from jmp_train.models.classification import classification
from jmp_train.precision.policy import Policy, get_policy
from jmp_train.precision.rules import NO_RULES, Rules
from jmp_train.task import DataSpec, Task


class Mlp(nnx.Module):
    """Linear layers with GELU between them.

    Args:
      widths: of the input, of each hidden layer and of the output.
      policy: dtypes of the parameters and of the compute.
      dropout: the share of each hidden layer's outputs that training sets to zero.
      rngs: where the initial parameters come from.
    """

    def __init__(
        self, widths: tuple[int, ...], policy: Policy, *, dropout: float = 0.0, rngs: nnx.Rngs
    ):
        self.layers = nnx.List(
            nnx.Linear(a, b, dtype=policy.compute_dtype, param_dtype=policy.param_dtype, rngs=rngs)
            for a, b in itertools.pairwise(widths)
        )
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, x_BxI: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Maps (batch, inputs) to (batch, outputs); without `rngs` nothing is dropped."""
        for layer in self.layers[:-1]:
            x_BxI = nnx.gelu(layer(x_BxI))
            x_BxI = self.dropout(x_BxI, deterministic=rngs is None, rngs=rngs)
        return self.layers[-1](x_BxI)


@dataclasses.dataclass(frozen=True)
class MlpConfig:
    """Multilayer perceptron."""

    metric: ClassVar[str] = "accuracy"
    highest: ClassVar[bool] = True

    hidden: tuple[int, ...] = (256, 256)
    """Width of each hidden layer; none makes a linear classifier."""
    dropout: float = 0.0
    """Share of hidden outputs set to zero in training, from 0 to below 1."""

    def __post_init__(self) -> None:
        check_fields(self)
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden is {self.hidden}; expected widths of at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; expected 0 <= dropout < 1")

    def task(self, data: DataSpec, policy: Policy, rules: Rules = NO_RULES) -> Task:
        """The classification task of this network on a data set.

        Args:
          data: gives the widths of input and output.
          policy: of the whole network.
          rules: where there are any, they give each module its policy instead.
        """
        widths = (data.features, *self.hidden, data.classes)
        if rules.entries:
            policy = rules.policy_of("")

        def make(key: jax.Array) -> Mlp:
            if not rules.entries:
                return Mlp(widths, policy, dropout=self.dropout, rngs=nnx.Rngs(params=key))
            plain = get_policy("float32")
            net = Mlp(widths, plain, dropout=self.dropout, rngs=nnx.Rngs(params=key))
            return apply_policy(net, rules)

        graph, *_ = nnx.split(nnx.eval_shape(make, jax.random.key(0)), nnx.Param, ...)

        def init(key: jax.Array) -> Any:
            return nnx.to_pure_dict(nnx.state(make(key), nnx.Param))

        def apply(params: Any, image: jax.Array, key: Any) -> jax.Array:
            rngs = None if key is None or self.dropout == 0 else nnx.Rngs(dropout=key)
            return nnx.merge(graph, params)(image, rngs=rngs)

        return classification(init, apply, policy)
