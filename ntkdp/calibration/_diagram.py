"""The reliability diagram: accuracy against confidence."""

from typing import TYPE_CHECKING

from ntkdp._backend.types import ArrayLike
from ntkdp.calibration._bins import Binning, reliability_bins
from ntkdp.calibration._errors import expected_calibration_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def reliability_diagram(
    probs: ArrayLike,
    labels: ArrayLike,
    *,
    n_bins: int = 15,
    binning: Binning = "width",
    ax: "Axes | None" = None,
) -> "Axes":
    """Accuracy of the top label over its confidence, with the gaps to the diagonal.

    A bar reaches up to the accuracy of its bin; the gap between it and the bin's mean confidence
    is hatched, in one colour where the network is over-confident and in another where it is
    under-confident. The title gives the expected calibration error and n.

    Parameters
    ----------
    probs, labels, n_bins, binning
        As for :func:`reliability_bins`.
    ax : Axes, optional
        Where to draw; by default on a new figure, the ``.figure`` of the result.

    Returns
    -------
    Axes

    Raises
    ------
    ValueError, TypeError
        As for :func:`reliability_bins`; also if ``ax`` is no Axes.

    Notes
    -----
    DeGroot, Fienberg, *The Comparison and Evaluation of Forecasters*, 1983; drawn as in Guo et al.,
    2017.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> probs, labels = jnp.array([0.9, 0.9, 0.8, 0.6]), jnp.array([1, 0, 1, 1])
    >>> ax = ntkdp.calibration.reliability_diagram(probs, labels, n_bins=10)
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('confidence', 'accuracy')
    """
    from ntkdp.calibration import _drawing

    bins = reliability_bins(probs, labels, n_bins, binning=binning)
    error = expected_calibration_error(probs, labels, n_bins, binning=binning)
    return _drawing.draw(bins, error, ax)
