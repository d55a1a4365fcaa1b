"""Optimizers from arguments: checked, and recognised where optax has the same."""

import functools
from typing import Any

import optax

from ntkdp.optimizers._adam import Adam
from ntkdp.optimizers._optimizer import Optimizer, OptimizerLike
from ntkdp.optimizers._parts import is_present
from ntkdp.optimizers._sgd import SGD


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
        looks_ahead = bool(options.get("nesterov", False)) and is_present(known.momentum)
        return SGD(known.momentum, nesterov=looks_ahead)
    if function is optax.adam and options.keys() <= {"b1", "b2", "eps"}:
        return Adam(**options)
    if function is optax.adamw and options.keys() <= {"b1", "b2", "eps", "weight_decay"}:
        return Adam(**{"weight_decay": 1e-4} | options)
    return optimizer


def as_linear(optimizer: OptimizerLike | None) -> Optimizer:
    """The optimizer of an argument, if its steps are linear in gradients and weights.

    Examples
    --------
    >>> import ntkdp, optax
    >>> ntkdp.optimizers.as_linear(optax.sgd).decays_weights
    False
    """
    known = recognised(as_optimizer(optimizer))
    if isinstance(known, Optimizer) and known.is_linear:
        return known
    is_module = isinstance(known, Optimizer)
    name = type(known).__name__ if is_module else getattr(known, "__name__", "a function")
    raise ValueError(
        "optimizer must be linear in gradients and weights, as optimizers.SGD and optax.sgd are, "
        f"where weights are not followed one by one, got {name}; LinearisedFlow steps the weights "
        "and takes any optimizer, stochastic_flow.response_ensemble takes Adam, a "
        "preconditioned_kernel stands for a frozen preconditioner, and where noise dominates the "
        "gradient Adam is SGD(momentum=b1) at the learning rate (1 - b1) eta B/(sigma S)"
    )
