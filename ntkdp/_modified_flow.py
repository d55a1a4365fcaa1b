"""A flow that knows the length of the steps it stands for."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from ntkdp._backend import validate
from ntkdp._backend.types import Array, PyTree, as_constant
from ntkdp._flow import Flow
from ntkdp._heavy_ball_flow import HeavyBallFlow
from ntkdp._setup import Setup, rates
from ntkdp.trajectory import Measurement


class ModifiedFlow(Flow):
    r"""The modified equation of steps of length eta, :math:`\dot w = -(G + \tfrac\eta2 DG\,G)`.

    For a flow :math:`\dot w = -G(w)`, steps :math:`w^+ = w - \eta G(w)` follow this to order
    :math:`\eta^2`, and the flow itself to order :math:`\eta`. Time is still the running sum of the
    learning rate.

    Parameters
    ----------
    flow : KernelFlow, WeightFlow or LinearisedFlow
        Whose steps are meant; its ``initial`` is taken.
    learning_rate : float
        :math:`\eta`, positive.

    Raises
    ------
    ValueError
        Learning rate not positive or not finite.
    TypeError
        A schedule in place of a learning rate, a flow of another kind.

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

    def __init__(self, flow: Flow, learning_rate: Any) -> None:
        if not isinstance(flow, Flow) or isinstance(flow, HeavyBallFlow | ModifiedFlow):
            raise TypeError(
                f"flow must be a KernelFlow, a WeightFlow or a LinearisedFlow, got {flow!r}"
            )
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
        """State of the flow's initial state."""
        return self.flow.init(initial)

    def setup(self) -> Setup | None:
        """What training it predicts: that of the flow, with steps of this length."""
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
        """What the flow measures at the state."""
        return self.flow.measure(state, outputs)
