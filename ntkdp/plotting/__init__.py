r"""Pictures of predictions and runs in one look, readable in print and without colour vision.

The run is a thick grey line. Predictions lie on it as thin lines that differ in colour (Okabe and
Ito's palette), dashes and markers. Bands of several seeds are shaded; the bands of predictions lie
between thin lines in the prediction's own colour and dashes. Times are in units of learning rate
times steps. Functions draw on the Axes that they are given, or on a new figure; neither pyplot nor
``rcParams`` is touched.
"""

from ntkdp.comparison.curves import accuracy, clip_fraction, loss_curves
from ntkdp.plotting._certificates import certificate
from ntkdp.plotting._clip_norm import clipping_norm_curve
from ntkdp.plotting._errors import comparison_grid, relative_error
from ntkdp.plotting._heat_maps import heat_maps, trade_off
from ntkdp.plotting._individual import individual_epsilon
from ntkdp.plotting._save import save
from ntkdp.plotting._spectrum import kernel_spectrum
from ntkdp.plotting._step_terms import step_terms

__all__ = [
    "accuracy",
    "certificate",
    "clip_fraction",
    "clipping_norm_curve",
    "comparison_grid",
    "heat_maps",
    "individual_epsilon",
    "kernel_spectrum",
    "loss_curves",
    "relative_error",
    "save",
    "step_terms",
    "trade_off",
]
