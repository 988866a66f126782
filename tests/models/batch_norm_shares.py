"""Statistics of shares of a batch on eight devices; test_several_devices.py runs this file with them.

The oracle normalises each share alone, in NumPy float64.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jmp_train as jt
from jmp_train.flax.functional import functional
from jmp_train.models import ResNet, ShareBatchNorm
from jmp_train.policy.precision import get_precision
from jmp_train.sharding import Sharded, make_mesh
from jmp_train.spec import DataSpec
from jmp_train.tasks.kinds import make_task

B, H, C = 32, 3, 5
MESHES = {"data=8": 8, "data=2,fsdp=4": 8, "data=2,fsdp=2,tensor=2": 4, "tensor=8": 1}


def by_hand(x, scale, bias, mean, var, shares, *, mask=None, momentum=0.9, epsilon=1e-5):
    """The normalised features and the new running averages."""
    parts = np.float64(x).reshape(shares, -1, x.shape[-1])
    kept = np.ones_like(parts, bool) if mask is None else mask.reshape(parts.shape)
    means = np.stack([[p[k].mean() for p, k in zip(a.T, b.T)] for a, b in zip(parts, kept)])
    variances = np.stack([[p[k].var() for p, k in zip(a.T, b.T)] for a, b in zip(parts, kept)])
    y = (parts - means[:, None]) / np.sqrt(variances[:, None] + epsilon) * scale + bias
    blend = lambda old, new: momentum * old + (1 - momentum) * new.mean(0)
    return y.reshape(x.shape), blend(mean, means), blend(var, variances)


def drawn():
    rng = np.random.default_rng(0)
    # Each share has another mean and size, so that those of the batch are none of theirs.
    x = rng.normal(size=(B, H, C)) * np.linspace(0.5, 3, B)[:, None, None] + np.arange(B)[:, None, None] / 8  # fmt: skip
    return np.float32(x), *(np.float32(rng.uniform(0.5, 2, C)) for _ in range(4))


def run(norm, params, x, mesh, **options):
    """Call a norm in training on a mesh; return the features and the state."""
    net = functional(lambda rngs, **_: norm(rngs=rngs), get_precision("float32"))
    scale, bias, mean, var = params
    own = Sharded(make_mesh(mesh))

    def call(params, state, x):
        return net.apply(params, state, x, train=True, **options)

    placed = NamedSharding(own.mesh, P(("data", "fsdp")))
    args = {"scale": scale, "bias": bias}, {"mean": mean, "var": var}, jax.device_put(x, placed)
    out, state = jax.jit(own.gathering(call))(*args)
    return np.float64(out), state


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("fast", [True, False])
def test_each_share_is_normalised_by_its_own_statistics(mesh, masked, fast):
    x, *params = drawn()
    mask = np.random.default_rng(1).random(x.shape) < 0.7 if masked else None
    norm = functools.partial(ShareBatchNorm, C, momentum=0.9, use_fast_variance=fast)
    out, state = run(norm, params, x, mesh, **({"mask": mask} if masked else {}))
    exact = by_hand(x, *params, MESHES[mesh], mask=mask)
    # Means of squares of about 30 less squares: some roundings of 2^-24 of them over a variance of 1/4.
    for found, wanted in zip((out, state["mean"], state["var"]), exact, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=5e-5, atol=5e-5)
    whole = by_hand(x, *params, 1, mask=mask)[0]
    assert MESHES[mesh] == 1 or np.abs(whole - exact[0]).max() > 0.1


def test_features_need_no_other_device():
    """What the features are computed from, in the program, has no collective; the averages have."""
    x, *params = drawn()
    texts = {}
    for kind in (ShareBatchNorm, nnx.BatchNorm):
        net = functional(lambda rngs, kind=kind, **_: kind(C, rngs=rngs), get_precision("float32"))
        own = Sharded(make_mesh("data=8"))
        call = lambda p, s, x, net=net: net.apply(p, s, x, train=True)[0]
        args = (
            {"scale": params[0], "bias": params[1]},
            {"mean": params[2], "var": params[3]},
            jax.device_put(x, NamedSharding(own.mesh, P("data"))),
        )
        texts[kind] = jax.jit(own.gathering(call)).lower(*args).compile().as_text()
    collective = r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    assert not re.search(collective, texts[ShareBatchNorm])
    assert re.search(collective, texts[nnx.BatchNorm])


@pytest.mark.slow
@pytest.mark.parametrize("policy,tolerance", [("float32", 1e-5), ("mixed_bfloat16", 2e-2)])
def test_a_resnet_has_the_loss_of_its_shares(policy, tolerance):
    """The mean of the losses of each share alone, as its own batch on one device."""
    images = np.float32(np.random.default_rng(0).normal(size=(16, 8, 8, 1)))
    images *= np.linspace(0.5, 4, 16, dtype=np.float32)[:, None, None, None]
    labels = np.arange(16) % 10
    spec = DataSpec({"image": jax.ShapeDtypeStruct((8, 8, 1), jnp.float32), "label": jax.ShapeDtypeStruct((), jnp.int32)}, 10)  # fmt: skip
    found = {}
    for statistics in ("global", "device"):
        model = jt.Model(ResNet, channels=1, classes=10, statistics=statistics)
        task = make_task(model, "classification", spec, policy)
        params, state = task.init(jax.random.key(0))
        params = jax.tree.map(lambda p: p + 0.1, params)  # norms begin with a scale of 0
        loss = lambda batch, task=task, params=params, state=state: task.loss_fn(
            task.precision.cast_to_compute(params), batch, model_state=state
        )[0]
        own = Sharded(make_mesh("data=4,fsdp=2"))
        stepper = jt.make_step(task.loss_fn, optax.sgd(0.1), task.precision, parallel=own, cast_batch=False)  # fmt: skip
        batch = {"image": images, "label": labels}
        _, info = stepper.step(stepper.init(params, model_state=state), batch)
        parts = [{k: v[i : i + 2] for k, v in batch.items()} for i in range(0, 16, 2)]
        found[statistics] = float(info.loss)
    each = np.mean([float(jax.jit(loss)(part)) for part in parts])
    np.testing.assert_allclose(found["device"], each, rtol=tolerance)
    assert abs(found["global"] - each) > 2 * tolerance * each


def test_a_batch_that_the_shares_do_not_divide_is_one_line():
    norm = ShareBatchNorm(C, rngs=nnx.Rngs(0))
    line = "a batch norm got 12 examples, and the mesh has 8 shares of a batch; expected a multiple of 8"
    own = Sharded(make_mesh("data=8"))
    with pytest.raises(ValueError, match=line), own.context():
        jax.eval_shape(norm, jnp.ones((12, C)))
