r"""Observation: discrete DP-SGD with per-sample clipping and the exact noise scale.

One step: :math:`w^+ = w - \eta\,U\big[\tfrac1B(\sum_{i \in batch} C_i g_i + \sigma S z)\big]` with
:math:`z \sim N(0, I)`, S the sensitivity of the clipping rule, B the expected batch size q n
(``reduction="mean"``), and U the optimizer; with ``reduction="sum"`` the sum is divided by q.
Noise of the *sum* has standard deviation ``noise_multiplier * sensitivity`` on every weight.

A sample whose gradient norm or clipping factor is not finite contributes nothing, so that it cannot
break the bound. With ``gradients="structured"`` neither does one whose clipped gradient the dtype
can hold only in part, because inputs and cotangents are at opposite ends of its range, e.g. 1e36
and 1e-30 in float32. Without a bound (`NoClipping`, `Batch`) samples are used as they are, so that
divergence is seen. One sample adds at most S to the sum, up to rounding: 1e-9 S in float64, 1e-4 S
in float32 and 1e-2 S in half precision. Sums and noise are formed in float32 at least, and are cast
once to the dtype of the parameters, when the noise is in them.
"""

from ntkdp.dp_sgd._algorithm import Algorithm as Algorithm
from ntkdp.dp_sgd._algorithm import State as State
from ntkdp.dp_sgd._build import build
from ntkdp.dp_sgd._run import run, run_phases

__all__ = [
    "build",
    "run",
    "run_phases",
]
