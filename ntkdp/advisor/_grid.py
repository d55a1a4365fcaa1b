"""Predicted ends of training over a grid of learning rates and clipping norms."""

from typing import Literal, NamedTuple, TypeAlias, TypedDict, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ntkdp import losses, privacy
from ntkdp._backend import memory, validate
from ntkdp._backend.progress import part_of
from ntkdp._backend.subgroups import Labels
from ntkdp._backend.types import Array, ArrayLike, Float, Progress, ScalarLike
from ntkdp.batches import Batches
from ntkdp.batches import resolve as resolve_batches
from ntkdp.comparison import CellMetrics, GroupMetrics, by_group, measure
from ntkdp.gradient_flow import KernelFlow, KernelLike, check_kernel_flow
from ntkdp.noise import Noise
from ntkdp.noise import resolve as resolve_noise
from ntkdp.stochastic_flow import (
    FinalOutputs,
    TwoTimeFlow,
    bytes_of_noise,
    final_outputs,
    relative_weight_noise,
    two_time_final_outputs,
    weight_noise_variance,
)

#: Copies of a cell's outputs that a step and the metrics hold, for each term of the kernel.
_COPIES = 8
#: Part of the free memory that the cells predicted at once may take.
_SHARE = 0.25

#: v(T), relative to the weights' own variance, from which noise moves a kernel too far by default.
MOVING_FROM = 0.01

#: Which kernels predict a cell.
KernelChoice: TypeAlias = Literal["auto", "frozen", "between times"]
#: Outputs at the start, or those of the training and of the test set.
Initial: TypeAlias = ArrayLike | tuple[ArrayLike, ArrayLike]


class Grid(NamedTuple):
    """Predicted ends of training over learning rates x clipping norms; a pytree.

    ``learning_rates`` ``(L,)`` and ``clip_norms`` ``(R,)``; ``metrics`` of the ``L R`` cells, all
    norms of the first learning rate first. All cells have the same ``initial_loss`` and the same
    ``noise_multiplier``, so they cost the same privacy, whatever their learning rate and norm are.
    ``kernels`` ``(L R,)`` says which kernels predicted a cell, "frozen" or "between times", and
    ``weight_noise`` ``(L R,)`` its v(T), relative to the weights' own variance; both are None
    unless kernels between times were given. ``by_group`` and ``test_by_group`` have losses and
    accuracies of subgroups ``(L R, G)``, averaged over keys, if labels were given.

    Made by :func:`predict`, with an example.
    """

    learning_rates: np.ndarray
    clip_norms: np.ndarray
    metrics: CellMetrics
    initial_loss: float
    noise_multiplier: float
    kernels: np.ndarray | None = None
    weight_noise: np.ndarray | None = None
    by_group: GroupMetrics | None = None
    test_by_group: GroupMetrics | None = None

    def cells(self) -> tuple[np.ndarray, np.ndarray]:
        """Learning rate and clipping norm of each cell, each ``(L R,)``."""
        rates, norms = np.meshgrid(self.learning_rates, self.clip_norms, indexing="ij")
        return rates.ravel(), norms.ravel()


def predict(
    flow: KernelFlow,
    initial: Initial,
    *,
    learning_rates: ArrayLike,
    clip_norms: ArrayLike,
    steps: int,
    noise_multiplier: ScalarLike | privacy.Budget = 0.0,
    sample_rate: float = 1.0,
    batches: Batches | None = None,
    noise: Noise | None = None,
    noise_kernel: KernelLike | None = None,
    noise_per_group: bool = False,
    between_times: TwoTimeFlow | None = None,
    kernels: KernelChoice = "auto",
    moving_from: float = MOVING_FROM,
    subgroups: Labels | None = None,
    test_subgroups: Labels | None = None,
    progress: Progress = False,
    key: Array | None = None,
) -> Grid:
    r"""What training ends with, predicted for every learning rate with every clipping norm.

    Parameters
    ----------
    flow, initial, steps, sample_rate, batches, noise, noise_kernel, noise_per_group, progress
        As for :func:`ntkdp.stochastic_flow.final_outputs`. Test metrics need a test kernel and test
        targets.
    learning_rates, clip_norms : array
        ``(L,)`` and ``(R,)``, positive.
    noise_multiplier : float or Budget
        :math:`\sigma` of all cells, or a :class:`ntkdp.privacy.Budget` that sets it.
    between_times : TwoTimeFlow, optional
        The same problem at infinite width, for the cells in which noise moves the kernel.
    kernels : {"auto", "frozen", "between times"}
        "frozen": the kernel of ``flow`` predicts all cells. "between times": kernels between times
        predict all. "auto": those predict the cells with v(T) of ``moving_from`` or more, if
        ``between_times`` is given, and the kernel of ``flow`` the others.
    moving_from : float
        The v(T), relative to the weights' own variance, from which noise moves the kernel too far.
    subgroups, test_subgroups : array, optional
        ``(n,)`` and ``(m,)``, labels of subgroups of the training and the test samples, to measure
        each of them too.
    key : PRNG key
        One, or an array of S keys, over which metrics are averaged; needed with noise or sampling.

    Returns
    -------
    Grid
        With the metrics of ``L R`` cells, whose noise differs in size alone.

    Raises
    ------
    TypeError, ValueError
        If an array is not of one dimension, if ``between_times`` is of another problem or is
        missing, and where :func:`ntkdp.stochastic_flow.final_outputs` raises them.
    MemoryError
        If not even one cell fits. Otherwise, as many are computed at once as fit into a quarter of
        the free memory.

    Notes
    -----
    A cell diverged if its final training loss, for any key, is not finite or above the initial one
    by more than rounding.

    Noise of relative variance v moves a kernel by v, in first order. Frozen, it was wrong by 3.4 v
    in the mean loss of ReLU networks and 1.7 v for erf (v = 0.09, 80 steps, squared loss), so at
    the default of 0.01 by a few per cent, which finite width is as well. Kernels between times
    follow it at any v, see :func:`ntkdp.stochastic_flow.two_time_final_outputs`.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> flow = ntkdp.KernelFlow(4.0 * jnp.eye(1), jnp.zeros((1, 1)), ntkdp.losses.SquaredError(),
    ...                         ntkdp.clipping.Abadi(1.0), reduction="sum")
    >>> grid = ntkdp.advisor.predict(flow, jnp.array([[5.0]]), learning_rates=[0.1, 1.0],
    ...                              clip_norms=[1.0, 1e3], steps=3)
    >>> [round(loss, 4) for loss in grid.metrics.loss.tolist()], grid.metrics.diverged.tolist()
    ([9.68, 0.5832, 0.5, 9112.5], [False, False, False, True])
    """
    flow = check_kernel_flow(flow)
    rates = _axis(learning_rates=learning_rates)
    norms = _axis(clip_norms=clip_norms)
    steps = validate.count(steps=steps)
    drawn, added = resolve_batches(batches, sample_rate), resolve_noise(noise)
    sigma = privacy.as_noise_multiplier(
        noise_multiplier, steps, batches=drawn, noise=added, n_samples=flow.targets.shape[0]
    )
    sigma = float(validate.scalar(noise_multiplier=validate.non_negative(noise_multiplier=sigma)))
    train, test = flow.init(initial)
    initial_loss = float(losses.mean_or_sum(flow.loss, train, flow.targets, flow.reduction)[0])
    keys = None if key is None else jnp.atleast_1d(validate.keys(key=key))
    by_rate, by_norm = (part.ravel() for part in np.meshgrid(rates, norms, indexing="ij"))
    variance = None
    if between_times is not None:
        _check_same_problem(flow, between_times)
        of_one = _noise_of_one(between_times, steps, sigma, drawn, added, noise_per_group)
        variance = (by_rate * by_norm) ** 2 * of_one
    moving = _moving(variance, by_rate.size, kernels, moving_from)
    frozen = np.flatnonzero(~moving)
    at_once = _cells_at_once(flow, train, test, 1 if keys is None else keys.size, sigma > 0)
    parts = np.array_split(frozen, -(-frozen.size // at_once)) if frozen.size else []
    if moving.any():
        parts.append(np.flatnonzero(moving))
        if keys is None and (sigma > 0 or drawn.is_random):
            raise ValueError("key must be given with noise or sampling, got None")
    measured, of_groups = [], []
    for number, part in enumerate(parts):
        options: _Options = {
            "learning_rates": by_rate[part],
            "clip_norms": by_norm[part],
            "steps": steps,
            "noise_multipliers": sigma,
            "batches": drawn,
            "noise": added,
            "noise_per_group": noise_per_group,
            "progress": part_of(progress, number, len(parts)),
        }
        if between_times is not None and moving[part[0]]:
            final = two_time_final_outputs(
                between_times, initial, key=jax.random.key(0) if keys is None else keys, **options
            )
        else:
            final = final_outputs(flow, initial, noise_kernel=noise_kernel, key=keys, **options)
        measured.append(_measured(flow, final, initial_loss, keys is None))
        of_groups.append(_by_group(flow, final, subgroups, test_subgroups))
    order = np.argsort(np.concatenate(parts))
    metrics = jax.tree.map(lambda *pieces: np.concatenate(pieces)[order], *measured)
    on_train, on_test = (_in_order(pieces, order) for pieces in zip(*of_groups, strict=True))
    used = None if variance is None else np.where(moving, "between times", "frozen")
    return Grid(rates, norms, metrics, initial_loss, sigma, used, variance, on_train, on_test)


class _Options(TypedDict):
    """What both kinds of final outputs take."""

    learning_rates: np.ndarray
    clip_norms: np.ndarray
    steps: int
    noise_multipliers: float
    batches: Batches
    noise: Noise
    noise_per_group: bool
    progress: Progress


def _check_same_problem(flow: KernelFlow, between_times: object) -> None:
    if not isinstance(between_times, TwoTimeFlow):
        raise TypeError(f"between_times must be a TwoTimeFlow, got {type(between_times).__name__}")
    ours, theirs = (
        (
            f"{one.targets.shape[0]} samples",
            f"{0 if one.test_targets is None else len(one.test_targets)} test targets",
            type(one.loss).__name__,
            f"{type(one.clipping).__name__} of scope {one.clipping.scope}",
            f"reduction {one.reduction}",
        )
        for one in (flow, between_times)
    )
    for one, other in zip(ours, theirs, strict=True):
        if one != other:
            raise ValueError(
                f"between_times must be the problem of flow at infinite width, with {one}, got "
                f"{other}"
            )


def _noise_of_one(
    flow: TwoTimeFlow, steps: int, sigma: float, batches: Batches, noise: Noise, per_group: bool
) -> float:
    """Relative v(T) of a cell whose learning rate and clipping norm are one."""
    if sigma == 0:
        return 0.0
    variance = weight_noise_variance(
        eqx.tree_at(lambda rule: rule.R, flow.clipping, np.asarray(1.0)),
        flow.n_samples,
        learning_rate=1.0,
        steps=steps,
        noise_multiplier=sigma,
        batches=batches,
        noise=noise,
        n_groups=len(flow.names),
        noise_per_group=per_group,
        reduction=flow.reduction,
    )
    return float(relative_weight_noise(variance[-1], flow.model, None, flow.points))


def _moving(
    variance: Float[np.ndarray, " C"] | None,
    n_cells: int,
    kernels: KernelChoice,
    moving_from: float,
) -> np.ndarray:
    """Whether kernels between times predict a cell."""
    validate.choice(get_args(KernelChoice), kernels=kernels)
    least = float(validate.scalar(moving_from=validate.non_negative(moving_from=moving_from)))
    if kernels == "between times" and variance is None:
        raise ValueError(
            "between_times must be given with kernels='between times', got None: "
            "stochastic_flow.TwoTimeFlow of the same problem"
        )
    if kernels == "frozen" or variance is None:
        return np.zeros(n_cells, bool)
    return (
        np.full(n_cells, True)
        if kernels == "between times"
        else (variance >= least) & (variance > 0)
    )


def _measured(
    flow: KernelFlow, final: FinalOutputs, initial_loss: float, is_single: bool
) -> CellMetrics:
    """Metrics of cells, from outputs with an axis of seeds or without one."""
    if is_single and final.train.ndim == 3:
        final = jax.tree.map(lambda outputs: outputs[:, None], final)
    test_pair = None
    if final.test is not None and flow.test_targets is not None:
        test_pair = (final.test, flow.test_targets)
    train_pair = (final.train, flow.targets)
    return measure(flow.loss, flow.reduction, initial_loss, train_pair, test_pair)


def _by_group(
    flow: KernelFlow, final: FinalOutputs, labels: Labels | None, test_labels: Labels | None
) -> tuple[GroupMetrics | None, GroupMetrics | None]:
    """Losses and accuracies of subgroups of both parts ``(C, G)``, for labels that are given."""
    found: list[GroupMetrics | None] = []
    for outputs, targets, own in (
        (final.train, flow.targets, labels),
        (final.test, flow.test_targets, test_labels),
    ):
        if own is None:
            found.append(None)
            continue
        if outputs is None or targets is None:
            raise ValueError(
                "test_subgroups must be None without test samples: give the flow a test_kernel and "
                "test_targets"
            )
        metrics = by_group(outputs, targets, flow.loss, own)
        loss, accuracy = (
            None if part is None else part.reshape(len(part), -1, part.shape[-1]).mean(axis=1)
            for part in (metrics.loss, metrics.accuracy)
        )
        assert loss is not None
        found.append(metrics._replace(loss=loss, accuracy=accuracy))
    return found[0], found[1]


def _in_order(pieces: tuple[GroupMetrics | None, ...], order: np.ndarray) -> GroupMetrics | None:
    """Numbers of all cells, from those of parts of them."""
    known = [piece for piece in pieces if piece is not None]
    if not known:
        return None
    accuracies = [piece.accuracy for piece in known if piece.accuracy is not None]
    return known[0]._replace(
        loss=np.concatenate([piece.loss for piece in known])[order],
        accuracy=np.concatenate(accuracies)[order] if accuracies else None,
    )


def _axis(**named: ArrayLike) -> Float[np.ndarray, " N"]:
    ((name, _),) = named.items()
    array = np.asarray(validate.positive(**named), np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{name} must be an array of one dimension, got shape {array.shape}")
    return array


def _cells_at_once(
    flow: KernelFlow, train: Array, test: Array | None, n_seeds: int, noisy: bool
) -> int:
    followed = train.size + (0 if test is None else test.size)
    item = train.dtype.itemsize
    cell_bytes = _COPIES * (flow.n_terms + 1) * followed * n_seeds * item
    noise_bytes = bytes_of_noise(flow) if noisy else 0
    way_out = "use fewer keys, samples or float32"
    memory.require(noise_bytes + cell_bytes, "predicting a cell", way_out)
    return max(1, int(_SHARE * (memory.available_bytes() - noise_bytes) / cell_bytes))
