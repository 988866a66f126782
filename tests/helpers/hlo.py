"""Reads the text of compiled programs: custom calls and all-reduces."""

import math
import re


def custom_calls(text):
    """Return the targets of a program's custom calls."""
    return set(re.findall(r'custom_call_target="([^"]+)"', text))


def all_reduced(text):
    """Return how many numbers a program all-reduces, by dtype."""
    counts = {}
    for line in re.findall(r"= (.*?) all-reduce(?:-start)?\(", text):
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", line):
            size = math.prod(int(n) for n in shape.split(",") if n)
            counts[dtype] = counts.get(dtype, 0) + size
    return counts
