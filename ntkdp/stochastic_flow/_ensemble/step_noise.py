"""The randomness of a step of an ensemble: its batch, and its noise of outputs or of weights."""

from dataclasses import replace
from functools import partial
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ntkdp._backend import devices, validate
from ntkdp._backend.types import Array, ArrayLike, Float, PRNGKeyArray, PyTree, ScalarLike
from ntkdp.batches import Batches, Drawn
from ntkdp.clipping import ClippingRule, rescaled
from ntkdp.gradient_flow import KernelFlow, LinearisedFlow, LinearModelFlow
from ntkdp.noise import Noise
from ntkdp.ntk import LayerwiseKernel
from ntkdp.stochastic_flow._matrix_root import square_root
from ntkdp.stochastic_flow._noise_covariance import noise_covariance
from ntkdp.stochastic_flow._weight_noise import deviations

#: Outputs of training points, and of test points if there are any.
_Outputs: TypeAlias = tuple[Array, Array | None]


class OutputNoise(eqx.Module):
    """Noise of the outputs, through a factor of its covariance."""

    factor: Float[Array, "N N"]
    divisor: ScalarLike

    def draw(self, mesh: Mesh | None, drift: _Outputs, key: PRNGKeyArray) -> _Outputs:
        """Draw what noise adds to the velocity of train and test outputs."""
        train, test = drift
        n, n_outputs = train.shape
        n_rows = self.factor.shape[0]
        # One column, or one for each output if the outputs share the factor.
        columns = (train.size + (0 if test is None else test.size)) // n_rows
        z = jax.random.normal(key, (n_rows, columns), train.dtype)
        noise = devices.everywhere(mesh, self.factor @ z)
        noise = noise.reshape(-1, n_outputs) / self.divisor
        return noise[:n], None if test is None else noise[n:]

    def times(self, scales: Float[Array, " R"]) -> "OutputNoise":
        """The same, that many times as large, all groups alike."""
        return OutputNoise(self.factor, self.divisor / scales[0].astype(self.factor.dtype))


class WeightNoise(eqx.Module):
    """Noise of the weights, with a standard deviation for each group of leaves."""

    deviations: Float[Array, " R"]
    leaf_to_group: tuple[int, ...] = eqx.field(static=True)

    def draw(self, mesh: Mesh | None, drift: PyTree, key: PRNGKeyArray) -> PyTree:
        """Draw what noise adds to the velocity of the weights."""
        leaves, treedef = jax.tree.flatten(drift)
        # As in a run: a key for each leaf, and noise of the gradient, which is descended.
        noise = [
            -self.deviations[group].astype(leaf.dtype)
            * jax.random.normal(own, leaf.shape, leaf.dtype)
            for group, leaf, own in zip(
                self.leaf_to_group, leaves, jax.random.split(key, len(leaves)), strict=True
            )
        ]
        return jax.tree.unflatten(treedef, noise)

    def times(self, scales: Float[Array, " R"]) -> "WeightNoise":
        """The same, that many times as large, by group."""
        return WeightNoise(self.deviations * scales, self.leaf_to_group)


#: What batches and noise carry on from step to step.
Carried: TypeAlias = tuple[PyTree, PyTree]
#: Norms of all samples' gradients by group, and which samples were drawn.
Seen: TypeAlias = tuple[Array, Drawn]


class StepNoise(eqx.Module):
    """The randomness of steps: batches, and the noise of the outputs or of the weights."""

    added: OutputNoise | WeightNoise | None
    batches: Batches
    noise: Noise
    per_group: bool = eqx.field(static=True)

    def at_clip_norm(self, clip_norm: Array | None, rule: ClippingRule) -> "StepNoise":
        """The same for a rule at the clipping norms of its groups, in proportion to them."""
        if clip_norm is None or self.added is None:
            return self
        n_groups, moved = clip_norm.size, rescaled(rule, clip_norm)
        now: ScalarLike
        before: ScalarLike
        if self.per_group:
            now, before = clip_norm, rule.group_norms(n_groups)
        else:
            now, before = moved.sensitivity(n_groups), rule.sensitivity(n_groups)
        ratio = jnp.asarray(now, clip_norm.dtype) / jnp.asarray(before, clip_norm.dtype)
        scales = jnp.broadcast_to(ratio, (n_groups,))
        return replace(self, added=self.added.times(scales))

    def start(self, flow: LinearModelFlow, state: PyTree) -> Carried:
        """What is carried before the first step."""
        batches = self.batches.start(flow.targets.shape[0])
        if self.added is None:
            return batches, None
        like = jax.eval_shape(partial(self.added.draw, flow.mesh, state), jax.random.key(0))
        return batches, self.noise.start(like)

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
        dtype = jnp.result_type(*jax.tree.leaves(state))
        weights = None if drawn is None else self.batches.weights(drawn, dtype)
        drift, norms = flow.velocity_and_norms(state, weights)
        if self.added is None:
            return drift, (norms, drawn), (of_batches, of_noise)
        draw = partial(self.added.draw, flow.mesh, drift)
        noise, of_noise = self.noise.next(draw, noise_key, number, of_noise)
        return jax.tree.map(jnp.add, drift, noise), (norms, drawn), (of_batches, of_noise)

    def variance(self, velocity: PyTree) -> PyTree:
        """Variance of the noise of each weight's velocity; of outputs, which nobody asks for, 0."""
        if not isinstance(self.added, WeightNoise):
            return 0.0
        variances = [self.added.deviations[group] ** 2 for group in self.added.leaf_to_group]
        return jax.tree.unflatten(jax.tree.structure(velocity), variances)


def checked_divisor(
    flow: LinearModelFlow, batches: Batches, noise_kernel: ArrayLike | LayerwiseKernel | None
) -> float:
    """What sums over a batch are divided by, if batches and kernel of the noise fit the flow."""
    n = flow.targets.shape[0]
    batches.check(n)
    if isinstance(flow, LinearisedFlow) and noise_kernel is not None:
        raise ValueError(
            "noise_kernel must be None with a LinearisedFlow, where the noise of the weights moves "
            f"the outputs too, got {type(noise_kernel).__name__}"
        )
    return batches.share(n) * flow.data.divisor


def noise_of_step(
    flow: LinearModelFlow,
    noise_multiplier: ScalarLike,
    batches: Batches,
    noise_kernel: ArrayLike | LayerwiseKernel | None,
    per_group: bool,
    noise: Noise,
) -> StepNoise:
    """The randomness of steps, checked against the flow."""
    divisor = checked_divisor(flow, batches, noise_kernel)
    if flow.public is not None:
        sigma = validate.non_negative(noise_multiplier=noise_multiplier)
        noise_multiplier = sigma * flow.public.private_share
    if not isinstance(flow, LinearisedFlow):
        assert isinstance(flow, KernelFlow)
        covariance = noise_covariance(flow, noise_multiplier, noise_kernel, per_group)
        if covariance is None:
            return StepNoise(None, batches, noise, per_group)
        factor = square_root(covariance, flow.mesh)
        return StepNoise(OutputNoise(factor, divisor), batches, noise, per_group)
    groups = flow.weight_groups()
    stds = deviations(flow.clipping, noise_multiplier, groups.size, per_group)
    if not bool(jnp.any(stds > 0)):
        return StepNoise(None, batches, noise, per_group)
    of_weights = WeightNoise(stds / divisor, groups.leaf_to_group)
    return StepNoise(of_weights, batches, noise, per_group)
