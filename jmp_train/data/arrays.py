"""Labelled examples from a NumPy .npz file."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import ClassVar

import numpy as np

from jmp_train.data.dataset import Arrays, Dataset
from jmp_train.fields import check_fields
from jmp_train.sources.files import available_memory
from jmp_train.sources.npz import (
    Header,
    open_npz,
    read_entry,
    read_headers,
    refuse_objects,
)
from jmp_train.spec import DataSpec

_SPLIT_SEED = 0  # constant, so that the held-out examples do not depend on the run's seed


@dataclasses.dataclass(frozen=True)
class NpzConfig:
    """Labelled examples from a .npz file (numpy.savez), for classification."""

    name: ClassVar[str] = "npz"

    path: str
    """Path of the .npz file, relative to the current folder."""
    eval_path: str | None = None
    """Path of a .npz file of held-out examples; None: a share of the first file."""
    x: str = "x"
    """Name of the array of examples: floating, or uint8, which is divided by 255."""
    y: str = "y"
    """Name of the array of labels: one integer from 0 for each example."""
    classes: int | None = None
    """Number of classes; None: the number of different labels, which must have no gaps."""
    eval_share: float = 0.2
    """Fraction of the examples to hold out, the same examples in every run."""

    def __post_init__(self) -> None:
        check_fields(self)
        for field in ("path", "eval_path"):
            value = getattr(self, field)
            if value is not None and (not value or "\0" in value):
                raise ValueError(f"{field} is {value!r}; expected the name of a .npz file")
        for field in ("x", "y"):
            if not getattr(self, field):
                raise ValueError(f"{field} is ''; expected the name of an array in the file")
        if self.classes is not None and not 2 <= self.classes < 2**31:
            raise ValueError(f"classes is {self.classes}; expected at least 2, or None")
        if not 0 < self.eval_share < 1:
            raise ValueError(f"eval_share is {self.eval_share}; expected 0 < eval_share < 1")

    def load(self) -> Dataset:
        """Load examples, float32 (n, ...) in the shape of the file, and labels, int32 (n,).

        No code of the file is executed: arrays of Python objects, which need pickle, are refused.
        Before an array is read, the size in its header is compared with the size of the file and
        with the available memory.

        Raises:
          ValueError: for a missing file, with the nearest existing one, or a damaged file; for
            arrays of another shape or dtype; for a non-finite value or a label out of range, with
            its index; for labels with gaps, unless `classes` is set.
        """
        examples, labels = self._read(Path(self.path))
        _check_labels(labels, self.classes, self.path, self.y)
        classes = self.classes or _classes(labels, self.path, self.y)
        if self.eval_path is None:
            count = len(labels)
            held_out = round(self.eval_share * count)
            if not 0 < held_out < count:
                raise ValueError(
                    f"{self.path}: eval_share {self.eval_share:g} of {count} examples is {held_out}; "
                    "expected at least one held out and one left to train on"
                )
            order = np.random.Generator(np.random.Philox(_SPLIT_SEED)).permutation(count)
            first, rest = order[:held_out], order[held_out:]
            train = {"image": examples[rest], "label": labels[rest]}
            eval_ = {"image": examples[first], "label": labels[first]}
        else:
            train = {"image": examples, "label": labels}
            eval_ = dict(zip(("image", "label"), self._read(Path(self.eval_path)), strict=True))
            given, expected = eval_["image"].shape[1:], examples.shape[1:]
            if given != expected:
                raise ValueError(
                    f"{self.eval_path}: an example has the shape {given}; expected {expected}, as in "
                    f"{self.path}"
                )
            _check_labels(eval_["label"], classes, self.eval_path, self.y)
        int32 = lambda arrays: {**arrays, "label": arrays["label"].astype(np.int32)}
        train, eval_ = int32(train), int32(eval_)
        return Dataset(train=Arrays(train), eval=eval_, spec=DataSpec.of(train, classes))

    def _read(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """Read examples and labels from one file; check all but the range of the labels."""
        with open_npz(path) as file:
            headers = read_headers(path, file, (self.x, self.y))
            _check_headers(path, headers, self.x, self.y)
            examples, labels = (read_entry(path, file, name, h) for name, h in headers.items())
        if examples.dtype == np.uint8:
            examples = examples.astype(np.float32) / np.float32(255)
        else:
            with np.errstate(over="ignore"):  # `_check_finite` finds overflow
                examples = examples.astype(np.float32)
        _check_finite(examples, path, self.x)
        return examples, labels


def _check_headers(path: Path, headers: dict[str, Header], x: str, y: str) -> None:
    """Check shapes, dtypes and memory before any array is read."""
    refuse_objects(path, {name: header.dtype for name, header in headers.items()})
    examples, labels = headers[x], headers[y]
    if not (np.issubdtype(examples.dtype, np.floating) or examples.dtype == np.uint8):
        raise ValueError(
            f"{path}: {x!r} has dtype {examples.dtype}; expected a floating dtype or uint8"
        )
    if len(examples.shape) < 2 or 0 in examples.shape[1:]:
        raise ValueError(
            f"{path}: {x!r} has the shape {examples.shape}; expected (examples, ...), with at "
            "least one number in an example"
        )
    if len(labels.shape) != 1:
        raise ValueError(
            f"{path}: {y!r} has the shape {labels.shape}; expected (examples,), one integer each"
        )
    if labels.dtype.kind not in "iuf":  # for NumPy, time differences are integers too
        raise ValueError(f"{path}: {y!r} has dtype {labels.dtype}; expected integers from 0")
    if examples.shape[0] != labels.shape[0]:
        raise ValueError(
            f"{path}: {x!r} has {examples.shape[0]} examples and {y!r} {labels.shape[0]}; expected "
            "equal numbers"
        )
    if not labels.shape[0]:
        raise ValueError(f"{path} has no examples; expected at least two")
    # As stored, in float32, and a second float32 copy while the examples are shuffled.
    need = sum(math.prod(h.shape) * (h.dtype.itemsize + 8) for h in (examples, labels))
    available = available_memory()
    if available is not None and need > available:
        raise ValueError(
            f"{path}: {x!r} has the shape {examples.shape} and needs {need / 2**30:.3g} GiB of memory; "
            f"expected at most the {available / 2**30:.3g} GiB that are free"
        )


def _check_finite(examples: np.ndarray, path: Path, name: str) -> None:
    bad = ~np.isfinite(examples)
    count = int(bad.sum())
    if count:
        first = np.unravel_index(int(bad.argmax()), bad.shape)
        where = ", ".join(str(int(i)) for i in first)
        raise ValueError(
            f"{path}: {count} of the {examples.size} numbers of {name!r} are not finite in float32, "
            f"the first at [{where}]; expected finite numbers"
        )


def _classes(labels: np.ndarray, path: str, name: str) -> int:
    """Return the number of different labels, which must be every integer from 0.

    A gap is an error, because it is more often a mistake (labels from 1) than a class without
    examples.
    """
    found = np.unique(labels)
    count = len(found)
    if count < 2 or found[-1] != count - 1:
        shown = [f"{label:g}" for label in (found if count < 8 else [*found[:5], found[-1]])]
        if count >= 8:
            shown[-1:] = ["...", shown[-1]]
        raise ValueError(
            f"{path}: the labels {name!r} are {', '.join(shown)} ({count} different); expected every "
            f"integer from 0 to {max(count, 2) - 1}, or --data.classes "
            f"{max(int(found[-1]) + 1, 2)} if some classes have no examples"
        )
    return count


def _check_labels(labels: np.ndarray, classes: int | None, path: str, name: str) -> None:
    bad = ~((labels >= 0) & (labels < (classes or 2**31)) & (labels == np.floor(labels)))
    if bad.any():
        first = int(bad.argmax())
        upper = "" if classes is None else f" to {classes - 1}"
        raise ValueError(
            f"{path}: {int(bad.sum())} of the {len(labels)} labels {name!r} are out of range, "
            f"the first {labels[first]} at [{first}]; expected integers from 0{upper}"
        )
