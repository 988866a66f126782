"""`jmp-train new NAME`: write the file of a first experiment."""

from __future__ import annotations

import dataclasses
import keyword
import re
from pathlib import Path
from typing import Annotated

import tyro

from jmp_train.cli.options import parse
from jmp_train.cli.positional import take_positional
from jmp_train.config.find import experiment_files
from jmp_train.errors import UsageError


@dataclasses.dataclass(frozen=True)
class NewOptions:
    """Write experiments/NAME.py: a network, its data and a task, to be changed and trained."""

    linen: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write the network for Linen, Flax's older API, instead of NNX."""


def command(arguments: list[str]) -> None:
    """Write the file of an experiment in experiments/, and print how to train it."""
    what = "a name for the experiment"
    name, rest = take_positional(arguments, "new NAME", what, lambda: "such as flowers")
    options = parse(NewOptions, NewOptions(), rest, f"jmp-train new {name}")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise UsageError(
            f"the name is {name!r}; expected lower-case letters, digits and _, a letter first, such "
            "as 'flowers'"
        )
    path = Path("experiments") / f"{name}.py"
    files = experiment_files()
    if name in files:
        raise UsageError(f"an experiment {name!r} exists; expected another name")
    if name in {file.stem for file in files.values()}:
        raise UsageError(f"a family {name!r} exists; expected another name, for it would be hidden")
    try:
        path.parent.mkdir(exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(experiment_text(name, linen=options.linen))
    except FileExistsError:
        raise UsageError(f"{path} exists; expected another name") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from None
    print(f"{path}: a network, data and a task, to change as you like")
    print(f"train it: jmp-train train {name}")


def experiment_text(name: str, *, linen: bool) -> str:
    """Return the text of an experiment file."""
    library, network = ("linen", _LINEN) if linen else ("nnx", _NNX)
    inputs = "" if linen else '        inputs=lambda spec: spec.size("x"),\n'
    return _FILE.format(name=name, library=library, network=network.strip(), inputs=inputs)


_NNX = '''
class Net(nnx.Module):
    """Two dense layers with batch statistics and dropout.

    Args:
      inputs: number of features of an example.
      classes: number of classes.
      width: number of features in the hidden layer.
      dropout: dropout rate in training.
    """

    def __init__(
        self, inputs: int, classes: int, width: int = 64, dropout: float = 0.1, *, rngs: nnx.Rngs
    ):
        self.hidden = nnx.Linear(inputs, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.out = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(nnx.gelu(self.norm(self.hidden(x))))
        return self.out(x)
'''

_LINEN = '''
class Net(linen.Module):
    """Two dense layers with batch statistics and dropout."""

    classes: int
    """Number of classes."""
    width: int = 64
    """Number of features in the hidden layer."""
    dropout: float = 0.1
    """Dropout rate in training."""

    @linen.compact
    def __call__(self, x, train: bool):
        x = linen.Dense(self.width)(x)
        x = linen.BatchNorm(use_running_average=not train)(x)
        x = linen.Dropout(self.dropout, deterministic=not train)(linen.gelu(x))
        return linen.Dense(self.classes)(x)
'''

_FILE = '''\
"""{name}: an experiment of your own. Train it with: jmp-train train {name}"""

import numpy as np
from flax import {library}

import jmp_train as jt


# The network knows nothing of precision, loss or data. Its simple arguments become options of the
# command line: jmp-train train {name} --model.width 128
{network}


# The data: arrays by name, whose first axis counts examples. Arguments become options, too:
# jmp-train train {name} --data.noise 0.2. docs/data.md shows the other forms of data.
def flowers(noise: float = 0.0):
    """Return measurements of 150 iris flowers of three species.

    Args:
      noise: standard deviation of Gaussian noise on the measurements.
    """
    from sklearn.datasets import load_iris  # included with jmp_train

    x, species = load_iris(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    x += noise * np.random.default_rng(0).normal(size=x.shape)
    return {{"x": x.astype(np.float32), "label": species.astype(np.int32)}}


EXPERIMENT = jt.Experiment(
    # A function of `spec` is called with the shapes of the data.
    model=jt.Model(
        Net,
{inputs}        classes=lambda spec: spec.classes,
    ),
    data=jt.Data(flowers, eval_share=0.2),
    # Or "regression", "multi_label", "language_modelling", "sequence_to_sequence", or a jt.Task.
    task=jt.tasks.classification(inputs="x", label="label"),
    policy="mixed_bfloat16",  # or float32, mixed_float16: jmp-train train {name} --policy float32
    steps=300,
    batch_size=32,
    log_every=50,
    eval_every=100,
    checkpoint_every=100,
    optimizer=jt.optim.OptimizerConfig(learning_rate=0.01),
)
'''
