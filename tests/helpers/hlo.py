"""Reads the text of compiled programs: custom calls and all-reduces."""

import collections
import math
import re

from jmp_train.plan.program import Program


def custom_calls(text):
    """Return the targets of a program's custom calls."""
    return set(re.findall(r'custom_call_target="([^"]+)"', text))


def all_reduced(text):
    """Return how many numbers a program all-reduces, by dtype."""
    counts = collections.Counter()
    for kind, dtype, dims, times in sent_arrays(Program(text)):
        if kind == "all-reduce":
            counts[dtype] += math.prod(dims) * times
    return counts


def product_flops(program):
    """Return the operations of the products of a `Program` on one device; loops count each step."""
    total = 0
    for name, items in program._computations.items():
        shapes = {item.name: _dims(item.shape) for item in items}
        for item in items:
            if item.operation == "dot":
                left = shapes[re.findall(r"%([\w.$-]+)", item.rest)[0]]
                summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", item.rest)[1]
                inner = math.prod(left[int(i)] for i in summed.split(",") if i)
                total += 2 * math.prod(_dims(item.shape)) * inner * program._runs[name]
    return total


def sent_arrays(program):
    """Return (kind, dtype, dimensions, number of times) of each array that collectives return."""
    found = []
    for name, items in program._computations.items():
        for item in items:
            times = program._runs[name]
            if item.kind not in COLLECTIVES or not times:
                continue
            arrays = re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", item.result)
            found += [
                (item.kind, d, tuple(int(n) for n in s.split(",") if n), times) for d, s in arrays
            ]
    return found


COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def _dims(shape):
    return [int(n) for n in re.search(r"\[([\d,]*)\]", shape)[1].split(",") if n]
