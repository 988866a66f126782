"""Bundled models on meshes with an axis `tensor`; test_several_devices.py runs this file on eight devices.

The oracle is the same model on one device. Sums over the devices have another order, so losses differ by
roundings, within the tolerances of eight_devices.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jmp_train as jt
from jmp_train.models import Gpt, Mlp, Vit
from jmp_train.models import vit as vit_module
from jmp_train.runs.devices import placement_of
from jmp_train.sharding import Sharded, make_mesh
from jmp_train.sharding.tensor import tensor_size, used_in, whole_features
from jmp_train.spec import DataSpec
from jmp_train.tasks.kinds import make_task

B, T, WORDS = 16, 24, 32
MESHES = ["data=2,fsdp=2,tensor=2", "fsdp=2,tensor=4", "tensor=8", "data=4,tensor=2", "data=2,tensor=4", "fsdp=4,tensor=2"]  # fmt: skip
# Losses of about 3 after six steps: some dozens of roundings of 2^-24, 2^-11, 2^-8.
TOLERANCES = {"float32": 2e-5, "mixed_float16": 6e-3, "mixed_bfloat16": 4e-2}
TOKENS = DataSpec({"tokens": jax.ShapeDtypeStruct((T + 1,), jnp.int32)}, WORDS)
IMAGES = DataSpec({"image": jax.ShapeDtypeStruct((8, 8, 1), jnp.float32), "label": jax.ShapeDtypeStruct((), jnp.int32)}, 16)  # fmt: skip


@pytest.fixture(autouse=True)
def small_vit(monkeypatch):
    monkeypatch.setitem(vit_module.SIZES, "tiny", vit_module._Shape(32, 2, 8))
    monkeypatch.setitem(vit_module.SIZES, "Ti", vit_module._Shape(36, 1, 3))


def model_of(family, **settings):
    if family == "gpt":
        sizes = {"width": 64, "depth": 2, "heads": 8, "hidden": 96, "dropout": 0.1, **settings}
        return jt.Model(Gpt, vocabulary=WORDS, **sizes)
    if family == "vit":
        return jt.Model(Vit, image=(8, 8, 1), classes=16, patch=2, **settings)
    return jt.Model(Mlp, inputs=64, outputs=16, hidden=(64, 48, 32), dropout=0.1, **settings)


def batch_of(family, seed, size=B):
    rng = np.random.default_rng(seed)
    if family == "gpt":
        return {"tokens": rng.integers(0, WORDS, (size, T + 1), np.int32)}
    return {
        "image": np.float32(rng.normal(size=(size, 8, 8, 1))),
        "label": rng.integers(0, 16, size).astype(np.int32),
    }


def train(family, policy, mesh=None, *, steps=6, rows=B, reduce_dtype=None, **settings):
    """Return the losses of some steps, and the state."""
    model = model_of(family, **settings)
    name = "language_modelling" if family == "gpt" else "classification"
    task = make_task(model, name, TOKENS if family == "gpt" else IMAGES, policy)
    own = None
    if mesh is not None:
        own = Sharded(make_mesh(mesh), defaults=placement_of(model), reduce_dtype=reduce_dtype)
    # Not adam, which divides a gradient of roundings alone by its own size.
    stepper = jt.make_step(task.loss_fn, optax.sgd(0.05, momentum=0.9), task.precision, cast_batch=False, parallel=own)  # fmt: skip
    params, state = task.init(jax.random.key(0))
    state = stepper.init(params, model_state=state, key=jax.random.key(1))
    found = []
    for i in range(steps):
        state, info = stepper.step(state, batch_of(family, i, rows))
        found.append(float(info.loss))
    return np.array(found), state


def assert_same(alone, shared, tolerance):
    np.testing.assert_allclose(shared[0], alone[0], rtol=tolerance)
    assert len(set(alone[0])) == len(alone[0])
    trees = (jax.tree.leaves(x[1].params) for x in (alone, shared))
    for a, b in zip(*trees, strict=True):
        assert np.abs(a - b).max() <= 10 * tolerance * max(np.abs(a).max(), 1e-2)


alone_with = functools.cache(train)
"""On one device; each once."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy,mesh",
    [
        ("mixed_bfloat16", MESHES[0]),
        *(("float32", mesh) for mesh in MESHES),
        ("mixed_bfloat16", MESHES[1]),
        *(("mixed_float16", mesh) for mesh in MESHES[:2]),
    ],
)
@pytest.mark.parametrize("family", ["gpt", "vit", "mlp"])
def test_a_mesh_with_tensor_trains_as_one_device(family, policy, mesh):
    shared = train(family, policy, mesh)
    assert_same(alone_with(family, policy), shared, TOLERANCES[policy])
    specs = [x.sharding.spec for x in jax.tree.leaves(shared[1].params)]
    assert any("tensor" in str(spec) for spec in specs)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("reduce_dtype", [None, "float32"])
def test_moved_kernels_are_those_of_one_device(remat, reduce_dtype):
    """Of the queries, keys and values, and of the gate: in float32 sums and rematerialised too."""
    settings = {"remat": remat, "dropout": 0.0}
    for policy in ("float32", "mixed_bfloat16"):
        alone = alone_with("gpt", policy, **settings)
        for mesh in MESHES[:2]:
            shared = train("gpt", policy, mesh, reduce_dtype=reduce_dtype, **settings)
            assert_same(alone, shared, TOLERANCES[policy])


@pytest.mark.slow
@pytest.mark.parametrize("family,settings", [("gpt", {"heads": 2, "hidden": 90}), ("vit", {"size": "Ti"})])  # fmt: skip
def test_heads_that_tensor_does_not_divide_are_computed_by_all(family, settings):
    alone = train(family, "float32", **settings)
    assert_same(alone, train(family, "float32", "fsdp=2,tensor=4", **settings), 2e-5)


@pytest.mark.slow
def test_chunks_that_do_not_divide_a_share_of_tokens_have_the_same_losses():
    """Chunks of 7 tokens, of shares of 36 and of 6."""
    for rows, mesh in ((12, "data=4,tensor=2"), (2, "data=2,tensor=4")):
        alone = train("gpt", "float32", rows=rows, loss_chunk=7)
        assert_same(alone, train("gpt", "float32", mesh, rows=rows, loss_chunk=7), 2e-5)


def test_a_column_group_lies_by_heads_where_it_is_used():
    """Of 3 groups of 4 heads of 2 columns, each of two devices has the columns of two heads of all."""
    own = Sharded(make_mesh("data=4,tensor=2"))
    kernel = np.arange(2 * 24, dtype=np.float32).reshape(2, 24)

    def used(params):
        return used_in(params["kernel"].reshape(2, 3, 4, 2), 2)

    placed = jax.device_put({"kernel": kernel}, own.shardings({"kernel": kernel}))
    found = jax.jit(own.gathering(used))(placed)
    for shard in found.addressable_shards:
        columns = np.asarray(shard.data).reshape(2, -1)
        first = int(columns[0, 0])
        wanted = [first + 8 * group + i for group in range(3) for i in range(4)]
        np.testing.assert_array_equal(columns, kernel[:, wanted])
    assert {int(s.data.ravel()[0]) for s in found.addressable_shards} == {0, 4}


def test_without_an_axis_tensor_nothing_is_traced():
    x = jnp.ones((4, 6))
    with Sharded(make_mesh("data=2,fsdp=4")).context():
        assert used_in(x, 1) is x and whole_features(x) is x and tensor_size() == 1


def test_a_function_of_one_device_of_shard_map_splits_nothing():
    mesh, seen = make_mesh("tensor=8"), []

    def inside(x):
        seen.append((tensor_size(), used_in(x, 0) is x, whole_features(x) is x))
        return x

    jax.shard_map(inside, mesh=mesh, in_specs=P("tensor"), out_specs=P("tensor"))(jnp.ones(8))
    assert seen == [(1, True, True)]


def test_an_axis_that_tensor_does_not_divide_is_used_whole():
    specs = {}
    with Sharded(make_mesh("tensor=8")).context():
        assert tensor_size() == 8
        for size in (6, 8):
            (eqn,) = jax.make_jaxpr(lambda x: used_in(x, 1))(jnp.ones((4, size))).eqns
            specs[size] = tuple(eqn.params["sharding"].spec)
    assert specs == {6: (None, None), 8: (None, "tensor")}
