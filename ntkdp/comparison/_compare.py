"""A prediction against a run, at the times that both recorded."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

from ntkdp._backend import validate
from ntkdp._backend.types import Array
from ntkdp._results import setup as setups
from ntkdp.comparison._comparison import QUANTITIES, SHARES, Comparison, Errors, range_of
from ntkdp.trajectory import Trajectory, mean_over_seeds

#: Two times are the same if they differ by less than this many roundings of the coarser dtype.
_TIME_ROUNDINGS = 8

#: Prediction and run by quantity, each with time as its first axis.
Pairs: TypeAlias = dict[str, tuple[np.ndarray, np.ndarray]]

#: Parts of a trajectory that have no axis of time.
_WITHOUT_TIME = ("outcome", "start", "setup", "sensitivities", "params")
_OUTPUTS = ("outputs", "test_outputs")
_LOSSES = ("loss", "test_loss")


def compare(
    prediction: Trajectory, run: Trajectory, *, allow: str | Iterable[str] = ()
) -> Comparison:
    r"""Errors of a prediction against a run, at the times that both recorded.

    .. math::
        \sup_{t > 0} |L_{pred}(t) - L_{obs}(t)| / L_{obs}(t),

    and likewise for outputs, accuracies, clip fractions and the test set if both recorded them. The
    error is also given as a share of the fall of the loss, which a short run cannot flatter,

    .. math::
        \sup_{t > 0} |L_{pred}(t) - L_{obs}(t)| \,/\, \sup_{t > 0} |L_{obs}(t) - L_{obs}(0)|.

    Parameters
    ----------
    prediction : Trajectory
        From :func:`ntkdp.solve` or :func:`ntkdp.recursion`, or a whole ensemble from
        :func:`ntkdp.stochastic_flow.ensemble`.
    run : Trajectory
        From :func:`ntkdp.dp_sgd.run`. If either side has a leading seed axis, its mean is compared;
        the distribution of an ensemble is compared too, see ``band_coverage``, ``crps`` and
        ``skill``.
    allow : str or sequence of str
        Settings in which the two may differ on purpose: ``"clipping"``, ``"loss"``,
        ``"reduction"``, ``"learning_rate"``, ``"noise_multiplier"``, ``"sample_rate"``,
        ``"optimizer"``, ``"time"`` or ``"phases"``. ``differences`` and the table name them.

    Returns
    -------
    Comparison
        Times are t = learning_rate * step (the running sum of the learning rate). A time is shared
        if the two agree to rounding; nothing is interpolated. The start, which is the earlier time
        of the two initial states, is given and not predicted, so it has no error.

    Raises
    ------
    TypeError
        If an argument is not a Trajectory.
    ValueError
        If the two share no time after the start, if their outputs differ in shape, or if their
        trainings are known to differ in a setting that ``allow`` does not name.

    Notes
    -----
    Trajectories know the settings of their training (``setup``). A flow stands for every small
    learning rate. Two numbers of steps are no obstacle, since the shared times are compared, but
    ``steps`` and the table name them. Flows and recursions may be compared with noisy runs and with
    sampling, which they leave out by nature: ``neglected`` and the table say so. A flow with a
    preconditioned kernel may be compared with any optimizer, a flow with inertia with momentum. An
    optimizer of your own is known by its name alone.

    A trajectory made elsewhere has no known settings, and is compared without this check. But if
    both recorded steps, a shared time must be that of the same step: otherwise the learning rates
    differ.

    Where either side is not finite, the error is infinite: a prediction that failed or a run that
    diverged never looks close. Where the run's value is zero, the error is zero if the prediction's
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
    _check_trajectory("prediction", prediction)
    _check_trajectory("run", run)
    predicted_at, observed_at = _shared_times(prediction.times, run.times)
    differences = setups.differences(prediction.setup, run.setup)
    if not {"learning_rate", "time"} & set(differences):
        differences |= _other_steps(prediction, predicted_at, run, observed_at)
    _check_allowed(differences, allow)
    run_times = np.asarray(run.times, np.float64)
    start = min(_start(prediction), _start(run))
    after_start = run_times[observed_at] > start
    if not np.any(after_start):
        raise ValueError(
            f"prediction and run share no time after the start: prediction has "
            f"{range_of(prediction.times)}, run has {range_of(run.times)}; predict at the times of "
            "the run, solve(flow, initial, run.times)"
        )
    times = run_times[observed_at][after_start]
    predicted, observed = _at(prediction, predicted_at), _at(run, observed_at)
    pairs = _recorded_pairs(predicted, observed, after_start)
    initial = {name: _at_start(name, (run, prediction), start) for name in _LOSSES if name in pairs}
    return Comparison(
        times=times,
        predicted=predicted,
        observed=observed,
        errors={name: _errors(name, *pair, times, initial) for name, pair in pairs.items()},
        output_errors=_error_of_each(pairs.get("outputs")),
        test_output_errors=_error_of_each(pairs.get("test_outputs")),
        coverage=len(times) / int(np.sum(run_times > start)),
        differences=differences,
        neglected=setups.neglected(prediction.setup, run.setup),
        steps=_lengths(prediction, run),
    )


def _other_steps(
    prediction: Trajectory, predicted_at: np.ndarray, run: Trajectory, observed_at: np.ndarray
) -> dict[str, str]:
    """A shared time that the two reach after other numbers of steps, in words."""
    if prediction.steps is None or run.steps is None:
        return {}
    sides = ((prediction, predicted_at), (run, observed_at))
    steps = [np.asarray(side.steps)[places] for side, places in sides]
    # While the learning rate is 0, several steps have one time.
    once = [_are_single(np.asarray(side.times))[places] for side, places in sides]
    differing = np.flatnonzero((steps[0] != steps[1]) & once[0] & once[1])
    if not differing.size:
        return {}
    place = differing[-1]
    time = float(run.times[observed_at[place]])
    said, done = steps[0][place], steps[1][place]
    return {"learning_rate": f"time {time:g} is step {said} predicted, step {done} in the run"}


def _are_single(times: np.ndarray) -> np.ndarray:
    """Which of the sorted times differ from those before and after them."""
    rises = np.concatenate([[True], np.diff(times) > 0, [True]])
    single: np.ndarray = rises[:-1] & rises[1:]
    return single


def _lengths(prediction: Trajectory, run: Trajectory) -> tuple[int, int] | None:
    """The numbers of steps, if both are known and differ."""
    said, done = (setups.steps_of(side.setup) for side in (prediction, run))
    # A log that was made elsewhere has at least the steps that it records.
    if said is not None and not run.setup and run.steps is not None:
        done = int(run.steps[-1])
    return None if said is None or done is None or said == done else (said, done)


def _recorded_pairs(predicted: Trajectory, observed: Trajectory, after_start: np.ndarray) -> Pairs:
    """Quantities that both recorded, averaged over seeds, at the shared times after the start."""
    pairs: Pairs = {}
    for name in QUANTITIES:
        p, o = (mean_over_seeds(side, name) for side in (predicted, observed))
        if p is None or o is None:
            continue
        if p.shape != o.shape:
            raise ValueError(
                f"prediction and run must have {name} of the same shape, "
                f"got {p.shape} and {o.shape}"
            )
        pairs[name] = p[after_start], o[after_start]
    return pairs


def _errors(
    name: str, p: np.ndarray, o: np.ndarray, times: np.ndarray, initial: dict[str, float | None]
) -> Errors:
    """Errors of one quantity; ``initial`` holds the losses at the start."""
    if name in _OUTPUTS:
        over_time = _relative_distance(p, o, axis=(1, 2))
    elif name in SHARES:
        over_time = _distance(p, o)
    else:
        over_time = _relative_distance(p[:, None], o[:, None], axis=1)
    worst = int(np.argmax(over_time))
    return Errors(
        over_time=over_time,
        sup=float(over_time[worst]),
        mean=float(np.mean(over_time)),
        time_of_sup=float(times[worst]),
        of_fall=_share_of_fall(p, o, initial[name]) if name in _LOSSES else None,
    )


def _error_of_each(pair: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray | None:
    """The largest error over time of each output alone."""
    return None if pair is None else np.max(_relative_distance(*pair, axis=1), axis=0)


def _check_allowed(differences: dict[str, str], allow: str | Iterable[str]) -> None:
    allowed = [allow] if isinstance(allow, str) else list(allow)
    for name in allowed:
        validate.choice(setups.DIFFERENCES, allow=name)
    refused = [name for name in differences if name not in allowed]
    if refused:
        shown = "; ".join(f"{name}: {differences[name]}" for name in refused)
        raise ValueError(
            f"prediction and run are not of the same training: {shown}. If this is intended, pass "
            f"allow={tuple({*allowed, *refused})!r}"
        )


def _start(trajectory: Trajectory) -> float:
    """Time of the initial state."""
    return float(trajectory.times[0] if trajectory.start is None else trajectory.start)


def _at_start(name: str, sides: tuple[Trajectory, ...], start: float) -> float | None:
    """A loss at the start, from the first side that recorded it."""
    for side in sides:
        if float(side.times[0]) == start:
            values = mean_over_seeds(side, name)
            assert values is not None
            return float(values[0])
    return None


def _share_of_fall(p: np.ndarray, o: np.ndarray, initial: float | None) -> float | None:
    """Largest difference, divided by the most that ``o`` has moved from ``initial``."""
    if initial is None:
        return None
    difference = float(np.max(_distance(p, o)))
    fall = float(np.max(_distance(o, np.full_like(o, initial))))
    if difference == 0 or not np.isfinite(difference):
        return difference
    return difference / fall if np.isfinite(fall) and fall > 0 else np.inf


def _check_trajectory(name: str, trajectory: object) -> None:
    """Raise unless it is a trajectory, with times and a loss at each of them."""
    if not isinstance(trajectory, Trajectory):
        raise TypeError(
            f"{name} must be a Trajectory, as solve, recursion or dp_sgd.run give, "
            f"got {type(trajectory).__name__}"
        )
    n_times = np.shape(trajectory.times)
    shape = np.shape(trajectory.loss)
    if len(n_times) != 1 or n_times[0] == 0 or len(shape) not in (1, 2) or shape[-1:] != n_times:
        raise ValueError(
            f"{name} must have times of shape (T,), T >= 1, and a loss of shape (T,) or (S, T), "
            f"got {n_times} and {shape}"
        )


def _shared_times(times1: Array, times2: Array) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the times that are each other's nearest and the same to rounding."""
    rounding = max(_rounding(times1), _rounding(times2))
    t1, t2 = np.asarray(times1, np.float64), np.asarray(times2, np.float64)
    nearest = _nearest(t1, t2)
    mutual = _nearest(t2, t1)[nearest] == np.arange(len(t1))
    scale = np.maximum(np.abs(t1), np.abs(t2[nearest]))
    shared = mutual & (np.abs(t1 - t2[nearest]) <= _TIME_ROUNDINGS * rounding * scale)
    return np.flatnonzero(shared), nearest[shared]


def _rounding(times: Array) -> float:
    """Relative rounding error of times; those of whole numbers have none."""
    dtype = jnp.asarray(times).dtype
    return float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.floating) else 0.0


def _nearest(values: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Index of the entry of the sorted ``among`` nearest to each value."""
    right = np.minimum(np.searchsorted(among, values), len(among) - 1)
    left = np.maximum(right - 1, 0)
    return np.where(np.abs(values - among[left]) <= np.abs(values - among[right]), left, right)


def _at(trajectory: Trajectory, index: np.ndarray) -> Trajectory:
    """The trajectory at some of its times."""
    time_axis = trajectory.loss.ndim - 1
    fields: dict[str, Any] = {}
    for name, value in vars(trajectory).items():
        if value is not None and name not in _WITHOUT_TIME:
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
