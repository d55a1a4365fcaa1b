"""Noisy runs of an infinitely wide network, hundreds in one batched product."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntkdp import privacy
from ntkdp._backend import devices, memory, validate
from ntkdp._backend import progress as _progress
from ntkdp._backend.types import Float
from ntkdp.gradient_flow import with_steps
from ntkdp.stochastic_flow._two_time import volterra
from ntkdp.stochastic_flow._two_time.flow import TwoTimeFlow
from ntkdp.stochastic_flow._two_time.gaussian_process import output_process
from ntkdp.stochastic_flow._weight_noise import variance_of_budget, weight_noise_variance
from ntkdp.trajectory import Measurement, Stepping, Trajectory, from_measurements, times_of_steps

#: Numbers at nodes, over points, up to which every step is a node or all modes are kept together.
_MOST_AT_EVERY_STEP, _MOST_TOGETHER = 4096, 8192
_FEWEST_NODES = 16


def two_time_ensemble(
    flow: TwoTimeFlow,
    initial: Any = None,
    *,
    learning_rate: Any,
    steps: int,
    noise_multiplier: Any = 0.0,
    sample_rate: float = 1.0,
    noise_per_group: bool = False,
    nodes: int | None = None,
    rank: int | None = None,
    record_every: int = 1,
    outputs: bool = False,
    progress: Any = False,
    key: Any,
) -> Trajectory:
    r"""Draw runs of DP-SGD on an infinitely wide network, whose kernel noise moves.

    .. math::
        f_k = g_k - \frac{\eta}{n} \sum_{j < k} \sum_r \Theta_r(k, j)\, C_{ir}(j)\, a(j), \qquad
        g \sim GP(0, \Sigma(k, j) \otimes I_K),

    with the norms of clipping from :math:`\Theta(j, j)`.

    Parameters
    ----------
    flow : TwoTimeFlow
        Network, data, loss and clipping.
    initial : array or pair, optional
        Outputs ``(n, K)`` of a given network, or a (train, test) pair with test inputs: every run
        starts there. Without, each run has random outputs of its own, as networks drawn at random.
    learning_rate, steps, noise_multiplier, sample_rate, noise_per_group, record_every, outputs, \
    progress
        As for :func:`ensemble`; the groups are the layers.
    nodes : int, optional
        Times at which kernels are computed, at least 2; between them they are interpolated. By
        default every step while that is cheap, then 16 or more.
    rank : int, optional
        Leading modes of the outputs' covariance that are kept together at all times, the others
        each for itself. By default all while that is cheap.
    key : PRNG key
        One, or an array of S keys: S runs, a leading seed axis.

    Returns
    -------
    Trajectory
        Times are the running sum of the learning rate.

    Raises
    ------
    ValueError, TypeError
        As for :func:`ensemble`.
    MemoryError
        Kernels or paths that do not fit.

    Notes
    -----
    *Derived*. Exact at infinite width with a node at every step. The cost of a step is that of a
    product of ``(N, 3 n)`` with ``(3 n, S K)``, and of two nodes that of a kernel ``(N, N)``.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ntkdp
    >>> flow = ntkdp.stochastic_flow.TwoTimeFlow(
    ...     ntkdp.models.mlp([16], 1), jnp.eye(3), jnp.zeros(3), ntkdp.losses.SquaredError(),
    ...     ntkdp.clipping.Abadi(1.0))
    >>> runs = ntkdp.stochastic_flow.two_time_ensemble(
    ...     flow, learning_rate=0.5, steps=4, noise_multiplier=0.3,
    ...     key=jax.random.split(jax.random.key(0), 10))
    >>> runs.loss.shape
    (10, 5)
    """
    _check_flow(flow)
    stepping = Stepping(learning_rate, steps, record_every)
    variances = weight_noise_variance(
        flow.clipping,
        flow.n_samples,
        learning_rate=learning_rate,
        steps=stepping.steps,
        noise_multiplier=noise_multiplier,
        sample_rate=sample_rate,
        n_groups=len(flow.names),
        noise_per_group=noise_per_group,
        reduction=flow.reduction,
    )
    every = times_of_steps(stepping.learning_rate, np.arange(stepping.steps + 1))
    recorded = stepping.recorded
    measured = draw(
        flow,
        initial,
        np.asarray(every, np.float64),
        np.asarray(variances, np.float64),
        recorded,
        nodes=nodes,
        rank=rank,
        sample_rate=float(sample_rate),
        trapezoidal=False,
        outputs=outputs,
        progress=progress,
        key=key,
    )
    sigma = privacy.as_noise_multiplier(noise_multiplier, stepping.steps, sample_rate)
    setup = with_steps(flow.setup(), stepping, sigma, sample_rate, noise_per_group)
    return from_measurements(every[recorded], measured, steps=jnp.asarray(recorded), setup=setup)


def two_time_flow(
    flow: TwoTimeFlow,
    initial: Any,
    times: Any,
    *,
    variance: Any,
    start: Any = 0.0,
    steps: int = 200,
    nodes: int | None = None,
    rank: int | None = None,
    outputs: bool = False,
    progress: Any = False,
    key: Any,
) -> Trajectory:
    r"""Draw noisy paths of an infinitely wide network in flow time, the limit of small steps.

    The Volterra equation of :class:`TwoTimeFlow`, with noise that accumulates evenly over time.

    Parameters
    ----------
    flow, initial, nodes, rank, outputs, progress, key
        As for :func:`two_time_ensemble`; ``initial`` may be None.
    times : array
        ``(T,)``, increasing, none before ``start``.
    variance : float, array or privacy.Budget
        :math:`v(T)`, variance of the noise that each weight has gathered by the last time, one or
        one a layer ``(R,)``. Of a budget, spent on full batches from the start to the last time,
        it is :math:`(T S/(n \mu))^2` with the mean loss and :math:`(T S/\mu)^2` with the sum, S
        the sensitivity.
    start : float
        Time of the initial state, 0 as in a run; it need not be among ``times``.
    steps : int
        Steps of the trapezoidal rule over the whole horizon, about.

    Returns
    -------
    Trajectory
        At ``times``.

    Raises
    ------
    ValueError, TypeError, MemoryError
        As for :func:`two_time_ensemble`; a budget with a rule of unbounded sensitivity.

    Notes
    -----
    *Derived*. Without noise the error of the rule is of second order in the step.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ntkdp
    >>> flow = ntkdp.stochastic_flow.TwoTimeFlow(
    ...     ntkdp.models.mlp([16], 1), jnp.eye(3), jnp.zeros(3), ntkdp.losses.SquaredError(),
    ...     ntkdp.clipping.Abadi(1.0))
    >>> paths = ntkdp.stochastic_flow.two_time_flow(
    ...     flow, None, [0.0, 1.0, 2.0], variance=0.1, steps=10,
    ...     key=jax.random.split(jax.random.key(0), 5))
    >>> paths.loss.shape
    (5, 3)
    """
    _check_flow(flow)
    steps = validate.count(steps=steps)
    start, times = (np.asarray(part, np.float64) for part in validate.times_from(start, times))
    horizon = times[-1] - start
    if isinstance(variance, privacy.Budget):
        variance = variance_of_budget(
            flow.clipping, flow.n_samples, variance, horizon, len(flow.names), flow.reduction
        )
    variance = np.asarray(validate.non_negative(variance=variance), np.float64)
    if variance.shape not in ((), (len(flow.names),)):
        raise ValueError(
            f"variance must be one number, or one for each of the {len(flow.names)} layers, "
            f"got shape {variance.shape}"
        )
    ends = times if times[0] == start else np.append(start, times)
    pieces = np.maximum(np.ceil(steps * np.diff(ends) / horizon - 1e-9), 1).astype(int)
    fine = [
        np.linspace(first, last, count, endpoint=False)
        for first, last, count in zip(ends[:-1], ends[1:], pieces, strict=True)
    ]
    recorded = np.append(0, np.cumsum(pieces))[-len(times) :]
    whole = np.append(np.concatenate(fine), times[-1])
    share = (whole - start) / horizon
    measured = draw(
        flow,
        initial,
        whole,
        share[:, None] * np.broadcast_to(variance, len(flow.names)),
        recorded,
        nodes=nodes,
        rank=rank,
        sample_rate=1.0,
        trapezoidal=True,
        outputs=outputs,
        progress=progress,
        key=key,
    )
    return from_measurements(
        jnp.asarray(times), measured, start=jnp.asarray(start), setup=flow.setup()
    )


def draw(
    flow: TwoTimeFlow,
    initial: Any,
    times: Float[np.ndarray, " steps"],
    variances: Float[np.ndarray, "steps R"],
    recorded: np.ndarray,
    *,
    nodes: int | None,
    rank: int | None,
    sample_rate: float,
    trapezoidal: bool,
    outputs: bool,
    progress: Any,
    key: Any,
) -> Measurement:
    """Measurements of runs on a grid of times, at the recorded places of it."""
    keys = validate.keys(key=key)
    start = flow.initial(initial)
    n_points = flow.points.shape[0]
    steps = len(times) - 1
    if nodes is None:
        nodes = min(steps + 1, max(_FEWEST_NODES, _MOST_AT_EVERY_STEP // n_points))
    if validate.count(nodes=nodes) < 2:
        raise ValueError(f"nodes must be at least 2, the start and the end, got {nodes!r}")
    nodes = min(nodes, steps + 1)
    rank = _MOST_TOGETHER // nodes if rank is None else validate.count(rank=rank)
    # The last step stands inside a cell, so that all that is recorded does.
    per_cell = -(-steps // (nodes - 1))
    n_cells = steps // per_cell + 1
    n_columns = keys.size * flow.n_outputs
    itemsize = flow.points.dtype.itemsize
    rows = 2 * (n_cells + 1) * flow.n_terms * n_points * flow.n_samples
    paths = 3 * (n_cells + 1) * n_points * n_columns
    joint = 3 * (min(rank, n_points) * (n_cells + 1)) ** 2
    kept = len(recorded) * n_points * n_columns * bool(outputs)
    copies = 1 if flow.mesh is None else flow.mesh.size
    memory.require(
        devices.bytes_on_host(flow.mesh, (rows + copies * (paths + joint + kept)) * itemsize),
        f"an ensemble of {keys.size} runs, {n_points} points and {n_cells + 1} nodes",
        "use fewer seeds at a time, fewer nodes, a lower rank or float32",
    )
    at_nodes = variances[np.minimum(per_cell * np.arange(n_cells + 1), steps)]
    process = output_process(flow, at_nodes, start, rank)
    # In proportion to each other, the layers' variances mark the same places.
    steps_of_cells = volterra.grid(times, variances.sum(1), recorded, per_cell)
    variances_of_nodes, steps_of_cells, keys_of_seeds = devices.everywhere(
        flow.mesh, (jnp.asarray(at_nodes, flow.points.dtype), steps_of_cells, keys.reshape(-1))
    )
    with _progress.listening(progress, "drawing wide networks") as listener:
        measured = volterra.run(
            flow,
            process,
            variances_of_nodes,
            steps_of_cells,
            keys_of_seeds,
            len(recorded),
            sample_rate,
            trapezoidal,
            outputs,
            listener,
        )
    measured = jax.tree.map(lambda path: jnp.swapaxes(path, 0, 1), measured)
    return jax.tree.map(lambda path: path[0], measured) if keys.ndim == 0 else measured


def _check_flow(flow: Any) -> None:
    if not isinstance(flow, TwoTimeFlow):
        raise TypeError(f"flow must be a TwoTimeFlow, got {type(flow).__name__}; see ensemble")
