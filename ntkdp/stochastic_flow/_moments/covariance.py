"""What the moments need of a covariance of noisy outputs, however it is represented."""

from abc import abstractmethod
from typing import NamedTuple, TypeAlias

import equinox as eqx

from ntkdp._backend.types import Array, Float, PyTree
from ntkdp.stochastic_flow._moments.excess_variance import Links

#: A covariance of all points, as its form represents it.
Covariance: TypeAlias = PyTree
#: Covariances of all that a :class:`Step` moves, each part with each: outputs first.
Joint: TypeAlias = PyTree


class Step(NamedTuple):
    r"""A step :math:`z^+ = M z + b\,\text{gradient} + e\,\text{noise}` of all that is followed.

    z holds what the optimizer holds of the outputs, and after it what correlated noise carries.
    """

    of_state: Float[Array, "C C"]
    of_gradient: Float[Array, " C"]
    of_noise: Float[Array, " C"]


class Tied(NamedTuple):
    """How much less the summed gradient varies because samples keep each other out of a batch.

    It is ``weight`` times the second moment of the sum, without the part that ``spread`` holds;
    ``mean`` are the samples' mean clipped gradients.
    """

    weight: float
    mean: Float[Array, "n R K"]


class CovarianceForm(eqx.Module):
    """A representation of the covariance of all points as a pytree, and how a step changes it."""

    @abstractmethod
    def zero(self) -> Covariance:
        """The covariance of outputs that are known exactly."""

    @abstractmethod
    def joint_zero(self, size: int) -> Joint:
        """The joint covariance of ``size`` parts that are known exactly."""

    @abstractmethod
    def part(self, joint: Joint, number: int) -> Covariance:
        """The covariance of a part with itself."""

    @abstractmethod
    def own_blocks(self, covariance: Covariance) -> Float[Array, "N K K"]:
        """Each point's own covariance."""

    @abstractmethod
    def drift(self, clipped: Float[Array, "n R K"]) -> Float[Array, "N K"]:
        """Velocity of the mean under mean clipped gradients."""

    @abstractmethod
    def step(
        self, joint: Joint, slope: Array, spread: Array, step: Step, tied: Tied | None = None
    ) -> Joint:
        """The joint covariance after a step.

        ``spread`` is the covariance of each sample's clipped gradient, ``(n, R, K, R, K)``.
        """

    @abstractmethod
    def velocity(
        self, covariance: Covariance, slope: Array, spread: Array, rate: Array
    ) -> Covariance:
        """Time derivative of the covariance in flow time."""

    @abstractmethod
    def variance(self, covariance: Covariance, test: bool, g: Array, W: Array) -> Array:
        r"""Variance of :math:`\sum_i g_i^\top x_i + \tfrac12 x_i^\top W_i x_i`.

        The sum is over the training points, or over the test points.
        """

    @abstractmethod
    def links(self, covariance: Covariance, test: bool, g: Array, W: Array) -> Links:
        """How each training sample affects the sum of :meth:`variance`."""

    @abstractmethod
    def matrix(self, covariance: Covariance) -> Float[Array, "NK NK"]:
        """The covariance as a matrix, train before test."""

    @abstractmethod
    def truncation(self, covariance: Covariance) -> Float[Array, ""]:
        """Share of the variance whose correlations this representation drops."""
