"""Checkpoints of a run through Orbax: asynchronous, atomic, the newest few and the best."""

from __future__ import annotations

import functools
import logging
import shutil
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jmp_train.training.digest import array_digests, json_digest

T = TypeVar("T")

log = logging.getLogger(__name__)


class NoUsableCheckpoint(Exception):
    """There are checkpoints, and none of them can be loaded."""


class Restored(NamedTuple):
    """A checkpoint, loaded."""

    step: int
    state: Any
    extra: dict[str, Any]  # what was saved beside the state


class Checkpoints:
    """The checkpoints under one folder.

    Args:
      directory: made when the first checkpoint is saved.
      keep: how many of the newest to keep.
      best: the metric by which the best one is kept too; None keeps none for that.
      highest: whether the best is the one with the highest value.
    """

    def __init__(
        self, directory: Path, *, keep: int = 2, best: str | None = None, highest: bool = True
    ):
        from orbax.checkpoint import v1 as ocp

        policies: Any = ocp.training.preservation_policies
        keeping: list[Any] = [policies.LatestN(keep)]
        if best is not None:
            keeping.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics[best],
                    reverse=not highest,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        directory.mkdir(parents=True, exist_ok=True)
        self._best = best
        self._directory = directory
        self._checkpointer: Any = ocp.training.Checkpointer(
            str(directory.resolve()), preservation_policy=policies.AnyPreservationPolicy(keeping)
        )

    def save(
        self, step: int, state: Any, *, extra: dict[str, Any], metrics: dict[str, float] | None
    ) -> None:
        """Saves in the background; the state may be donated as soon as this returns.

        Args:
          step: steps taken.
          state: a pytree of JAX arrays.
          extra: JSON values to keep beside it, such as where the data stands.
          metrics: evaluation results at this step, where there are any.
        """
        metrics = metrics if metrics and self._best in metrics else None
        kept = {"extra": extra, "arrays": array_digests(state)}
        self._checkpointer.save_checkpointables_async(
            step,
            {"state": state},
            metrics=metrics,
            custom_metadata={**kept, "digest": json_digest(kept)},
            force=True,
        )

    def steps(self) -> list[int]:
        """The steps of the checkpoints that are there, ascending."""
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    def restore_latest(self, like: Any) -> Restored | None:
        """The newest checkpoint that can be loaded; None where there is none at all.

        Args:
          like: a state of the same structure, shapes and dtypes; its values are not used.

        Raises:
          NoUsableCheckpoint: if there are some but none can be loaded.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self._restore(step, like)
            # Orbax raises what the damage happens to cause: KeyError, ValueError, OSError and more.
            except Exception as error:  # noqa: BLE001
                log.warning("checkpoint %d cannot be loaded: %s", step, _first_line(error))
        if steps:
            raise NoUsableCheckpoint(
                f"none of the checkpoints at steps {', '.join(map(str, steps))} can be loaded"
            )
        return None

    def set_aside_after(self, step: int) -> None:
        """Renames the checkpoints of later steps, which could not be loaded, to `damaged-STEP`, so
        that training can save those steps again and nothing is lost."""
        later = [n for n in self.steps() if n > step]
        for n in later:
            target = self._directory / f"damaged-{n}"
            if target.exists():
                shutil.rmtree(target)
            (self._directory / str(n)).rename(target)
        if later:
            self._checkpointer.reload()

    def _restore(self, step: int, like: Any) -> Restored:
        metadata = self._checkpointer.checkpointables_metadata(step)
        _check_same(metadata.metadata["state"], like)
        abstract = jax.tree.map(_abstract, like)
        kept = dict(metadata.custom_metadata or {})
        if kept.pop("digest", None) != json_digest(kept):
            raise ValueError("what was saved beside the state is damaged: its digest differs")
        state = self._checkpointer.load_checkpointables(step, {"state": abstract})["state"]
        for name, digest in array_digests(state).items():
            if kept["arrays"].get(name) != digest:
                raise ValueError(f"{name!r} is damaged: its digest is not that of what was saved")
        return Restored(step, state, kept["extra"])

    def wait(self) -> None:
        """Waits until what was saved is on the disk."""
        self._checkpointer.wait()

    def close(self) -> None:
        """Waits, then lets go of the folder."""
        self._checkpointer.close()


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))


def _check_same(saved: Any, like: Any) -> None:
    """Orbax casts an array to whatever dtype it is asked for; a changed dtype is an error here."""
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    there = {name(path): x for path, x in jax.tree_util.tree_leaves_with_path(saved)}
    for path, x in jax.tree_util.tree_leaves_with_path(like):
        key = name(path)
        if key not in there:
            raise ValueError(f"it has no {key!r}")
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            continue
        dtype, shape = there[key].dtype, tuple(there[key].shape)
        if dtype != x.dtype or shape != x.shape:
            raise ValueError(f"{key!r} is {dtype} {shape}; expected {x.dtype} {x.shape}")


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
