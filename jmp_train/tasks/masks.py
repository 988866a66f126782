"""Masks that the bundled tasks honour."""

from __future__ import annotations

from jmp_train.types import Batch


def check_mask(batch: Batch, shape: tuple[int, ...], what: str) -> None:
    """Raise ValueError for a mask that says nothing about values of a shape.

    Args:
      batch: its `"mask"`, if it has one, is checked.
      shape: of the values; the mask has their shape, or their first axes.
      what: name of the values, for the error.

    >>> import numpy as np
    >>> check_mask({"mask": np.ones((4, 3), bool)}, (4,), "the loss")
    Traceback (most recent call last):
    ValueError: the mask has shape (4, 3); expected (4,), the shape of the loss
    """
    mask = batch.get("mask")
    if mask is None or (mask.ndim and mask.shape == shape[: mask.ndim]):
        return
    first = " or its first axes" if len(shape) > 1 else ""
    raise ValueError(
        f"the mask has shape {mask.shape}; expected {shape}{first}, the shape of {what}"
    )
