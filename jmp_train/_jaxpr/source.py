"""Source lines of equations: the user's line, outside JAX, Flax and this package's machinery.

Libraries are known by where they are installed, and this package by where this file lies, so that
neither the name of a room nor the kind of installation matters.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jax.extend import source_info_util

from jmp_train._jaxpr.compat import Equation

#: Rooms of this package that contain networks and losses, as a user's code does. Every other room
#: is machinery, whose lines say nothing about the network that it runs.
NETWORK_ROOMS = frozenset({"models", "tasks"})
_LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "optax")
# The names of code that a user types into a shell, a notebook or a docstring: `<ipython-input-2-a1>`.
_TYPED = re.compile(r"<(stdin|console|doctest |\w+-input-)")
#: The name of the code of `python -c` and `exec`, and also of what `dataclasses` and others generate.
STRING = "<string>"


def source_line(eqn: Equation) -> str:
    """Return where an equation was written: `path/file.py:12:4 (function)`, as JAX prints it."""
    return source_info_util.summarize(eqn.source_info)


def user_line(eqn: Equation, callers: Sequence[Any] = ()) -> str:
    """Return `path/file.py:12 (function)` of the innermost frame that is the user's.

    Frames of Python's standard library, NumPy, JAX, Flax, Optax and this package's machinery are passed
    over, and so are those of every installed package where a frame outside exists. Where no other frame
    exists, the line is that of `source_line`.

    Args:
      callers: tracebacks of the equations whose bodies contain it, the innermost first, as a `Place`
        has them. JAX ends the traceback of an equation at the body that contains it.
    """
    return own_line(eqn, callers) or source_line(eqn)


def own_line(eqn: Equation, callers: Sequence[Any] = ()) -> str:
    """Return the user's line as `user_line` does, '' where no frame is the user's."""
    frame = own_frame(_frames(eqn, callers), lambda frame: frame.file_name)
    return f"{frame.file_name}:{frame.line_num} ({frame.function_name})" if frame else ""


def _frames(eqn: Equation, callers: Sequence[Any]) -> list[Any]:
    """Return the frames of an equation and of its callers, the innermost first."""
    stacks = (eqn.source_info.traceback, *callers)
    return [frame for stack in stacks for frame in getattr(stack, "frames", ())]


def own_frame(frames: Iterable[Any], file_of: Callable[[Any], str]) -> Any:
    """Return the innermost frame that is the user's, None where there is none.

    It is the first one outside installed packages, such as Equinox or Haiku. Where every frame is in
    an installed package, as of a user's own that is installed, it is the first in a `<string>`, as of
    `python -c`, or else the first outside the libraries that `is_library` knows.

    Args:
      frames: the innermost first.
      file_of: returns the file of a frame.
    """
    frames = list(frames)
    own = [frame for frame in frames if not is_library(file_of(frame))]
    outside = [frame for frame in own if not is_installed(file_of(frame))]
    strings = [frame for frame in frames if file_of(frame) == STRING]
    return next(iter([*outside, *strings, *own]), None)


@functools.lru_cache(maxsize=1024)
def is_installed(file: str) -> bool:
    """Return whether a file was installed: it is in a package other than this one, or a command."""
    if _parts_below(_PACKAGE, file):
        return False
    parts = os.path.normpath(file).split(os.sep)
    is_command = bool(_parts_below(sysconfig.get_path("scripts"), file))
    return is_command or any(part in _INSTALLED for part in parts)


@functools.lru_cache(maxsize=1024)
def is_library(file: str) -> bool:
    """Return whether a file belongs to a library, to this package's machinery or to no file.

    Code without a file is the user's where its name says that it was typed.
    """
    if file.startswith("<"):
        return not _TYPED.match(file)
    inside = _parts_below(_PACKAGE, file)
    if inside:
        return inside[0] not in NETWORK_ROOMS
    if any(_parts_below(root, file) for root in _library_roots(*_LIBRARIES)):
        return True
    return is_standard_library(file)


@functools.lru_cache(maxsize=1024)
def is_standard_library(file: str) -> bool:
    """Return whether a file belongs to Python's standard library."""
    inside = _parts_below(_STANDARD_LIBRARY, file)
    return bool(inside) and inside[0] not in _INSTALLED


_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_INSTALLED = ("site-packages", "dist-packages")
_STANDARD_LIBRARY = sysconfig.get_path("stdlib")


@functools.cache
def _library_roots(*names: str) -> tuple[str, ...]:
    """Return the folders that libraries are imported from."""
    specs = [importlib.util.find_spec(name) for name in names]
    return tuple(root for spec in specs if spec for root in spec.submodule_search_locations or ())


def _parts_below(root: str, file: str) -> list[str]:
    """Return the parts of a file's path below a folder, [] where it lies elsewhere."""
    root, file = os.path.normcase(os.path.normpath(root)), os.path.normcase(os.path.normpath(file))
    prefix = root + os.sep
    return file[len(prefix) :].split(os.sep) if file.startswith(prefix) else []


def calling_classes(eqn: Equation, callers: Sequence[Any] = ()) -> str:
    """Return the classes whose `__call__` an equation was written in, outermost first: `Net/Linear`.

    They stand for the path of a module where the name stack has none, as in NNX. Classes of JAX and
    of this package's machinery are passed over. `callers` are as for `user_line`.
    """
    called = [
        frame.function_name.removesuffix(".__call__").rpartition(".")[2]
        for frame in _frames(eqn, callers)
        if frame.function_name.endswith(".__call__")
        and (not is_library(frame.file_name) or _is_flax(frame.file_name))
    ]
    return "/".join(reversed(called))


def _is_flax(file: str) -> bool:
    inside = [_parts_below(root, file) for root in _library_roots("flax")]
    # The classes of `nnx.jit` and `nnx.grad` are not modules.
    return any(parts and parts[:2] != ["nnx", "transforms"] for parts in inside)
