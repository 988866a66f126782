"""Orbax's messages are dropped while it reads, and those of others are not."""

import asyncio
import gc
import logging
import sys
import types

import pytest

from jmp_train.records.orbax_messages import cause, quiet_orbax


def record(logger, path, error=None):
    exc_info = (type(error), error, error.__traceback__) if error else None
    return logging.LogRecord(logger, logging.ERROR, path, 1, "text", None, exc_info)


def passes(logger, path, error=None):
    made = record(logger, path, error)
    return bool(logging.getLogger(logger).filter(made))


def unraisable(value, of):
    return types.SimpleNamespace(
        exc_type=type(value), exc_value=value, exc_traceback=None, err_msg=None, object=of
    )


@pytest.fixture
def printed(monkeypatch):
    found = []
    monkeypatch.setattr(sys, "unraisablehook", found.append)
    monkeypatch.setattr(logging.getLogger("asyncio"), "filters", [])  # those of earlier errors stay
    return found


def coroutine_of(path):
    scope = {}
    exec(compile("async def read(): pass", path, "exec"), scope)  # noqa: S102
    return scope["read"]()


CLOSED = RuntimeError("Event loop is closed")
LOST = ValueError("Error opening driver [tensorstore_spec]")


def test_only_messages_of_orbax_are_dropped_while_it_reads(printed):
    with quiet_orbax():
        assert not passes("absl", "/lib/orbax/handler.py")
        assert passes("absl", "/lib/other/handler.py")
        assert not passes("asyncio", "/lib/asyncio/events.py", LOST)
        assert passes("asyncio", "/lib/asyncio/events.py", ValueError("mine"))
        assert passes("asyncio", "/lib/asyncio/events.py")
        assert passes("jmp_train", "/lib/jmp_train/records/checkpoints.py")
        sys.unraisablehook(unraisable(CLOSED, None))
        assert not printed
        sys.unraisablehook(unraisable(ValueError("mine"), None))
        sys.unraisablehook(unraisable(CLOSED, "another object"))
        assert len(printed) == 2
    assert passes("absl", "/lib/orbax/handler.py")
    assert passes("asyncio", "/lib/asyncio/events.py", LOST)
    sys.unraisablehook(unraisable(CLOSED, None))
    assert len(printed) == 3


def test_coroutines_of_orbax_alone_are_silent(printed):
    for path, count in (("/lib/orbax/read.py", 0), ("/lib/mine/read.py", 1)):
        coroutine = coroutine_of(path)
        with quiet_orbax():
            sys.unraisablehook(unraisable(ValueError("text"), coroutine))
        coroutine.close()
        assert len(printed) == count


def test_after_an_error_reads_that_end_later_are_silent(printed):
    with pytest.raises(KeyError), quiet_orbax():
        raise KeyError("damaged")
    sys.unraisablehook(unraisable(CLOSED, None))
    assert not printed and not passes("asyncio", "/lib/asyncio/events.py", LOST)
    assert passes("asyncio", "/lib/asyncio/events.py", ValueError("mine"))
    assert passes("absl", "/lib/orbax/handler.py")


def test_coroutines_that_an_error_keeps_are_collected_without_a_warning(printed, recwarn):
    def fails():
        kept = coroutine_of("/lib/orbax/read.py")
        raise ValueError("damaged", kept is None)

    with pytest.raises(ValueError, match="damaged"), quiet_orbax():
        fails()
    gc.collect()
    assert not list(recwarn) and not printed
    unfinished = coroutine_of("/lib/mine/read.py")
    del unfinished
    gc.collect()
    assert "was never awaited" in str(recwarn.pop(RuntimeWarning).message)


def test_cause_is_the_innermost_error_in_a_short_line():
    def wrapped(error):
        try:
            raise KeyError("a list of handlers") from error
        except KeyError as outer:
            return cause(outer)

    assert wrapped(ValueError("first\nsecond")) == "first"
    assert wrapped(OSError()) == "OSError"
    assert wrapped(ValueError("x" * 999)) == "x" * 237 + "..."
    assert wrapped(ValueError("names ['metrics']")) == "names ['metrics']"


def test_the_event_loop_still_reports_other_tasks(printed, caplog):
    async def lost():
        raise ValueError("mine")

    async def run():
        task = asyncio.ensure_future(lost())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        del task

    with quiet_orbax():
        asyncio.run(run())
        gc.collect()
    assert "Task exception was never retrieved" in caplog.text and "mine" in caplog.text
