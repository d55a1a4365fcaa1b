r"""Mean and covariance of noisy training under a frozen kernel, by Gaussian closure.

With outputs :math:`f \sim N(m, \Sigma)` and clipped output gradients
:math:`\varphi_{ir} = C_{ir} a_i`, functions of one sample's outputs, a step gives

.. math:: m^+ = m - \tfrac{\eta}{n} \sum_r H_r \bar\varphi_r, \qquad
          \Sigma^+ = (1 + \eta A)\, \Sigma\, (1 + \eta A)^\top + \eta^2 Q, \qquad
          A = -\tfrac1n \sum_r H_r G_r,

with :math:`\bar\varphi = E \varphi` and :math:`G = E\,\partial\varphi` over each sample's own
Gaussian. These are numerical integrals, so the mean is corrected to second order and beyond, and
the kinks of clipping are averaged. Q holds the noise, :math:`(\sigma S/B)^2 H`, the sampling,
:math:`\tfrac{1}{n^2}(\tfrac1q - 1) \sum_i E\, d_i d_i^\top` with
:math:`d_i = \sum_r H_r(\cdot, i) \varphi_{ir}`, and, in discrete steps, the variance of
:math:`\varphi` that its linear part does not explain. Batches of a fixed size take off a share of
the second moment of :math:`\sum_i d_i`, see ``sampling``. In flow time
:math:`\dot\Sigma = A\Sigma + \Sigma A^\top + \eta Q`. The excess of the loss's variance over that
of a Gaussian has an equation of its own, see ``excess_variance``.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ntkdp._backend import decompositions, devices
from ntkdp._backend.norms import through_kernel
from ntkdp._backend.types import Array, Float, PyTree
from ntkdp.gradient_flow import KernelFlow
from ntkdp.losses import divisor
from ntkdp.stochastic_flow._moments import excess_variance
from ntkdp.stochastic_flow._moments.covariance import Covariance, CovarianceForm
from ntkdp.stochastic_flow._moments.excess_variance import Links
from ntkdp.stochastic_flow._moments.sampling import Sampling

#: Nodes of the Gauss-Hermite rule for one output.
_NODES = 101
#: Nodes of the Gauss-Hermite rule on each axis for two outputs.
_NODES_OF_TWO = 21
#: Quasi-random points for more than two outputs.
_POINTS = 256
#: Number of outputs up to which the points are dense enough for Stein's identity.
_MOST_OF_STEIN = 2
#: Standard deviation, relative to one and the gradients, below which Stein's identity loses digits.
_NARROW = 1e-6
#: Most numbers that the integrals of the samples may hold at once.
_NUMBERS = 2**25

_Result = TypeVar("_Result")


class Statistics(NamedTuple):
    """Statistics of a Gaussian state, as in :class:`Moments`; stacked, with a leading time axis."""

    loss: Array
    loss_std: Array
    accuracy: Array | None
    test_loss: Array | None
    test_loss_std: Array | None
    test_accuracy: Array | None
    mean: Array | None
    covariance: Array | None
    truncation: Array


class State(NamedTuple):
    """Mean ``(N, K)``, covariance in its form, and excess variances of the summed losses."""

    mean: Array
    covariance: Covariance
    excess: Array


class Integrals(NamedTuple):
    """Integrals of the samples' clipped gradients over each sample's own Gaussian.

    ``unexplained`` is the covariance of the gradients that their linear part does not explain.
    """

    mean: Float[Array, "*n R K"]
    slope: Float[Array, "*n R K K"]
    second_moment: Float[Array, "*n R K R K"]
    unexplained: Float[Array, "*n R K R K"]


class _Drawn(NamedTuple):
    """Integration points of a sample's Gaussian, standard ones and in its outputs, and its axes."""

    axes: Float[Array, "K K"]
    deviations: Float[Array, " K"]
    standard: Float[Array, "p K"]
    outputs: Float[Array, "p K"]


class _LossExpansion(NamedTuple):
    """Samples' mean losses, expanded about the mean outputs to second order, and accuracies.

    ``excess`` is the variance of a sample's own loss in excess of the expansion's.
    """

    mean: Float[Array, "*n"]
    gradient: Float[Array, "*n K"]
    hessian: Float[Array, "*n K K"]
    excess: Float[Array, "*n"]
    accuracy: Float[Array, "*n"] | None


class _Part(NamedTuple):
    """The training or the test points: rows of the mean, and targets of the loss."""

    test: bool
    rows: slice
    targets: Array


class Closure(eqx.Module):
    """Drift and diffusion of a Gaussian state over all points, train before test."""

    flow: KernelFlow
    form: CovarianceForm
    sampling: Sampling = eqx.field(static=True)
    points: Float[Array, "p K"]
    weights: Float[Array, " p"]

    def _clipped(self, outputs: Array, targets: Array, diagonal: Array) -> Array:
        """One sample's clipped output gradients, ``(R, K)``."""
        flow = self.flow
        a = flow.loss.output_gradient(outputs[None], targets[None])[0]
        factors = flow.clipping.by_group(through_kernel(diagonal[:, None], a[None]))[:, 0]
        return factors[:, None] * a[None]

    def _draw(self, mean: Array, own: Array) -> _Drawn:
        """Integration points of a sample's Gaussian.

        They are mapped by the symmetric root of the covariance ``own``, which does not depend on
        the choice of its axes and varies smoothly with it.
        """
        axes, deviations = _principal_axes(own)
        points = self.points @ axes
        return _Drawn(
            axes=axes,
            deviations=deviations,
            standard=points,
            outputs=mean[None] + (points * deviations[None]) @ axes.T,
        )

    def _mean_slope(
        self, drawn: _Drawn, clipped: Float[Array, "p R K"], slopes: Float[Array, "p R K K"]
    ) -> Float[Array, "R K K"]:
        r"""Expected derivative of one sample's clipped gradients.

        If the Gaussian is wide the derivative is a spike that falls between the points, so Stein's
        identity is used, :math:`E\,\partial\varphi = E[\varphi\,(f - m)^\top] \Sigma^{-1}`. If it
        is narrow the derivative itself is integrated.
        """
        axes, deviations = drawn.axes, drawn.deviations
        direct = jnp.einsum("p,prkl->rkl", self.weights, slopes)
        if self.points.shape[1] > _MOST_OF_STEIN:
            return direct
        wide = deviations > _NARROW * (1 + jnp.max(jnp.abs(clipped)))
        products = jnp.einsum("p,prk,pl->rkl", self.weights, clipped, drawn.standard)
        along = jnp.where(
            wide, products / jnp.where(wide, deviations, 1.0)[None, None], direct @ axes
        )
        return along @ axes.T

    def integrals(self, mean: Array, own: Array) -> Integrals:
        """Integrals of clipped gradients over each sample's Gaussian, of covariance ``own``."""
        flow = self.flow

        def integrate(sample: tuple[Array, Array, Array, Array]) -> Integrals:
            mean, own, targets, diagonal = sample

            def clip(outputs: Array) -> Array:
                return self._clipped(outputs, targets, diagonal)

            drawn = self._draw(mean, own)
            clipped = jax.vmap(clip)(drawn.outputs)
            slopes = jax.vmap(jax.jacfwd(clip))(drawn.outputs)
            first = jnp.einsum("p,prk->rk", self.weights, clipped)
            slope = self._mean_slope(drawn, clipped, slopes)
            second = jnp.einsum("p,prk,psl->rksl", self.weights, clipped, clipped)
            linear = jnp.einsum("rka,ab,slb->rksl", slope, own, slope)
            centred = second - jnp.einsum("rk,sl->rksl", first, first)
            return Integrals(
                mean=first, slope=slope, second_moment=second, unexplained=centred - linear
            )

        n = flow.targets.shape[0]
        samples = (mean[:n], own[:n], flow.targets, jnp.moveaxis(flow.diagonal, 1, 0))
        return self._over_samples(integrate, samples)

    def _over_samples(self, function: Callable[[PyTree], _Result], samples: PyTree) -> _Result:
        """Map ``function`` over samples, as many at a time as fit in little memory."""
        n_groups, n_outputs = self.flow.n_terms, self.points.shape[1]
        numbers = self.weights.size * n_groups * n_outputs * (n_outputs + 1)
        at_a_time = max(1, _NUMBERS // numbers)

        mesh = self.flow.mesh

        def map_own(samples: PyTree) -> _Result:
            if at_a_time >= jax.tree.leaves(samples)[0].shape[0]:
                mapped = jax.vmap(function)(samples)
            else:
                mapped = lax.map(function, samples, batch_size=at_a_time)
            whole: _Result = jax.tree.map(lambda own: devices.gathered(mesh, own), mapped)
            return whole

        return devices.over_samples(map_own, mesh, (0,), None)(samples)

    def zero(self, mean: Array) -> State:
        """The state of outputs that are known exactly."""
        count = 1 if self.flow.test_targets is None else 2
        return State(mean, self.form.zero(), jnp.zeros(count, mean.dtype))

    def velocity(self, state: State, rate: Array) -> State:
        """Time derivative in flow time, with the noise that belongs to this learning rate."""
        mean, covariance, excess = state
        own = self.form.own_blocks(covariance)
        integrals = self.integrals(mean, own)
        sampled = self.sampling.alone * integrals.second_moment
        coefficients, source = self.excess_rates(state, own, rate)
        return State(
            mean=self.form.drift(integrals.mean),
            covariance=self.form.velocity(covariance, integrals.slope, sampled, rate),
            excess=2 * coefficients * excess + source,
        )

    def _parts(self) -> list[_Part]:
        """The training points, and the test points if they have targets."""
        n = self.flow.targets.shape[0]
        parts = [_Part(False, slice(0, n), self.flow.targets)]
        if self.flow.test_targets is not None:
            rows = slice(n, n + self.flow.test_targets.shape[0])
            parts.append(_Part(True, rows, self.flow.test_targets))
        return parts

    def excess_rates(self, state: State, own: Array, rate: Array) -> tuple[Array, Array]:
        """Coefficient and source of the excess variance of each loss."""
        flow, n = self.flow, self.flow.targets.shape[0]

        def integrate(sample: tuple[Array, Array, Array, Array, Links]) -> Array:
            mean, own, targets, diagonal, links = sample
            drawn = self._draw(mean, own)
            clipped = jax.vmap(lambda outputs: self._clipped(outputs, targets, diagonal))(
                drawn.outputs
            )
            return excess_variance.of_sample(
                links, drawn.axes, drawn.deviations, clipped, drawn.standard, self.weights
            )

        rates = []
        for part in self._parts():
            expansion = self._expand(state.mean[part.rows], own[part.rows], part.targets)
            around = (state.covariance, part.test, expansion.gradient, expansion.hessian)
            links = self.form.links(*around)
            diagonal = jnp.moveaxis(flow.diagonal, 1, 0)
            samples = (state.mean[:n], own[:n], flow.targets, diagonal, links)
            variance = self.form.variance(*around)
            terms = self._over_samples(integrate, samples)
            rates.append(excess_variance.rates(terms, variance, self.sampling.alone, rate))
        coefficients, sources = zip(*rates, strict=True)
        return jnp.stack(coefficients), jnp.stack(sources)

    def measure(self, state: State, outputs: bool) -> Statistics:
        """Mean and standard deviation of the losses, and mean accuracies."""
        mean, covariance, excess = state
        own = self.form.own_blocks(covariance)
        losses = [
            self._loss_statistics(state, own, part, part_excess)
            for part, part_excess in zip(self._parts(), excess, strict=True)
        ]
        loss, std, accuracy = losses[0]
        test_loss, test_std, test_accuracy = losses[1] if len(losses) == 2 else (None, None, None)
        return Statistics(
            loss=loss,
            loss_std=std,
            accuracy=accuracy,
            test_loss=test_loss,
            test_loss_std=test_std,
            test_accuracy=test_accuracy,
            mean=mean if outputs else None,
            covariance=self.form.matrix(covariance) if outputs else None,
            truncation=self.form.truncation(covariance),
        )

    def _loss_statistics(
        self, state: State, own: Array, part: _Part, excess: Array
    ) -> tuple[Array, Array, Array | None]:
        """Mean and standard deviation of the reduced loss, and mean accuracy.

        The covariance of two samples' losses is taken from their second-order expansions; a
        sample's own variance is integrated.
        """
        expansion = self._expand(state.mean[part.rows], own[part.rows], part.targets)
        variance = self.form.variance(
            state.covariance, part.test, expansion.gradient, expansion.hessian
        )
        total = variance + jnp.sum(expansion.excess) + excess
        scale = 1 / divisor(self.flow.reduction, expansion.mean.shape[0])
        std = scale * jnp.sqrt(jnp.maximum(total, 0.0))
        accuracy = None if expansion.accuracy is None else jnp.mean(expansion.accuracy)
        return scale * jnp.sum(expansion.mean), std, accuracy

    def _expand(self, mean: Array, own: Array, targets: Array) -> _LossExpansion:
        """Expand the losses of samples over each one's Gaussian, of covariance ``own``."""
        loss = self.flow.loss

        def expand(sample: tuple[Array, Array, Array]) -> _LossExpansion:
            mean, own, target = sample
            drawn = self._draw(mean, own).outputs
            repeated = jnp.broadcast_to(target, (drawn.shape[0], *target.shape))
            values = loss(drawn, repeated)

            def gradient(f: Array) -> Array:
                return loss.output_gradient(f[None], target[None])[0]

            first = values @ self.weights
            g = self.weights @ jax.vmap(gradient)(drawn)
            W = jnp.einsum("p,pkl->kl", self.weights, jax.vmap(jax.jacfwd(gradient))(drawn))
            through = W @ own
            expanded = g @ own @ g + 0.5 * jnp.sum(through * through.T)
            correct = loss.correct(drawn, repeated)
            return _LossExpansion(
                mean=first,
                gradient=g,
                hessian=W,
                excess=(values - first) ** 2 @ self.weights - expanded,
                accuracy=None if correct is None else correct @ self.weights,
            )

        return self._over_samples(expand, (mean, own, targets))


def _principal_axes(covariance: Float[Array, "K K"]) -> tuple[Array, Array]:
    """Axes as columns of unit length, and the standard deviations along them."""
    values, vectors = decompositions.eigh(covariance)
    return vectors, jnp.sqrt(jnp.maximum(values, 0))


def integration_points(n_outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Points and weights for integrals over the standard normal law in K dimensions."""
    if n_outputs <= 2:
        nodes = _NODES if n_outputs == 1 else _NODES_OF_TWO
        axis, weight = np.polynomial.hermite_e.hermegauss(nodes)
        weight = weight / weight.sum()
        grids = np.meshgrid(*[axis] * n_outputs, indexing="ij")
        products = np.meshgrid(*[weight] * n_outputs, indexing="ij")
        points = np.stack([grid.ravel() for grid in grids], axis=1)
        return points, np.prod([product.ravel() for product in products], axis=0)
    from scipy.stats import norm, qmc

    half = norm.ppf(qmc.Sobol(n_outputs, seed=0).random(_POINTS // 2))
    points = np.concatenate([half, -half])
    # The mean is zero by symmetry; a linear map makes the covariance one.
    values, vectors = np.linalg.eigh(points.T @ points / len(points))
    points = points @ (vectors / np.sqrt(values)) @ vectors.T
    return points, np.full(len(points), 1 / len(points))
