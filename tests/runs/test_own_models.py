"""A user's network as an experiment: NNX, Linen, a published one, plain functions; state and flags."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from helpers.marks import slow

import jmp_train as jt
from jmp_train.config.settings import with_settings
from jmp_train.data import DigitsConfig
from jmp_train.errors import UsageError
from jmp_train.runs.train import train
from jmp_train.testing import assert_equivalent_training

pytestmark = pytest.mark.usefixtures("quick_runs")

DRAWN = np.random.default_rng(0)
KERNELS = {shape: DRAWN.normal(size=shape) / shape[0] ** 0.5 for shape in [(64, 32), (32, 10)]}
POLICIES = ["float32", "mixed_bfloat16", "mixed_float16"]


def kernel_init(key, shape, dtype=jnp.float32):
    del key
    return jnp.asarray(KERNELS[tuple(shape)], dtype)


def drop(x, rate, key):
    """Dropout by the key of the call, so that both libraries drop the same units."""
    if key is None:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0)


class LinenNet(linen.Module):
    """Batch statistics and dropout, in Linen."""

    width: int = 32
    rate: float = 0.2

    @linen.compact
    def __call__(self, x, train: bool, key=None):
        x = linen.Dense(self.width, kernel_init=kernel_init)(x.reshape(len(x), -1))
        x = linen.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)(x)
        x = drop(linen.relu(x), self.rate, key)
        return linen.Dense(10, kernel_init=kernel_init)(x)


class NnxNet(nnx.Module):
    """Batch statistics and dropout, in NNX: `train()` and `eval()` set the normalisation."""

    def __init__(self, width: int = 32, rate: float = 0.2, *, rngs: nnx.Rngs):
        self.first = nnx.Linear(64, width, kernel_init=kernel_init, rngs=rngs)
        self.norm = nnx.BatchNorm(width, momentum=0.9, epsilon=1e-5, rngs=rngs)
        self.last = nnx.Linear(width, 10, kernel_init=kernel_init, rngs=rngs)
        self.rate = rate

    def __call__(self, x, key=None):
        x = self.norm(self.first(x.reshape(len(x), -1)))
        return self.last(drop(nnx.relu(x), self.rate, key))


class UsualDropout(nnx.Module):
    """Dropout as NNX users write it: the random streams are the module's own."""

    def __init__(self, width: int = 32, rate: float = 0.5, *, rngs: nnx.Rngs):
        self.first = nnx.Linear(64, width, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.last = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.first(x.reshape(len(x), -1)))))


class UsualLinenDropout(linen.Module):
    """Dropout as Linen users write it."""

    rate: float = 0.5

    @linen.compact
    def __call__(self, x, deterministic: bool):
        x = linen.relu(linen.Dense(32)(x.reshape(len(x), -1)))
        x = linen.Dropout(self.rate, deterministic=deterministic)(x)
        return linen.Dense(10)(x)


def plain(width: int = 32):
    """Init and apply functions, without Flax."""

    def init(key):
        one, two = jax.random.split(key)
        return {
            "first": jax.random.normal(one, (64, width)) / 8,
            "last": jax.random.normal(two, (width, 10)) / width**0.5,
        }

    def apply(params, x):
        return jax.nn.relu(x.reshape(len(x), -1) @ params["first"]) @ params["last"]

    return init, apply


def experiment(model, **settings):
    settings = {"batch_size": 64, "steps": 20, "log_every": 1, "eval_every": 20} | settings
    settings = {"optimizer": jt.optim.OptimizerConfig(learning_rate=0.01)} | settings
    return jt.Experiment(model, DigitsConfig(noise=0.0), task="classification", **settings)


def run(tmp_path, model, name="run", **settings):
    summary = train(experiment(model, **settings), tmp_path / name, name="own")
    lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    return summary, [record for record in map(json.loads, lines) if record["split"] == "train"]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["float32", slow("mixed_float16"), slow("mixed_bfloat16")])
def test_linen_and_nnx_with_the_same_weights_train_alike(tmp_path, policy):
    """Same losses for 20 steps within 1e-5 in float32: the order of sums in the statistics may differ.
    In half precision, the same accuracy within four of the 359 held-out images, a seed's noise."""
    results = [run(tmp_path, net, net.__name__, policy=policy) for net in (LinenNet, NnxNet)]
    losses = [[record["loss"] for record in records] for _, records in results]
    if policy == "float32":
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0] / 2
    accuracies = [summary["eval"]["accuracy"] for summary, _ in results]
    assert abs(accuracies[0] - accuracies[1]) <= 4 / 359


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("net", [LinenNet, NnxNet])
def test_half_precision_trains_within_the_noise_of_seeds(tmp_path, net, policy):
    """Accuracies of five seeds, within 0.02: seven of the 359 held-out images."""

    def accuracy(policy, seed):
        settings = {"policy": policy, "seed": seed, "steps": 100, "log_every": 100}
        summary, _ = run(tmp_path, net, f"{policy} {seed}", eval_every=100, **settings)
        return summary["eval"]["accuracy"]

    assert_equivalent_training(accuracy, ("float32", policy), seeds=5, margin=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("net", [NnxNet, slow(LinenNet)])
def test_batch_statistics_are_float32_and_used_in_evaluation(net):
    functions = experiment(net, policy="mixed_bfloat16").functions(DigitsConfig().load().spec)
    params, state = functions.init(jax.random.key(0))
    x = np.random.default_rng(1).normal(2.0, 3.0, (512, 8, 8)).astype(np.float32)
    batch = {"image": x, "label": np.zeros(512, np.int32)}
    update = jax.jit(lambda state: functions.loss_fn(params, batch, model_state=state)[2])
    for _ in range(200):
        state = update(state)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {np.dtype("float32")}
    # Against statistics in float64 of the first layer's outputs.
    hidden = x.reshape(512, -1).astype(np.float64) @ KERNELS[64, 32]
    flat = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(state)]
    mean, var = sorted(flat, key=lambda leaf: float(leaf.min()))
    np.testing.assert_allclose(mean, hidden.mean(0), atol=0.05)  # bf16 products: 2^-8 of about 6
    np.testing.assert_allclose(var, hidden.var(0), rtol=0.03)
    alone = functions.metrics_fn(params, jax.tree.map(lambda v: v[:1], batch), model_state=state)
    together = functions.metrics_fn(params, batch, model_state=state)
    np.testing.assert_allclose(alone["loss"][0], together["loss"][0], rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("net", [UsualDropout, UsualLinenDropout])
def test_usual_dropout_draws_new_units_each_step_and_none_in_evaluation(net):
    functions = experiment(net).functions(DigitsConfig().load().spec)
    params, state = functions.init(jax.random.key(0))
    assert state is None
    batch = {"image": np.ones((32, 8, 8), np.float32), "label": np.zeros(32, np.int32)}
    loss = lambda n: float(functions.loss_fn(params, batch, key=jax.random.key(n))[0])
    assert loss(1) == loss(1) != loss(2)
    first, second = (functions.metrics_fn(params, batch)["loss"] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert len(set(np.asarray(first).tolist())) == 1  # equal examples, nothing dropped


@pytest.mark.parametrize(
    "model,policy",
    [
        (UsualDropout, "mixed_float16"),
        *(
            slow(model, policy)
            for model in (plain, UsualDropout, UsualLinenDropout)
            for policy in POLICIES
        ),
    ],
)
def test_a_network_without_precision_learns_in_each_precision(tmp_path, model, policy):
    settings = {"policy": policy, "steps": 150, "log_every": 50, "eval_every": 150}
    summary, _ = run(tmp_path, model, **settings)
    assert summary["eval"]["accuracy"] > 0.85


@pytest.mark.parametrize("model", [LinenNet, NnxNet, plain])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_products_of_a_network_that_knows_no_precision_are_half(model, dtype):
    functions = experiment(model, policy=f"mixed_{dtype}").functions(DigitsConfig().load().spec)
    params, state = functions.init(jax.random.key(0))
    batch = {"image": np.ones((4, 8, 8), np.float32), "label": np.zeros(4, np.int32)}
    extras = {} if state is None else {"model_state": state}
    loss = lambda p: functions.loss_fn(p, batch, key=jax.random.key(0), **extras)[0]
    text = str(jax.make_jaxpr(jax.grad(loss))(params))
    products = [line for line in text.splitlines() if "dot_general" in line]
    short = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    assert len(products) >= 4 and all(f":{short}[" in line for line in products)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}


def test_constructor_arguments_are_settings_of_the_run(tmp_path):
    own = experiment(jt.Model(NnxNet, width=32))
    changed = with_settings(own, {"model.rate": 0.5})
    assert changed.model.settings == {"width": 32, "rate": 0.5}
    run(tmp_path, changed.model, steps=1)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["model"] == {"width": 32, "rate": 0.5}
    with pytest.raises(ValueError, match=r"unknown setting 'model.widht'; did you mean 'width'"):
        with_settings(own, {"model.widht": 3})


@pytest.mark.slow
def test_a_published_linen_model_trains_from_its_constructor(tmp_path):
    import jax_resnet

    def resnet(classes: int, width: int = 8):
        """A small residual network of the package, on images with a channel."""
        block = jax_resnet.ResNetBlock(n_hidden=width)
        head = linen.Sequential([lambda x: x.mean((1, 2)), linen.Dense(classes)])
        stem = linen.Sequential([lambda x: x[..., None], linen.Conv(width, (3, 3))])
        return linen.Sequential([stem, block, head])

    model = jt.Model(resnet, classes=lambda spec: spec.classes)
    summary, records = run(tmp_path, model, steps=40, policy="mixed_bfloat16")
    assert records[-1]["loss"] < records[0]["loss"]
    assert summary["eval"]["accuracy"] > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    "net,policy",
    [
        (NnxNet, "float32"),
        (LinenNet, "mixed_float16"),
        (LinenNet, "float32"),
        (NnxNet, "mixed_float16"),
        (UsualDropout, "float32"),
        (UsualDropout, "mixed_float16"),
    ],
)
def test_a_network_with_state_and_dropout_resumes_bitwise(tmp_path, net, policy):
    settings = {"policy": policy, "steps": 12, "log_every": 3, "eval_every": 6}
    run(tmp_path, net, "part", checkpoint_every=6, **{**settings, "steps": 6}, optimizer=CONSTANT)
    _, straight = run(tmp_path, net, "straight", checkpoint_every=6, **settings, optimizer=CONSTANT)
    _, resumed = run(tmp_path, net, "part", checkpoint_every=6, **settings, optimizer=CONSTANT)
    keys = ("step", "loss", "grad_norm", "loss_scale")
    only = lambda records: [[record[key] for key in keys] for record in records]
    assert only(resumed) == only(straight) and len(straight) == 4


CONSTANT = jt.optim.OptimizerConfig(schedule="constant")


@pytest.mark.parametrize(
    "model,rules,message",
    [
        (NnxNet, ("frist=float32", "**=mixed_bfloat16"), "frist.*first"),
        (LinenNet, ("Dense_7=float32", "**=mixed_bfloat16"), "Dense_7.*Dense_[01]"),
        (plain, ("first=float32", "**=mixed_bfloat16"), "pair of functions"),
    ],
)
def test_a_rule_that_the_model_cannot_honour_is_refused(tmp_path, model, rules, message):
    with pytest.raises(UsageError, match=message):
        run(tmp_path, model, rules=rules)
    assert not (tmp_path / "run").exists()


def test_rules_reach_a_users_network():
    own = experiment(NnxNet, rules=("last=float32", "**=mixed_bfloat16"))
    functions = own.functions(DigitsConfig().load().spec)
    params, state = functions.init(jax.random.key(0))
    batch = {"image": np.ones((4, 8, 8), np.float32), "label": np.zeros(4, np.int32)}
    jaxpr = jax.make_jaxpr(lambda p: functions.loss_fn(p, batch, model_state=state)[0])(params)
    dtypes = [line.split(":")[1][:4] for line in str(jaxpr).splitlines() if "dot_general" in line]
    assert sorted(dtypes) == ["bf16", "f32["]


class WrongSize(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layer = nnx.Linear(63, 10, rngs=rngs)

    def __call__(self, x):
        return self.layer(x.reshape(len(x), -1))


def images(classes: int = 10):
    return linen.Sequential([linen.Dense(classes)])  # does not flatten: (batch, 8, classes)


class NegativeSize(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layer = nnx.Linear(64, -1, rngs=rngs)

    def __call__(self, x):
        return self.layer(x.reshape(len(x), -1))


class NoSize(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layer = nnx.Linear(0, 10, rngs=rngs)  # the initializer divides by it

    def __call__(self, x):
        return self.layer(x.reshape(len(x), -1))


class NoSizeInside(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(10)(linen.Dense(0)(x.reshape(len(x), -1)))


class DividesByWidth(nnx.Module):
    def __init__(self, width: int = 0, *, rngs: nnx.Rngs):
        self.layer = nnx.Linear(64 // width, 10, rngs=rngs)


@pytest.mark.parametrize(
    "model,message",
    [
        (NoSize, r"do not fit: .*division by zero \(.*test_own_models.py, line \d+\)"),
        (NoSizeInside, r"do not fit: .*division by zero \(.*test_own_models.py, line \d+\)"),
        (DividesByWidth, r"do not fit: .* by zero \(.*test_own_models.py, line \d+\)"),
        (NegativeSize, r"do not fit: .*\(64, -1\).* \(.*test_own_models.py, line \d+\)"),
        (WrongSize, r"do not fit: .*64.*63.* \(.*test_own_models.py, line \d+\)"),
        (images, r"do not fit: the network returned \(\d+, 8, 10\); expected logits of shape"),
    ],
)
def test_a_network_that_does_not_fit_the_data_is_one_line(tmp_path, model, message):
    with pytest.raises(UsageError, match=message) as error:
        run(tmp_path, model)
    assert len(str(error.value).splitlines()) == 1


class Sows(linen.Module):
    """An auxiliary value as Linen users sow it, and a sample in every call."""

    @linen.compact
    def __call__(self, x, train: bool):
        x = linen.Dense(8)(x.reshape(len(x), -1))
        x = linen.BatchNorm(use_running_average=not train)(x)
        self.sow("losses", "aux", (x**2).mean())
        return linen.Dense(10)(x + jax.random.normal(self.make_rng("sample"), x.shape))


@pytest.mark.slow
def test_a_network_that_sows_and_samples_trains_resumes_and_predicts(tmp_path):
    class Interrupted(Exception):
        pass

    def interrupt(record, state):
        if record["step"] == 3:
            raise Interrupted

    settings = {"steps": 4, "eval_every": 2, "checkpoint_every": 2, "steps_per_call": 1}
    own = experiment(Sows, **settings, checkpoint_wait=True)
    whole = train(own, tmp_path / "whole", name="own")
    with pytest.raises(Interrupted):
        train(dataclasses.replace(own, on_record=interrupt), tmp_path / "run", name="own")
    resumed = train(own, tmp_path / "run", name="own")
    assert resumed["eval"] == whole["eval"]
    loaded = jt.load_run(tmp_path / "run", experiment=own)
    x = np.zeros((3, 8, 8), np.float32)
    chex.assert_trees_all_equal(loaded.predict(x), loaded.predict(x))


class HalfState(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.layer = nnx.Linear(64, 10, rngs=rngs)
        self.seen = nnx.Variable(jnp.zeros((), jnp.bfloat16))

    def __call__(self, x):
        self.seen[...] += 1
        return self.layer(x.reshape(len(x), -1))


def test_state_that_the_network_makes_in_half_precision_is_loaded(tmp_path):
    run(tmp_path, HalfState, steps=2, eval_every=2)
    loaded = jt.load_run(tmp_path / "run", experiment=experiment(HalfState, steps=2, eval_every=2))
    assert loaded.model_state["seen"].dtype == jnp.float32 and loaded.model_state["seen"] == 2
