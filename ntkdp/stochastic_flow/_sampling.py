"""Poisson sampling: its rate, the divisor of the noisy sum, and the weights of a drawn batch."""

import jax
from jax.typing import DTypeLike

from ntkdp._backend import validate
from ntkdp._backend.types import Array, Float, PRNGKeyArray
from ntkdp.gradient_flow import LinearModelFlow


def sampling(flow: LinearModelFlow, sample_rate: float) -> tuple[float, float]:
    """The sampling rate, checked, and the divisor of the noisy sum."""
    rate = float(validate.scalar(sample_rate=validate.fraction(sample_rate=sample_rate)))
    return rate, rate * flow.data.divisor


def batch_weights(
    key: PRNGKeyArray, sample_rate: float, n_samples: int, dtype: DTypeLike
) -> Float[Array, " n"]:
    """Weights of the samples of a drawn batch: one over the rate if it is drawn, or else zero."""
    drawn = jax.random.bernoulli(key, sample_rate, (n_samples,))
    return drawn.astype(dtype) / sample_rate
