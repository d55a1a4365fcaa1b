"""The origin of results: versions and machine, for every metrics.json."""

import platform
from importlib.metadata import version
from typing import TypedDict

#: The version of ntkdp that is installed; pyproject.toml is the one place that states it.
VERSION = version("ntkdp")


class Provenance(TypedDict):
    """Versions and machine, as JSON can hold them."""

    ntkdp: str
    versions: dict[str, str]
    machine: dict[str, str]


def provenance(*packages: str) -> Provenance:
    """Versions of ntkdp and of these packages, and the machine, as a tree for JSON."""
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
