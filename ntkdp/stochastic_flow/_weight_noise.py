"""The noise that DP-SGD adds to the weights, and how it accumulates."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from ntkdp import privacy
from ntkdp._backend import memory, validate
from ntkdp._backend.types import Array, Float
from ntkdp.clipping import ClippingRule
from ntkdp.losses import Reduction
from ntkdp.trajectory import check_learning_rate, check_steps, times_of_steps

#: Numbers of each step, and of each group in it, that are alive at once.
_ARRAYS = 4


def deviations(
    rule: ClippingRule, noise_multiplier: Any, n_groups: int, per_group: bool
) -> Float[Array, " R"]:
    """Standard deviations of the noise of the summed gradient by group, zero without noise."""
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
    learning_rate: Any,
    steps: int,
    noise_multiplier: Any,
    sample_rate: float = 1.0,
    n_groups: int = 1,
    noise_per_group: bool = False,
    reduction: Reduction = "mean",
) -> Float[Array, "T R"]:
    r"""Variance of the noise that every weight has gathered, :math:`v_k = \sum_j s_j^2`.

    With :math:`s_j = \eta_j \sigma S / (q n)`, or :math:`\eta_j \sigma S / q` for the sum form.
    In NTK parameterisation weights start with variance one, so v says when noise moves the kernel:
    a frozen one is good while v is small beside one, at any width.

    Parameters
    ----------
    rule : ClippingRule
        Gives the sensitivity S.
    n_samples : int
        n.
    learning_rate : float or optax schedule
        :math:`\eta_j`.
    steps : int
        At least 1.
    noise_multiplier : float or privacy.Budget
        :math:`\sigma`; a budget is spent on all the steps.
    sample_rate : float
        q in (0, 1].
    n_groups : int
        Parameter groups, for a layerwise rule.
    noise_per_group : bool
        Noise of group r in proportion to its own R_r, as in ``dp_sgd.run``.
    reduction : {"mean", "sum"}
        Of the loss.

    Returns
    -------
    array
        ``(steps + 1, R)``, from 0 at the start, a column a group; equal ones unless
        ``noise_per_group``.

    Raises
    ------
    ValueError, TypeError
        As for ``dp_sgd.run``.

    Notes
    -----
    *Derived*. Full batches with :math:`\mu`-GDP over the horizon T: :math:`v(T) = (T S/(n \mu))^2`
    whatever the learning rate is.

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
    q = validate.scalar(sample_rate=validate.fraction(sample_rate=sample_rate))
    validate.choice(("mean", "sum"), reduction=reduction)
    noise_multiplier = privacy.as_noise_multiplier(noise_multiplier, steps, float(q))
    stds = deviations(rule, noise_multiplier, n_groups, noise_per_group)
    rates = jnp.diff(times_of_steps(learning_rate, np.arange(steps + 1)))
    divisor = q * (n if reduction == "mean" else 1)
    gathered = jnp.cumsum((rates[:, None] * stds[None] / divisor) ** 2, axis=0)
    return jnp.concatenate([jnp.zeros((1, n_groups), gathered.dtype), gathered])


def variance_of_budget(
    rule: ClippingRule,
    n_samples: int,
    budget: privacy.Budget,
    horizon: float,
    n_groups: int,
    reduction: Reduction,
) -> float:
    """Variance that every weight gathers where full batches spend a budget over a horizon."""
    if not rule.bounds_each_sample:
        raise ValueError(
            f"variance must be a number with {type(rule).__name__}, whose sensitivity is "
            f"unbounded, got {budget}; clip each sample, e.g. with Abadi"
        )
    assert budget.mu is not None
    divisor = n_samples if reduction == "mean" else 1
    return (horizon * float(rule.sensitivity(n_groups)) / (divisor * budget.mu)) ** 2
