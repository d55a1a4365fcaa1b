"""A sweep: the map of learning rate against clipping norm, predicted at once, run cell by cell.

Every cell starts from the same network and draws the same random numbers. Losses, accuracies and
calibration errors are measured after the last step.
"""

import lazy_loader as _lazy_loader

# Importing JAX and matplotlib takes seconds, so settings are read and checked before.
__getattr__, __dir__, _ = _lazy_loader.attach_stub(__name__, __file__)

__all__ = [
    "Cell",
    "Plane",
    "Results",
    "SweepConfig",
    "advice_in_words",
    "config",
    "load_config",
    "run",
]
