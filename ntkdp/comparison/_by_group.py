"""Losses and accuracies by subgroup, of outputs that a prediction or a run recorded."""

from typing import NamedTuple

import equinox as eqx
import jax
import numpy as np

from ntkdp._backend import validate
from ntkdp._backend.precision import at_least_single
from ntkdp._backend.subgroups import Labels, subgroups
from ntkdp._backend.types import Array, ArrayLike
from ntkdp.losses import Loss, SampleLoss, as_loss


class GroupMetrics(NamedTuple):
    """Means over subgroups, which are in the order of their sorted labels; a pytree.

    ``labels`` and ``counts`` are ``(G,)``. ``loss`` is ``(..., G)``, the mean over the samples of a
    subgroup whatever the reduction of training is, with the leading axes of the outputs, and
    ``accuracy`` likewise, or None for regression.

    Made by :func:`by_group`, with an example.
    """

    labels: np.ndarray
    counts: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray | None

    def errors(self, observed: "GroupMetrics") -> np.ndarray:
        r"""Error of the loss of each subgroup ``(G,)``, if this is predicted and that observed.

        As of the whole loss it is :math:`\sup_t |L_{pred} - L_{obs}| / L_{obs}` over the states
        after the first, of means over seeds: the axis before the last is that of time.

        Raises
        ------
        ValueError
            If subgroups or times differ, or there is no state after the first.
        """
        one, other = (_over_seeds(metrics.loss) for metrics in (self, observed))
        if self.labels.tolist() != observed.labels.tolist():
            raise ValueError(
                f"observed must have the subgroups {self.labels.tolist()}, got "
                f"{observed.labels.tolist()}"
            )
        if one.shape != other.shape or len(one) < 2:
            raise ValueError(
                f"observed must have the times of the prediction, two or more, {len(one)}, got "
                f"{len(other)}"
            )
        worst: np.ndarray = np.max(np.abs(one[1:] - other[1:]) / other[1:], axis=0)
        return worst


def by_group(
    outputs: ArrayLike, targets: ArrayLike, loss: Loss | SampleLoss, labels: Labels
) -> GroupMetrics:
    """Mean loss and accuracy of each subgroup, for each recorded state.

    Parameters
    ----------
    outputs : array
        ``(..., n, K)``: ``outputs`` of a :class:`ntkdp.Trajectory`, or ``test_outputs``, with axes
        of seeds and times or without them.
    targets : array
        Of these samples, as the loss takes them.
    loss : Loss or callable
        As for :class:`ntkdp.KernelFlow`.
    labels : array
        ``(n,)``, the subgroup of each sample, numbers or text.

    Returns
    -------
    GroupMetrics

    Raises
    ------
    TypeError, ValueError
        If shapes do not fit.

    Notes
    -----
    A mean over few samples is uncertain: ``counts`` says over how many it is. What privacy costs by
    subgroup is :meth:`ntkdp.privacy.IndividualPrivacy.by_group`, and what limits a step
    :meth:`ntkdp.advisor.StepTerms.by_group`.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> found = ntkdp.comparison.by_group(
    ...     jnp.array([[[2.0], [0.0], [4.0]]]), jnp.zeros((3, 1)), ntkdp.losses.SquaredError(),
    ...     ["rare", "common", "rare"])
    >>> found.labels.tolist(), found.loss.tolist()
    (['common', 'rare'], [[0.0, 5.0]])
    """
    loss = as_loss(loss)
    values = validate.array(outputs=outputs)
    if values.ndim < 2:
        raise ValueError(f"outputs must have shape (..., n, K), got {values.shape}")
    n, n_outputs = values.shape[-2:]
    groups = subgroups(labels, n)
    checked = loss.check(validate.array(targets=targets), n, n_outputs)
    flat = values.reshape(-1, n, n_outputs)
    losses, correct = _of_samples(loss, flat, checked)

    def means(of_samples: Array) -> np.ndarray:
        of_groups: np.ndarray = groups.means(np.asarray(of_samples))
        return of_groups.reshape(*values.shape[:-2], -1)

    accuracy = None if correct is None else means(correct)
    return GroupMetrics(groups.labels, groups.counts, means(losses), accuracy)


@eqx.filter_jit
def _of_samples(loss: Loss, outputs: Array, targets: Array) -> tuple[Array, Array | None]:
    def of_state(f: Array) -> tuple[Array, Array | None]:
        f = at_least_single(f)
        correct = loss.correct(f, targets)
        return loss(f, targets), None if correct is None else correct.astype(f.dtype)

    found: tuple[Array, Array | None] = jax.lax.map(of_state, outputs)
    return found


def _over_seeds(values: np.ndarray) -> np.ndarray:
    """Means over all axes before those of time and subgroups."""
    means: np.ndarray = values.reshape(-1, *values.shape[-2:]).mean(axis=0)
    return means
