"""Wrong arguments of `make_step` and its functions raise errors of one line."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmp_train as jt
from jmp_train import testing
from jmp_train.step import step_gradients
from jmp_train.testing import assert_one_compilation


def loss_fn(params, batch):
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]).astype(jnp.float32) ** 2)


PARAMS = {"w": jnp.zeros(4)}
BATCH = {"x": jnp.eye(4), "y": jnp.ones(4)}


@pytest.mark.parametrize(
    "arguments,options,message",
    [
        ((loss_fn, optax.adam(0.1)), {"loss_scale": 1024.0}, r"such as StaticLossScale\(1024.0\)"),
        (
            (loss_fn, optax.adam(0.1)),
            {"loss_scale": np.float32(8)},
            r"StaticLossScale\(8.0\)",
        ),
        (
            (loss_fn, optax.adam(0.1)),
            {"loss_scale": "dynamic"},
            "loss_scale is 'dynamic'; .* Dynam",
        ),
        ((loss_fn, optax.adam(0.1)), {"loss_scale": jt.StaticLossScale}, "expected a loss scale"),
        ((loss_fn, "adam"), {}, r"optimizer is 'adam'; .* such as optax.adam\(1e-3\)"),
        ((loss_fn, "lion"), {}, r"optimizer is 'lion'; .* such as optax.lion\(1e-3\)"),
        ((loss_fn, "AdamW"), {}, r"optimizer is 'AdamW'; .* such as optax.adamw\(1e-3\)"),
        ((loss_fn, optax.sgd), {}, r"optimizer is .*; .* such as optax.sgd\(1e-3\)"),
        ((loss_fn, None), {}, "optimizer is None; expected an Optax transformation"),
        ((optax.adam(0.1), loss_fn), {}, r"optimizer first .* expected make_step\(loss_fn, optim"),
        ((jnp.float32(3), optax.adam(0.1)), {}, r"expected a function loss_fn\(params, batch\)"),
    ],
)
def test_wrong_loss_optimizer_or_scale_is_refused(arguments, options, message):
    with pytest.raises(TypeError, match=message):
        jt.make_step(*arguments, "mixed_float16", **options)


@pytest.mark.parametrize("value", [np.nan, np.inf, 2.0**200, -1.0, 2.0**-140])
def test_a_static_scale_that_cannot_work_is_refused(value):
    with pytest.raises(ValueError, match="loss_scale is .*; expected 0 < it < inf"):
        jt.StaticLossScale(value)


def test_a_static_scale_of_zero_is_refused_where_it_is_used():
    zero = jt.StaticLossScale(0)  # jmp's own tests construct it
    for use in (
        lambda: jt.make_step(loss_fn, optax.adam(0.1), loss_scale=zero),
        lambda: jt.optim.loss_scaling(optax.adam(0.1), zero),
        lambda: jt.value_and_grad(loss_fn)(PARAMS, BATCH, loss_scale=zero),
    ):
        with pytest.raises(ValueError, match="loss_scale is 0.0; expected 0 < it < inf"):
            use()


def test_value_and_grad_refuses_a_number_for_a_loss_scale():
    with pytest.raises(TypeError, match=r"loss_scale is 8; expected .* StaticLossScale\(8\)"):
        jt.value_and_grad(loss_fn)(PARAMS, BATCH, loss_scale=8)


@pytest.mark.parametrize("key", [0, 1.5, "0", np.zeros(2), jax.random.split(jax.random.key(0))])
def test_invalid_key_is_refused(key):
    stepper = jt.make_step(loss_fn, optax.adam(0.1))
    with pytest.raises(TypeError, match=r"expected a PRNG key such as jax.random.key\(0\)"):
        stepper.init(PARAMS, key=key)


@pytest.mark.parametrize("key", [jax.random.key(0), jax.random.PRNGKey(0)], ids=["typed", "raw"])
def test_typed_and_raw_keys_are_taken(key):
    def noisy(params, batch, *, key):
        return loss_fn(params, batch) + jax.random.uniform(key)

    stepper = jt.make_step(noisy, optax.adam(0.1))
    _, info = stepper.step(stepper.init(PARAMS, key=key), BATCH)
    want = 1 + jax.random.uniform(jax.random.fold_in(key, 0))
    assert float(info.loss) == float(want)


@pytest.mark.parametrize("function", ["step", "scan", "pure_step"])
def test_parameters_in_the_place_of_the_state_are_refused(function):
    stepper = jt.make_step(loss_fn, optax.adam(0.1))
    with pytest.raises(TypeError, match="the state is a dict; expected the TrainState"):
        getattr(stepper, function)(PARAMS, BATCH)


@pytest.mark.parametrize("function", ["step", "scan"])
def test_a_donated_state_is_answered_with_what_to_do(function):
    stepper = jt.make_step(loss_fn, optax.adam(0.1), "mixed_float16")
    state = stepper.init(PARAMS)
    batch = BATCH if function == "step" else jax.tree.map(lambda x: x[None], BATCH)
    run = getattr(stepper, function)
    run(state, batch)
    for _ in range(2):  # with and without a compiled program
        with pytest.raises(ValueError, match="this state was donated .* the last step returned"):
            run(state, batch)


def test_what_donates_nothing_names_a_donated_state_too():
    stepper = jt.make_step(loss_fn, optax.adam(0.1))
    state = stepper.init(PARAMS)
    stepper.step(state, BATCH)
    for function in (stepper.pure_step, step_gradients(loss_fn, "float32")):
        with pytest.raises(ValueError, match="this state was donated"):
            function(state, BATCH)


def test_an_error_while_a_step_runs_is_not_taken_for_a_donated_state():
    def host(x):
        if not np.isfinite(x):
            raise RuntimeError("bad sample in shard 17")
        return np.float32(0)

    def checked(params, batch):
        loss = jnp.sum(params["w"] * batch)
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return loss + jax.pure_callback(host, shape, jax.lax.stop_gradient(loss))

    stepper = jt.make_step(checked, optax.sgd(0.1))
    state, _ = stepper.step(stepper.init(PARAMS), jnp.ones(4))
    with pytest.raises(Exception, match="bad sample in shard 17"):
        jax.block_until_ready(stepper.step(state, jnp.array([1.0, jnp.inf, 1.0, 1.0])))


def test_a_stepper_can_be_copied():
    stepper = copy.deepcopy(jt.make_step(loss_fn, optax.sgd(0.1)))
    state, _ = stepper.step(stepper.init(PARAMS), BATCH)
    np.testing.assert_allclose(state.params["w"], 0.05)  # the gradient is -2 / 4


def test_an_error_of_the_loss_function_is_not_taken_for_a_donated_state():
    def failing(params, batch):
        raise RuntimeError("from the loss")

    stepper = jt.make_step(failing, optax.adam(0.1))
    with pytest.raises(RuntimeError, match="from the loss"):
        stepper.step(stepper.init(PARAMS), BATCH)


@pytest.mark.parametrize(
    "returned", [lambda p: p["w"], lambda p: [p["w"].sum(), 1], lambda p: "loss", lambda p: None]
)
def test_a_loss_that_is_none_is_told_without_arguments_of_value_and_grad(returned):
    stepper = jt.make_step(lambda params, batch: returned(params), optax.sgd(0.1))
    with pytest.raises(TypeError, match="the loss .*; expected a real scalar") as error:
        stepper.step(stepper.init(PARAMS), BATCH)
    assert "has_aux" not in str(error.value)
    with pytest.raises(TypeError, match="pass has_aux=True"):
        jt.value_and_grad(lambda params, batch: returned(params))(PARAMS, BATCH)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: optax.chain(optax.clip(1.0), x)])
def test_an_optimizer_in_loss_scaling_is_refused(wrap):
    # It would divide by its own scale gradients that the step has unscaled.
    scaled = wrap(jt.optim.loss_scaling(optax.sgd(0.1)))
    for policy in ("mixed_float16", "float32"):
        with pytest.raises(ValueError, match="unscaled twice; expected the optimizer alone"):
            jt.make_step(loss_fn, scaled, policy).init(PARAMS)
    unscaled = wrap(jt.optim.loss_scaling(optax.sgd(0.5), jt.NoOpLossScale()))
    stepper = jt.make_step(loss_fn, unscaled)
    state, _ = stepper.step(stepper.init(PARAMS), BATCH)
    np.testing.assert_allclose(state.params["w"], 0.25)  # the gradient is -2 / 4


@testing.policies("bf16", "f16", "mixed_float16", "float32")
def test_python_numbers_become_parameters_of_the_policys_dtype(policy):
    stepper = jt.make_step(lambda params, batch: params["c"] * 2.0, optax.sgd(0.1), policy)
    state = stepper.init({"c": 1.0})
    assert state.params["c"].dtype == jt.get_policy(policy).param_dtype
    with assert_one_compilation(stepper.step) as step:
        for _ in range(2):
            state, _ = step(state, None)


def test_the_caps_scale_is_the_one_that_is_reported():
    # A float16 loss carries back no more than 2^15.
    def narrow(params, batch):
        return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)

    stepper = jt.make_step(narrow, optax.sgd(0.1), "mixed_float16")
    state, info = stepper.step(stepper.init(PARAMS), BATCH)
    assert info.finite and info.loss_scale == 2.0**15 == state.loss_scale.loss_scale
    static = jt.StaticLossScale(2.0**20)  # scanned, the state keeps its structure
    stepper = jt.make_step(narrow, optax.sgd(0.1), "mixed_float16", loss_scale=static)
    state, infos = stepper.scan(
        stepper.init(PARAMS), jax.tree.map(lambda x: jnp.stack([x, x]), BATCH)
    )
    assert infos.loss_scale.tolist() == [2.0**15, 2.0**15] and state.loss_scale == static
    result = jt.value_and_grad(narrow, "mixed_float16")(
        PARAMS,
        jax.tree.map(lambda x: x.astype(jnp.float16), BATCH),
        loss_scale=jt.StaticLossScale(2.0**20),
    )
    assert result.scaled_by == 2.0**15 and jnp.result_type(result.scaled_by) == jnp.float32


@pytest.mark.parametrize(
    "given,returned",
    [
        (0, 0.5),
        (0, jnp.float16(1)),
        (1.0, jnp.complex64(1)),
        (1.0, 1),
        (True, 1),
        (jnp.int32(0), jnp.uint32(0)),
    ],
)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_model_state_of_another_kind_is_refused_by_its_path(given, returned, micro_batches):
    def changing(params, batch, *, model_state):
        return (params * batch).sum(), None, {"a": {"n": returned}}

    stepper = jt.make_step(changing, optax.sgd(0.1), micro_batches=micro_batches)
    state = stepper.init(jnp.ones(2), model_state={"a": {"n": given}})
    with pytest.raises(TypeError, match=r"'a/n' with shape \(\) and dtype .*; expected .* dtype"):
        stepper.step.lower(state, jnp.ones((2, 2)))


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.float16])
def test_a_mask_that_is_not_boolean_is_refused(dtype):
    evaluate = jt.make_evaluate(lambda params, batch: {"value": batch["x"]}, "mixed_bfloat16")
    batch = {"x": np.ones(1001, np.float32), "mask": np.ones(1001, dtype)}
    with pytest.raises(
        TypeError, match="the mask has dtype .*; expected an array of bool, such as mask != 0"
    ):
        evaluate(jnp.float32(0), [batch])
    with pytest.raises(TypeError, match="the mask is not an array; expected an array of bool"):
        evaluate(jnp.float32(0), [{**batch, "mask": [True] * 1001}])
    # Summed in bfloat16, the 1,001 would be 1,000.
    assert evaluate(jnp.float32(0), [{**batch, "mask": batch["mask"] != 0}]) == {"value": 1.0}


MESH = jax.make_mesh((1,), ("data",))


@pytest.mark.parametrize(
    "parallel,line",
    [
        (MESH, r"parallel is a Mesh; expected DataParallel\(mesh\)"),
        (jt.DataParallel(None), "mesh of DataParallel is a NoneType; expected a jax.sharding.Mesh"),
        (jt.DataParallel(MESH, ("data",)), r"axis_name is \('data',\); expected the name of one"),
    ],
)
def test_devices_of_another_type_are_refused(parallel, line):
    with pytest.raises(TypeError, match=line):
        jt.make_step(loss_fn, optax.adam(0.1), parallel=parallel)
