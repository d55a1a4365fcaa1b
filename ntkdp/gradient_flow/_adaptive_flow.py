"""The flow of training whose clipping norm follows a quantile."""

from dataclasses import replace
from typing import TypeAlias

import jax
import jax.numpy as jnp

from ntkdp._backend import validate
from ntkdp._backend.types import Array, Float, PyTree, ScalarLike, as_constant
from ntkdp._results.setup import Setup
from ntkdp.clipping import Adaptive, check_adaptive
from ntkdp.gradient_flow._flow import TrainingFlow, WrappedFlow
from ntkdp.trajectory import Measurement

#: The state of the flow, and the logarithm of the clipping norms over those of the rule.
_State: TypeAlias = tuple[PyTree, Float[Array, " R"]]


class AdaptiveFlow(WrappedFlow):
    r"""A flow whose clipping norm moves, :math:`d \ln R/dt = -\tfrac\rho\eta (b - \gamma)`.

    The flow and R are one system. The share b of samples that are not clipped counts each by
    :math:`1/(1 + (\|g_i\|/R)^{1/\tau})`, a step from 1 to 0 with the width :math:`\tau` in
    :math:`\ln R`: with a sharp step R would jump back and forth at its quantile. Time is the
    running sum of the learning rate, hence the rate over the learning rate. With
    ``scope="layerwise"`` each group has an R of its own. The noise of the count, whose mean is
    zero, is left out.

    Parameters
    ----------
    flow : KernelFlow, WeightFlow or LinearisedFlow
        The flow whose rule moves; it also says what ``initial`` may be.
    adaptive : clipping.Adaptive
        Quantile :math:`\gamma` and rate :math:`\rho` of a step.
    learning_rate : float
        :math:`\eta` of the run that is described, positive.
    smoothing : float
        :math:`\tau`, positive.

    Raises
    ------
    ValueError, TypeError
        If a number is not positive, the rule bounds no single sample, or the flow is of another
        kind.

    Notes
    -----
    *Derived* from Andrew et al. 1905.03871, algorithm 1. ``recursion(..., adaptive=...)`` has
    the exact share and the steps of a run. The flow is stiff where R moves much faster than the
    outputs: pass ``solver=diffrax.Kvaerno5()``.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> flow = ntkdp.KernelFlow(jnp.eye(9), jnp.zeros((9, 1)), ntkdp.losses.SquaredError(),
    ...                         ntkdp.clipping.Abadi(50.0))
    >>> moving = ntkdp.gradient_flow.AdaptiveFlow(
    ...     flow, ntkdp.clipping.Adaptive(0.5, rate=0.2), learning_rate=0.01)
    >>> path = ntkdp.solve(moving, jnp.arange(1.0, 10.0)[:, None], [0.0, 2.0])
    >>> 4 < path.clip_norm[-1, 0].item() < 5  # the median
    True
    """

    flow: TrainingFlow
    adaptive: Adaptive
    learning_rate: ScalarLike
    smoothing: ScalarLike

    def __init__(
        self,
        flow: TrainingFlow,
        adaptive: Adaptive,
        learning_rate: ScalarLike,
        smoothing: ScalarLike = 0.05,
    ) -> None:
        if not isinstance(flow, TrainingFlow):
            raise TypeError(
                "flow must be a KernelFlow, a WeightFlow or a LinearisedFlow, got "
                f"{type(flow).__name__}"
            )
        if not isinstance(adaptive, Adaptive):
            raise TypeError(
                "adaptive must be an ntkdp.clipping.Adaptive, got " + type(adaptive).__name__
            )
        check_adaptive(adaptive, flow.clipping)
        self.flow = flow
        self.adaptive = adaptive
        self.learning_rate = as_constant(validate.positive_number(learning_rate=learning_rate))
        self.smoothing = as_constant(validate.positive_number(smoothing=smoothing))

    def init(self, initial: PyTree) -> _State:
        """The flow's initial state, with the clipping norm of the rule."""
        position = self.flow.init(initial)
        _, norms = jax.eval_shape(self.flow.velocity_and_norms, position)
        return position, jnp.zeros(norms.shape[0])

    def setup(self) -> Setup | None:
        """The training that the flow predicts, with how its clipping norm moves."""
        return replace(self.flow.setup(), adaptive=self.adaptive.in_words)

    def _clip_norm(self, moved: Float[Array, " R"]) -> Float[Array, " R"]:
        return self.adaptive.start(self.flow.clipping, moved.size) * jnp.exp(moved)

    def velocity(self, state: _State) -> _State:
        """Time derivative of the flow's state, and of the logarithm of the clipping norm."""
        position, moved = state
        clip_norm = self._clip_norm(moved)
        velocity, norms = self.flow.at_clip_norm(clip_norm).velocity_and_norms(position)
        norms = norms.astype(clip_norm.dtype)
        # The logarithm of zero has no derivative.
        above = jnp.log(clip_norm[:, None] / jnp.maximum(norms, jnp.finfo(norms.dtype).tiny))
        weights = jax.nn.sigmoid(above / jnp.asarray(self.smoothing, norms.dtype))
        rate = jnp.asarray(self.learning_rate, norms.dtype)
        return velocity, self.adaptive.log_change(jnp.mean(weights, axis=1)) / rate

    def measure(self, state: _State, outputs: bool) -> Measurement:
        """Measure the flow, with the clipping norm of the state."""
        position, moved = state
        clip_norm = self._clip_norm(moved)
        measured = self.flow.at_clip_norm(clip_norm).measure(position, outputs)
        return measured._replace(clip_norm=clip_norm)
