"""Losses, accuracies and calibration at the end of training, one entry for each cell of a sweep."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ntkdp import calibration, losses
from ntkdp._backend.types import Array
from ntkdp.losses import Logistic, Loss, Reduction, SoftmaxCrossEntropy

#: A number of one cell, whether it diverged included.
Number: TypeAlias = float | bool

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
_NAMES = ("loss", "accuracy", "ece", "mce")
#: A loss is above the initial one if the difference is more than this many roundings.
_ROUNDINGS = 16


class CellMetrics(NamedTuple):
    """Means over seeds at the end of training, arrays ``(C,)``; a pytree.

    ``ece`` and ``mce`` use 15 bins of equal width, for losses whose outputs mean probabilities.
    ``None`` stands for what does not apply, NaN for outputs that are not finite. ``diverged`` says
    whether the training loss, for any seed, is not finite or above the initial one by more than
    rounding.

    :func:`ntkdp.advisor.predict` has an example: its grid holds them.
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

    def cell(self, index: int) -> dict[str, Number | None]:
        """One cell's numbers by name."""
        values = {name: None if part is None else part[index] for name, part in self.items()}
        return {name: None if value is None else value.item() for name, value in values.items()}

    def items(self) -> list[tuple[str, np.ndarray | None]]:
        """Names and arrays."""
        return list(self._asdict().items())

    @classmethod
    def of_cells(cls, cells: Sequence[Mapping[str, Number | None]]) -> "CellMetrics":
        """Metrics from the numbers of each cell, as :meth:`cell` gives them."""
        columns = ([cell[name] for cell in cells] for name in cls._fields)
        return cls._make(None if None in column else np.asarray(column) for column in columns)


def check_cell(metrics: object, like: Mapping[str, Number | None]) -> None:
    """Raise unless these are the numbers of a cell, as :meth:`CellMetrics.cell` gives them.

    Raises
    ------
    ValueError
        If a name is missing or new, or a value has another type than in ``like``.
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
    on_train = _measure(loss, reduction, *train)
    on_test = dict.fromkeys(_NAMES) if test is None else _measure(loss, reduction, *test)
    means: dict[str, Any] = {name: _mean_over_seeds(on_train[name]) for name in _NAMES}
    means |= {f"test_{name}": _mean_over_seeds(on_test[name]) for name in _NAMES}
    final = np.asarray(on_train["loss"])
    rounding = _ROUNDINGS * np.finfo(final.dtype).eps * abs(initial_loss)
    converged = np.isfinite(final) & (final <= initial_loss + rounding)
    return CellMetrics(**means, diverged=~np.all(converged, axis=1))


def _mean_over_seeds(values: Array | None) -> np.ndarray | None:
    return None if values is None else np.asarray(jnp.mean(values, axis=1))


@eqx.filter_jit
def _measure(
    loss: Loss, reduction: Reduction, outputs: Array, targets: Array
) -> dict[str, Array | None]:
    def one_run(f: Array) -> dict[str, Array | None]:
        finite = jnp.all(jnp.isfinite(f))
        reduced, accuracy = losses.mean_or_sum(loss, f, targets, reduction)
        measured = {"loss": reduced, "accuracy": accuracy, "ece": None, "mce": None}
        probs = probabilities(loss, f)
        labels = labels_of(targets, f.shape[1])
        if probs is not None and labels is not None:
            measured["ece"] = calibration.expected_calibration_error(probs, labels)
            measured["mce"] = calibration.maximum_calibration_error(probs, labels)
        return {
            name: None if value is None else jnp.where(finite, value, jnp.nan)
            for name, value in measured.items()
        }

    return jax.vmap(jax.vmap(one_run))(outputs)


def probabilities(loss: Loss, outputs: Array) -> Array | None:
    """Probabilities ``(n, K)`` or ``(n,)`` that outputs stand for; None if they stand for none."""
    if isinstance(loss, SoftmaxCrossEntropy):
        return jax.nn.softmax(outputs)
    if isinstance(loss, Logistic):
        return jax.nn.sigmoid(outputs[:, 0])
    return None


def labels_of(targets: Array, n_outputs: int) -> Array | None:
    """Classes ``(n,)`` of targets: labels, one-hot rows, or zeros and ones."""
    if targets.ndim == 2 and targets.shape[1] == n_outputs > 1:
        return jnp.argmax(targets, axis=1)
    return targets.reshape(targets.shape[0]).astype(int)
