"""The device and the versions that a result comes from."""

from __future__ import annotations

import importlib.metadata
import platform

import jax

from jmp_train.types import Json

_PACKAGES = ("jmp-train", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


def device_and_versions() -> Json:
    """Return the device of this process and the versions of Python and the packages, as JSON."""
    device = jax.devices()[0]
    return {
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
        },
        "versions": package_versions(),
    }


def package_versions() -> dict[str, str]:
    """Return the version of Python and of each package that a result depends on."""
    versions = {name: package_version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **versions}


def package_version(package: str) -> str:
    """Return the installed version of a package, or "not installed".

    >>> package_version("no-such-package")
    'not installed'
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # used from a folder
        return "not installed"
