"""The picture of certificates of decay: the clipping norm of a run next to the safe one."""

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ntkdp._results import figure_style
from ntkdp.certificates import Certificates
from ntkdp.comparison.curves import TIME

#: Inches.
_SIZE = (5.2, 5.0)
#: A pale tint of the palette's green, light in grey too.
_SHADE = "#CDEBE1"


def certificate(certificates: Certificates, *, title: str | None = None) -> Figure:
    """The loss, and below it the clipping norm and the safe one, shaded where decay was certified.

    Parameters
    ----------
    certificates : Certificates
        The certificates of one run, from :func:`ntkdp.certificates.certify`.
    title : str, optional
        Above both panels.

    Returns
    -------
    Figure
        The interval between two recorded times is shaded if both states are certified. A safe norm
        of zero (every R is safe) runs along the bottom, an infinite one (no R is safe) along the
        top; the legend says so.

    Raises
    ------
    TypeError
        If the argument is not a Certificates.
    ValueError
        If there are several seeds, or fewer than two recorded times.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> y, loss, rule = jnp.zeros(2), ntkdp.losses.SquaredError(), ntkdp.clipping.Abadi(1.0)
    >>> flow = ntkdp.KernelFlow(jnp.eye(2), y, loss, rule)
    >>> path = ntkdp.solve(flow, jnp.ones((2, 1)), [0.0, 1.0], outputs=True)
    >>> certified = ntkdp.certificates.certify(jnp.eye(2), path, y, loss, rule)
    >>> [ax.get_ylabel() for ax in ntkdp.plotting.certificate(certified).axes]
    ['training loss', 'clipping norm']
    """
    _check(certificates)
    times = np.asarray(certificates.times)
    certified = np.asarray(certificates.certified)
    with mpl.rc_context(figure_style.LOOK):
        figure = Figure(figsize=_SIZE, layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.3))
        above.set_yscale("log", nonpositive="mask")
        loss = figure_style.drawable(above, np.asarray(certificates.loss, np.float64))
        above.plot(times, loss, color="black", linewidth=1.6)
        figure_style.limit_log_loss(above, has_run=False)
        above.set_ylabel("training loss")
        handles = _norms(below, certificates, times)
        below.set_ylabel("clipping norm")
        below.set_xlabel(TIME)
        for ax in (above, below):
            ax.fill_between(
                times, 0, 1, where=certified, transform=ax.get_xaxis_transform(),
                color=_SHADE, linewidth=0, zorder=0,
            )  # fmt: skip
            ax.set_xlim(times[0], times[-1])
        share = f"decay certified ({np.sum(certified)} of {certified.size} times)"
        figure.legend(
            handles=[*handles, Patch(color=_SHADE, label=share)],
            loc="outside lower center", ncols=2,
        )  # fmt: skip
        if title is not None:
            figure.suptitle(title, fontsize=11)
    return figure


def _norms(ax: Axes, certificates: Certificates, times: np.ndarray) -> list[Artist]:
    """Draw the run's norm, the safe one and its bound, on a logarithmic axis that fits them."""
    ax.set_yscale("log")
    named = {
        "safe R": np.asarray(certificates.safe_clip_norm, np.float64),
        "its upper bound": np.asarray(certificates.safe_clip_norm_bound, np.float64),
    }
    used = float(certificates.clip_norm)
    everything = np.concatenate([*named.values(), [used]])
    usable = everything[np.isfinite(everything) & (everything > 0)]
    low, high = (usable.min() / 2, usable.max() * 2) if usable.size else (0.5, 2.0)
    ax.set_ylim(low, high)
    handles: list[Artist] = []
    if np.isfinite(used):
        run = {**figure_style.RUN_STYLE, "color": "0.45", "linewidth": 3.0}
        handles.append(ax.axhline(used, label=f"R = {used:g} of the run", **run))
    for style, (label, norms) in enumerate(named.items()):
        ends = (("bottom: 0", 0.0), ("top: infinite", np.inf))
        notes = [note for note, value in ends if value in norms]
        note = f" ({', '.join(notes)})" if notes else ""
        # Far enough inside the frame to be seen.
        shown = np.clip(norms, low * (high / low) ** 0.03, high / (high / low) ** 0.03)
        handles.append(figure_style.prediction_line(ax, times, shown, style, label + note))
    figure_style.readable_log_ticks(ax)
    return handles


def _check(certificates: object) -> None:
    if not isinstance(certificates, Certificates):
        raise TypeError(
            "certificates must be Certificates, as ntkdp.certificates.certify gives, "
            f"got {type(certificates).__name__}"
        )
    shape = np.shape(certificates.loss)
    if len(shape) != 1:
        raise ValueError(
            f"certificates must be of one run, got a loss of shape {shape}; pick a seed, e.g. "
            "certify a trajectory of one"
        )
    if shape[0] < 2:
        raise ValueError("certificates must hold at least two recorded times, got 1")
