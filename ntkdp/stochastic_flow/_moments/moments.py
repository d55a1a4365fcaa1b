"""Mean and spread of noisy training, without drawing a run."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ntkdp import privacy
from ntkdp._backend import compiled, devices, validate
from ntkdp._backend import progress as _progress
from ntkdp._backend.compiled import nan_unless
from ntkdp._backend.progress import Listener
from ntkdp._backend.schedules import Schedule, largest, multiplier
from ntkdp._backend.types import (
    Array,
    ArrayLike,
    LearningRate,
    Progress,
    PyTree,
    ScalarLike,
    as_constant,
)
from ntkdp.batches import Batches, Shuffled
from ntkdp.batches import resolve as resolve_batches
from ntkdp.clipping import Batch, Global, Scheduled, moving_norm
from ntkdp.gradient_flow import (
    KernelFlow,
    KernelLike,
    OutputsAtZero,
    check_kernel_flow,
    optimizer_steps,
)
from ntkdp.noise import Noise
from ntkdp.noise import resolve as resolve_noise
from ntkdp.ntk import FeatureKernel
from ntkdp.optimizers import OptimizerLike, as_linear, size_of_state
from ntkdp.stochastic_flow._moments import full_covariance, gaussian_closure, low_rank_covariance
from ntkdp.stochastic_flow._moments.covariance import CovarianceForm
from ntkdp.stochastic_flow._moments.gaussian_closure import Closure, Statistics
from ntkdp.stochastic_flow._moments.optimizer_steps import (
    JointState,
    MomentSteps,
    sizes_of_noise,
)
from ntkdp.stochastic_flow._moments.result import MAX_STEPS, Moments
from ntkdp.stochastic_flow._moments.sampling import Sampling
from ntkdp.stochastic_flow._noise_covariance import noise_covariance, noise_in_features
from ntkdp.stochastic_flow._weight_noise import NoiseMultiplier, NoiseMultipliers
from ntkdp.trajectory import Outcome, Stepping, check_noise_moves

#: Number of outputs, over all points, up to which the whole covariance is kept by default.
_LARGEST_FULL = 3000
_WAYS_OUT = (
    "use fewer samples, a smaller rank, float32, fewer recorded steps or no outputs, or "
    "stochastic_flow.ensemble"
)


def moments(
    flow: KernelFlow,
    initial: PyTree,
    *,
    learning_rate: LearningRate,
    steps: int,
    noise_multiplier: NoiseMultipliers = 0.0,
    sample_rate: float = 1.0,
    batches: Batches | None = None,
    noise: Noise | None = None,
    clip_norm: Schedule | None = None,
    noise_kernel: KernelLike | None = None,
    noise_per_group: bool = False,
    optimizer: OptimizerLike | None = None,
    outputs_at_zero: OutputsAtZero | None = None,
    rank: int | None = None,
    record_every: int = 1,
    outputs: bool = False,
    progress: Progress = False,
) -> Moments:
    r"""Mean and spread of noisy training, step by step, without drawing a run.

    Parameters
    ----------
    flow, initial, learning_rate, steps, noise_multiplier, sample_rate, noise, clip_norm, \
    noise_kernel, noise_per_group, optimizer, outputs_at_zero, record_every, progress
        As for :func:`ensemble`.
    batches : batches.Batches, optional
        Any but shuffled ones, in place of a sampling rate.
    rank : int, optional
        Number of modes of the noise whose correlations are all kept; each other mode evolves by
        itself. The default is all of them up to N K = 3000 outputs of train and test points, and
        beyond that as many as hold 99% of the noise's trace, up to 500; N K means all.
    outputs : bool
        Record mean and covariance of the outputs too.

    Returns
    -------
    Moments
        Its times are the running sum of the learning rate.

    Raises
    ------
    ValueError, TypeError
        As for :func:`ensemble`; if the rule jumps (`Global`) or couples the samples (`Batch`), or
        batches are shuffled, so that a step depends on those before it in its epoch, when
        :func:`ensemble` is to be used.

    Notes
    -----
    *Derived*: Gaussian closure, exact in the mean and covariance for squared loss while nothing is
    clipped. The modules ``gaussian_closure``, ``excess_variance`` and ``low_rank_covariance`` have
    the equations, the spread of the loss, and the covariance of low rank. A step takes about ten
    products of ``(N K, N K)`` matrices with the whole covariance, and ``n K rank^2`` operations
    with a rank. What correlated noise carries is part of the state: b bands multiply the memory by
    about :math:`b^2`.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> flow = ntkdp.KernelFlow(jnp.eye(1), jnp.zeros((1, 1)), ntkdp.losses.SquaredError(),
    ...                         ntkdp.clipping.Abadi(10.0), reduction="sum")
    >>> predicted = ntkdp.stochastic_flow.moments(
    ...     flow, jnp.array([[1.0]]), learning_rate=0.5, steps=1, noise_multiplier=0.1)
    >>> [round(v, 4) for v in predicted.loss.tolist()]
    [0.5, 0.25]
    """
    stepping = Stepping(learning_rate, steps, record_every)
    drawn, correlated = resolve_batches(batches, sample_rate), resolve_noise(noise)
    if isinstance(drawn, Shuffled):
        raise ValueError(
            "batches must be Full, Poisson, FixedSize or Cyclic, which do not depend on those "
            f"before, got {drawn!r}; stochastic_flow.ensemble draws runs with them"
        )
    sigma = privacy.as_noise_multiplier(
        noise_multiplier,
        stepping.steps,
        batches=drawn,
        noise=correlated,
        n_samples=flow.data.n_samples,
        schedules=True,
    )
    sigma = multiplier(stepping.steps, sigma)
    scheduled = moving_norm(None, clip_norm, flow.clipping, stepping.steps)
    check_noise_moves(scheduled, sigma, correlated)
    sigma, sizes = largest(sigma)
    closure, mean = _closure(flow, initial, sigma, drawn, noise_kernel, noise_per_group, rank)
    recursion = correlated.recursion(stepping.steps)
    norms = None
    if isinstance(scheduled, Scheduled):
        norms, moved = sizes_of_noise(scheduled, flow, stepping.steps, noise_per_group)
        sizes = moved if sizes is None else sizes * moved
    if sizes is not None:
        recursion = recursion._replace(draws=recursion.draws * sizes)
    walk = optimizer_steps(closure.flow, optimizer, stepping.learning_rate, outputs_at_zero)
    at_zero = None if walk.at_zero is None else _all_points(walk.at_zero)
    steps_of = MomentSteps(closure, as_linear(walk.optimizer), at_zero, drawn, recursion, norms)
    size = size_of_state(steps_of.optimizer) + len(recursion.enters)
    with _progress.listening(progress, "stepping the moments") as listener:
        statistics = compiled.call(
            _step_moments, steps_of, mean, stepping, outputs, listener,
            what=f"moments of {mean.size:,} outputs", ways_out=_WAYS_OUT,
            results=len(stepping.recorded) * _bytes_at_a_time(mean, outputs),
            work=size**2 * mean.size**2 * mean.dtype.itemsize,
        )  # fmt: skip
        return _over_time(stepping.times, jnp.asarray(stepping.recorded), statistics)


def moment_flow(
    flow: KernelFlow,
    initial: PyTree,
    times: ArrayLike,
    *,
    learning_rate: ScalarLike,
    start: ScalarLike = 0.0,
    noise_multiplier: NoiseMultiplier = 0.0,
    sample_rate: float = 1.0,
    noise_kernel: KernelLike | None = None,
    noise_per_group: bool = False,
    rank: int | None = None,
    outputs: bool = False,
    rtol: ScalarLike = 1e-5,
    atol: ScalarLike = 1e-8,
) -> Moments:
    r"""Mean and spread of noisy training in flow time.

    The noise of a learning rate :math:`\eta` enters as :math:`\sqrt\eta\, Q^{1/2} dB` and the drift
    is the flow's: this is :func:`moments` to first order in the learning rate.

    Parameters
    ----------
    flow, initial, noise_multiplier, sample_rate, noise_kernel, noise_per_group, rank, outputs
        As for :func:`moments`.
    times : array
        Increasing, none before ``start``, in units of learning rate times steps.
    learning_rate : float
        The learning rate that sets the size of the noise.
    start : float
        Time of the initial state, 0 as in a run; it need not be among ``times``.
    rtol, atol : float
        Tolerances of the solver.

    Returns
    -------
    Moments
        With ``steps=None``. If the solver does not reach all times, ``successful`` is False and
        ``message`` says what to do.

    Raises
    ------
    ValueError, TypeError
        As for :func:`moments`; if times do not increase, or begin before the start.

    Notes
    -----
    *Derived*; solved by diffrax.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> flow = ntkdp.KernelFlow(jnp.eye(1), jnp.zeros((1, 1)), ntkdp.losses.SquaredError(),
    ...                         ntkdp.clipping.Abadi(100.0), reduction="sum")
    >>> predicted = ntkdp.stochastic_flow.moment_flow(
    ...     flow, jnp.zeros((1, 1)), [0.0, 20.0], learning_rate=0.1, noise_multiplier=0.01)
    >>> round(predicted.loss[-1].item(), 4)
    0.025
    """
    start, times = validate.times_from(start, times)
    rate = jnp.asarray(validate.positive(learning_rate=learning_rate), jnp.result_type(float))
    rtol, atol = validate.positive(rtol=rtol), validate.positive(atol=atol)
    batches = resolve_batches(None, sample_rate)
    closure, mean = _closure(
        flow, initial, noise_multiplier, batches, noise_kernel, noise_per_group, rank
    )
    statistics, outcome = compiled.call(
        _solve_moments, closure, mean, start, times, rate, as_constant(rtol), as_constant(atol),
        outputs,
        what=f"moments of {mean.size:,} outputs", ways_out=_WAYS_OUT,
        results=len(times) * _bytes_at_a_time(mean, outputs),
        work=mean.size**2 * mean.dtype.itemsize,
    )  # fmt: skip
    return _over_time(times, None, statistics, outcome)


def fixed_privacy_flow(
    flow: KernelFlow,
    initial: PyTree,
    times: ArrayLike,
    *,
    mu: NoiseMultiplier,
    start: ScalarLike = 0.0,
    noise_kernel: KernelLike | None = None,
    noise_per_group: bool = False,
    rank: int | None = None,
    outputs: bool = False,
    rtol: ScalarLike = 1e-5,
    atol: ScalarLike = 1e-8,
) -> Moments:
    r"""Mean and spread of full-batch training as the step shrinks at a fixed privacy budget.

    Over a horizon T, K = T/eta full-batch steps are :math:`\mu`-GDP with
    :math:`\sigma = \sqrt{K}/\mu`, so the noise per unit of time does not depend on the step:
    :math:`dw = -\text{drift}\, dt + \tfrac{S \sqrt T}{n \mu}\, dB` with the mean loss, without
    the n with the sum.

    Parameters
    ----------
    flow, initial, noise_kernel, noise_per_group, rank, outputs, rtol, atol
        As for :func:`moment_flow`.
    times : array
        Increasing, none before ``start``. The budget is spent on the horizon T from the start to
        the last time.
    mu : float or privacy.Budget
        :math:`\mu`-GDP, where neighbours differ by one sample added or removed. An (epsilon, delta)
        budget stands for its ``mu``, which is exact for full batches.
    start : float
        Time of the initial state, 0 as in a run; it need not be among ``times``.

    Returns
    -------
    Moments
        As for :func:`moment_flow`.

    Raises
    ------
    ValueError, TypeError
        As for :func:`moment_flow`; if mu is not positive.

    Notes
    -----
    *Derived.*

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> flow = ntkdp.KernelFlow(jnp.eye(1), jnp.zeros((1, 1)), ntkdp.losses.SquaredError(),
    ...                         ntkdp.clipping.Abadi(100.0), reduction="sum")
    >>> predicted = ntkdp.stochastic_flow.fixed_privacy_flow(
    ...     flow, jnp.zeros((1, 1)), [0.0, 25.0], mu=1000.0)
    >>> round(predicted.loss[-1].item(), 4)  # S^2 T / (4 mu^2)
    0.0625
    """
    start, times = validate.times_from(start, times)
    given = mu.mu if isinstance(mu, privacy.Budget) else mu
    checked = validate.scalar(mu=validate.positive(mu=given))
    horizon = float(times[-1]) - float(start)
    return moment_flow(
        flow,
        initial,
        times,
        # Steps of any length will do: the noise over a unit of time is the same.
        learning_rate=1.0,
        start=start,
        noise_multiplier=np.sqrt(horizon) / checked,
        noise_kernel=noise_kernel,
        noise_per_group=noise_per_group,
        rank=rank,
        outputs=outputs,
        rtol=rtol,
        atol=atol,
    )


def _closure(
    flow: KernelFlow,
    initial: PyTree,
    sigma: NoiseMultiplier,
    batches: Batches,
    noise_kernel: KernelLike | None,
    per_group: bool,
    rank: int | None,
) -> tuple[Closure, Array]:
    """The closure of a flow, and the mean of all points at the start."""
    flow = check_kernel_flow(flow)
    if isinstance(flow.clipping, Global | Batch):
        raise ValueError(
            "flow must have a rule that is continuous and looks at one sample, got "
            f"{type(flow.clipping).__name__}; use stochastic_flow.ensemble"
        )
    rank = None if rank is None else validate.count(rank=rank)
    n = flow.targets.shape[0]
    batches.check(n)
    divisor = batches.share(n) * flow.data.divisor
    mean = _all_points(flow.init(initial))
    n_outputs = mean.shape[1]
    of_noise = (flow, sigma, noise_kernel, per_group)
    is_full = mean.size <= (_LARGEST_FULL if rank is None else rank)
    factor = None if is_full else noise_in_features(*of_noise)
    covariance = noise_covariance(*of_noise) if factor is None else None
    noise = None if covariance is None else covariance / divisor**2
    form: CovarianceForm
    if is_full:
        form = full_covariance.full(flow, noise, n_outputs)
    else:
        added = noise if factor is None else FeatureKernel(factor / divisor)
        form = low_rank_covariance.low_rank(flow, added, n_outputs, rank)
    points, weights = gaussian_closure.integration_points(n_outputs)
    closure = Closure(
        flow=flow,
        form=form,
        sampling=Sampling.of(batches, n),
        points=jnp.asarray(points, mean.dtype),
        weights=jnp.asarray(weights, mean.dtype),
    )
    return closure, mean


def _all_points(outputs: tuple[Array, Array | None]) -> Array:
    """Outputs of all points, train before test."""
    train, test = outputs
    return train if test is None else jnp.concatenate([train, test])


def _bytes_at_a_time(mean: Array, outputs: bool) -> int:
    """Bytes that are recorded at each time: mean and covariance of the outputs, on request."""
    return (mean.size + mean.size**2 if outputs else 1) * mean.dtype.itemsize


def _over_time(
    times: Array, steps: Array | None, statistics: Statistics, outcome: Array | int = 0
) -> Moments:
    """Statistics of all times by name, NaN at those that a solver did not reach."""
    # The solver fills them with infinity.
    reached = jax.tree.map(
        lambda v: nan_unless((outcome == Outcome.SUCCESS) | ~jnp.isinf(v), v),
        devices.whole(statistics),
    )
    return Moments(times=times, steps=steps, **reached._asdict(), outcome=outcome)


@eqx.filter_jit
def _step_moments(
    steps: MomentSteps, mean: Array, stepping: Stepping, outputs: bool, listener: Listener
) -> Statistics:
    def step(k: Array, state: JointState) -> JointState:
        number = jnp.asarray(stepping.number(k))
        return steps.step(state, number, jnp.asarray(stepping.rate(k), mean.dtype))

    measured: Statistics = stepping.walk(
        step, lambda state: steps.measure(state, outputs), steps.start(mean), listener
    )
    return measured


@eqx.filter_jit
def _solve_moments(
    closure: Closure,
    mean: Array,
    start: Array,
    times: Array,
    rate: Array,
    rtol: Array | np.ndarray,
    atol: Array | np.ndarray,
    outputs: bool,
) -> tuple[Statistics, Array]:
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, state, args: closure.velocity(state, rate)),
        diffrax.Tsit5(),
        t0=start,
        t1=times[-1],
        dt0=None,
        y0=closure.zero(mean),
        saveat=diffrax.SaveAt(ts=times, fn=lambda t, state, args: closure.measure(state, outputs)),
        stepsize_controller=diffrax.PIDController(
            rtol=rtol,
            atol=atol,
            dtmin=4 * jnp.finfo(times.dtype).eps * jnp.maximum(jnp.abs(start), jnp.abs(times[-1])),
            force_dtmin=False,
        ),
        max_steps=MAX_STEPS,
        throw=False,
    )
    outcome = jnp.select(
        [
            solution.result == diffrax.RESULTS.successful,
            solution.result == diffrax.RESULTS.max_steps_reached,
            solution.result == diffrax.RESULTS.dt_min_reached,
        ],
        [int(Outcome.SUCCESS), int(Outcome.MAX_STEPS), int(Outcome.STEP_TOO_SMALL)],
        int(Outcome.SOLVER_FAILED),
    )
    return solution.ys, outcome
