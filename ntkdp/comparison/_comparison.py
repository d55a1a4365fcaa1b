"""A prediction next to a run, at the times that both recorded, and how far apart they are."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, final

import numpy as np

from ntkdp._backend.types import Array
from ntkdp.comparison import _scores
from ntkdp.comparison._scores import Coverage
from ntkdp.trajectory import Band, Trajectory, band, last_value

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from rich.table import Table

#: The quantities that are compared, in this order.
QUANTITIES = (
    "loss",
    "accuracy",
    "outputs",
    "clip_fraction",
    "test_loss",
    "test_accuracy",
    "test_outputs",
)
#: Quantities compared by their difference, for they are shares already; all others are compared
#: relative to the run.
SHARES = ("accuracy", "clip_fraction", "test_accuracy")


class Errors(NamedTuple):
    """Errors of one quantity, see :func:`compare`; infinite where a value is not finite.

    ``over_time`` is ``(T,)``, ``sup`` its largest entry, first reached at ``time_of_sup``, and
    ``mean`` its mean. ``of_fall`` exists for losses alone: it is the largest difference as a share
    of the fall, which is the most that the run's loss has moved from its start; None if neither
    side recorded the start.
    """

    over_time: np.ndarray
    sup: float
    mean: float
    time_of_sup: float
    of_fall: float | None = None


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Comparison:
    """A prediction next to a run, at the times that both recorded; made by :func:`compare`.

    Attributes
    ----------
    times : array
        ``(T,)``, the shared times after the start, at which errors are taken.
    predicted, observed : Trajectory
        The two at the shared times, a shared start included.
    errors : dict
        :class:`Errors` of every quantity that both recorded. Relative to the run: ``"loss"``,
        ``"outputs"`` (in the Frobenius norm) and their test twins. Differences: ``"accuracy"``,
        ``"test_accuracy"`` and ``"clip_fraction"``.
    output_errors, test_output_errors : array or None
        ``(K,)``, the largest error of each output k alone,
        ``sup_t ||f_pred[:, k] - f_obs[:, k]|| / ||f_obs[:, k]||``; None without outputs.
    coverage : float
        Share of the run's recorded times after the start that were compared.
    differences : dict
        The settings in which the two are known to differ, as allowed, with the difference in words.
    neglected : tuple
        Parts of the run that the prediction leaves out by nature: ``"noise"``, ``"sampling"``.
    steps : tuple or None
        How many steps the prediction and the run have, if both are known and differ: the shared
        times are compared all the same. None otherwise.

    ``print(comparison)`` is its table, and so is the comparison in a notebook.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> t, zero = jnp.arange(3.0), jnp.zeros(3)
    >>> run = ntkdp.Trajectory(t, loss=jnp.array([4.0, 2.0, 1.0]), clip_fraction=zero)
    >>> prediction = ntkdp.Trajectory(t, loss=jnp.array([4.0, 2.5, 1.0]), clip_fraction=zero)
    >>> comparison = ntkdp.compare(prediction, run)
    >>> comparison.sup_relative_error, comparison.time_of_sup, comparison.mean_relative_error
    (0.25, 1.0, 0.125)
    >>> round(comparison.error_of_fall, 3)  # 0.5 of a fall by 3
    0.167
    """

    times: np.ndarray = field(repr=False)
    predicted: Trajectory = field(repr=False)
    observed: Trajectory = field(repr=False)
    errors: dict[str, Errors] = field(repr=False)
    output_errors: np.ndarray | None = field(repr=False)
    test_output_errors: np.ndarray | None = field(repr=False)
    coverage: float
    differences: dict[str, str]
    neglected: tuple[str, ...]
    steps: tuple[int, int] | None = None

    def __str__(self) -> str:
        """The table in plain text."""
        from ntkdp.comparison import _table

        return _table.as_text(self)

    def _repr_html_(self) -> str:
        """The table for a notebook."""
        from ntkdp.comparison import _table

        return _table.as_html(self)

    @property
    def relative_error(self) -> np.ndarray:
        """Relative error of the training loss, ``(T,)``."""
        return self.errors["loss"].over_time

    @property
    def sup_relative_error(self) -> float:
        """The error of the prediction: the largest relative error of the training loss."""
        return self.errors["loss"].sup

    @property
    def error_of_fall(self) -> float | None:
        """Largest difference of the training losses, as a share of the fall of the run's loss.

        Over a short run the loss hardly moves, so that any prediction has a small relative error;
        but a prediction that does not move at all has a share of 1. The fall is the most that the
        run's loss has moved from its start, at ``times``. None if neither side recorded the start.
        """
        return self.errors["loss"].of_fall

    @property
    def mean_relative_error(self) -> float:
        """Mean over the shared times of the relative error of the training loss."""
        return self.errors["loss"].mean

    @property
    def time_of_sup(self) -> float:
        """The first time at which the relative error of the training loss is largest."""
        return self.errors["loss"].time_of_sup

    @property
    def output_error(self) -> float | None:
        """Largest relative error of the training outputs, in the Frobenius norm."""
        return self._sup("outputs")

    @property
    def accuracy_error(self) -> float | None:
        """Largest difference of the training accuracies."""
        return self._sup("accuracy")

    @property
    def clip_fraction_error(self) -> float | None:
        """Largest difference of the clip fractions."""
        return self._sup("clip_fraction")

    @property
    def test_sup_relative_error(self) -> float | None:
        """Largest relative error of the test loss."""
        return self._sup("test_loss")

    @property
    def test_error_of_fall(self) -> float | None:
        """Largest difference of the test losses, as a share of the fall of the run's test loss."""
        return self.errors["test_loss"].of_fall if "test_loss" in self.errors else None

    @property
    def test_output_error(self) -> float | None:
        """Largest relative error of the test outputs, in the Frobenius norm."""
        return self._sup("test_outputs")

    @property
    def test_accuracy_error(self) -> float | None:
        """Largest difference of the test accuracies."""
        return self._sup("test_accuracy")

    def _sup(self, name: str) -> float | None:
        return self.errors[name].sup if name in self.errors else None

    @property
    def observed_band(self) -> Band | None:
        """Spread of the run's training loss over its seeds; None without a seed axis.

        The quantiles of this and of ``predicted_band`` are at 5%, 50% and 95%.
        """
        loss = np.asarray(self.observed.loss)
        return band(loss) if loss.ndim == 2 else None

    @property
    def predicted_band(self) -> Band | None:
        """Spread of the predicted training loss; None if the prediction is no ensemble."""
        return band(self.predicted.loss) if self._is_ensemble else None

    @property
    def band_coverage(self) -> Coverage | None:
        """How often runs are inside the predicted 90% band, at each of ``times``.

        By :func:`ntkdp.comparison.band_coverage`, which takes other levels. It is not ``coverage``,
        which counts times. None if the prediction is no ensemble.
        """
        return _scores.band_coverage(*self._losses) if self._is_ensemble else None

    @property
    def crps(self) -> np.ndarray:
        """Score of the predicted distribution, ``(T,)``, in the unit of the training loss.

        By :func:`ntkdp.comparison.crps`; the mean absolute error if the prediction is no ensemble.
        """
        return _scores.crps(*self._losses)

    @property
    def mean_crps(self) -> float:
        """Mean of ``crps`` over the shared times."""
        return float(np.mean(self.crps))

    @property
    def standardised_error(self) -> np.ndarray | None:
        """Error of the predicted mean in standard errors, ``(T,)``.

        By :func:`ntkdp.comparison.standardised_error`. None for one run, or an ensemble of one: the
        error of its mean is not known.
        """
        predicted, observed = self._losses
        if np.shape(observed)[:-1] in ((), (1,)) or np.shape(predicted)[:-1] == (1,):
            return None
        return _scores.standardised_error(predicted, observed)

    def skill(self, reference: "Comparison | None" = None) -> float:
        """Share by which ``mean_crps`` is below the ``mean_crps`` of a reference.

        Parameters
        ----------
        reference : Comparison, optional
            The comparison of another prediction with the same run at the same times. By default
            the prediction's own mean, as a forecast without spread.

        Returns
        -------
        float
            At most 1, up to chance; zero for no gain, below zero for a loss. Minus infinity if the
            prediction is not finite.

        Raises
        ------
        TypeError
            If the reference is no Comparison.
        ValueError
            If the reference is about another run, or other times.

        Examples
        --------
        >>> import jax.numpy as jnp, ntkdp
        >>> t, zero = jnp.arange(2.0), jnp.zeros(2)
        >>> run = ntkdp.Trajectory(t, loss=jnp.array([4.0, 2.0]), clip_fraction=zero)
        >>> far = ntkdp.Trajectory(t, loss=jnp.array([4.0, 6.0]), clip_fraction=zero)
        >>> near = ntkdp.Trajectory(t, loss=jnp.array([4.0, 3.0]), clip_fraction=zero)
        >>> ntkdp.compare(near, run).skill(ntkdp.compare(far, run))
        0.75
        """
        predicted, observed = self._losses
        if reference is None:
            mean = np.mean(predicted, axis=0) if predicted.ndim == 2 else predicted
            other = float(np.mean(_scores.crps(mean, observed)))
        else:
            other = _mean_crps_of(reference, self)
        own = self.mean_crps
        if not np.isfinite(own):
            return -np.inf
        if own == other:
            return 0.0
        return 1 - own / other if other else -np.inf

    @property
    def _is_ensemble(self) -> bool:
        return np.ndim(self.predicted.loss) == 2 and len(self.predicted.loss) > 1

    @property
    def _losses(self) -> tuple[np.ndarray, np.ndarray]:
        """Training losses of either side at ``times``, without a shared start."""
        n_times = len(self.times)
        sides = (self.predicted, self.observed)
        predicted, observed = (np.asarray(side.loss, np.float64)[..., -n_times:] for side in sides)
        return predicted, observed

    @property
    def final(self) -> dict[str, dict[str, float | None]]:
        """Loss and accuracy, ``"predicted"`` and ``"observed"``, at the last shared time."""
        return {
            side: {name: last_value(trajectory, name) for name in ("loss", "accuracy")}
            for side, trajectory in (("predicted", self.predicted), ("observed", self.observed))
        }

    @property
    def message(self) -> str:
        """What went wrong on either side or differs between them, or ``"success"``."""
        sides = (("prediction", self.predicted), ("run", self.observed))
        troubles = [f"{name}: {side.message}" for name, side in sides if not side.successful]
        if self.differences:
            shown = "; ".join(f"{name}: {text}" for name, text in self.differences.items())
            troubles.append(f"not of the same training ({shown})")
        return "; ".join(troubles) or "success"

    def table(self) -> "Table":
        """A table for a terminal (``rich.print(comparison.table())``) or a notebook.

        Examples
        --------
        >>> import jax.numpy as jnp, ntkdp
        >>> run = ntkdp.Trajectory(jnp.arange(3.0), loss=jnp.ones(3), clip_fraction=jnp.zeros(3))
        >>> ntkdp.compare(run, run).table().row_count
        2
        """
        from ntkdp.comparison import _table

        return _table.table(self)

    def to_pandas(self) -> "pandas.DataFrame":
        """The compared quantities over time, as a data frame.

        Returns
        -------
        pandas.DataFrame
            A row for each of ``times``. Columns have two levels: the quantity, such as ``"loss"``,
            and ``"predicted"``, ``"observed"`` or ``"error"``, as in ``errors``. Values are means
            over seeds, and of outputs there is the error alone.

        Examples
        --------
        >>> import jax.numpy as jnp, ntkdp
        >>> t, zero = jnp.arange(3.0), jnp.zeros(3)
        >>> run = ntkdp.Trajectory(t, loss=jnp.array([4.0, 2.0, 1.0]), clip_fraction=zero)
        >>> near = ntkdp.Trajectory(t, loss=jnp.array([4.0, 2.5, 1.0]), clip_fraction=zero)
        >>> ntkdp.compare(near, run).to_pandas()["loss"].values.tolist()
        [[2.5, 2.0, 0.25], [1.0, 1.0, 0.0]]
        """
        from ntkdp.comparison import _table

        return _table.as_frame(self)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Predicted and observed training loss over time, by :func:`ntkdp.plotting.loss_curves`.

        Examples
        --------
        >>> import jax.numpy as jnp, ntkdp
        >>> run = ntkdp.Trajectory(jnp.arange(3.0), loss=jnp.ones(3), clip_fraction=jnp.zeros(3))
        >>> len(ntkdp.compare(run, run).plot().lines)
        2
        """
        from ntkdp.comparison import curves

        return curves.loss_curves(self.predicted, self.observed, ax=ax)


def _mean_crps_of(reference: object, comparison: Comparison) -> float:
    """The mean CRPS of a reference, which must be about the same run at the same times."""
    if not isinstance(reference, Comparison):
        raise TypeError(f"reference must be a Comparison, got {type(reference).__name__}")
    times, run = comparison.times, comparison._losses[1]
    if not (
        np.array_equal(reference.times, times)
        and np.array_equal(reference._losses[1], run, equal_nan=True)
    ):
        raise ValueError(
            "reference must compare with the same run at the same times, "
            f"got {range_of(reference.times)} next to {range_of(times)}"
        )
    return reference.mean_crps


def range_of(times: Array | np.ndarray) -> str:
    """How many times there are, and between which."""
    return f"{len(times)} in [{float(times[0]):g}, {float(times[-1]):g}]"
