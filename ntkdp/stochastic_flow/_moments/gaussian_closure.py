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
:math:`d_i = \sum_r H_r(\cdot, i) \varphi_{ir}`, and, step by step, what the linear part leaves of
the variance of :math:`\varphi`. In flow time
:math:`\dot\Sigma = A\Sigma + \Sigma A^\top + \eta Q`. What the spread of the loss has over that
of a Gaussian is followed beside it, see ``_excess_variance``.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ntkdp._backend import devices
from ntkdp._backend.norms import through_kernel
from ntkdp._backend.types import Array, Float
from ntkdp.gradient_flow import KernelFlow
from ntkdp.stochastic_flow._moments import excess_variance
from ntkdp.stochastic_flow._moments.covariance import CovarianceForm

#: Nodes of the Gauss-Hermite rule for one output and, an axis, for two; points for more.
_NODES, _NODES_OF_TWO, _POINTS = 101, 21, 256
#: Outputs up to which the points are dense enough for Stein's identity, and the deviation, relative
#: to one and the gradients, below which it would lose digits.
_MOST_OF_STEIN, _NARROW = 2, 1e-6
#: Numbers that the integrals of some samples may take at once.
_NUMBERS = 2**25


class Statistics(NamedTuple):
    """What is recorded of a Gaussian state; a leading time axis once stacked."""

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
    """Mean ``(N, K)``, covariance as the form has it, excess variances of the summed losses."""

    mean: Array
    covariance: Any
    excess: Array


class Closure(eqx.Module):
    """Drift and diffusion of a Gaussian state over all points, train before test."""

    flow: KernelFlow
    form: CovarianceForm
    sample_rate: float = eqx.field(static=True)
    points: Float[Array, "p K"]
    weights: Float[Array, " p"]

    def _clipped(self, outputs: Array, targets: Array, diagonal: Array) -> Array:
        """One sample's clipped output gradients, ``(R, K)``."""
        flow = self.flow
        a = flow.loss.output_gradient(outputs[None], targets[None])[0]
        factors = flow.clipping.by_group(through_kernel(diagonal[:, None], a[None]))[:, 0]
        return factors[:, None] * a[None]

    def _draw(self, mean: Array, own: Array) -> tuple[Array, Array, Array, Array]:
        """Axes of a sample's Gaussian, deviations and standard points along them; its points.

        The symmetric root of the covariance, which does not depend on who finds the axes, and
        moves smoothly with it.
        """
        axes, deviations = _principal_axes(own)
        points = self.points @ axes
        return axes, deviations, points, mean[None] + (points * deviations[None]) @ axes.T

    def _mean_slope(
        self, axes: Array, deviations: Array, points: Array, clipped: Array, slopes: Array
    ) -> Array:
        r"""E of the derivative of one sample's clipped gradients, ``(R, K, K)``.

        By Stein's identity, :math:`E\,\partial\varphi = E[\varphi\,(f - m)^\top] \Sigma^{-1}`:
        where the Gaussian is wide, the derivative is a spike that falls between the points. Where
        it is narrow the derivative itself is taken.
        """
        direct = jnp.einsum("p,prkl->rkl", self.weights, slopes)
        if self.points.shape[1] > _MOST_OF_STEIN:
            return direct
        wide = deviations > _NARROW * (1 + jnp.max(jnp.abs(clipped)))
        products = jnp.einsum("p,prk,pl->rkl", self.weights, clipped, points)
        along = jnp.where(
            wide, products / jnp.where(wide, deviations, 1.0)[None, None], direct @ axes
        )
        return along @ axes.T

    def integrals(self, mean: Array, own: Array) -> tuple[Array, Array, Array, Array]:
        """Of clipped gradients over each sample's Gaussian, whose covariance is ``own``.

        Mean ``(n, R, K)``, mean derivative ``(n, R, K, K)``, second moment ``(n, R, K, R, K)``, and
        what the linear part leaves of the covariance.
        """
        flow = self.flow

        def of_sample(sample: tuple[Array, ...]) -> tuple[Array, Array, Array, Array]:
            mean, own, targets, diagonal = sample

            def at(outputs: Array) -> Array:
                return self._clipped(outputs, targets, diagonal)

            axes, deviations, points, drawn = self._draw(mean, own)
            clipped, slopes = jax.vmap(at)(drawn), jax.vmap(jax.jacfwd(at))(drawn)
            first = jnp.einsum("p,prk->rk", self.weights, clipped)
            slope = self._mean_slope(axes, deviations, points, clipped, slopes)
            second = jnp.einsum("p,prk,psl->rksl", self.weights, clipped, clipped)
            linear = jnp.einsum("rka,ab,slb->rksl", slope, own, slope)
            centred = second - jnp.einsum("rk,sl->rksl", first, first)
            return first, slope, second, centred - linear

        n = flow.targets.shape[0]
        samples = (mean[:n], own[:n], flow.targets, jnp.moveaxis(flow.diagonal, 1, 0))
        found: tuple[Array, Array, Array, Array] = self._of_samples(of_sample, samples)
        return found

    def _of_samples(self, function: Any, samples: Any) -> Any:
        """Of each sample, as many at a time as fit in little memory."""
        n_groups, n_outputs = self.flow.n_terms, self.points.shape[1]
        numbers = self.weights.size * n_groups * n_outputs * (n_outputs + 1)
        at_a_time = max(1, _NUMBERS // numbers)

        mesh = self.flow.mesh

        def of_device(samples: Any) -> Any:
            if at_a_time >= jax.tree.leaves(samples)[0].shape[0]:
                found = jax.vmap(function)(samples)
            else:
                found = lax.map(function, samples, batch_size=at_a_time)
            return jax.tree.map(lambda own: devices.gathered(mesh, own), found)

        return devices.over_samples(of_device, mesh, (0,), None)(samples)

    def zero(self, mean: Array) -> State:
        """Outputs that are known."""
        count = 1 if self.flow.test_targets is None else 2
        return State(mean, self.form.zero(), jnp.zeros(count, mean.dtype))

    def step(self, state: State, rate: Array) -> State:
        """One discrete step."""
        mean, covariance, excess = state
        own = self.form.own_blocks(covariance)
        first, slope, second, left_over = self.integrals(mean, own)
        spread = (1 / self.sample_rate - 1) * second + left_over
        coefficients, source = self._excess_rates(state, own, rate)
        factors = jnp.maximum(1 + rate * coefficients, 0)
        return State(
            mean + rate * self.form.drift(first),
            self.form.step(covariance, slope, spread, rate),
            factors**2 * excess + rate * source,
        )

    def velocity(self, state: State, rate: Array) -> State:
        """In flow time, of the process whose noise belongs to this learning rate."""
        mean, covariance, excess = state
        own = self.form.own_blocks(covariance)
        first, slope, second, _ = self.integrals(mean, own)
        sampled = (1 / self.sample_rate - 1) * second
        coefficients, source = self._excess_rates(state, own, rate)
        return State(
            self.form.drift(first),
            self.form.velocity(covariance, slope, sampled, rate),
            2 * coefficients * excess + source,
        )

    def _parts(self) -> list[tuple[bool, slice, Array]]:
        """Whether it is the test part, rows and targets of the losses."""
        n = self.flow.targets.shape[0]
        parts = [(False, slice(0, n), self.flow.targets)]
        if self.flow.test_targets is not None:
            rows = slice(n, n + self.flow.test_targets.shape[0])
            parts.append((True, rows, self.flow.test_targets))
        return parts

    def _excess_rates(self, state: State, own: Array, rate: Array) -> tuple[Array, Array]:
        """Coefficient and source of the excess variance of each loss."""
        flow, n = self.flow, self.flow.targets.shape[0]

        def of_sample(sample: tuple[Any, ...]) -> Array:
            mean, own, targets, diagonal, links = sample
            axes, deviations, points, drawn = self._draw(mean, own)
            clipped = jax.vmap(lambda outputs: self._clipped(outputs, targets, diagonal))(drawn)
            return excess_variance.of_sample(links, axes, deviations, clipped, points, self.weights)

        found = []
        for test, rows, targets in self._parts():
            _, g, W, *_ = self._expand(state.mean[rows], own[rows], targets)
            links = self.form.links(state.covariance, test, g, W)
            diagonal = jnp.moveaxis(flow.diagonal, 1, 0)
            samples = (state.mean[:n], own[:n], flow.targets, diagonal, links)
            variance = self.form.variance(state.covariance, test, g, W)
            parts = self._of_samples(of_sample, samples)
            found.append(excess_variance.rates(parts, variance, self.sample_rate, rate))
        coefficients, sources = zip(*found, strict=True)
        return jnp.stack(coefficients), jnp.stack(sources)

    def measure(self, state: State, outputs: bool) -> Statistics:
        """Mean and standard deviation of the losses, mean accuracies."""
        mean, covariance, excess = state
        own = self.form.own_blocks(covariance)
        found = [
            self._loss_statistics(covariance, test, mean[rows], own[rows], more, targets)
            for (test, rows, targets), more in zip(self._parts(), excess, strict=True)
        ]
        loss, std, accuracy = found[0]
        test_loss, test_std, test_accuracy = found[1] if len(found) == 2 else (None, None, None)
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
        self,
        covariance: Any,
        test: bool,
        mean: Array,
        own: Array,
        excess: Array,
        targets: Array,
    ) -> tuple[Array, Array, Array | None]:
        """Mean and standard deviation of the reduced loss, and mean accuracy.

        The covariance of two samples' losses is that of their second-order expansions, a sample's
        own variance is integrated.
        """
        first, g, W, more, accuracy = self._expand(mean, own, targets)
        total = self.form.variance(covariance, test, g, W) + jnp.sum(more) + excess
        scale = 1 / first.shape[0] if self.flow.reduction == "mean" else 1.0
        std = scale * jnp.sqrt(jnp.maximum(total, 0.0))
        return scale * jnp.sum(first), std, None if accuracy is None else jnp.mean(accuracy)

    def _expand(self, mean: Array, own: Array, targets: Array) -> tuple[Any, ...]:
        """Samples' mean losses, mean first and second derivatives, what the variance has over that
        of the expansion, and mean accuracies.
        """
        loss = self.flow.loss

        def of_sample(sample: tuple[Array, ...]) -> tuple[Any, ...]:
            mean, own, target = sample
            *_, drawn = self._draw(mean, own)
            repeated = jnp.broadcast_to(target, (drawn.shape[0], *target.shape))
            values = loss(drawn, repeated)

            def gradient(f: Array) -> Array:
                return loss.output_gradient(f[None], target[None])[0]

            first = values @ self.weights
            g = self.weights @ jax.vmap(gradient)(drawn)
            W = jnp.einsum("p,pkl->kl", self.weights, jax.vmap(jax.jacfwd(gradient))(drawn))
            through = W @ own
            expanded = g @ own @ g + 0.5 * jnp.sum(through * through.T)
            more = (values - first) ** 2 @ self.weights - expanded
            correct = loss.correct(drawn, repeated)
            return first, g, W, more, None if correct is None else correct @ self.weights

        found: tuple[Any, ...] = self._of_samples(of_sample, (mean, own, targets))
        return found


def _principal_axes(covariance: Float[Array, "K K"]) -> tuple[Array, Array]:
    """Columns of unit length, and the deviations on them."""
    values, vectors = jnp.linalg.eigh(covariance)
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
    # Mean zero by symmetry; covariance one by a linear map.
    values, vectors = np.linalg.eigh(points.T @ points / len(points))
    points = points @ (vectors / np.sqrt(values)) @ vectors.T
    return points, np.full(len(points), 1 / len(points))
