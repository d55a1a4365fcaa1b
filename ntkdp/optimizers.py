r"""Optimizers that runs and predictions take alike: from a clipped, noisy gradient to a step.

An optimizer is a function of the learning rate that returns an optax transformation, as
``optax.adam`` is. `SGD` and `Adam` are made of optax's parts; what they add is that predictions can
tell what they do:

- A **linear** optimizer moves the weights by a linear function of gradients and weights: `SGD` with
  momentum, Nesterov momentum, weight decay and averages. It commutes with every linear map, the
  Jacobian of a linear model among them, so the *same* transformation acts on the outputs: minus
  their velocity, noise included, takes the place of the gradient and :math:`J w` that of the
  weights. That is why a frozen kernel predicts it.
- `Adam` divides by a second moment of each weight, which outputs do not tell.

``average`` is the decay d of an exponential moving average of the weights at which a run is
measured, while its gradients are taken at the weights themselves:
:math:`\bar w_0 = w_0,\ \bar w_{k+1} = d\,\bar w_k + (1 - d)\,w_{k+1}`. It starts at the initial
weights and is not debiased, as ``optax.incremental_update``, ``flax.nnx.EMA`` and PyTorch's
``get_ema_avg_fn`` have it. It is part of what is released, and costs no privacy.
"""

import functools
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ntkdp._backend import validate
from ntkdp._backend.norms import wide
from ntkdp._backend.types import (
    Array,
    LearningRate,
    PyTree,
    ScalarLike,
    as_constant,
    common_dtype,
    is_traced,
)

__all__ = ["SGD", "Adam", "Optimizer"]

#: Of numbers in the precision of the gradients, a transformation.
_Parts: TypeAlias = Callable[[Callable[[ScalarLike], Array]], optax.GradientTransformation]


class Optimizer(eqx.Module):
    """A function of the learning rate that returns an optax transformation, and what it is.

    Subclasses are final: `SGD` and `Adam`, or your own.

    Parameters
    ----------
    average : float or None
        Decay d in [0, 1) of the average of the weights at which a run is measured; None for the
        weights themselves.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> transformation = ntkdp.optimizers.SGD(momentum=0.9)(0.1)
    >>> state = transformation.init(jnp.zeros(1))
    >>> updates, state = transformation.update(jnp.ones(1), state)
    >>> updates.tolist()
    [-0.1]
    """

    average: eqx.AbstractVar[ScalarLike | None]
    #: Whether updates are a linear function of all gradients and weights so far.
    is_linear: eqx.AbstractClassVar[bool]

    @property
    @abstractmethod
    def decays_weights(self) -> bool:
        """Whether a step depends on the weights besides their gradient."""

    @abstractmethod
    def __call__(self, learning_rate: LearningRate) -> optax.GradientTransformationExtraArgs:
        """The optax transformation at a learning rate, a number or a schedule."""


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
        self.momentum = _part(validate.scalar(momentum=validate.decay(momentum=momentum)))
        self.nesterov = validate.flag(nesterov=nesterov)
        decay = validate.non_negative(weight_decay=weight_decay)
        self.weight_decay = _part(validate.scalar(weight_decay=decay))
        self.decoupled = validate.flag(decoupled=decoupled)
        self.average = _checked_average(average)
        if self.nesterov and not _is_present(self.momentum):
            raise ValueError("nesterov must be False without momentum, got momentum=0")

    @property
    def decays_weights(self) -> bool:
        """Whether there is weight decay."""
        return _is_present(self.weight_decay)

    def __call__(self, learning_rate: LearningRate) -> optax.GradientTransformationExtraArgs:
        """The optax transformation at a learning rate, a number or a schedule."""

        def parts(number: Callable[[ScalarLike], Array]) -> optax.GradientTransformation:
            steps = []
            if _is_present(self.momentum):
                steps.append(optax.trace(number(self.momentum), self.nesterov))
            if self.decays_weights:
                decay = optax.add_decayed_weights(number(self.weight_decay))
                steps.insert(len(steps) if self.decoupled else 0, decay)
            return optax.chain(*steps, optax.scale_by_learning_rate(learning_rate))

        return _in_precision_of_gradients(parts)


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
        self.weight_decay = _part(validate.scalar(weight_decay=decay))
        self.correct_noise = validate.flag(correct_noise=correct_noise)
        self.floor = as_constant(validate.positive_number(floor=floor))
        self.average = _checked_average(average)

    @property
    def decays_weights(self) -> bool:
        """Whether there is weight decay."""
        return _is_present(self.weight_decay)

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

        return _in_precision_of_gradients(parts)


#: Learning rate to optax transformation: one of this module, or any function like ``optax.lion``.
OptimizerLike: TypeAlias = Optimizer | Callable[[LearningRate], optax.GradientTransformation]


def as_optimizer(optimizer: OptimizerLike | None) -> OptimizerLike:
    """The optimizer of an argument, checked; by default `SGD`.

    Examples
    --------
    >>> import ntkdp
    >>> ntkdp.optimizers.as_optimizer(None).is_linear
    True
    """
    if optimizer is None:
        return SGD()
    if not callable(optimizer):
        raise TypeError(
            "optimizer must be a function of the learning rate, e.g. optax.adam, "
            f"got {type(optimizer).__name__}"
        )
    if isinstance(optimizer, type):
        name = optimizer.__name__
        raise TypeError(f"optimizer must be an optimizer, e.g. {name}(), got the class {name}")
    return optimizer


def recognised(optimizer: OptimizerLike) -> OptimizerLike:
    """The `SGD` or `Adam` that a function of optax stands for; any other function as it is.

    Known are ``optax.sgd``, ``optax.adam`` and ``optax.adamw``, also with options by
    ``functools.partial``.

    Examples
    --------
    >>> import functools, ntkdp, optax
    >>> sgd = ntkdp.optimizers.recognised(functools.partial(optax.sgd, momentum=0.9))
    >>> float(sgd.momentum)
    0.9
    """
    function: Any = optimizer
    options: dict[str, Any] = {}
    while isinstance(function, functools.partial) and not function.args:
        options = function.keywords | options
        function = function.func
    options = {name: value for name, value in options.items() if value is not None}
    if function is optax.sgd and options.keys() <= {"momentum", "nesterov"}:
        known = SGD(options.get("momentum", 0.0))
        looks_ahead = bool(options.get("nesterov", False)) and _is_present(known.momentum)
        return SGD(known.momentum, nesterov=looks_ahead)
    if function is optax.adam and options.keys() <= {"b1", "b2", "eps"}:
        return Adam(**options)
    if function is optax.adamw and options.keys() <= {"b1", "b2", "eps", "weight_decay"}:
        return Adam(**{"weight_decay": 1e-4} | options)
    return optimizer


def average_of(optimizer: OptimizerLike) -> ScalarLike | None:
    """The decay of the average at which a run is measured, None for the weights themselves.

    Examples
    --------
    >>> import ntkdp
    >>> float(ntkdp.optimizers.average_of(ntkdp.optimizers.SGD(average=0.9)))
    0.9
    """
    return optimizer.average if isinstance(optimizer, Optimizer) else None


def start_average(optimizer: OptimizerLike, weights: PyTree) -> PyTree | None:
    """The average before the first step, in single precision at least; None if there is none.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> ntkdp.optimizers.start_average(ntkdp.optimizers.SGD(average=0.9), jnp.ones(1)).tolist()
    [1.0]
    """
    return None if average_of(optimizer) is None else jax.tree.map(wide, weights)


def next_average(optimizer: OptimizerLike, average: PyTree | None, weights: PyTree) -> PyTree:
    """The average after a step that led to ``weights``.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> sgd = ntkdp.optimizers.SGD(average=0.75)
    >>> ntkdp.optimizers.next_average(sgd, jnp.ones(1), jnp.zeros(1)).tolist()
    [0.75]
    """
    decay = average_of(optimizer)
    if average is None or decay is None:
        return average

    def mixed(old: Array, new: Array) -> Array:
        kept = jnp.asarray(decay, old.dtype)
        return kept * old + (1 - kept) * new.astype(old.dtype)

    return jax.tree.map(mixed, average, weights)


def updated(
    transformation: optax.GradientTransformation,
    gradient: PyTree,
    state: PyTree,
    weights: PyTree,
    noise_variance: PyTree,
) -> tuple[PyTree, PyTree]:
    """Updates of a transformation and its next state, told the variance of the gradient's noise.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> sgd = ntkdp.optimizers.SGD()(0.5)
    >>> zeros = jnp.zeros(1)
    >>> ntkdp.optimizers.updated(sgd, jnp.ones(1), sgd.init(zeros), zeros, 0.0)[0].tolist()
    [-0.5]
    """
    # Optimizers rely on promotion, of their count of steps for one.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates, state = optax.with_extra_args_support(transformation).update(
            gradient, state, weights, noise_variance=noise_variance
        )
    return updates, state


def _part(value: ScalarLike) -> ScalarLike:
    """A number, a Python zero if it is zero: it is no array, so that programs leave it out."""
    if is_traced(value) or float(np.asarray(value)):
        return cast(ScalarLike, as_constant(value))
    return 0.0


def _is_present(value: ScalarLike) -> bool:
    return not (isinstance(value, float) and value == 0)


def _checked_average(average: ScalarLike | None) -> ScalarLike | None:
    if average is None:
        return None
    checked = validate.scalar(average=validate.decay(average=average))
    return cast(ScalarLike, as_constant(checked))


def _in_precision_of_gradients(parts: _Parts) -> optax.GradientTransformationExtraArgs:
    """A transformation whose numbers and state keep the dtype of the gradients."""

    def of(tree: PyTree) -> optax.GradientTransformationExtraArgs:
        dtype = common_dtype(*jax.tree.leaves(tree))
        made = parts(lambda value: jnp.asarray(value, dtype))
        return optax.with_extra_args_support(made)

    def init(weights: PyTree) -> PyTree:
        return of(weights).init(weights)

    def update(
        gradient: PyTree, state: PyTree, weights: PyTree = None, **extra: PyTree
    ) -> tuple[PyTree, PyTree]:
        updates, after = of(gradient).update(gradient, state, weights, **extra)
        return updates, jax.tree.map(lambda new, old: new.astype(old.dtype), after, state)

    return optax.GradientTransformationExtraArgs(init, update)


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
