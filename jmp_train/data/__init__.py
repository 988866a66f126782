"""Data: sources that need no network, and batches whose order is a pure function of a seed."""

from jmp_train.data.batches import eval_batches, iterate, train_batches
from jmp_train.data.digits import DigitsConfig

__all__ = ["DigitsConfig", "eval_batches", "iterate", "train_batches"]
