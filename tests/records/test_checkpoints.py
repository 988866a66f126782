"""Checkpoints: bitwise round trips, the newest whole one, and no silent cast."""

import contextlib
import functools
import logging
import random
import resource
import shutil
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmp_train as jt
from jmp_train import testing
from jmp_train.records.checkpoints import Checkpoints, DoesNotFit, NotSaved, NoUsableCheckpoint


@functools.cache
def stepper(policy="mixed_float16"):
    return jt.make_step(
        lambda params, batch, key: jnp.sum(params["w"] * batch) + jax.random.uniform(key),
        optax.adamw(optax.cosine_decay_schedule(0.1, 10)),
        policy,
        loss_scale=jt.DynamicLossScale(2.0**10, hysteresis=2),
    )


def trained(policy="mixed_float16", steps=3):
    made = stepper(policy)
    state = made.init({"w": jnp.ones((3, 3)), "list": {0: jnp.ones(2)}}, key=jax.random.key(1))
    for n in range(steps):
        state, _ = made.step(state, jnp.full((3, 3), n + 0.5))
    return state


def save(directory, *steps, metrics=None, **options):
    checkpoints = Checkpoints(directory, **options)
    for n in steps:
        value = None if metrics is None else {"accuracy": metrics[n]}
        checkpoints.save(n, trained(steps=n), extra={"data": {"next_index": n}}, metrics=value)
    checkpoints.wait()
    return checkpoints


def as_numbers(tree):
    to_data = lambda x: (
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    )
    return jax.tree.map(to_data, tree)


@testing.policies("float32", "mixed_float16", "bf16")
def test_a_state_comes_back_bitwise_with_its_dtypes(tmp_path, policy):
    state = trained(policy)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state, extra={"data": {"next_index": 3}}, metrics=None)
    checkpoints.close()
    restored = Checkpoints(tmp_path).restore_latest(trained(policy, steps=0))
    assert restored is not None
    assert restored.step == 3 and restored.extra == {"data": {"next_index": 3}}
    chex.assert_trees_all_equal(as_numbers(restored.state), as_numbers(state))
    chex.assert_trees_all_equal_dtypes(as_numbers(restored.state), as_numbers(state))


def test_saving_does_not_hold_the_state_back_from_being_donated(tmp_path):
    made, state = stepper(), trained()
    expected = np.asarray(state.params["w"]).copy()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state, extra={}, metrics=None)
    made.step(state, jnp.ones((3, 3)))  # donates what is being saved
    checkpoints.close()
    restored = Checkpoints(tmp_path).restore_latest(trained(steps=0))
    assert restored is not None
    np.testing.assert_array_equal(restored.state.params["w"], expected)


def test_a_save_that_waits_is_on_the_disk_when_it_returns(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, trained(), extra={}, metrics=None, wait=True)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]  # no temporary folder
    restored = Checkpoints(tmp_path).restore_latest(trained(steps=0))
    assert restored is not None and restored.step == 1


def test_the_newest_two_and_the_best_are_kept(tmp_path):
    metrics = {1: 0.1, 2: 0.9, 3: 0.3, 4: 0.4, 5: 0.2}
    assert save(tmp_path, *metrics, metrics=metrics, best="accuracy").steps() == [2, 4, 5]


def test_the_best_may_be_the_lowest(tmp_path):
    metrics = {1: 0.1, 2: 0.9, 3: 0.3, 4: 0.4, 5: 0.2}
    kept = save(tmp_path, *metrics, metrics=metrics, best="accuracy", highest=False).steps()
    assert kept == [1, 4, 5]


def test_restore_latest_without_a_checkpoint_returns_none(tmp_path):
    assert Checkpoints(tmp_path / "new").restore_latest(trained()) is None


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(tmp_path, caplog):
    save(tmp_path, 1, 2).close()
    shutil.rmtree(tmp_path / "2" / "state" / "d", ignore_errors=True)
    for file in (tmp_path / "2" / "state").rglob("*"):
        if file.is_file() and "METADATA" not in file.name:
            file.write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        restored = Checkpoints(tmp_path).restore_latest(trained(steps=0))
    assert restored is not None and restored.step == 1
    assert "checkpoint 2 cannot be loaded" in caplog.text


def damaged(file, kind, rng):
    content = bytearray(file.read_bytes())
    if kind == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        del content[len(content) // 2 :]
    elif kind == "empty":
        content.clear()
    file.write_bytes(content)
    if kind == "delete":
        file.unlink()


def check_damage(tmp_path, kind, times):
    """Damages each file of the newest of two checkpoints in turn: what comes back, from it or from
    the one before, is to the bit what was saved."""
    saved = {n: trained(steps=n) for n in (1, 2)}
    save(tmp_path / "whole", *saved).close()
    rng = random.Random(kind)
    files = [f for f in (tmp_path / "whole" / "2").rglob("*") if f.is_file()]
    assert len(files) > 5
    steps = []
    for file in files:
        for _ in range(times):
            there = tmp_path / "there"
            shutil.copytree(tmp_path / "whole", there)
            damaged(there / file.relative_to(tmp_path / "whole"), kind, rng)
            with contextlib.closing(Checkpoints(there)) as checkpoints:
                restored = checkpoints.restore_latest(trained(steps=0))
            assert restored is not None
            assert restored.extra == {"data": {"next_index": restored.step}}
            chex.assert_trees_all_equal(
                as_numbers(restored.state), as_numbers(saved[restored.step])
            )
            steps.append(restored.step)
            shutil.rmtree(there)
    assert 1 in steps  # not every file matters to a load, but some do


@pytest.mark.parametrize("kind", ["flip", "truncate"])
def test_no_damage_comes_back_as_a_state(tmp_path, kind):
    check_damage(tmp_path, kind, times=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind,times", [("flip", 20), ("empty", 1), ("delete", 1)])
def test_no_damage_of_any_kind_comes_back_as_a_state(tmp_path, kind, times):
    check_damage(tmp_path, kind, times)


def test_a_checkpoint_that_orbax_cannot_describe_does_not_hold_up_the_others(tmp_path, caplog):
    save(tmp_path, 1, 2).close()
    metadata = tmp_path / "2" / "_CHECKPOINT_METADATA"
    metadata.write_text(metadata.read_text().replace("item_handlers", "item_h`ndlers"))
    with caplog.at_level(logging.WARNING), contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        restored = checkpoints.restore_latest(trained(steps=0))
    assert restored is not None and restored.step == 1
    assert "checkpoint 2 cannot be loaded" in caplog.text and (tmp_path / "damaged-2").is_dir()


def test_what_orbax_does_not_notice_the_digest_does(tmp_path, monkeypatch, caplog):
    save(tmp_path, 1, 2).close()
    checkpoints = Checkpoints(tmp_path)
    load = checkpoints._checkpointer.load_checkpointables

    def load_with_a_flipped_bit(step, abstract):
        loaded = load(step, abstract)
        if step == 2:
            bits = np.asarray(loaded["state"].params["w"]).view(np.uint32).copy()
            bits[0, 0] ^= 1
            params = {**loaded["state"].params, "w": jnp.asarray(bits.view(np.float32))}
            loaded["state"] = loaded["state"]._replace(params=params)
        return loaded

    monkeypatch.setattr(checkpoints._checkpointer, "load_checkpointables", load_with_a_flipped_bit)
    with caplog.at_level(logging.WARNING):
        restored = checkpoints.restore_latest(trained(steps=0))
    assert restored is not None and restored.step == 1
    assert "checkpoint 2 cannot be loaded and is passed over: 'params/w' is damaged" in caplog.text


def test_all_damaged_is_an_error_that_names_them(tmp_path):
    save(tmp_path, 1, 2).close()
    for step in ("1", "2"):
        shutil.rmtree(tmp_path / step / "state")
    with pytest.raises(NoUsableCheckpoint, match="steps 1, 2"):
        Checkpoints(tmp_path).restore_latest(trained(steps=0))


def test_a_changed_dtype_is_an_error_not_a_cast(tmp_path):
    # Orbax itself restores float32 into a bfloat16 target without a word.
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, trained("float32"), extra={}, metrics=None)
    checkpoints.close()
    with pytest.raises(DoesNotFit, match="checkpoint 1 .* is float32 .*; expected bfloat16"):
        Checkpoints(tmp_path).restore_latest(trained("bf16"))


def test_a_changed_shape_is_an_error(tmp_path):
    save(tmp_path, 1).close()
    like = trained(steps=0)
    like = like._replace(params={**like.params, "w": jnp.ones((9,))})
    with pytest.raises(DoesNotFit, match=r"'params/w' is float32 \(3, 3\); expected .*\(9,\)"):
        Checkpoints(tmp_path).restore_latest(like)


def test_an_array_too_many_or_too_few_is_an_error(tmp_path):
    save(tmp_path, 1).close()
    like = trained(steps=0)
    for params, words in (
        (
            {**like.params, "b": jnp.ones(2)},
            r"the state has 'params/b' \(float32, \(2,\)\), which the checkpoint does not have",
        ),
        (
            {"list": like.params["list"]},
            r"the checkpoint has 'params/w' \(float32, \(3, 3\)\), which the state does not have",
        ),
    ):
        with pytest.raises(DoesNotFit, match=words):
            Checkpoints(tmp_path).restore_latest(like._replace(params=params))


def test_what_was_saved_beside_a_state_can_refuse_it(tmp_path):
    save(tmp_path, 1, 2).close()
    seen = []

    def check(step, extra):
        seen.append((step, extra["data"]["next_index"]))
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        Checkpoints(tmp_path).restore_latest(trained(steps=0), check=check)
    assert seen == [(2, 2)]


def test_a_failed_save_is_told_and_the_next_one_is_tried(tmp_path, caplog):
    checkpoints = save(tmp_path, 1, 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))  # no file may have more than a byte
    try:
        checkpoints.save(3, trained(), extra={}, metrics=None)
        with pytest.raises(
            NotSaved, match="checkpoint 3 could not .* checkpoint is that of step 2"
        ):
            checkpoints.wait()
        assert checkpoints.steps() == [1, 2]
        checkpoints.save(4, trained(), extra={}, metrics=None)
        checkpoints._settle()  # the save runs behind; it must not outlast the limit
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with caplog.at_level(logging.WARNING):
        checkpoints.save(5, trained(), extra={}, metrics=None)
        checkpoints.wait()
    assert "checkpoint 4 could not be saved" in caplog.text and "again at step 5" in caplog.text
    assert checkpoints.steps() == [2, 5]
    checkpoints.close()
    for _ in range(40):  # Orbax's threads may outlive its error and write on
        Checkpoints(tmp_path, clean=True).close()
        left = sorted(path.name for path in tmp_path.iterdir())
        if left == ["2", "5"]:
            break
        time.sleep(0.25)
    assert left == ["2", "5"]


def test_the_remains_of_a_killed_save_are_removed_by_the_one_that_saves_only(tmp_path):
    save(tmp_path, 1).close()
    remains = tmp_path / "2.orbax-checkpoint-tmp"
    remains.mkdir()
    Checkpoints(tmp_path).close()
    assert remains.exists()
    with contextlib.closing(Checkpoints(tmp_path, clean=True)) as checkpoints:
        assert checkpoints.steps() == [1]
        checkpoints.save(2, trained(), extra={}, metrics=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_checkpoints_without_a_metric_are_not_kept_as_best(tmp_path):
    checkpoints = save(tmp_path, 1, 2, 3, 4, 5, best="accuracy")
    assert checkpoints.steps() == [4, 5]


def test_later_checkpoints_are_set_aside_and_their_steps_can_be_saved_again(tmp_path):
    checkpoints = save(tmp_path, 1, 2)
    checkpoints.set_aside_after(1)
    assert checkpoints.steps() == [1] and (tmp_path / "damaged-2").is_dir()
    checkpoints.save(2, trained(steps=2), extra={}, metrics=None)
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2]
    assert Checkpoints(tmp_path).steps() == [1, 2]
    checkpoints.set_aside_after(1)  # none of them replaces another
    assert (tmp_path / "damaged-2").is_dir() and (tmp_path / "damaged-2-2").is_dir()
