"""Flows around another flow: with inertia, and of the size of a step."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp

from ntkdp._backend import validate
from ntkdp._backend.types import Array, PyTree, ScalarLike, as_constant
from ntkdp._results.setup import Setup, number, rates
from ntkdp.gradient_flow._flow import Flow, WrappedFlow
from ntkdp.trajectory import Measurement


def _check_inner(flow: object) -> None:
    if not isinstance(flow, Flow) or isinstance(flow, WrappedFlow):
        raise TypeError(
            "flow must be a KernelFlow, a WeightFlow or a LinearisedFlow, got "
            f"{type(flow).__name__}"
        )


class HeavyBallFlow(WrappedFlow):
    r"""A flow with inertia: :math:`\ddot w + \alpha \dot w = -G(w)` for :math:`\dot w = -G(w)`.

    The limit of gradient descent with momentum beta (``v <- beta v + G``, ``w <- w - eta v``) for
    :math:`\alpha = (1 - \beta)/\sqrt{\eta}`, at rest at the start. Its time is
    :math:`t = \sqrt{\eta}\,k` after k steps, not :math:`\eta k`: bring a run's times to it with
    ``run.rescale_time(learning_rate ** -0.5)``.

    Parameters
    ----------
    flow : KernelFlow, WeightFlow or LinearisedFlow
        The flow that is given inertia; it also says what ``initial`` may be.
    friction : float
        :math:`\alpha`, at least 0, per unit of this flow's time.

    Raises
    ------
    ValueError
        If the friction is below 0 or not finite.

    Notes
    -----
    *Derived* (time step :math:`\sqrt{\eta}`).

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> flow = ntkdp.KernelFlow(jnp.eye(1), jnp.zeros((1, 1)), ntkdp.losses.SquaredError(),
    ...                         ntkdp.clipping.NoClipping())
    >>> ball = ntkdp.HeavyBallFlow(flow, friction=0.0)
    >>> path = ntkdp.solve(ball, jnp.array([[1.0]]), jnp.array([0.0, jnp.pi]), outputs=True)
    >>> round(path.outputs[-1, 0, 0].item(), 4)
    -1.0
    """

    flow: Flow
    friction: ScalarLike = eqx.field(converter=as_constant)

    def __check_init__(self) -> None:
        _check_inner(self.flow)
        validate.non_negative(friction=self.friction)

    def init(self, initial: PyTree) -> tuple[PyTree, PyTree]:
        """The flow's initial state, at rest."""
        position = self.flow.init(initial)
        return position, jax.tree.map(jnp.zeros_like, position)

    def setup(self) -> Setup | None:
        """The training that the flow predicts, with inertia."""
        inner = self.flow.setup()
        if inner is None:
            return None
        friction = number(self.friction)
        return replace(inner, optimizer="heavy ball", friction=friction)

    def velocity(self, state: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        """Time derivative of position and momentum."""
        position, momentum = state
        force = self.flow.velocity(position)
        return momentum, jax.tree.map(
            lambda g, v: g - jnp.asarray(self.friction, v.dtype) * v, force, momentum
        )

    def measure(self, state: tuple[PyTree, PyTree], outputs: bool) -> Measurement:
        """Measure the flow at the position."""
        return self.flow.measure(state[0], outputs)


class ModifiedFlow(WrappedFlow):
    r"""The modified equation of steps of length eta, :math:`\dot w = -(G + \tfrac\eta2 DG\,G)`.

    For a flow :math:`\dot w = -G(w)`, steps :math:`w^+ = w - \eta G(w)` follow this to order
    :math:`\eta^2`, and the flow itself to order :math:`\eta`. Time is still the running sum of the
    learning rate.

    Parameters
    ----------
    flow : KernelFlow, WeightFlow or LinearisedFlow
        The flow whose steps are described; it also says what ``initial`` may be.
    learning_rate : float
        :math:`\eta`, positive.

    Raises
    ------
    ValueError
        If the learning rate is not positive or not finite.
    TypeError
        If the learning rate is a schedule, or the flow is of another kind.

    Notes
    -----
    *Derived* for clipped flows, whose G is no gradient in general, so that :math:`DG\,G` is not
    :math:`\nabla \|G\|^2/2`; for unclipped ones Li, Tai, E 1511.06251.

    Second order needs a smooth G. Where G jumps, as under `Global` when a sample is dropped or
    taken back, or in the weights of a ReLU network, the order falls to 1. A kink, as at the
    threshold of `Abadi`, is crossed by one step in part on either side, which leaves an error of
    order :math:`\eta^2` for each crossing; it varies with where in the step that falls. For
    learning rates past the edge of stability the equation says nothing: it goes on to converge.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> flow = ntkdp.KernelFlow(jnp.eye(1), jnp.zeros((1, 1)), ntkdp.losses.SquaredError(),
    ...                         ntkdp.clipping.NoClipping())
    >>> modified = ntkdp.gradient_flow.ModifiedFlow(flow, learning_rate=0.1)
    >>> outputs = [ntkdp.solve(one, jnp.array([[1.0]]), [0.0, 1.0], outputs=True).outputs
    ...            for one in (flow, modified)]
    >>> [round(f[-1].item(), 4) for f in outputs], round(0.9**10, 4)
    ([0.3679, 0.3499], 0.3487)
    """

    flow: Flow
    learning_rate: Array

    def __init__(self, flow: Flow, learning_rate: ScalarLike) -> None:
        _check_inner(flow)
        if callable(learning_rate):
            raise TypeError(
                "learning_rate must be a number, got a schedule, whose modified equation changes "
                "with time; solve stretch by stretch at constant learning rates, or use recursion "
                "or dp_sgd.run, which take schedules"
            )
        rate = validate.scalar(learning_rate=validate.positive(learning_rate=learning_rate))
        self.flow = flow
        self.learning_rate = as_constant(rate)

    def init(self, initial: PyTree) -> PyTree:
        """The flow's initial state."""
        return self.flow.init(initial)

    def setup(self) -> Setup | None:
        """The training that the flow predicts, with steps of this length."""
        inner = self.flow.setup()
        return None if inner is None else replace(inner, learning_rate=rates(self.learning_rate, 1))

    def velocity(self, state: PyTree) -> PyTree:
        """Time derivative of the state."""
        # With velocity v = -G, DG G is the derivative of v along v.
        velocity, along = jax.jvp(self.flow.velocity, (state,), (self.flow.velocity(state),))
        return jax.tree.map(
            lambda v, d: v - jnp.asarray(self.learning_rate / 2, v.dtype) * d, velocity, along
        )

    def measure(self, state: PyTree, outputs: bool) -> Measurement:
        """Measure the flow at the state."""
        return self.flow.measure(state, outputs)
