"""Data sets that need no download, and batches in an order that is a pure function of a seed."""

from jmp_train.data.arrays import NpzConfig
from jmp_train.data.batches import eval_batches, iterate, train_batches
from jmp_train.data.dataset import Arrays, Dataset, Source
from jmp_train.data.digits import DigitsConfig
from jmp_train.data.text import TextConfig, compression_baselines

__all__ = [
    "Arrays",
    "Dataset",
    "DigitsConfig",
    "NpzConfig",
    "Source",
    "TextConfig",
    "compression_baselines",
    "eval_batches",
    "iterate",
    "train_batches",
]
