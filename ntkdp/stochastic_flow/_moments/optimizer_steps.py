"""Discrete steps of the moments by a linear optimizer."""

from dataclasses import replace
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from ntkdp._backend import decompositions
from ntkdp._backend.types import Array, Float
from ntkdp.batches import Batches
from ntkdp.clipping import Scheduled
from ntkdp.gradient_flow import KernelFlow
from ntkdp.noise import Recursion
from ntkdp.optimizers import (
    Optimizer,
    Transition,
    average_of,
    size_of_state,
    start_state,
    transition,
)
from ntkdp.stochastic_flow._moments.covariance import Joint, Step, Tied
from ntkdp.stochastic_flow._moments.gaussian_closure import Closure, Integrals, State, Statistics


class JointState(NamedTuple):
    """Means and covariances of all that the optimizer holds of the outputs, which come first.

    The covariance is also of what the noise carries, whose mean is zero. ``excess`` is that of the
    losses of the outputs themselves.
    """

    means: Float[Array, "C N K"]
    covariance: Joint
    excess: Array


class MomentSteps(eqx.Module):
    r"""Steps :math:`z^+ = M z + b\,(\text{gradient} + \text{noise})` of a Gaussian state.

    z holds outputs, momentum and average; the gradient depends on the outputs alone, through the
    closure. Correlated noise is white noise on a state that has what the noise carries as well. Of
    batches that are fixed, a sample counts by its weight in a step. *Derived*.
    """

    closure: Closure
    optimizer: Optimizer
    at_zero: Float[Array, "N K"] | None
    batches: Batches
    noise: Recursion
    clip_norms: Float[Array, "T R"] | None = None

    def start(self, mean: Array) -> JointState:
        """The state of outputs that are known exactly, at rest."""
        size = size_of_state(self.optimizer) + len(self.noise.enters)
        return JointState(
            means=jnp.stack(start_state(self.optimizer, mean)),
            covariance=self.closure.form.joint_zero(size),
            excess=self.closure.zero(mean).excess,
        )

    def step(self, state: JointState, number: Array, rate: Array) -> JointState:
        """The state after a step of this number at a learning rate."""
        closure, outputs = self._closure_of(number), self._part(state, 0)
        own = closure.form.own_blocks(outputs.covariance)
        integrals = self._weighted(closure.integrals(outputs.mean, own), number)
        alone, together = closure.sampling
        spread = alone * integrals.second_moment + (1 - together) * integrals.unexplained
        tied = Tied(together, integrals.mean) if together else None
        step = transition(self.optimizer, rate, outputs.mean.dtype)
        gradient = -closure.form.drift(integrals.mean)
        means = jnp.einsum("ce,enk->cnk", step.of_state, state.means)
        means = means + jnp.einsum("c,nk->cnk", step.of_gradient, gradient)
        if self.at_zero is not None:
            means = means + jnp.einsum("c,nk->cnk", step.of_zero, self.at_zero)
        kept, effective = _of_outputs_alone(step)
        coefficients, source = closure.excess_rates(outputs, own, effective)
        factors = jnp.maximum(kept + effective * coefficients, 0)
        return JointState(
            means=means,
            covariance=closure.form.step(
                state.covariance, integrals.slope, spread, self._with_noise(step, number), tied
            ),
            excess=factors**2 * state.excess + effective * source,
        )

    def _closure_of(self, number: Array) -> Closure:
        """The closure with the clipping norms of a step."""
        if self.clip_norms is None:
            return self.closure
        flow = self.closure.flow.at_clip_norm(self.clip_norms[number])
        return replace(self.closure, flow=flow)

    def _weighted(self, integrals: Integrals, number: Array) -> Integrals:
        """Integrals of clipped gradients in a batch, if it is certain which samples are in it."""
        n, mean = len(integrals.mean), integrals.mean
        if self.batches.is_random or self.batches.takes_all:
            return integrals
        drawn, _ = self.batches.draw(jax.random.key(0), number, self.batches.start(n), n)
        assert drawn is not None
        weights = self.batches.weights(drawn, mean.dtype)

        def times(weights: Array, values: Array) -> Array:
            return values * weights.reshape(-1, *[1] * (values.ndim - 1))

        return Integrals(
            times(weights, mean),
            times(weights, integrals.slope),
            times(weights**2, integrals.second_moment),
            times(weights**2, integrals.unexplained),
        )

    def _with_noise(self, step: Transition, number: Array) -> Step:
        """The step of the joint state, with what the noise carries after the optimizer's."""
        M, b = step.of_state, step.of_gradient
        reads, draws, carries, enters = (jnp.asarray(part, b.dtype) for part in self.noise)
        entered = jnp.concatenate([b, enters])
        whole = jax.scipy.linalg.block_diag(M, carries) if len(enters) else M
        whole = whole.at[:, len(b) :].add(jnp.outer(entered, reads[number]))
        missing = jnp.zeros(len(enters), b.dtype)
        return Step(whole, jnp.concatenate([b, missing]), entered * draws[number])

    def measure(self, state: JointState, outputs: bool) -> Statistics:
        """Statistics of the outputs, or of their average if there is one."""
        averaged = average_of(self.optimizer) is not None
        last = len(state.means) - 1
        return self.closure.measure(self._part(state, last if averaged else 0), outputs)

    def _part(self, state: JointState, number: int) -> State:
        covariance = self.closure.form.part(state.covariance, number)
        # The excess of an average is not known: that of a Gaussian is none.
        excess = state.excess if number == 0 else jnp.zeros_like(state.excess)
        return State(state.means[number], covariance, excess)


def _of_outputs_alone(step: Transition) -> tuple[Array, Array]:
    r"""Factor and learning rate of the outputs once their momentum has caught up with them.

    The equation of the excess is of first order in time, so momentum enters it by the steps that it
    makes in the end, :math:`\eta / (1 - \beta)`.
    """
    M, b = step.of_state, step.of_gradient
    caught_up = decompositions.solve(
        jnp.eye(len(b) - 1, dtype=b.dtype) - M[1:, 1:], jnp.stack([M[1:, 0], b[1:]], axis=1)
    )
    through = M[0, 1:] @ caught_up
    return M[0, 0] + through[0], -(b[0] + through[1])


def sizes_of_noise(
    scheduled: Scheduled, flow: KernelFlow, steps: int, per_group: bool
) -> tuple[Float[Array, "T R"], Float[Array, " T"]]:
    """Clipping norms of all steps by group, and sizes of their noise next to that of the rule."""
    if per_group:
        raise ValueError(
            "noise_per_group must be False with a schedule of clip_norm, since the noise has one "
            "covariance for all steps; use stochastic_flow.ensemble with a LinearisedFlow"
        )
    norms = jax.vmap(lambda k: scheduled.of_step(k, flow.n_terms))(jnp.arange(steps))
    return norms, jnp.linalg.norm(norms, axis=1) / flow.clipping.sensitivity(flow.n_terms)
