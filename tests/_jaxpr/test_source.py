"""Reported source lines are the user's, wherever this package and the libraries lie."""

import os
import sysconfig
from typing import NamedTuple

import equinox
import flax
import haiku
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from helpers.programs import equations

import jmp_train as jt
from jmp_train._jaxpr import source
from jmp_train.flax import apply_policy
from jmp_train.models.mlp import Mlp

RULES = [("head", "float32"), ("**", "mixed_float16")]


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.LayerNorm()(linen.Dense(4)(x)))
        return linen.Dense(2, name="head")(x)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.body = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.body(x))))


def linen_model():
    net = apply_policy(LinenNet(), RULES)
    return net.init(jax.random.key(0), jnp.ones((1, 3))), net.apply


def nnx_model():
    graph, params, rest = nnx.split(apply_policy(NnxNet(nnx.Rngs(0)), RULES), nnx.Param, ...)
    return params, lambda params, x: nnx.merge(graph, params, rest)(x)


@pytest.mark.parametrize("model", [linen_model, nnx_model])
def test_every_line_of_a_step_is_in_the_users_file(model):
    params, apply = model()

    def loss(params, batch):
        return jnp.mean(apply(params, batch) ** 2)

    step = jt.make_step(loss, optax.sgd(0.1), "mixed_float16")
    program = jax.make_jaxpr(step.step)(step.init(params), jnp.ones((5, 3)))
    # The traceback of an equation that the step itself wrote begins below this test.
    ours = [eqn for eqn in equations(program) if written_below_here(eqn)]
    assert {source.user_line(eqn).rpartition(":")[0] for eqn in ours} == {__file__}
    products = [e for e in equations(program) if e.primitive.name == "dot_general"]
    casts = [e for e in ours if e.primitive.name == "convert_element_type"]
    assert len(products) >= 4 and all(map(written_below_here, products)) and casts


def written_below_here(eqn):
    frames = getattr(eqn.source_info.traceback, "frames", ())
    return any(frame.file_name == __file__ for frame in frames)


def test_the_layer_that_overflows_is_reported_at_its_call():
    params, apply = linen_model()
    params = jax.tree.map(lambda p: jnp.full_like(p, 6e4), params)
    for op in jt.debug.first_nonfinite(apply, params, jnp.ones((5, 3))).ops:
        assert op.source.startswith(__file__)


def frame_of(function):
    return function.__code__.co_filename


def test_networks_of_this_package_count_as_the_users():
    assert not source.is_library(frame_of(Mlp.__call__))


@pytest.mark.parametrize("part", [jt.make_step, jt.autocast, jt.value_and_grad, apply_policy])
def test_machinery_of_this_package_is_a_library(part):
    assert source.is_library(frame_of(part))


@pytest.mark.parametrize("library", [jax, flax, np, optax, os])
def test_libraries_are_known_by_where_they_are_installed(library):
    assert source.is_library(library.__file__)


def test_other_installed_packages_count_as_the_users():
    assert not source.is_library(pytest.__file__)
    folder = sysconfig.get_path("stdlib")
    assert not source.is_library(os.path.join(folder, "site-packages", "net", "model.py"))
    assert not source.is_library(os.path.join(folder, "dist-packages", "net", "model.py"))


class Frame(NamedTuple):
    file: str


def test_a_frame_outside_installed_packages_is_preferred():
    inside = Frame(os.path.join("venv", "lib", "site-packages", "net", "model.py"))
    outer = Frame(os.path.join("venv", "lib", "site-packages", "net", "loop.py"))
    command = Frame(os.path.join(sysconfig.get_path("scripts"), "train"))
    mine = Frame(os.path.join("home", "model.py"))
    find = lambda *frames: source.own_frame(frames, lambda frame: frame.file)
    assert find(Frame(jax.__file__), inside, mine, Frame(os.path.join("home", "train.py"))) == mine
    assert find(inside, outer, command, Frame(os.__file__)) == inside  # their own, installed
    assert find(Frame(jax.__file__), Frame(os.__file__)) is None


@pytest.mark.parametrize(
    "name", ["<stdin>", "<doctest net[3]>", "<ipython-input-2-0a1b>", "<python-input-0>"]
)
def test_typed_code_counts_as_the_users(name):
    assert not source.is_library(name)


@pytest.mark.parametrize(
    "name", ["<frozen importlib._bootstrap>", "<attrs generated init net.Net>", "<@beartype(f)>"]
)
def test_generated_code_is_a_library(name):
    assert source.is_library(name)


def test_a_string_is_the_users_where_no_file_is():
    string, mine = Frame("<string>"), Frame(os.path.join("home", "model.py"))
    inside = Frame(os.path.join("venv", "lib", "site-packages", "net", "model.py"))
    find = lambda *frames: source.own_frame(frames, lambda frame: frame.file)
    assert find(string, mine) == mine  # as of a dataclass
    assert find(inside, string) == string  # as of `python -c`


def equinox_model():
    model = equinox.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    return jax.make_jaxpr(lambda x: model(x))(jnp.ones(3))


def haiku_model():
    net = haiku.transform(lambda x: haiku.Linear(2)(x))
    params = net.init(jax.random.key(0), jnp.ones(3))
    return jax.make_jaxpr(lambda x: net.apply(params, None, x))(jnp.ones(3))


@pytest.mark.parametrize("model", [equinox_model, haiku_model])
def test_a_layer_of_another_library_is_reported_at_its_call(model):
    products = [e for e in equations(model()) if e.primitive.name == "dot_general"]
    assert products
    assert {source.user_line(eqn).rpartition(":")[0] for eqn in products} == {__file__}


def test_a_folder_that_only_resembles_this_package_is_the_users():
    here = os.path.dirname(os.path.dirname(os.path.abspath(source.__file__)))
    assert not source.is_library(os.path.join(os.sep, "home", "jmp_train", "flax", "model.py"))
    assert not source.is_library(here + "_user" + os.sep + "model.py")


def test_a_room_with_another_name_is_still_machinery():
    here = os.path.dirname(os.path.dirname(os.path.abspath(source.__file__)))
    assert source.is_library(os.path.join(here, "a_new_room", "file.py"))
