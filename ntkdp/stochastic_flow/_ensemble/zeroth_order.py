"""Zeroth-order steps of an ensemble: random directions in the outputs or in the weights."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from ntkdp._backend.norms import wide
from ntkdp._backend.types import Array, Float, PRNGKeyArray, PyTree, ScalarLike
from ntkdp._estimators.zeroth_order import ZerothOrder
from ntkdp.batches import Batches
from ntkdp.clipping import ClippingRule
from ntkdp.gradient_flow import KernelFlow, KernelLike, LinearisedFlow, LinearModelFlow
from ntkdp.stochastic_flow._ensemble.step_noise import (
    Carried,
    OutputNoise,
    Seen,
    WeightNoise,
    checked_divisor,
)
from ntkdp.stochastic_flow._noise_covariance import noise_factor
from ntkdp.stochastic_flow._weight_noise import deviations


class ZerothOrderSteps(eqx.Module):
    """The randomness of zeroth-order steps: batches, directions, and noise along them."""

    order: ZerothOrder
    unit: OutputNoise | WeightNoise
    batches: Batches
    deviation: ScalarLike
    divisor: ScalarLike
    sizes: Float[Array, " T"] | None = None

    def at_step(self, k: Array | int) -> "ZerothOrderSteps":
        """The same with the noise of a step, if it changes."""
        if self.sizes is None:
            return self
        return replace(self, deviation=self.deviation * self.sizes[k])

    def at_clip_norm(self, clip_norm: Array | None, rule: ClippingRule) -> "ZerothOrderSteps":
        """The same: the clipping norm does not move."""
        return self

    def start(self, flow: LinearModelFlow, state: PyTree) -> Carried:
        """What is carried before the first step."""
        return self.batches.start(flow.targets.shape[0]), None

    def velocity(
        self,
        flow: LinearModelFlow,
        state: PyTree,
        key: PRNGKeyArray,
        number: Array,
        carried: Carried,
    ) -> tuple[PyTree, Seen, Carried]:
        """A random step, divided by the learning rate, what it saw, and what is carried on."""
        batch_key, noise_key = jax.random.split(key)
        of_batches, of_noise = carried
        drawn, of_batches = self.batches.draw(batch_key, number, of_batches, flow.targets.shape[0])
        like = wide(jax.tree.leaves(state)[0])
        noise = jax.random.normal(noise_key, (self.order.directions,), like.dtype)
        noise = jnp.asarray(self.deviation, like.dtype) * noise

        def along(total: PyTree, drawn_for: tuple[PRNGKeyArray, Array]) -> tuple[PyTree, Array]:
            own, of_sum = drawn_for
            # Noise is drawn as it moves the state, against the gradient.
            direction = jax.tree.map(jnp.negative, self.unit.draw(flow.mesh, state, own))
            slopes = self.order.slopes(flow.losses_along(state, direction), like)
            clipped, sizes, _ = self.order.clipped_sum(flow.clipping, slopes, drawn)
            way = -(clipped.astype(like.dtype) + of_sum) / self.divisor

            def moved(before: Array, z: Array) -> Array:
                return before + way.astype(z.dtype) * z

            return jax.tree.map(moved, total, direction), sizes

        still = jax.tree.map(jnp.zeros_like, state)
        velocity, sizes = lax.scan(along, still, (self.order.keys(key), noise))
        return velocity, Seen(sizes, drawn), (of_batches, of_noise)

    def variance(self, velocity: PyTree) -> PyTree:
        """Variance of the noise of each weight's velocity, which no optimizer asks for here."""
        return 0.0


def zeroth_order_steps(
    flow: LinearModelFlow,
    order: ZerothOrder,
    noise_multiplier: ScalarLike,
    batches: Batches,
    noise_kernel: KernelLike | None,
) -> ZerothOrderSteps:
    """The randomness of steps, checked against the flow."""
    divisor = checked_divisor(flow, batches, noise_kernel)
    # One sum of slopes is noised where the sum of gradients is, and refused where it is.
    (of_sum,) = deviations(flow.clipping, noise_multiplier, 1, per_group=False)
    noisy = bool(of_sum > 0)
    deviation = order.noise_deviation(flow.clipping, noise_multiplier) if noisy else 0.0
    one = jnp.ones(1)
    unit: OutputNoise | WeightNoise
    if isinstance(flow, LinearisedFlow):
        unit = WeightNoise(one, flow.weight_groups().leaf_to_group)
    else:
        assert isinstance(flow, KernelFlow)
        unit = OutputNoise(noise_factor(flow, one, noise_kernel), 1.0, one)
    return ZerothOrderSteps(order, unit, batches, deviation, divisor)
