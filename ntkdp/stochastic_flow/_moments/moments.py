"""Mean and spread of noisy training, without drawing a run."""

from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax.numpy as jnp
import numpy as np

from ntkdp import privacy
from ntkdp._backend import devices, program_memory, validate
from ntkdp._backend import progress as _progress
from ntkdp._backend.progress import Listener
from ntkdp._backend.types import Array, as_constant
from ntkdp.clipping import Batch, Global
from ntkdp.gradient_flow import check_kernel_flow
from ntkdp.stochastic_flow._moments import full_covariance, gaussian_closure, low_rank_covariance
from ntkdp.stochastic_flow._moments.covariance import CovarianceForm
from ntkdp.stochastic_flow._moments.gaussian_closure import Closure, State, Statistics
from ntkdp.stochastic_flow._output_noise import noise_covariance, sampling
from ntkdp.trajectory import Stepping

#: Outputs, of all points, up to which the whole covariance is followed.
_LARGEST_FULL = 3000
_WAYS_OUT = (
    "use fewer samples, a smaller rank, float32, fewer recorded steps or no outputs, or "
    "stochastic_flow.ensemble"
)


class Moments(NamedTuple):
    """Predicted statistics over time; a pytree.

    ``loss`` and ``loss_std`` are mean and standard deviation of the reduced training loss,
    ``accuracy`` the mean accuracy, with test twins; ``mean`` ``(T, N, K)`` and ``covariance``
    ``(T, N K, N K)`` those of the outputs, train before test, on request. ``truncation`` is the
    share of the variance whose correlations are dropped, 0 with the whole covariance. ``steps`` is
    None in flow time.

    Made by :func:`moments`, :func:`moment_flow` and :func:`fixed_privacy_flow`.
    """

    times: Array
    steps: Array | None
    loss: Array
    loss_std: Array
    accuracy: Array | None
    test_loss: Array | None
    test_loss_std: Array | None
    test_accuracy: Array | None
    mean: Array | None
    covariance: Array | None
    truncation: Array

    def band(self, level: float = 0.9, *, test: bool = False) -> tuple[Any, Any]:
        """Lower and upper quantile of the loss: of the gamma law with its mean and deviation."""
        from scipy.stats import gamma

        level = float(validate.fraction(level=level))
        chosen = (self.test_loss, self.test_loss_std) if test else (self.loss, self.loss_std)
        if chosen[0] is None:
            raise ValueError("test=True needs a flow with test targets")
        mean, std = (np.asarray(values) for values in chosen)
        certain = std <= 0
        shape = (mean / np.where(certain, 1.0, std)) ** 2
        low, high = (
            np.where(certain, mean, gamma.ppf(part, shape, scale=mean / shape))
            for part in ((1 - level) / 2, (1 + level) / 2)
        )
        return low, high


def moments(
    flow: Any,
    initial: Any,
    *,
    learning_rate: Any,
    steps: int,
    noise_multiplier: Any = 0.0,
    sample_rate: float = 1.0,
    noise_kernel: Any = None,
    noise_per_group: bool = False,
    rank: int | None = None,
    record_every: int = 1,
    outputs: bool = False,
    progress: Any = False,
) -> Moments:
    r"""Mean and spread of noisy training, step by step, without drawing a run.

    Parameters
    ----------
    flow, initial, learning_rate, steps, noise_multiplier, sample_rate, noise_kernel, \
    noise_per_group, record_every, progress
        As for :func:`ensemble`.
    rank : int, optional
        Modes of the noise that are followed with all their correlations; the others are followed
        each by itself. By default all of them up to N K = 3000 outputs of train and test points,
        beyond it as many as hold 99% of the noise's trace, up to 500; N K means all.
    outputs : bool
        Record mean and covariance of the outputs too.

    Returns
    -------
    Moments
        Times are the running sum of the learning rate.

    Raises
    ------
    ValueError, TypeError
        As for :func:`ensemble`; a rule with jumps (`Global`) or that couples the samples (`Batch`),
        for which :func:`ensemble` is the way.

    Notes
    -----
    *Derived*: Gaussian closure, exact in the mean and covariance for squared loss while nothing is
    clipped; see the modules ``_gaussian_closure`` for the equations, ``_excess_variance`` for the
    spread of the loss and ``_low_rank_covariance`` for that of low rank. A step takes about ten
    products of ``(N K, N K)`` matrices with the whole covariance, ``n K rank^2`` with a rank.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> flow = ntkdp.KernelFlow(jnp.eye(1), jnp.zeros((1, 1)), ntkdp.losses.SquaredError(),
    ...                         ntkdp.clipping.Abadi(10.0), reduction="sum")
    >>> found = ntkdp.stochastic_flow.moments(
    ...     flow, jnp.array([[1.0]]), learning_rate=0.5, steps=1, noise_multiplier=0.1)
    >>> [round(v, 4) for v in found.loss.tolist()]
    [0.5, 0.25]
    """
    stepping = Stepping(learning_rate, steps, record_every)
    noise_multiplier = privacy.as_noise_multiplier(noise_multiplier, stepping.steps, sample_rate)
    closure, mean = _closure(
        flow, initial, noise_multiplier, sample_rate, noise_kernel, noise_per_group, rank
    )
    with _progress.listening(progress, "stepping the moments") as listener:
        found = program_memory.call(
            _step_moments, closure, mean, stepping, outputs, listener,
            what=f"moments of {mean.size:,} outputs", ways_out=_WAYS_OUT,
            results=len(stepping.recorded) * _bytes_at_a_time(mean, outputs),
            work=mean.size**2 * mean.dtype.itemsize,
        )  # fmt: skip
        return Moments(stepping.times, jnp.asarray(stepping.recorded), *devices.whole(found))


def moment_flow(
    flow: Any,
    initial: Any,
    times: Any,
    *,
    learning_rate: float,
    start: Any = 0.0,
    noise_multiplier: Any = 0.0,
    sample_rate: float = 1.0,
    noise_kernel: Any = None,
    noise_per_group: bool = False,
    rank: int | None = None,
    outputs: bool = False,
    rtol: float = 1e-5,
    atol: float = 1e-8,
) -> Moments:
    r"""Mean and spread of noisy training in flow time.

    The noise of a learning rate :math:`\eta` enters as :math:`\sqrt\eta\, Q^{1/2} dB`, the drift is
    that of the flow: what is left of :func:`moments` to first order in the learning rate.

    Parameters
    ----------
    flow, initial, noise_multiplier, sample_rate, noise_kernel, noise_per_group, rank, outputs
        As for :func:`moments`.
    times : array
        Increasing, none before ``start``. In units of learning rate times steps.
    learning_rate : float
        The learning rate whose noise it is.
    start : float
        Time of the initial state, 0 as in a run; it need not be among ``times``.
    rtol, atol : float
        Tolerances of the solver.

    Returns
    -------
    Moments
        ``steps`` is None.

    Raises
    ------
    ValueError, TypeError
        As for :func:`moments`; times that do not increase or begin before the start.

    Notes
    -----
    *Derived*; by diffrax.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> flow = ntkdp.KernelFlow(jnp.eye(1), jnp.zeros((1, 1)), ntkdp.losses.SquaredError(),
    ...                         ntkdp.clipping.Abadi(100.0), reduction="sum")
    >>> found = ntkdp.stochastic_flow.moment_flow(
    ...     flow, jnp.zeros((1, 1)), [0.0, 20.0], learning_rate=0.1, noise_multiplier=0.01)
    >>> round(found.loss[-1].item(), 4)
    0.025
    """
    start, times = validate.times_from(start, times)
    rate = jnp.asarray(validate.positive(learning_rate=learning_rate), jnp.result_type(float))
    rtol, atol = validate.positive(rtol=rtol), validate.positive(atol=atol)
    closure, mean = _closure(
        flow, initial, noise_multiplier, sample_rate, noise_kernel, noise_per_group, rank
    )
    found = program_memory.call(
        _solve_moments, closure, mean, start, times, rate, as_constant(rtol), as_constant(atol),
        outputs,
        what=f"moments of {mean.size:,} outputs", ways_out=_WAYS_OUT,
        results=len(times) * _bytes_at_a_time(mean, outputs),
        work=mean.size**2 * mean.dtype.itemsize,
    )  # fmt: skip
    return Moments(times, None, *devices.whole(found))


def fixed_privacy_flow(
    flow: Any,
    initial: Any,
    times: Any,
    *,
    mu: Any,
    start: Any = 0.0,
    noise_kernel: Any = None,
    noise_per_group: bool = False,
    rank: int | None = None,
    outputs: bool = False,
    rtol: float = 1e-5,
    atol: float = 1e-8,
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
        Increasing, none before ``start``. From the start to the last of them is the horizon T that
        the budget is spent on.
    mu : float or privacy.Budget
        :math:`\mu`-GDP, neighbours differing by one sample added or removed. Of an (epsilon, delta)
        budget its ``mu``, which is exact for full batches.
    start : float
        Time of the initial state, 0 as in a run; it need not be among ``times``.

    Returns
    -------
    Moments
        ``steps`` is None.

    Raises
    ------
    ValueError, TypeError
        As for :func:`moment_flow`; mu not positive.

    Notes
    -----
    *Derived.*

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> flow = ntkdp.KernelFlow(jnp.eye(1), jnp.zeros((1, 1)), ntkdp.losses.SquaredError(),
    ...                         ntkdp.clipping.Abadi(100.0), reduction="sum")
    >>> found = ntkdp.stochastic_flow.fixed_privacy_flow(
    ...     flow, jnp.zeros((1, 1)), [0.0, 25.0], mu=1000.0)
    >>> round(found.loss[-1].item(), 4)  # S^2 T / (4 mu^2)
    0.0625
    """
    start, times = validate.times_from(start, times)
    mu = mu.mu if isinstance(mu, privacy.Budget) else mu
    mu = validate.scalar(mu=validate.positive(mu=mu))
    horizon = float(times[-1]) - float(start)
    return moment_flow(
        flow,
        initial,
        times,
        # Steps of any length do: the noise over a unit of time is the same.
        learning_rate=1.0,
        start=start,
        noise_multiplier=np.sqrt(horizon) / mu,
        noise_kernel=noise_kernel,
        noise_per_group=noise_per_group,
        rank=rank,
        outputs=outputs,
        rtol=rtol,
        atol=atol,
    )


def _closure(
    flow: Any,
    initial: Any,
    sigma: Any,
    sample_rate: Any,
    noise_kernel: Any,
    per_group: bool,
    rank: Any,
) -> tuple[Closure, Array]:
    """The closure of a flow, and the mean of all points at the start."""
    flow = check_kernel_flow(flow)
    if isinstance(flow.clipping, Global | Batch):
        raise ValueError(
            "flow must have a rule that is continuous and looks at one sample, got "
            f"{type(flow.clipping).__name__}; use stochastic_flow.ensemble"
        )
    rank = None if rank is None else validate.count(rank=rank)
    sample_rate, divisor = sampling(flow, sample_rate)
    train, test = flow.init(initial)
    mean = train if test is None else jnp.concatenate([train, test])
    covariance = noise_covariance(flow, sigma, noise_kernel, per_group)
    noise = None if covariance is None else covariance / divisor**2
    n_outputs = mean.shape[1]
    if mean.size <= (_LARGEST_FULL if rank is None else rank):
        form: CovarianceForm = full_covariance.full(flow, noise, n_outputs)
    else:
        form = low_rank_covariance.low_rank(flow, noise, n_outputs, rank)
    points, weights = gaussian_closure.integration_points(n_outputs)
    closure = Closure(
        flow=flow,
        form=form,
        sample_rate=sample_rate,
        points=jnp.asarray(points, mean.dtype),
        weights=jnp.asarray(weights, mean.dtype),
    )
    return closure, mean


def _bytes_at_a_time(mean: Array, outputs: bool) -> int:
    """Bytes that are recorded at a time: mean and covariance of the outputs, on request."""
    return (mean.size + mean.size**2 if outputs else 1) * mean.dtype.itemsize


@eqx.filter_jit
def _step_moments(
    closure: Closure, mean: Array, stepping: Stepping, outputs: bool, listener: Listener
) -> Statistics:
    def step(k: Any, state: State) -> State:
        return closure.step(state, jnp.asarray(stepping.rate(k), mean.dtype))

    measured: Statistics = stepping.walk(
        step, lambda state: closure.measure(state, outputs), closure.zero(mean), listener
    )
    return measured


@eqx.filter_jit
def _solve_moments(
    closure: Closure,
    mean: Array,
    start: Array,
    times: Array,
    rate: Array,
    rtol: Any,
    atol: Any,
    outputs: bool,
) -> Statistics:
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, state, args: closure.velocity(state, rate)),
        diffrax.Tsit5(),
        t0=start,
        t1=times[-1],
        dt0=None,
        y0=closure.zero(mean),
        saveat=diffrax.SaveAt(ts=times, fn=lambda t, state, args: closure.measure(state, outputs)),
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
        max_steps=100_000,
    )
    found: Statistics = solution.ys
    return found
