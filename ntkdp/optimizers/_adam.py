"""Adam, AdamW, and Adam whose second moment is free of the noise."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from ntkdp._backend import validate
from ntkdp._backend.types import Array, LearningRate, PyTree, ScalarLike, as_constant
from ntkdp.optimizers._optimizer import Optimizer
from ntkdp.optimizers._parts import checked_average, in_precision_of_gradients, is_present, part


class Adam(Optimizer):
    r"""Adam, AdamW, and DP-AdamBC, which takes the noise out of the second moment.

    .. math:: w_{k+1} = w_k - \eta_k \left(\frac{\hat m}{\sqrt{\hat v} + \epsilon}
              + \lambda w_k\right), \qquad \text{or} \quad
              \frac{\hat m}{\sqrt{\max(\hat v - \Phi, \gamma)}} \ \text{ with correct\_noise},

    where :math:`\hat m, \hat v` are the debiased moving averages of the gradient and its square,
    and :math:`\Phi = (\sigma S / B)^2` is the variance of the noise in the divided gradient, B its
    divisor (q n, or q with ``reduction="sum"``).

    Parameters
    ----------
    b1, b2 : float
        Decays of the two moments, in [0, 1).
    eps : float
        :math:`\epsilon`, at least 0, added to the root; it has no part with ``correct_noise``.
    weight_decay : float
        :math:`\lambda`, at least 0: decoupled (AdamW), after clipping and noise.
    correct_noise : bool
        Whether the variance of the noise is subtracted from the second moment (DP-AdamBC).
    floor : float
        :math:`\gamma`, positive: the least corrected second moment, in units of a squared gradient.
        It takes the place of :math:`\epsilon^2` and is to be tuned.
    average : float, optional
        Decay of the average of the weights at which a run is measured, see
        :mod:`ntkdp.optimizers`.

    Raises
    ------
    ValueError, TypeError
        If a number is out of its range. With ``correct_noise`` in a loop of your own, if ``update``
        is not given ``noise_variance``, a number or a tree like the gradient.

    Notes
    -----
    Kingma and Ba (2015); AdamW: Loshchilov and Hutter (2019); DP-AdamBC: Tang, Shpilevskiy and
    Lécuyer (2024), 2312.14334, where the floor is a hyper-parameter. Without the correction, where
    noise dominates the gradient, Adam is momentum SGD at the rate
    :math:`\eta B/(\sigma S)` (*derived*, claim C47).

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> transformation = ntkdp.optimizers.Adam(correct_noise=True)(0.1)
    >>> state = transformation.init(jnp.zeros(1))
    >>> updates, state = transformation.update(jnp.full(1, 5.0), state, noise_variance=16.0)
    >>> [round(u, 4) for u in updates.tolist()]  # 5 over the root of 25 - 16
    [-0.1667]
    """

    b1: ScalarLike
    b2: ScalarLike
    eps: ScalarLike
    weight_decay: ScalarLike
    correct_noise: bool = eqx.field(static=True)
    floor: ScalarLike
    average: ScalarLike | None
    is_linear = False

    def __init__(
        self,
        b1: ScalarLike = 0.9,
        b2: ScalarLike = 0.999,
        eps: ScalarLike = 1e-8,
        weight_decay: ScalarLike = 0.0,
        correct_noise: bool = False,
        floor: ScalarLike = 5e-8,
        average: ScalarLike | None = None,
    ) -> None:
        self.b1 = as_constant(validate.scalar(b1=validate.decay(b1=b1)))
        self.b2 = as_constant(validate.scalar(b2=validate.decay(b2=b2)))
        self.eps = as_constant(validate.scalar(eps=validate.non_negative(eps=eps)))
        decay = validate.non_negative(weight_decay=weight_decay)
        self.weight_decay = part(validate.scalar(weight_decay=decay))
        self.correct_noise = validate.flag(correct_noise=correct_noise)
        self.floor = as_constant(validate.positive_number(floor=floor))
        self.average = checked_average(average)

    @property
    def decays_weights(self) -> bool:
        """Whether there is weight decay."""
        return is_present(self.weight_decay)

    def __call__(self, learning_rate: LearningRate) -> optax.GradientTransformationExtraArgs:
        """The optax transformation at a learning rate, a number or a schedule."""

        def parts(number: Callable[[ScalarLike], Array]) -> optax.GradientTransformation:
            b1, b2 = number(self.b1), number(self.b2)
            scale = optax.scale_by_adam(b1, b2, number(self.eps))
            if self.correct_noise:
                scale = _corrected(scale, b1, b2, number(self.floor))
            steps = [scale]
            if self.decays_weights:
                steps.append(optax.add_decayed_weights(number(self.weight_decay)))
            return optax.chain(*steps, optax.scale_by_learning_rate(learning_rate))

        return in_precision_of_gradients(parts)


def _corrected(
    adam: optax.GradientTransformation, b1: Array, b2: Array, floor: Array
) -> optax.GradientTransformationExtraArgs:
    """Adam's scaling with the variance of the noise taken out of the second moment."""

    def update(
        gradient: PyTree,
        state: optax.ScaleByAdamState,
        weights: PyTree = None,
        *,
        noise_variance: PyTree = None,
        **extra: PyTree,
    ) -> tuple[PyTree, optax.ScaleByAdamState]:
        del extra
        if noise_variance is None:
            raise ValueError(
                "noise_variance must be given to update with Adam(correct_noise=True), got None; "
                "it is (sigma S/B)^2, the variance of the noise in the divided gradient"
            )
        _, state = adam.update(gradient, state, weights)
        moment = optax.tree.bias_correction(state.mu, b1, state.count)
        square = optax.tree.bias_correction(state.nu, b2, state.count)
        variance = jax.tree.broadcast(noise_variance, square)

        def scaled(m: Array, v: Array, noise: ScalarLike) -> Array:
            return m / jnp.sqrt(jnp.maximum(v - jnp.asarray(noise, v.dtype), floor))

        return jax.tree.map(scaled, moment, square, variance), state

    return optax.GradientTransformationExtraArgs(adam.init, update)
