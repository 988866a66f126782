"""The bundled networks as models of an experiment."""

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
