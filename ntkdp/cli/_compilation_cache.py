"""Compiled programs that a command keeps for the next one, in the user's cache folder."""

import os
import platform
import sys
from contextlib import suppress
from pathlib import Path

#: The most bytes that the folder holds when a command begins. JAX's own limit reads the whole
#: folder for each new program, which took longer than to compile thousands of them.
_MOST_BYTES = 2**30
#: Settings of JAX by name. Reading a program costs less than compiling any.
_SETTINGS: dict[str, str | int | float] = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    # A further cache is for GPUs; with it, a program's key would depend on the folder.
    "jax_persistent_cache_enable_xla_caches": "none",
}


def folder() -> Path:
    """Where programs are kept: one folder for each machine, whose processor they are made for."""
    import platformdirs

    return platformdirs.user_cache_path("ntkdp") / "programs" / (platform.node() or "machine")


def begin() -> None:
    """Let JAX keep compiled programs, here and in processes that this one starts.

    A folder that the user chose for JAX stays. Without one that can be written to, every command
    compiles anew, as it does if a machine is divided into several devices, since programs for
    several devices that are read from a file sometimes wait for ever.
    """
    if _is_chosen() or "device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    place = folder()
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if not os.access(place, os.W_OK):
        return
    make_room(place, _MOST_BYTES)
    settings = {**_SETTINGS, "jax_compilation_cache_dir": str(place)}
    for name, value in settings.items():
        os.environ.setdefault(name.upper(), str(value))
    if "jax" in sys.modules:
        import jax

        for name, value in settings.items():
            jax.config.update(name, value)


def make_room(place: Path, most: int) -> None:
    """Remove the oldest programs, if all take more bytes than this, until half of it is free."""
    found = []
    for path in place.glob("*-cache"):
        with suppress(OSError):  # another command may have removed it
            status = path.stat()
            found.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in found)
    if total <= most:
        return
    for _, size, path in sorted(found):
        with suppress(OSError):
            path.unlink()
        total -= size
        if total <= most // 2:
            return


def _is_chosen() -> bool:
    """Whether the user has decided where JAX keeps programs."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return True
    if "jax" not in sys.modules:
        return False
    import jax

    chosen: str | None = jax.config.values["jax_compilation_cache_dir"]
    return chosen is not None
