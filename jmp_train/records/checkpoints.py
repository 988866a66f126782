"""Checkpoints of a run through Orbax: asynchronous, atomic, the newest few and the best."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jmp_train.records.digest import array_digests, json_digest
from jmp_train.records.orbax_messages import cause, quiet_orbax
from jmp_train.types import Function, Json, PyTree

T = TypeVar("T")

log = logging.getLogger(__name__)


class NoUsableCheckpoint(Exception):
    """There are checkpoints, and none of them can be loaded."""


class DoesNotFit(Exception):
    """A complete checkpoint does not match the arrays of the state."""


class NotSaved(Exception):
    """A result of training could not be written."""


class Restored(NamedTuple):
    """A checkpoint, loaded."""

    step: int
    state: PyTree
    extra: Json  # what was saved beside the state


class Checkpoints:
    """The checkpoints under one folder.

    Args:
      directory: created if it does not exist.
      keep: number of newest checkpoints to keep.
      best: metric by which the best checkpoint is kept too; None keeps no best one.
      highest: whether the highest value of the metric is the best.
      clean: whether to remove what a killed process left half written; only for the one process
        that saves here.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int = 2,
        best: str | None = None,
        highest: bool = True,
        clean: bool = False,
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
        self._best, self._highest = best, highest
        self._directory = directory
        self._open: Function = functools.partial(
            ocp.training.Checkpointer,
            str(directory.resolve()),
            preservation_policy=policies.AnyPreservationPolicy(keeping),
        )
        logging.getLogger("absl").addFilter(_no_traceback_of_orbax)  # for good: threads outlive us
        for metrics in directory.glob("*/metrics"):  # Orbax reads them all to know the best
            if metrics.parent.name.isdigit() and not _readable(metrics):
                log.warning("the metrics of checkpoint %s are damaged", metrics.parent.name)
                self._set_aside(metrics, f"{metrics.parent.name}-metrics")
        try:
            with quiet_orbax():
                self._checkpointer: Any = self._open(cleanup_tmp_directories=clean)
        except Exception as error:  # noqa: BLE001  # one that it cannot describe stops Orbax
            for path in [p for p in directory.iterdir() if p.name.isdigit()]:
                try:
                    with quiet_orbax():
                        ocp.checkpointables_metadata(str(path.resolve()))
                except Exception:  # noqa: BLE001
                    _pass_over(path.name, error)
                    self._set_aside(path, path.name)
            self._checkpointer = self._open(cleanup_tmp_directories=clean)
        self._saving: int | None = None  # the step of the save under way
        self._unsaved = ""  # what became of the last save, if it failed

    def save(
        self,
        step: int,
        state: PyTree,
        *,
        extra: Json,
        metrics: dict[str, float] | None,
        wait: bool = False,
    ) -> None:
        """Save in the background; the state may be donated as soon as this returns.

        Waits for the previous save first. A failed save, on a full disk for example, leaves a
        warning; the checkpoints before it stay, and what it left half written is removed, at the
        latest by the next start.

        Args:
          step: steps taken.
          state: a pytree of JAX arrays.
          extra: JSON values to save beside it, such as the position in the data.
          metrics: evaluation results at this step, if any.
          wait: whether to return only when it is on the disk, or has failed.
        """
        metrics = metrics if metrics and self._best in metrics else None
        arrays = {name: [digest, *_kind(x)] for name, digest, x in _named(state)}
        metadata = {"extra": extra, "arrays": arrays}
        self._settle_before(step)
        try:
            self._checkpointer.save_checkpointables_async(
                step,
                {"state": state},
                metrics=metrics,
                custom_metadata={**metadata, "digest": json_digest(metadata)},
                force=True,
            )
        except Exception as error:  # noqa: BLE001  # as in restore_latest
            self._failed(step, error)
        else:
            self._saving = step
        if wait:
            self._settle()

    def give_up(self, step: int, error: Exception) -> None:
        """Treat a step as one whose save failed."""
        self._settle_before(step)
        self._failed(step, error)

    def _settle_before(self, step: int) -> None:
        self._settle()
        if self._unsaved:
            log.warning("%s; trying again at step %d", self._unsaved, step)
        self._unsaved = ""

    def _settle(self) -> None:
        """Wait for the save under way."""
        step, self._saving = self._saving, None
        if step is None:
            return
        try:
            self._checkpointer.wait()
        except Exception as error:  # noqa: BLE001  # as in restore_latest
            self._failed(step, error)

    def _failed(self, step: int, error: Exception) -> None:
        self._unsaved = f"checkpoint {step} could not be saved: {_first_line(error)}"
        with contextlib.suppress(Exception):  # it may raise the same error once more
            self._checkpointer.close()
        self._checkpointer = self._open(cleanup_tmp_directories=True)

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints, ascending."""
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    def best_first(self) -> list[int]:
        """Return the steps of the checkpoints with the metric, the best first; of equal ones, the
        newest."""
        values = {c.step: (c.metrics or {}).get(self._best) for c in self._checkpointer.checkpoints}
        known = {step: v for step, v in values.items() if v is not None and math.isfinite(v)}
        sign = -1 if self._highest else 1
        return sorted(known, key=lambda step: (sign * known[step], -step))

    def restore_latest(
        self, like: Any, *, check: Callable[[int, Json], None] | None = None
    ) -> Restored | None:
        """Return the newest checkpoint that can be loaded; None if the directory has no checkpoints.

        Args:
          like: a state of the same structure, shapes and dtypes; its values are not used.
          check: called with the step and with what was saved beside the state, before the state is
            loaded; may raise.

        Raises:
          NoUsableCheckpoint: if there are some but none can be loaded.
          DoesNotFit: if the newest complete checkpoint does not match `like`.
        """
        return self.restore_first(self.steps()[::-1], like, check=check)

    def restore_first(
        self,
        steps: Sequence[int],
        like: Any,
        *,
        parts: Collection[str] | None = None,
        check: Callable[[int, Json], None] | None = None,
        casts: bool = False,
    ) -> Restored | None:
        """Return the first of some checkpoints that can be loaded; None for no steps.

        Args:
          steps: steps of checkpoints, in the order in which they are tried.
          like: as for `restore_latest`; with `parts`, a dict of these fields alone.
          parts: the fields of the state to load, such as "params"; the others are not read from the
            disk. None loads all.
          check: as for `restore_latest`.
          casts: whether floating arrays of another dtype are cast to that of `like`.

        Raises:
          NoUsableCheckpoint: if there are steps but none can be loaded.
          DoesNotFit: if the first complete checkpoint does not match `like`.
        """
        for step in steps:
            # Orbax raises what the damage happens to cause: KeyError, ValueError, OSError and more.
            try:
                with quiet_orbax():
                    metadata = self._metadata(step)
            except Exception as error:  # noqa: BLE001
                _pass_over(step, error)
                continue
            if check is not None:
                check(step, metadata["extra"])
            arrays = metadata["arrays"]
            if parts is not None:
                arrays = {k: v for k, v in arrays.items() if k.partition("/")[0] in parts}
            saved = _with_saved_dtypes(arrays, like) if casts else like
            _check_same(step, arrays, saved)
            try:
                with quiet_orbax():
                    state = self._load(step, arrays, saved, partial=parts is not None)
                if casts:
                    state = jax.tree.map(lambda x, wanted: x.astype(wanted.dtype), state, like)
                return Restored(step, state, metadata["extra"])
            except Exception as error:  # noqa: BLE001
                _pass_over(step, error)
        if steps:
            raise NoUsableCheckpoint(
                f"none of the checkpoints at steps {', '.join(map(str, sorted(steps)))} in "
                f"{self._directory} can be loaded; they were not changed"
            )
        return None

    def set_aside_after(self, step: int) -> None:
        """Rename the checkpoints of later steps, which could not be loaded, to `damaged-STEP`, so
        that training can save those steps again and nothing is lost."""
        later = [n for n in self.steps() if n > step]
        for n in later:
            self._set_aside(self._directory / str(n), str(n))
        if later:
            if jax.process_count() > 1:
                from jax.experimental import multihost_utils

                multihost_utils.sync_global_devices("set aside")
            with quiet_orbax():
                self._checkpointer.reload()

    def _set_aside(self, path: Path, name: str) -> None:
        if jax.process_index() > 0:  # the first process of a run does it
            return
        ends = itertools.chain([""], (f"-{i}" for i in itertools.count(2)))
        free = (self._directory / f"damaged-{name}{end}" for end in ends)
        path.rename(next(target for target in free if not target.exists()))

    def _metadata(self, step: int) -> Json:
        """Return what was saved beside the state."""
        metadata = dict(self._checkpointer.checkpointables_metadata(step).custom_metadata or {})
        if metadata.pop("digest", None) != json_digest(metadata):
            raise ValueError("what was saved beside the state is damaged: its digest differs")
        return metadata

    def _load(self, step: int, arrays: dict[str, list[str]], like: Any, *, partial: bool) -> Any:
        from orbax.checkpoint import v1 as ocp

        abstract = jax.tree.map(_abstract, like)
        context = ocp.Context()
        context.pytree.loading.partial_load = partial
        with context:
            state = self._checkpointer.load_checkpointables(step, {"state": abstract})["state"]
        for name, digest, _ in _named(state):
            if arrays[name][0] != digest:
                raise ValueError(f"{name!r} is damaged: its digest is not that of what was saved")
        return state

    def wait(self) -> None:
        """Wait until the last save is on the disk.

        Raises:
          NotSaved: if the last save failed.
        """
        self._settle()
        if self._unsaved:
            steps = self.steps()
            newest = (
                f"the newest checkpoint is that of step {steps[-1]}" if steps else "there is none"
            )
            raise NotSaved(f"{self._unsaved}; {newest}")

    def close(self) -> None:
        """Wait for the save under way, then close the folder."""
        saving = self._saving is not None
        self._settle()
        if saving and self._unsaved:
            log.warning("%s", self._unsaved)
        self._checkpointer.close()


def _pass_over(step: int | str, error: Exception) -> None:
    """Say that a checkpoint cannot be loaded."""
    log.warning("checkpoint %s cannot be loaded and is passed over: %s", step, cause(error))


def _no_traceback_of_orbax(record: logging.LogRecord) -> bool:
    """Drop tracebacks: Orbax logs one in every thread that meets a failed save; we log one line."""
    return not (record.exc_info and "orbax" in record.pathname)


def _readable(metrics: Path) -> bool:
    """Return whether Orbax can read the metrics of a checkpoint."""
    try:
        return isinstance(json.loads((metrics / "metrics").read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))


def _named(tree: PyTree) -> list[tuple[str, str, Any]]:
    """Return the path, digest and array of each leaf."""
    return [
        (name, digest, x)
        for (name, digest), x in zip(
            array_digests(tree).items(), jax.tree.leaves(tree), strict=True
        )
    ]


def _kind(x: Any) -> tuple[str, str]:
    return str(x.dtype), str(tuple(x.shape))


def _check_same(step: int, saved: dict[str, list[str]], like: Any) -> None:
    """Raise DoesNotFit for a changed shape or dtype: Orbax casts to any dtype that it is asked for."""
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    wanted = {name(path): _kind(x) for path, x in jax.tree_util.tree_leaves_with_path(like)}
    for key in {**wanted, **saved}:
        if key not in wanted:
            kind = ", ".join(saved[key][1:])
            what = f"the checkpoint has {key!r} ({kind}), which the state does not have"
        elif key not in saved:
            kind = ", ".join(wanted[key])
            what = f"the state has {key!r} ({kind}), which the checkpoint does not have"
        elif tuple(saved[key][1:]) != wanted[key]:
            what = f"{key!r} is {' '.join(saved[key][1:])}; expected {' '.join(wanted[key])}"
        else:
            continue
        raise DoesNotFit(f"checkpoint {step} does not match the state: {what}")


def _with_saved_dtypes(saved: dict[str, list[str]], like: Any) -> Any:
    """Return the shapes of `like`, with the dtypes of saved arrays where both are floating."""
    floating = lambda dtype: jnp.issubdtype(dtype, jnp.floating)

    def one(path: Any, x: Any) -> Any:
        dtype = saved.get(jax.tree_util.keystr(path, simple=True, separator="/"), ["", ""])[1]
        if dtype in ("", str(x.dtype)) or not floating(x.dtype) or not floating(jnp.dtype(dtype)):
            return x
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=getattr(x, "sharding", None))

    return jax.tree_util.tree_map_with_path(one, like)


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
