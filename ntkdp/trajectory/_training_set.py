"""What is trained on: targets that are checked, and the losses and accuracies at a state."""

from typing import Any, NamedTuple

from ntkdp import clipping, losses
from ntkdp._backend import validate
from ntkdp._backend.types import Array
from ntkdp.clipping import ClippingRule
from ntkdp.losses import Loss, Reduction


class Measurement(NamedTuple):
    """One state, or a leading time axis of them: what a `Trajectory` records of it.

    Stacked, they make a trajectory: :func:`from_measurements`.
    """

    loss: Array
    clip_fraction: Array
    accuracy: Array | None = None
    outputs: Array | None = None
    test_loss: Array | None = None
    test_accuracy: Array | None = None
    test_outputs: Array | None = None


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
