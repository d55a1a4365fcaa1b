"""The memory that is free for arrays, checked before it is taken."""

import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import jax
import psutil

#: Bytes that per-sample gradients in factored form may take at once if work is done in batches.
FACTOR_BYTES = 2**26

#: Where control groups are mounted: version 2, version 2 together with version 1, and version 1.
_MOUNTS = ("sys/fs/cgroup", "sys/fs/cgroup/unified", "sys/fs/cgroup/memory")


class _Files(NamedTuple):
    """Names of the files of a control group, and of the entry for unused cache."""

    limit: str
    usage: str
    inactive: str


_VERSIONS = (
    _Files("memory.max", "memory.current", "inactive_file"),
    # In version 1, an entry without `total_` leaves out the groups below.
    _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_in_control_groups(root: Path = Path("/")) -> list[int]:
    """Bytes that each control group of this process allows it, from its own up to the root.

    The kernel drops unused file cache when a group needs room, so it counts as free. A file that
    cannot be read sets no limit.
    """
    groups = _text(root / "proc/self/cgroup")
    frees = [_free(folder, files) for folder, files in _with_limits(root, groups)]
    return [free for free in frees if free is not None]


# Looking for missing files takes milliseconds, and kernels ask at every call.
@lru_cache(maxsize=8)
def _with_limits(root: Path, groups: str) -> tuple[tuple[Path, _Files], ...]:
    """Control groups that have a file for their limit."""
    return tuple(
        (folder, files)
        for folder in _own_and_above(root, groups)
        for files in _VERSIONS
        if (folder / files.limit).exists()
    )


def _own_and_above(root: Path, groups: str) -> Iterator[Path]:
    """Folders of the control groups of this process, on each mount from its own to the top."""
    paths = {""}
    for line in groups.splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers or "memory" in controllers.split(","):
            # A path that leaves the mount begins with dots.
            paths.add("/".join(part for part in path.split("/") if part not in ("", "..")))
    seen = set()
    for mount in _MOUNTS:
        top = root / mount
        for path in sorted(paths):
            own = top / path
            seen |= {own, *(above for above in own.parents if top in (above, *above.parents))}
    yield from sorted(seen)


def _free(folder: Path, files: _Files) -> int | None:
    limit = _number(_text(folder / files.limit))
    if limit is None:
        return None
    usage = _number(_text(folder / files.usage)) or 0
    entries = dict(
        line.split(" ", 1) for line in _text(folder / "memory.stat").splitlines() if " " in line
    )
    inactive = _number(entries.get(files.inactive, "")) or 0
    return max(limit - max(usage - inactive, 0), 0)


def free_in_process() -> list[int]:
    """Bytes that the limits of this process allow it, as ``ulimit -v`` and ``-d`` set them."""
    if sys.platform != "linux":
        return []
    import resource

    try:
        used = psutil.Process().memory_info()
    except psutil.Error:
        return []
    limits = ((resource.RLIMIT_AS, used.vms), (resource.RLIMIT_DATA, used.data))
    soft = [(resource.getrlimit(which)[0], taken) for which, taken in limits]
    return [max(limit - taken, 0) for limit, taken in soft if limit != resource.RLIM_INFINITY]


def free_in_machine() -> list[int]:
    """Bytes that are free in this machine; empty if it does not tell."""
    try:
        return [int(psutil.virtual_memory().available)]
    except (OSError, RuntimeError, ValueError):
        return []


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() else None


def available_bytes() -> int:
    """Bytes that are free for arrays on the default device.

    If the device has memory of its own, these are the bytes that are free there. Otherwise they are
    the least of three numbers: the bytes that are free in the machine, those that the control
    groups of this process allow it (of a container or a job, say), and those that its own limits
    allow it (``ulimit -v``).
    """
    statistics = jax.local_devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if statistics and "bytes_limit" in statistics:
        return max(int(statistics["bytes_limit"]) - int(statistics.get("bytes_in_use", 0)), 0)
    free = [
        *free_in_machine(),
        *free_in_control_groups(),
        *free_in_process(),
    ]
    return min(free, default=sys.maxsize)


def samples_at_once(bytes_per_sample: int) -> int:
    """The number of samples, at least one, whose factored gradients may be held at once."""
    return max(1, FACTOR_BYTES // max(bytes_per_sample, 1))


def require(needed: int, what: str, ways_out: str) -> None:
    """Raise ``MemoryError`` unless ``needed`` bytes are available.

    Raises
    ------
    MemoryError
        With the bytes needed, the bytes available and the ways out.
    """
    available = available_bytes()
    if needed > available:
        raise MemoryError(
            f"{what} needs {needed:,} bytes ({needed / 2**30:.1f} GiB) and {available:,} bytes "
            f"({available / 2**30:.1f} GiB) are available; {ways_out}"
        )
