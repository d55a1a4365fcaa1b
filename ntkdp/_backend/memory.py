"""The memory that is free for arrays, checked before it is taken."""

import sys

import jax

from ntkdp._backend import memory_limits

#: Bytes that per-sample gradients in factored form may take at once if work is done in batches.
FACTOR_BYTES = 2**26


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
        *memory_limits.free_in_machine(),
        *memory_limits.free_in_control_groups(),
        *memory_limits.free_in_process(),
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
