"""What the page shows of a place of the sliders, from kernels and programs that are kept."""

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ntkdp import calibration, comparison
from ntkdp._backend.types import Array, Float
from ntkdp.calibration import Bins
from ntkdp.cli._exploration.accounts import Accounts, Spending
from ntkdp.cli._exploration.kernels import Kernel, kernel_of
from ntkdp.cli._exploration.program import Head, Mechanism, Numbers, drawn, ends
from ntkdp.cli._exploration.setting import Position, Setting
from ntkdp.losses import Loss

#: Times at which runs are measured, the start among them.
_MARKS = 15
_BINS = 10
#: Quantiles of the bands, which hold 90% of the runs.
_BAND = (0.05, 0.95)
#: Learning rates and clipping norms of the map.
AXIS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
#: Clipping norms of its parts, between which a slider may move.
PARTS = (AXIS[:3], AXIS[3:6], AXIS[6:])
#: Largest second derivative of a loss in any direction of the outputs.
_CURVATURES = {"softmax_cross_entropy": 0.5, "logistic": 0.25, "squared_error": 1.0, "huber": 1.0}
#: v(T) over the weights' own variance: from the first on a frozen kernel is some per cent off, from
#: the second on it predicts nothing.
STILL, USELESS = 0.01, 1.0


class Band(NamedTuple):
    """Mean over runs and the ends that hold 90% of them, numbers or arrays over times."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Reliability(NamedTuple):
    """Test samples of all runs by confidence, and the calibration error of a run."""

    bins: Bins
    error: Band


class Spectrum(NamedTuple):
    """Eigenvalues, from the largest on, over the number of samples if losses are means.

    Of the kernel of the training samples, and of the clipped ones before the first step and after
    the last. ``stable`` is where steps begin to overshoot.
    """

    kernel: np.ndarray
    first: np.ndarray
    last: np.ndarray
    stable: float


class Answer(NamedTuple):
    """Everything that is shown of a place, but for the map.

    ``steps`` are those after which runs are measured, and ``weight_noise`` is the variance v of the
    noise on the weights by then, over the weights' own. ``bands`` are by the names of a
    trajectory's quantities.
    """

    place: Position
    noise_multiplier: float
    steps: np.ndarray
    bands: dict[str, Band]
    weight_noise: np.ndarray
    reliability: Reliability | None
    spectrum: Spectrum
    seconds: float


class Explorer:
    """Answers for places of the sliders, from what is computed once."""

    def __init__(self, setting: Setting, n_draws: int) -> None:
        self.setting, self.n_draws = setting, n_draws
        self.accounts = Accounts(setting.delta)
        self._cold = [rule for rule in setting.choices["rule"] if rule != setting.start.rule]
        self._kernels: dict[str, Kernel] = {}
        self._heads: dict[tuple[str, str], Head] = {}
        self._numbers: dict[tuple[int, ...], Numbers] = {}
        self._parts: dict[tuple[Position, int], np.ndarray] = {}
        self._first: Answer | None = None
        self._key = jax.random.key(setting.config.seed + 1)

    def knows(self, width: str) -> bool:
        """Whether the kernel of a width is there."""
        return width in self._kernels

    def kernel(self, width: str) -> Kernel:
        """The kernel of a width."""
        if width not in self._kernels:
            self._kernels[width] = kernel_of(self.setting, width)
        return self._kernels[width]

    def first(self) -> Answer:
        """The answer for where sliders start, which every tab begins with."""
        if self._first is None:
            self.answer(self.setting.start)
            # Once more, since the first time is spent on compiling.
            self._first = self.answer(self.setting.start)
        return self._first

    def answer(self, place: Position) -> Answer:
        """What is shown of a place."""
        begun = time.perf_counter()
        head, kernel = self._head(place), self.kernel(place.width)
        sigma = self.accounts.noise_multiplier(_spending(place))
        steps = np.round(np.linspace(0, place.steps, _MARKS)).astype(np.int32)
        mechanism = _mechanism(place, sigma, place.clip_norm, place.learning_rate)
        runs = drawn(head, mechanism, jnp.asarray(steps), self._numbers_for(head, self.n_draws))
        bands = {}
        for name in ("loss", "accuracy", "test_loss", "test_accuracy", "clip_fraction"):
            values = getattr(runs.measured, name)
            if values is not None:
                bands[name] = _band(values)
        moved = place.learning_rate * sigma * place.clip_norm
        moved /= place.sample_rate * head.divisor
        return Answer(
            place,
            sigma,
            steps,
            bands,
            kernel.relative * steps * moved**2,
            _reliability(head, runs.test_outputs),
            self._spectrum(place, kernel, head, runs.first, runs.last),
            time.perf_counter() - begun,
        )

    def part_of_map(self, place: Position, number: int) -> Float[np.ndarray, "norms rates"]:
        """What runs end with at the clipping norms of this part of the map and all learning rates.

        It is the test accuracy, or the test loss where there is none.
        """
        asked = place._replace(clip_norm=0.0, learning_rate=0.0), number
        if asked not in self._parts:
            norms, rates = np.meshgrid(PARTS[number], AXIS, indexing="ij")
            sigma = self.accounts.noise_multiplier(_spending(place))
            mechanisms = _mechanism(place, sigma, norms.ravel(), rates.ravel())
            head, steps = self._head(place), jnp.asarray(place.steps, jnp.int32)
            measured = ends(head, mechanisms, steps, self._numbers_for(head, 1))
            shown = measured.test_accuracy
            values = np.asarray(measured.test_loss if shown is None else shown)
            self._parts[asked] = values.reshape(norms.shape)
        return self._parts[asked]

    def work_ahead(self, place: Position) -> Callable[[], None] | None:
        """What may be done while the sliders rest, so that the next move is answered sooner."""
        near = []
        for name in ("epsilon", "steps", "sample_rate"):
            offered = self.setting.choices[name]
            number = offered.index(getattr(place, name))
            near += [
                _spending(place._replace(**{name: value}))
                for value in offered[max(number - 1, 0) : number + 2]
            ]
        spending = self.accounts.next_of(near)
        if spending is not None:
            return partial(self.accounts.look_at, spending)
        return self.warm if self._cold else None

    def warm(self) -> None:
        """Compile the programs of another rule, for which a move to it would wait."""
        place = self.setting.start._replace(rule=self._cold.pop())
        self.answer(place)
        self.part_of_map(place, 0)

    def _numbers_for(self, head: Head, n_runs: int) -> Numbers:
        """The random numbers of so many runs, the same for all heads of one size."""
        asked = *head.rows.shape, n_runs
        if asked not in self._numbers:
            most = self.setting.choices["steps"][-1]
            self._numbers[asked] = Numbers.of(self._key, head, n_runs, most)
        return self._numbers[asked]

    def _head(self, place: Position) -> Head:
        asked = place.width, place.rule
        if asked not in self._heads:
            rule, reduction = self.setting.rule(place.rule), self.setting.config.training.reduction
            self._heads[asked] = self.kernel(place.width).head(rule, reduction)
        return self._heads[asked]

    def _spectrum(
        self, place: Position, kernel: Kernel, head: Head, first: Array, last: Array
    ) -> Spectrum:
        divisor, count = head.divisor, min(kernel.rows.shape)
        return Spectrum(
            kernel.eigenvalues[:count] / divisor,
            _eigenvalues(kernel.rows, first)[:count] / divisor,
            _eigenvalues(kernel.rows, last)[:count] / divisor,
            2 / (place.learning_rate * _CURVATURES[self.setting.config.loss]),
        )


def _spending(place: Position) -> Spending:
    return Spending(place.epsilon, place.steps, place.sample_rate)


def _mechanism(
    place: Position, sigma: float, clip_norm: float | np.ndarray, learning_rate: float | np.ndarray
) -> Mechanism:
    """A mechanism with these clipping norms and learning rates, of which R bounds the samples."""
    numbers = clip_norm, learning_rate, np.multiply(sigma, clip_norm), place.sample_rate
    return Mechanism(*(jnp.asarray(part, jnp.float32) for part in numbers))


def _band(values: Array) -> Band:
    runs = np.asarray(values, np.float64)
    with np.errstate(invalid="ignore"):  # runs that diverge
        return Band(np.mean(runs, axis=0), *np.quantile(runs, _BAND, axis=0))


def _eigenvalues(rows: Float[Array, "n D"], factors: Float[Array, " n"]) -> Float[np.ndarray, " D"]:
    """Those of the kernel with each sample clipped, from the largest on."""
    features = np.asarray(rows, np.float64)
    weighted = features.T @ (np.asarray(factors, np.float64)[:, None] * features)
    if not np.all(np.isfinite(weighted)):
        return np.full(len(weighted), np.nan)
    eigenvalues: np.ndarray = np.linalg.eigvalsh(weighted)[::-1]
    positive: np.ndarray = np.maximum(eigenvalues, 0.0)
    return positive


def _reliability(head: Head, test_outputs: Float[Array, "S m K"]) -> Reliability | None:
    """Calibration on the test samples, if outputs mean probabilities."""
    found = _calibrated(head.loss, test_outputs, head.test_targets)
    if found is None:
        return None
    bins, errors = found
    return Reliability(jax.tree.map(np.asarray, bins), _band(errors))


@eqx.filter_jit
def _calibrated(
    loss: Loss, outputs: Float[Array, "S m K"], targets: Array
) -> tuple[Bins, Float[Array, " S"]] | None:
    probs = jax.vmap(partial(comparison.probabilities, loss))(outputs)
    labels = comparison.labels_of(targets, outputs.shape[-1])
    if probs is None or labels is None:
        return None
    everything = probs.reshape(-1, *probs.shape[2:]), jnp.tile(labels, len(outputs))
    bins = calibration.reliability_bins(*everything, _BINS)
    errors = jax.vmap(
        lambda own: calibration.expected_calibration_error(own, labels, n_bins=_BINS)
    )(probs)
    return bins, errors
