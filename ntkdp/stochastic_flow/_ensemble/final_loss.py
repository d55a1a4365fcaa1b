"""The mean final loss of drawn runs, as a function of the clipping norms of the groups."""

from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp

from ntkdp import privacy
from ntkdp._backend import compiled, devices, validate
from ntkdp._backend.types import Array, ArrayLike, Float, Key, KeyLike, LearningRate, PyTree
from ntkdp.batches import Batches
from ntkdp.batches import resolve as resolve_batches
from ntkdp.gradient_flow import (
    KernelLike,
    LinearModelFlow,
    OptimizerSteps,
    OutputsAtZero,
    Start,
    check_linear_model_flow,
    optimizer_steps,
)
from ntkdp.noise import Noise
from ntkdp.noise import resolve as resolve_noise
from ntkdp.optimizers import OptimizerLike
from ntkdp.stochastic_flow._ensemble.ensemble import draw
from ntkdp.stochastic_flow._ensemble.step_noise import StepNoise, noise_of_step
from ntkdp.stochastic_flow._weight_noise import NoiseMultiplier
from ntkdp.trajectory import Stepping


@final
class FinalLoss(eqx.Module):
    """A mean over runs that draw the same numbers whatever the norms are.

    Made by :func:`final_loss`.
    """

    walk: OptimizerSteps
    random: StepNoise
    start: Start
    stepping: Stepping
    keys: Key[Array, "*seeds"]
    test: bool = eqx.field(static=True)

    def __call__(self, clip_norms: Float[Array, " R"]) -> Float[Array, ""]:
        """The loss at the clipping norms of the groups, to which the noise is in proportion."""
        rule = self.walk.flow.clipping
        walk = eqx.tree_at(lambda walk: walk.flow.clipping.R, self.walk, clip_norms)
        random = self.random.at_clip_norm(clip_norms, rule)
        _, measured = draw(walk, random, self.start, False, self.stepping, self.keys, False, None)
        losses = measured.test_loss if self.test else measured.loss
        assert losses is not None
        return jnp.mean(losses[..., -1])

    def value_and_gradient(self, clip_norms: ArrayLike) -> tuple[Array, Float[Array, " R"]]:
        """The loss, and its derivative by the norms in forward mode, which stores no steps."""
        norms = jnp.asarray(clip_norms, jax.tree.leaves(self.start)[0].dtype)
        found: tuple[Array, Array] = compiled.call(
            _value_and_gradient, self, norms,
            what=f"the final loss of {self.keys.size:,} runs and its derivative by {norms.size} "
            "clipping norms",
            ways_out="use fewer keys, fewer samples or float32",
            work=(1 + norms.size) * compiled.bytes_of(self.start), n_runs=self.keys.size,
        )  # fmt: skip
        return found


@eqx.filter_jit
def _value_and_gradient(
    loss: FinalLoss, clip_norms: Float[Array, " R"]
) -> tuple[Array, Float[Array, " R"]]:
    def twice(norms: Array) -> tuple[Array, Array]:
        value = loss(norms)
        return value, value

    gradient, value = jax.jacfwd(twice, has_aux=True)(clip_norms)
    return value, gradient


def final_loss(
    flow: LinearModelFlow,
    initial: PyTree,
    *,
    learning_rate: LearningRate,
    steps: int,
    noise_multiplier: NoiseMultiplier,
    sample_rate: float,
    batches: Batches | None,
    noise: Noise | None,
    noise_kernel: KernelLike | None,
    noise_per_group: bool,
    optimizer: OptimizerLike | None,
    outputs_at_zero: OutputsAtZero | None,
    test: bool,
    key: KeyLike | None,
) -> FinalLoss:
    """The final loss of runs, from the arguments of :func:`ensemble`, checked.

    ``test`` asks for that of the test points. Without noise and sampling there need be no key.
    """
    check_linear_model_flow(flow)
    if test and flow.test_targets is None:
        raise ValueError("test=True needs a flow with test targets")
    stepping = Stepping(learning_rate, steps, steps)
    drawn, added = resolve_batches(batches, sample_rate), resolve_noise(noise)
    sigma = privacy.as_noise_multiplier(
        noise_multiplier, steps, batches=drawn, noise=added, n_samples=flow.data.n_samples
    )
    walk = optimizer_steps(flow, optimizer, stepping.learning_rate, outputs_at_zero)
    random = noise_of_step(
        flow, sigma, drawn, noise_kernel, noise_per_group, added, norms_move=True
    )
    if key is None and (random.added is not None or drawn.is_random):
        raise ValueError("key must be given with noise or sampling, got None")
    keys = devices.everywhere(
        flow.mesh, validate.keys(key=jax.random.key(0) if key is None else key)
    )
    return FinalLoss(walk, random, (flow.init(initial), None), stepping, keys, test)
