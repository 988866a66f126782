"""Steps whose parameters and batch are split over a mesh by the compiler."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jmp_train.numerics.dtypes import parse_dtype
from jmp_train.sharding.gather import gathering
from jmp_train.sharding.mesh import AXES, MeshShape, batch_sharding, replicated
from jmp_train.sharding.placement import Annotations, Placed, Placement, place, shardings_of
from jmp_train.sharding.state import follow
from jmp_train.types import DTypeLike, Function, PyTree

REDUCE_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Sharded:
    """A mesh whose devices share the parameters and each batch.

    For `make_step(parallel=)`. Parameters lie where the rules of a `Placement` say, and the state of the
    optimizer, averages and corrections with them. A batch is split over the axes `data` and `fsdp`. Where
    the loss function uses a parameter, it is gathered over `fsdp`, in the dtype of the compute. Means over
    a batch, of the loss or in BatchNorm, are those of the whole batch.

    Raises:
      ValueError: for a mesh with other axes than those of `AXES`.

    >>> sharded = Sharded(jax.make_mesh((1, 1, 1), AXES))
    >>> sharded.place({"w": jax.ShapeDtypeStruct((8, 2), "float32")})[0].bytes
    64
    """

    mesh: Mesh
    """A mesh of `make_mesh`."""
    placement: Placement = dataclasses.field(default_factory=Placement)
    """Rules of the user."""
    defaults: tuple[str, ...] = ()
    """Rules that the model brings; see `place`."""
    reduce_dtype: DTypeLike | None = None
    """Dtype of the sums of gradients over the devices: "float32", "bfloat16" or "float16"; None for that
    of the compute, in which the gradients are made."""
    annotations: Annotations = dataclasses.field(default_factory=dict, hash=False)
    """Mesh axes that the model names by Flax's metadata, of `jmp_train.flax.annotations`; see `place`."""

    def __post_init__(self) -> None:
        if not hasattr(self.mesh, "axis_names"):
            raise ValueError(
                f"mesh is {self.mesh!r}; expected a mesh of jmp_train.sharding.make_mesh"
            )
        if not isinstance(self.placement, Placement):
            object.__setattr__(self, "placement", Placement(self.placement))
        if tuple(self.mesh.axis_names) != AXES:
            raise ValueError(
                f"the mesh has the axes {', '.join(map(str, self.mesh.axis_names))}; expected "
                f"{', '.join(AXES)}, as of jmp_train.sharding.make_mesh"
            )
        if self.reduce_dtype is not None:
            dtype = parse_dtype(self.reduce_dtype)
            if dtype.name not in REDUCE_DTYPES:
                raise ValueError(
                    f"reduce_dtype is {self.reduce_dtype!r}; expected one of {', '.join(REDUCE_DTYPES)}"
                )
            object.__setattr__(self, "reduce_dtype", dtype)

    def __str__(self) -> str:
        sizes = {axis: size for axis, size in self.mesh.shape.items() if size > 1}
        return str(MeshShape(**sizes))

    @property
    def batch_shards(self) -> int:
        """Number of parts that a batch is split into."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def place(self, params: PyTree) -> tuple[Placed, ...]:
        """Return where each parameter lies, as `jmp_train.sharding.place` does."""
        return place(params, self.mesh, self.placement, self.defaults, self.annotations)

    def shardings(self, params: PyTree) -> PyTree:
        """Return the sharding of each parameter."""
        return shardings_of(params, self.place(params), self.mesh)

    def follow(self, tree: PyTree, params: PyTree) -> PyTree:
        """Return the shardings of a tree, such as a whole state, that follow its parameters."""
        return follow(tree, params, self.shardings(params), self.mesh)

    def gathering(self, function: Function) -> Function:
        """Return a function of parameters that gathers them where it uses them."""
        reduce = None if self.reduce_dtype is None else parse_dtype(self.reduce_dtype)
        specs_of = lambda params: jax.tree.map(lambda s: s.spec, self.shardings(params))
        function = gathering(function, specs_of, self.mesh, reduce)

        @functools.wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            with self.context():
                return function(*args, **kwargs)

        return inside

    def split(self, batch: PyTree, micro_batches: int = 1) -> PyTree:
        """Return a traced batch, split over the devices; numbers without axes are on each.

        Raises:
          ValueError: for a leaf that does not split, with its path.
        """
        parts = self.batch_shards * micro_batches
        sharding = batch_sharding(self.mesh)

        def one(path: Any, x: Any) -> Any:
            if jax.numpy.ndim(x) == 0:
                return x
            if x.shape[0] % parts:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                of = f"{self.batch_shards} devices" + (
                    f" x {micro_batches} micro-batches" if micro_batches > 1 else ""
                )
                raise ValueError(
                    f"batch leaf {name!r} has {x.shape[0]} examples, and the mesh {self} splits it over "
                    f"{of}; expected a multiple of {parts}"
                )
            return jax.lax.with_sharding_constraint(x, sharding)

        return jax.tree_util.tree_map_with_path(one, batch)

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Let what is traced inside know the mesh."""
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            yield

    def replicate(self, tree: PyTree) -> PyTree:
        """Copy a tree, which every process has, to every device."""
        everywhere = replicated(self.mesh)
        if jax.process_count() == 1:
            return jax.device_put(tree, everywhere)

        def put(x: Any) -> jax.Array:
            if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
                return jax.random.wrap_key_data(
                    put(jax.random.key_data(x)), impl=jax.random.key_impl(x)
                )
            x = np.asarray(x)
            return jax.make_array_from_callback(x.shape, everywhere, lambda index: x[index])

        return jax.tree.map(put, tree)


def batch_shards() -> int:
    """Return the number of parts that a batch is split into, where this is traced; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or tuple(mesh.axis_names) != AXES:
        return 1
    return mesh.shape["data"] * mesh.shape["fsdp"]
