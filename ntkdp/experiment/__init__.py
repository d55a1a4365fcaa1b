"""An experiment: a configuration in, predictions, runs and their comparison out."""

import lazy_loader as _lazy_loader

# Importing JAX and matplotlib takes seconds, so settings are read and checked before.
__getattr__, __dir__, __all__ = _lazy_loader.attach_stub(__name__, __file__)
