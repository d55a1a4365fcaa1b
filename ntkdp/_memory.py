"""How much memory there is, asked before it is taken."""

from pathlib import Path

import jax
import psutil

_CGROUP_LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


#: Bytes that per-sample gradients in factored form may take at once, where work is done in batches.
FACTOR_BYTES = 2**26


def available_bytes() -> int:
    """Bytes free for arrays on the default device: its own, or the machine's or container's."""
    statistics = jax.local_devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if statistics and "bytes_limit" in statistics:
        return int(statistics["bytes_limit"]) - int(statistics.get("bytes_in_use", 0))
    available = int(psutil.virtual_memory().available)
    for limit_file, usage_file in _CGROUP_LIMITS:
        try:
            limit, usage = limit_file.read_text().strip(), usage_file.read_text().strip()
        except OSError:
            continue
        if limit.isdigit():
            available = min(available, int(limit) - int(usage))
    return max(available, 0)


def samples_at_once(bytes_of_one: int) -> int:
    """How many samples' gradients in factored form may be held at once, one or more."""
    return max(1, FACTOR_BYTES // max(bytes_of_one, 1))


def require(needed: int, what: str, ways_out: str) -> None:
    """Raise ``MemoryError`` unless ``needed`` bytes are there.

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
