r"""Calibration: whether predicted probabilities come true as often as they say.

Probabilities are ``(n, K)``, rows that sum to one, or, for two classes, ``(n,)`` or ``(n, 1)``
meaning P(y = 1); labels are integers ``(n,)`` in ``0 .. K-1`` (two classes: 0 or 1, or bool). The
**top label** of a sample is the class of the largest probability, the lower one of a tie, and that
probability is its **confidence**; for P(y = 1) = p the confidence is max(p, 1 - p), never below
one half.

Bin edges are closed above, ``(lo, hi]``; the first bin also holds its lower edge, hence confidence
0. All measures work under ``jit``, ``vmap`` and, almost everywhere, ``grad`` with a fixed number of
bins. A probability that is outside [0, 1] by rounding alone counts as 0 or 1. One that is further
outside raises if the array is known before the program runs; inside ``jit`` it makes the result
NaN. Probabilities in half precision are measured in float32.
"""

from ntkdp.calibration._bins import Bins, reliability_bins
from ntkdp.calibration._bootstrap import Interval, bootstrap
from ntkdp.calibration._diagram import reliability_diagram
from ntkdp.calibration._errors import (
    brier_score,
    classwise_calibration_error,
    expected_calibration_error,
    maximum_calibration_error,
    negative_log_likelihood,
)
from ntkdp.calibration._scaling import (
    Platt,
    Temperature,
    fit_platt,
    fit_platt_privately,
    fit_temperature,
    fit_temperature_privately,
)

__all__ = [
    "Bins",
    "Interval",
    "Platt",
    "Temperature",
    "bootstrap",
    "brier_score",
    "classwise_calibration_error",
    "expected_calibration_error",
    "fit_platt",
    "fit_platt_privately",
    "fit_temperature",
    "fit_temperature_privately",
    "maximum_calibration_error",
    "negative_log_likelihood",
    "reliability_bins",
    "reliability_diagram",
]
