"""Predict how a neural network trains under differential privacy, and check the prediction.

The public face is lazy: a name's module is imported when the name is first used. ``__init__.pyi``
lists the names.
"""

from importlib.metadata import version as _version

import lazy_loader as _lazy_loader

# Lets neural-tangents be imported on this JAX, by users too; it imports nothing itself.
from ntkdp._backend import neural_tangents as _neural_tangents  # noqa: F401

__getattr__, _names, __all__ = _lazy_loader.attach_stub(__name__, __file__)
__version__ = _version("ntkdp")


def __dir__() -> list[str]:
    return [*_names(), "__version__"]
