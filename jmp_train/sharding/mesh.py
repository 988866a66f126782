"""Meshes: how many devices share the batch, the parameters and the products."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jmp_train.errors import nearest

AXES = ("data", "fsdp", "tensor")
"""Axes of a mesh, the slowest links first.

data: each device has all parameters, and a share of the batch.
fsdp: each device has a share of the parameters, which are gathered for use, and of the batch.
tensor: each device has a share of the parameters, and computes a share of their products.
"""

BATCH_AXES = ("data", "fsdp")
"""Axes that a batch is split over."""


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Numbers of devices on the axes of a mesh; one of them may be -1, for all that are left.

    >>> MeshShape.parse("data=2,fsdp=-1").on(8)
    MeshShape(data=2, fsdp=4, tensor=1)
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.astuple(self)
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(
                f"a mesh has the sizes {', '.join(map(str, sizes))}; expected numbers from 1, and one of -1 "
                "at most"
            )

    @classmethod
    def parse(cls, text: str) -> MeshShape:
        """Return the shape of a text such as "data=2,fsdp=4"; "" is that of "data=-1".

        Raises:
          ValueError: for an unknown or repeated axis, or an invalid size.
        """
        sizes: dict[str, int] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            axis, equals, size = (x.strip() for x in part.partition("="))
            if axis not in AXES:
                raise ValueError(f"mesh is {text!r}, with the axis {axis!r}; {nearest(axis, AXES)}")
            if axis in sizes:
                raise ValueError(f"mesh is {text!r}, with two sizes of {axis}; expected one")
            try:
                sizes[axis] = int(size) if equals else 0
            except ValueError:
                sizes[axis] = 0
            if sizes[axis] < 1 and sizes[axis] != -1:
                raise ValueError(
                    f"mesh is {text!r}; expected AXIS=NUMBER, such as {axis}=2, or {axis}=-1 for all "
                    "devices that are left"
                )
        if list(sizes.values()).count(-1) > 1:
            raise ValueError(f"mesh is {text!r}; expected one size of -1 at most")
        return cls(**(sizes or {"data": -1}))

    def on(self, devices: int) -> MeshShape:
        """Return the shape on a number of devices, without -1.

        Raises:
          ValueError: if the shape does not take all of them.
        """
        sizes = dataclasses.asdict(self)
        known = math.prod(size for size in sizes.values() if size != -1)
        free = [axis for axis, size in sizes.items() if size == -1]
        if devices % known or (not free and known != devices):
            fill = f"data={devices // known}, or " if not devices % known and not free else ""
            raise ValueError(
                f"mesh is {self}, of {'a multiple of ' * bool(free)}{known} devices, and there are "
                f"{devices}; expected {fill}sizes whose product is {devices}"
            )
        return dataclasses.replace(self, **{axis: devices // known for axis in free})

    @property
    def shards(self) -> int:
        """Number of parts that a batch is split into."""
        return self.data * self.fsdp

    def __str__(self) -> str:
        sizes = {k: v for k, v in dataclasses.asdict(self).items() if v != 1}
        return ",".join(f"{axis}={size}" for axis, size in sizes.items()) or "data=1"


def make_mesh(shape: MeshShape | str = "", devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh of a shape, with all axes of `AXES`.

    Args:
      shape: a `MeshShape`, or a text such as "data=2,fsdp=4"; "" puts all devices on `data`.
      devices: the devices; None takes those of all processes.

    Raises:
      ValueError: for an invalid text, or if the sizes do not multiply to the number of devices.

    >>> dict(make_mesh("data=1", jax.devices()[:1]).shape)
    {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = MeshShape.parse(shape) if isinstance(shape, str) else shape
    sizes = dataclasses.astuple(shape.on(len(devices)))
    kinds = (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(sizes, AXES, axis_types=kinds, devices=devices)
    except NotImplementedError:  # from JAX: the sizes split an axis of a TPU's torus
        # As data=8,fsdp=8 does on 4 x 4 x 4.
        placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(placed, AXES, axis_types=kinds)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array of which each device has a copy."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Return the sharding of the arrays of a batch, whose axis of examples has this index."""
    return NamedSharding(mesh, P(*[None] * axis, BATCH_AXES))
