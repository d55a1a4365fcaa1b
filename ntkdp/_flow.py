"""What every flow is: a velocity, and something to measure along the way."""

from abc import abstractmethod
from dataclasses import replace
from typing import Any, Literal

import equinox as eqx

from ntkdp import clipping, losses
from ntkdp._backend import validate
from ntkdp._backend.types import Array, PyTree
from ntkdp._setup import Setup, described, number, rates
from ntkdp._stepping import Stepping
from ntkdp.clipping import ClippingRule
from ntkdp.losses import Loss
from ntkdp.trajectory import Measurement

Reduction = Literal["mean", "sum"]


class Flow(eqx.Module):
    """An autonomous ordinary differential equation with something to measure along it.

    Subclasses are final. :func:`ntkdp.solve` integrates any of them, with an example.
    """

    @abstractmethod
    def init(self, initial: PyTree) -> PyTree:
        """The state that ``initial`` describes, checked."""

    @abstractmethod
    def velocity(self, state: PyTree) -> PyTree:
        """Time derivative of the state."""

    @abstractmethod
    def measure(self, state: PyTree, outputs: bool) -> Measurement:
        """Losses, accuracies and clip fraction at a state, and outputs on request."""

    def setup(self) -> Setup | None:
        """What training it predicts, for comparisons; None if that is not known."""
        return None


def setup_of(rule: ClippingRule, loss: Loss, reduction: Reduction, optimizer: str = "sgd") -> Setup:
    """What a flow without noise predicts: no step, no noise, no sampling."""
    return Setup(
        clipping=described(rule),
        loss=described(loss),
        reduction=reduction,
        optimizer=optimizer,
        momentum=0.0 if optimizer == "sgd" else None,
        neglects=("noise", "sampling"),
    )


def with_steps(
    setup: Setup,
    stepping: Stepping,
    noise_multiplier: Any = None,
    sample_rate: Any = None,
    noise_per_group: bool = False,
) -> Setup:
    """The same of so many steps, and, where they are given, of noise and sampling."""
    drawn = noise_multiplier is not None
    return replace(
        setup,
        learning_rate=rates(stepping.learning_rate, stepping.steps),
        steps=stepping.steps,
        noise_multiplier=number(noise_multiplier),
        sample_rate=number(sample_rate),
        noise_per_group=bool(noise_per_group),
        neglects=() if drawn else setup.neglects,
    )


def check_clipping(rule: Any) -> ClippingRule:
    if not isinstance(rule, ClippingRule):
        raise TypeError(f"clipping must be a rule of ntkdp.clipping, e.g. Abadi(1.0), got {rule!r}")
    return rule


def check_targets(loss: Loss, targets: Any, n: int, n_outputs: int | None, name: str) -> Array:
    targets = validate.array(**{name: targets})
    if n == 0 or targets.ndim == 0 or targets.shape[0] != n:
        raise ValueError(
            f"{name} must have one row a sample, {n}, and a sample or more, "
            f"got shape {targets.shape}"
        )
    known = loss.n_outputs(targets) if n_outputs is None else n_outputs
    return targets if known is None else loss.check(targets, n, known, name)


def measurement(
    loss: Loss,
    reduction: Reduction,
    factors: Array,
    train: tuple[Array, Array],
    test: tuple[Array, Array | None] | None,
    outputs: bool,
) -> Measurement:
    reduced, accuracy = losses.mean_or_sum(loss, *train, reduction)
    test_loss = test_accuracy = None
    if test is not None and test[1] is not None:
        test_loss, test_accuracy = losses.mean_or_sum(loss, test[0], test[1], reduction)
    return Measurement(
        loss=reduced,
        clip_fraction=clipping.clip_fraction(factors),
        accuracy=accuracy,
        outputs=train[0] if outputs else None,
        test_loss=test_loss,
        test_accuracy=test_accuracy,
        test_outputs=test[0] if test is not None and outputs else None,
    )
