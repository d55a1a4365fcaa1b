"""The command ``ntkdp``, with one verb for each job."""

import lazy_loader as _lazy_loader

# Signals and streams are prepared before anything heavy is imported.
__getattr__, __dir__, __all__ = _lazy_loader.attach_stub(__name__, __file__)
