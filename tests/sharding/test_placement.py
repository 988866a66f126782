"""Rules that place parameters on a mesh, against placements written by hand."""

import math

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from jmp_train.sharding import AXES, Placement, place
from jmp_train.sharding.placement import table
from jmp_train.sharding.state import follow

MESH = AbstractMesh((2, 4, 2), AXES)
PARAMS = {
    "blocks": {
        "up": {"kernel": jax.ShapeDtypeStruct((6, 64, 256), jnp.float32)},
        "down": {"kernel": jax.ShapeDtypeStruct((6, 256, 64), jnp.float32)},
        "norm": {"scale": jax.ShapeDtypeStruct((6, 64), jnp.float32)},
    },
    "head": {"bias": jax.ShapeDtypeStruct((7,), jnp.bfloat16)},
}


def specs(*rules, defaults=(), params=PARAMS, mesh=MESH):
    placed = place(params, mesh, Placement(rules), defaults)
    return {p.path: tuple(p.spec) for p in placed}


def test_the_largest_axis_that_divides_is_split_by_default():
    assert specs() == {
        "blocks/down/kernel": (None, "fsdp", None),
        "blocks/norm/scale": (None, "fsdp"),
        "blocks/up/kernel": (None, None, "fsdp"),
        "head/bias": (None,),
    }


@pytest.mark.parametrize(
    "rule,path,spec",
    [
        ("**/up/kernel=-,tensor", "blocks/up/kernel", (None, "fsdp", "tensor")),
        ("**/down/kernel=tensor,-", "blocks/down/kernel", (None, "tensor", "fsdp")),
        ("blocks/*/kernel=fsdp,tensor", "blocks/up/kernel", (None, "fsdp", "tensor")),
        ("**/up/kernel=fsdp+tensor,-", "blocks/up/kernel", (None, ("fsdp", "tensor"), None)),
        ("**/up/kernel=replicated", "blocks/up/kernel", (None, None, None)),
        ("re:.*norm/scale=tensor", "blocks/norm/scale", (None, ("fsdp", "tensor"))),
        ("**/norm/*=replicated", "blocks/norm/scale", (None, None)),
    ],
)
def test_a_rule_names_the_last_axes(rule, path, spec):
    """`re:.*norm/scale=tensor` leaves 6 x 64 no other axis that fsdp divides."""
    assert specs(rule)[path] == spec


def test_the_first_rule_wins_and_rules_come_before_those_of_the_model():
    rules = ("**/up/kernel=replicated", "**/kernel=-,tensor")
    found = specs(*rules, defaults=("**/down/kernel=tensor,-",))
    assert found["blocks/up/kernel"] == (None, None, None)
    assert found["blocks/down/kernel"] == (None, "fsdp", "tensor")
    found = specs(defaults=("**/down/kernel=tensor,-", "**/nothing=tensor", "head/bias=tensor"))
    assert found["blocks/down/kernel"] == (None, "tensor", "fsdp")
    assert found["head/bias"] == (None,)  # 7 is not divided by 2


@pytest.mark.parametrize(
    "rule,line",
    [
        ("**/ups/kernel=tensor", "the rule '**/ups/kernel' matches no parameter; the nearest are"),
        ("head/bias=tensor", "does not fit 'head/bias', of shape (7,): 7 is not a multiple of tensor=2"),
        ("head/bias=-,tensor", "of shape (7,): it has 2 axes; expected at most 1"),
        ("**/norm/scale=fsdp,-", "6 is not a multiple of fsdp=4"),
    ],
)  # fmt: skip
def test_a_rule_that_cannot_be_honoured_is_an_error(rule, line):
    with pytest.raises(ValueError) as error:
        specs(rule)
    assert line in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "rule,line",
    [
        ("kernel", "placement 'kernel' has no axes; write it as 'pattern=axes'"),
        ("kernel=", "has the axis ''; expected one of"),
        ("kernel=tenser", "has the axis 'tenser'; did you mean 'tensor'?"),
        ("kernel=data", "has the axis 'data'; expected one of fsdp, tensor, -, replicated"),
        ("kernel=fsdp,fsdp", "has fsdp twice; expected once"),
        ("kernel=fsdp+fsdp", "has fsdp twice; expected once"),
        ("re:(=fsdp", "invalid regular expression"),
    ],
)
def test_what_is_no_rule_is_refused(rule, line):
    with pytest.raises(ValueError) as error:
        Placement([rule])
    assert line in str(error.value)


SHAPES = st.lists(st.integers(1, 24), max_size=3).map(tuple)
SIZES = st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 3))


@given(SHAPES, SIZES)
def test_every_shape_has_a_placement_that_divides_it(shape, sizes):
    params = {"x": jax.ShapeDtypeStruct(shape, jnp.bfloat16)}
    mesh = AbstractMesh(sizes, AXES)
    (placed,) = place(params, mesh, defaults=("x=tensor",))
    parts = 1
    for size, names in zip(shape, placed.spec, strict=False):
        names = (names,) if isinstance(names, str) else names or ()
        here = math.prod(mesh.shape[name] for name in names)
        assert size % here == 0
        parts *= here
    assert placed.bytes == 2 * math.prod(shape) // parts
    divides = [n for n in shape if n % sizes[1] == 0]
    if divides and sizes[2] == 1:  # split by fsdp, over the largest axis that divides
        split = [
            n for n, names in zip(shape, placed.spec, strict=True) if names and "fsdp" in names
        ]
        assert split == [max(divides)]


def test_a_state_follows_its_parameters_and_nothing_else_is_split():
    shardings = jax.tree.map(lambda x: jax.NamedSharding(MESH, P("fsdp")), PARAMS)
    state = {
        "mu": PARAMS,
        "inner": [PARAMS["blocks"], jax.ShapeDtypeStruct((), jnp.int32)],
        "factored": {"head": {"bias": jax.ShapeDtypeStruct((3,), jnp.float32)}},
    }
    found = follow(state, PARAMS, shardings, MESH)
    split = {x.spec for x in jax.tree.leaves(found["mu"])}
    assert split == {P("fsdp")}
    # A part of the parameters is none of them: the paths of its leaves end otherwise.
    assert all(x.spec == P() for x in jax.tree.leaves((found["inner"], found["factored"])))


def test_the_table_names_rule_and_bytes():
    text = table(place(PARAMS, MESH, Placement(["**/up/kernel=-,tensor", "head/*=replicated"])))
    rows = [line.split() for line in text.splitlines()]
    assert rows[3][:6] == ["blocks/up/kernel", "6x64x256", "float32", "-,fsdp,tensor", "**/up/kernel", "49,152"]  # fmt: skip
    assert rows[4] == ["head/bias", "7", "bfloat16", "replicated", "head/*", "14"]
