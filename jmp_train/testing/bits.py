"""An assertion that two trees are the same to the bit."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmp_train.testing.operations import report
from jmp_train.tree import path_name
from jmp_train.types import PyTree

# Codes of `np.longdouble` and its complex numbers: x86 keeps 10 bytes in 16.
_PADDED = ("g", "G")


def assert_same_bits(a: PyTree, b: PyTree) -> None:
    """Assert that two pytrees have one structure, and leaves of one dtype, shape and bit pattern.

    -0.0 differs from 0.0, and a NaN equals a NaN with the same payload alone. PRNG keys are
    compared with their implementation. JAX and NumPy arrays and Python numbers are compared as
    arrays; other leaves, Python integers above 64 bits and elements of object arrays by `==`.

    Args:
      a, b: pytrees of arrays, neither `jax.ShapeDtypeStruct`s, which have no bits, nor
        `np.longdouble`s, whose padding is arbitrary.

    Raises:
      AssertionError: with the path of each leaf that differs, the first index, both values and bit
        patterns, and how many elements differ; the first ten leaves are listed. Also if the trees have
        no leaves, because then there is nothing to compare.
      TypeError: for a leaf without bits to compare.

    >>> assert_same_bits({"w": np.float32([1, np.nan])}, {"w": np.float32([1, np.nan])})
    >>> assert_same_bits({"w": np.float16(0.0)}, {"w": np.float16(-0.0)})
    Traceback (most recent call last):
    AssertionError: assert_same_bits failed: expected the same bits, found 1 of 1 leaves that differ:
      w: 0.0 (0x0000) and -0.0 (0x8000)
    """
    leaves = jax.tree_util.tree_leaves_with_path(a)
    others = jax.tree_util.tree_leaves_with_path(b)
    if jax.tree.structure(a) != jax.tree.structure(b):
        raise _other_structure(a, b)
    if not leaves:
        raise AssertionError(
            "assert_same_bits failed: found nothing to compare, no tree has a leaf"
        )
    found: list[str] = []
    for (path, x), (_, y) in zip(leaves, others, strict=True):
        name = path_name(path) or "the value"
        _refuse_without_bits(name, x)
        _refuse_without_bits(name, y)
        found += [f"{name}: {difference}" for difference in _differences(x, y)]
    if found:
        some = f"{len(found)} of {len(leaves)} leaves that differ"
        raise report("assert_same_bits", "the same bits", some, found)


def _other_structure(a: PyTree, b: PyTree) -> AssertionError:
    names = [
        {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (a, b)
    ]
    found = [f"{name}: only in the first tree" for name in sorted(names[0] - names[1])]
    found += [f"{name}: only in the second tree" for name in sorted(names[1] - names[0])]
    found = found or [f"{jax.tree.structure(a)} and {jax.tree.structure(b)}"]
    return report("assert_same_bits", "the same structure", "others", found)


def _refuse_without_bits(name: str, x: Any) -> None:
    if isinstance(x, jax.ShapeDtypeStruct):
        raise TypeError(f"{name} is a ShapeDtypeStruct, which has no bits; expected an array")
    if isinstance(x, (np.ndarray, np.generic)) and x.dtype.char in _PADDED:
        raise TypeError(f"{name} is {x.dtype}, whose bytes may be padded; expected float64")


def _differences(x: Any, y: Any) -> Iterator[str]:
    """Yield a description of the difference of two leaves, if there is one."""
    kinds = [_kind(x), _kind(y)]
    if kinds[0] != kinds[1]:
        yield f"{kinds[0]} and {kinds[1]}"
    elif not _is_array(x):
        if not _equal(x, y):
            yield f"{x!r} and {y!r}"
    else:
        arrays = _array(x), _array(y)
        has_objects = arrays[0].dtype.hasobject
        yield from _differing_objects(*arrays) if has_objects else _differing_bits(*arrays)


def _is_array(x: Any) -> bool:
    if isinstance(x, int) and not -(2**63) <= x < 2**64:  # no NumPy integer is as wide
        return False
    return isinstance(x, (jax.Array, np.ndarray, np.generic, bool, int, float, complex))


def _equal(x: Any, y: Any) -> bool:
    return bool(np.all(x == y))  # `==` of some types returns an array


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _array(x: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(x) if _is_key(x) else x)


def _kind(x: Any) -> str:
    """Return the dtype and shape of an array, the type of another object."""
    if not _is_array(x):
        return type(x).__name__
    x = x if _is_key(x) else np.asarray(x)
    return f"{x.dtype}[{','.join(map(str, x.shape))}]"


def _differing_objects(x: np.ndarray, y: np.ndarray) -> Iterator[str]:
    differing = [i for i in np.ndindex(x.shape) if not _equal(x[i], y[i])]
    if differing:
        first = differing[0]
        count = f"; {len(differing)} of {x.size} elements differ" if x.size > 1 else ""
        yield f"[{', '.join(map(str, first))}] {x[first]!r} and {y[first]!r}{count}"


def _differing_bits(x: np.ndarray, y: np.ndarray) -> Iterator[str]:
    patterns = [np.frombuffer(z.tobytes(), np.uint8).reshape(z.size, z.itemsize) for z in (x, y)]
    (differing,) = (patterns[0] != patterns[1]).any(axis=1).nonzero()
    if not differing.size:
        return
    first = int(differing[0])
    index = ", ".join(map(str, np.unravel_index(first, x.shape)))
    shown = [
        f"{z.reshape(-1)[first]!s} (0x{int.from_bytes(p[first].tobytes(), sys.byteorder):0{2 * z.itemsize}x})"
        for z, p in zip((x, y), patterns, strict=True)
    ]
    count = f"; {differing.size} of {x.size} elements differ" if x.size > 1 else ""
    yield f"{f'[{index}] ' if index else ''}{' and '.join(shown)}{count}"
