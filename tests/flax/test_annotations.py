"""Flax's partitioning metadata as placement, for NNX and Linen, against placements written by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AbstractMesh

import jmp_train as jt
from jmp_train.flax import annotated_axes
from jmp_train.flax.functional import functional
from jmp_train.models.model import construct
from jmp_train.policy.precision import get_precision
from jmp_train.runs.explain import explain_placement
from jmp_train.sharding import AXES, Placement, place
from jmp_train.spec import DataSpec
from jmp_train.tasks.kinds import make_task

MESH = AbstractMesh((1, 2, 2), AXES)
BY_HAND = {  # up by columns, down by rows; `fsdp` on the axis that is left
    "down/bias": ("fsdp",),
    "down/kernel": ("tensor", "fsdp"),
    "up/bias": (("fsdp", "tensor"),),
    "up/kernel": ("fsdp", "tensor"),
}


def init_of(library, *names):
    inner = library.initializers.lecun_normal() if len(names) > 1 else library.initializers.ones
    return library.with_partitioning(inner, names)


class OfNnx(nnx.Module):
    placement = ("up/kernel=tensor,-",)  # which the annotation replaces

    def __init__(self, columns=(None, "tensor"), rows=("tensor", None), *, rngs: nnx.Rngs):
        init = functools.partial(init_of, nnx)
        self.up = nnx.Linear(8, 16, kernel_init=init(*columns), bias_init=init("tensor"), rngs=rngs)
        self.down = nnx.Linear(16, 4, kernel_init=init(*rows), rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


class OfLinen(nn.Module):
    columns: tuple = (None, "tensor")
    rows: tuple = ("tensor", None)
    box = staticmethod(nn.with_partitioning)

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        up = nn.Dense(
            16,
            name="up",
            kernel_init=self.box(init, self.columns),
            bias_init=self.box(nn.initializers.ones, ("tensor",)),
        )
        return nn.Dense(4, name="down", kernel_init=self.box(init, self.rows))(nn.relu(up(x)))


class OfLogicalLinen(OfLinen):
    box = staticmethod(nn.with_logical_partitioning)


KINDS = [OfNnx, OfLinen, OfLogicalLinen]
SPEC = DataSpec({"x": jax.ShapeDtypeStruct((8,), jnp.float32), "y": jax.ShapeDtypeStruct((4,), jnp.float32)}, None)  # fmt: skip


def task_of(kind, policy="float32", **names):
    task = jt.Task(loss=lambda out, batch: jnp.square(out - batch["y"]).mean(-1), targets=("y",))
    return make_task(jt.Model(kind, **names), task, SPEC, policy)


def specs(task, *rules, defaults=(), mesh=MESH):
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    placed = place(params, mesh, Placement(rules), defaults, task.annotations())
    return {p.path: tuple(p.spec) for p in placed}, {p.path: p.why for p in placed if not p.rule}


@pytest.mark.parametrize("kind", KINDS)
def test_an_annotation_places_a_parameter_before_the_model_and_after_the_user(kind):
    defaults = ("up/kernel=tensor,-", "down/bias=replicated")
    found, why = specs(task_of(kind), defaults=defaults)
    assert found == BY_HAND | {"down/bias": (None,)}
    assert why == {p: "annotation" for p in ("down/kernel", "up/bias", "up/kernel")}
    found, _ = specs(task_of(kind), "up/*=replicated", defaults=defaults)
    assert found == BY_HAND | {"down/bias": (None,), "up/bias": (None,), "up/kernel": (None, None)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_an_annotated_model_trains_as_one_without(kind, policy):
    """The parameters are arrays, without boxes, of the same values as those of the layers alone."""
    task = task_of(kind, policy)
    params, _ = task.init(jax.random.key(0))
    assert {type(x) for x in jax.tree.leaves(params, is_leaf=lambda x: x is not params and not isinstance(x, dict))} <= {type(jnp.ones(1))}  # fmt: skip
    names = {"columns": (None, None), "rows": (None, None)}
    plain, _ = task_of(kind, policy, **names).init(jax.random.key(0))
    assert jax.tree.structure(params) == jax.tree.structure(plain)
    jax.tree.map(np.testing.assert_array_equal, params, plain)
    batch = {"x": np.ones((2, 8), np.float32), "y": np.zeros((2, 4), np.float32)}
    stepper = jt.make_step(task.loss_fn, optax.sgd(0.1), task.precision)
    _, info = stepper.step(stepper.init(params, key=jax.random.key(1)), batch)
    p = jax.tree.map(np.float64, params)
    hidden = np.maximum(batch["x"] @ p["up"]["kernel"] + p["up"]["bias"], 0)
    exact = np.square(hidden @ p["down"]["kernel"] + p["down"]["bias"]).mean()
    np.testing.assert_allclose(info.loss, exact, rtol=1e-5 if policy == "float32" else 2e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_logical_names_are_those_of_flax_rules(kind):
    names = {"columns": ("embed", "mlp"), "rows": ("mlp", "embed")}
    with nn.logical_axis_rules([("mlp", "tensor"), ("embed", None), ("other", "fsdp")]):
        found, _ = specs(task_of(kind, **names))
    assert found == BY_HAND
    line = (
        "the annotation of parameter 'down/kernel' has the name 'mlp'; expected one of fsdp, tensor, "
        "None, or a name that Flax's logical axis rules make one of them"
    )
    with pytest.raises(ValueError) as error:
        specs(task_of(kind, **names))
    assert str(error.value) == line


@pytest.mark.parametrize(
    "columns,line",
    [
        ((None, "data"), "parameter 'up/kernel' has the name 'data'; expected one of fsdp, tensor"),
        ((None, "tenser"), "parameter 'up/kernel' has the name 'tenser'; did you mean 'tensor'?"),
        (("tensor",), "has 1 names, and its shape (8, 16) has 2 axes; expected a name or None for each"),
        (("tensor", "tensor"), "parameter 'up/kernel' has tensor twice; expected once"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [OfNnx, OfLinen])
def test_an_annotation_that_cannot_be_honoured_is_one_line(kind, columns, line):
    with pytest.raises(ValueError) as error:
        specs(task_of(kind, columns=columns))
    assert line in str(error.value) and "\n" not in str(error.value)


def test_an_axis_that_the_mesh_does_not_divide_is_one_line():
    line = (
        "the annotation of parameter 'up/bias', of shape (16,), does not fit: 16 is not a multiple"
    )
    with pytest.raises(ValueError) as error:
        specs(task_of(OfNnx, rows=(None, None)), mesh=AbstractMesh((1, 1, 3), AXES))
    assert line in str(error.value)


@pytest.mark.parametrize("kind", [OfNnx, OfLinen])
def test_rules_and_policies_reach_the_annotated_layers(kind):
    """A policy of 16-bit parameters for one layer, whose path a box would have made another."""
    rules = ["up=params=bfloat16,compute=bfloat16,output=bfloat16", "**=float32"]
    precision = get_precision("float32", tuple(rules))
    make = functools.partial(construct, jt.Model(kind), SPEC)
    net = functional(make, precision, lambda net: net(jnp.ones((1, 8))))
    params, _ = net.init(jax.random.key(0))
    dtypes = jax.tree.map(lambda x: x.dtype.name, params)
    assert dtypes["up"] == {"bias": "bfloat16", "kernel": "bfloat16"}
    assert dtypes["down"] == {"bias": "float32", "kernel": "float32"}
    assert set(net.annotations()) == {"down/kernel", "up/bias", "up/kernel"}


def test_annotated_axes_reads_a_module_and_variables():
    expected = {"down/kernel": ("tensor", None), "up/bias": ("tensor",), "up/kernel": (None, "tensor")}  # fmt: skip
    with nnx.use_eager_sharding(False):
        assert annotated_axes(OfNnx(rngs=nnx.Rngs(0))) == expected
    variables = jax.eval_shape(OfLinen().init, jax.random.key(0), jnp.ones((1, 8)))
    assert annotated_axes(variables) == annotated_axes(variables["params"]) == expected
    assert annotated_axes(nnx.Linear(2, 2, rngs=nnx.Rngs(0))) == {}


@pytest.mark.parametrize("kind", [OfNnx, OfLinen])
def test_explain_names_the_annotation(kind):
    data = jt.Data({"x": np.zeros((40, 8), np.float32), "y": np.zeros((40, 4), np.float32)})
    task = jt.Task(loss=lambda out, batch: jnp.square(out - batch["y"]).mean(-1), targets=("y",))
    own = jt.Experiment(jt.Model(kind), data, task=task, mesh="fsdp=2,tensor=2", batch_size=8)
    rows = {x.split()[0]: x.split() for x in explain_placement(own).splitlines() if "/" in x}
    assert rows["up/kernel"][1:] == ["8x16", "float32", "fsdp,tensor", "annotation", "128"]
    assert rows["up/bias"][1:] == ["16", "float32", "fsdp+tensor", "annotation", "16"]
    assert rows["down/bias"][3] == "fsdp" and "annotation" not in rows["down/bias"]
