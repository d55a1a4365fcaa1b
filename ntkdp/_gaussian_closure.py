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
:math:`\dot\Sigma = A\Sigma + \Sigma A^\top + \eta Q`.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ntkdp._kernel_flow import KernelFlow
from ntkdp._types import Array, Float
from ntkdp.losses import Loss

#: Nodes of the Gauss-Hermite rule for one output and, an axis, for two; points for more.
_NODES, _NODES_OF_TWO, _POINTS = 101, 21, 256
#: Outputs up to which the points are dense enough for Stein's identity, and the deviation, relative
#: to one and the gradients, below which it would lose digits.
_MOST_OF_STEIN, _NARROW = 2, 1e-6


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


class Closure(eqx.Module):
    """Drift and diffusion of a Gaussian state over all points, train before test.

    ``noise`` is the covariance of a step's noise over the squared learning rate, ``(N K, N K)``.
    """

    flow: KernelFlow
    noise: Float[Array, "NK NK"]
    n_outputs: int = eqx.field(static=True)
    sample_rate: float = eqx.field(static=True)
    points: Float[Array, "p K"]
    weights: Float[Array, " p"]

    def _operator(self) -> Array:
        """``(N K, R, n, K)`` over the divisor of the reduction."""
        flow, n_outputs = self.flow, self.n_outputs
        rows = [flow.operator, *([] if flow.test_drive is None else [flow.test_drive])]
        operator = jnp.concatenate(rows)
        n_groups, n = flow.diagonal.shape[:2]
        if flow.diagonal.ndim == 2:
            split = operator.reshape(-1, n_groups, n)
            eye = jnp.eye(n_outputs, dtype=operator.dtype)
            full = jnp.einsum("arn,kl->akrnl", split, eye)
            operator = full.reshape(-1, n_groups, n, n_outputs)
        else:
            operator = operator.reshape(-1, n_groups, n, n_outputs)
        return operator / n if flow.reduction == "mean" else operator

    def _clipped(self, outputs: Array, targets: Array, diagonal: Array) -> Array:
        """One sample's clipped output gradients, ``(R, K)``."""
        flow = self.flow
        a = flow.loss.output_gradient(outputs[None], targets[None])[0]
        if diagonal.ndim == 1:
            squares = diagonal * jnp.sum(a**2)
        else:
            squares = jnp.einsum("k,rkl,l->r", a, diagonal, a)
        positive = squares > 0
        norms = jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)
        if flow.clipping.scope == "flat":
            factors = flow.clipping.factors(norms[:1])
        else:
            factors = flow.clipping.factors(norms[:, None])[:, 0]
        return factors[:, None] * a[None]

    def own_blocks(self, covariance: Array) -> Array:
        """Each point's own covariance, ``(N, K, K)``."""
        n_points = covariance.shape[0] // self.n_outputs
        split = covariance.reshape(n_points, self.n_outputs, n_points, self.n_outputs)
        return jnp.moveaxis(jnp.diagonal(split, axis1=0, axis2=2), -1, 0)

    def _axes(self, covariance: Array) -> tuple[Array, Array]:
        """Principal axes of each point's own covariance, ``(N, K, K)``, and deviations on them."""
        values, vectors = jnp.linalg.eigh(self.own_blocks(covariance))
        return vectors, jnp.sqrt(jnp.maximum(values, 0))

    def drawn(self, mean: Array, covariance: Array) -> Array:
        """Points of each sample's Gaussian, ``(N, p, K)``."""
        vectors, deviations = self._axes(covariance)
        roots = vectors * deviations[:, None, :]
        return mean[:, None] + jnp.einsum("nkl,pl->npk", roots, self.points)

    def _mean_slope(self, covariance: Array, clipped: Array, slopes: Array) -> Array:
        r"""E of the derivative of clipped gradients, ``(n, R, K, K)``.

        By Stein's identity, :math:`E\,\partial\varphi = E[\varphi\,(f - m)^\top] \Sigma^{-1}`:
        where the Gaussian is wide, the derivative is a spike that falls between the points. Where
        it is narrow the derivative itself is taken.
        """
        direct = jnp.einsum("p,nprkl->nrkl", self.weights, slopes)
        if self.n_outputs > _MOST_OF_STEIN:
            return direct
        vectors, deviations = self._axes(covariance)
        n = clipped.shape[0]
        vectors, deviations = vectors[:n], deviations[:n]
        wide = deviations > _NARROW * (1 + jnp.max(jnp.abs(clipped), axis=(1, 2, 3)))[:, None]
        safe = jnp.where(wide, deviations, 1.0)
        products = jnp.einsum("p,nprk,pl->nrkl", self.weights, clipped, self.points)
        along = jnp.where(
            wide[:, None, None], products / safe[:, None, None], direct @ vectors[:, None]
        )
        return along @ jnp.swapaxes(vectors, 1, 2)[:, None]

    def rates(self, mean: Array, covariance: Array) -> tuple[Array, Array, Array, Array]:
        """Drift of the mean, A, and the parts of Q: noise with sampling, and what is left over."""
        flow = self.flow
        n = flow.diagonal.shape[1]
        samples = self.drawn(mean, covariance)[:n]
        own = self.own_blocks(covariance)[:n]
        diagonal = jnp.moveaxis(flow.diagonal, 1, 0)

        def of_sample(drawn: Array, targets: Array, diagonal: Array) -> tuple[Array, Array]:
            def at(outputs: Array) -> Array:
                return self._clipped(outputs, targets, diagonal)

            return jax.vmap(at)(drawn), jax.vmap(jax.jacfwd(at))(drawn)

        clipped, slopes = jax.vmap(of_sample)(samples, flow.targets, diagonal)
        mean_clipped = jnp.einsum("p,nprk->nrk", self.weights, clipped)
        slope = self._mean_slope(covariance, clipped, slopes)
        second = jnp.einsum("p,nprk,npsl->nrksl", self.weights, clipped, clipped)
        linear = jnp.einsum("nrka,nab,nslb->nrksl", slope, own, slope)
        centred = second - jnp.einsum("nrk,nsl->nrksl", mean_clipped, mean_clipped)

        operator = self._operator()
        drift = -jnp.einsum("arnk,nrk->a", operator, mean_clipped).reshape(mean.shape)
        towards = -jnp.einsum("arnk,nrkl->anl", operator, slope)
        n_rows = operator.shape[0]
        linear_map = jnp.zeros((n_rows, n_rows), operator.dtype)
        linear_map = linear_map.at[:, : n * self.n_outputs].set(towards.reshape(n_rows, -1))

        def spread(blocks: Array) -> Array:
            moved = jnp.einsum("arnk,nrksl->asnl", operator, blocks)
            return moved.reshape(n_rows, -1) @ operator.reshape(n_rows, -1).T

        diffusion = self.noise
        if self.sample_rate < 1:
            diffusion = diffusion + (1 / self.sample_rate - 1) * spread(second)
        return drift, linear_map, diffusion, spread(centred - linear)

    def step(self, mean: Array, covariance: Array, rate: Array) -> tuple[Array, Array]:
        """One discrete step."""
        drift, linear_map, diffusion, left_over = self.rates(mean, covariance)
        moved = jnp.eye(linear_map.shape[0], dtype=linear_map.dtype) + rate * linear_map
        covariance = moved @ covariance @ moved.T + rate**2 * (diffusion + left_over)
        return mean + rate * drift, (covariance + covariance.T) / 2

    def velocity(self, mean: Array, covariance: Array, rate: Array) -> tuple[Array, Array]:
        """In flow time, of the process whose noise belongs to this learning rate."""
        drift, linear_map, diffusion, _ = self.rates(mean, covariance)
        half = linear_map @ covariance
        return drift, half + half.T + rate * diffusion

    def measure(self, mean: Array, covariance: Array, outputs: bool) -> Statistics:
        """Mean and standard deviation of the losses, mean accuracies."""
        flow, n = self.flow, self.flow.targets.shape[0]
        drawn = self.drawn(mean, covariance)

        def of(rows: slice, targets: Array) -> tuple[Array, Array, Array | None]:
            scale = 1 / mean[rows].shape[0] if flow.reduction == "mean" else 1.0
            return _loss_statistics(
                flow.loss,
                drawn[rows],
                targets,
                self.weights,
                self._block(covariance, rows),
                scale,
            )

        train = of(slice(0, n), flow.targets)
        test: tuple[Any, Any, Any] = (None, None, None)
        if flow.test_targets is not None:
            test = of(slice(n, mean.shape[0]), flow.test_targets)
        kept = (mean, covariance) if outputs else (None, None)
        return Statistics(*train, *test, *kept)

    def _block(self, covariance: Array, rows: slice) -> Array:
        """Covariance of some points, ``(m, K, m, K)``."""
        n_points = covariance.shape[0] // self.n_outputs
        split = covariance.reshape(n_points, self.n_outputs, n_points, self.n_outputs)
        return split[rows][:, :, rows]


def _loss_statistics(
    loss: Loss, drawn: Array, targets: Array, weights: Array, covariance: Array, scale: float
) -> tuple[Array, Array, Array | None]:
    """Mean and standard deviation of the reduced loss, and mean accuracy.

    The covariance of two samples' losses is that of their second-order expansions, a sample's own
    variance is integrated.
    """

    def of_sample(points: Array, target: Array) -> tuple[Array, Array, Array, Array | None]:
        repeated = jnp.broadcast_to(target, (points.shape[0], *target.shape))
        values = loss(points, repeated)

        def gradient(f: Array) -> Array:
            return loss.output_gradient(f[None], target[None])[0]

        first = jax.vmap(gradient)(points)
        second = jax.vmap(jax.jacfwd(gradient))(points)
        correct = loss.correct(points, repeated)
        return values, first, second, correct

    values, first, second, correct = jax.vmap(of_sample)(drawn, targets)
    means = values @ weights
    own = (values - means[:, None]) ** 2 @ weights
    g = jnp.einsum("p,npk->nk", weights, first)
    W = jnp.einsum("p,npkl->nkl", weights, second)
    through = jnp.einsum("ikl,iljm->ikjm", W, covariance)
    between = jnp.einsum("ik,ikjl,jl->ij", g, covariance, g)
    between = between + 0.5 * jnp.einsum("ikjm,jmil->ijkl", through, through).trace(
        axis1=2, axis2=3
    )
    total = jnp.sum(between) - jnp.trace(between) + jnp.sum(own)
    std = scale * jnp.sqrt(jnp.maximum(total, 0.0))
    accuracy = None if correct is None else jnp.mean(correct @ weights)
    return scale * jnp.sum(means), std, accuracy


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
