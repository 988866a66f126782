"""Reads the text of compiled programs: the dtypes of matrix products, custom calls, all-reduces."""

import math
import re

_DEFINED = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = \(?([a-z]\w*)\[", re.MULTILINE)
_PRODUCT = re.compile(
    r"= \(?(\w+)\[[^=\n]* (?:dot\((?P<dot>[^)]*)\)"
    r"|custom-call\((?P<call>[^)]*)\), custom_call_target=\"__cublas\$)",
)


def products(text):
    """Return the operand dtypes of each matrix product of an optimised program.

    A product is a `dot`, inside a Triton or cuDNN fusion too, or a call of cuBLAS.
    """
    dtypes = dict(_DEFINED.findall(text))
    found = []
    for match in _PRODUCT.finditer(text):
        names = re.findall(r"%([\w.\-]+)", match["dot"] or match["call"])[:2]
        found.append(tuple(dtypes[name] for name in names))
    return found


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
