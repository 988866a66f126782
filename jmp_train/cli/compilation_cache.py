"""JAX's persistent compilation cache, so that a second run starts sooner."""

from __future__ import annotations

import os
from pathlib import Path

import jax


def cache_folder() -> Path:
    """Return the folder of compiled programs, in `$XDG_CACHE_HOME` or `~/.cache`.

    Raises:
      RuntimeError: if there is no home folder.
    """
    base = os.environ.get("XDG_CACHE_HOME") or ""
    return (
        (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "jmp-train" / "xla"
    )


def keep_compiled() -> None:
    """Turn JAX's persistent compilation cache on for this process.

    For the command line; your own program sets JAX's options itself. A cache that is already set
    (`JAX_COMPILATION_CACHE_DIR`) stays, and `JAX_ENABLE_COMPILATION_CACHE=false`
    turns off any. Where the folder cannot be written, nothing is cached.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, RuntimeError):
        return
    if not os.access(folder, os.W_OK):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # The small programs around a run compile in less than JAX's threshold of a second each.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
