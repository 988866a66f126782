"""Shapes of meshes: what is read from a text, and what is refused in one line."""

import dataclasses
import math

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jmp_train as jt
from jmp_train.errors import UsageError
from jmp_train.runs.devices import sharded_of
from jmp_train.sharding import AXES, MeshShape, Sharded, make_mesh


@pytest.mark.parametrize(
    "text,devices,shape",
    [
        ("", 8, (8, 1, 1)),
        ("", 1, (1, 1, 1)),
        ("data=4", 4, (4, 1, 1)),
        ("data=2,fsdp=4", 8, (2, 4, 1)),
        (" fsdp = 4 , tensor = 2 ", 8, (1, 4, 2)),
        ("fsdp=-1", 8, (1, 8, 1)),
        ("data=2,fsdp=-1,tensor=2", 8, (2, 2, 2)),
        ("data=2,fsdp=-1", 2, (2, 1, 1)),
    ],
)
def test_a_text_is_a_shape(text, devices, shape):
    assert dataclasses.astuple(MeshShape.parse(text).on(devices)) == shape


@given(st.lists(st.integers(1, 6), min_size=3, max_size=3), st.integers(0, 2))
def test_what_is_left_is_filled_in_and_the_text_comes_back(sizes, free):
    shape = MeshShape(*sizes)
    assert MeshShape.parse(str(shape)).on(math.prod(sizes)) == shape
    asked = dataclasses.replace(shape, **{AXES[free]: -1})
    assert asked.on(math.prod(sizes)) == shape


@pytest.mark.parametrize(
    "text,line",
    [
        ("dat=2", "mesh is 'dat=2', with the axis 'dat'; did you mean 'data'?"),
        ("model=2", "with the axis 'model'; expected one of data, fsdp, tensor"),
        ("data", "expected AXIS=NUMBER, such as data=2, or data=-1 for all devices that are left"),
        ("data=two", "expected AXIS=NUMBER"),
        ("data=0", "expected AXIS=NUMBER"),
        ("data=-2", "expected AXIS=NUMBER"),
        ("data=2,data=4", "mesh is 'data=2,data=4', with two sizes of data; expected one"),
        ("data=-1,fsdp=-1", "expected one size of -1 at most"),
        ("=3", "with the axis ''"),
    ],
)
def test_what_is_no_shape_is_refused_when_the_experiment_is_made(text, line):
    with pytest.raises(ValueError) as error:
        MeshShape.parse(text)
    assert line in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="mesh is"):
        dataclasses.replace(experiment(), mesh=text)


@pytest.mark.parametrize(
    "text,devices,line",
    [
        ("data=2,fsdp=4", 4, "mesh is data=2,fsdp=4, of 8 devices, and there are 4; expected sizes"),
        ("fsdp=4", 8, "of 4 devices, and there are 8; expected data=2, or sizes whose product is 8"),
        ("fsdp=3,data=-1", 8, "of a multiple of 3 devices, and there are 8; expected sizes whose"),
    ],
)  # fmt: skip
def test_a_shape_of_another_number_of_devices_is_refused(text, devices, line):
    with pytest.raises(ValueError) as error:
        MeshShape.parse(text).on(devices)
    assert line in str(error.value)


def test_a_mesh_of_other_axes_is_refused():
    with pytest.raises(ValueError, match="axes data, model; expected data, fsdp, tensor"):
        Sharded(jax.make_mesh((1, 1), ("data", "model")))
    with pytest.raises(ValueError, match="reduce_dtype is 'float64'; expected one of float32, bf"):
        Sharded(make_mesh("", jax.devices()[:1]), reduce_dtype="float64")


def experiment(**fields):
    from jmp_train.config.find import find_experiment

    return dataclasses.replace(find_experiment("mlp_fp16"), **fields)


@pytest.mark.parametrize(
    "fields,line",
    [
        ({"mesh": "data=2"}, "mesh is data=2, of 2 devices, and there are 1"),
        ({"placement": ("**/kernle=fsdp",)},
         "the rule '**/kernle' matches no parameter; the nearest are 'layers/2/kernel', "),
    ],
)  # fmt: skip
def test_a_run_on_one_device_refuses_what_it_cannot_honour(fields, line):
    own = experiment(**fields)
    task = own.functions(own.data.load().spec)
    with pytest.raises(UsageError) as error:
        sharded_of(own, task, jax.devices()[:1])
    assert line in str(error.value)


def test_one_device_needs_no_mesh():
    own = experiment()
    task = own.functions(own.data.load().spec)
    assert sharded_of(own, task, jax.devices()[:1]) is None


def test_the_public_names_are_there():
    assert jt.sharding.Sharded is Sharded
