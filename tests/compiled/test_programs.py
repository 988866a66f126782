"""The bundled families' steps, compiled for devices that are not here: what their programs say."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jmp_train.config.find import find_experiment
from jmp_train.config.settings import with_settings
from jmp_train.plan.compiled import compile_lowered, devices_of, lower_step, plan_step
from jmp_train.plan.devices import DEVICES, host_of
from jmp_train.plan.program import Program
from jmp_train.runs.build import load_dataset
from jmp_train.sharding import make_mesh
from jmp_train.spec import DataSpec

pytestmark = pytest.mark.compiled

FAMILIES = ("mlp", "gpt", "cnn", "vit")
HALF = {"fp16": "f16", "bf16": "bf16"}
ASKED = re.compile(
    r"stablehlo\.(?:dot_general|convolution)\b.*: \(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\)"
)
spec_of = functools.cache(lambda name: load_dataset(find_experiment(name)).spec)


TARGETS = {"one h100": ("h100", 1), "eight h100": ("h100", 8), "tpu-v5e 2x4": ("tpu-v5e", 8)}


def experiment(name, **fields):
    own = find_experiment(name)
    if name.startswith("gpt"):
        model = dataclasses.replace(own.model, width=256, depth=2)
        own = dataclasses.replace(own, model=model)
    return dataclasses.replace(own, batch_size=64, **fields)


@functools.cache
def lowered_of(name, device, count=1, mesh=""):
    own = experiment(name, mesh=mesh)
    return lower_step(own, spec_of(name), DEVICES[device], count)[0]


@functools.cache
def text_of(name, device, count=1, mesh=""):
    return lowered_of(name, device, count, mesh).compile().as_text()


def products(text):
    """The dtype of the operands of each product and convolution of a program, by their instructions."""
    shapes = dict(re.findall(r"%?([\w.$-]+) = \(?([a-z]+\d*[a-z0-9]*)\[", text))
    found = []
    for operands in re.findall(r" (?:dot|convolution)\(([^)]*)\)", text):
        names = re.findall(r"%([\w.$-]+)", operands)
        found.append({shapes.get(name) for name in names})
    for line in text.splitlines():  # what cuBLAS and cuDNN compute
        if "custom-call(" in line and re.search(
            r"gemm|conv", line.partition("custom_call_target=")[2][:40]
        ):
            names = re.findall(r"%([\w.$-]+)", line.partition("custom-call(")[2].partition(")")[0])
            found.append({shapes.get(name) for name in names[:2]})
    return found


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("family", FAMILIES)
def test_products_run_in_half_and_the_optimizer_in_float32(family, precision, target):
    device, count = TARGETS[target]
    mesh, half = "fsdp=8" if count == 8 else "", HALF[precision]
    text = text_of(f"{family}_{precision}", device, count, mesh)
    assert f"num_partitions={count}" in text or count == 1
    found = products(text)
    assert found
    if precision == "fp16" and device == "tpu-v5e":
        # A TPU has no float16 products: it converts what is asked for.
        asked = lowered_of(f"{family}_{precision}", device, count, mesh).as_text()
        found = [set(operands) for operands in ASKED.findall(asked)]
        assert found
    wide = [dtypes for dtypes in found if not dtypes <= {half}]
    assert len(wide) <= 0.02 * len(found), wide
    # Parameters, gradients' moments and statistics enter and leave the step in float32.
    layout = re.search(r"entry_computation_layout=\{(.*)\}", text)
    assert layout and "f32[" in layout[1]
    assert not {"f16", "bf16"} & set(re.findall(r"\b(\w+)\[", layout[1]))
    roots = [x for x in text.splitlines() if "sqrt(" in x and "[" in x]
    assert roots and all(re.search(r"= f32\[", x) or half not in x for x in roots)


@pytest.mark.parametrize("mesh", ["data=2,fsdp=4", "fsdp=8"])
@pytest.mark.parametrize("device", ["h100", "tpu-v5e"])
def test_gathers_carry_the_cast_and_are_not_repeated(device, mesh):
    own = experiment("gpt_bf16")
    program = Program(text_of("gpt_bf16", device, 8, mesh))
    found = {}
    for c in program.collectives():
        found.setdefault(c.kind, {}).setdefault(c.dtype, 0)
        found[c.kind][c.dtype] += c.bytes
    width, depth = own.model.width, own.model.depth
    inner = round(width * 8 / 3 / 64) * 64
    weights = depth * (4 * width**2 + 3 * width * inner) + 256 * width
    assert set(found["all-gather"]) == {"bf16"}
    gathered = found["all-gather"]["bf16"]
    # Each once, and the embedding, which is looked up and makes the logits, twice at most.
    assert 2 * weights <= gathered <= 2 * weights + 2 * 256 * width + 8 * width * depth * 2
    assert "all-to-all" not in found
    # A TPU may sum gradients into shares by permutations that go on beside a product.
    assert set(found.get("collective-permute", ())) <= ({"bf16"} if device == "tpu-v5e" else set())


def test_gathers_stay_on_a_host_and_data_crosses_hosts():
    lowered = lowered_of("gpt_bf16", "h100", 16, "data=2,fsdp=8")
    found = Program(lowered.compile().as_text(), host_of(DEVICES["h100"], 16)).collectives()
    large = {(c.kind, c.devices): c.hosts for c in found if c.bytes > 1000}
    assert large == {("all-gather", 8): 1, ("reduce-scatter", 8): 1, ("all-reduce", 2): 2}


@pytest.mark.parametrize("device", ["h100", "tpu-v5e"])
@pytest.mark.parametrize("asked,dtype", [("compute", "bf16"), ("float32", "f32")])
def test_gradients_are_reduced_in_the_dtype_that_is_asked_for(device, asked, dtype):
    own = experiment("gpt_bf16", mesh="fsdp=8", reduce_dtype=asked)
    lowered, _ = lower_step(own, spec_of("gpt_bf16"), DEVICES[device], 8)
    sums = [c for c in Program(lowered.compile().as_text()).collectives() if c.kind != "all-gather"]
    total = sum(c.bytes for c in sums)
    # The loss sums the gradient of its embedding in float32 in both.
    assert sum(c.bytes for c in sums if c.dtype == dtype) > 0.9 * total


def by_hand(mesh, policy):
    """A network of two layers in plain JAX with shardings placed by hand, and ours, as programs."""
    width, inner, size = 256, 1024, 512
    shapes = {"up": (width, inner), "down": (inner, width)}
    specs = {"up": P(None, "fsdp"), "down": P("fsdp", None)}
    place = lambda spec: NamedSharding(mesh, spec)
    dtype = jnp.bfloat16 if policy == "mixed_bfloat16" else jnp.float32

    def loss_fn(params, batch):
        hidden = jnp.tanh(batch["x"].astype(dtype) @ params["up"].astype(dtype))
        out = (hidden @ params["down"].astype(dtype)).astype(jnp.float32)
        return jnp.mean((out - batch["y"]) ** 2)

    def hand(params, state, batch):
        def loss(params):
            whole = jax.tree.map(lambda p, s: jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(p.astype(dtype), place(s)), place(P())), params, specs)  # fmt: skip
            return loss_fn(whole, batch)

        grads = jax.grad(loss)(params)
        grads = jax.tree.map(
            lambda g, s: jax.lax.with_sharding_constraint(g, place(s)), grads, specs
        )
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    optimizer = optax.sgd(0.1, momentum=0.9)
    params = {
        k: jax.ShapeDtypeStruct(s, jnp.float32, sharding=place(specs[k])) for k, s in shapes.items()
    }
    batch = {k: jax.ShapeDtypeStruct((size, width), jnp.float32, sharding=place(P(("data", "fsdp")))) for k in "xy"}  # fmt: skip
    return loss_fn, hand, optimizer, params, batch


@pytest.mark.parametrize("device", ["h100", "tpu-v5e"])
@pytest.mark.parametrize("shape", ["fsdp=8", "data=2,fsdp=4"])
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_not_a_byte_more_is_sent_than_by_hand(device, shape, policy):
    import jmp_train as jt

    mesh = make_mesh(shape, devices_of(DEVICES[device], 8))
    loss_fn, hand, optimizer, params, batch = by_hand(mesh, policy)
    places = jax.tree.map(lambda x: x.sharding, params)
    state = jax.eval_shape(optimizer.init, params)
    own = jt.sharding.Sharded(mesh)
    follow = own.follow(state, params)
    assert own.shardings(params) == places
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, follow
    )
    theirs = jax.jit(hand, out_shardings=(places, follow)).lower(params, state, batch).compile()
    stepper = jt.make_step(loss_fn, optimizer, None, parallel=own)
    ours_state = jax.eval_shape(lambda p: jt.make_step(loss_fn, optimizer, None).init(p), params)
    placed = own.follow(ours_state, ours_state.params)
    ours_state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), ours_state, placed)  # fmt: skip
    ours = (
        jax.jit(stepper.pure_step, out_shardings=(placed, None)).lower(ours_state, batch).compile()
    )
    sent = [sum(c.sent for c in Program(x.as_text()).collectives()) for x in (ours, theirs)]
    assert sent[0] <= sent[1] + 64  # and the loss, which theirs does not return


def test_what_a_tpu_has_no_room_for_is_a_plan_that_does_not_fit():
    own = dataclasses.replace(find_experiment("gpt_1b3_bf16"), batch_size=16)
    found = plan_step(own, spec_of("gpt_1b3_bf16"), DEVICES["tpu-v5e"], 1)
    assert "hbm" in found["refused"].lower() and found["peak"] > 15.75 * 2**30


@pytest.mark.parametrize("family", ["gpt_124m"])
def test_half_precision_needs_little_more_than_half_the_temporaries(family):
    """Gradients and sums of the optimizer stay float32, so that half is not reached."""
    sizes = {}
    for precision in ("fp32", "fp16", "bf16"):
        own = dataclasses.replace(find_experiment(f"{family}_{precision}"), batch_size=8)
        lowered, _ = lower_step(own, spec_of(f"{family}_{precision}"), DEVICES["h100"], 1)
        compiled = lowered.compile()
        sizes[precision] = compiled.memory_analysis().temp_size_in_bytes
        assert not re.search(r"\[(\d+,)*1024,1024\]", compiled.as_text())  # no scores of all pairs
    # Measured: 0.559; with jax 0.12.0, 0.5603.
    assert max(sizes["fp16"], sizes["bf16"]) <= 0.565 * sizes["fp32"]


@pytest.mark.parametrize(
    "family,settings",
    [  # measured: 0.489 and 0.488; 0.539 and 0.534
        ("cnn", {"model.size": "50", "model.reduce": 4}),
        ("vit", {"model.size": "B", "model.patch": 16}),
    ],
)
def test_temporaries_of_networks_for_images_of_224_pixels(family, settings):
    example = {"image": np.zeros((2, 224, 224, 3), np.float32), "label": np.zeros(2, np.int32)}
    spec, sizes = DataSpec.of(example, classes=1000), {}
    for precision in ("fp32", "fp16", "bf16"):
        own = with_settings(find_experiment(f"{family}_{precision}"), settings)
        own = dataclasses.replace(own, batch_size=32)
        compiled = compile_lowered(lower_step(own, spec, DEVICES["h100"], 1)[0])
        sizes[precision] = compiled.memory_analysis().temp_size_in_bytes
        if precision != "fp32":
            found = products(compiled.as_text())
            assert found and all(dtypes == {HALF[precision]} for dtypes in found)
    assert max(sizes["fp16"], sizes["bf16"]) <= 0.56 * sizes["fp32"]


@pytest.mark.parametrize("shape", ["data=8,fsdp=8", "data=2,fsdp=32", "fsdp=16,tensor=4"])
def test_sizes_may_split_an_axis_of_the_torus_of_tpus(shape):
    mesh = make_mesh(shape, devices_of(DEVICES["tpu-v5p"], 64))
    sizes = {axis: size for axis, size in mesh.shape.items() if size > 1}
    assert ",".join(f"{axis}={size}" for axis, size in sizes.items()) == shape
    assert len({device.id for device in mesh.devices.ravel()}) == 64
