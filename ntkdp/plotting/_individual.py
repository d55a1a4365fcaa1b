"""The picture of what privacy costs each sample."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from ntkdp import privacy
from ntkdp._backend import validate
from ntkdp._backend.subgroups import Labels, subgroups
from ntkdp._results import figure_style
from ntkdp.privacy import IndividualPrivacy

#: How high the histogram of a group is, in rows.
_HEIGHT = 0.82
#: Bars from zero to the largest epsilon.
_BARS = 40


def individual_epsilon(
    costs: IndividualPrivacy,
    delta: float,
    labels: Labels | None = None,
    *,
    names: Sequence[str] | None = None,
    bars: int = _BARS,
    ax: Axes | None = None,
) -> Axes:
    """Histograms of the samples' epsilon, a row for each class or other subgroup.

    Parameters
    ----------
    costs : IndividualPrivacy
        From :func:`ntkdp.privacy.individual`. Seeds are averaged for each sample.
    delta : float
        In (0, 1).
    labels : array, optional
        ``(n,)``, the subgroup of each sample; by default all are one.
    names : sequence of str, optional
        Names of the subgroups in the order of their sorted labels; by default the labels.
    bars : int
        Bars from zero to the largest epsilon.
    ax : Axes, optional
        As for :func:`ntkdp.plotting.loss_curves`.

    Returns
    -------
    Axes
        With a histogram and a dot at the mean for each subgroup, each as high as its fullest bar,
        and a line at the epsilon that the accountant promises for every sample.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind, shape or range.

    Examples
    --------
    >>> import ntkdp
    >>> costs = ntkdp.privacy.individual([[1.0, 0.2, 0.4]], noise_multiplier=1.0)
    >>> ax = ntkdp.plotting.individual_epsilon(costs, 1e-5, [0, 1, 1], names=["rare", "common"])
    >>> [tick.get_text() for tick in ax.get_yticklabels()]
    ['rare (1)', 'common (2)']
    """
    if not isinstance(costs, IndividualPrivacy):
        raise TypeError(
            "costs must be an IndividualPrivacy, from privacy.individual, got "
            f"{type(costs).__name__}"
        )
    bars = validate.count(bars=bars)
    n = costs.mu.shape[-1]
    groups = subgroups(np.zeros(n, int) if labels is None else labels, n)
    shown = ("all samples",) if labels is None and names is None else groups.names
    if names is not None:
        if len(names) != len(groups.labels):
            raise ValueError(
                f"names must have one for each of the {len(groups.labels)} subgroups, got "
                f"{len(names)}"
            )
        shown = tuple(names)
    epsilon = costs.epsilon(delta).reshape(-1, n).mean(axis=0)
    promised = privacy.epsilon(costs.noise_multiplier, costs.sample_rate, costs.steps, delta)
    edges = np.linspace(0.0, max(promised, epsilon.max()) * (1 + 1e-9), bars + 1)
    rows = np.arange(len(shown))[::-1]
    with mpl.rc_context(figure_style.LOOK):
        ax = figure_style.axes_or_new(ax)
        colour, _, _ = figure_style.STYLES[0]
        for group, row in enumerate(rows):
            own = epsilon[groups.places == group]
            heights, _ = np.histogram(own, edges)
            ax.stairs(
                row + _HEIGHT * heights / heights.max(), edges, baseline=row, fill=True,
                color=colour, alpha=0.55,
            )  # fmt: skip
            ax.plot(
                own.mean(), row, marker="o", color=colour, markeredgecolor="white", zorder=3,
                clip_on=False, linestyle="none", label="mean" if row == 0 else None,
            )  # fmt: skip
        promise_colour, dashes, _ = figure_style.STYLES[1]
        ax.axvline(
            promised, color=promise_colour, linestyle=dashes, label=f"promised, {promised:.3g}"
        )
        ax.set_yticks(
            rows, [f"{name} ({size})" for name, size in zip(shown, groups.counts, strict=True)]
        )
        ax.set_ylim(-0.15, len(rows))
        ax.set_xlim(0.0, None)
        ax.set_xlabel(rf"$\varepsilon_i$ at $\delta$ = {delta:g}")
        ax.tick_params(axis="y", length=0)
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return ax
