"""`Model`: constructors of every kind as settings; how a network is constructed from them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

import jmp_train as jt
from jmp_train.config.settings import flatten, settings_in, with_settings
from jmp_train.data import DigitsConfig
from jmp_train.errors import UsageError
from jmp_train.models import Model
from jmp_train.models.model import construct, depends_on_spec, takes_dtype
from jmp_train.runs.build import make_task_of
from jmp_train.spec import DataSpec
from tests.helpers.command_line import call
from tests.helpers.models import gpt, mlp

pytestmark = pytest.mark.usefixtures("quick_runs")

SPEC = DataSpec({}, 7)


class LinenNet(linen.Module):
    """A network of Linen.

    Attributes are documented below them.
    """

    classes: int
    width: int = 8
    """Number of hidden features."""
    activation: object = linen.relu

    @linen.compact
    def __call__(self, x):
        return linen.Dense(self.classes)(self.activation(linen.Dense(self.width)(x)))


class NnxNet(nnx.Module):
    def __init__(self, classes: int, width: int = 8, *, dtype=None, rngs: nnx.Rngs):
        self.layer = nnx.Linear(width, classes, dtype=dtype, rngs=rngs)


def made(model, **options):
    return construct(model, SPEC, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("kind", [LinenNet, NnxNet])
def test_arguments_become_settings_and_reach_the_constructor(kind):
    model = Model(kind, classes=lambda spec: spec.classes, width=4)
    assert model.settings == {"width": 4}
    network = made(dataclasses.replace(model, width=5))
    if kind is LinenNet:
        assert (network.classes, network.width) == (7, 5)
    else:
        assert network.layer.kernel.shape == (5, 7)


def test_an_instance_of_linen_gives_its_values_as_settings():
    model = Model(LinenNet(classes=3, width=4, activation=jnp.tanh), width=6)
    assert model.settings == {"classes": 3, "width": 6}
    network = made(model)
    assert (network.classes, network.width, network.activation) == (3, 6, jnp.tanh)


class Doubles(linen.Module):
    width: int = 1
    dtype: object = None

    def __post_init__(self):
        self.width *= 2
        super().__post_init__()


def test_an_instance_of_linen_is_used_unless_a_field_is_changed():
    module = Doubles(3)
    model = Model(module)
    assert model.settings == {"width": 6} and made(model) is module
    assert made(dataclasses.replace(model, width=6)) is module
    with_dtype = made(model, dtype=jnp.bfloat16)
    assert (with_dtype.width, with_dtype.dtype, module.dtype) == (6, jnp.bfloat16, None)
    assert made(dataclasses.replace(model, width=5)).width == 10
    assert made(Model(module, width=5)).width == 10
    assert made(Model(LinenNet(classes=lambda spec: spec.classes))).classes == 7  # pyright: ignore[reportArgumentType]


def test_a_published_layer_of_flax_is_a_model():
    model = Model(nnx.Linear, in_features=4, out_features=lambda spec: spec.classes)
    assert model.settings == {"in_features": 4, "use_bias": True}
    layer = made(model, dtype=jnp.bfloat16, param_dtype=jnp.float16)
    assert (layer.dtype, layer.kernel.dtype) == (jnp.bfloat16, jnp.float16)
    assert layer.kernel.shape == (4, 7)


def test_a_published_network_of_keyword_arguments_is_a_model():
    import jax_resnet

    model = Model(jax_resnet.ResNet18, n_classes=lambda spec: spec.classes)
    network = made(model)
    assert isinstance(network, linen.Module)
    out = jax.eval_shape(
        lambda x: network.init_with_output(jax.random.key(0), x)[0], jnp.ones((1, 32, 32, 3))
    )
    assert out.shape == (1, 7)


def test_a_given_dtype_is_the_networks_and_not_the_policys():
    ours, theirs = Model(NnxNet, classes=2), Model(NnxNet, classes=2, dtype=jnp.float16)
    assert takes_dtype(ours) and not takes_dtype(theirs) and not takes_dtype(Model(LinenNet(2)))
    assert made(ours, dtype=jnp.bfloat16).layer.dtype == jnp.bfloat16
    assert made(theirs, dtype=jnp.bfloat16).layer.dtype == jnp.float16


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: Model(NnxNet), r"Model\(NnxNet\) lacks the argument 'classes'"),
        (lambda: Model(NnxNet, clases=3), "no argument 'clases'; did you mean 'classes'"),
        (lambda: Model(LinenNet, clases=3), "no argument 'clases'; did you mean 'classes'"),
        (lambda: Model(NnxNet, classes=3, width="wide"), "width is 'wide'; expected an integer"),
        (lambda: Model(3), "expected an nnx.Module or a linen.Module class, or a function"),  # pyright: ignore[reportArgumentType]
        (
            lambda: Model(nnx.Linear(4, 3, rngs=nnx.Rngs(0))),
            r"a module Linear with its values; .*models.md",
        ),
    ],
)
def test_wrong_arguments_are_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert len(str(error.value).splitlines()) == 1


def test_models_are_equal_if_network_and_settings_are():
    a, b = mlp(hidden=(8,)), mlp(hidden=[8])
    assert a == b and hash(a) == hash(b)
    assert a != mlp(hidden=(9,)) and a != gpt()
    assert len({a, b, mlp(hidden=(9,))}) == 2


@pytest.mark.parametrize(
    "model",
    [mlp(hidden=()), mlp(hidden=(3, 4), dropout=0.5), gpt(hidden=None, remat="dots"), LinenNet(2)],
)
def test_settings_survive_a_round_trip_through_json(model):
    own = jt.Experiment(model, DigitsConfig(), task="classification")
    stored = json.loads(json.dumps(settings_in(own)))
    assert with_settings(own, flatten(stored)) == own
    assert "task" not in stored


@pytest.mark.parametrize(
    "model,message",
    [
        (mlp(hidden=(0,)), r"model.hidden is \(0,\); expected widths of at least 1"),
        (gpt(depth=0), "model.depth is 0; expected at least 1"),
    ],
)
def test_an_impossible_size_is_named_as_its_option(model, message):
    data = DigitsConfig().load()
    task = "classification" if "dropout" in model.settings and "depth" not in model.settings else 0
    if task == 0:
        data = data._replace(spec=DataSpec.of({"tokens": jnp.zeros((1, 9), jnp.int32)}, 5))
    own = jt.Experiment(model, DigitsConfig(), task=task or "language_modelling")
    with pytest.raises(UsageError, match=f"^{message}"):
        make_task_of(own, data.spec)


def test_a_function_that_makes_no_network_is_one_line():
    own = jt.Experiment(Model(lambda: jnp.ones((9, 9))), DigitsConfig())
    with pytest.raises(UsageError, match=r"the model made an array; expected .*models.md") as error:
        make_task_of(own, DigitsConfig().load().spec)
    assert len(str(error.value).splitlines()) == 1


def test_other_errors_of_a_constructor_are_not_renamed():
    def net():
        raise ValueError("nothing that names an argument")

    with pytest.raises(ValueError, match="^nothing that names"):
        made(Model(net))


@pytest.mark.parametrize(
    "value,expected",
    [(lambda spec: 1, True), (lambda x: 1, False), (lambda spec, y: 1, False), (max, False),
     (3, False), (nnx.Linear, False)],
)  # fmt: skip
def test_a_function_of_the_spec_has_that_parameter_alone(value, expected):
    assert depends_on_spec(value) is expected


EXPERIMENT = """
import jmp_train as jt
from flax import linen, nnx
from jmp_train.data import DigitsConfig

class Net(nnx.Module):
    def __init__(self, widths: tuple[int, ...] = (4,), kind: str = "a", rate: float | None = None,
                 *, rngs: nnx.Rngs):
        self.layer = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        return self.layer(x.reshape(len(x), -1))

EXPERIMENT = jt.Experiment(Net, DigitsConfig(noise=0.0), steps=2, log_every=1)
"""


def test_settings_of_the_command_line_are_in_config_json(tmp_path, monkeypatch, capsys):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "own.py").write_text(EXPERIMENT)
    monkeypatch.chdir(tmp_path)
    options = ["--model.widths", "3", "5", "--model.rate", "0.5", "--model.kind", "b"]
    status, _, err = call(capsys, "train", "own", *options, "--run-dir", "run")
    assert (status, err) == (0, "")
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["model"] == {"widths": [3, 5], "kind": "b", "rate": 0.5}
    status, out, err = call(capsys, "eval", "run")  # reads the settings back
    assert (status, err) == (0, "") and "accuracy" in out
