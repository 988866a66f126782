"""Names, facts of formats, and what each kind of device multiplies fastest."""

import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jmp_train as jt
from jmp_train.errors import nearest
from jmp_train.numerics.dtypes import (
    DTYPE_NAMES,
    at_least_float32,
    dtype_name,
    is_floating,
    parse_dtype,
)

FORMATS = {
    "bf16": ml_dtypes.bfloat16,
    "bfloat16": ml_dtypes.bfloat16,
    "f16": np.float16,
    "fp16": np.float16,
    "float16": np.float16,
    "full": np.float32,
    "f32": np.float32,
    "fp32": np.float32,
    "float32": np.float32,
    "f64": np.float64,
    "fp64": np.float64,
    "float64": np.float64,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
}


def test_the_names_are_these_and_half():
    assert set(DTYPE_NAMES) == {*FORMATS, "half"}


@pytest.mark.parametrize("name,scalar_type", FORMATS.items())
def test_a_dtype_is_found_by_name_by_scalar_type_and_by_itself(name, scalar_type):
    want = np.dtype(scalar_type)
    assert parse_dtype(name) == parse_dtype(scalar_type) == parse_dtype(want) == want
    assert parse_dtype(getattr(jnp, want.name)) == want
    assert isinstance(parse_dtype(name), np.dtype)


@pytest.mark.parametrize("scalar_type", FORMATS.values())
def test_the_short_name_parses_back(scalar_type):
    assert parse_dtype(dtype_name(scalar_type)) == np.dtype(scalar_type)


def test_dtype_to_names_takes_every_spelling_of_a_key_as_jmp_does():
    keys = (jnp.float32, np.float32, np.dtype(np.float32))
    assert {jt.numerics.dtype_to_names[key] for key in keys} == {("full", "f32", "float32", "fp32")}
    assert jt.numerics.dtype_to_names[jnp.bfloat16] == ("bf16", "bfloat16")


@pytest.mark.parametrize(
    "not_a_format",
    [None, int, np.int32, np.complex64, np.bool_, np.longdouble, np.dtype(">f4"), object(), object]
    + [ml_dtypes.int4, np.dtype([("a", "f4")]), np.dtype("U3")],
)
def test_what_is_not_a_floating_format_is_refused(not_a_format):
    with pytest.raises(ValueError, match="expected a floating dtype such as bfloat16"):
        parse_dtype(not_a_format)


def test_a_prng_key_dtype_is_refused_and_not_floating():
    dtype = jax.random.key(0).dtype
    assert not is_floating(dtype)
    with pytest.raises(ValueError, match="expected a floating dtype"):
        parse_dtype(dtype)


@pytest.mark.parametrize(
    "misspelt,meant",
    [
        ("float17", "float16"),
        ("bf61", "bf16"),
        ("BF16", "bf16"),
        ("Float32", "float32"),
        ("bfloat", "bfloat16"),
        ("flaot64", "float64"),
        ("float8_e4m3", "float8_e4m3fn"),
        ("haf", "half"),
        ("ful", "full"),
    ],
)
def test_a_misspelt_dtype_names_the_nearest(misspelt, meant):
    with pytest.raises(ValueError, match=f"^Unknown dtype '{misspelt}'; did you mean '{meant}'"):
        parse_dtype(misspelt)


def test_a_word_near_to_nothing_lists_what_is_valid():
    assert nearest("qqqq", ["full", "half"]) == "expected one of full, half"


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32"])
def test_widening_reaches_float32_and_leaves_what_is_wider(name):
    assert at_least_float32(getattr(jnp, name)) == np.float32
    assert at_least_float32(np.float64) == np.float64
    assert at_least_float32(np.complex64) == np.complex64


@pytest.mark.parametrize(
    "backend,half", [("cpu", np.float16), ("gpu", np.float16), ("tpu", ml_dtypes.bfloat16)]
)
def test_half_is_bfloat16_on_a_tpu_and_float16_elsewhere(monkeypatch, backend, half):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert jt.half_dtype() == parse_dtype("half") == np.dtype(half)
    assert jt.cast_to_half(np.ones(2, np.float32)).dtype == half


@pytest.mark.parametrize(
    "platform,capability,fastest",
    [
        ("cpu", None, "float32"),
        ("tpu", None, "bfloat16"),
        ("gpu", "6.1", "float32"),  # Pascal
        ("gpu", "7.0", "float16"),  # Volta
        ("gpu", "7.5", "float16"),  # Turing
        ("gpu", "8.0", "bfloat16"),  # Ampere
        ("gpu", "8.9", "bfloat16"),  # Ada
        ("cuda", "9.0", "bfloat16"),  # Hopper
        ("gpu", "10.0", "bfloat16"),  # Blackwell: two digits, and not less than 8.0
        ("gpu", "12.1", "bfloat16"),
        ("gpu", None, "float32"),
        ("gpu", "gfx906", "float16"),  # Vega 20
        ("gpu", "gfx908", "bfloat16"),  # MI100
        ("rocm", "gfx90a:sramecc+:xnack-", "bfloat16"),  # MI200
        ("gpu", "gfx942", "bfloat16"),  # MI300
        ("METAL", None, "float32"),
    ],
)
def test_the_fastest_dtype_of_a_device(platform, capability, fastest):
    device = types.SimpleNamespace(platform=platform)
    if capability is not None:
        device.compute_capability = capability
    assert jt.numerics.fastest_dtype(device).name == fastest


def test_the_fastest_dtype_is_by_default_that_of_the_first_device(monkeypatch):
    devices = [types.SimpleNamespace(platform="tpu"), types.SimpleNamespace(platform="cpu")]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    assert jt.numerics.fastest_dtype().name == "bfloat16"
    assert str(jt.get_policy("auto")) == "p=full,c=bf16,o=full"
