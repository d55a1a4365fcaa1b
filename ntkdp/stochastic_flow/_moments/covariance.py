"""How the covariance of noisy outputs is represented: what the moments ask of it."""

from abc import abstractmethod
from typing import Any

import equinox as eqx

from ntkdp._backend.types import Array, Float
from ntkdp.stochastic_flow._moments.excess_variance import Links


class CovarianceForm(eqx.Module):
    """How the covariance of all points is represented: a pytree whose steps this knows."""

    @abstractmethod
    def zero(self) -> Any:
        """Covariance of outputs that are known."""

    @abstractmethod
    def own_blocks(self, covariance: Any) -> Float[Array, "N K K"]:
        """Each point's own covariance."""

    @abstractmethod
    def drift(self, clipped: Float[Array, "n R K"]) -> Float[Array, "N K"]:
        """Velocity of the mean, of mean clipped gradients."""

    @abstractmethod
    def step(self, covariance: Any, slope: Array, spread: Array, rate: Array) -> Any:
        """After a step; ``spread`` is the covariance of each sample's part, ``(n, R, K, R, K)``."""

    @abstractmethod
    def velocity(self, covariance: Any, slope: Array, spread: Array, rate: Array) -> Any:
        """In flow time."""

    @abstractmethod
    def variance(self, covariance: Any, test: bool, g: Array, W: Array) -> Array:
        r"""Variance of :math:`\sum_i g_i^\top x_i + \tfrac12 x_i^\top W_i x_i`.

        Over the training points, or the test points.
        """

    @abstractmethod
    def links(self, covariance: Any, test: bool, g: Array, W: Array) -> Links:
        """How each training sample bears on that sum."""

    @abstractmethod
    def matrix(self, covariance: Any) -> Float[Array, "NK NK"]:
        """The whole covariance."""

    @abstractmethod
    def truncation(self, covariance: Any) -> Float[Array, ""]:
        """Share of the variance whose correlations are dropped."""
