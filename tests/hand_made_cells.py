"""Cells of a sweep made by hand."""

from typing import Any

import numpy as np

from ntkdp.advisor import CellMetrics

NAMES = ("loss", "accuracy", "ece", "mce", "test_loss", "test_accuracy", "test_ece", "test_mce")


def cells(diverged: Any = None, **given: Any) -> CellMetrics:
    """Metrics of cells, None where not given."""
    values: Any = {name: np.asarray(array, float) for name, array in given.items()}
    size = len(next(iter(values.values())))
    lost = np.zeros(size, bool) if diverged is None else np.asarray(diverged)
    return CellMetrics(**{name: values.get(name) for name in NAMES}, diverged=lost)
