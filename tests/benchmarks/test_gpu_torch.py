"""PyTorch's rows run the network of jmp_train: loss, gradients and updates, at toy size."""

# pyright: reportMissingImports=false

import dataclasses

import jax
import numpy as np
import optax
import pytest

from benchmarks.gpu import jax_rows, measure, table

torch = pytest.importorskip("torch", reason="torch is an optional peer of the GPU benchmark")

from benchmarks.gpu import torch_rows

GPT = table.workload("gpt_124m", toy=True)
MLP = table.workload("mlp_wide", toy=True)
IMAGES = [table.workload(name, toy=True) for name in ("resnet50", "vit_b")]
BATCH = 4


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def both(workload):
    """Our loss and parameters, and the torch network with the same parameters."""
    task = jax_rows.task_of(table.Row(workload.name, "fp32", "jmp_train"), workload)
    params, model_state = task.init(jax.random.key(0))
    # Scales of one and biases of zero would hide where they are applied.
    params = jax.tree.map(
        lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), params
    )
    net = torch_rows.network(workload)
    torch_rows.copy_parameters(net, workload, params)
    options = {} if model_state is None else {"model_state": model_state}
    return lambda p, batch: task.loss_fn(p, batch, **options)[0], params, net


def batches(workload, count):
    source = measure.batches(workload, BATCH)
    return [next(source) for _ in range(count)]


def torch_loss(net, arrays):
    return net({name: torch.from_numpy(x) for name, x in arrays.items()}, torch.float32)


@pytest.mark.parametrize("again", [False, True])
def test_gpt_has_the_loss_and_gradients_of_ours(again):
    loss_fn, params, net = both(GPT)
    net.again = again
    check_loss_and_gradients(GPT, loss_fn, params, net)


def test_mlp_has_the_loss_and_gradients_of_ours():
    check_loss_and_gradients(MLP, *both(MLP))


@pytest.mark.parametrize("workload", IMAGES, ids=lambda w: w.name)
def test_networks_for_images_have_the_loss_and_gradients_of_ours(workload):
    check_loss_and_gradients(workload, *both(workload))


def test_bottlenecks_have_the_loss_and_gradients_of_ours():
    resnet = dataclasses.replace(IMAGES[0], width=64, size="50")
    check_loss_and_gradients(resnet, *both(resnet))


def check_loss_and_gradients(workload, loss_fn, params, net):
    arrays = batches(workload, 1)[0]
    with jax.default_matmul_precision("highest"):
        want, grads = jax.value_and_grad(loss_fn)(params, arrays)
    loss = torch_loss(net, arrays)
    loss.backward()
    # float32 sums in another order; measured differences are below a third of this.
    assert loss.item() == pytest.approx(float(want), rel=2e-6)
    named = torch_rows.by_torch_name(workload, grads)
    for name, parameter in net.named_parameters():
        scale = np.abs(named[name]).max()
        np.testing.assert_allclose(
            parameter.grad.numpy(), named[name], rtol=0, atol=1e-5 * scale, err_msg=name
        )


@pytest.mark.parametrize("workload", [GPT, MLP], ids=lambda w: w.name)
def test_five_updates_follow_optax_adamw(workload):
    loss_fn, params, net = both(workload)
    workload = dataclasses.replace(workload, learning_rate=1e-2)
    # Written out, not taken from the rows of JAX: the values that the benchmark states.
    ours = optax.adamw(1e-2, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)
    theirs = torch_rows.adamw(net, workload)
    state = ours.init(params)
    grad_fn = jax.jit(jax.value_and_grad(loss_fn))
    for arrays in batches(workload, 5):
        with jax.default_matmul_precision("highest"):
            want, grads = grad_fn(params, arrays)
        updates, state = ours.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        loss = torch_loss(net, arrays)
        theirs.zero_grad(set_to_none=True)
        loss.backward()
        theirs.step()
        # A first update is the gradient's sign, so gradients near zero turn on rounding.
        assert loss.item() == pytest.approx(float(want), rel=1e-4)


@pytest.mark.parametrize("workload", [GPT, MLP], ids=lambda w: w.name)
def test_a_row_starts_from_our_parameters(workload):
    row = table.Row(workload.name, "fp32", "PyTorch")
    arrays = batches(workload, 1)[0]
    trainer = torch_rows.make(row, workload, BATCH, True)
    task = jax_rows.task_of(dataclasses.replace(row, program="jmp_train"), workload)
    with jax.default_matmul_precision("highest"):
        want = task.loss_fn(task.init(jax.random.key(0))[0], arrays)[0]
    loss = trainer.wait(trainer.step(trainer.put(arrays)))
    assert loss == pytest.approx(float(want), rel=2e-6)  # float32 sums in another order


@pytest.mark.parametrize("precision", table.PRECISIONS)
@pytest.mark.parametrize("workload", [GPT, MLP, *IMAGES], ids=lambda w: w.name)
def test_trainer_learns_in_every_precision(workload, precision):
    row = table.Row(workload.name, precision, "PyTorch")
    trainer = torch_rows.make(row, workload, BATCH, True)
    batch = trainer.put(batches(workload, 1)[0])
    found = [trainer.wait(trainer.step(batch)) for _ in range(30)]
    assert np.isfinite(found).all()
    assert found[-1] < 0.95 * found[0]
    assert trainer.steps_per_call == 1
    assert trainer.compile_s is not None


def test_making_a_trainer_takes_no_step():
    row = table.Row("gpt_124m", "fp32", "PyTorch")
    trainer = torch_rows.make(row, GPT, BATCH, True)
    fresh = torch_rows.network(GPT)
    torch_rows.copy_parameters(fresh, GPT, torch_rows.our_parameters(GPT))
    optimizer = torch_rows.adamw(fresh, GPT)
    for arrays in batches(GPT, 3):
        loss = torch_loss(fresh, arrays)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert trainer.wait(trainer.step(trainer.put(arrays))) == loss.item()
    assert trainer.parameters == sum(p.numel() for p in fresh.parameters())


def test_half_precision_multiplies_in_half(monkeypatch):
    seen = []
    real = torch.nn.functional.linear

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func in (real, torch.nn.functional.scaled_dot_product_attention):
                seen.append(out.dtype)
            return out

    for precision, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        row = table.Row("gpt_124m", precision, "PyTorch")
        seen.clear()
        with Watch():
            torch_rows.make(row, GPT, BATCH, True)
        # Four products and one attention a block, and the head.
        assert seen == [dtype] * (5 * GPT.depth + 1)


def test_overflowing_step_is_skipped_and_counted():
    row = table.Row("mlp_wide", "fp16", "PyTorch")
    trainer = torch_rows.make(row, MLP, BATCH, True)
    arrays = batches(MLP, 1)[0]
    before = trainer.wait(trainer.step(trainer.put(arrays)))
    assert trainer.skipped() == 0
    large = {**arrays, "image": np.full_like(arrays["image"], 1e30)}  # infinite in float16
    trainer.step(trainer.put(large))
    assert trainer.skipped() == 1
    after = trainer.wait(trainer.step(trainer.put(arrays)))
    assert np.isfinite(after)
    assert after < before


def test_several_steps_a_dispatch_are_out_of_scope():
    row = table.Row("mlp_digits", "bf16", "PyTorch", (("steps", "50"),))
    with pytest.raises(ValueError, match="PyTorch takes one step in a dispatch"):
        torch_rows.make(row, table.workload("mlp_digits", True), 32, True)


def test_out_of_memory_computes_blocks_again(monkeypatch):
    tried = []
    real = torch_rows.Gpt.forward

    def forward(self, batch, dtype):
        tried.append(self.again)
        if not self.again:
            raise torch.OutOfMemoryError("out of memory")
        return real(self, batch, dtype)

    monkeypatch.setattr(torch_rows.Gpt, "forward", forward)
    trainer = torch_rows.make(table.Row("gpt_124m", "bf16", "PyTorch"), GPT, BATCH, True)
    assert tried == [False, True]
    assert np.isfinite(trainer.wait(trainer.step(trainer.put(batches(GPT, 1)[0]))))
