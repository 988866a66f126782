"""Where the axes of parameters lie on a mesh: rules over paths, and a default for every model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jmp_train.errors import nearest
from jmp_train.policy.patterns import check_matches, compiled, first_match
from jmp_train.types import PyTree

Annotation = str | tuple[str, ...] | None
"""Mesh axes of an axis of a parameter: one, several, or none."""
Annotations = Mapping[str, Sequence[Annotation]]
"""By the path of a parameter, the mesh axes of each of its axes."""

_ON_PARAMETERS = ("fsdp", "tensor")
_REPLICATED = "replicated"


class PlacementRule(NamedTuple):
    """A pattern for the paths of parameters, and the mesh axes of their last axes."""

    pattern: str
    axes: tuple[tuple[str, ...], ...] | None
    """For each of the last axes of a parameter, the mesh axes that it is split over; None: each device
    has the whole parameter."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """Ordered rules `PATTERN=AXES`; the first pattern that matches a parameter places it.

    The path of a parameter joins names with `/`, as in `blocks/attention/qkv/kernel`; patterns are those
    of `jmp_train.Rules`. AXES names the mesh axis of each of the last axes of a parameter, separated by
    commas: `tensor`, `fsdp`, `fsdp+tensor`, or `-` for none; `replicated` puts the whole parameter on
    each device. A parameter without `fsdp` in its rule, and one without a rule, is split by `fsdp` over
    its largest axis that divides; earlier axes win ties.

    Attributes:
      entries: the rules, each given as a string or as a `PlacementRule`.

    Raises:
      ValueError: for a string without `=`, an unknown axis, one that is there twice, or an invalid
        regular expression.

    >>> placement = Placement(["**/up/kernel=-,tensor", "**/down/kernel=tensor,-"])
    >>> placement.entries[0].axes
    ((), ('tensor',))
    """

    entries: tuple[PlacementRule, ...]

    def __init__(self, entries: Iterable[str | PlacementRule] = ()):
        entries = [entries] if isinstance(entries, str) else entries
        rules = tuple(_rule(entry) for entry in entries)
        for rule in rules:
            compiled(rule.pattern)
        object.__setattr__(self, "entries", rules)


class Placed(NamedTuple):
    """Where one parameter lies."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: P
    rule: str | None
    """The pattern of the rule; None for the default."""
    why: str
    """Why it is split, or is not, in a few words."""
    bytes: int
    """On each device."""


def place(
    params: PyTree,
    mesh: Mesh,
    placement: Placement | None = None,
    defaults: Sequence[str] = (),
    annotations: Annotations | None = None,
) -> tuple[Placed, ...]:
    """Return where each parameter lies on a mesh, in the order of `jax.tree.leaves`.

    Args:
      params: arrays, or their shapes and dtypes.
      mesh: a mesh with the axes of `AXES`.
      placement: rules; each has to match a parameter, and to divide those that it matches.
      defaults: rules as texts that the model brings; those that match nothing, or do not divide a
        parameter, are left out for it. Those that name `tensor` are for meshes with several devices on
        that axis.
      annotations: by the path of a parameter, the mesh axes of each of its axes, as Flax's metadata
        names them (`jmp_train.flax.annotations`). They come after `placement` and before `defaults`.

    Raises:
      ValueError: for a rule that matches no parameter, with the nearest paths; for a rule or an
        annotation that a parameter's axes do not fit, and for an annotation with another name than
        those of mesh axes for parameters.

    >>> mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"))
    >>> params = {"kernel": jax.ShapeDtypeStruct((8, 32), "float32")}
    >>> tuple(place(params, mesh)[0].spec)
    (None, 'fsdp')
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    rules = [] if placement is None else list(placement.entries)
    check_matches({rule.pattern: "" for rule in rules}, paths, "parameter")
    own = [rule for rule in Placement(defaults).entries if _applies(rule, mesh)]
    placed = []
    for path, (_, leaf) in zip(paths, leaves, strict=True):
        shape = tuple(leaf.shape)
        index = first_match([rule.pattern for rule in rules], path)
        rule = None if index is None else rules[index]
        if rule is None and annotations and path in annotations:
            axes, why = _annotated(path, annotations[path], shape, mesh)
            pattern = None
        elif rule is None:
            index = first_match([r.pattern for r in own], path)
            default = None if index is None else own[index]
            fits = default is not None and _misfit(default, shape, mesh) == ""
            axes, why = _split(default.axes if default and fits else (), shape, mesh)
            pattern = default.pattern if default and fits else None
        else:
            misfit = _misfit(rule, shape, mesh)
            if misfit:
                raise ValueError(
                    f"the placement {rule.pattern!r} does not fit {path!r}, of shape {shape}: {misfit}"
                )
            axes, why = _split(rule.axes, shape, mesh)
            pattern = rule.pattern
        parts = math.prod(mesh.shape[axis] for names in axes for axis in names)
        size = math.prod(shape) * leaf.dtype.itemsize
        spec = P(*(names[0] if len(names) == 1 else (names or None) for names in axes))
        placed.append(Placed(path, shape, str(leaf.dtype), spec, pattern, why, size // parts))
    return tuple(placed)


def shardings_of(params: PyTree, placed: Sequence[Placed], mesh: Mesh) -> PyTree:
    """Return the sharding of each parameter, in their structure."""
    shardings = [NamedSharding(mesh, p.spec) for p in placed]
    return jax.tree.unflatten(jax.tree.structure(params), shardings)


def _rule(entry: str | PlacementRule) -> PlacementRule:
    if isinstance(entry, PlacementRule):
        return entry
    if not isinstance(entry, str):
        raise ValueError(  # noqa: TRY004  (a value in an experiment, like any other)
            f"placement {entry!r} is a {type(entry).__name__}; expected a string 'pattern=axes'"
        )
    pattern, equals, text = (x.strip() for x in entry.rpartition("="))
    if not equals or not pattern:
        raise ValueError(f"placement {entry!r} has no axes; write it as 'pattern=axes'")
    if text == _REPLICATED:
        return PlacementRule(pattern, None)
    axes = tuple(_names(part.strip(), entry) for part in text.split(","))
    named = [axis for names in axes for axis in names]
    twice = [axis for axis in named if named.count(axis) > 1]
    if twice:
        raise ValueError(f"placement {entry!r} has {twice[0]} twice; expected once")
    return PlacementRule(pattern, axes)


def _names(text: str, entry: str) -> tuple[str, ...]:
    if text == "-":
        return ()
    names = tuple(name.strip() for name in text.split("+"))
    for name in names:
        if name not in _ON_PARAMETERS:
            choices = (*_ON_PARAMETERS, "-", _REPLICATED)
            raise ValueError(f"placement {entry!r} has the axis {name!r}; {nearest(name, choices)}")
    return names


def _annotated(
    path: str, entries: Sequence[Annotation], shape: tuple[int, ...], mesh: Mesh
) -> tuple[list[tuple[str, ...]], str]:
    """Return the mesh axes of each axis of an annotated parameter, with `fsdp` added, and why.

    Raises:
      ValueError: for an annotation that does not fit.
    """
    if len(entries) != len(shape):
        raise ValueError(
            f"the annotation of parameter {path!r} has {len(entries)} names, and its shape {shape} has "
            f"{len(shape)} axes; expected a name or None for each"
        )
    axes = tuple((e,) if isinstance(e, str) else tuple(e or ()) for e in entries)
    named = [name for names in axes for name in names]
    for name in named:
        if name not in _ON_PARAMETERS:
            hint = nearest(name, _ON_PARAMETERS) if isinstance(name, str) else "expected a name"
            raise ValueError(
                f"the annotation of parameter {path!r} has the name {name!r}; {hint}, None, or a name "
                "that Flax's logical axis rules make one of them"
            )
        if named.count(name) > 1:
            raise ValueError(
                f"the annotation of parameter {path!r} has {name} twice; expected once"
            )
    misfit = _misfit(PlacementRule("", axes), shape, mesh)
    if misfit:
        raise ValueError(
            f"the annotation of parameter {path!r}, of shape {shape}, does not fit: {misfit}"
        )
    return _split(axes, shape, mesh)[0], "annotation"


def _applies(rule: PlacementRule, mesh: Mesh) -> bool:
    """Return whether a rule of a model is meant for a mesh."""
    return mesh.shape["tensor"] > 1 or not any("tensor" in names for names in rule.axes or ())


def _misfit(rule: PlacementRule, shape: tuple[int, ...], mesh: Mesh) -> str:
    """Return why a rule does not fit a shape; "" if it does."""
    if rule.axes is None:
        return ""
    if len(rule.axes) > len(shape):
        return f"it has {len(rule.axes)} axes; expected at most {len(shape)}"
    for size, names in zip(shape[len(shape) - len(rule.axes) :], rule.axes, strict=True):
        parts = math.prod(mesh.shape[name] for name in names)
        if size % parts:
            return f"{size} is not a multiple of {'+'.join(names)}={parts}"
    return ""


def _split(
    axes: tuple[tuple[str, ...], ...] | None, shape: tuple[int, ...], mesh: Mesh
) -> tuple[list[tuple[str, ...]], str]:
    """Return the mesh axes of each axis of a shape, with `fsdp` added, and why."""
    if axes is None:
        return [() for _ in shape], _REPLICATED
    full = [*([()] * (len(shape) - len(axes))), *axes]
    if any("fsdp" in names for names in full):
        return full, "by its rule"
    parts = mesh.shape["fsdp"]
    left = [
        size // math.prod(mesh.shape[name] for name in names)
        for size, names in zip(shape, full, strict=True)
    ]
    fitting = [i for i, size in enumerate(left) if size % parts == 0 and size >= parts]
    if not fitting:
        return full, f"no axis is a multiple of fsdp={parts}"
    # A free axis first: one that `tensor` splits too would be gathered in smaller pieces.
    free = [all(mesh.shape[name] == 1 for name in names) for names in full]
    largest = max(fitting, key=lambda i: (free[i], left[i], -i))
    full[largest] = ("fsdp", *full[largest])
    return full, "the largest axis that divides"


def table(placed: Sequence[Placed]) -> str:
    """Return the placement of parameters as a table."""
    rows = [("parameter", "shape", "dtype", "placement", "rule", "bytes per device")]
    for p in placed:
        spec = ",".join(
            "-" if a is None else "+".join(a) if isinstance(a, tuple) else a for a in p.spec
        )
        replicated = not any(p.spec)
        rows.append(
            (p.path, "x".join(map(str, p.shape)), p.dtype, _REPLICATED if replicated else spec,
             p.rule or p.why, f"{p.bytes:,}")
        )  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if i == len(widths) - 1 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join(lines)
