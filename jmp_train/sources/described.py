"""Arrays whose examples have names of their own in messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np


class Described(dict[str, np.ndarray]):
    """Arrays by name whose source says where an example is.

    Args:
      arrays: arrays by name, whose leading axis counts examples.
      describe: returns where the example with an index is, such as a file and a row.
      class_names: name of each class, in the order of the labels; None: they have no names.
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        describe: Callable[[int], str],
        class_names: tuple[str, ...] | None = None,
    ):
        super().__init__(arrays)
        self.describe, self.class_names = describe, class_names
