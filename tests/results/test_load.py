"""`load_run`: the parameters and predictions of a trained run."""

import dataclasses
import json
import logging
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.marks import first_quick
from helpers.saved_arrays import final_arrays
from helpers.trained_runs import LABELS, POINTS, experiment, plain

import jmp_train as jt
from jmp_train.config import find_experiment
from jmp_train.errors import UsageError
from jmp_train.records import checkpoints as checkpoints_module
from jmp_train.records.checkpoints import Checkpoints, NoUsableCheckpoint

pytestmark = pytest.mark.usefixtures("quick_runs")
EMA = {"ema_decay": 0.5}
KAHAN = {
    "policy": "bf16",
    "optimizer": jt.optim.OptimizerConfig(schedule="constant", parameters="kahan"),
}


@pytest.mark.parametrize("settings", [{}, EMA], ids=["last", "averaged"])
@pytest.mark.parametrize("network", first_quick(("linen", "nnx")))
def test_predictions_are_those_of_float64_with_stored_statistics(trained, network, settings):
    folder, own = trained(network, **settings)
    run = jt.load_run(folder, "latest", experiment=own)
    saved = {k.replace("'", ""): v for k, v in final_arrays(folder).items()}
    which = "ema" if settings else "params"
    names = {
        "linen": ("Dense_0", "BatchNorm_0", "Dense_1"),
        "nnx": ("first", "norm", "last"),
    }[network]
    array = lambda *path: saved["".join(f"[{p}]" for p in path)].astype(np.float64)
    first, norm, last = names
    state = ("model_state", "batch_stats", norm) if network == "linen" else ("model_state", norm)
    x = POINTS.astype(np.float64) @ array(which, first, "kernel") + array(which, first, "bias")
    x = (x - array(*state, "mean")) / np.sqrt(array(*state, "var") + 1e-5)
    x = np.maximum(x * array(which, norm, "scale") + array(which, norm, "bias"), 0)
    logits = x @ array(which, last, "kernel") + array(which, last, "bias")
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    predicted = run.predict({"x": POINTS})
    np.testing.assert_allclose(predicted["probability"], expected, atol=1e-5)  # float32 sums
    np.testing.assert_array_equal(predicted["class"], expected.argmax(-1))
    assert run.step == 12 and predicted["class"].dtype == np.int32


def test_accuracy_of_predictions_is_that_of_the_evaluation(trained):
    folder, own = trained("linen")
    run = jt.load_run(folder, "latest", experiment=own)
    held_out = own.data.load().eval
    accuracy = (run.predict(held_out)["class"] == held_out["label"]).mean()
    assert accuracy == pytest.approx(run.summary["eval"]["accuracy"], abs=1e-6)
    assert run.metrics[-1]["step"] == 12 and run.spec.classes == 2


def test_optimizer_state_and_data_are_not_loaded(trained, monkeypatch):
    folder, own = trained("linen")

    def load(self):
        raise AssertionError("the data were loaded")

    sizes = []
    digests = checkpoints_module.array_digests

    def counting(tree):
        sizes.append(set(tree))
        return digests(tree)

    monkeypatch.setattr(type(own.data), "load", load)
    monkeypatch.setattr(checkpoints_module, "array_digests", counting)
    before = sum(x.nbytes for x in jax.live_arrays())
    run = jt.load_run(folder, experiment=own)
    grown = sum(x.nbytes for x in jax.live_arrays()) - before
    needed = sum(x.nbytes for x in jax.tree.leaves((run.params, run.model_state)))
    assert sizes == [{"params", "model_state"}]
    assert grown <= needed + 1000  # keys and constants; Adam's state would be twice as much more


def damage(folder, step, part):
    """Make the digest of an array of one part wrong, as damage of its bytes would."""
    path = folder / "checkpoints" / str(step) / "checkpoint_metadata.json"
    candidates = [p for p in (folder / "checkpoints" / str(step)).rglob("*") if p.is_file()]
    for path in candidates:
        data = path.read_bytes()
        if b'"arrays"' in data:
            break
    values = json.loads(data)
    custom = values["custom_metadata"]
    name = next(name for name in custom["arrays"] if name.startswith(part + "/"))
    custom["arrays"][name][0] = "0" * 16
    custom.pop("digest")
    custom["digest"] = checkpoints_module.json_digest(custom)
    path.write_text(json.dumps(values))


def test_damage_of_the_optimizer_state_does_not_matter(trained, tmp_path, caplog):
    folder, own = trained("linen")
    shutil.copytree(folder, tmp_path / "run")
    damage(tmp_path / "run", 12, "opt_state")
    assert jt.load_run(tmp_path / "run", "latest", experiment=own).step == 12
    assert "damaged" not in caplog.text
    damage(tmp_path / "run", 12, "params")
    assert jt.load_run(tmp_path / "run", "latest", experiment=own).step < 12
    assert "is damaged" in caplog.text
    with pytest.raises(NoUsableCheckpoint, match="12"):
        jt.load_run(tmp_path / "run", 12, experiment=own)


def test_damaged_model_state_is_passed_over(trained, tmp_path, caplog):
    folder, own = trained("linen")
    shutil.copytree(folder, tmp_path / "run")
    damage(tmp_path / "run", 12, "model_state")
    assert jt.load_run(tmp_path / "run", "latest", experiment=own).step < 12


def test_best_is_the_checkpoint_with_the_best_metric(tmp_path):
    records = Checkpoints(tmp_path, best="loss", highest=False, keep=4)
    state = {"params": {"w": jnp.zeros(2)}}
    for step, loss in [(1, 3.0), (2, 1.0), (3, float("nan")), (4, 1.0)]:
        records.save(step, state, extra={}, metrics={"loss": loss}, wait=True)
    assert records.best_first() == [4, 2, 1]
    records.close()
    records = Checkpoints(tmp_path, best="loss", highest=True, keep=4)
    assert records.best_first() == [1, 4, 2]
    records.close()


def test_best_checkpoint_is_loaded_by_default(trained, tmp_path):
    folder, own = trained("linen")
    records = [r for r in jt.load_run(folder, experiment=own).metrics if r["split"] == "eval"]
    best = max(records, key=lambda r: (r["accuracy"], r["step"]))["step"]
    assert jt.load_run(folder, experiment=own).step == best


def test_best_without_evaluations_is_the_newest(tmp_path, caplog):
    own = experiment(plain, steps=4, eval_every=3, checkpoint_every=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints_module.Checkpoints, "best_first", lambda self: [])
        jt.train(own, tmp_path / "run")
        assert jt.load_run(tmp_path / "run", experiment=own).step == 4
    assert "taking the newest" in caplog.text


def test_a_step_without_a_checkpoint_is_refused_with_the_steps(trained):
    folder, own = trained("linen")
    for which in (7, "7", "worst"):
        with pytest.raises(UsageError, match=r"no checkpoint '?\w+'?; expected best, latest.*12"):
            jt.load_run(folder, which, experiment=own)
    assert jt.load_run(folder, 12, experiment=own).step == 12


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [KAHAN, pytest.param({"policy": "mixed_float16", **EMA}, marks=pytest.mark.slow)]
)
def test_parameters_in_half_precision_are_loaded(trained, settings):
    folder, own = trained("nnx", **settings)
    run = jt.load_run(folder, "latest", experiment=own)
    saved = final_arrays(folder)
    part = "ema" if "ema_decay" in settings else "params"
    for path, x in jax.tree_util.tree_leaves_with_path(run.params):
        expected = saved[f"['{part}']{jax.tree_util.keystr(path)}"]
        assert x.dtype == expected.dtype
        np.testing.assert_array_equal(x, expected)
    assert set(run.predict(POINTS)["class"]) <= {0, 1}


@pytest.mark.parametrize("policy,tolerance", [("float32", 0.02), ("bf16", 0.05)])
def test_another_policy_predicts_in_its_dtypes(trained, policy, tolerance):
    """bf16 has 8 bits: two products of probabilities near 0.5 differ by a few times 2^-8."""
    folder, own = trained("linen", policy="mixed_bfloat16")
    run = jt.load_run(folder, experiment=own, policy=policy)
    dtype = jnp.dtype("float32" if policy == "float32" else "bfloat16")
    assert {x.dtype for x in jax.tree.leaves(run.params)} == {dtype}
    assert {x.dtype for x in jax.tree.leaves(run.model_state)} == {np.dtype("float32")}
    jaxpr = str(
        jax.make_jaxpr(
            lambda b: run.functions.predict_fn(run.params, b, model_state=run.model_state)
        )({"x": POINTS})
    )
    products = [line for line in jaxpr.splitlines() if "dot_general" in line]
    short = "f32" if policy == "float32" else "bf16"
    assert products and all(f":{short}[" in line for line in products)
    stored = jt.load_run(folder, experiment=own).predict(POINTS)["probability"]
    np.testing.assert_allclose(run.predict(POINTS)["probability"], stored, atol=tolerance)


@pytest.mark.parametrize("network", first_quick(["linen", "nnx", "plain"]))
def test_the_model_is_the_network_with_its_arrays(trained, network):
    folder, own = trained(network)
    run = jt.load_run(folder, experiment=own)
    if network == "nnx":
        logits = run.model(POINTS)
    elif network == "linen":
        module, variables = run.model
        logits = module.apply(variables, POINTS, train=False)
    else:
        apply, params = run.model
        logits = apply(params, POINTS)
    probability = jax.nn.softmax(logits)
    np.testing.assert_allclose(run.predict(POINTS)["probability"], probability, atol=1e-6)


def test_any_number_of_examples_compiles_once(trained, caplog):
    folder, own = trained("linen")
    run = jt.load_run(folder, experiment=own)
    whole = run.predict(POINTS)
    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
        for count in (0, 1, 15, 16, 17, 120):
            part = run.predict({"x": POINTS[:count], "label": LABELS[:count]})
            assert list(part) == ["class", "probability"]
            np.testing.assert_array_equal(part["probability"], whole["probability"][:count])
            assert part["class"].shape == (count,)
    assert "Finished XLA compilation" not in caplog.text
    with pytest.raises(ValueError, match="batch_size is 0"):
        run.predict(POINTS, batch_size=0)


@pytest.mark.parametrize(
    "batch,message",
    [
        ({"y": POINTS}, "the input has 'y'; expected 'x'"),
        ({"x": POINTS[:, :5]}, r"'x' has shape \(120, 5\); expected \(examples, 6\)"),
        ({"x": POINTS[0]}, r"'x' has shape \(6,\); expected \(examples, 6\)"),
        ({"x": POINTS.astype(np.uint8)}, "'x' has dtype uint8; expected float32"),
        ({"x": [[1.0], [1.0, 2.0]]}, "'x' is not an array"),
    ],
)
def test_a_wrong_input_is_one_line(trained, batch, message):
    folder, own = trained("linen")
    with pytest.raises(UsageError, match=message) as error:
        jt.load_run(folder, experiment=own).predict(batch)
    assert len(str(error.value).splitlines()) == 1


def test_a_directory_without_its_spec_loads_the_data(trained, tmp_path):
    folder, own = trained("linen")
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "spec.json").unlink()
    old, new = (jt.load_run(f, experiment=own) for f in (tmp_path / "run", folder))
    assert old.spec == new.spec
    (tmp_path / "run" / "spec.json").write_text("{}")
    with pytest.raises(UsageError, match=r"spec.json is damaged; remove it"):
        jt.load_run(tmp_path / "run", experiment=own)


def test_a_deleted_experiment_file_is_one_line(trained):
    folder, _ = trained("linen")
    with pytest.raises(UsageError, match="holds a run of the unknown experiment 'run'") as error:
        jt.load_run(folder)
    assert len(str(error.value).splitlines()) == 1


def test_settings_of_the_run_replace_those_of_the_experiment(trained):
    folder, own = trained("linen")
    wider = dataclasses.replace(own, model=dataclasses.replace(own.model, width=99))
    run = jt.load_run(folder, experiment=wider)
    assert run.experiment.model.settings["width"] == 16


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language") / "run"
    base = find_experiment("gpt_fp32")
    model = dataclasses.replace(base.model, width=16, depth=1, heads=2)
    data = dataclasses.replace(base.data, length=16)
    small = dataclasses.replace(base, model=model, data=data, steps=2, batch_size=4)
    jt.train(small, folder, name="gpt_fp32")
    return folder


@pytest.mark.slow
def test_a_text_is_continued_in_the_type_of_the_prompt(language_model):
    run = jt.load_run(language_model)
    options = {"length": 5, "temperature": 0.0}
    tokens = run.generate(np.frombuffer(b"The ", np.uint8), **options)
    assert tokens.shape == (5,) and tokens.dtype == np.int32
    assert run.generate(b"The ", **options) == bytes(tokens.astype(np.uint8))
    assert isinstance(run.generate("The ", **options), str)
    assert run.generate(b"The ", length=5, seed=1) == run.generate(b"The ", length=5, seed=1)
    with pytest.raises(ValueError, match="tokens from 3 to 256; expected 0 to 255"):
        run.generate([3, 256])
    losses = run.predict(np.full((3, 17), 65, np.int64))["loss"]
    assert losses.shape == (3, 16)


def test_a_classifier_does_not_continue_texts(trained):
    folder, own = trained("linen")
    with pytest.raises(UsageError, match="does not continue texts"):
        jt.load_run(folder, experiment=own).generate("The ")


def test_train_in_a_thread_with_a_text_path_returns_the_summary(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    summaries = []
    call = lambda: summaries.append(jt.train(experiment(plain, steps=4), "mine"))
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert summaries[0]["steps"] == 4 and summaries[0]["experiment"] == "mine"
    # The same call resumes, with the name of the run.
    assert jt.train(experiment(plain, steps=8), tmp_path / "mine")["steps"] == 8


def test_train_without_a_directory_makes_one_in_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    jt.train(experiment(plain, steps=4), name="own")
    (run,) = (tmp_path / "runs" / "own").iterdir()
    assert jt.load_run(run, experiment=experiment(plain)).name == "own"
    assert capsys.readouterr().out == ""
