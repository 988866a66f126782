"""The residual network and the vision transformer against float64, and under each policy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jmp_train as jt
from jmp_train.models import Model, ResNet, Vit
from jmp_train.spec import DataSpec
from jmp_train.tasks import make_task
from jmp_train.testing import assert_contractions_in

SHAPE, CLASSES = (8, 8, 3), 5
IMAGES = np.random.default_rng(0).normal(size=(6, *SHAPE)).astype(np.float32)
LABELS = np.arange(6) % CLASSES
MODELS = {
    "resnet": lambda **options: ResNet(3, CLASSES, rngs=nnx.Rngs(0), **options),
    "vit": lambda **options: Vit(SHAPE, CLASSES, rngs=nnx.Rngs(0), **options),
}


def count(model):
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def abstract(make):
    return nnx.eval_shape(make)


@pytest.mark.parametrize("size,parameters", [("18", 11_689_512), ("50", 25_557_032)])
def test_a_resnet_has_the_parameters_of_the_published_one(size, parameters):
    # torchvision's resnet18 and resnet50 for 1,000 classes.
    model = abstract(lambda: ResNet(3, 1000, size, 4, rngs=nnx.Rngs(0)))
    assert count(model) == parameters


@pytest.mark.parametrize(
    "size,published", [("Ti", 5_717_416), ("S", 22_050_664), ("B", 86_567_656)]
)
def test_a_vit_has_the_parameters_of_the_published_one_less_the_class_token(size, published):
    # timm's vit_*_patch16_224 for 1,000 classes, with a class token and its position.
    model = abstract(lambda: Vit((224, 224, 3), 1000, size, 16, rngs=nnx.Rngs(0)))
    assert count(model) == published - 2 * {"Ti": 192, "S": 384, "B": 768}[size]


@pytest.mark.parametrize("reduce,after", [(1, 224), (2, 112), (4, 112)])  # 4: and a pooling by 2
def test_the_first_layers_reduce_images(reduce, after):
    model = abstract(lambda: ResNet(3, 5, "18", reduce, rngs=nnx.Rngs(0)))
    out = jax.eval_shape(lambda m, x: m.stem(x), model, jnp.ones((1, 224, 224, 3)))
    assert out.shape == (1, after, after, 64) and model.pools == (reduce == 4)


def randomised(model):
    """The model with every parameter and statistic drawn anew, so that no zero hides a term."""
    rng = np.random.default_rng(1)

    def draw(path, x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        values = rng.normal(0, 0.3, x.shape)
        return jnp.asarray(np.abs(values) + 0.5 if "var" in str(path) else values, x.dtype)

    state = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
    nnx.update(model, jax.tree.map_with_path(draw, state))
    return model


def array(variable):
    return np.asarray(variable[...], np.float64)


def conv64(x, conv, stride):
    """A convolution in NumPy, float64, with XLA's SAME padding."""
    kernel = array(conv.kernel)
    size, (height, width) = kernel.shape[0], x.shape[1:3]
    pads = []
    for length in (height, width):
        total = max((-(-length // stride) - 1) * stride + size - length, 0)
        pads.append((total // 2, total - total // 2))
    x = np.pad(x, ((0, 0), *pads, (0, 0)))
    out = np.zeros((len(x), -(-height // stride), -(-width // stride), kernel.shape[3]))
    for i in range(out.shape[1]):
        for j in range(out.shape[2]):
            part = x[:, i * stride : i * stride + size, j * stride : j * stride + size]
            out[:, i, j] = np.einsum("bhwc,hwco->bo", part, kernel)
    return out


def norm64(x, norm):
    centred = (x - array(norm.mean)) / np.sqrt(array(norm.var) + 1e-5)
    return centred * array(norm.scale) + array(norm.bias)


def resnet64(model, x):
    x = np.maximum(norm64(conv64(x, model.stem, 1), model.stem_norm), 0)
    for index, block in enumerate(model.blocks):
        stride = 2 if index else 1
        y = np.maximum(norm64(conv64(x, block.convs[0], stride), block.norms[0]), 0)
        y = norm64(conv64(y, block.convs[1], 1), block.norms[1])
        if block.shortcut is not None:
            x = norm64(conv64(x, block.shortcut, stride), block.shortcut_norm)
        x = np.maximum(x + y, 0)
    return x.mean((1, 2)) @ array(model.head.kernel) + array(model.head.bias)


def layer_norm64(x, norm):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return scaled * array(norm.scale) + array(norm.bias)


def gelu64(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def attention64(x, attention):
    q, k, v = (
        np.einsum("btd,dhk->bthk", x, array(part.kernel)) + array(part.bias)
        for part in (attention.query, attention.key, attention.value)
    )
    scores = np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("bhts,bshk->bthk", weights, v)
    return np.einsum("bthk,hkd->btd", mixed, array(attention.out.kernel)) + array(
        attention.out.bias
    )


def vit64(model, x):
    kernel = array(model.embed.kernel)
    size = kernel.shape[0]
    side = x.shape[1] // size
    patches = x.reshape(len(x), side, size, side, size, 3).transpose(0, 1, 3, 2, 4, 5)
    x = np.einsum("bijhwc,hwcd->bijd", patches, kernel) + array(model.embed.bias)
    x = x.reshape(len(x), -1, x.shape[-1]) + array(model.positions)
    for block in model.blocks:
        x = x + attention64(layer_norm64(x, block.norm1), block.attention)
        y = gelu64(layer_norm64(x, block.norm2) @ array(block.up.kernel) + array(block.up.bias))
        x = x + y @ array(block.down.kernel) + array(block.down.bias)
    return layer_norm64(x, model.norm).mean(1) @ array(model.head.kernel) + array(model.head.bias)


@pytest.mark.parametrize("name,oracle", [("resnet", resnet64), ("vit", vit64)])
def test_outputs_are_those_of_float64(name, oracle):
    model = randomised(MODELS[name]())
    model.eval()
    expected = oracle(model, IMAGES.astype(np.float64))
    assert np.abs(expected).max() > 1
    # Some hundred roundings of 2**-24, relative to the largest output.
    found = np.asarray(model(IMAGES))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_many_patches_are_attended_to_as_in_float64():
    model = randomised(Vit((24, 24, 3), CLASSES, patch=2, rngs=nnx.Rngs(0)))  # 144 patches
    model.eval()
    images = np.random.default_rng(1).normal(size=(2, 24, 24, 3)).astype(np.float32)
    expected = vit64(model, images.astype(np.float64))
    found = np.asarray(model(images))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_attention_promotes_as_flax_does():
    model = Vit(SHAPE, CLASSES, patch=2, rngs=nnx.Rngs(0))
    model.eval()
    attention = model.blocks[0].attention
    attention.key.dtype = attention.value.dtype = jnp.bfloat16
    tokens = jnp.ones((1, 4, 96))
    assert attention(tokens).dtype == jnp.float32
    own, attention.attention_fn = attention(tokens), nnx.dot_product_attention
    np.testing.assert_array_equal(own, attention(tokens))


@pytest.mark.parametrize("name", MODELS)
def test_two_networks_of_one_kind_have_equal_graphs(name):
    """Else a function under `nnx.jit` is compiled for each."""
    first, second = (nnx.split(abstract(MODELS[name]))[0] for _ in range(2))
    assert first == second and hash(first) == hash(second)


@pytest.mark.parametrize("name", MODELS)
def test_images_without_channels_have_one(name):
    if name == "resnet":
        model = ResNet(1, CLASSES, rngs=nnx.Rngs(0))
    else:
        model = Vit((8, 8), CLASSES, rngs=nnx.Rngs(0))
    model.eval()
    grey = IMAGES[..., 0]
    np.testing.assert_array_equal(model(grey), model(grey[..., None]))


NETWORKS = {
    "resnet": Model(
        ResNet,
        channels=lambda spec: spec.example["image"].shape[2],
        classes=lambda spec: spec.classes,
    ),
    "vit": Model(
        Vit, image=lambda spec: spec.example["image"].shape, classes=lambda spec: spec.classes
    ),
}


def trained(name, policy, steps):
    example = {
        "image": jax.ShapeDtypeStruct(SHAPE, jnp.float32),
        "label": jax.ShapeDtypeStruct((), jnp.int32),
    }
    precision = jt.get_precision(policy)
    task = make_task(NETWORKS[name], "classification", DataSpec(example, CLASSES), precision)
    stepper = jt.make_step(task.loss_fn, optax.adam(3e-3), precision)
    params, model_state = task.init(jax.random.key(0))
    state = stepper.init(params, model_state=model_state, key=jax.random.key(1))
    batch = {"image": IMAGES, "label": LABELS.astype(np.int32)}
    losses = []
    for _ in range(steps):
        state, info = stepper.step(state, batch)
        losses.append(float(info.loss))
    return stepper, state, batch, losses


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "float32"])
@pytest.mark.parametrize("name", MODELS)
def test_a_policy_from_outside_runs_products_in_half_and_learns(name, policy):
    stepper, state, batch, losses = trained(name, policy, 25)
    assert losses[-1] < 0.5 * losses[0]
    if policy != "float32":
        assert_contractions_in(stepper.pure_step, state, batch, dtype=policy.removeprefix("mixed_"))
    kept = [x for x in jax.tree.leaves(state.model_state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in kept} <= {jnp.dtype("float32")}
    assert bool(kept) == (name == "resnet")  # batch statistics


def test_blocks_are_dropped_for_whole_examples_in_training_alone():
    model = Vit(SHAPE, CLASSES, drop_path=0.5, rngs=nnx.Rngs(0))
    block = model.blocks[-1]
    assert [float(b.drop.rate) for b in model.blocks] == pytest.approx([0, 0.5 / 3, 1 / 3, 0.5])
    x = jnp.ones((400, 4, 96))
    dropped = block.drop(x)
    per_example = np.asarray(dropped).reshape(400, -1)
    assert np.isin(per_example, (0.0, 2.0)).all()
    assert (per_example.min(1) == per_example.max(1)).all()
    # 400 draws of probability 1/2: deviation 10.
    assert abs((per_example[:, 0] == 0).sum() - 200) < 50
    model.eval()
    np.testing.assert_array_equal(block.drop(x), x)


@pytest.mark.parametrize(
    "make,match",
    [
        (
            lambda: ResNet(3, 5, "34", rngs=nnx.Rngs(0)),
            "size is '34'; expected one of tiny, 18, 50",
        ),
        (lambda: ResNet(3, 5, reduce=3, rngs=nnx.Rngs(0)), "reduce is 3; expected 1, 2 or 4"),
        (lambda: Vit((8, 8), 5, "L", rngs=nnx.Rngs(0)), "size is 'L'; expected one of tiny, Ti"),
        (lambda: Vit((9, 8), 5, rngs=nnx.Rngs(0)), "patch is 4; expected a divisor of 9 and 8"),
        (
            lambda: Vit((8, 8), 5, drop_path=1.0, rngs=nnx.Rngs(0)),
            "drop_path is 1.0; expected 0 <=",
        ),
    ],
)
def test_sizes_that_are_not_possible_are_one_line(make, match):
    with pytest.raises(ValueError, match=match):
        make()
