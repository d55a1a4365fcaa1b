"""A private run planned from a kernel: learning rate, clipping norm, steps, sampling and budget."""

import time
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np

from ntkdp._backend import validate
from ntkdp._backend.types import ApplyFn, Array, ArrayLike, KeyLike, Params
from ntkdp.advisor._budget_plan import BudgetPlan, PlannedCells, Recommendation
from ntkdp.advisor._grid import MOVING_FROM
from ntkdp.advisor._planning.cells import Accounts, Cell, WeightNoise, axes_of
from ntkdp.advisor._planning.ends import Problem, is_plain
from ntkdp.advisor._planning.features import features_of, may_move, rows_in_order, with_rows
from ntkdp.advisor._planning.more_data import with_twice_the_data
from ntkdp.advisor._planning.prediction import Setting, Told
from ntkdp.advisor._planning.search import Found, ranking, search
from ntkdp.clipping import ClippingRule, NoClipping
from ntkdp.comparison import HIGHER_IS_BETTER, measure, value_of
from ntkdp.losses import Loss, Reduction, SampleLoss
from ntkdp.models import Model
from ntkdp.noise import Noise
from ntkdp.noise import resolve as resolve_noise
from ntkdp.optimizers import OptimizerLike, as_linear
from ntkdp.stochastic_flow import (
    Data,
    ResponseFlow,
    flow_of,
    relative_weight_noise,
)

#: Variances of the noise on the weights, relative to the weights' own, at which kernels are taken.
_NODES = (0.0, 0.1, 0.35, 1.2, 5.0, 20.0, 100.0)
#: Outputs from which on one run of a cell will do in the search, where two are made of others.
_MANY_OUTPUTS = 10_000


def plan_budget(
    model: Model | ApplyFn,
    params: Params,
    data: Data,
    loss: Loss | SampleLoss,
    clipping: ClippingRule,
    *,
    epsilons: ArrayLike,
    delta: float,
    learning_rates: ArrayLike,
    clip_norms: ArrayLike,
    steps: Sequence[int],
    sample_rates: ArrayLike,
    max_compute: float | None = None,
    optimizer: OptimizerLike | None = None,
    noise: Noise | None = None,
    reduction: Reduction = "mean",
    objective: str | None = None,
    refinements: int = 2,
    n_runs: int = 8,
    more_data: bool = True,
    kernels: Literal["auto", "frozen"] = "auto",
    rank: int = 512,
    max_samples: int = 10_000,
    most_steps: int = 512,
    progress: Told | None = None,
    key: KeyLike,
) -> BudgetPlan:
    r"""Choose learning rate, clipping norm, steps and sampling rate for what may be spent.

    Every combination of the axes is a cell, whose noise spends the cell's epsilon on its steps at
    its sampling rate. All are predicted from one kernel. Then finer cells around the best of each
    budget are, and the best few once more, with runs of their own.

    Parameters
    ----------
    model : Model or callable
        One of :mod:`ntkdp.models`, whose kernel at infinite width predicts if it has one, or
        ``apply_fn(params, x) -> (n, K)``, whose own kernel at the start does.
    params : pytree
        The initial parameters.
    data : tuple or Dataset
        ``(x, targets)``, ``(x, targets, test_x, test_targets)``, or one of :mod:`ntkdp.datasets`.
        Choose on test data of their own: the best of many cells is flattered by them.
    loss : Loss or callable
        One of :mod:`ntkdp.losses`, or a function of one sample's outputs and target.
    clipping : ClippingRule
        A flat rule of :mod:`ntkdp.clipping` that bounds each sample; ``clip_norms`` replace its R.
    epsilons : float or array
        Budgets, one or several: the recommendation has a cell for each.
    delta : float
        Of every budget.
    learning_rates, clip_norms : array
        Values to try, best with constant ratios. Refinement may leave their range.
    steps : sequence of int
        Numbers of steps to try. Refinement stays in their range.
    sample_rates : float or array
        Poisson sampling rates q to try, 1 for full batches. Refinement stays in their range.
    max_compute : float, optional
        The most gradients of samples that a run may take, steps times q n.
    optimizer : optimizers.SGD or callable, optional
        A linear optimizer without weight decay; by default plain steps.
    noise : noise.Noise, optional
        Correlated noise, with full batches alone; by default independent.
    reduction : {"mean", "sum"}
        Loss and drift are averaged over samples, or summed.
    objective : str, optional
        The metric to be best in, as for :func:`advise`. By default ``test_accuracy``, without test
        data ``accuracy``, and for a regression the loss.
    refinements : int
        Rounds of finer cells, each half as far apart.
    n_runs : int
        Runs that the value and the uncertainty of a recommended cell come from.
    more_data : bool
        Predict what twice the data would give.
    kernels : {"auto", "frozen"}
        "auto": noise moves the kernels, if the model has kernels between times, steps are plain and
        noise is independent. "frozen": all cells have the kernel of the start.
    rank : int
        The most features of the kernel.
    max_samples : int
        The most training samples that predict. Noise and sampling stay those of all.
    most_steps : int
        The finest grid of merged steps. A cell that still changes there is predicted with them, and
        its ``change`` says by how much.
    progress : callable, optional
        Called with the fraction of the search that is done.
    key : PRNG key

    Returns
    -------
    BudgetPlan
        Print it for a sentence on each budget.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of its range, no cell can be afforded, or none converges; if the rule
        is layerwise or bounds no single sample; if the optimizer is not linear or decays weights.
    MemoryError
        If the kernel does not fit.

    Notes
    -----
    *Derived*. **Kernel.** :math:`H \approx \Phi\Phi^\top + \mathrm{diag}(d)` with features from
    landmarks (Nyström, Williams and Seeger 2001) and the diagonal of the whole kernel, so that
    norms are exact. Training under it is that of a linear model, so its runs are drawn exactly in
    law, at a cost of n r a step.

    **Fewer samples.** With m of n samples, drift and loss are means over m, while the noise of the
    mean gradient keeps its deviation :math:`\sigma S/(q n)`, and so v(T), and that of sampling its
    variance :math:`(1 - q)/(q n)`. What is lost is what the other samples would teach.

    **Merged steps.** k steps are one of learning rate :math:`k \eta` with the noise of their mean,
    which is right where a step moves outputs little. Cells of more than 96 plain steps are
    predicted on grids of 32, 64, ... steps along one Brownian path, until losses change by less
    than 2% and accuracies by less than a point, or the steps are the run's own. A step that is too
    long for a cell diverges, and so do the longer ones: a cell beyond the stable learning rate is
    never taken for one that converges.

    **Noise that moves the kernel.** A frozen kernel is some per cent off from a v(T) of 0.01 on,
    relative to the weights' own variance, and useless from about one on. The kernels
    :math:`\Theta(v, v')` between times, of :func:`ntkdp.two_time_kernel`, are taken to be diagonal
    in the modes of the first one: gradients of each mode are gathered, and act later, with its
    share at that time; noise moves a mode with its own size, and fades so that the variance of
    undriven outputs is right. Kernels are computed at seven values of v up to 100, and are linear
    in between. On 200 digits, this was within 2% of
    :func:`ntkdp.stochastic_flow.two_time_final_outputs` in the loss at a v of 0.2, and within 5% at
    2.3. ``PlannedCells.kernels`` says where a cell had them.

    **Twice the data.** The noise of 2 n samples is exact. What they teach is extrapolated from
    predictions on a quarter, half and all of the samples by a power law, at the best of 1, 1.5 and
    2 times the learning rate.

    .. warning::
       The prediction looks at the data, and nothing here is private: see :mod:`ntkdp.advisor`.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ntkdp
    >>> x = jax.random.normal(jax.random.key(0), (60, 5))
    >>> y = (x[:, :1] > 0).astype(float)
    >>> model = ntkdp.models.mlp([64], 1)
    >>> plan = ntkdp.advisor.plan_budget(
    ...     model, model.init(jax.random.key(1), x), (x[:40], y[:40], x[40:], y[40:]),
    ...     ntkdp.losses.Logistic(), ntkdp.clipping.Abadi(1.0), epsilons=3.0, delta=1e-3,
    ...     learning_rates=[1.0, 4.0], clip_norms=[0.1, 1.0], steps=[10, 20], sample_rates=1.0,
    ...     max_compute=400, refinements=0, more_data=False, key=jax.random.key(2))
    >>> len(plan.cells.epsilon), plan.recommended[0].steps
    (4, 10)
    """
    axes = axes_of(
        learning_rates=learning_rates,
        clip_norms=clip_norms,
        steps=steps,
        sample_rates=sample_rates,
        epsilons=epsilons,
    )
    _check_mechanism(clipping)
    validate.choice(("auto", "frozen"), kernels=kernels)
    linear = as_linear(optimizer)
    if linear.decays_weights:
        raise ValueError("optimizer must not decay weights, which a plan does not follow")
    flow = flow_of(model, params, data, loss, clipping, None, reduction)
    most_compute = (
        np.inf
        if max_compute is None
        else float(validate.scalar(max_compute=validate.positive(max_compute=max_compute)))
    )
    n = flow.n_samples
    cells = axes.cells(n, most_compute)
    if not cells:
        least = axes.steps[0] * axes.sample_rates[0] * n
        raise ValueError(
            f"max_compute must afford a cell, the cheapest of which takes {least:,.0f} gradients, "
            f"got {most_compute:,.0f}"
        )
    own_key = validate.key(key=key)
    of_search, of_last, of_rows = jax.random.split(own_key, 3)
    seed = int(jax.random.randint(of_rows, (), 0, 2**31 - 1))
    rows = rows_in_order(n, validate.count(max_samples=max_samples), seed)
    flow = with_rows(flow, rows)
    known_model = model if isinstance(model, Model) else None

    added = resolve_noise(noise)
    begun = time.perf_counter()
    accounts = Accounts(delta, added, n)
    weight_noise = WeightNoise(clipping, added, linear, flow.reduction)
    relative = _relative(flow, known_model)
    sigmas = accounts.of_cells(cells)
    after_accounts = time.perf_counter()
    moves = kernels == "auto" and is_plain(linear, added) and may_move(flow, known_model)
    largest = relative * float(weight_noise.of_cells(cells, sigmas, n).max()) if moves else 0.0
    nodes = _nodes_up_to(largest) / relative
    features = features_of(flow, known_model, nodes, validate.count(rank=rank), seed)
    start = flow.outputs(flow.params, flow.points)
    initial = _initial(flow, start)
    setting = Setting(
        Problem(features, start, flow.targets, flow.loss, clipping, linear, added),
        flow.test_targets,
        flow.reduction,
        float(initial["loss"] or 0.0),
        n,
        accounts,
        _objective(objective, initial),
        validate.count(most_steps=most_steps),
    )
    jax.block_until_ready(features)
    after_kernel = time.perf_counter()
    last_keys = jax.random.split(of_last, validate.count(n_runs=n_runs))
    found = search(
        setting,
        axes,
        most_compute,
        validate.count(0, refinements=refinements),
        jax.random.split(of_search, 1 if len(start) * start.shape[1] > _MANY_OUTPUTS else 2),
        last_keys,
        (lambda done: None) if progress is None else progress,
    )
    noise_of_weights = relative * weight_noise.of_cells(
        found.cells, accounts.of_cells(found.cells), n
    )
    used = np.where((noise_of_weights >= MOVING_FROM) & (len(nodes) > 1), "between times", "frozen")
    return BudgetPlan(
        objective=setting.objective,
        delta=delta,
        n_samples=n,
        rows=len(rows),
        rank=features.values.shape[1],
        share_left=features.share_left,
        cells=_planned(setting, found, noise_of_weights, used),
        n_grid=found.n_grid,
        initial=initial,
        recommended=_recommended(setting, found, noise_of_weights, used, last_keys, more_data),
        seconds={
            "accountant": after_accounts - begun,
            "kernel": after_kernel - after_accounts,
            "search": time.perf_counter() - after_kernel,
        },
    )


def _check_mechanism(clipping: ClippingRule) -> None:
    if not isinstance(clipping, ClippingRule) or isinstance(clipping, NoClipping):
        raise TypeError(
            "clipping must be a rule with a clipping norm, e.g. ntkdp.clipping.Abadi(1.0), got "
            f"{clipping!r}"
        )
    if clipping.scope != "flat":
        raise ValueError(
            f"clipping must be flat, since norms of groups are not followed, got {clipping!r}; "
            "advisor.predict takes layerwise rules"
        )
    if not clipping.bounds_each_sample:
        raise ValueError(
            f"clipping must bound each sample, or no noise is enough, got {clipping!r}; take Abadi"
        )


def _objective(objective: str | None, initial: dict[str, float | bool | None]) -> str:
    names = [name for name in HIGHER_IS_BETTER if initial[name] is not None]
    if objective is None:
        wanted = ("test_accuracy", "accuracy", "test_loss", "loss")
        has_test = "test_loss" in names
        usable = [name for name in wanted if name.startswith("test_") == has_test]
        return next(name for name in usable if name in names)
    return validate.choice(names, objective=objective)


def _initial(flow: ResponseFlow, start: Array) -> dict[str, float | bool | None]:
    """Metrics before training."""
    n = flow.n_samples
    test = None
    if flow.test_targets is not None:
        test = (start[None, None, n:], flow.test_targets)
    train = (start[None, None, :n], flow.targets)
    return measure(flow.loss, flow.reduction, float("inf"), train, test).cell(0)


def _relative(flow: ResponseFlow, model: Model | None) -> float:
    """Noise of variance one relative to the weights' own variance, or to one if they have none."""
    try:
        return float(relative_weight_noise(1.0, model, flow.params, flow.points))
    except ValueError:
        return 1.0


def _nodes_up_to(largest: float) -> np.ndarray:
    """Variances of the noise on the weights at which kernels are computed."""
    if largest < MOVING_FROM:
        return np.zeros(1)
    count = int(np.searchsorted(_NODES, largest)) + 1
    return np.array(_NODES[:count])


def _planned(
    setting: Setting, found: Found, weight_noise: np.ndarray, kernels: np.ndarray
) -> PlannedCells:
    columns = {
        name: np.array([getattr(cell, name) for cell in found.cells]) for name in Cell._fields
    }
    ends = found.ends
    return PlannedCells(
        **columns,
        noise_multiplier=setting.accounts.of_cells(found.cells),
        compute=np.array([cell.compute(setting.n_samples) for cell in found.cells]),
        metrics=ends.metrics,
        spread=ends.spread,
        weight_noise=weight_noise,
        kernels=kernels,
        steps_made=ends.steps_made,
        change=ends.change,
    )


def _recommended(
    setting: Setting,
    found: Found,
    weight_noise: np.ndarray,
    kernels: np.ndarray,
    keys: Array,
    more_data: bool,
) -> tuple[Recommendation, ...]:
    numbers = [number for few in found.finalists.values() for number in few]
    cells = [found.cells[number] for number in numbers]
    chosen = []
    for epsilon in sorted(found.finalists):
        # The search alone decides if its best few diverge in the runs of the last round.
        ranked = ranking(setting, cells, found.last.metrics, epsilon)
        place = ranked[0] if ranked else numbers.index(found.finalists[epsilon][0])
        cell = cells[place]
        value = float(value_of(found.last.metrics, setting.objective)[place])
        twice = None
        if more_data:
            twice = with_twice_the_data(setting, cell, keys).value
        chosen.append(
            Recommendation(
                objective=setting.objective,
                **cell._asdict(),
                index=numbers[place],
                noise_multiplier=setting.accounts.noise_multiplier(cell),
                compute=cell.compute(setting.n_samples),
                value=value,
                uncertainty=float(
                    np.hypot(found.last.spread[place], found.last.sampling_error[place])
                ),
                predicted=found.last.metrics.cell(place),
                weight_noise=float(weight_noise[numbers[place]]),
                kernels=str(kernels[numbers[place]]),
                with_twice_the_data=twice,
            )
        )
    return tuple(chosen)
