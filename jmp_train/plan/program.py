"""Reads an optimised program of XLA: its collectives, and the bytes that it moves."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f8e4m3fn": 8, "f8e5m2": 8, "s4": 4, "u4": 4, "token": 0}
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_FREE = frozenset(
    [
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "while",
        "conditional",
        "call",
        "async",
        "after-all",
        "iota",
    ]
)
_SLICES = ("dynamic-slice", "slice", "gather")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.$-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.$-]+) = (.*?) ([\w-]+)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")


class Instruction(NamedTuple):
    """An instruction of a computation."""

    name: str
    shape: str
    operation: str
    rest: str  # operands and attributes

    @property
    def kind(self) -> str:
        """The operation, which one that goes on beside others has between `-start` and `-done`."""
        return self.operation.removesuffix("-start")

    @property
    def result(self) -> str:
        """The shape of what it computes; that of a `-start` follows the shapes of its operands."""
        parts = _parts(self.shape) if self.operation != self.kind else []
        without_operands = self.kind == "all-reduce" and not self.shape.startswith("((")
        if len(parts) < 2 or without_operands:  # as jaxlib 0.10 has it
            return self.shape
        return parts[0 if self.kind == "copy" else 1]


@dataclasses.dataclass(frozen=True)
class Collective:
    """What collectives of a kind send in a step."""

    kind: str
    dtype: str
    devices: int
    """Number of devices that take part in each."""
    count: int
    """How often a step runs it."""
    bytes: int
    """Bytes of the whole arrays, gathered or before they are scattered, in all runs of a step."""
    hosts: int = 1
    """Number of hosts that these devices are on."""

    @property
    def sent(self) -> int:
        """Bytes that each device sends in a step, by rings."""
        if self.kind == "collective-permute":  # from one device to another
            return self.bytes
        share = (self.devices - 1) / self.devices
        return int(self.bytes * share * (2 if self.kind == "all-reduce" else 1))


class Program:
    """The computations of an optimised program, and how often a step runs each.

    Args:
      text: what `as_text()` of a compiled program returns.
      host: number of devices of a host, which follow each other; 0: all are on one host.
    """

    def __init__(self, text: str, host: int = 0):
        self._host = host
        self._computations: dict[str, list[Instruction]] = {}
        self._entry = ""
        partitions = re.search(r"num_partitions=(\d+)", text)
        self._partitions = int(partitions[1]) if partitions else 1
        current: list[Instruction] = []
        for line in text.splitlines():
            begins = _COMPUTATION.match(line)
            if begins:
                current = self._computations.setdefault(begins[2], [])
                self._entry = begins[2] if begins[1] else self._entry
            elif found := _INSTRUCTION.match(line):
                current.append(Instruction(*found.groups()))
        self._runs: Counter[str] = Counter()
        self._fused: set[str] = set()
        self._count(self._entry, 1)

    def _count(self, name: str, runs: int) -> None:
        self._runs[name] += runs
        for item in self._computations.get(name, ()):
            for kind, called in _called(item):
                if kind == "calls" and not item.operation.startswith("async"):
                    self._fused.add(called)
                if kind != "condition":
                    times = self._trips(item) if item.operation == "while" else 1
                    self._count(called, runs * times)

    def _trips(self, item: Instruction) -> int:
        """Return how often the body of a loop runs: as XLA notes it, or the constant that its condition
        compares with."""
        noted = re.search(r'known_trip_count"?:\s*\{"n":\s*"?(\d+)', item.rest)
        if noted:
            return int(noted[1])
        condition = dict(_called(item)).get("condition", "")
        numbers = [
            int(found[1])
            for inner in self._all(condition)
            if inner.operation == "constant" and (found := re.match(r"(\d+)\)", inner.rest))
        ]
        return max(numbers, default=1)

    def _all(self, name: str) -> Iterator[Instruction]:
        """Yield the instructions of a computation and of those that it calls."""
        for item in self._computations.get(name, ()):
            yield item
            for _, called in _called(item):
                yield from self._all(called)

    def collectives(self) -> list[Collective]:
        """Return what the collectives of a step send, the most bytes first."""
        count: Counter[tuple[str, str, int, int]] = Counter()
        sizes: Counter[tuple[str, str, int, int]] = Counter()
        seen: set[str] = set()
        for name, items in self._computations.items():
            for item in items:
                kind = item.kind
                if kind not in _COLLECTIVES or not self._runs[name]:
                    continue
                channel = re.search(r"channel_id=(\d+)", item.rest)
                if channel and channel[1] in seen:  # a TPU overlaps one with several computations
                    continue
                seen |= {channel[1]} if channel else set()
                groups = _groups(item.rest, self._partitions)
                devices, hosts = groups.shape[1], _most_hosts(groups, self._host)
                if devices == 1:
                    continue
                scattered = kind == "all-reduce" and name.startswith("all-reduce-scatter")
                own = "reduce-scatter" if scattered else kind
                arrays = _arrays(item.result)
                for dtype, size in arrays:
                    whole = size * devices if kind == "reduce-scatter" else size
                    sizes[own, dtype, devices, hosts] += whole * self._runs[name]
                for dtype in {dtype for dtype, _ in arrays}:
                    count[own, dtype, devices, hosts] += self._runs[name]
        found = [
            Collective(kind, dtype, n, count[kind, dtype, n, hosts], size, hosts)
            for (kind, dtype, n, hosts), size in sizes.items()
        ]
        return sorted(found, key=lambda c: -c.sent)

    def bytes_moved(self) -> int:
        """Return the bytes that the instructions of a step read and write.

        Of an array that is sliced, the slice counts; of one that is updated in place, the update.
        """
        total = 0
        for name, items in self._computations.items():
            if name in self._fused or not self._runs[name]:
                continue
            shapes = {item.name: item.shape for item in items}
            total += sum(self._moved(item, shapes) for item in items) * self._runs[name]
        return total

    def _moved(self, item: Instruction, shapes: dict[str, str]) -> int:
        """Return the bytes that an instruction reads and writes."""
        if item.kind in _FREE or item.operation.endswith(("-update", "-done")):
            return 0
        operands = _operands(item)
        sizes = [_bytes(shapes.get(operand, "")) for operand in operands]
        if item.kind == "dynamic-update-slice":
            return 2 * sizes[1]
        written = _bytes(item.result)
        if item.kind in _SLICES:
            return 2 * written
        inside = [name for kind, name in _called(item) if kind == "calls"]
        if item.kind == "fusion" and inside:
            sizes, written = self._moved_by_fusion(inside[0], sizes, written)
        read = dict(zip(operands, sizes, strict=False))  # one that is read twice is read once
        return sum(read.values()) + written

    def _moved_by_fusion(self, name: str, sizes: list[int], written: int) -> tuple[list[int], int]:
        """Return the bytes that a fusion reads of each operand, and those that it writes."""
        items = self._computations.get(name, [])
        by_name = {item.name: item for item in items}
        users: dict[str, list[Instruction]] = {}
        for item in items:
            for operand in _operands(item):
                users.setdefault(operand, []).append(item)
        updates = [item for item in items if item.operation == "dynamic-update-slice"]
        in_place = set()
        for update in updates:
            target, part = (_source(operand, by_name) for operand in _operands(update)[:2])
            whole, small = (
                _bytes(update.shape),
                _bytes(by_name[part].shape) if part in by_name else 0,
            )
            in_place.add(target)
            written -= whole - small
        for item in items:
            number = re.match(r"(\d+)\)", item.rest)
            if item.operation != "parameter" or not number or int(number[1]) >= len(sizes):
                continue
            uses = _uses(item.name, users)
            allowed = ("dynamic-update-slice",) if item.name in in_place else ()
            if uses and all(u.operation in (*_SLICES, *allowed) for u in uses):
                slices = sum(_bytes(u.shape) for u in uses if u.operation in _SLICES)
                sizes[int(number[1])] = min(sizes[int(number[1])], slices)  # an index is small
        return sizes, max(written, 0)


def _operands(item: Instruction) -> list[str]:
    return re.findall(r"%([\w.$-]+)", item.rest.partition("), ")[0])


def _uses(name: str, users: dict[str, list[Instruction]]) -> list[Instruction]:
    """Return what uses an instruction, past those that move nothing."""
    found = []
    for user in users.get(name, []):
        found += _uses(user.name, users) if user.operation in ("bitcast", "copy") else [user]
    return found


def _source(name: str, by_name: dict[str, Instruction]) -> str:
    """Return the instruction that a name stands for, past those that move nothing."""
    while name in by_name and by_name[name].operation in ("bitcast", "copy"):
        name = _operands(by_name[name])[0]
    return name


def _called(item: Instruction) -> list[tuple[str, str]]:
    """Return the computations that an instruction runs, and as what."""
    found = re.findall(r"\b(body|condition|calls|to_apply)=%?([\w.$-]+)", item.rest)
    if item.kind not in ("while", "fusion", "call", "async", "custom-call"):
        found = [(kind, name) for kind, name in found if kind == "calls"]
    branches = re.search(r"branch_computations=\{([^}]*)\}", item.rest)
    if branches:
        found += [("branch", name.strip().lstrip("%")) for name in branches[1].split(",")]
    for kind in ("true_computation", "false_computation"):
        found += [("branch", name) for name in re.findall(rf"{kind}=%?([\w.$-]+)", item.rest)]
    return found


def _parts(shape: str) -> list[str]:
    """Return the shapes that the shape of a tuple consists of."""
    parts, depth = [""], 0
    for char in shape[1:-1]:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and not depth:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts]


def _arrays(shape: str) -> list[tuple[str, int]]:
    """Return the dtype and the bytes of each array of a shape."""
    return [(dtype, _size(dtype, dims)) for dtype, dims, _ in _SHAPE.findall(shape)]


def _size(dtype: str, dims: str) -> int:
    digits = re.search(r"\d+", dtype)
    bits = _BITS.get(dtype, int(digits[0]) if digits else 8)
    return math.prod(int(n) for n in dims.split(",") if n) * bits // 8


def _bytes(shape: str) -> int:
    """Return the bytes of a shape; what a TPU keeps beside its processor, marked S, has none."""
    found = _SHAPE.findall(shape)
    return sum(_size(dtype, dims) for dtype, dims, layout in found if "S(" not in layout)


def _groups(attributes: str, partitions: int) -> np.ndarray:
    """Return the devices of each group of a collective, (groups, devices)."""
    axes = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S*)\))?\s*\{([^}]*)\}", attributes
    )
    if axes:
        named = re.findall(r"'([^']+)'=(\d+)", axes[1])
        names, sizes = [name for name, _ in named], [int(size) for _, size in named]
        chosen = [names.index(name) for name in re.findall(r"'([^']+)'", axes[3])]
        others = [i for i in range(len(names)) if i not in chosen]
        ids = _iota(axes[2] or f"[{math.prod(sizes)}]").reshape(sizes)
        return ids.transpose(*others, *chosen).reshape(-1, math.prod(sizes[i] for i in chosen))
    tiled = re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]*\](?:T\([\d,]*\))?)", attributes)
    if tiled:
        return _iota(tiled[3]).reshape(int(tiled[1]), int(tiled[2]))
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", attributes)
    if listed:
        return np.array([_numbers(group) for group in re.findall(r"\{([\d,]*)\}", listed[1])])
    return np.arange(partitions)[None]


def _iota(text: str) -> np.ndarray:
    """Return the numbers that a text such as [4,2]T(1,0) stands for: 0, 1, ... of a shape, transposed."""
    shape, _, order = text.partition("T")
    sizes = _numbers(shape.strip("[]"))
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return (ids.transpose(_numbers(order.strip("()"))) if order else ids).ravel()


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def _most_hosts(groups: np.ndarray, host: int) -> int:
    """Return the largest number of hosts that the devices of a group are on."""
    if not host:
        return 1
    hosts = np.sort(groups // host, axis=1)
    return 1 + int((np.diff(hosts, axis=1) != 0).sum(axis=1).max())
