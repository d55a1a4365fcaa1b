"""An experiment: a configuration in, predictions, runs and their comparison out."""

import lazy_loader as _lazy_loader

# Importing JAX and matplotlib takes seconds, so settings are read and checked before.
__getattr__, __dir__, _ = _lazy_loader.attach_stub(__name__, __file__)

__all__ = [
    "KERNEL_OF",
    "LABELS",
    "Case",
    "Config",
    "ConfigError",
    "Forecast",
    "Kernel",
    "Prediction",
    "Problem",
    "Results",
    "config",
    "fields_of_features",
    "forecast",
    "kernel_of",
    "load_config",
    "noise_free",
    "problem_of",
    "rules_of",
    "run",
]
