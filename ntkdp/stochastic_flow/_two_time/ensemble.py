"""Noisy runs of an infinitely wide network, hundreds in one batched product."""

import jax
import jax.numpy as jnp
import numpy as np

from ntkdp import privacy
from ntkdp._backend import devices, memory, validate
from ntkdp._backend import progress as _progress
from ntkdp._backend.types import (
    ArrayLike,
    Float,
    KeyLike,
    LearningRate,
    Progress,
    PyTree,
    ScalarLike,
)
from ntkdp.gradient_flow import with_steps
from ntkdp.stochastic_flow._two_time import volterra
from ntkdp.stochastic_flow._two_time.flow import TwoTimeFlow
from ntkdp.stochastic_flow._two_time.gaussian_process import output_process
from ntkdp.stochastic_flow._weight_noise import (
    NoiseMultiplier,
    variance_of_budget,
    weight_noise_variance,
)
from ntkdp.trajectory import Measurement, Stepping, Trajectory, from_measurements, times_of_steps

#: Number of nodes times points up to which, by default, every step is a node.
_MOST_AT_EVERY_STEP = 4096
#: Number of nodes times modes that are kept together by default.
_MOST_TOGETHER = 8192
#: Fewest nodes by default, if there are as many steps.
_FEWEST_NODES = 16


def two_time_ensemble(
    flow: TwoTimeFlow,
    initial: PyTree = None,
    *,
    learning_rate: LearningRate,
    steps: int,
    noise_multiplier: NoiseMultiplier = 0.0,
    sample_rate: float = 1.0,
    noise_per_group: bool = False,
    nodes: int | None = None,
    rank: int | None = None,
    record_every: int = 1,
    outputs: bool = False,
    progress: Progress = False,
    key: KeyLike,
) -> Trajectory:
    r"""Draw runs of DP-SGD on an infinitely wide network, whose kernel noise moves.

    .. math::
        f_k = g_k - \frac{\eta}{n} \sum_{j < k} \sum_r \Theta_r(k, j)\, C_{ir}(j)\, a(j), \qquad
        g \sim GP(0, \Sigma(k, j) \otimes I_K),

    where clipping takes the norms from :math:`\Theta(j, j)`.

    Parameters
    ----------
    flow : TwoTimeFlow
        Network, data, loss and clipping.
    initial : array or pair, optional
        Outputs ``(n, K)`` of a given network, or a (train, test) pair with test inputs: every run
        starts there. By default each run starts from random outputs of its own, like networks
        drawn at random.
    learning_rate, steps, noise_multiplier, sample_rate, noise_per_group, record_every, outputs, \
    progress
        As for :func:`ensemble`; the groups are the layers.
    nodes : int, optional
        Number of times at which kernels are computed, at least 2; between them they are
        interpolated. The default is every step while that is cheap, and 16 or more otherwise.
    rank : int, optional
        Number of leading modes of the outputs' covariance that are kept together at all times; each
        of the others is kept by itself. The default is all of them while that is cheap.
    key : PRNG key
        One key, or an array of S keys for S runs, which get a leading seed axis.

    Returns
    -------
    Trajectory
        Its times are the running sum of the learning rate.

    Raises
    ------
    ValueError, TypeError
        As for :func:`ensemble`.
    MemoryError
        If kernels or paths do not fit.

    Notes
    -----
    *Derived*. Exact at infinite width with a node at every step. A step costs a product of
    ``(N, 3 n)`` with ``(3 n, S K)``, and every two nodes a kernel ``(N, N)``.

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
    step_times = times_of_steps(stepping.learning_rate, np.arange(stepping.steps + 1))
    recorded = stepping.recorded
    measured = draw(
        flow,
        initial,
        np.asarray(step_times, np.float64),
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
    return from_measurements(
        step_times[recorded], measured, steps=jnp.asarray(recorded), setup=setup
    )


def two_time_flow(
    flow: TwoTimeFlow,
    initial: PyTree,
    times: ArrayLike,
    *,
    variance: ArrayLike | privacy.Budget,
    start: ScalarLike = 0.0,
    steps: int = 200,
    nodes: int | None = None,
    rank: int | None = None,
    outputs: bool = False,
    progress: Progress = False,
    key: KeyLike,
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
        :math:`v(T)`, the variance of the noise that each weight has accumulated by the last time:
        one number, or one for each layer ``(R,)``. A budget, spent on full batches from the start
        to the last time, gives :math:`(T S/(n \mu))^2` with the mean loss and
        :math:`(T S/\mu)^2` with the sum, with S the sensitivity.
    start : float
        Time of the initial state, 0 as in a run; it need not be among ``times``.
    steps : int
        Approximate number of steps of the trapezoidal rule over the whole horizon.

    Returns
    -------
    Trajectory
        At ``times``.

    Raises
    ------
    ValueError, TypeError, MemoryError
        As for :func:`two_time_ensemble`; if a budget is given with a rule of unbounded sensitivity.

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
    initial: PyTree,
    times: Float[np.ndarray, " steps"],
    variances: Float[np.ndarray, "steps R"],
    recorded: np.ndarray,
    *,
    nodes: int | None,
    rank: int | None,
    sample_rate: float,
    trapezoidal: bool,
    outputs: bool,
    progress: Progress,
    key: KeyLike,
) -> Measurement:
    """Measurements of runs on a grid of times, at its recorded places."""
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
    # The last step is inside a cell, and so is every step that is recorded.
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
    # The layers' variances are in proportion, so their sum marks the same places.
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
    by_seed: Measurement = jax.tree.map(lambda path: jnp.swapaxes(path, 0, 1), measured)
    if keys.ndim:
        return by_seed
    single: Measurement = jax.tree.map(lambda path: path[0], by_seed)
    return single


def _check_flow(flow: object) -> None:
    if not isinstance(flow, TwoTimeFlow):
        raise TypeError(f"flow must be a TwoTimeFlow, got {type(flow).__name__}; see ensemble")
