"""The bundled networks as models of an experiment, and a module of Equinox."""

import equinox
import jax

from jmp_train.models import Gpt, Mlp, Model


def mlp(**settings):
    """A multilayer perceptron for the images of a data set."""
    return Model(
        Mlp,
        inputs=lambda spec: spec.size("image"),
        outputs=lambda spec: spec.classes,
        **settings,
    )


def gpt(**settings):
    """A language model for the vocabulary of a data set."""
    return Model(Gpt, vocabulary=lambda spec: spec.classes, **settings)


class Dropped(equinox.Module):
    """A module with a function and a flag among its leaves."""

    weight: jax.Array
    activation: object
    inference: bool

    def __call__(self, x):
        return self.activation(x @ self.weight) if self.inference else x
