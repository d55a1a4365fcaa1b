"""Poisson sampling: its rate, and the divisor of the noisy sum."""

from ntkdp._backend import validate
from ntkdp.gradient_flow import LinearModelFlow


def sampling(flow: LinearModelFlow, sample_rate: float) -> tuple[float, float]:
    """The sampling rate, checked, and the divisor of the noisy sum."""
    rate = float(validate.scalar(sample_rate=validate.fraction(sample_rate=sample_rate)))
    return rate, rate * flow.data.divisor
