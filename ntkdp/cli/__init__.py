"""The command ``ntkdp``, one verb a job."""

import lazy_loader as _lazy_loader

# What can stop the command is seen to before anything heavy is imported.
__getattr__, __dir__, __all__ = _lazy_loader.attach_stub(__name__, __file__)
