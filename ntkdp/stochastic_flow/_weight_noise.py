"""The noise that DP-SGD adds to the weights, and how it accumulates."""

from typing import TypeAlias

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax

from ntkdp import losses, privacy
from ntkdp._backend import memory, validate
from ntkdp._backend.schedules import Schedule
from ntkdp._backend.types import Array, Float, LearningRate, ScalarLike
from ntkdp.batches import Batches
from ntkdp.batches import resolve as resolve_batches
from ntkdp.clipping import ClippingRule
from ntkdp.losses import Reduction
from ntkdp.noise import Independent, Noise
from ntkdp.noise import resolve as resolve_noise
from ntkdp.optimizers import Optimizer, OptimizerLike, as_linear, size_of_state, transition
from ntkdp.stochastic_flow._linear_filter import linear_filter, mixed
from ntkdp.trajectory import check_learning_rate, check_steps, times_of_steps

#: Noise over sensitivity, or a budget that fixes it.
NoiseMultiplier: TypeAlias = ScalarLike | privacy.Budget
#: The same, or one for each step.
NoiseMultipliers: TypeAlias = NoiseMultiplier | Schedule
#: Arrays over steps and groups that are alive at once.
_ARRAYS = 4


def deviations(
    rule: ClippingRule, noise_multiplier: ScalarLike, n_groups: int, per_group: bool
) -> Float[Array, " R"]:
    """Standard deviations by group of the noise of the summed gradient; zero without noise."""
    sigma = validate.non_negative(noise_multiplier=noise_multiplier)
    sigma = jnp.asarray(validate.scalar(noise_multiplier=sigma), jnp.result_type(float))
    if per_group and rule.scope == "flat":
        raise ValueError("noise_per_group=True needs clipping with scope='layerwise', got 'flat'")
    if not bool(sigma > 0):
        return jnp.zeros(n_groups)
    if not rule.bounds_each_sample:
        raise ValueError(
            f"noise_multiplier must be 0 with {type(rule).__name__}, whose sensitivity is "
            f"unbounded, got {sigma}; clip each sample, e.g. with Abadi"
        )
    if per_group:
        return sigma * jnp.sqrt(n_groups) * jnp.asarray(rule.group_norms(n_groups))
    return jnp.full(n_groups, sigma * jnp.asarray(rule.sensitivity(n_groups)))


def weight_noise_variance(
    rule: ClippingRule,
    n_samples: int,
    *,
    learning_rate: LearningRate,
    steps: int,
    noise_multiplier: NoiseMultiplier,
    sample_rate: float = 1.0,
    batches: Batches | None = None,
    noise: Noise | None = None,
    n_groups: int = 1,
    noise_per_group: bool = False,
    reduction: Reduction = "mean",
    optimizer: OptimizerLike | None = None,
) -> Float[Array, "T R"]:
    r"""Variance of the noise that every weight has accumulated, :math:`v_k = \sum_j s_j^2`.

    Here :math:`s_j = \eta_j \sigma S / (q n)`, or :math:`\eta_j \sigma S / q` with
    ``reduction="sum"``. A linear optimizer passes the noise on as it does gradients,
    :math:`v_k = \sum_j h_{kj}^2 (\sigma S / (q n))^2`, with :math:`h_{kj}` its response at step k
    to a gradient of one at step j: momentum :math:`\beta` multiplies v(T) by about
    :math:`1/(1 - \beta)^2` over many steps. Correlated noise passes through the inverse of its
    strategy first.

    In NTK parameterisation weights start with variance one, so v says how far noise moves the
    kernel, at any width: a frozen one needs a v that is small compared with one. Training moves the
    kernel too, which :func:`diagnose` looks at.

    Parameters
    ----------
    rule : ClippingRule
        The clipping rule, which has the sensitivity S.
    n_samples : int
        Number of samples n.
    learning_rate : float or optax schedule
        The learning rate :math:`\eta_j`.
    steps : int
        At least 1.
    noise_multiplier : float or privacy.Budget
        Noise over sensitivity, :math:`\sigma`; a budget is spent on all the steps.
    sample_rate : float
        The sampling rate q in (0, 1].
    batches : batches.Batches, optional
        One of :mod:`ntkdp.batches`, in place of a sampling rate; q is its share.
    noise : noise.Noise, optional
        One of :mod:`ntkdp.noise`; by default independent.
    n_groups : int
        Number of parameter groups R, for a layerwise rule.
    noise_per_group : bool
        Noise of group r in proportion to its own R_r, as in ``dp_sgd.run``.
    reduction : {"mean", "sum"}
        Whether the loss is averaged over samples or summed.
    optimizer : optimizers.SGD or callable, optional
        A linear optimizer; by default plain SGD.

    Returns
    -------
    array
        ``(steps + 1, R)``: a row for each step, zero at the start, and a column for each group. The
        columns are equal without ``noise_per_group``. It is of the weights at which gradients are
        taken, also if the optimizer averages them.

    Raises
    ------
    ValueError, TypeError
        As for ``dp_sgd.run``; an optimizer that is not linear.

    Notes
    -----
    *Derived*. Of Adam only this is known: where noise dominates the gradients, v(T) is about
    :math:`\eta^2` times the number of steps, whatever the noise is (claim C47).

    For full batches that are :math:`\mu`-GDP over the horizon T, plain steps have
    :math:`v(T) = (T S/(n \mu))^2` whatever the learning rate is.

    Examples
    --------
    >>> import ntkdp
    >>> v = ntkdp.stochastic_flow.weight_noise_variance(
    ...     ntkdp.clipping.Abadi(1.0), 16, learning_rate=0.4, steps=80, noise_multiplier=4.472136)
    >>> round(float(v[-1, 0]), 4)
    1.0
    """
    n = validate.count(n_samples=n_samples)
    steps = check_steps(steps)
    memory.require(
        _ARRAYS * steps * n_groups * np.dtype(float).itemsize,
        f"the variance of the weights at {steps:,} steps",
        "make fewer steps",
    )
    learning_rate = check_learning_rate(learning_rate, steps)
    drawn, added = resolve_batches(batches, sample_rate), resolve_noise(noise)
    drawn.check(n)
    validate.choice(("mean", "sum"), reduction=reduction)
    sigma = privacy.as_noise_multiplier(
        noise_multiplier, steps, batches=drawn, noise=added, n_samples=n
    )
    stds = deviations(rule, sigma, n_groups, noise_per_group)
    rates = jnp.diff(times_of_steps(learning_rate, np.arange(steps + 1)))
    divisor = drawn.share(n) * losses.divisor(reduction, n)
    linear = as_linear(optimizer)
    if not isinstance(added, Independent):
        filter = mixed(linear_filter(linear, learning_rate, steps), added.recursion(steps))
        return jnp.asarray(filter.own_covariances()[:, 0, :1]) * (stds[None] / divisor) ** 2
    if size_of_state(linear) > 1 or linear.decays_weights:
        return _of_unit_noise(linear, rates)[:, None] * (stds[None] / divisor) ** 2
    accumulated = jnp.cumsum((rates[:, None] * stds[None] / divisor) ** 2, axis=0)
    return jnp.concatenate([jnp.zeros((1, n_groups), accumulated.dtype), accumulated])


@eqx.filter_jit
def _of_unit_noise(optimizer: Optimizer, rates: Float[Array, " steps"]) -> Float[Array, " T"]:
    """Variance of a weight after each step if the noise of its gradient has variance one."""
    size = size_of_state(optimizer)

    def step(covariance: Array, rate: Array) -> tuple[Array, Array]:
        matrix, gradient, _ = transition(optimizer, rate)
        after = matrix @ covariance @ matrix.T + jnp.outer(gradient, gradient)
        return after, after[0, 0]

    _, variances = lax.scan(step, jnp.zeros((size, size), rates.dtype), rates)
    return jnp.concatenate([jnp.zeros(1, rates.dtype), variances])


def variance_of_budget(
    rule: ClippingRule,
    n_samples: int,
    budget: privacy.Budget,
    horizon: float,
    n_groups: int,
    reduction: Reduction,
) -> float:
    """Variance that every weight accumulates if full batches spend a budget over a horizon."""
    if not rule.bounds_each_sample:
        raise ValueError(
            f"variance must be a number with {type(rule).__name__}, whose sensitivity is "
            f"unbounded, got {budget}; clip each sample, e.g. with Abadi"
        )
    assert budget.mu is not None
    divisor = losses.divisor(reduction, n_samples)
    return (horizon * float(rule.sensitivity(n_groups)) / (divisor * budget.mu)) ** 2
