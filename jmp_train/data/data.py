"""Data of the user: what a function returns, as a dataset."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import keyword
import typing
from collections.abc import Callable, Mapping
from typing import Any

import grain
import numpy as np

from jmp_train.data.dataset import Arrays, DataError, Dataset
from jmp_train.data.examples import (
    Examples,
    Rows,
    Subset,
    check_example,
    takes_generator,
    with_generator,
)
from jmp_train.data.streams import Stream, check_leading_axes
from jmp_train.errors import nearest
from jmp_train.fields import check_fields
from jmp_train.spec import DataSpec
from jmp_train.types import Function

_SPLIT_SEED = 0  # constant, so that the held-out examples do not depend on the run's seed
_FORMS = (
    "a dict of arrays, something with len and [i] that returns a dict for each example, a Grain "
    "dataset, a function that returns an iterator of batches, a pair (train, held_out) of these, or a "
    "Dataset"
)


def Data(  # noqa: N802  (a constructor, of a class that depends on the function)
    load: Any,
    *,
    eval_share: float = 0.2,
    transform: Function | None = None,
    batch_transform: Function | None = None,
    classes: int | None = None,
    workers: int = 0,
    name: str | None = None,
    **fields: Any,
) -> Any:
    """Return the configuration of data that a function loads.

    Args:
      load: function that returns the data; its arguments become options of the command line
        (`--data.path`). It is called when a run begins, never when an experiment is listed. Or the
        data. The data are a dict of arrays whose leading axis counts examples; anything with `len`
        and `[i]` that returns a dict of arrays for each example; a Grain `MapDataset` or
        `IterDataset` of such dicts; a function that returns an iterator of batches; a pair
        `(train, held_out)` of these; or a `Dataset`.
      eval_share: fraction of the examples to hold out, the same examples in every run, if the data are
        no pair.
      transform: `transform(example)` or `transform(example, rng)` returns a changed example. `rng`, a
        `numpy.random.Generator`, is a pure function of the seed and the position. A transform that
        takes `rng` is left out of evaluation.
      batch_transform: the same for a batch.
      classes: number of classes; None: found from an integer array `label` in memory.
      workers: number of processes that read training examples; 0 reads them in a thread.
      name: name for summary.json; None: the name of the function.
      **fields: values of the function's arguments.

    Returns:
      A frozen dataclass whose fields are settings of an experiment.

    Raises:
      ValueError: for a value of another type or out of range, or an unknown argument.

    >>> def spirals(examples: int = 100):
    ...     x = np.linspace(0, 1, examples, dtype=np.float32)
    ...     return {"x": x, "label": np.arange(examples) % 2}
    >>> data = Data(spirals, examples=50)
    >>> dataset = data.load()
    >>> len(dataset.train), len(dataset.eval["x"]), dataset.spec.classes
    (40, 10, 2)
    """
    function = load if _is_function(load) else _constant(load)
    kind = _kind(function)
    own = {field.name for field in dataclasses.fields(kind)}
    for field in fields:
        if field not in own:
            arguments = own - {field.name for field in dataclasses.fields(_Data)}
            hint = nearest(field, arguments) if arguments else "it has no arguments"
            raise ValueError(f"{_name(function)} has no argument {field!r}; {hint}")
    config = kind(eval_share=eval_share, classes=classes, workers=workers, **fields)
    object.__setattr__(config, "transform", transform)
    object.__setattr__(config, "batch_transform", batch_transform)
    object.__setattr__(config, "name", name or _name(function))
    return config
