"""Training data that check themselves once, and the losses and accuracies at a state."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ntkdp import losses
from ntkdp._backend import devices, validate
from ntkdp._backend.types import Array, ArrayLike
from ntkdp.clipping import ClippingRule, rescaled
from ntkdp.losses import Loss, Reduction


class Measurement(NamedTuple):
    """What a `Trajectory` records of one state, or of several along a leading time axis.

    Stacked, they make a trajectory: :func:`from_measurements`.
    """

    loss: Array
    clip_fraction: Array
    accuracy: Array | None = None
    outputs: Array | None = None
    test_loss: Array | None = None
    test_accuracy: Array | None = None
    test_outputs: Array | None = None
    clip_norm: Array | None = None


class TrainingSet(eqx.Module):
    """Targets, and the loss and clipping rule that they are trained with; a pytree.

    What the arguments tell is checked when it is made, and what depends on the samples by
    :meth:`fit`, which every owner calls once it knows them.
    """

    targets: Array
    test_targets: Array | None
    loss: Loss
    clipping: ClippingRule
    reduction: Reduction = eqx.field(static=True)

    def __init__(
        self,
        targets: ArrayLike,
        loss: Loss | Callable[[Array, Array], Array],
        clipping: ClippingRule,
        reduction: Reduction,
        test_targets: ArrayLike | None = None,
    ) -> None:
        self.loss = losses.as_loss(loss)
        self.clipping = check_clipping(clipping)
        self.reduction = validate.choice(("mean", "sum"), reduction=reduction)
        self.targets = validate.array(targets=targets)
        self.test_targets = None
        if test_targets is not None:
            self.test_targets = validate.array(test_targets=test_targets)

    def fit(
        self, n: int, n_test: int | None, n_outputs: int | None, *, test_from: str = "test_x"
    ) -> "TrainingSet":
        """The same for n training and ``n_test`` test samples, or an error that names the misfit.

        ``test_from`` is the argument that test samples come from.
        """
        if n_test is None and self.test_targets is not None:
            raise ValueError(f"test_targets need {test_from}, got {test_from}=None")
        test_targets = None
        if n_test is not None and self.test_targets is not None:
            test_targets = self._fitted(self.test_targets, n_test, n_outputs, "test_targets")
        return self._with(self._fitted(self.targets, n, n_outputs, "targets"), test_targets)

    def check_outputs(self, n_outputs: int) -> None:
        """Raise unless the targets fit outputs of ``n_outputs`` columns."""
        self.loss.check(self.targets, self.n_samples, n_outputs)
        if self.test_targets is not None:
            self.loss.check(self.test_targets, len(self.test_targets), n_outputs, "test_targets")

    def in_precision(self, dtype: np.dtype) -> "TrainingSet":
        """Targets of ``dtype``; labels, which are whole numbers, as they are."""

        def cast(targets: Array) -> Array:
            floating = jnp.issubdtype(targets.dtype, jnp.floating)
            return targets.astype(dtype) if floating else targets

        test = None if self.test_targets is None else cast(self.test_targets)
        return self._with(cast(self.targets), test)

    def place(self, mesh: Mesh | None, *, spread: bool, spread_test: bool = False) -> "TrainingSet":
        """The targets on the devices of ``mesh``, in equal parts or whole on each."""

        def put(targets: Array, spread: bool) -> Array:
            placed: Array = (devices.spread if spread else devices.everywhere)(mesh, targets)
            return placed

        test = None if self.test_targets is None else put(self.test_targets, spread_test)
        return self._with(put(self.targets, spread), test)

    @property
    def n_samples(self) -> int:
        """Training samples n."""
        return self.targets.shape[0]

    @property
    def divisor(self) -> int:
        """What the reduction divides a sum over the samples by: n, or 1."""
        return losses.divisor(self.reduction, self.n_samples)

    def measure(
        self, train: Array, test: Array | None, clip_fraction: Array, outputs: bool
    ) -> Measurement:
        """Losses and accuracies at outputs ``(n, K)``, with the outputs themselves on request."""
        loss, accuracy = losses.mean_or_sum(self.loss, train, self.targets, self.reduction)
        test_loss = test_accuracy = None
        if test is not None and self.test_targets is not None:
            test_loss, test_accuracy = losses.mean_or_sum(
                self.loss, test, self.test_targets, self.reduction
            )
        return Measurement(
            loss=loss,
            clip_fraction=clip_fraction,
            accuracy=accuracy,
            outputs=train if outputs else None,
            test_loss=test_loss,
            test_accuracy=test_accuracy,
            test_outputs=test if outputs else None,
        )

    def _fitted(self, targets: Array, n: int, n_outputs: int | None, name: str) -> Array:
        if targets.ndim == 0 or targets.shape[0] != n:
            raise ValueError(f"{name} must have one row a sample, {n}, got shape {targets.shape}")
        known = self.loss.n_outputs(targets) if n_outputs is None else n_outputs
        return targets if known is None else self.loss.check(targets, n, known, name)

    def _with(self, targets: Array, test_targets: Array | None) -> "TrainingSet":
        """The same with other targets, which are not checked again."""
        changed: TrainingSet = eqx.tree_at(
            lambda data: (data.targets, data.test_targets),
            self,
            (targets, test_targets),
            is_leaf=lambda node: node is None,
        )
        return changed


_Owner = TypeVar("_Owner", bound="HasTrainingSet")


class HasTrainingSet(eqx.Module):
    """A module around a `TrainingSet`, whose fields can be read from it directly."""

    data: eqx.AbstractVar[TrainingSet]

    @property
    def targets(self) -> Array:
        """Targets of the training samples."""
        return self.data.targets

    @property
    def test_targets(self) -> Array | None:
        """Targets of the test samples, if there are any."""
        return self.data.test_targets

    @property
    def loss(self) -> Loss:
        """The loss of one sample's outputs and target."""
        return self.data.loss

    @property
    def clipping(self) -> ClippingRule:
        """The rule that clips each sample's gradient."""
        return self.data.clipping

    @property
    def reduction(self) -> Reduction:
        """Whether loss and drift are averaged over samples, "mean", or summed, "sum"."""
        return self.data.reduction

    def at_clip_norm(self: _Owner, clip_norm: Array | None) -> _Owner:
        """The same with the clipping norms ``(groups,)`` in place of the rule's; None: as it is."""
        if clip_norm is None:
            return self
        rule = rescaled(self.clipping, clip_norm)
        moved: _Owner = eqx.tree_at(lambda owner: owner.data.clipping, self, rule)
        return moved


def as_samples(**named: ArrayLike) -> Array:
    """Inputs ``(n, ...)`` of at least one sample."""
    ((name, x),) = named.items()
    samples = validate.array(**{name: x})
    if samples.ndim < 2 or samples.shape[0] == 0:
        raise ValueError(f"{name} must have shape (n, ...) with n >= 1, got {samples.shape}")
    return samples


def check_clipping(rule: object) -> ClippingRule:
    """``rule`` if it is a clipping rule."""
    if not isinstance(rule, ClippingRule):
        raise TypeError(f"clipping must be a rule of ntkdp.clipping, e.g. Abadi(1.0), got {rule!r}")
    return rule
