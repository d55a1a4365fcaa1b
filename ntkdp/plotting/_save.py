"""Figures in files."""

import os
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ntkdp._backend.files import replacing
from ntkdp._backend.validate import positive
from ntkdp._results import figure_style

_FORMATS = ("png", "pdf", "svg")


def save(figure: Figure | Axes, path: str | os.PathLike[str], *, dpi: float | int = 200) -> None:
    """Write a figure as PNG, PDF or SVG by the suffix of the path, whole or not at all.

    Parameters
    ----------
    figure : Figure or Axes
        A figure, or any Axes of it.
    path : path
        Ends in .png, .pdf or .svg. A file that is there is replaced.
    dpi : float
        Dots per inch of a PNG.

    Raises
    ------
    TypeError
        If ``figure`` is not a figure.
    ValueError
        If the path has another suffix.
    FileNotFoundError
        If the folder does not exist.
    FileExistsError, PermissionError
        If something other than a file is there, or a file that is read-only.

    Examples
    --------
    >>> import pathlib, tempfile, ntkdp
    >>> ax = ntkdp.plotting.kernel_spectrum([4.0, 2.0, 1.0])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ntkdp.plotting.save(ax, pathlib.Path(folder, "spectrum.png"))
    """
    if not isinstance(figure, Figure | Axes):
        raise TypeError(f"figure must be a Figure or an Axes, got {type(figure).__name__}")
    path = Path(path)
    suffix = path.suffix.lower().removeprefix(".")
    if suffix not in _FORMATS:
        raise ValueError(
            f"path must end in one of {', '.join('.' + f for f in _FORMATS)}, got {str(path)!r}"
        )
    dpi = positive(dpi=dpi)
    with replacing(path) as temporary:
        figure_style.draw_into(temporary, figure, suffix, dpi)
