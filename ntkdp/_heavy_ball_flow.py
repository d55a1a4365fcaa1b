"""A flow with inertia."""

from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ntkdp._backend import validate
from ntkdp._backend.types import PyTree, as_constant
from ntkdp._flow import Flow
from ntkdp._kernel_flow import KernelFlow
from ntkdp._linearised_flow import LinearisedFlow
from ntkdp._setup import Setup, number
from ntkdp._weight_flow import WeightFlow
from ntkdp.trajectory import Measurement


class HeavyBallFlow(Flow):
    r"""A flow with inertia: :math:`\ddot w + \alpha \dot w = -G(w)` for :math:`\dot w = -G(w)`.

    The limit of gradient descent with momentum beta (``v <- beta v + G``, ``w <- w - eta v``) for
    :math:`\alpha = (1 - \beta)/\sqrt{\eta}`, at rest at the start. Its time is
    :math:`t = \sqrt{\eta}\,k` after k steps, not :math:`\eta k`: bring a run's times to it with
    ``run.rescale_time(learning_rate ** -0.5)``.

    Parameters
    ----------
    flow : KernelFlow, WeightFlow or LinearisedFlow
        What is given inertia; its ``initial`` is taken.
    friction : float
        :math:`\alpha`, at least 0, per unit of this flow's time.

    Raises
    ------
    ValueError
        Friction below 0 or not finite.

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
    friction: Any = eqx.field(converter=as_constant)

    def __check_init__(self) -> None:
        if not isinstance(self.flow, KernelFlow | WeightFlow | LinearisedFlow):
            raise TypeError(
                f"flow must be a KernelFlow, a WeightFlow or a LinearisedFlow, got {self.flow!r}"
            )
        validate.non_negative(friction=self.friction)

    def init(self, initial: PyTree) -> tuple[PyTree, PyTree]:
        """State of the flow's initial state, at rest."""
        position = self.flow.init(initial)
        return position, jax.tree.map(jnp.zeros_like, position)

    def setup(self) -> Setup | None:
        """What training it predicts: that of the flow, with inertia."""
        inner = self.flow.setup()
        if inner is None:
            return None
        friction = number(self.friction)
        return replace(inner, optimizer="heavy ball", momentum=None, friction=friction)

    def velocity(self, state: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        """Time derivative of position and momentum."""
        position, momentum = state
        force = self.flow.velocity(position)
        return momentum, jax.tree.map(
            lambda g, v: g - jnp.asarray(self.friction, v.dtype) * v, force, momentum
        )

    def measure(self, state: tuple[PyTree, PyTree], outputs: bool) -> Measurement:
        """What the flow measures at the position."""
        return self.flow.measure(state[0], outputs)
