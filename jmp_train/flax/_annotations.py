"""Flax's partitioning metadata: the axes of a mesh that a network names for its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from flax.core import meta
from flax.linen import LogicallyPartitioned, Partitioned, get_logical_axis_rules, spmd

from jmp_train.sharding.placement import Annotation, Annotations
from jmp_train.types import PyTree


def annotated_axes(network: Any) -> Annotations:
    """Return the mesh axes that a Flax network names for its parameters, for `Sharded(annotations=)`.

    Of NNX, they are the metadata of `nnx.with_partitioning(init, (None, "tensor"))`; of Linen, those of
    `nn.with_partitioning` and `nn.with_logical_partitioning`. Names that Flax's logical axis rules
    map, of the variable or of the context (`flax.linen.logical_axis_rules`), are replaced by the
    mesh axes of the rules.

    Args:
      network: an `nnx.Module`, or the variables or the parameters that `init` of a Linen module
        returned, or the shapes of either.

    Returns:
      By the path of a parameter, such as `up/kernel`, an entry for each of its axes: the name of a mesh
      axis, a tuple of names, or None. Parameters without metadata are left out.

    >>> init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "tensor"))
    >>> with nnx.use_eager_sharding(False):
    ...     net = nnx.Linear(4, 8, kernel_init=init, rngs=nnx.Rngs(0))
    >>> annotated_axes(net)
    {'kernel': (None, 'tensor')}
    """
    if isinstance(network, nnx.Module):
        return dict(_of_nnx(network))
    params = network.get("params", network) if isinstance(network, Mapping) else network
    return dict(_of_linen(params))


def unboxed(variables: PyTree) -> PyTree:
    """Return variables without the boxes of Linen's metadata."""

    def value(box: Any) -> Any:
        inner = box.value if isinstance(box, Partitioned) else box.unbox()
        return meta.map_axis_meta(value, inner)

    return meta.map_axis_meta(value, variables)


def without_eager_sharding(make: Callable[..., Any]) -> Callable[..., Any]:
    """Return a constructor whose annotated variables of NNX need no mesh while they are made."""

    def made(*args: Any, **kwargs: Any) -> Any:
        with nnx.use_eager_sharding(False):
            return make(*args, **kwargs)

    return made


def _of_nnx(module: nnx.Module) -> Iterator[tuple[str, tuple[Annotation, ...]]]:
    for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        metadata = variable.get_metadata()
        entries = _entries(metadata.get("out_sharding"))
        if entries is not None:
            own = metadata.get("sharding_rules")
            yield "/".join(map(str, path)), _resolved(entries, own)


def _of_linen(params: PyTree) -> Iterator[tuple[str, tuple[Annotation, ...]]]:
    boxed = jax.tree_util.tree_leaves_with_path(params, is_leaf=meta.is_axis_metadata)
    for path, x in boxed:
        if isinstance(x, Partitioned):
            own = x.rules if isinstance(x, LogicallyPartitioned) else None
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            yield name, _resolved(tuple(x.names), own)


def _entries(sharding: Any) -> tuple[Any, ...] | None:
    """Return the entries of metadata: names, a `PartitionSpec`, or a sharding that has one."""
    spec = getattr(sharding, "spec", sharding)
    return None if spec is None else tuple(spec)


def _resolved(entries: Sequence[Any], own: Any) -> tuple[Annotation, ...]:
    """Return entries with the mesh axes of logical names; names without a rule stay as they are."""
    rules = [*(get_logical_axis_rules() or ()), *(own or ())]
    logical = {name for name, _ in rules}
    if not any(isinstance(e, str) and e in logical for e in entries):
        return tuple(entries)
    found: Any = spmd.logical_to_mesh_axes([e if e in logical else None for e in entries], rules)
    return tuple(f if e in logical else e for e, f in zip(entries, found, strict=True))
