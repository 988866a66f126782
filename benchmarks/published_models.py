"""Small configurations of published models, each as a pure function under a policy."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx

import jmp_train as jt
from jmp_train.flax import apply_policy

_KEY = jax.random.key(0)
_TOKENS = jnp.arange(32).reshape(2, 16) % 50
_IMAGES = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
_ROWS = jax.random.normal(jax.random.key(2), (8, 16))
_EDGES = jnp.stack([jnp.arange(8), (jnp.arange(8) + 1) % 8])

# What a model is under a policy: its parameters, and a function of them and of its inputs.
Build = Callable[[str], tuple[Any, Callable[[Any, Any], Any]]]


class Model(NamedTuple):
    """A published model in a small configuration, randomly initialised."""

    package: str  # as on PyPI
    make: Callable[[], tuple[Build, Any]]  # imports the package; returns the model and its inputs


def _under(model: Any, policy: str) -> Any:
    return model if policy == "float32" else apply_policy(model, policy)


def _same(out: Any) -> Any:
    return out


def _logits(out: Any) -> Any:
    return out["logits"]


def _linen(
    module: Any, *inputs: Any, pick: Any = _same, mutable: Any = False, **options: Any
) -> tuple[Build, Any]:
    rngs = {"params": _KEY, "dropout": _KEY}
    variables = jax.jit(lambda: module.init(rngs, *inputs, **options))()
    params, rest = variables["params"], {k: v for k, v in variables.items() if k != "params"}

    def build(policy: str) -> Any:
        model = _under(module, policy)

        def run(params: Any, inputs: Any) -> Any:
            variables = {**rest, "params": params}
            out = model.apply(
                variables, *inputs, mutable=mutable, rngs={"dropout": _KEY}, **options
            )
            return pick(out[0] if mutable else out)

        return params, run

    return build, inputs


def _nnx(model: Any, *inputs: Any, pick: Any = _same) -> tuple[Build, Any]:
    def build(policy: str) -> Any:
        graph, params, rest = nnx.split(_under(model, policy), nnx.Param, ...)
        return params, lambda p, inputs: pick(nnx.merge(graph, p, rest, copy=True)(*inputs))

    return build, inputs


def _hugging_face(model: Any, *inputs: Any) -> tuple[Build, Any]:
    def build(policy: str) -> Any:
        under = _under(model, policy)
        return under.params, lambda params, inputs: under(*inputs, params=params)[0]

    return build, inputs


def _plain(run: Callable[[Any, Any], Any], params: Any, *inputs: Any) -> tuple[Build, Any]:
    """A function of parameters and inputs, which autocast takes to half precision."""

    def build(policy: str) -> Any:
        half = policy.removeprefix("mixed_")
        return params, run if policy == "float32" else jt.autocast(run, half)

    return build, inputs


def _equinox(model: Any, call: Callable[..., Any], *inputs: Any) -> tuple[Build, Any]:
    eqx: Any = import_module("equinox")

    params, static = eqx.partition(model, eqx.is_inexact_array)
    return _plain(lambda p, inputs: call(eqx.combine(p, static), *inputs), params, *inputs)


def _resnet() -> Any:
    jax_resnet: Any = import_module("jax_resnet")

    return _linen(jax_resnet.ResNet18(n_classes=10), _IMAGES, mutable=["batch_stats"])


def _flaxmodels_gpt2() -> Any:
    gpt2: Any = import_module("flaxmodels.gpt2.gpt2")

    config = {
        "vocab_size": 50, "n_positions": 32, "n_embd": 32, "n_head": 2, "n_layer": 2,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "layer_norm_epsilon": 1e-5,
        "n_inner": None, "use_cache": False, "scale_attn_weights": True,
    }  # fmt: skip

    return _linen(gpt2.GPT2LMHeadModel(config=SimpleNamespace(**config)), _TOKENS, pick=_logits)


def _flaxmodels_resnet() -> Any:
    flaxmodels: Any = import_module("flaxmodels")
    module = flaxmodels.ResNet18(output="logits", pretrained=None, normalize=False, num_classes=10)
    return _linen(module, _IMAGES, mutable=["batch_stats"])


def _e3nn() -> Any:
    e3nn: Any = import_module("e3nn_jax")

    class Layers(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            features = e3nn.IrrepsArray("4x0e + 4x1o", x)
            features = e3nn.flax.Linear("8x0e + 8x1o")(features)
            features = e3nn.tensor_product(features, e3nn.IrrepsArray("4x0e + 4x1o", x))
            return e3nn.flax.Linear("4x0e + 4x1o")(features).array

    return _linen(Layers(), _ROWS)


def _e3x() -> Any:
    e3x: Any = import_module("e3x")

    class Layers(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            x = e3x.nn.Dense(8)(x.reshape(8, 1, 4, 4))
            return e3x.nn.TensorDense(4, max_degree=1)(e3x.nn.silu(x))

    return _linen(Layers(), _ROWS)


def _gpt2() -> Any:
    hf: Any = import_module("transformers")

    config = hf.GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    return _hugging_face(hf.FlaxGPT2LMHeadModel(config), _TOKENS)


def _bert() -> Any:
    hf: Any = import_module("transformers")

    config = hf.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=32,
    )  # fmt: skip
    return _hugging_face(hf.FlaxBertForMaskedLM(config), _TOKENS)


def _vit() -> Any:
    hf: Any = import_module("transformers")

    config = hf.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=32, patch_size=8,
    )  # fmt: skip
    return _hugging_face(hf.FlaxViTForImageClassification(config), _IMAGES.transpose(0, 3, 1, 2))


def _mamba2() -> Any:
    mamba: Any = import_module("mamba2_jax")

    config = mamba.Mamba2Config(
        vocab_size=50, hidden_size=32, state_size=8, head_dim=8, chunk_size=8, num_hidden_layers=2
    )

    net = mamba.Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))
    return _nnx(net, _TOKENS, pick=_logits)


def _deepvit() -> Any:
    deepvit: Any = import_module("deepvit_flax")
    return _linen(deepvit.DeepVIT(num_classes=10), _IMAGES)


def _graph(kind: str, **options: Any) -> Callable[[], Any]:
    def make() -> Any:
        models: Any = import_module("jraphx.nn.models")
        net = getattr(models, kind)(16, 16, 2, 4, rngs=nnx.Rngs(0), **options)
        return _nnx(net, _ROWS, _EDGES)

    return make


def _haiku_mlp() -> Any:
    hk: Any = import_module("haiku")
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([32, 32, 4])(x)))
    return _plain(lambda p, inputs: net.apply(p, *inputs), net.init(_KEY, _ROWS), _ROWS)


def _haiku_lstm() -> Any:
    hk: Any = import_module("haiku")

    def forward(x: Any) -> Any:
        core = hk.LSTM(16)
        out, _ = hk.dynamic_unroll(core, x, core.initial_state(x.shape[1]))
        return hk.Linear(4)(out)

    net = hk.without_apply_rng(hk.transform(forward))
    sequence = _ROWS.reshape(4, 2, 16)
    return _plain(lambda p, inputs: net.apply(p, *inputs), net.init(_KEY, sequence), sequence)


def _equinox_attention() -> Any:
    eqx: Any = import_module("equinox")

    net = eqx.nn.MultiheadAttention(2, 16, key=_KEY)
    return _equinox(net, lambda net, x: net(x, x, x), _ROWS)


def _equinox_mlp() -> Any:
    eqx: Any = import_module("equinox")

    return _equinox(eqx.nn.MLP(16, 4, 32, 2, key=_KEY), lambda net, x: jax.vmap(net)(x), _ROWS)


def _diffrax_ode(solver: str) -> Callable[[], Any]:
    """A neural ODE, differentiated by the solver's default adjoint."""

    def make() -> Any:
        diffrax: Any = import_module("diffrax")
        eqx: Any = import_module("equinox")

        def solve(net: Any, x: Any) -> Any:
            term = diffrax.ODETerm(lambda t, y, net: jax.vmap(net)(y))
            method = getattr(diffrax, solver)
            if solver == "Kvaerno3":  # implicit; a tighter tolerance is below bfloat16's spacing
                method = method(root_finder=diffrax.VeryChord(rtol=5e-2, atol=5e-2))
            else:
                method = method()
            return diffrax.diffeqsolve(term, method, 0.0, 1.0, 0.1, x, args=net).ys

        return _equinox(eqx.nn.MLP(16, 16, 32, 2, activation=jnp.tanh, key=_KEY), solve, _ROWS)

    return make


def _optimistix_root() -> Any:
    optx: Any = import_module("optimistix")

    def implicit(params: Any, inputs: Any) -> Any:
        def residual(y: Any, params: Any) -> Any:
            return y - jnp.tanh(inputs[0] @ params["in"] + y @ params["back"])

        return optx.root_find(
            residual, optx.Newton(1e-3, 1e-3), jnp.zeros((8, 4)), params, throw=False
        ).value

    params = {
        "in": 0.3 * jax.random.normal(_KEY, (16, 4)),
        "back": 0.2 * jax.random.normal(_KEY, (4, 4)),
    }
    return _plain(implicit, params, _ROWS)


MODELS: dict[str, Model] = {
    "ResNet18": Model("jax-resnet", _resnet),
    "GPT2LMHeadModel": Model("flaxmodels", _flaxmodels_gpt2),
    "ResNet18 (flaxmodels)": Model("flaxmodels", _flaxmodels_resnet),
    "DeepVIT": Model("deepvit-flax", _deepvit),
    "flax.Linear, tensor_product": Model("e3nn-jax", _e3nn),
    "nn.Dense, nn.TensorDense": Model("e3x", _e3x),
    "FlaxGPT2LMHeadModel": Model("transformers", _gpt2),
    "FlaxBertForMaskedLM": Model("transformers", _bert),
    "FlaxViTForImageClassification": Model("transformers", _vit),
    "Mamba2ForCausalLM": Model("mamba2-jax", _mamba2),
    "GIN": Model("jraphx", _graph("GIN")),
    "GCN": Model("jraphx", _graph("GCN")),
    "GAT": Model("jraphx", _graph("GAT", heads=2)),
    "nets.MLP": Model("dm-haiku", _haiku_mlp),
    "LSTM": Model("dm-haiku", _haiku_lstm),
    "nn.MultiheadAttention": Model("equinox", _equinox_attention),
    "nn.MLP": Model("equinox", _equinox_mlp),
    "neural ODE, Tsit5": Model("diffrax", _diffrax_ode("Tsit5")),
    "neural ODE, Kvaerno3": Model("diffrax", _diffrax_ode("Kvaerno3")),
    "implicit layer, Newton": Model("optimistix", _optimistix_root),
}
