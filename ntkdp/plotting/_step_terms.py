"""The picture of what limits training, step by step."""

from typing import Protocol, runtime_checkable

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ntkdp._backend import validate
from ntkdp._backend.types import Array, ArrayLike
from ntkdp._results import figure_style

_SIZE = (5.6, 5.2)
#: What stands against descent, each in the style of its place.
_AGAINST = ("curvature", "sampling", "privacy")


@runtime_checkable
class Terms(Protocol):
    """Parts of steps along a run ``(T,)``, as ``advisor.decompose(...).train.total()`` has them."""

    @property
    def descent(self) -> Array: ...
    @property
    def curvature(self) -> Array: ...
    @property
    def sampling(self) -> Array: ...
    @property
    def privacy(self) -> Array: ...
    def best_learning_rate(self) -> Array: ...


def step_terms(
    terms: Terms,
    times: ArrayLike,
    *,
    learning_rate: float,
    xlabel: str = "time (learning rate x steps)",
    axes: tuple[Axes, Axes] | None = None,
) -> tuple[Axes, Axes]:
    r"""What limits training when: descent against curvature, sampling and privacy along a run.

    Above, a wide grey line is what a step gains by descent, :math:`\eta\,\text{descent}`. The
    others are what it loses to curvature, to the noise of sampling and to that of privacy,
    :math:`\eta^2/2` times each, and to all of them. Where this sum meets the grey line, training
    stands still. Below, the best learning rate of a step, by the same parts, with the one used.

    Parameters
    ----------
    terms : advisor.StepTerms
        Parts along a run, each ``(T,)``: ``advisor.decompose(flow, outputs, ...).train.total()``,
        or ``.test.total()``, with outputs of all recorded states.
    times : array
        ``(T,)``, increasing.
    learning_rate : float
        :math:`\eta`, positive.
    xlabel : str
        What ``times`` are.
    axes : pair of Axes, optional
        By default those of a new figure.

    Returns
    -------
    tuple of Axes
        Upper and lower, both logarithmic. Parts that are zero all along are left out.

    Raises
    ------
    TypeError, ValueError
        If shapes do not fit, or a number is out of its range.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> flow = ntkdp.KernelFlow(2.0 * jnp.eye(2), jnp.zeros((2, 1)), ntkdp.losses.SquaredError(),
    ...                         ntkdp.clipping.Abadi(10.0))
    >>> path = ntkdp.recursion(flow, jnp.array([[3.0], [1.0]]), learning_rate=0.2, steps=5,
    ...                        outputs=True)
    >>> parts = ntkdp.advisor.decompose(flow, path.outputs, noise_multiplier=0.1)
    >>> upper, lower = ntkdp.plotting.step_terms(parts.train.total(), path.times, learning_rate=0.2)
    >>> [text.get_text() for text in upper.get_legend().get_texts()]
    ['descent', 'curvature', 'privacy', 'all against it']
    """
    rate = float(validate.positive_number(learning_rate=learning_rate))
    t = np.asarray(validate.increasing(times=times), np.float64)
    parts = {name: np.asarray(getattr(terms, name), np.float64) for name in ("descent", *_AGAINST)}
    for name, part in parts.items():
        if part.shape != t.shape:
            raise ValueError(
                f"terms must have shape {t.shape} as times, got {name} of shape {part.shape}; "
                "gather samples by .total() and take one run"
            )
    best = np.asarray(terms.best_learning_rate(), np.float64)
    gain = rate * parts["descent"]
    losses = {name: rate**2 / 2 * parts[name] for name in _AGAINST if np.any(parts[name] > 0)}
    with mpl.rc_context(figure_style.LOOK):
        if axes is None:
            figure = Figure(figsize=_SIZE, layout="constrained")
            axes = tuple(figure.subplots(2, 1, sharex=True, height_ratios=(2, 1)))
        upper, lower = axes
        _draw_parts(upper, t, gain, losses)
        lower.set_yscale("log", nonpositive="mask")
        lower.plot(t, figure_style.drawable(lower, best), color="0.2", label="best for a step")
        used, dashes, _ = figure_style.STYLES[1]
        lower.axhline(rate, color=used, linestyle=dashes, label=f"used, {rate:g}")
        figure_style.readable_log_ticks(lower)
        lower.set_ylabel("learning rate")
        lower.set_xlabel(xlabel)
        lower.legend(loc="best")
    return upper, lower


def _draw_parts(ax: Axes, t: np.ndarray, gain: np.ndarray, losses: dict[str, np.ndarray]) -> None:
    ax.set_yscale("log", nonpositive="mask")
    ax.plot(t, figure_style.drawable(ax, gain), label="descent", **figure_style.RUN_STYLE)
    for name, part in losses.items():
        figure_style.prediction_line(ax, t, part, _AGAINST.index(name), name)
    if len(losses) > 1:
        whole = np.sum(list(losses.values()), axis=0)
        shown = figure_style.drawable(ax, whole)
        ax.plot(t, shown, color="0.2", linewidth=1.0, label="all against it")
    figure_style.readable_log_ticks(ax)
    ax.set_ylabel("change of the loss in a step")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
