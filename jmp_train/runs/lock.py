"""The lock that keeps two processes from training in one directory."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from jmp_train.errors import UsageError
from jmp_train.reports.progress import print_line
from jmp_train.runs.directory import not_writable


@contextlib.contextmanager
def lock_directory(run_dir: Path, console: Console) -> Iterator[None]:
    """Lock a directory; create it if it does not exist.

    The kernel releases the lock when its process ends, however it ends; the file stays.

    Raises:
      UsageError: if another process has the lock, or the directory cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / "lock").open("a+b", buffering=0)
    except OSError as error:
        raise not_writable(run_dir, error) from None
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().decode().strip() or "another process"
            raise UsageError(
                f"{run_dir} is in use by {owner}; wait for its end, or choose another --run-dir"
            ) from None
        except (ImportError, OSError) as error:  # no such system call, or not on this file system
            print_line(
                console,
                f"{run_dir} cannot be locked ({error}); make sure that no other process trains there",
            )
        with contextlib.suppress(OSError):  # on a full disk the lock works without the name
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.truncate(0)
