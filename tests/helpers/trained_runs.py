"""Small trained runs, of networks as users write them."""

import textwrap

import numpy as np
from flax import linen, nnx

import jmp_train as jt

POINTS = np.random.default_rng(0).normal(size=(120, 6)).astype(np.float32)
LABELS = (POINTS[:, 0] + POINTS[:, 1] > 0).astype(np.int32)


class LinenNet(linen.Module):
    """Batch statistics and dropout, in Linen."""

    width: int = 16

    @linen.compact
    def __call__(self, x, train: bool):
        x = linen.Dense(self.width)(x)
        x = linen.relu(linen.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = linen.Dropout(0.2, deterministic=not train)(x)
        return linen.Dense(2)(x)


class NnxNet(nnx.Module):
    """Batch statistics and dropout, in NNX."""

    def __init__(self, width: int = 16, *, rngs: nnx.Rngs):
        self.first = nnx.Linear(6, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.last = nnx.Linear(width, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


def plain():
    """Functions, without Flax."""
    return (
        lambda key: {"w": np.eye(6, 2, dtype=np.float32)},
        lambda params, x: x @ params["w"],
    )


class Counting(linen.Module):
    """A network that needs the number of examples as an integer."""

    @linen.compact
    def __call__(self, x):
        return linen.Dense(2)(x.reshape(len(x), -1))


NETWORKS = {"linen": LinenNet, "nnx": NnxNet, "plain": plain, "counting": Counting}


def tiny_mlp():
    """Return the model of a small network for images."""
    from jmp_train.models import Mlp

    sizes = {"inputs": lambda spec: spec.size("image"), "outputs": lambda spec: spec.classes}
    return jt.Model(Mlp, **sizes, hidden=(8,))


def points():
    """Return two classes of points."""
    return {"x": POINTS, "label": LABELS}


def experiment(network, **settings):
    """Return an experiment of 12 steps that saves and evaluates every 4."""
    settings = {"steps": 12, "batch_size": 16, "log_every": 4, "eval_every": 4} | settings
    settings = {"checkpoint_every": 4} | settings
    optimizer = jt.optim.OptimizerConfig(learning_rate=0.02, schedule="constant")
    return jt.Experiment(
        jt.Model(network),
        jt.Data(points),
        task=jt.tasks.classification(inputs="x"),
        **{"optimizer": optimizer, **settings},
    )


def write_experiment_file(folder, name, network="LinenNet", **settings):
    """Write experiments/NAME.py in a folder, for the command line."""
    arguments = "".join(f", {key}={value!r}" for key, value in settings.items())
    (folder / "experiments").mkdir(exist_ok=True)
    (folder / "experiments" / f"{name}.py").write_text(
        textwrap.dedent(
            f"""
            from helpers.trained_runs import {network}, experiment
            EXPERIMENT = experiment({network}{arguments})
            """
        )
    )
