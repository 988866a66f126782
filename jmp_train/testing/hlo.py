"""Operations of a compiled program, read from its text (HLO)."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator

from jmp_train._autocast.regions import module_path
from jmp_train._jaxpr.source import own_frame
from jmp_train.testing.operations import ArrayType, Operation, algorithm_dtype

#: Yields file, line and function of a stack frame, by its number, and of its callers.
Frames = Callable[[int], Iterator[tuple[str, int, str]]]

_NAMES = {"bf16": "bfloat16", "pred": "bool", "c64": "complex64", "c128": "complex128"}
_KINDS = {"f": "float", "s": "int", "u": "uint"}

_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>.*?) (?P<op>[a-z][\w\-]*)\((?P<rest>.*)$"
)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{$")
_TYPE = re.compile(r"\b([a-z]\w*)\[([\d,?<=]*)\]")  # a length may be unknown: `?`, `<=8`
_APPLIED = re.compile(r"\b(?:to_apply|scatter|select)=%?([\w.\-]+)")
_CALLED = re.compile(r"\b(?:to_apply|calls)=%?([\w.\-]+)")
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
# The names of transformations and of control flow that JAX puts among the modules.
_JIT = re.compile(r"\bp?jit\([^()]*\)")
_BODIES = re.compile(
    r"(?<![^/])(?:while|body|cond|closed_call|branch_\d+_fun|custom_[jv]\w+_call)(?![^/])"
)


def hlo_operations(text: str) -> list[Operation]:
    """Return the operations of a program's text, those of fusions included.

    The computations that a reduction or a sort applies to two numbers are left out.
    """
    lines = list(_instructions(text))
    types = {line["name"]: _types(line["type"]) for _, line in lines}
    bodies: dict[str, list[re.Match[str]]] = {}
    for computation, line in lines:
        bodies.setdefault(computation, []).append(line)
    applied = {name for _, line in lines for name in _applied(line)}
    frames = _frames(text)
    return [
        _operation(line, types, bodies, frames)
        for computation, line in lines
        if computation not in applied
    ]


def _instructions(text: str) -> Iterator[tuple[str, re.Match[str]]]:
    """Yield each instruction and the name of its computation."""
    computation = ""
    for line in text.splitlines():
        if started := _COMPUTATION.match(line):
            computation = started[1]
        elif found := _INSTRUCTION.match(line):
            yield computation, found


def _applied(line: re.Match[str]) -> list[str]:
    """Return the computations that an instruction applies to two numbers."""
    return [] if line["op"] in ("call", "call-start") else _APPLIED.findall(line["rest"])


def _operation(
    line: re.Match[str],
    types: dict[str, tuple[ArrayType, ...]],
    bodies: dict[str, list[re.Match[str]]],
    frames: Frames,
) -> Operation:
    operands, attributes = _split(line["rest"])
    read = re.findall(r"%([\w.\-]+)", operands) or re.findall(r"([\w.\-]+)(?:,|$)", operands)
    named = dict(re.findall(r'(op_name|custom_call_target)="([^"]*)"', attributes))
    *scopes, primitive = named.get("op_name", "").split("/")
    combiner = {
        (op["op"], t.dtype)
        for name in _applied(line)
        for op in _body(name, bodies)
        for t in _types(op["type"])
        if t.is_floating
    }
    algorithm = re.search(r"algorithm=dot_(\w+)", attributes)
    return Operation(
        name=named.get("custom_call_target", line["op"]),
        operands=tuple(t for name in read for t in types.get(name, ())[:1]),
        results=types[line["name"]],
        primitive=primitive,
        algorithm=algorithm_dtype(algorithm[1]) if algorithm else "",
        combines=frozenset(name for name, _ in combiner),
        combined=frozenset(dtype for _, dtype in combiner),
        module=module_path(_BODIES.sub("", _JIT.sub("", "/".join(scopes)))),
        source=_source(attributes, frames),
    )


def _body(name: str, bodies: dict[str, list[re.Match[str]]]) -> Iterator[re.Match[str]]:
    """Yield the instructions of a computation and of those that it calls."""
    for line in bodies.get(name, ()):
        yield line
        for called in _CALLED.findall(line["rest"]):
            yield from _body(called, bodies)


def _types(text: str) -> tuple[ArrayType, ...]:
    return tuple(
        ArrayType(_dtype(name), tuple(int(n) if n.isdigit() else n for n in shape.split(",") if n))
        for name, shape in _TYPE.findall(text)
    )


def _dtype(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    narrow = re.fullmatch(r"f(\d)(e\w+)", name)
    if narrow:
        return f"float{narrow[1]}_{narrow[2]}"
    plain = re.fullmatch(r"([fsu])(\d+)", name)
    return f"{_KINDS[plain[1]]}{plain[2]}" if plain else name


def _split(rest: str) -> tuple[str, str]:
    """Return what is in the operation's parentheses, and the attributes that follow."""
    depth = 1
    for i, char in enumerate(rest):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return rest[:i], rest[i + 1 :]
    return rest, ""


def _frames(text: str) -> Frames:
    """Return a function that yields file, line and function of a stack frame and of its callers."""
    files, functions, places, stack = map(functools.partial(_table, text), _TABLES)
    # XLA writes the parents from 1 or from 0; the first frame has none.
    first = _numbers(stack.get("1", "")).get("parent_frame_id", 0)

    def frames(frame: int) -> Iterator[tuple[str, int, str]]:
        seen: set[int] = set()
        while str(frame) in stack and frame not in seen:
            seen.add(frame)
            entry = _numbers(stack[str(frame)])
            place = _numbers(places[str(entry["file_location_id"])])
            file, function = (
                files[str(place["file_name_id"])],
                functions[str(place["function_name_id"])],
            )
            yield file.strip('"'), place["line"], function.strip('"')
            frame = entry.get("parent_frame_id", 0) - first

    return frames


def _table(text: str, name: str) -> dict[str, str]:
    table = re.search(rf"^{name}\n((?:\d+ .*\n)+)", text, re.MULTILINE)
    return dict(re.findall(r"^(\d+) (.*)$", table[1], re.MULTILINE)) if table else {}


def _numbers(entry: str) -> dict[str, int]:
    return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", entry)}


def _source(attributes: str, frames: Frames) -> str:
    frame = re.search(r"stack_frame_id=(\d+)", attributes)
    found = list(frames(int(frame[1]))) if frame else []
    file = re.search(r'source_file="([^"]*)" source_line=(\d+)', attributes)
    if file and not found:
        return f"{file[1]}:{file[2]}"
    place = own_frame(found, lambda place: place[0]) or next(iter(found), None)
    return f"{place[0]}:{place[1]} ({place[2]})" if place else ""
