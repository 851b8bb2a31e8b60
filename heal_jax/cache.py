"""JAX's persistent compilation cache, as the `heal` command uses it: what one run compiled, later runs read.

A compiled program is trusted as code is, so the folder must be the user's alone, and it is the user's cache directory,
never a run directory, which is handed on. Results do not depend on it: a program that is read is the one that would be
compiled.
"""

import hashlib
import os
import stat
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import filelock
import jax

from heal_jax import storage
from heal_jax.errors import InputError
from heal_jax.processors import processor

# A run of the built-in models leaves 1 MB, one of large models up to some hundred; then the oldest go.
MAX_BYTES = 1 << 30
MIN_SECONDS = 0.2  # programs that compile faster are read hardly sooner


def folder() -> Path:
    """Where the cache is, by processor: home directories are shared, and a program may use what another lacks."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        caches = Path(base)
    elif sys.platform == "darwin":
        caches = Path.home() / "Library" / "Caches"
    else:
        caches = Path.home() / ".cache"
    return caches / "heal_jax" / hashlib.sha256(processor().encode()).hexdigest()[:16]


def enable(say: Callable[[str], None]) -> None:
    """Have this process's compiled programs kept. Where that cannot be, `say` why in a line, and go on without.

    JAX_COMPILATION_CACHE_DIR names another folder, or gs://BUCKET/PATH, which is then JAX's affair alone;
    HEAL_COMPILATION_CACHE=off: no cache. Raises InputError where that is neither on nor off.
    """
    wanted = os.environ.get("HEAL_COMPILATION_CACHE") or "on"
    if wanted not in ("on", "off"):
        raise InputError(f"HEAL_COMPILATION_CACHE={wanted}: on or off is expected")
    if wanted == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    # What goes wrong with an entry (a full disk, a lock held too long) costs a compilation and no more.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    if given := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        try:
            if url := storage.address(given):
                storage.require(url)
        except InputError as error:
            say(f"note: {error}; until then every run compiles anew")
            jax.config.update("jax_enable_compilation_cache", False)
        return
    path = folder()
    if wrong := unusable(path):
        say(f"note: {path}: no compilation cache ({wrong}); every run compiles anew")
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)


def unusable(path: Path, make: bool = True) -> str:
    """Why this folder cannot be the cache; empty where it can. make: make it, and mend what is torn in it."""
    try:
        for own in (path.parent, path):
            if make:
                own.mkdir(mode=0o700, parents=True, exist_ok=True)
            elif not own.is_dir():
                return ""  # a run makes it
            found = own.stat()
            if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                return "others may write there"
        if make:
            _remove_torn(path)
    except OSError as error:
        return str(error.strerror or error)
    return ""


def _remove_torn(path: Path) -> None:
    """Remove entries whose time of use is missing: a process was killed, or the disk full, while it wrote them.

    JAX would take such a one for whole and, since it sorts by that time, never write another. The lock is JAX's own.
    """
    with filelock.FileLock(path / ".lockfile", timeout=10):
        for entry in path.glob("*-cache"):
            used = entry.with_name(entry.name.removesuffix("-cache") + "-atime")
            if not used.exists() or not used.stat().st_size:
                entry.unlink()
