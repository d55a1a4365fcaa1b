"""What the cells of a sweep end with: losses, accuracies and calibration, a cell an entry."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ntkdp import calibration, losses
from ntkdp._backend.types import Array
from ntkdp.losses import Logistic, Loss, Reduction, SoftmaxCrossEntropy

#: Names of what is measured, and whether more of it is better.
HIGHER_IS_BETTER = {
    "loss": False,
    "accuracy": True,
    "ece": False,
    "mce": False,
    "test_loss": False,
    "test_accuracy": True,
    "test_ece": False,
    "test_mce": False,
}


#: A loss is above the initial one if it is so by more than this many roundings.
_ROUNDINGS = 16


class CellMetrics(NamedTuple):
    """Means over seeds at the end of training, arrays ``(C,)``; a pytree.

    ``ece`` and ``mce`` are of 15 bins of one width, for losses whose outputs mean probabilities;
    ``None`` stands for what does not apply, NaN for outputs that are not finite. ``diverged`` says
    whether the training loss, of any seed, is not finite or above the initial one by more than
    rounding.

    An example is that of :func:`predict`, whose grid holds them.
    """

    loss: np.ndarray
    accuracy: np.ndarray | None
    ece: np.ndarray | None
    mce: np.ndarray | None
    test_loss: np.ndarray | None
    test_accuracy: np.ndarray | None
    test_ece: np.ndarray | None
    test_mce: np.ndarray | None
    diverged: np.ndarray

    def cell(self, index: int) -> dict[str, Any]:
        """One cell's numbers by name."""
        values = {name: None if part is None else part[index] for name, part in self.items()}
        return {name: None if value is None else value.item() for name, value in values.items()}

    def items(self) -> list[tuple[str, np.ndarray | None]]:
        """Names and arrays."""
        return list(self._asdict().items())

    @classmethod
    def of_cells(cls, cells: list[dict[str, Any]]) -> "CellMetrics":
        """From the numbers of each cell, as :meth:`cell` gives them."""
        columns: dict[str, Any] = {}
        for name in cls._fields:
            values = [cell[name] for cell in cells]
            columns[name] = None if None in values else np.asarray(values)
        return cls(**columns)


def check_cell(metrics: Any, like: dict[str, Any]) -> None:
    """Raise unless these are the numbers of a cell, as :meth:`CellMetrics.cell` gives them.

    Raises
    ------
    ValueError
        If a name is missing or new, or what is a number in one of them is none in the other.
    """
    if not isinstance(metrics, dict) or set(metrics) != set(like):
        raise ValueError("the metrics of a cell have other names")
    for name, value in metrics.items():
        if type(value) is not type(like[name]):
            raise ValueError(f"{name} of a cell is no {type(like[name]).__name__}")


def measure(
    loss: Loss,
    reduction: Reduction,
    initial_loss: float,
    train: tuple[Array, Array],
    test: tuple[Array, Array] | None,
) -> CellMetrics:
    """Metrics of final outputs ``(C, S, n, K)``, with their targets, averaged over seeds."""
    of_train = _measure(loss, reduction, *train)
    of_test = None if test is None else _measure(loss, reduction, *test)
    found: dict[str, Any] = {}
    for prefix, parts in (("", of_train), ("test_", of_test)):
        for name in ("loss", "accuracy", "ece", "mce"):
            part = None if parts is None else parts[name]
            found[prefix + name] = None if part is None else np.asarray(jnp.mean(part, axis=1))
    final = np.asarray(of_train["loss"])
    rounding = _ROUNDINGS * np.finfo(final.dtype).eps * abs(initial_loss)
    found["diverged"] = ~np.all(np.isfinite(final) & (final <= initial_loss + rounding), axis=1)
    return CellMetrics(**found)


@eqx.filter_jit
def _measure(
    loss: Loss, reduction: Reduction, outputs: Array, targets: Array
) -> dict[str, Array | None]:
    def one(f: Array) -> dict[str, Array | None]:
        finite = jnp.all(jnp.isfinite(f))
        reduced, accuracy = losses.mean_or_sum(loss, f, targets, reduction)
        found = {"loss": reduced, "accuracy": accuracy, "ece": None, "mce": None}
        probs = probabilities(loss, f)
        labels = labels_of(targets, f.shape[1])
        if probs is not None and labels is not None:
            found["ece"] = calibration.expected_calibration_error(probs, labels)
            found["mce"] = calibration.maximum_calibration_error(probs, labels)
        return {
            name: None if value is None else jnp.where(finite, value, jnp.nan)
            for name, value in found.items()
        }

    return jax.vmap(jax.vmap(one))(outputs)


def probabilities(loss: Loss, outputs: Array) -> Array | None:
    """Probabilities ``(n, K)`` or ``(n,)`` that outputs mean, None if they mean none."""
    if isinstance(loss, SoftmaxCrossEntropy):
        return jax.nn.softmax(outputs)
    if isinstance(loss, Logistic):
        return jax.nn.sigmoid(outputs[:, 0])
    return None


def labels_of(targets: Array, n_outputs: int) -> Array | None:
    """Classes ``(n,)`` of targets that are labels, one-hot rows or zeros and ones."""
    if targets.ndim == 2 and targets.shape[1] == n_outputs > 1:
        return jnp.argmax(targets, axis=1)
    return targets.reshape(targets.shape[0]).astype(int)
