"""Spectra of kernels."""

from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from ntkdp._results import figure_style
from ntkdp.ntk import LayerwiseKernel, as_matrices


def kernel_spectrum(kernel: Any, *, label: str = "kernel", ax: Axes | None = None) -> Axes:
    """Eigenvalues against rank, largest first, both axes logarithmic.

    Parameters
    ----------
    kernel : array or LayerwiseKernel
        Symmetric ``(n, n)`` (each eigenvalue once, though it stands for K with ``(x) I_K``) or
        ``(n, n, K, K)``; a LayerwiseKernel of either gives one curve a term and their total; or
        eigenvalues ``(N,)``.
    label : str
        Name in the legend.
    ax : Axes, optional
        As for :func:`loss_curves`.

    Returns
    -------
    Axes
        What cannot be told from zero (below N roundings of the largest) is not drawn; the legend
        gives the rank that remains where it is less than N.

    Raises
    ------
    ValueError
        Another shape, NaN or infinities, a kernel that is not symmetric.

    Notes
    -----
    ``numpy.linalg.eigvalsh`` in float64 of the nK x nK matrix: time grows as (nK)^3.

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


def _eigenvalues(kernel: Any) -> tuple[np.ndarray, float]:
    """Eigenvalues, largest first, and the value below which they are rounding."""
    given = np.asarray(kernel)
    rounding = np.finfo(given.dtype if given.dtype.kind == "f" else np.float64).eps
    values: np.ndarray = given.astype(np.float64)
    if not np.all(np.isfinite(values)):
        raise ValueError(f"kernel must be finite, got NaN or infinities in shape {values.shape}")
    shape = values.shape
    if values.size == 0 or not (
        values.ndim == 1
        or (values.ndim in (2, 4) and shape[0] == shape[1] and shape[-2] == shape[-1])
    ):
        raise ValueError(
            "kernel must have shape (n, n) or (n, n, K, K), or be eigenvalues (N,), not empty, "
            f"got {shape}"
        )
    if values.ndim > 1:
        values = as_matrices(values[None])[0]
        asymmetry = np.max(np.abs(values - values.T))
        if asymmetry > np.sqrt(rounding) * np.max(np.abs(values)):
            raise ValueError(f"kernel must be symmetric, got entries that differ by {asymmetry:g}")
        values = np.linalg.eigvalsh(values)
    eigenvalues = np.sort(values)[::-1]
    return eigenvalues, float(len(eigenvalues) * rounding * np.max(np.abs(eigenvalues)))
