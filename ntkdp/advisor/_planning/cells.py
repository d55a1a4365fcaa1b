"""Cells of a plan: their axes, the noise that their budgets buy, and what they cost to run."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import equinox as eqx
import numpy as np

from ntkdp import privacy
from ntkdp._backend import validate
from ntkdp._backend.types import ArrayLike, Float
from ntkdp.batches import Batches, Full, Poisson
from ntkdp.clipping import ClippingRule
from ntkdp.losses import Reduction
from ntkdp.noise import Noise
from ntkdp.optimizers import Optimizer
from ntkdp.stochastic_flow import weight_noise_variance


class Cell(NamedTuple):
    """A run as it may be made: one of a plan's cells."""

    learning_rate: float
    clip_norm: float
    steps: int
    sample_rate: float
    epsilon: float

    def compute(self, n_samples: int) -> float:
        """Gradients of samples that it takes: steps times the batch."""
        return self.steps * self.sample_rate * n_samples


class Axes(NamedTuple):
    """The values of a grid, sorted, in the order of the fields of a cell."""

    learning_rates: tuple[float, ...]
    clip_norms: tuple[float, ...]
    steps: tuple[int, ...]
    sample_rates: tuple[float, ...]
    epsilons: tuple[float, ...]

    def cells(self, n_samples: int, most_compute: float) -> list[Cell]:
        """Every combination that may be afforded, at most ``most_compute`` gradients."""
        cells = [
            Cell(rate, norm, steps, share, epsilon)
            for epsilon in self.epsilons
            for share in self.sample_rates
            for steps in self.steps
            for rate in self.learning_rates
            for norm in self.clip_norms
        ]
        return [cell for cell in cells if cell.compute(n_samples) <= most_compute]


def axes_of(
    *,
    learning_rates: ArrayLike,
    clip_norms: ArrayLike,
    steps: Sequence[int],
    sample_rates: ArrayLike,
    epsilons: ArrayLike,
) -> Axes:
    """Axes from arguments, checked."""
    rates, norms, shares, budgets = (
        _axis(**{name: values})
        for name, values in (
            ("learning_rates", learning_rates),
            ("clip_norms", clip_norms),
            ("sample_rates", sample_rates),
            ("epsilons", epsilons),
        )
    )
    if shares[-1] > 1:
        raise ValueError(f"sample_rates must be at most 1, got {shares[-1]:g}")
    counts = sorted({validate.count(steps=number) for number in np.atleast_1d(steps).tolist()})
    if not counts:
        raise ValueError("steps must hold at least one number of steps, got none")
    return Axes(rates, norms, tuple(counts), shares, budgets)


def _axis(**named: ArrayLike) -> tuple[float, ...]:
    ((name, _),) = named.items()
    array = np.atleast_1d(np.asarray(validate.positive(**named), np.float64))
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{name} must be numbers of one dimension, got shape {array.shape}")
    return tuple(np.unique(array).tolist())


class Accounts:
    """Noise multipliers of budgets, each found once."""

    def __init__(self, delta: float, noise: Noise, n_samples: int) -> None:
        self.delta, self.noise, self.n_samples = delta, noise, n_samples
        self._found: dict[tuple[float, int, float], float] = {}

    def noise_multiplier(self, cell: Cell) -> float:
        """The sigma that spends a cell's budget on all its steps, Poisson sampling if any."""
        asked = (cell.sample_rate, cell.steps, cell.epsilon)
        if asked not in self._found:
            budget = privacy.Budget(cell.epsilon, self.delta)
            self._found[asked] = budget.noise_multiplier(
                cell.steps,
                batches=batches_of(cell.sample_rate),
                noise=self.noise,
                n_samples=self.n_samples,
            )
        return self._found[asked]

    def of_cells(self, cells: Iterable[Cell]) -> np.ndarray:
        """Noise multipliers ``(C,)``."""
        return np.array([self.noise_multiplier(cell) for cell in cells])


class WeightNoise:
    """Variances of the noise that weights have gathered by the end, v(T)."""

    def __init__(
        self, clipping: ClippingRule, noise: Noise, optimizer: Optimizer, reduction: Reduction
    ) -> None:
        self.clipping = eqx.tree_at(lambda rule: rule.R, clipping, np.asarray(1.0))
        self.noise, self.optimizer, self.reduction = noise, optimizer, reduction
        self._of_steps: dict[int, float] = {}

    def of_cells(
        self, cells: Sequence[Cell], sigmas: np.ndarray, n_samples: int
    ) -> Float[np.ndarray, " C"]:
        """Of cells with these noise multipliers, on so many samples."""
        divisor = n_samples if self.reduction == "mean" else 1
        sizes = np.array([cell.learning_rate * cell.clip_norm / cell.sample_rate for cell in cells])
        of_one = np.array([self._of_one(cell.steps) for cell in cells])
        return np.asarray(of_one * (sizes * sigmas / divisor) ** 2)

    def _of_one(self, steps: int) -> float:
        """With a learning rate, a clipping norm, a noise multiplier and one sample of one."""
        if steps not in self._of_steps:
            variance = weight_noise_variance(
                self.clipping,
                1,
                learning_rate=1.0,
                steps=steps,
                noise_multiplier=1.0,
                noise=self.noise,
                optimizer=self.optimizer,
            )
            self._of_steps[steps] = variance[-1, 0].item()
        return self._of_steps[steps]


def batches_of(sample_rate: float) -> Batches:
    """Full batches, or Poisson sampling."""
    return Full() if sample_rate == 1 else Poisson(sample_rate)
