"""Measures of a clipped flow at a state, independent of scale, for a kernel given by its terms.

Terms are ``(R, n, n)`` or ``(R, n, n, K, K)``; with flat scope there is one.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from ntkdp._backend import decompositions
from ntkdp._backend.types import Array, Float
from ntkdp.clipping import ClippingRule, norms_from_squares
from ntkdp.gradient_flow import KernelFlow
from ntkdp.losses import Loss
from ntkdp.ntk import LayerwiseKernel

#: An equilibrium may lie at most this many times as far out as the outputs the search starts from.
_NEAR = 10.0
#: Outputs count as fitted once gradient norms have fallen to this share.
_FITTED = 1e-3


def flow_of(terms: Array, targets: Array, loss: Loss, rule: ClippingRule) -> KernelFlow:
    """The flow of a kernel's terms, in the sum form."""
    kernel: Array | LayerwiseKernel = terms[0]
    if rule.scope == "layerwise":
        kernel = LayerwiseKernel(tuple(f"layer {r + 1}" for r in range(terms.shape[0])), terms)
    return KernelFlow(kernel, targets, loss, rule, reduction="sum")


class State(eqx.Module):
    """A flow at given outputs, with the sizes that its measures are relative to."""

    terms: Array
    flow: KernelFlow
    output_gradient: Array  # (n, K)
    velocity: Array  # (n, K)
    norms: Array  # (R, n), of the per-sample gradients
    clipped: Array  # (R, n), of the clipped ones

    def __init__(
        self, terms: Array, targets: Array, loss: Loss, rule: ClippingRule, outputs: Array
    ) -> None:
        self.terms, self.flow = terms, flow_of(terms, targets, loss, rule)
        state = self.flow.init(outputs)
        self.velocity = self.flow.velocity(state)[0]
        self.output_gradient = a = loss.output_gradient(state[0], self.flow.targets)
        blocks = jnp.moveaxis(jnp.diagonal(terms, axis1=1, axis2=2), -1, 1)
        if terms.ndim == 3:
            squares = blocks * jnp.sum(a**2, axis=1)
            images = jnp.einsum("rij,jk->rik", terms, a)
        else:
            squares = jnp.einsum("nk,rnkl,nl->rn", a, blocks, a)
            images = jnp.einsum("rijkl,jl->rik", terms, a)
        self.norms = norms_from_squares(squares)
        total = None
        if rule.needs_total_norm:
            total = norms_from_squares(jnp.einsum("rik,ik->r", images, a))
        self.clipped = rule.by_group(self.norms, total) * self.norms

    def loss_rate(self) -> Float[Array, ""]:
        r""":math:`dL/dt = a \cdot \dot f`, summed over samples."""
        return jnp.sum(self.output_gradient * self.velocity)

    def rise(self) -> Float[Array, ""]:
        r"""The loss rate divided by the most that it could be, in [-1, 1].

        That is :math:`\sum_r \sum_i \|g_{ir}\| \sum_i C_{ir} \|g_{ir}\|`, reached if all
        gradients are aligned.
        """
        return _share(self.loss_rate(), jnp.sum(self.norms.sum(1) * self.clipped.sum(1)))

    def speed(self) -> Float[Array, ""]:
        r"""The velocity's norm divided by the most that it could be, in [0, 1].

        That is :math:`\sum_r \|J_r\|_F \sum_i C_{ir} \|g_{ir}\|`.
        """
        return _share(norms_from_squares(jnp.sum(self.velocity**2)), self.pace())

    def growth(self) -> Float[Array, " n"]:
        r"""How fast each sample's outputs move up its own loss, divided by the greatest speed."""
        upward = jnp.sum(self.output_gradient * self.velocity, axis=1)
        size = norms_from_squares(jnp.sum(self.output_gradient**2, axis=1))
        return _share(upward, size * self.pace())

    def pace(self) -> Float[Array, ""]:
        r"""The greatest speed of the outputs, :math:`\sum_r \|J_r\|_F \sum_i C_{ir} \|g_{ir}\|`."""
        blocks = jnp.diagonal(self.terms, axis1=1, axis2=2)
        if self.terms.ndim == 5:
            blocks = jnp.trace(blocks, axis1=1, axis2=2)
        else:
            blocks = blocks * self.output_gradient.shape[1]
        return jnp.sum(norms_from_squares(blocks.sum(-1)) * self.clipped.sum(1))


def _share(value: Array, bound: Array) -> Array:
    """``value / bound``, zero where nothing can move."""
    is_zero = bound == 0
    return jnp.where(is_zero, 0.0, value / jnp.where(is_zero, 1.0, bound))


@eqx.filter_jit
def measured_state(
    terms: Array, targets: Array, loss: Loss, rule: ClippingRule, outputs: Array
) -> State:
    """A :class:`State`, compiled."""
    return State(terms, targets, loss, rule, outputs)


def velocity_jacobian(flow: KernelFlow, outputs: Array) -> Float[Array, "nK nK"]:
    """Derivative of the velocity with respect to the outputs, as a matrix."""
    jacobian = jax.jacfwd(lambda f: flow.velocity((f, None))[0])(outputs)
    return jnp.reshape(jacobian, (outputs.size, outputs.size))


def settled(
    terms: Array, targets: Array, loss: Loss, rule: ClippingRule, outputs: Array
) -> tuple[Array, Float[Array, ""], Float[Array, "nK nK"]]:
    """Nearby outputs where the velocity vanishes, by Newton's method, with speed and derivative."""
    flow = flow_of(terms, targets, loss, rule)

    def step(_: Array | int, outputs: Array) -> Array:
        velocity = flow.velocity((outputs, None))[0].reshape(-1)
        inverse = decompositions.pinv(velocity_jacobian(flow, outputs), rtol=1e-8)
        moved = outputs - (inverse @ velocity).reshape(outputs.shape)
        # Where clipping saturates, the nearest equilibrium may lie at infinity.
        return jnp.where(jnp.max(jnp.abs(moved)) <= limit, moved, outputs)

    before = State(terms, targets, loss, rule, outputs)
    limit = _NEAR * jnp.max(jnp.abs(outputs))
    outputs = lax.fori_loop(0, 20, step, outputs)
    state = State(terms, targets, loss, rule, outputs)
    # Fitted samples are at rest too, but not stuck.
    left = jnp.sum(state.norms**2) > _FITTED**2 * jnp.sum(before.norms**2)
    speed = jnp.where(left, state.speed(), jnp.inf)
    return outputs, speed, velocity_jacobian(flow, outputs)
