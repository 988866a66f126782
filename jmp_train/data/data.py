"""Data of the user: what a function returns, as a dataset."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import grain
import numpy as np

from jmp_train.configurable import (
    Configured,
    call,
    configured,
    described,
    parameters_of,
    settings_of,
)
from jmp_train.data.augment import Chain
from jmp_train.data.bad import OnBad, unmarked
from jmp_train.data.dataset import Arrays, DataError, Dataset
from jmp_train.data.examples import (
    Examples,
    Rows,
    Subset,
    checked_batch_transform,
    row_blocks,
    takes_generator,
)
from jmp_train.data.shuffle_window import ShuffledWindows
from jmp_train.data.streams import Stream, check_leading_axes
from jmp_train.fields import check_fields, fits
from jmp_train.sources.checks import check_example, expected_labels
from jmp_train.sources.described import Described
from jmp_train.spec import DataSpec
from jmp_train.types import Batch, Function

_SPLIT_SEED = 0  # constant, so that the held-out examples do not depend on the run's seed
# None is a value of `classes`.
_NOT_GIVEN: Any = type("NotGiven", (), {"__repr__": lambda _: "not given"})()
_FORMS = (
    "a dict of arrays, something with len and [i] that returns a dict for each example, a Grain "
    "dataset, a function that returns an iterator of batches, a pair (train, held_out) of these, or a "
    "Dataset"
)


def Data(
    load: Any,
    /,
    *,
    eval_share: float = _NOT_GIVEN,
    transform: Function | None = None,
    batch_transform: Function | None = None,
    classes: int | None = _NOT_GIVEN,
    workers: int = _NOT_GIVEN,
    on_bad: OnBad = _NOT_GIVEN,
    window: int = _NOT_GIVEN,
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
        no pair; 0.2 by default.
      transform: `transform(example)` or `transform(example, rng)` returns a changed example. `rng`, a
        `numpy.random.Generator`, is a pure function of the seed and the position. It is given to an
        argument named `rng`, with a default or without, or else to a second required argument. A
        transform that takes it is left out of evaluation.
      batch_transform: the same for a batch.
      classes: number of classes; None, the default: found from an integer array `label` in memory.
      workers: number of processes that read training examples; 0, the default, reads them in a thread.
      on_bad: "stop", the default, ends a run with the first example that cannot be read or transformed, is unlike the
        first one, or has a label out of range. "skip" leaves such examples out and counts them; the
        next good one takes the place of one that is read at random. Not for a function of batches.
      window: number of examples of a Grain `IterDataset` to shuffle together, anew in each pass; 0,
        the default, keeps its order.
      name: name for summary.json; None: the name of the function.
      **fields: values of the function's arguments; its own defaults hold for those not given. A
        function with a parameter `name`, `transform`, `batch_transform`, `workers` or `window` gets
        the argument of that name above, which then has no other use. One with `eval_share`, `classes`
        or `on_bad` gets it too: the value, which may be the function's default, is also used as above
        if it has the type above.

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
    common = _Common(eval_share, classes, workers, on_bad, window)._asdict()
    given = {key: value for key, value in common.items() if value is not _NOT_GIVEN}
    function = load if _is_function(load) else (lambda: load)
    takes = parameters_of(function)
    about = {"transform": transform, "batch_transform": batch_transform}
    for key, value in {"name": name, **about}.items():
        if key in takes and value is not None:
            fields[key] = value
    about = {key: None if key in takes else value for key, value in about.items()}
    called = name if name and "name" not in takes else None
    called = called or (described(load) if _is_function(load) else "arrays")
    required = [k for k in _SHARED if k in takes and takes[k].default is inspect.Parameter.empty]
    own = {key: _DEFAULTS[key] for key in required}
    own |= {key: value for key, value in given.items() if key in takes}
    config = configured(
        function,
        {**own, **fields},
        base=_OwnData,
        about={"name": called, **about},
        what=f"Data({called})",
    )
    type(config).__name__ = called
    return dataclasses.replace(config, **{k: v for k, v in given.items() if k not in takes})


def own_of(config: Any) -> Any:
    """Return the attributes of data, such as `load`, which a setting of that name hides."""
    return super(type(config), config) if isinstance(config, _OwnData) else config


@dataclasses.dataclass(frozen=True, eq=False)
class _OwnData(Configured):
    """Configuration of data that a function loads."""

    eval_share: float = 0.2
    """Fraction of the examples to hold out, the same examples in every run."""
    classes: int | None = None
    """Number of classes; None: found from the integer array `label`, if it is in memory."""
    workers: int = 0
    """Number of processes that read training examples; 0 reads them in a thread."""
    on_bad: OnBad = "stop"
    """What an example that cannot be read does: "stop" ends the run, "skip" leaves it out."""
    window: int = 0
    """Number of examples of a stream that are shuffled together, anew in each pass; 0: none."""

    def __post_init__(self) -> None:
        check_fields(self)
        eval_share, classes, workers, _, window = _common(self)
        if not 0 < eval_share < 1:
            raise ValueError(f"eval_share is {eval_share}; expected 0 < eval_share < 1")
        if classes is not None and not 2 <= classes < 2**31:
            raise ValueError(f"classes is {classes}; expected at least 2, or None")
        if workers < 0:
            raise ValueError(f"workers is {workers}; expected 0 or more")
        if window < 0:
            raise ValueError(f"window is {window}; expected 0 or more")

    @property
    def name(self) -> str:
        """Name for summary.json."""
        return self.__configured__.about["name"]

    def load(self) -> Dataset:
        """Load the data.

        Raises:
          ValueError: for a function that raises ValueError or OSError, which it names; for data of no
            accepted form, and for examples that differ in shape.
        """
        own, name = self.__configured__, own_of(self).name
        takes, common = parameters_of(own.function), _common(self)
        settings = {k: v for k, v in settings_of(self).items() if _is_argument(self, k, v, takes)}
        try:
            made = call(own.function, {**settings, **own.fixed})
        except DataError:
            raise
        except (ValueError, OSError) as error:  # wrong input; other errors keep their traceback
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            raise DataError(f"{name} failed: {what}") from error
        if isinstance(made, Dataset):
            ignored = [k for k in _DEFAULTS if k not in takes and k != "workers"]
            ignored = [k for k in ignored if getattr(self, k) != _DEFAULTS[k]]
            ignored = ["transform"] * any(_transforms(self)) + ignored
            if ignored:
                raise DataError(f"{name} returned a Dataset; expected no {ignored[0]} beside it")
            return made if "workers" in takes else made._replace(workers=common.workers)
        paired = isinstance(made, tuple) and len(made) == 2
        forms = [_Form.of(part, name) for part in (made if paired else (made,))]
        parts = forms if paired else forms[0].split(common.eval_share)
        classes = own_of(self)._class_count(forms)
        stated = common.classes or next(filter(None, (form.classes for form in forms)), None)
        train, held_out = (part.source(self, stated) for part in _with_purpose(parts))
        first = _first(train)
        if isinstance(train, Examples) and isinstance(held_out, Examples):
            held_out.expect_like(train)
        count = classes or stated
        return Dataset(
            train=train,
            eval=held_out,
            spec=DataSpec.of(first, count, forms[0].class_names(count)),
            workers=common.workers,
        )

    @property
    def image_reader(self) -> Callable[[Any], np.ndarray] | None:
        """Return the function that reads an image's file as in training; None if the data have none."""
        reader = getattr(self.__configured__.function, "image_reader", None)
        settings = {**settings_of(self), **self.__configured__.fixed}
        return None if reader is None else reader(settings)

    @property
    def transformed(self) -> Callable[[Any], Batch] | None:
        """Return a function of a batch that applies the transforms of evaluation; None without any.

        The batch is a dict of arrays whose leading axis counts examples, as the function of the data
        returns them.
        """
        transform, batch_transform = map(_without_generator, _transforms(self))
        if transform is None and batch_transform is None:
            return None

        def apply(batch: Any) -> Batch:
            arrays: Any = check_example(batch, "the input", "a dict of arrays")
            check_leading_axes(arrays, "the input")
            count = len(next(iter(arrays.values())))
            if count == 0:
                return arrays
            rng = np.random.Generator(np.random.Philox(0))  # of no use to them
            if transform is not None:
                try:
                    arrays = Examples(Rows(arrays), transform).draw(np.arange(count), rng)
                except DataError as error:
                    raise DataError(
                        f"{error}; the transform of the data was applied to it"
                    ) from error
            if batch_transform is None:
                return arrays
            return checked_batch_transform(batch_transform)(arrays, rng)

        return apply

    def _class_count(self, parts: list[_Form]) -> int | None:
        common = _common(self)
        labelled = [p for p in parts if isinstance(p.made, Mapping) and "label" in p.made]
        labels = [part.made["label"] for part in labelled]
        if _transforms(self)[0] is not None or not labels:
            return common.classes
        label = np.concatenate([np.ravel(array) for array in labels])
        if label.dtype.kind not in "iu":
            return common.classes
        bad = _out_of_range(label, common.classes)
        if bad.any() and common.on_bad == "stop":
            first = int(bad.argmax())
            part = 0 if first < labels[0].size else 1
            of_part = first - part * labels[0].size
            where = labelled[part].place(of_part * len(labels[part]) // labels[part].size)
            raise DataError(
                f"{int(bad.sum())} labels are out of range, the first {label[first]}{where}; "
                f"{expected_labels(common.classes)}"
            )
        if common.classes is not None:
            return common.classes
        found = np.unique(label[~bad])
        return (
            len(found) if len(found) > 1 and found[0] == 0 and found[-1] == len(found) - 1 else None
        )


def _out_of_range(label: Any, classes: int | None) -> np.ndarray:
    """Return which integers of an array are no labels; nothing of an array of another kind, or None."""
    if label is None or label.dtype.kind not in "iu":
        return np.zeros(0, np.bool_)
    return (label < 0) | (label >= (classes or 2**31))


def _transforms(config: _OwnData) -> list[Function | None]:
    """Return the transform of examples and that of batches."""
    about = config.__configured__.about
    return [about["transform"], about["batch_transform"]]


class _Common(NamedTuple):
    """What `Data` itself does with the settings that all data have."""

    eval_share: float
    classes: int | None
    workers: int
    on_bad: OnBad
    window: int


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(_OwnData)}
_KINDS = typing.get_type_hints(_OwnData)
_SHARED = ("eval_share", "classes", "on_bad")  # used also where the function takes them


def _common(config: _OwnData) -> _Common:
    """Return the settings that all data have; the defaults of those that are the function's alone."""
    takes, values = parameters_of(config.__configured__.function), {}
    for key, default in _DEFAULTS.items():
        value = getattr(config, key)
        alone = key in takes and not (key in _SHARED and fits(value, _KINDS[key]))
        values[key] = default if alone else value
    return _Common(**values)


def _is_argument(config: _OwnData, key: str, value: Any, takes: Collection[str]) -> bool:
    """Return whether a setting is passed to the function: all but the common ones it does not take.

    One that it takes, with a default that cannot be a setting, such as an array, is passed if it was set.
    """
    set_here = key in vars(type(config)) or value != _DEFAULTS.get(key)
    return key not in _DEFAULTS or (key in takes and set_here)


@dataclasses.dataclass(frozen=True)
class _Form:
    """Data in one of the accepted forms."""

    made: Any
    held_out: bool = False
    numbers: np.ndarray | None = None
    """Indices of the examples before they were split; None: they were not."""
    describe: Callable[[int], str] | None = None
    """Says where an example of a dict of arrays is."""
    named: Any = None
    """The names of the classes, if the data say them."""

    @classmethod
    def of(cls, made: Any, name: str) -> _Form:
        """Return data in their form.

        Raises:
          DataError: for something else, and for arrays that differ in their leading axes.
        """
        describe = made.describe if isinstance(made, Described) else None
        names = getattr(made, "class_names", None)
        if isinstance(made, Mapping):
            arrays = check_example(made, name, "a dict of arrays")
            check_leading_axes(arrays, name)
            made = arrays
        readable = hasattr(made, "__len__") and hasattr(made, "__getitem__")
        streams = isinstance(made, grain.IterDataset) or (callable(made) and not readable)
        if not (streams or readable) or isinstance(made, (str, bytes, tuple, np.ndarray)):
            hint = ""
            if isinstance(made, Iterator):
                hint = "; an iterator cannot start again: return the function that makes it"
            raise DataError(
                f"{name} returned {_article(type(made).__name__)}; expected {_FORMS}{hint}"
            )
        form = cls(made, describe=describe, named=names)
        if not streams:
            if form.count == 0:
                raise DataError(f"{name} returned no examples; expected at least one")
            if form.count >= sys.maxsize:
                raise DataError(f"{name} returned an endless dataset; expected it without repeat()")
        return form

    @property
    def count(self) -> int:
        """The number of examples."""
        made = self.made
        return len(next(iter(made.values()))) if isinstance(made, Mapping) else len(made)

    @property
    def classes(self) -> int | None:
        """The number of classes that a source says it has, as `ImageFolder` does."""
        found = getattr(self.made, "classes", None)
        return found if isinstance(found, int) and found > 1 else None

    def class_names(self, count: int | None) -> tuple[str, ...] | None:
        """Return the names of so many classes, if a source says them, as `ImageFolder` does."""
        known = isinstance(self.named, tuple) and all(isinstance(n, str) for n in self.named)
        return self.named if known and len(self.named) == count else None

    def place(self, index: int) -> str:
        """Return where an example is, in brackets; "" if the data do not say."""
        return "" if self.describe is None else f" ({self.describe(index)})"

    @property
    def is_stream(self) -> bool:
        """Whether the examples can be read in one order alone."""
        return isinstance(self.made, grain.IterDataset) or not (
            isinstance(self.made, Mapping) or hasattr(self.made, "__getitem__")
        )

    def split(self, eval_share: float) -> list[_Form]:
        """Return the part to train on and the part that is held out.

        Raises:
          DataError: for a stream, and where a part would be empty.
        """
        if self.is_stream:
            raise DataError(
                "a stream cannot be split; expected a pair (train, held_out), with held-out data of "
                "any form"
            )
        held_out = round(eval_share * self.count)
        if not 0 < held_out < self.count:
            raise DataError(
                f"eval_share {eval_share:g} of {self.count} examples is {held_out}; expected at least "
                "one held out and one left to train on"
            )
        order = np.random.Generator(np.random.Philox(_SPLIT_SEED)).permutation(self.count)
        parts = order[held_out:], order[:held_out]
        if row_blocks(self.made) is not None:
            parts = np.sort(parts[0]), np.sort(parts[1])
        if isinstance(self.made, Mapping):
            arrays = [{k: v[rows] for k, v in self.made.items()} for rows in parts]
            return [
                _Form(a, numbers=rows, describe=self.describe and _Part(self.describe, rows))
                for a, rows in zip(arrays, parts, strict=True)
            ]
        return [_Form(Subset(self.made, rows), numbers=rows) for rows in parts]

    def source(self, config: _OwnData, classes: int | None) -> Any:
        """Return a source, a stream, or the arrays to evaluate on; labels are below `classes`."""
        kept, common = _transforms(config), _common(config)
        if self.held_out:
            kept = [_without_generator(f) for f in kept]
        transform, batch_transform = kept
        if self.is_stream:
            if transform is not None and not isinstance(self.made, grain.IterDataset):
                raise DataError(
                    "transform is for examples, and the data are batches; expected batch_transform"
                )
            made, windowed = self.made, common.window > 1 and not self.held_out
            if windowed and not isinstance(made, grain.IterDataset):
                raise DataError(
                    f"window is {common.window}, and the data are batches that a function makes; expected "
                    "0, or a Grain IterDataset"
                )
            skips = common.on_bad == "skip"
            made = ShuffledWindows(made, common.window, skips=skips) if windowed else made
            options: dict[str, Any] = {"classes": classes, "on_bad": common.on_bad}
            return Stream(made, transform, batch_transform, common.workers, **options)
        if common.window > 1 and not self.held_out:
            raise DataError(
                f"window is {common.window}, and the data are read at random; expected 0, or a stream"
            )
        in_memory = isinstance(self.made, Mapping)
        one_by_one = transform is not None or (self.held_out and batch_transform is not None)
        if in_memory and common.on_bad == "skip":
            one_by_one |= _out_of_range(self.made.get("label"), classes).any()
        if one_by_one or not in_memory:
            items = Rows(self.made, self.describe) if in_memory else self.made
            options = {"numbers": self.numbers, "classes": classes, "on_bad": common.on_bad}
            return Examples(items, transform, batch_transform, **options)
        if self.held_out:
            return self.made
        return Arrays(self.made, batch_transform and checked_batch_transform(batch_transform))


class _Part(NamedTuple):
    """What `describe` says of some of the examples."""

    describe: Callable[[int], str]
    rows: np.ndarray

    def __call__(self, index: int) -> str:
        return self.describe(int(self.rows[index]))


def _with_purpose(parts: list[_Form]) -> list[_Form]:
    """Return the part to train on, and the part that is held out, marked as such."""
    return [parts[0], dataclasses.replace(parts[1], held_out=True)]


def _without_generator(transform: Function | None) -> Function | None:
    """Return a transform that evaluation applies; None for one that takes random numbers."""
    if isinstance(transform, Chain):
        return transform.in_evaluation
    return None if transform is None or takes_generator(transform) else transform


def _first(train: Any) -> Any:
    """Return the first example as a batch, transformed."""
    if isinstance(train, Stream):
        return train.first()
    return unmarked(train.draw(np.array([0]), np.random.Generator(np.random.Philox(0))))[0]


def _is_function(value: Any) -> bool:
    """Return whether a value makes data; a class does, though its instances may be data."""
    readable = hasattr(value, "__len__") and hasattr(value, "__getitem__")
    return callable(value) and (inspect.isclass(value) or not readable)


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiouAEIOU' else 'a'} {noun}"
