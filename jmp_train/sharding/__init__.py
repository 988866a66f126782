"""Training on several devices: meshes, and where parameters lie on them."""

from jmp_train.sharding.mesh import AXES, MeshShape, make_mesh
from jmp_train.sharding.placement import Placed, Placement, PlacementRule, place
from jmp_train.sharding.sharded import Sharded, batch_shards

__all__ = [
    "AXES",
    "MeshShape",
    "Placed",
    "Placement",
    "PlacementRule",
    "Sharded",
    "batch_shards",
    "make_mesh",
    "place",
]
