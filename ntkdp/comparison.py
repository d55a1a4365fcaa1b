r"""How far a prediction is from a run: relative errors at the times that both recorded.

The error of a prediction is :math:`\sup_t |L_{pred}(t) - L_{obs}(t)| / L_{obs}(t)` over the
recorded times after the start. Steps of a run meet the time of a flow at t = learning_rate * step.
Where the prediction is an ensemble of runs, its distribution is compared too: its band, how often
runs are inside, and its CRPS.
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, final

import jax.numpy as jnp
import numpy as np

from ntkdp import _scores
from ntkdp._agreement import agreement as agreement
from ntkdp._scores import Band as Band
from ntkdp._scores import Coverage as Coverage
from ntkdp._scores import band as band
from ntkdp._scores import band_coverage as band_coverage
from ntkdp._scores import crps as crps
from ntkdp._scores import last_value as last_value
from ntkdp._scores import mean_over_seeds
from ntkdp._scores import standardised_error as standardised_error
from ntkdp.trajectory import Trajectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

#: Two times are the same if they differ by less than this many roundings of the coarser dtype.
_TIME_ROUNDINGS = 8

#: What is compared, in this order.
QUANTITIES = (
    "loss",
    "accuracy",
    "outputs",
    "clip_fraction",
    "test_loss",
    "test_accuracy",
    "test_outputs",
)
#: Compared by the difference, for these are shares already; everything else relative to the run.
SHARES = ("accuracy", "clip_fraction", "test_accuracy")
_OUTPUTS = ("outputs", "test_outputs")


class Errors(NamedTuple):
    """Errors of one quantity, see :func:`compare`; infinite where a value is not finite.

    ``over_time`` is ``(T,)``, ``sup`` its largest entry, first reached at ``time_of_sup``, and
    ``mean`` its mean.
    """

    over_time: np.ndarray
    sup: float
    mean: float
    time_of_sup: float


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Comparison:
    """A prediction beside a run, at the times that both recorded; made by :func:`compare`.

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

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> t, zero = jnp.arange(3.0), jnp.zeros(3)
    >>> run = ntkdp.Trajectory(t, loss=jnp.array([4.0, 2.0, 1.0]), clip_fraction=zero)
    >>> prediction = ntkdp.Trajectory(t, loss=jnp.array([4.0, 2.5, 1.0]), clip_fraction=zero)
    >>> comparison = ntkdp.compare(prediction, run)
    >>> comparison.sup_relative_error, comparison.time_of_sup, comparison.mean_relative_error
    (0.25, 1.0, 0.125)
    """

    times: np.ndarray = field(repr=False)
    predicted: Trajectory = field(repr=False)
    observed: Trajectory = field(repr=False)
    errors: dict[str, Errors] = field(repr=False)
    output_errors: np.ndarray | None = field(repr=False)
    test_output_errors: np.ndarray | None = field(repr=False)
    coverage: float

    @property
    def relative_error(self) -> np.ndarray:
        """Relative error of the training loss, ``(T,)``."""
        return self.errors["loss"].over_time

    @property
    def sup_relative_error(self) -> float:
        """The error of the prediction: the largest relative error of the training loss."""
        return self.errors["loss"].sup

    @property
    def mean_relative_error(self) -> float:
        """Mean over the shared times of the relative error of the training loss."""
        return self.errors["loss"].mean

    @property
    def time_of_sup(self) -> float:
        """When the relative error of the training loss first is at its largest."""
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

        By :func:`ntkdp.comparison.band_coverage`, which takes other levels. Not ``coverage``, which
        counts times. None if the prediction is no ensemble.
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

        By :func:`ntkdp.comparison.standardised_error`. None for one run, or an ensemble of one,
        whose mean has an unknown error.
        """
        predicted, observed = self._losses
        if np.shape(observed)[:-1] in ((), (1,)) or np.shape(predicted)[:-1] == (1,):
            return None
        return _scores.standardised_error(predicted, observed)

    def skill(self, reference: "Comparison | None" = None) -> float:
        """Share by which ``mean_crps`` is below that of a reference.

        Parameters
        ----------
        reference : Comparison, optional
            Of another prediction with the same run at the same times. By default the prediction's
            own mean, as a forecast without spread.

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
            If it is of another run, or other times.

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
            other = _mean_crps_beside(self, reference)
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
        """Training losses of either side at ``times``, which leave a shared start out."""
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
        """What went wrong on either side and what to do about it, or ``"success"``."""
        sides = (("prediction", self.predicted), ("run", self.observed))
        troubles = [f"{name}: {side.message}" for name, side in sides if not side.successful]
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
        from ntkdp import _comparison_table

        return _comparison_table.table(self)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Predicted and observed training loss over time, by :func:`ntkdp.plotting.loss_curves`.

        Examples
        --------
        >>> import jax.numpy as jnp, ntkdp
        >>> run = ntkdp.Trajectory(jnp.arange(3.0), loss=jnp.ones(3), clip_fraction=jnp.zeros(3))
        >>> len(ntkdp.compare(run, run).plot().lines)
        2
        """
        from ntkdp import plotting

        return plotting.loss_curves(self.predicted, self.observed, ax=ax)


def compare(prediction: Trajectory, run: Trajectory) -> Comparison:
    r"""Errors of a prediction against a run, at the times that both recorded.

    .. math::
        \sup_{t > 0} |L_{pred}(t) - L_{obs}(t)| / L_{obs}(t),

    and its like for outputs, accuracies, clip fractions and the test set where both have them.

    Parameters
    ----------
    prediction : Trajectory
        Of :func:`ntkdp.solve` or :func:`ntkdp.recursion`, or a whole ensemble, of
        :func:`ntkdp.stochastic_flow.ensemble`.
    run : Trajectory
        Of :func:`ntkdp.dp_sgd.run`. Of a leading seed axis, on either side, the mean is compared;
        of an ensemble also the distribution, see ``band_coverage``, ``crps`` and ``skill``.

    Returns
    -------
    Comparison
        Times are t = learning_rate * step (the running sum of the learning rate). A time is shared
        if the two agree to rounding; nothing is interpolated. The start, the earlier of the times
        of the two initial states, is given and not predicted, so it has no error.

    Raises
    ------
    TypeError
        If an argument is not a Trajectory.
    ValueError
        If the two share no time after the start, or their outputs differ in shape.

    Notes
    -----
    Where either side is not finite the error is infinite: a prediction that failed or a run that
    diverged never looks close. Where the run's value is zero the error is zero if the prediction's
    is too, and infinite otherwise.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ntkdp
    >>> x, y, w = jnp.array([[2.0]]), jnp.zeros((1, 1)), jnp.array([[2.5]])
    >>> loss, rule = ntkdp.losses.SquaredError(), ntkdp.clipping.Abadi(1.0)
    >>> apply = lambda w, x: x @ w
    >>> run = ntkdp.dp_sgd.run(apply, w, x, y, loss, rule, learning_rate=1e-3, steps=3000,
    ...                        record_every=100, key=jax.random.key(0))
    >>> flow = ntkdp.KernelFlow(ntkdp.empirical_ntk(apply, w, x), y, loss, rule)
    >>> prediction = ntkdp.solve(flow, apply(w, x), run.times)
    >>> ntkdp.compare(prediction, run).sup_relative_error < 0.02
    True
    """
    for name, given in (("prediction", prediction), ("run", run)):
        if not isinstance(given, Trajectory):
            raise TypeError(
                f"{name} must be a Trajectory, of solve, recursion or dp_sgd.run, "
                f"got {type(given).__name__}"
            )
        _check_shape(name, given)
    of_prediction, of_run = _shared_times(prediction.times, run.times)
    run_times = np.asarray(run.times, np.float64)
    start = min(_start(prediction), _start(run))
    after_start = run_times[of_run] > start
    if not np.any(after_start):
        raise ValueError(
            f"prediction and run share no time after the start: prediction has "
            f"{_range(prediction.times)}, run has {_range(run.times)}; predict at the times of the "
            "run, solve(flow, initial, run.times)"
        )
    predicted, observed = _at(prediction, of_prediction), _at(run, of_run)
    times = run_times[of_run][after_start]

    errors: dict[str, Errors] = {}
    per_output: dict[str, np.ndarray | None] = dict.fromkeys(_OUTPUTS)
    for name in QUANTITIES:
        pair = [mean_over_seeds(side, name) for side in (predicted, observed)]
        if pair[0] is None or pair[1] is None:
            continue
        if pair[0].shape != pair[1].shape:
            raise ValueError(
                f"prediction and run must have {name} of the same shape, "
                f"got {pair[0].shape} and {pair[1].shape}"
            )
        p, o = pair[0][after_start], pair[1][after_start]
        if name in _OUTPUTS:
            per_output[name] = np.max(_relative_distance(p, o, axis=1), axis=0)
            over_time = _relative_distance(p, o, axis=(1, 2))
        elif name in SHARES:
            over_time = _distance(p, o)
        else:
            over_time = _relative_distance(p[:, None], o[:, None], axis=1)
        worst = int(np.argmax(over_time))
        errors[name] = Errors(
            over_time, float(over_time[worst]), float(np.mean(over_time)), float(times[worst])
        )
    return Comparison(
        times=times,
        predicted=predicted,
        observed=observed,
        errors=errors,
        output_errors=per_output["outputs"],
        test_output_errors=per_output["test_outputs"],
        coverage=len(times) / int(np.sum(run_times > start)),
    )


def _mean_crps_beside(comparison: Comparison, reference: Any) -> float:
    """That of the reference, if it can be compared."""
    if not isinstance(reference, Comparison):
        raise TypeError(f"reference must be a Comparison, got {type(reference).__name__}")
    times, run = comparison.times, comparison._losses[1]
    if not (
        np.array_equal(reference.times, times)
        and np.array_equal(reference._losses[1], run, equal_nan=True)
    ):
        raise ValueError(
            "reference must compare with the same run at the same times, "
            f"got {_range(reference.times)} beside {_range(times)}"
        )
    return reference.mean_crps


def _start(trajectory: Trajectory) -> float:
    """Time of the initial state."""
    return float(trajectory.times[0] if trajectory.start is None else trajectory.start)


def _check_shape(name: str, trajectory: Trajectory) -> None:
    n_times = np.shape(trajectory.times)
    shape = np.shape(trajectory.loss)
    if len(n_times) != 1 or n_times[0] == 0 or len(shape) not in (1, 2) or shape[-1:] != n_times:
        raise ValueError(
            f"{name} must have times of shape (T,), T >= 1, and a loss of shape (T,) or (S, T), "
            f"got {n_times} and {shape}"
        )


def _shared_times(times1: Any, times2: Any) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the times that are each other's nearest and the same to rounding."""
    rounding = max(_rounding(times1), _rounding(times2))
    t1, t2 = np.asarray(times1, np.float64), np.asarray(times2, np.float64)
    of_2 = _nearest(t1, t2)
    mutual = _nearest(t2, t1)[of_2] == np.arange(len(t1))
    scale = np.maximum(np.abs(t1), np.abs(t2[of_2]))
    shared = mutual & (np.abs(t1 - t2[of_2]) <= _TIME_ROUNDINGS * rounding * scale)
    return np.flatnonzero(shared), of_2[shared]


def _rounding(times: Any) -> float:
    dtype = jnp.asarray(times).dtype
    return float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.floating) else 0.0


def _nearest(values: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Index of the entry of the sorted ``among`` nearest to each value."""
    right = np.minimum(np.searchsorted(among, values), len(among) - 1)
    left = np.maximum(right - 1, 0)
    return np.where(np.abs(values - among[left]) <= np.abs(values - among[right]), left, right)


def _range(times: Any) -> str:
    return f"{len(times)} in [{float(times[0]):g}, {float(times[-1]):g}]"


def _at(trajectory: Trajectory, index: np.ndarray) -> Trajectory:
    """The trajectory at some of its times."""
    time_axis = trajectory.loss.ndim - 1
    fields: dict[str, Any] = {}
    for name, value in vars(trajectory).items():
        if value is not None and name not in ("outcome", "start"):
            axis = 0 if name in ("times", "steps") else time_axis
            # NumPy: JAX would compile a program for every number of shared times.
            fields[name] = jnp.asarray(np.asarray(value).take(index, axis=axis))
    return replace(trajectory, **fields)


def _distance(p: np.ndarray, o: np.ndarray) -> np.ndarray:
    """Difference, infinite wherever either is not finite."""
    finite = np.isfinite(p) & np.isfinite(o)
    return np.where(finite, np.abs(np.subtract(p, o, where=finite, out=np.zeros_like(p))), np.inf)


def _relative_distance(p: np.ndarray, o: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """Norm of the difference over the norm of ``o``; zero over zero is zero."""
    difference = _distance(p, o)
    exponent = -np.frexp(np.max(np.maximum(np.abs(p), np.abs(o)), axis=axis, keepdims=True))[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        # Squares of values as they come could overflow or vanish; a power of two scales exactly.
        distance = np.sqrt(np.sum(np.ldexp(difference, exponent) ** 2, axis=axis))
        ratio = distance / np.sqrt(np.sum(np.ldexp(o, exponent) ** 2, axis=axis))
    return np.select([distance == 0, distance == np.inf], [0.0, np.inf], ratio)
