"""Handwritten digits: the 1,797 real images of 8 by 8 pixels in scikit-learn."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from jmp_train.data.dataset import Arrays, Dataset
from jmp_train.fields import check_fields
from jmp_train.spec import DataSpec
from jmp_train.types import Batch

_SPLIT_SEED = 0  # constant, so that the held-out images do not depend on the run's seed


@dataclasses.dataclass(frozen=True)
class DigitsConfig:
    """Handwritten digits, the images bundled with scikit-learn."""

    name: ClassVar[str] = "digits"

    eval_share: float = 0.2
    """Fraction of the images to hold out, the same images in every run."""

    noise: float = 0.2
    """Standard deviation of Gaussian noise on training images; pixels are 0 to 1."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.eval_share < 1:
            raise ValueError(f"eval_share is {self.eval_share}; expected 0 < eval_share < 1")
        if not 0 <= self.noise < float("inf"):
            raise ValueError(f"noise is {self.noise}; expected a number of 0 or more")

    def load(self) -> Dataset:
        """Load images, float32 (n, 8, 8) from 0 to 1, and labels, int32 (n,)."""
        from sklearn.datasets import load_digits  # imported here, because the import takes 1.5 s

        images, labels = load_digits(return_X_y=True)
        order = np.random.Generator(np.random.Philox(_SPLIT_SEED)).permutation(len(images))
        arrays = {
            "image": (images[order] / 16).astype(np.float32).reshape(-1, 8, 8),
            "label": labels[order].astype(np.int32),
        }
        held_out = min(max(round(self.eval_share * len(images)), 1), len(images) - 1)
        train = {name: array[held_out:] for name, array in arrays.items()}
        return Dataset(
            train=Arrays(train, self._add_noise if self.noise else None),
            eval={name: array[:held_out] for name, array in arrays.items()},
            spec=DataSpec.of(arrays, classes=10),
        )

    def _add_noise(self, batch: Batch, rng: np.random.Generator) -> Batch:
        image = batch["image"]
        noise = rng.standard_normal(image.shape, np.float32) * np.float32(self.noise)
        return {**batch, "image": image + noise}
