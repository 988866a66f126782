"""Several processes of one run: how they find each other, and what the first of them does alone."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jmp_train.errors import UsageError
from jmp_train.runs.launched import launched
from jmp_train.runs.signals import Stopped

_LETTERS = 4096  # bytes of a text that the first process sends
_ENDED = "jmp_train/ended"  # the key of the process that ended, and of its error
_EVERY = 1.0  # seconds between two looks for it
_NOTICED = 3.0  # seconds in which a look sees it
_HEARD = 10.0  # seconds in which the others have seen it, before the process ends
_LEFT = 2.0  # seconds in which they have left


# What Gloo and NCCL say of a process that does not answer, and what JAX says besides.
_COLLECTIVES = r"\bgloo\b|\bnccl\b|connection (closed|reset) by peer"
_BY_ANYONE = re.compile(_COLLECTIVES, re.IGNORECASE)
_BY_JAX = re.compile(
    _COLLECTIVES + r"|unavailable|deadline_exceeded|coordination|heartbeat", re.IGNORECASE
)


class Lost(Exception):
    """Another process of the run ended, or does not answer."""

    def __init__(self) -> None:
        super().__init__(
            "another process of the run ended, or did not answer; the same commands resume the run from "
            "its newest checkpoint"
        )


class Address(NamedTuple):
    """Where the processes of a run meet."""

    coordinator: str | None = None
    """Host and port of the first process."""
    processes: int | None = None
    """Number of processes."""
    process: int | None = None
    """Index of this one, from 0."""
    heartbeat: int = 60
    """Seconds after which a process that does not answer ends the others."""

    @property
    def given(self) -> bool:
        """Whether the run has several processes: by its address, or by what launched this one.

        Raises:
          UsageError: for an address in parts.
        """
        parts = (self.coordinator, self.processes, self.process)
        given = [part is not None for part in parts]
        if any(given) and not all(given):
            raise UsageError(
                "several processes need --coordinator HOST:PORT, --processes N and --process I; expected "
                "all three, or none"
            )
        if all(given):
            self._check()
        if self.heartbeat < 1:
            raise UsageError(f"heartbeat is {self.heartbeat}; expected at least 1 second")
        return all(given) or launched()

    def _check(self) -> None:
        count, index = self.processes or 0, self.process or 0
        if count < 1:
            raise UsageError(f"processes is {count}; expected at least 1")
        if not 0 <= index < count:
            raise UsageError(
                f"process is {index}; expected 0 to {count - 1}, for processes is {count}"
            )
        host, _, port = (self.coordinator or "").rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 2**16:
            raise UsageError(
                f"coordinator is {self.coordinator!r}; expected HOST:PORT, such as localhost:1234"
            )
        if index == 0:
            _check_port(int(port))


def _check_port(port: int) -> None:
    """Raise UsageError for a port that this process cannot listen on."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", port))
        except PermissionError:
            raise UsageError(
                f"port {port} of the coordinator is not open to this user; expected 1024 to 65535"
            ) from None
        except OSError:
            raise UsageError(
                f"port {port} of the coordinator is in use here; expected a free one"
            ) from None


def join(address: Address) -> None:
    """Join the other processes of a run, before any device is used; nothing for a run of one.

    Without an address, SLURM (`srun`), Open MPI (`mpirun`), indexed jobs of Kubernetes (with the package
    `kubernetes`) and the pods of Cloud TPUs are recognised by their environment.

    Raises:
      UsageError: for an address in parts, and if the others cannot be reached.
    """
    if not address.given:
        return
    try:
        jax.distributed.initialize(
            address.coordinator,
            address.processes,
            address.process,
            heartbeat_timeout_seconds=address.heartbeat,
            initialization_timeout=300,
        )
    except (RuntimeError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        raise UsageError(f"the processes of the run did not meet: {line}") from None


@contextlib.contextmanager
def noticing_lost() -> Iterator[None]:
    """Raise `Lost` for an error of the communication between the processes of a run.

    JAX itself ends the process, from C++, where it is the first to notice.
    """
    try:
        yield
    except (
        RuntimeError,
        ValueError,
        OSError,
    ) as error:  # of JAX, or wrapped by Orbax
        pattern = _BY_JAX if isinstance(error, jax.errors.JaxRuntimeError) else _BY_ANYONE
        if several() and pattern.search(str(error)):
            raise Lost from None
        raise


@contextlib.contextmanager
def telling_errors(
    describe: Callable[[Exception], tuple[int, str]], end: Callable[[int, str], None]
) -> Iterator[None]:
    """Tell the other processes of a run of an error in this one, and end this one for an error of theirs.

    Without it they would wait for this one, and learn no more than that it is gone.

    Args:
      describe: returns the exit status for an error, and its text.
      end: ends this process, with an exit status and a line; called in a thread of its own.
    """
    client = _client() if several() else None
    if client is None:
        yield
        return
    over = threading.Event()
    listener = threading.Thread(target=_listen, args=(client, over, end), daemon=True)
    listener.start()
    try:
        yield
    except Lost:
        listener.join(_NOTICED)  # the other one may have said why
        raise
    except Exception as error:
        over.set()
        if not isinstance(error, Stopped):  # which comes to every process
            status, text = describe(error)
            _tell(client, f"{status} process {jax.process_index()} of the run ended: {text}")
        raise
    finally:
        over.set()
        listener.join(_HEARD)  # does not return, if it ends this process


def _client() -> Any:
    """Return the client of JAX's key-value store, which has no public name; None without it."""
    try:
        from jax._src import distributed

        return distributed.global_state.client
    except (ImportError, AttributeError):
        return None


def _tell(client: Any, said: str) -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was first, or is lost
        client.key_value_set(_ENDED, said.splitlines()[0][:_LETTERS])
    _wait_until_heard(client)


def _listen(client: Any, over: threading.Event, end: Callable[[int, str], None]) -> None:
    while not over.wait(_EVERY):
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # there is no such key
            status, _, line = client.key_value_try_get(_ENDED).partition(" ")
            _wait_until_heard(client)
            end(int(status), line)


def _wait_until_heard(client: Any) -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # a process is lost, or has ended
        client.wait_at_barrier(_ENDED, int(_HEARD * 1000))
    if is_first():  # JAX ends at once those that miss it, from C++
        time.sleep(_LEFT)


def several() -> bool:
    """Return whether the run has several processes."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Return whether this process writes records, prints, and makes folders."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Wait until every process of the run is here."""
    if several():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def of_first(make: Callable[[], str]) -> str:
    """Return a text that the first process makes, in every process.

    Raises:
      Exception: what `make` raised, in the first process; in the others UsageError.
    """
    if not several():
        return make()
    from jax.experimental import multihost_utils

    text, error = "", None
    if is_first():
        try:
            text = make()
        except Exception as raised:  # noqa: BLE001  # after the others know
            error = raised
    sent = np.frombuffer(text.encode()[:_LETTERS].ljust(_LETTERS, b"\0"), np.uint8)
    got = multihost_utils.broadcast_one_to_all(sent)
    if error is not None:
        raise error
    text = bytes(np.asarray(got)).rstrip(b"\0").decode()
    if not text:
        raise UsageError("the first process of the run ended with an error; its line says why")
    return text


def total(count: int) -> int:
    """Return the sum of a number over the processes of the run; every one has to call this."""
    if not several():
        return count
    from jax.experimental import multihost_utils

    return int(np.sum(multihost_utils.process_allgather(np.int32(count))))


class StopTogether:
    """Asks between calls whether a signal ends the run, in all processes after the same call.

    Args:
      caught: the signals that came to this process; that of another process is added to it.
    """

    def __init__(self, caught: list[int]):
        self._caught, self._calls = caught, 0

    def __call__(self) -> bool:
        if not several():
            return bool(self._caught)
        from jax.experimental import multihost_utils

        self._calls += 1
        if not multihost_utils.reached_preemption_sync_point(self._calls):
            return False
        import signal

        if not self._caught:
            self._caught.append(int(signal.SIGTERM))
        return True
