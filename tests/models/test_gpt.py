"""The language model against a float64 one in NumPy, and in which dtype each part of it runs."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.programs import equations

import jmp_train as jt
from jmp_train import testing
from jmp_train._autocast.traced import TracedFunction
from jmp_train.config.find import find_experiment
from jmp_train.models.model import construct
from jmp_train.optim.optimizers import make_optimizer
from jmp_train.policy.precision import get_precision
from jmp_train.spec import DataSpec
from jmp_train.tasks import make_task
from jmp_train.testing import assert_contractions_in
from jmp_train.testing.wide import results_in_float64
from tests.helpers.models import gpt
from tests.models.test_attention import attention_in_float64, rotary_by_complex_numbers

CONFIG = gpt(width=16, depth=3, heads=2, loss_chunk=8)
LENGTH = 10
TOKENS = np.random.default_rng(0).integers(0, 256, (2, LENGTH + 1)).astype(np.uint8)
BATCH = {"tokens": TOKENS}
SPEC = DataSpec.of(BATCH, classes=256)
QUICK = {"xla_backend_optimization_level": 0}  # half the time to compile


def task_of(policy="float32", config=CONFIG, rules=()):
    return make_task(config, "language_modelling", SPEC, get_precision(policy, rules))


@pytest.fixture(scope="module")
def params():
    # Larger than a model begins with, so that attention is far from even and mistakes in it show.
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(task_of().init, jax.random.key(0))[0]
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) / 2, shapes)


@pytest.fixture(scope="module")
def model():
    make = lambda: construct(CONFIG, SPEC, rngs=nnx.Rngs(0))
    return nnx.split(nnx.eval_shape(make))[0]


@pytest.fixture(scope="module")
def logits(model, params):
    return jax.jit(lambda tokens: nnx.merge(model, params)(tokens), compiler_options=QUICK)


def rms_norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def logits_in_float64(params, tokens, sees=99):
    """The whole model, block after block; each position sees itself and the `sees - 1` before it."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x = params["embed"]["embedding"][tokens]
    positions = np.arange(tokens.shape[1])
    distance = positions[:, None] - positions[None, :]
    for i in range(CONFIG.depth):
        block = jax.tree.map(lambda p, i=i: p[i], params["blocks"])
        shape = (*tokens.shape, 3, CONFIG.heads, CONFIG.width // CONFIG.heads)
        normed = rms_norm(x, block["norm1"]["scale"])
        q, k, v = np.moveaxis((normed @ block["attention"]["qkv"]["kernel"]).reshape(shape), 2, 0)
        q, k = (rotary_by_complex_numbers(y, positions) for y in (q, k))
        mixed = attention_in_float64(q, k, v, (distance >= 0) & (distance < sees))
        x = x + mixed.reshape(x.shape) @ block["attention"]["out"]["kernel"]
        normed = rms_norm(x, block["norm2"]["scale"])
        gate, value = np.split(normed @ block["mlp"]["up"]["kernel"], 2, axis=-1)
        x = x + gate / (1 + np.exp(-gate)) * value @ block["mlp"]["down"]["kernel"]
    return rms_norm(x, params["norm"]["scale"]) @ params["embed"]["embedding"].T


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_scanned_blocks_give_the_logits_and_losses_of_the_float64_model(params, logits):
    exact = logits_in_float64(params, TOKENS)
    got = logits(TOKENS)
    # Float32 through three blocks: some hundred roundings of values of order 10.
    np.testing.assert_allclose(got, exact, atol=2e-5 * np.abs(exact).max())
    metrics = jax.jit(task_of().metrics_fn)(params, BATCH)
    exact = -np.take_along_axis(log_softmax(exact[:, :-1]), TOKENS[:, 1:, None].astype(int), 2)
    np.testing.assert_allclose(metrics["loss"], exact[..., 0], rtol=2e-5, atol=1e-4)
    np.testing.assert_allclose(metrics["bits_per_byte"], exact[..., 0] / np.log(2), rtol=1e-4)


def test_the_float64_reference_of_the_assertions_is_that_of_numpy(model, params):
    traced = TracedFunction(lambda p, tokens: nnx.merge(model, p)(tokens), (params, TOKENS), {})
    exact = logits_in_float64(params, TOKENS)
    # The program's constants, such as the base of the rotary frequencies, are in float32.
    np.testing.assert_allclose(results_in_float64(traced), exact, atol=1e-7 * np.abs(exact).max())


@pytest.mark.slow
@testing.policies("float32", "mixed_float16", "mixed_bfloat16")
def test_gradients_are_those_of_float64(policy):
    params = task_of().init(jax.random.key(0))[0]
    loss_fn = lambda params, batch: task_of(policy).loss_fn(params, batch)[0]
    with jax.default_matmul_precision("highest" if policy == "float32" else None):
        testing.assert_gradients_close(loss_fn, params, BATCH, policy=policy)


def test_a_later_byte_leaves_earlier_logits_bitwise_the_same(logits):
    changed = TOKENS.copy()
    changed[:, 6] ^= 1
    before, after = logits(TOKENS), logits(changed)
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert (before[:, 6] != after[:, 6]).any(axis=-1).all()


@pytest.mark.slow
def test_what_the_backward_pass_computes_again_changes_no_gradient(params):
    grads, products = {}, {}
    for remat in ("none", "dots", "full"):
        config = dataclasses.replace(CONFIG, remat=remat)
        grad = jax.grad(lambda p, c=config: task_of(config=c).loss_fn(p, BATCH)[0])
        names = [e.primitive.name for e in equations(jax.make_jaxpr(grad)(params))]
        products[remat] = names.count("dot_general")
        if remat != "dots":
            grads[remat] = jax.jit(grad, compiler_options=QUICK)(params)
    # Computed again: the two products of attention; or those and three of the four linear layers,
    # for the last one's result is not needed.
    again = {remat: n - products["none"] for remat, n in products.items()}
    assert again == {"none": 0, "dots": 2, "full": 5}
    for a, b in zip(*map(jax.tree.leaves, grads.values()), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * float(jnp.abs(a).max()))


def operand_dtypes(jaxpr, *names):
    """The floating dtypes that operations read."""
    return {
        str(x.aval.dtype)
        for e in equations(jaxpr)
        if e.primitive.name in names
        for x in e.invars
        if jnp.issubdtype(x.aval.dtype, jnp.floating)
    }


@pytest.mark.parametrize("rules", [(), ("**={}",)], ids=["policy", "rules"])
@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_products_are_half_and_norms_softmax_and_loss_float32(half, rules):
    policy = f"mixed_{half}"
    rules = tuple(rule.format(policy) for rule in rules)
    task = task_of("float32" if rules else policy, rules=rules)
    shapes = jax.eval_shape(task.init, jax.random.key(0))[0]
    grad_fn = jt.value_and_grad(task.loss_fn, None if rules else policy, has_aux=True)
    jaxpr = jax.make_jaxpr(grad_fn)(shapes, BATCH)
    assert_contractions_in(grad_fn, shapes, BATCH, dtype=half)
    # Softmax and its total, the norms' statistics, rotary angles: everything delicate. SiLU's
    # logistic runs in the dtype of what it gates, and a maximum is exact in any.
    delicate = ("exp", "log", "rsqrt", "cos", "sin", "reduce_sum")
    assert operand_dtypes(jaxpr, *delicate) == {"float32"}
    assert jaxpr.out_avals[0].dtype == jnp.float32  # the loss


def test_rules_reach_the_scanned_blocks_by_name():
    rules = ("blocks/attention/**=float32", "**=mixed_bfloat16")
    task = task_of(rules=rules)
    shapes = jax.eval_shape(task.init, jax.random.key(0))[0]
    jaxpr = jax.make_jaxpr(lambda p: task.metrics_fn(p, BATCH))(shapes)
    ran = [str(e.invars[0].aval.dtype) for e in equations(jaxpr) if e.primitive.name == "dot_general"]  # fmt: skip
    # qkv, scores, mix and out of attention; up, down; the head.
    assert sorted(ran) == ["bfloat16"] * 3 + ["float32"] * 4
    with pytest.raises(ValueError, match=r"'blocks/0' .* matches no module"):
        task_of(rules=("blocks/0=bf16", "**=mixed_bfloat16"))


@pytest.fixture(scope="module")
def generate():
    task = task_of()
    return jax.jit(functools.partial(task.generate, length=2 * LENGTH), compiler_options=QUICK)


def test_generated_bytes_are_the_likeliest_ones_of_the_float64_model(params, generate):
    # Up to the trained length it is the whole model's argmax; beyond, of one that sees that far.
    prompt = TOKENS[0, :4]
    out = generate(params, jnp.asarray(prompt), jax.random.key(0), temperature=0.0)
    text = np.concatenate([prompt, out])[None]
    exact = logits_in_float64(params, text[:, :-1], sees=LENGTH)[0, len(prompt) - 1 :]
    np.testing.assert_array_equal(out, exact.argmax(-1))
    best, second = np.sort(exact, axis=-1)[:, [-1, -2]].T
    assert (best - second > 2e-4).all()  # no near tie that rounding could decide
    whole = logits_in_float64(params, text[:, :-1])[0, len(prompt) - 1 :]
    assert (whole.argmax(-1) != exact.argmax(-1)).any()


@pytest.mark.parametrize(
    "prompt,length,temperature,message",
    [
        (
            [],
            1,
            1.0,
            r"prompt has shape \(0,\) .* expected integers of shape \(tokens,\), at least",
        ),
        ([[1, 2]], 1, 1.0, r"prompt has shape \(1, 2\)"),
        ([0.5], 1, 1.0, "dtype float32; expected integers"),
        ([1], 0, 1.0, "length is 0; expected a whole number of at least 1"),
        ([1], 1.5, 1.0, "length is 1.5; expected a whole number"),
        ([1], 1, -0.5, "temperature is -0.5; expected a number of 0 or more"),
        ([1], 1, np.float32("nan"), "temperature is nan; expected a number of 0 or more"),
        ([1], 1, jnp.float32("inf"), "temperature is inf; expected a number of 0 or more"),
    ],
)
def test_invalid_arguments_of_generate_are_refused(params, prompt, length, temperature, message):
    generate: Any = task_of().generate
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=message):
        generate(params, np.asarray(prompt, int if not prompt else None), key, length=length, temperature=temperature)  # fmt: skip


def test_drawn_bytes_follow_the_seed_and_the_temperature(params, generate):
    draw = lambda seed, t: generate(params, jnp.asarray(TOKENS[0, :4]), jax.random.key(seed), temperature=t)  # fmt: skip
    greedy = draw(0, 0.0)
    np.testing.assert_array_equal(draw(0, 1.0), draw(0, 1.0))
    assert (draw(0, 1.0) != draw(1, 1.0)).any()
    np.testing.assert_array_equal(draw(5, 1e-4), greedy)  # cold: the likeliest
    # Hot: nearly even over 256 bytes, each drawn by itself, so that few of the 20 are equal.
    assert len(set(draw(0, 100.0).tolist())) > 15


def test_drawn_bytes_have_the_softmaxs_frequencies():
    from jmp_train.tasks.language_modelling import _draw

    logits = jnp.array([0.0, 1.0, 2.0])
    draws = jax.vmap(lambda key: _draw(logits, key, 2.0))(jax.random.split(jax.random.key(0), 4096))
    expected = np.exp(np.arange(3) / 2) / np.exp(np.arange(3) / 2).sum()
    # The deviation of a frequency over 4,096 draws is at most 1 / 128; five of them.
    np.testing.assert_allclose(np.bincount(draws, minlength=3) / 4096, expected, atol=5 / 128)


def test_dropout_drops_in_training_alone(params):
    task = task_of(config=dataclasses.replace(CONFIG, dropout=0.5))
    loss = jax.jit(lambda key: task.loss_fn(params, BATCH, key=key)[0], compiler_options=QUICK)
    losses = [float(loss(jax.random.key(n))) for n in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    still = [
        str(jax.make_jaxpr(t.metrics_fn)(params, BATCH)) for t in (task, task_of())
    ]  # the very program of a model without dropout
    assert still[0] == still[1]


@pytest.mark.parametrize(
    "name,million,within",
    [
        ("gpt_124m_bf16", 124, 1),
        ("gpt_1b3_bf16", 1300, 10),
        ("gpt_7b_bf16", 6477, 1),
        ("gpt_70b_bf16", 77850, 1),
    ],
)
def test_presets_have_their_sizes_and_their_steps_lower(name, million, within):
    # By shapes alone: nothing of that size is allocated.
    experiment = find_experiment(name)
    config, length = experiment.model, experiment.data.length
    example = {"tokens": jax.ShapeDtypeStruct((length + 1,), jnp.uint8)}
    task = experiment.functions(DataSpec(example, 256))
    shapes = jax.eval_shape(task.init, jax.random.key(0))[0]
    count = sum(x.size for x in jax.tree.leaves(shapes))
    # The closed form: two kernels of attention, three gated ones, two norms; a table, a norm.
    inner = config.hidden or round(config.width * 8 / 3 / 64) * 64
    block = 4 * config.width**2 + 3 * config.width * inner + 2 * config.width
    assert count == config.depth * block + 256 * config.width + config.width
    assert abs(count / 1e6 - million) < within
    optimizer = make_optimizer(experiment.optimizer, experiment.steps)
    stepper = jt.make_step(task.loss_fn, optimizer, experiment.policy)
    state = jax.eval_shape(lambda p: stepper.init(p, key=jax.random.key(0)), shapes)
    batch = {"tokens": jax.ShapeDtypeStruct((experiment.batch_size, length + 1), jnp.uint8)}
    text = stepper.step.lower(state, batch).as_text()
    assert f"x{length}x{config.width}x" in text
    logits = f"{experiment.batch_size * length}x256xf32"
    assert logits not in text and f"{experiment.batch_size}x{length}x256xf32" not in text


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"width": 0}, "width is 0"),
        ({"width": 20, "heads": 4}, r"width is 20; expected a multiple of 2 x heads \(8\)"),
        ({"depth": 0}, "depth is 0"),
        ({"hidden": 0}, "hidden is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"loss_chunk": 0}, "loss_chunk is 0"),
    ],
)
def test_an_invalid_setting_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        task_of(config=gpt(**fields))
