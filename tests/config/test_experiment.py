"""Experiments: found by name, plain data, refused when impossible."""

import dataclasses

import pytest

from jmp_train.config.experiment import Experiment
from jmp_train.config.find import experiment_files, find_experiment
from jmp_train.config.settings import flatten
from jmp_train.data import DigitsConfig
from jmp_train.errors import UsageError
from jmp_train.loss_scales.config import LossScaleConfig
from jmp_train.loss_scales.states import DynamicLossScale, NoOpLossScale, StaticLossScale
from jmp_train.policy.precision import default_loss_scale
from jmp_train.runs.train import train
from tests.helpers.models import mlp

pytestmark = pytest.mark.usefixtures("quick_runs")


def make(**fields):
    return Experiment(model=mlp(), data=DigitsConfig(), **fields)


@pytest.mark.parametrize("name", experiment_files())
def test_every_experiment_is_found_and_is_hashable_data(name):
    experiment = find_experiment(name)
    assert experiment == find_experiment(name)
    hash(experiment)


@pytest.mark.parametrize(
    "family", ["linear", "mlp", "gpt", "gpt_124m", "gpt_1b3", "gpt_7b", "gpt_70b"]
)
def test_a_family_differs_in_its_policy_alone(family):
    fp32, fp16, bf16 = (find_experiment(f"{family}_{p}") for p in ("fp32", "fp16", "bf16"))
    assert (fp32.policy, fp16.policy, bf16.policy) == ("float32", "mixed_float16", "mixed_bfloat16")
    assert fp32 == dataclasses.replace(fp16, policy="float32")
    assert fp32 == dataclasses.replace(bf16, policy="float32")


@pytest.mark.parametrize(
    "name,message",
    [
        ("mlp_bf17", "did you mean 'mlp_bf16'"),
        ("mlp", "'mlp' is a family; its experiments are mlp_bf16, mlp_fp16, mlp_fp32"),
        ("../../etc/passwd", "unknown experiment"),
        ("/etc/passwd", "unknown experiment"),
        ("experiments.mlp_bf16", "unknown experiment"),
        ("", "unknown experiment"),
        ("mlp_bf16.py", "did you mean 'mlp_bf16'"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_known_name(name, message):
    with pytest.raises(UsageError, match=message):
        find_experiment(name)


def folder_of(tmp_path, monkeypatch, **files):
    folder = tmp_path / "experiments"
    folder.mkdir()
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)


OWN = "from experiments.mlp import FAMILY\nEXPERIMENT = FAMILY\n"


def test_experiments_of_the_folder_at_hand_are_found_too(tmp_path, monkeypatch):
    folder_of(
        tmp_path, monkeypatch, own_fp32=OWN, wrong="EXPERIMENT = 3\n", mlp_fp32_wide=OWN,
        fails="EXPERIMENT = 1 / 0\n", __init__="",
    )  # fmt: skip
    assert {"own_fp32", "wrong", "fails", "mlp_fp32"} <= set(experiment_files())
    assert find_experiment("own_fp32") == find_experiment("mlp_fp32")
    assert find_experiment("mlp_fp32_wide") == find_experiment("mlp_fp32")
    with pytest.raises(UsageError, match=r"wrong.py sets EXPERIMENT to 3; expected an Experiment"):
        find_experiment("wrong")
    with pytest.raises(UsageError, match=r"fails.py cannot be run: ZeroDivisionError"):
        find_experiment("fails")


def test_a_family_extends_and_overrides_the_table_of_precisions(tmp_path, monkeypatch):
    table = """
        "bf16": {"policy": "bf16", "optimizer.parameters": "kahan"},
        "fp16": None,
        "tf32": {"matmul_precision": "high"},
    """
    folder_of(
        tmp_path, monkeypatch,
        net=f"from experiments.mlp import FAMILY\nPRECISIONS = {{{table}}}\n",
    )  # fmt: skip
    assert "net_bf16" not in experiment_files()  # FAMILY is imported, not set
    path = tmp_path / "experiments" / "net.py"
    path.write_text(path.read_text().replace("import FAMILY", "import FAMILY as F\nFAMILY = F"))
    there = [name for name in experiment_files() if name.startswith("net")]
    assert there == ["net_bf16", "net_fp32", "net_tf32"]
    assert find_experiment("net_fp32") == find_experiment("mlp_fp32")
    bf16 = find_experiment("net_bf16")
    assert (bf16.policy, bf16.optimizer.parameters) == ("bf16", "kahan")
    assert find_experiment("net_tf32").matmul_precision == "high"
    with pytest.raises(UsageError, match="'net' is a family; its experiments are net_bf16, net_fp"):
        find_experiment("net")
    with pytest.raises(UsageError, match="unknown experiment 'net_fp16'"):
        find_experiment("net_fp16")


@pytest.mark.parametrize(
    "table,message",
    [
        ("{'x': {'polcy': 'bf16'}}", "PRECISIONS: unknown setting 'polcy'; did you mean 'policy'"),
        ("{'x': {'policy': 'bf17'}}", "PRECISIONS: .*bf17.*did you mean"),
        ("{'x': 3}", "PRECISIONS: 'x' is 3; expected a dict of settings"),
    ],
)
def test_a_wrong_table_of_precisions_is_named(tmp_path, monkeypatch, table, message):
    text = f"from experiments.mlp import FAMILY as F\nFAMILY = F\nPRECISIONS = {table}\n"
    folder_of(tmp_path, monkeypatch, net=text)
    with pytest.raises(UsageError, match=f"net.py: {message}"):
        find_experiment("net_x")


def test_a_single_experiment_precedes_a_family_member(tmp_path, monkeypatch):
    own = "import dataclasses\nfrom experiments.mlp import FAMILY as F\n"
    own += "EXPERIMENT = dataclasses.replace(F, steps=7, log_every=7)\n"
    family = "from experiments.mlp import FAMILY as F\nFAMILY = F\n"
    folder_of(tmp_path, monkeypatch, net=family, net_bf16=own)
    assert find_experiment("net_bf16").steps == 7
    assert find_experiment("net_fp32").steps == 2000


def test_an_experiment_finds_another_and_not_itself(tmp_path, monkeypatch):
    own = "from jmp_train.config.find import find_experiment\nimport experiments.help as help\n"
    own += "EXPERIMENT = find_experiment('NAME')\n"
    more = "import experiments.mlp\nfrom experiments.help import N\n"
    folder_of(
        tmp_path, monkeypatch, help="N = 3\n",
        outer=own.replace("NAME", "mlp_bf16") + more, itself=own.replace("NAME", "itself"),
    )  # fmt: skip
    assert find_experiment("outer") == find_experiment("mlp_bf16")
    with pytest.raises(UsageError, match="sets EXPERIMENT to None; expected an Experiment"):
        find_experiment("itself")
    assert find_experiment("outer") == find_experiment("mlp_bf16")


OF_OWN = """
import jax.numpy as jnp
import jmp_train as jt
from jmp_train.data import DigitsConfig

def linear(inputs):
    init = lambda key: {"w": jnp.zeros(inputs)}
    apply = lambda params, image: image.reshape(-1, inputs) @ params["w"]
    return init, apply

def error(outputs, batch):
    return jnp.square(outputs - batch["label"])

EXPERIMENT = jt.Experiment(
    jt.Model(linear, inputs=lambda spec: spec.size("image")),
    DigitsConfig(noise=0.0),
    task=jt.Task(error, {"mse": error}, "image", "label", metric="mse"),
    steps=20,
)
"""


def test_an_experiment_brings_its_own_task_without_flax(tmp_path, monkeypatch):
    folder_of(tmp_path, monkeypatch, own=OF_OWN)
    experiment = find_experiment("own")
    assert (experiment.metric, experiment.highest) == ("mse", False)
    summary = train(experiment, tmp_path / "run", name="own")
    assert summary["eval"]["mse"] < 28  # the mean of the squared labels is 28.5


def test_a_helper_of_the_same_name_does_not_break_a_family(tmp_path, monkeypatch):
    folder_of(tmp_path, monkeypatch, mlp="def helper(): return 1\n")
    assert find_experiment("mlp_bf16").policy == "mixed_bfloat16"


def test_a_family_here_replaces_the_one_beside_the_package(tmp_path, monkeypatch):
    text = "from experiments.linear import FAMILY as F\nFAMILY = F\nPRECISIONS = {'fp16': None}\n"
    folder_of(tmp_path, monkeypatch, mlp=text)
    assert [n for n in experiment_files() if n.startswith("mlp")] == ["mlp_bf16", "mlp_fp32"]
    assert find_experiment("mlp_fp32") == find_experiment("linear_fp32")


@pytest.mark.parametrize(
    "table",
    ["dict(x={'policy': 'bf16'})", "{'a' + 'b': {}}", "{**{'x': {}}}", "{s: {} for s in 'x'}"],
)
def test_a_table_that_is_not_a_literal_is_named(tmp_path, monkeypatch, table):
    text = f"from experiments.mlp import FAMILY as F\nFAMILY = F\nPRECISIONS = {table}\n"
    folder_of(tmp_path, monkeypatch, net=text)
    with pytest.raises(UsageError, match="net.py: PRECISIONS has .* expected a dict literal"):
        find_experiment("net_fp32")


def test_a_byte_order_mark_and_a_tuple_define_experiments_too(tmp_path, monkeypatch):
    start = "from experiments.mlp import FAMILY as F\n"
    folder_of(tmp_path, monkeypatch, mark="\ufeff" + start + "FAMILY = F\n",
              pair=start + "EXPERIMENT, X = F, 1\n")  # fmt: skip
    assert find_experiment("mark_fp32") == find_experiment("pair") == find_experiment("mlp_fp32")


FAMILY_FILE = """
from flax import nnx
from jmp_train.config import Experiment
from jmp_train.data import DigitsConfig
from jmp_train.models import Model
from tests.helpers.models import mlp

class Net(nnx.Module):
    def __init__(self, inputs: int, width: int, outputs: int, rngs: nnx.Rngs):
        self.first = nnx.Linear(inputs, width, rngs=rngs)
        self.last = nnx.Linear(width, outputs, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.first(x.reshape(len(x), -1))))

FAMILY = Experiment(
    Model(Net, inputs=64, outputs=10, width=16), DigitsConfig(), task="classification", steps=200
)
"""


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_new_family_takes_a_network_and_few_lines(tmp_path, monkeypatch, precision):
    beyond_the_network = FAMILY_FILE.partition("FAMILY =")[2].strip().splitlines()
    assert len(beyond_the_network) + 5 <= 15  # and the imports
    folder_of(tmp_path, monkeypatch, net=FAMILY_FILE)
    experiment = find_experiment(f"net_{precision}")
    summary = train(experiment, tmp_path / "run", name="net")
    assert summary["eval"]["accuracy"] > 0.3  # by chance 0.1


def test_a_file_that_sets_no_experiment_is_not_run(tmp_path, monkeypatch):
    folder_of(tmp_path, monkeypatch, sweep="raise SystemExit('ran')\n")
    assert "sweep" not in experiment_files()
    with pytest.raises(UsageError, match="unknown experiment 'sweep'"):
        find_experiment("sweep")


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"policy": "c=float17"}, "did you mean 'float16'"),
        ({"rules": ("head",)}, "rule 'head' has no policy"),
        ({"rules": ("**=mixed_bf16",)}, "did you mean 'mixed_bfloat16'"),
        ({"steps": 0}, "steps is 0; expected at least 1"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"log_every": 0}, "log_every is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is"),
        ({"micro_batches": 0}, "micro_batches is 0; expected at least 1"),
        ({"micro_batches": 3}, r"batch_size is 128; expected a multiple of micro_batches \(3\)"),
        ({"steps_per_call": 3}, "steps is 1000; expected a multiple of steps_per_call"),
        ({"steps": 10, "steps_per_call": 10}, "log_every|eval_every"),
    ],
)
def test_invalid_values_are_refused_by_name(fields, message):
    if fields == {"steps": 10, "steps_per_call": 10}:
        fields |= {"log_every": 15}
    with pytest.raises(ValueError, match=message):
        make(**fields)


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"initial": 0.0}, "initial is 0.0"),
        ({"initial": float("inf")}, "initial is inf"),
        ({"growth_interval": 0}, "growth_interval is 0"),
        ({"growth_factor": 0.5}, "growth_factor is 0.5"),
        ({"backoff_factor": 1.5}, "backoff_factor is 1.5"),
        ({"minimum": 8.0, "maximum": 4.0}, "maximum 4.0 is below minimum 8.0"),
        ({"hysteresis": 0}, "hysteresis is 0"),
    ],
)
def test_an_invalid_loss_scale_is_refused_by_the_name_of_its_field(fields, message):
    with pytest.raises(ValueError, match=message):
        LossScaleConfig(**fields)


def test_the_loss_scale_that_a_policy_needs():
    assert isinstance(LossScaleConfig().make(default_loss_scale("mixed_float16")), DynamicLossScale)
    assert isinstance(LossScaleConfig().make(default_loss_scale("mixed_bfloat16")), NoOpLossScale)
    assert isinstance(
        LossScaleConfig("none").make(default_loss_scale("mixed_float16")), NoOpLossScale
    )
    assert isinstance(
        LossScaleConfig("static").make(default_loss_scale("float32")), StaticLossScale
    )
    made = LossScaleConfig("dynamic", 2.0**10, 7, 3.0, 0.25, 2.0, 2.0**20, 4, True).make(
        default_loss_scale("float32")
    )
    assert isinstance(made, DynamicLossScale)
    assert (float(made.loss_scale), made.period, made.factor) == (2.0**10, 7, 3.0)
    assert (made.backoff_factor, made.min_loss_scale, made.max_loss_scale) == (0.25, 2.0, 2.0**20)
    assert made.hysteresis == 4 and made.consecutive_hysteresis


def test_nested_values_flatten_by_dotted_path():
    assert flatten({"a": 1, "b": {"c": {"d": 2}}, "e": [1]}) == {"a": 1, "b.c.d": 2, "e": [1]}
