"""Stochastic gradient descent with momentum and weight decay."""

from collections.abc import Callable

import equinox as eqx
import optax

from ntkdp._backend import validate
from ntkdp._backend.types import Array, LearningRate, ScalarLike
from ntkdp.optimizers._optimizer import Optimizer
from ntkdp.optimizers._parts import checked_average, in_precision_of_gradients, is_present, part


class SGD(Optimizer):
    r"""Stochastic gradient descent with momentum, Nesterov momentum and weight decay.

    .. math:: m_{k+1} = \beta m_k + g_k, \qquad w_{k+1} = w_k - \eta_k u_k,

    with :math:`u_k = m_{k+1}`, or :math:`g_k + \beta m_{k+1}` with ``nesterov``. Weight decay
    :math:`\lambda` adds :math:`\lambda w_k` to :math:`g_k`, or to :math:`u_k` if it is
    ``decoupled``; without momentum both are the same.

    Parameters
    ----------
    momentum : float
        :math:`\beta` in [0, 1).
    nesterov : bool
        Whether the step looks ahead along the momentum.
    weight_decay : float
        :math:`\lambda`, at least 0, added after clipping and noise: it costs no privacy.
    decoupled : bool
        Whether weight decay stays out of the momentum (SGDW).
    average : float, optional
        Decay of the average of the weights at which a run is measured, see
        :mod:`ntkdp.optimizers`.

    Raises
    ------
    ValueError, TypeError
        If a number is out of its range, or ``nesterov`` is asked for without momentum.

    Notes
    -----
    ``optax.trace``, ``optax.add_decayed_weights`` and ``optax.scale_by_learning_rate``, in this
    order if decoupled. Decoupled weight decay: Loshchilov and Hutter (2019), 1711.05101.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ntkdp
    >>> run = ntkdp.dp_sgd.run(
    ...     lambda w, x: x @ w, jnp.array([[3.0]]), jnp.ones((1, 1)), jnp.zeros((1, 1)),
    ...     ntkdp.losses.SquaredError(), ntkdp.clipping.Abadi(1.0), learning_rate=0.5, steps=2,
    ...     optimizer=ntkdp.optimizers.SGD(momentum=0.5), outputs=True, key=jax.random.key(0))
    >>> run.outputs[:, 0, 0].tolist()
    [3.0, 2.5, 1.75]
    """

    momentum: ScalarLike
    nesterov: bool = eqx.field(static=True)
    weight_decay: ScalarLike
    decoupled: bool = eqx.field(static=True)
    average: ScalarLike | None
    is_linear = True

    def __init__(
        self,
        momentum: ScalarLike = 0.0,
        nesterov: bool = False,
        weight_decay: ScalarLike = 0.0,
        decoupled: bool = False,
        average: ScalarLike | None = None,
    ) -> None:
        self.momentum = part(validate.scalar(momentum=validate.decay(momentum=momentum)))
        self.nesterov = validate.flag(nesterov=nesterov)
        decay = validate.non_negative(weight_decay=weight_decay)
        self.weight_decay = part(validate.scalar(weight_decay=decay))
        self.decoupled = validate.flag(decoupled=decoupled)
        self.average = checked_average(average)
        if self.nesterov and not is_present(self.momentum):
            raise ValueError("nesterov must be False without momentum, got momentum=0")

    @property
    def decays_weights(self) -> bool:
        """Whether there is weight decay."""
        return is_present(self.weight_decay)

    def __call__(self, learning_rate: LearningRate) -> optax.GradientTransformationExtraArgs:
        """The optax transformation at a learning rate, a number or a schedule."""

        def parts(number: Callable[[ScalarLike], Array]) -> optax.GradientTransformation:
            steps = []
            if is_present(self.momentum):
                steps.append(optax.trace(number(self.momentum), self.nesterov))
            if self.decays_weights:
                decay = optax.add_decayed_weights(number(self.weight_decay))
                steps.insert(len(steps) if self.decoupled else 0, decay)
            return optax.chain(*steps, optax.scale_by_learning_rate(learning_rate))

        return in_precision_of_gradients(parts)
