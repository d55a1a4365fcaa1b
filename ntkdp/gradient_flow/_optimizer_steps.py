"""Steps of an optimizer in the state of a flow: outputs or weights of a linear model."""

from dataclasses import replace
from typing import NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from ntkdp import optimizers
from ntkdp._backend.schedules import Schedule
from ntkdp._backend.types import (
    Array,
    ArrayLike,
    Float,
    LearningRate,
    PRNGKeyArray,
    PyTree,
    ScalarLike,
)
from ntkdp._estimators.sharpness_aware import SharpnessAware, check_sharpness_aware
from ntkdp._results.setup import Setup
from ntkdp.clipping import MovingNorm
from ntkdp.gradient_flow._flow import LinearModelFlow, with_steps
from ntkdp.gradient_flow._head_flow import HeadFlow
from ntkdp.gradient_flow._kernel_flow import KernelFlow
from ntkdp.gradient_flow._linearised_flow import LinearisedFlow
from ntkdp.optimizers import OptimizerLike
from ntkdp.trajectory import Measurement, Stepping

#: Outputs at zero weights, of training points or of a (train, test) pair.
OutputsAtZero: TypeAlias = ArrayLike | tuple[ArrayLike, ArrayLike]
#: Where steps begin or end: the state of the flow, and its average if there is one.
Start: TypeAlias = tuple[PyTree, PyTree | None]

_HOW_TO_FIND = (
    "the outputs of the linear model at zero weights: f, Jw = jax.jvp(lambda w: apply_fn(w, x), "
    "(params,), (params,)), and f - Jw is what is asked for, a (train, test) pair with a "
    "test_kernel"
)


class Walked(NamedTuple):
    """The state of a flow, the optimizer's, and the average of the first if there is one.

    ``clip_norm`` is the clipping norm by group if it moves, and ``ascent`` the way from the
    position to where a sharpness-aware step takes its gradients.
    """

    position: PyTree
    optimizer_state: PyTree
    average: PyTree | None
    clip_norm: Array | None = None
    ascent: PyTree | None = None


class OptimizerSteps(eqx.Module):
    r"""Steps of a flow by an optimizer, whose gradient is minus the flow's velocity.

    A linear optimizer commutes with the Jacobian, so that in the outputs the same transformation
    makes the steps that it makes in the weights; there :math:`J w` is the state less the outputs
    ``at_zero`` weights. *Derived*.
    """

    flow: LinearModelFlow
    optimizer: OptimizerLike
    learning_rate: LearningRate
    at_zero: PyTree | None
    moving: MovingNorm | None = None
    sharpness_aware: SharpnessAware | None = None

    def setup(
        self,
        stepping: Stepping,
        noise_multiplier: ScalarLike | Schedule | None = None,
        sample_rate: ScalarLike | None = None,
        noise_per_group: bool = False,
    ) -> Setup:
        """The training that the steps predict, for comparisons."""
        sharpness = self.sharpness_aware
        return replace(
            with_steps(
                self.flow.setup(),
                stepping,
                noise_multiplier,
                sample_rate,
                noise_per_group,
                self.optimizer,
            ),
            adaptive="" if self.moving is None else self.moving.in_words,
            sharpness_aware="" if sharpness is None else sharpness.in_words,
        )

    def start(self, position: PyTree, average: PyTree | None = None) -> Walked:
        """Before the first step; an average is continued if there is one."""
        if average is None:
            average = optimizers.start_average(self.optimizer, position)
        clip_norm = None
        if self.moving is not None:
            clip_norm = self.moving.start(self.flow.clipping, self.flow.n_terms)
        ascent = None
        if self.sharpness_aware is not None:
            ascent = jax.tree.map(jnp.zeros_like, position)
        state = self._transformation(position).init(position)
        return Walked(position, state, average, clip_norm, ascent)

    def flow_at(self, walked: Walked) -> LinearModelFlow:
        """The flow, with the clipping norm of a state."""
        return self.flow.at_clip_norm(walked.clip_norm)

    def step(
        self,
        walked: Walked,
        velocity: PyTree,
        noise_variance: PyTree = 0.0,
        gradient_norm: Float[Array, ""] | None = None,
    ) -> Walked:
        """After a step along a velocity, whose noise has the given variance.

        A sharpness-aware step needs the norm of the gradient, with its noise, over the weights.
        """
        position, state, average, clip_norm, ascent = walked
        weights = position
        if self.at_zero is not None:
            weights = jax.tree.map(lambda f, f0: f - f0.astype(f.dtype), position, self.at_zero)
        gradient = jax.tree.map(jnp.negative, velocity)
        updates, state = optimizers.updated(
            self._transformation(position), gradient, state, weights, noise_variance
        )
        position = optax.apply_updates(position, updates)
        average = optimizers.next_average(self.optimizer, average, position)
        if self.sharpness_aware is not None and gradient_norm is not None:
            ascent = self.sharpness_aware.ascent(gradient, gradient_norm)
        return Walked(position, state, average, clip_norm, ascent)

    def adapt(
        self,
        walked: Walked,
        number: Array | int,
        norms: Float[Array, "R n"],
        drawn: Array | None = None,
        batch_size: float | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Walked:
        """With the clipping norm of step ``number``, from the gradients' norms in the last one."""
        if self.moving is None or walked.clip_norm is None:
            return walked
        clip_norm = self.moving.next(walked.clip_norm, norms, drawn, batch_size, key, number)
        return walked._replace(clip_norm=clip_norm)

    def measure(self, walked: Walked, outputs: bool) -> Measurement:
        """The record of a state: of the average if there is one, but clipping at the state."""
        position, average, clip_norm = walked.position, walked.average, walked.clip_norm
        measured = self.flow_at(walked).measure(position, outputs)._replace(clip_norm=clip_norm)
        if average is None:
            return measured
        mean = jax.tree.map(lambda mean, f: mean.astype(f.dtype), average, position)
        of_average = self.flow.measure(mean, outputs)
        return of_average._replace(clip_fraction=measured.clip_fraction, clip_norm=clip_norm)

    def _transformation(self, position: PyTree) -> optax.GradientTransformation:
        if callable(self.learning_rate):
            return self.optimizer(self.learning_rate)
        dtype = jnp.result_type(*jax.tree.leaves(position))
        return self.optimizer(jnp.asarray(self.learning_rate, dtype))


def optimizer_steps(
    flow: LinearModelFlow,
    optimizer: OptimizerLike | None,
    learning_rate: LearningRate,
    outputs_at_zero: OutputsAtZero | None,
    moving: MovingNorm | None = None,
    sharpness_aware: SharpnessAware | None = None,
) -> OptimizerSteps:
    """The steps, checked: a kernel flow takes linear optimizers alone."""
    sharpness_aware = check_sharpness_aware(sharpness_aware)
    optimizer = optimizers.recognised(optimizers.as_optimizer(optimizer))
    if isinstance(flow, LinearisedFlow):
        if outputs_at_zero is not None:
            raise ValueError(
                "outputs_at_zero must be None with a LinearisedFlow, which knows its weights, got "
                f"{type(outputs_at_zero).__name__}"
            )
        at_zero = flow.at_zero_weights()
        return OptimizerSteps(flow, optimizer, learning_rate, at_zero, moving, sharpness_aware)
    if isinstance(flow, HeadFlow):
        return OptimizerSteps(flow, optimizer, learning_rate, None, moving, sharpness_aware)
    assert isinstance(flow, KernelFlow)
    if sharpness_aware is not None:
        _check_norms(flow)
    linear = optimizers.as_linear(optimizer)
    if flow.preconditioned and linear.decays_weights and not getattr(linear, "decoupled", False):
        raise ValueError(
            "optimizer must have decoupled weight decay with a preconditioned_kernel, got "
            f"{type(linear).__name__}: what the preconditioner does to other decay is not in the "
            "kernel"
        )
    at_zero = None
    if outputs_at_zero is not None:
        at_zero = flow.checked_outputs(outputs_at_zero, "outputs_at_zero")
    elif linear.decays_weights:
        raise ValueError(
            "outputs_at_zero must be given with weight decay and a KernelFlow, got None; it is "
            + _HOW_TO_FIND
        )
    return OptimizerSteps(flow, linear, learning_rate, at_zero, moving, sharpness_aware)


def _check_norms(flow: KernelFlow) -> None:
    """Raise unless the norm of a noisy gradient is known in the outputs."""
    if flow.clipping.scope != "flat":
        raise ValueError(
            "clipping must have scope='flat' with sharpness_aware and a KernelFlow, whose outputs "
            "do not show the norm of gradients that are clipped by layer, got "
            f"{flow.clipping.scope!r}; take a LinearisedFlow"
        )
    if flow.preconditioned:
        raise ValueError(
            "flow must have no preconditioned_kernel with sharpness_aware, which goes along the "
            "gradient itself"
        )
