"""Noisy runs of an infinitely wide network, hundreds in one batched product."""

from dataclasses import replace

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
from ntkdp._results.setup import batches_in_words, noise_in_words
from ntkdp.batches import Batches, Full
from ntkdp.batches import resolve as resolve_batches
from ntkdp.gradient_flow import with_steps
from ntkdp.noise import Independent, Noise
from ntkdp.noise import resolve as resolve_noise
from ntkdp.optimizers import OptimizerLike, as_linear
from ntkdp.stochastic_flow._linear_filter import LinearFilter
from ntkdp.stochastic_flow._two_time import volterra
from ntkdp.stochastic_flow._two_time.flow import TwoTimeFlow
from ntkdp.stochastic_flow._two_time.gaussian_process import Laws, output_process
from ntkdp.stochastic_flow._two_time.volterra import Cases
from ntkdp.stochastic_flow._two_time.weight_path import WeightPath, nodes_of, path_of, rest_of
from ntkdp.stochastic_flow._weight_noise import NoiseMultiplier, deviations, variance_of_budget
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
    batches: Batches | None = None,
    noise: Noise | None = None,
    noise_per_group: bool = False,
    optimizer: OptimizerLike | None = None,
    nodes: int | None = None,
    rank: int | None = None,
    record_every: int = 1,
    outputs: bool = False,
    progress: Progress = False,
    key: KeyLike,
) -> Trajectory:
    r"""Draw runs of DP-SGD on an infinitely wide network, whose kernel noise moves.

    .. math::
        f_k = g_k + \frac1n \sum_{j < k} h_{kj} \sum_r \Theta_r(k, j)\, C_{ir}(j)\, a(j), \qquad
        g \sim GP(0, \Sigma(k, j) \otimes I_K),

    where clipping takes the norms from :math:`\Theta(j, j)`, and :math:`h_{kj}` is what a linear
    optimizer has made at step k of a gradient of one at step j: :math:`-\eta_j` for plain SGD.
    The noise on the weights passes through the same filter, so that its covariance between times is
    :math:`V(k, j) = (\sigma S/(q n))^2 \sum_i h_{ki} h_{ji}`. Correlated noise of the strategy
    C has :math:`h C^{-1}` there in place of h.

    Parameters
    ----------
    flow : TwoTimeFlow
        Network, data, loss and clipping.
    initial : array or pair, optional
        Outputs ``(n, K)`` of a given network, or a (train, test) pair with test inputs: every run
        starts there. By default each run starts from random outputs of its own, like networks
        drawn at random.
    learning_rate, steps, noise_multiplier, sample_rate, batches, noise, noise_per_group, \
    record_every, outputs, progress
        As for :func:`ensemble`; the groups are the layers.
    optimizer : optimizers.SGD or callable, optional
        A linear optimizer, by default plain SGD: momentum, Nesterov momentum, weight decay, and the
        average of the weights at which a run is measured.
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
        As for :func:`ensemble`; an optimizer that is not linear, or one with weight decay and a
        frozen flow, whose kernels do not follow the weights.
    MemoryError
        If kernels or paths do not fit.

    Notes
    -----
    *Derived*. Exact at infinite width with a node at every step. A step costs a product of
    ``(N, 3 n)`` with ``(3 n, S K)``, and every two nodes a kernel ``(N, N)``; momentum doubles the
    products at the nodes, and an average doubles all of them. Weight decay acts on the initial
    weights too, of which the share :math:`a_k` is left: it moves the kernels without noise.

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
    check_flow(flow)
    stepping = Stepping(learning_rate, steps, record_every)
    linear = as_linear(optimizer)
    if linear.decays_weights and flow.frozen:
        raise ValueError(
            "flow must not be frozen with weight decay, which moves the kernels of the start; take "
            "frozen=False, or ensemble with a KernelFlow"
        )
    drawn, correlated = resolve_batches(batches, sample_rate), resolve_noise(noise)
    drawn.check(flow.n_samples)
    rate = drawn.share(flow.n_samples)
    sigma = privacy.as_noise_multiplier(
        noise_multiplier,
        stepping.steps,
        batches=drawn,
        noise=correlated,
        n_samples=flow.n_samples,
    )
    stds = deviations(flow.clipping, sigma, len(flow.names), noise_per_group)
    divisor = rate * (flow.n_samples if flow.reduction == "mean" else 1)
    step_times = times_of_steps(stepping.learning_rate, np.arange(stepping.steps + 1))
    recorded = stepping.recorded
    if not np.any(stds > 0):
        correlated = Independent()
    measured = draw(
        flow,
        initial,
        path_of(linear, stepping.learning_rate, stepping.steps, correlated),
        (np.asarray(stds, np.float64) / divisor) ** 2,
        recorded,
        nodes=nodes,
        rank=rank,
        batches=drawn,
        outputs=outputs,
        progress=progress,
        key=key,
    )
    setup = with_steps(flow.setup(), stepping, sigma, rate, noise_per_group, linear)
    return from_measurements(
        step_times[recorded],
        measured,
        steps=jnp.asarray(recorded),
        setup=replace(setup, batches=batches_in_words(drawn), noise=noise_in_words(correlated)),
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
    check_flow(flow)
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
    lengths = np.diff(whole)
    # The trapezoidal rule: a gradient belongs to half of the step on either side.
    before = np.append(0.0, lengths)
    gains = -(before[:-1] + lengths) / 2
    filter = LinearFilter(np.ones((len(gains), 1, 1)), gains[:, None])
    of_noise = filter._replace(drives=-np.sqrt(lengths / horizon)[:, None])
    measured = draw(
        flow,
        initial,
        WeightPath(filter, of_noise, (0,)),
        np.broadcast_to(variance, len(flow.names)),
        recorded,
        before=before,
        nodes=nodes,
        rank=rank,
        batches=Full(),
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
    path: WeightPath,
    scales: Float[np.ndarray, " R"],
    recorded: np.ndarray,
    *,
    before: Float[np.ndarray, " steps"] | None = None,
    cases: Cases | None = None,
    nodes: int | None,
    rank: int | None,
    batches: Batches,
    outputs: bool,
    progress: Progress,
    key: KeyLike,
) -> Measurement:
    """Measurements of runs along a path, at its recorded places.

    ``scales`` are the variances of the layers' noise. With the lengths of the steps ``before`` each
    step, the trapezoidal rule is used. ``cases`` has a clipping norm and a learning rate for each
    key.
    """
    keys = validate.keys(key=key)
    start = flow.initial(initial)
    n_points = flow.points.shape[0]
    steps, size = path.filter.drives.shape
    n_readers = len(path.readers)
    if nodes is None:
        nodes = min(steps + 1, max(_FEWEST_NODES, _MOST_AT_EVERY_STEP // n_points))
    if validate.count(nodes=nodes) < 2:
        raise ValueError(f"nodes must be at least 2, the start and the end, got {nodes!r}")
    nodes = min(nodes, steps + 1)
    rank = _MOST_TOGETHER // (n_readers * nodes) if rank is None else validate.count(rank=rank)
    # The last step is inside a cell, and so is every step that is recorded.
    per_cell = -(-steps // (nodes - 1))
    n_cells = steps // per_cell + 1
    n_columns = keys.size * flow.n_outputs
    itemsize = flow.points.dtype.itemsize
    rows = (n_readers + 1) * (n_cells + 1) * flow.n_terms * n_points * flow.n_samples
    of_noise = path.of_noise.size
    paths = ((2 + size) * n_readers * (n_cells + 1) + of_noise - size) * n_points * n_columns
    joint = 3 * (min(rank, n_points) * n_readers * (n_cells + 1)) ** 2
    kept = len(recorded) * n_points * n_columns * bool(outputs)
    filters = 3 * steps * of_noise * (n_readers * (n_cells + 1) + of_noise)
    copies = 1 if flow.mesh is None else flow.mesh.size
    memory.require(
        devices.bytes_on_host(
            flow.mesh, (rows + copies * (paths + joint + kept)) * itemsize + 8 * filters
        ),
        f"an ensemble of {keys.size} runs, {n_points} points and {n_cells + 1} nodes",
        "use fewer seeds at a time, fewer nodes, a lower rank or float32",
    )
    if not np.any(scales > 0):
        drives = np.zeros_like(path.of_noise.drives)
        path = path._replace(of_noise=path.of_noise._replace(drives=drives))
    at = np.minimum(per_cell * np.arange(n_cells + 1), steps)
    law = nodes_of(path, at)
    rest = rest_of(path, at) if per_cell > 1 else None
    dtype = flow.points.dtype
    between = np.arange(n_cells + 1) if per_cell > 1 else np.arange(0)
    process = output_process(flow, law, scales, between, start, rank)
    cells = volterra.grid(path, law, rest, recorded, per_cell, dtype, before)
    laws, cells, keys_of_seeds, cases = devices.everywhere(
        flow.mesh, (Laws.of(law, scales, dtype), cells, keys.reshape(-1), cases)
    )
    with _progress.listening(progress, "drawing wide networks") as listener:
        measured = volterra.run(
            flow,
            process,
            laws,
            cells,
            keys_of_seeds,
            cases,
            path.readers,
            len(recorded),
            batches,
            before is not None,
            outputs,
            listener,
        )
    by_seed: Measurement = jax.tree.map(lambda path: jnp.swapaxes(path, 0, 1), measured)
    if keys.ndim:
        return by_seed
    single: Measurement = jax.tree.map(lambda path: path[0], by_seed)
    return single


def check_flow(flow: object) -> None:
    """Raise unless it is a flow between times."""
    if not isinstance(flow, TwoTimeFlow):
        raise TypeError(f"flow must be a TwoTimeFlow, got {type(flow).__name__}; see ensemble")
