"""Where results come from: versions and machine, as every metrics.json has them."""

import platform
from importlib.metadata import version
from typing import Any

#: The version of ntkdp that is installed; pyproject.toml is the one place that states it.
VERSION = version("ntkdp")


def provenance(*packages: str) -> dict[str, Any]:
    """Versions of ntkdp and of packages, and the machine, as a tree that JSON can hold."""
    import jax

    return {
        "ntkdp": VERSION,
        "versions": {name: version(name) for name in packages},
        "machine": {
            "platform": platform.platform(),
            "processor": platform.machine(),
            "python": platform.python_version(),
            "backend": jax.default_backend(),
        },
    }
