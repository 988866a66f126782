"""The protocol of a tracker, and what trackers share."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jmp_train.types import Json


@runtime_checkable
class Tracker(Protocol):
    """Receives the records of a run.

    An exception from any of these methods becomes a warning, and the tracker gets no more calls; the
    run continues. A tracker that buffers may also have a method `flush()`, which is called before
    each checkpoint.

    >>> class Print:
    ...     def start(self, config):
    ...         print("run of", config["experiment"], "from step", config["run"]["step"])
    ...     def record(self, step, split, values):
    ...         print(step, split, values["loss"])
    ...     def finish(self, summary):
    ...         print("done" if summary else "failed")
    >>> isinstance(Print(), Tracker)
    True
    """

    def start(self, config: Json) -> None:
        """Begin, or begin again after a resume or a rollback.

        Args:
          config: the content of config.json, and `"run"`: a dict of `id` (text, the same whenever a
            run of this directory starts), `directory` (text) and `step` (steps already taken; records
            of later steps will come again).
        """
        ...

    def record(self, step: int, split: str, values: Json) -> None:
        """Receive one record.

        Args:
          step: steps taken.
          split: "train" or "eval".
          values: numbers by name, or lists of text.
        """
        ...

    def finish(self, summary: Json) -> None:
        """End.

        Args:
          summary: the content of summary.json; empty if an error ended the run.
        """
        ...


def numbers(split: str, values: Json) -> dict[str, float]:
    """Return the numbers of a record by `SPLIT/NAME`, without its lists and text.

    >>> numbers("train", {"loss": 0.5, "nonfinite": ["layers/0"]})
    {'train/loss': 0.5}
    """
    kept = {k: v for k, v in values.items() if not isinstance(v, (list, tuple, str))}
    return {f"{split}/{name}": float(value) for name, value in kept.items()}
