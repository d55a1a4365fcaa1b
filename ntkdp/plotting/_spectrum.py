"""Spectra of kernels."""

import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from ntkdp._backend import validate
from ntkdp._backend.types import ArrayLike
from ntkdp._results import figure_style
from ntkdp.ntk import LayerwiseKernel
from ntkdp.spectrum import as_matrices


def kernel_spectrum(
    kernel: ArrayLike | LayerwiseKernel, *, label: str = "kernel", ax: Axes | None = None
) -> Axes:
    """Eigenvalues against rank, largest first, both axes logarithmic.

    Parameters
    ----------
    kernel : array or LayerwiseKernel
        Symmetric, ``(n, n, K, K)`` or ``(n, n)`` meaning ``(x) I_K``, whose eigenvalues are drawn
        once though each stands for K. A LayerwiseKernel gives one curve for each term and one for
        their total. Eigenvalues ``(N,)`` are drawn as they are.
    label : str
        Name in the legend.
    ax : Axes, optional
        As for :func:`loss_curves`.

    Returns
    -------
    Axes
        Eigenvalues that cannot be told from zero (below N roundings of the largest) are not drawn;
        if there are any, the legend gives the rank that remains.

    Raises
    ------
    ValueError
        If the kernel has another shape, holds NaN or infinities, or is not symmetric.

    Notes
    -----
    Computed by ``numpy.linalg.eigvalsh`` in float64 from the nK x nK matrix, in time that grows as
    (nK)^3.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> ax = ntkdp.plotting.kernel_spectrum(jnp.diag(jnp.array([1.0, 4.0, 2.0])))
    >>> ax.lines[0].get_ydata().tolist()
    [4.0, 2.0, 1.0]
    """
    if isinstance(kernel, LayerwiseKernel):
        terms = dict(zip(kernel.names, kernel.values, strict=True))
        spectra = {"total": kernel.total, **{f"group {k}": v for k, v in terms.items()}}
    else:
        spectra = {label: kernel}
    with mpl.rc_context(figure_style.LOOK):
        ax = figure_style.axes_or_new(ax)
        ax.set_xscale("log")
        ax.set_yscale("log")
        for style, (name, matrix) in enumerate(spectra.items()):
            eigenvalues, resolution = _eigenvalues(matrix)
            drawn = eigenvalues[eigenvalues > resolution]
            if len(drawn) < len(eigenvalues):
                name = f"{name} (rank {len(drawn)} of {len(eigenvalues)})"
            figure_style.prediction_line(ax, np.arange(1, len(drawn) + 1), drawn, style, name)
        ax.set_xlabel("rank")
        ax.set_ylabel("eigenvalue")
        figure_style.readable_log_ticks(ax)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        ax.legend(loc="best")
    return ax


def _eigenvalues(kernel: ArrayLike) -> tuple[np.ndarray, float]:
    """Eigenvalues, largest first, and the value below which they are rounding."""
    given = np.asarray(validate.real(kernel=kernel))
    if given.ndim == 1 and given.size:
        values = validate.finite(kernel=given).astype(np.float64)
    else:
        values = np.linalg.eigvalsh(np.asarray(as_matrices(kernel, layerwise=False)[0], np.float64))
    dtype = given.dtype if jnp.issubdtype(given.dtype, jnp.floating) else np.float64
    rounding = float(jnp.finfo(dtype).eps)
    descending = np.sort(values)[::-1]
    return descending, len(values) * rounding * float(np.max(np.abs(values)))
