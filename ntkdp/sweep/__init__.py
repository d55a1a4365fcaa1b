"""A sweep: the map of learning rate against clipping norm, predicted at once, run cell by cell.

Every cell starts from the same network and draws the same random numbers. What is measured are the
losses, accuracies and calibration errors after the last step.
"""

import lazy_loader as _lazy_loader

# Settings are read and checked before JAX and matplotlib are imported, which takes seconds.
__getattr__, __dir__, __all__ = _lazy_loader.attach_stub(__name__, __file__)
