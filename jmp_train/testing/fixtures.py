"""Fixtures for pytest: a test with and without jit, on each kind of device.

Import them where tests use them, in `conftest.py` or in the test file:

    from jmp_train.testing.fixtures import device, variant

They are not a plugin, so pytest runs that do not use them never import JAX.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest

from jmp_train.types import Function

__all__ = ["device", "variant"]


@pytest.fixture(params=["with_jit", "without_jit"])
def variant(request: pytest.FixtureRequest) -> Callable[..., Function]:
    """Return `jax.jit`, or a function that returns its first argument: two tests of one."""
    if request.param == "with_jit":
        return jax.jit
    return lambda fn, **_: fn


@pytest.fixture(params=["cpu", "gpu"])
def device(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Return the first device of a platform, the default one during the test; skip without one."""
    try:
        found = jax.devices(request.param)[0]
    except RuntimeError:
        pytest.skip(f"needs a device of platform {request.param!r}")
    with jax.default_device(found):
        yield found
