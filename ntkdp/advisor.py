r"""Choosing learning rate and clipping norm from a prediction, before a budget is spent on runs.

:func:`gradient_norms` says where clipping sets in, :func:`largest_stable_learning_rate` how far
the learning rate may go, :func:`predict` what every cell of a grid of learning rates and clipping
norms ends with, and :func:`advise` picks one. What runs of the same cells do is held against it by
:func:`ntkdp.comparison.agreement` and :func:`regret`.

.. warning::
   To look at private data in order to choose costs privacy, and nothing here adds noise for it.
   The prediction looks too: the kernel, the outputs at the start, the targets and the gradient
   norms are functions of the data, at initialisation already, and so are the advice and the
   rates that are found stable. Either

   - predict from public data that are like the private ones, and train on the private ones at the
     cell chosen; the advice is then a constant, and free; or
   - choose among private runs by private selection: a random number of runs, of which only the
     best is shown, costs a few times the epsilon of one (Liu and Talwar 2019, 1811.07971), and
     less by Rényi DP (Papernot and Steinke 2022, 2110.03620); or
   - compose: k runs that are all looked at cost k runs. Count them.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, final

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from ntkdp import losses
from ntkdp._agreement import (
    candidates,
    check_cells,
    known,
    levels,
    prefix_of,
    value_of,
)
from ntkdp._agreement import regret as regret
from ntkdp._backend import validate
from ntkdp._backend.types import ApplyFn, Array, Params, Real
from ntkdp._cell_metrics import HIGHER_IS_BETTER
from ntkdp._cell_metrics import CellMetrics as CellMetrics
from ntkdp._gradients import groups as _groups
from ntkdp._gradients.check_model import check_inputs
from ntkdp._grid import Grid as Grid
from ntkdp._grid import check_flow
from ntkdp._grid import predict as predict
from ntkdp.clipping import Abadi, NoClipping
from ntkdp.ntk import per_sample_gradient_norms

__all__ = [
    "Advice",
    "CellMetrics",
    "GradientNorms",
    "Grid",
    "advise",
    "gradient_norms",
    "largest_stable_learning_rate",
    "pareto_front",
    "predict",
    "regret",
]

#: Rates tried at once, in each round of the search for the largest stable one.
_TRIED = 33


class GradientNorms(NamedTuple):
    """Quantiles of per-sample gradient norms: see :func:`gradient_norms`.

    ``quantiles`` ``(Q,)``, ``norms`` ``(Q,)`` or, by group, ``(R, Q)``, and ``groups``, the names
    of the R groups or None.
    """

    quantiles: np.ndarray
    norms: Array
    groups: tuple[str, ...] | None


@final
@dataclass(frozen=True, eq=False)
class Advice:
    """A cell of a :class:`Grid`: see :func:`advise`.

    ``index`` is the cell's, ``predicted`` its metrics by name. ``curve``: the cells of
    :func:`pareto_front` and their accuracies and calibration errors, or None.
    """

    learning_rate: float
    clip_norm: float
    index: int
    predicted: dict[str, Any]
    curve: tuple[np.ndarray, np.ndarray] | None


def gradient_norms(
    apply_fn: ApplyFn,
    params: Params,
    x: Real[Array, "n ..."],
    targets: Any,
    loss: Any,
    *,
    groups: Any = None,
    quantiles: Any = (0.05, 0.25, 0.5, 0.75, 0.95),
) -> GradientNorms:
    r"""Quantiles over samples of the gradient norms :math:`\|g_i\|` at given parameters.

    Below the smallest norm, a clipping norm R clips every sample, and with the rule of Abadi et al.
    only the product of learning rate and R matters (claim C11); above the largest it clips none.

    Parameters
    ----------
    apply_fn, params, x
        As for :func:`ntkdp.per_sample_gradient_norms`.
    targets : array
        As the loss wants them.
    loss : Loss or callable
        As for :class:`ntkdp.KernelFlow`; each sample's own, so norms are never divided by n.
    groups : pytree prefix of labels, or callable from key path to label, optional
        With it, norms by group, for layerwise clipping.
    quantiles : array
        ``(Q,)``, in [0, 1].

    Returns
    -------
    GradientNorms

    Raises
    ------
    TypeError, ValueError
        Quantiles out of range, targets that do not fit, and what
        :func:`ntkdp.per_sample_gradient_norms` raises.

    Notes
    -----
    Between samples, quantiles are interpolated linearly. Norms are those of the private data if x
    is: see the warning of this module.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> x, w = jnp.array([[3.0, 4.0], [6.0, 8.0]]), jnp.zeros((2, 1))
    >>> found = ntkdp.advisor.gradient_norms(
    ...     lambda w, x: x @ w, w, x, jnp.ones(2), ntkdp.losses.SquaredError(), quantiles=[0, 0.5])
    >>> found.norms.tolist()
    [5.0, 7.5]
    """
    shares = np.asarray(validate.non_negative(quantiles=quantiles), np.float64)
    if shares.ndim != 1 or not shares.size or np.any(shares > 1):
        raise ValueError(f"quantiles must be an array (Q,) of numbers in [0, 1], got {quantiles!r}")
    loss = losses.as_loss(loss)
    x = check_inputs(apply_fn, params, x)
    outputs = apply_fn(params, x)
    targets = loss.check(targets, *outputs.shape)
    gradient = loss.output_gradient(outputs, targets)
    norms = per_sample_gradient_norms(apply_fn, params, x, gradient, groups=groups)
    found = jnp.moveaxis(jnp.quantile(norms, jnp.asarray(shares, norms.dtype), axis=-1), 0, -1)
    names = None if groups is None else _groups.resolve(params, groups).names
    return GradientNorms(shares, found, names)


def largest_stable_learning_rate(
    flow: Any,
    initial: Any,
    *,
    steps: int,
    clip_norm: float | None = None,
    noise_multiplier: Any = 0.0,
    sample_rate: float = 1.0,
    noise_kernel: Any = None,
    noise_per_group: bool = False,
    low: float = 1e-4,
    high: float = 1e6,
    tolerance: float = 1e-2,
    key: Any = None,
) -> float:
    r"""The learning rate up to which training ends no higher than it starts.

    A rate is stable if the final training loss is finite and at most the initial one, for every
    key. Rates on a logarithmic grid are tried from ``low`` to ``high``, then between the first that
    is not stable and the one before, again and again; so all tried rates below the result are
    stable, and stable rates above an unstable one are not seen.

    Parameters
    ----------
    flow, initial, steps, sample_rate, noise_kernel, noise_per_group, key
        As for :func:`ntkdp.stochastic_flow.final_outputs`; the flow may be one without clipping.
    clip_norm : float, optional
        By default the flow's own.
    noise_multiplier : float or Budget
        As for :func:`ntkdp.stochastic_flow.ensemble`.
    low, high : float
        Where to seek.
    tolerance : float
        Relative distance of the result, which is stable, to the next rate tried, which is not.

    Returns
    -------
    float
        Infinite if every rate tried up to ``high`` is stable: with clipping, or with a loss that
        grows linearly, there may be no end.

    Raises
    ------
    TypeError, ValueError
        ``low`` not stable (with noise no rate may be), an order of ``low`` and ``high``, and what
        :func:`ntkdp.stochastic_flow.final_outputs` raises.

    Notes
    -----
    *Derived.* For the squared loss without clipping, outputs in the kernel's range and steps to
    infinity, :math:`2n / \lambda_{max}(H)` with the mean loss, :math:`2/\lambda_{max}(H)` with the
    sum; for few steps the result is larger, since what grows has to outweigh what has decayed.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> flow = ntkdp.KernelFlow(4.0 * jnp.eye(1), jnp.zeros((1, 1)), ntkdp.losses.SquaredError(),
    ...                         ntkdp.clipping.NoClipping(), reduction="sum")
    >>> rate = ntkdp.advisor.largest_stable_learning_rate(flow, jnp.ones((1, 1)), steps=10)
    >>> 0.99 < rate / (2 / 4.0) <= 1
    True
    """
    check_flow(flow)
    low, high, tolerance = (
        float(validate.scalar(**{name: validate.positive(**{name: value})}))
        for name, value in (("low", low), ("high", high), ("tolerance", tolerance))
    )
    if low >= high:
        raise ValueError(f"low must be below high, got low={low:g} and high={high:g}")
    if clip_norm is None and np.ndim(flow.clipping.R):
        raise ValueError(
            "clip_norm must be given where the flow has one a group, since here all groups share "
            "one, got None"
        )
    if isinstance(flow.clipping, NoClipping):
        if clip_norm is not None:
            raise ValueError(
                f"clip_norm must be None with a flow that does not clip, got {clip_norm!r}"
            )
        clip_norm = float(jnp.finfo(flow.drive.dtype).max)
        flow = eqx.tree_at(
            lambda flow: flow.clipping, flow, Abadi(clip_norm, scope=flow.clipping.scope)
        )
    elif clip_norm is None:
        clip_norm = float(flow.clipping.R)
    options = {
        "steps": steps,
        "noise_multiplier": noise_multiplier,
        "sample_rate": sample_rate,
        "noise_kernel": noise_kernel,
        "noise_per_group": noise_per_group,
        "key": key,
    }
    # Small tolerances cannot be met below the rounding of the rates themselves.
    tolerance = max(tolerance, 4 * float(jnp.finfo(flow.drive.dtype).eps))
    stable, unstable = low, high
    first_round = True
    while first_round or unstable / stable > 1 + tolerance:
        rates = np.geomspace(stable, unstable, _TRIED)
        grid = predict(flow, initial, learning_rates=rates, clip_norms=[clip_norm], **options)
        failed = np.flatnonzero(grid.metrics.diverged)
        if first_round and not failed.size:
            return float("inf")
        if first_round and failed[0] == 0:
            raise ValueError(
                f"low must be a stable learning rate, got {low:g}: the loss starts at "
                f"{grid.initial_loss:g} and ends at {grid.metrics.loss[0]:g}; take a smaller one, "
                "or less noise"
            )
        # The ends of the bracket are known; a second look could differ by rounding.
        at = int(np.clip(failed[0] if failed.size else _TRIED - 1, 1, _TRIED - 1))
        stable, unstable = float(rates[at - 1]), float(rates[at])
        first_round = False
    return stable


def advise(grid: Grid, *, objective: str = "test_accuracy", slack: float = 0.02) -> Advice:
    r"""The cell of a predicted grid to train at.

    The cell with the best predicted objective among those that do not diverge. For a calibration
    error only the cells whose predicted accuracy is within ``slack`` of the best are asked: a
    network that has hardly been trained is calibrated, and useless.

    Parameters
    ----------
    grid : Grid
        From :func:`predict`.
    objective : str
        A metric of the grid: ``loss``, ``accuracy``, ``ece``, ``mce`` or one of their ``test_``
        twins; for a regression the two losses alone.
    slack : float
        A difference of accuracies, as shares of the samples.

    Returns
    -------
    Advice

    Raises
    ------
    TypeError, ValueError
        An unknown objective or one that the grid does not have, a grid of diverged cells alone.

    Notes
    -----
    *Derived.* Of cells that are equal to 1 part in :math:`10^5` the one with the smaller learning
    rate is taken, then that with the smaller clipping norm. Cells with the same product
    :math:`\eta R` have the same noise, and with the rule of Abadi et al. a sample's step,
    :math:`\eta \min(1, R/s) = \min(\eta, \eta R/s)`, is never longer for the smaller
    :math:`\eta`; at the same :math:`\eta` the smaller R has less noise.

    Examples
    --------
    >>> import numpy as np, ntkdp
    >>> loss = np.array([0.5, 0.25, 0.25, 4.0])
    >>> metrics = ntkdp.advisor.CellMetrics(loss, *[None] * 7, diverged=loss > 1)
    >>> grid = ntkdp.advisor.Grid(np.array([0.1, 1.0]), np.array([0.5, 5.0]), metrics, 1.0, 0.0)
    >>> advice = ntkdp.advisor.advise(grid, objective="loss")
    >>> advice.learning_rate, advice.clip_norm, advice.index, advice.predicted["loss"]
    (0.1, 5.0, 1, 0.25)
    """
    if not isinstance(grid, Grid):
        raise TypeError(f"grid must be a Grid, as predict gives, got {type(grid).__name__}")
    size = check_cells(grid=grid.metrics)
    rates, norms = grid.cells()
    if rates.size != size:
        raise ValueError(
            f"grid must have one cell for each of {rates.size} pairs of learning rate and clipping "
            f"norm, got {size}"
        )
    allowed = np.flatnonzero(candidates(grid.metrics, objective, slack, "grid"))
    if not allowed.size:
        raise ValueError(
            f"grid must have a cell that converges, but none of {size} has a finite {objective} "
            "and a loss at the end no higher than at the start; try smaller learning rates"
        )
    sign = -1 if HIGHER_IS_BETTER[objective] else 1
    ranks = levels(sign * value_of(grid.metrics, objective)[allowed])
    best = int(allowed[np.lexsort((norms[allowed], rates[allowed], ranks))[0]])
    curve = None
    if prefix_of(objective) + "ece" in known(grid.metrics):
        curve = pareto_front(grid.metrics, test=prefix_of(objective) == "test_")
    return Advice(float(rates[best]), float(norms[best]), best, grid.metrics.cell(best), curve)


def pareto_front(metrics: CellMetrics, *, test: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Cells that no other beats in both accuracy and expected calibration error.

    Parameters
    ----------
    metrics : CellMetrics
        Of a classification.
    test : bool
        On the test set.

    Returns
    -------
    indices, values : array
        ``(F,)`` and ``(F, 2)``, accuracy and ECE, of cells that do not diverge, both increasing
        along the front; of cells with the same two values the first. F may be 0.

    Raises
    ------
    TypeError, ValueError
        Metrics without accuracy or ECE.

    Examples
    --------
    >>> import numpy as np, ntkdp
    >>> accuracy, ece = np.array([0.5, 0.9, 0.8, 0.95]), np.array([0.01, 0.05, 0.07, 0.2])
    >>> metrics = ntkdp.advisor.CellMetrics(accuracy, accuracy, ece, *[None] * 5,
    ...                                     diverged=np.zeros(4, bool))
    >>> ntkdp.advisor.pareto_front(metrics, test=False)[0].tolist()
    [0, 1, 3]
    """
    check_cells(metrics=metrics)
    names = [f"{'test_' if test else ''}{name}" for name in ("accuracy", "ece")]
    missing = [name for name in names if name not in known(metrics)]
    if missing:
        raise ValueError(f"metrics must have {' and '.join(names)}, got no {missing[0]}")
    accuracy, ece = (value_of(metrics, name) for name in names)
    usable = np.flatnonzero(~metrics.diverged & np.isfinite(accuracy) & np.isfinite(ece))
    # From the most accurate down, a cell is on the front if it is better calibrated than all above.
    ordered = usable[np.lexsort((usable, ece[usable], -accuracy[usable]))]
    least = np.minimum.accumulate(np.concatenate([[np.inf], ece[ordered]]))
    indices = ordered[ece[ordered] < least[:-1]][::-1]
    return indices, np.stack([accuracy[indices], ece[indices]], axis=1)
