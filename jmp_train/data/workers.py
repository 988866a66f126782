"""Worker processes that read data, of Grain: how they start and how they end."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import cloudpickle  # with which Grain sends a dataset to its workers
import grain
from absl import flags

_ENDING = [  # signals that end a run; a terminal sends Ctrl-C to every process of the run
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
]

_index = 0  # of this worker process


def read_in_workers(dataset: Any, workers: int) -> Any:
    """Return an iterator over a Grain `IterDataset` whose elements worker processes read.

    The processes ignore the signals that end a run, and end with the process that started them. They
    start with the first element, or with `start_workers`.

    Args:
      dataset: an `IterDataset`, of which each process reads a part.
      workers: number of processes, above 0.
    """
    if not flags.FLAGS.is_parsed():  # Grain reads flags, which only a program of absl parses
        flags.FLAGS.mark_as_parsed()
    if "experiments" in sys.modules:  # workers cannot import these files, so functions are sent
        cloudpickle.register_pickle_by_value(sys.modules["experiments"])
    options = grain.MultiprocessingOptions(workers)
    iterator = iter(dataset.mp_prefetch(options, worker_init_fn=_init_worker))
    iterator.get_state()  # makes the iterators that `start_prefetch` starts
    return iterator


def start_workers(iterator: Any) -> None:
    """Start the processes of an iterator from `read_in_workers`, or resume their reading."""
    with _ending_signals_blocked():
        iterator.start_prefetch()


def next_of_workers(iterator: Any) -> Any:
    """Return the next element of an iterator from `read_in_workers`."""
    try:
        return next(iterator)
    except Exception as error:
        _clear_frames(error)
        raise


def close_workers(iterator: Any) -> None:
    """End the processes of an iterator from `read_in_workers`, and free the memory that they share."""
    iterator.close()
    gc.collect()  # errors that no one asked for refer to elements in cycles


def worker_index() -> int:
    """Return the index of this worker process; 0 outside of workers."""
    return _index


def _init_worker(index: int, count: int) -> None:
    global _index
    _index = index
    for signum in _ENDING:  # the process that started this one ends it
        signal.signal(signum, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()  # returns when it has ended, killed or not
        os._exit(1)


def _clear_frames(error: Exception) -> None:
    """Clear the frames that an error came through.

    One of Grain's refers to the element before, whose shared memory would not be freed. Grain leaves
    it out of the traceback, but the frames that it called are there.
    """
    for called, _ in traceback.walk_tb(error.__traceback__):
        frame = called
        while frame is not None:
            caller = frame.f_back
            with contextlib.suppress(RuntimeError):  # it is executing
                frame.clear()
            frame = caller


@contextlib.contextmanager
def _ending_signals_blocked() -> Iterator[None]:
    """Block the signals in threads and processes that are started inside.

    A process thus has none of them before it can ignore them. The main thread handles them afterwards.
    """
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
