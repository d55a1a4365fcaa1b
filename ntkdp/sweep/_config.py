"""The configuration of a sweep: axes of the grid, training of a cell, and its prediction."""

import os
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from ntkdp import privacy
from ntkdp._backend.config_files import Section, check_as, load_as
from ntkdp.advisor import MOVING_FROM
from ntkdp.experiment import (
    ConfigError,
    DataConfig,
    MechanismConfig,
    ModelConfig,
    ProblemConfig,
    PublicConfig,
)
from ntkdp.noise import Noise
from ntkdp.trajectory import MOST_STEPS

_DEFAULT_EPSILON = 8.0


class GridConfig(Section):
    """The axes; every combination is a cell."""

    learning_rates: list[float] = Field(
        [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0], min_length=1, description="step sizes"
    )
    clip_norms: list[float] = Field(
        [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0],
        min_length=1,
        description="clipping norms R; layerwise the same in every layer",
    )
    rules: list[Literal["abadi", "global", "automatic", "psac", "batch"]] = Field(
        ["abadi"], min_length=1, description="clipping rules: abadi, global, automatic, psac, batch"
    )
    scopes: list[Literal["flat", "layerwise"]] = Field(
        ["flat"], min_length=1, description="flat, layerwise"
    )
    epsilons: list[float] = Field(
        [], description="budgets that set the noise; 8.0 if there are no noise_multipliers either"
    )
    noise_multipliers: list[float] = Field(
        [], description="sigmas, besides the budgets or instead of them; 0 for no noise"
    )

    @model_validator(mode="after")
    def _axes(self) -> "GridConfig":
        for name in ("learning_rates", "clip_norms", "epsilons", "noise_multipliers"):
            values = getattr(self, name)
            least = "at least 0" if name == "noise_multipliers" else "positive"
            bad = [v for v in values if not 0 <= v < float("inf") or (v == 0 and "pos" in least)]
            if bad:
                raise ValueError(f"grid.{name} must be {least} and finite, got {bad[0]}")
        for name in type(self).model_fields:
            values = getattr(self, name)
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise ValueError(f"grid.{name} must not hold a value twice, got {twice[0]!r} again")
        return self

    @property
    def budgets(self) -> list[float]:
        """The epsilons; there is one by default if nothing sets the noise."""
        return self.epsilons or ([] if self.noise_multipliers else [_DEFAULT_EPSILON])


class SweepTrainingConfig(MechanismConfig):
    """The settings that all cells share in training."""

    steps: int = Field(100, ge=1, le=MOST_STEPS, description="number of steps")
    delta: float = Field(1e-4, gt=0, lt=1, description="of the budget")
    reduction: Literal["mean", "sum"] = Field("mean", description="reduction of the loss")
    n_seeds: int = Field(1, ge=1, description="observed runs of a cell, whose mean is shown")
    n_predicted: int = Field(
        4, ge=1, description="runs that the prediction of a noisy cell draws, and averages"
    )

    def as_noise(self) -> Noise | None:
        """How the noise is correlated over the steps; None if it is not, or by cell."""
        return self.noise.make(self.steps, self.as_batches, momentum=0.0, strategy_for=None)

    def sigma(self, epsilon: float, n_samples: int) -> float:
        """The noise multiplier that spends a budget on all steps."""
        return privacy.Budget(epsilon, self.delta).noise_multiplier(
            self.steps, batches=self.as_batches, noise=self.as_noise(), n_samples=n_samples
        )

    def epsilon(self, sigma: float, n_samples: int) -> float:
        """Epsilon of all steps with a noise multiplier, infinite if no accountant knows it."""
        return privacy.spent(
            sigma,
            self.steps,
            self.delta,
            batches=self.as_batches,
            noise=self.as_noise(),
            n_samples=n_samples,
        )


class SweepConfig(ProblemConfig):
    """A sweep: predict every cell of a grid, run it, and choose.

    Made by :func:`ntkdp.sweep.config` from fields, by :func:`ntkdp.sweep.load_config` from a file.
    """

    prediction: Literal["infinite", "empirical"] = Field(
        "infinite",
        description="kernel that predicts: of infinite width, or the network's own at the start, "
        "which is the default for a model of kind function",
    )
    kernels: Literal["auto", "frozen", "between times"] = Field(
        "auto",
        description="in cells with noise: frozen, those of the start; between times, those that "
        "noise moves, at infinite width; auto, the latter where v(T) is kernels_move_from or more",
    )
    kernels_move_from: float = Field(
        MOVING_FROM,
        ge=0,
        description="v(T), relative to the weights' own variance, from which auto follows kernels",
    )
    observe: bool = Field(True, description="train every cell too; false: predict alone")
    objective: Literal["accuracy", "loss", "ece"] = Field(
        "accuracy", description="what the advised cell is best in, on the test set"
    )
    data: DataConfig = Field(DataConfig(n_train=1000, n_test=500), description="what to train on")
    model: ModelConfig = Field(ModelConfig(widths=[512]), description="the network")
    grid: GridConfig = Field(GridConfig(), description="the axes")
    training: SweepTrainingConfig = Field(SweepTrainingConfig(), description="the mechanism")

    @property
    def public(self) -> PublicConfig:
        """Which of the training samples are public."""
        return self.training.public

    @model_validator(mode="after")
    def _a_function_need_have_no_infinite_width(self) -> "SweepConfig":
        if self.model.kind == "function" and "prediction" not in self.model_fields_set:
            # A configuration is frozen for its users, but its defaults are not complete yet.
            object.__setattr__(self, "prediction", "empirical")
        return self

    @model_validator(mode="after")
    def _noise_needs_a_bound(self) -> "SweepConfig":
        noisy = self.grid.budgets or any(sigma > 0 for sigma in self.grid.noise_multipliers)
        if noisy and "batch" in self.grid.rules:
            raise ValueError(
                "grid.rules must not hold 'batch' with noise, whose sensitivity is unbounded; set "
                "grid.noise_multipliers = [0.0]"
            )
        if self.training.other_steps and self.kernels == "between times":
            raise ValueError(
                f"kernels must be 'auto' or 'frozen' with training.{self.training.other_steps[0]}, "
                "which kernels between times do not know, got 'between times'"
            )
        for name in self.training.flat_steps:
            if "layerwise" in self.grid.scopes:
                raise ValueError(f"grid.scopes must be ['flat'] with training.{name}")
            if "batch" in self.grid.rules and name == "zeroth_order":
                raise ValueError(
                    "grid.rules must not hold 'batch' with training.zeroth_order, whose rules clip "
                    "each sample"
                )
        if self.prediction == "empirical" and self.kernels == "between times":
            raise ValueError(
                "kernels must be 'auto' or 'frozen' with prediction = 'empirical', which is the "
                "network's own kernel at the start, got 'between times'"
            )
        if self.loss in ("squared_error", "huber") and self.objective == "ece":
            raise ValueError(
                f"objective must be accuracy or loss with loss = {self.loss!r}, whose outputs are "
                "no probabilities, got 'ece'"
            )
        return self


class Plane(NamedTuple):
    """One map of learning rate against clipping norm, with its rule, scope and noise.

    An entry of ``planes`` in the results of :func:`ntkdp.sweep.run`.
    """

    rule: str
    scope: Literal["flat", "layerwise"]
    noise_multiplier: float
    epsilon: float

    @property
    def label(self) -> str:
        """A short name, for titles."""
        noise = "no noise" if self.noise_multiplier == 0 else f"sigma {self.noise_multiplier:.3g}"
        if self.noise_multiplier > 0 and self.epsilon < float("inf"):
            noise += f", epsilon {self.epsilon:.3g}"
        return f"{self.scope} {self.rule}, {noise}"


class Cell(NamedTuple):
    """One combination of the axes; ``plane`` is the index of its plane among the planes.

    ``strategy`` has the coefficients of its noise if each cell has its own.

    An entry of ``cells`` in the results of :func:`ntkdp.sweep.run`.
    """

    plane: int
    learning_rate: float
    clip_norm: float
    strategy: tuple[float, ...] | None = None


def planes(config: SweepConfig) -> list[Plane]:
    """The maps of a sweep; the noise of a budget is spent on all the steps of a cell."""
    grid, training, n = config.grid, config.training, config.data.n_train - config.public.rows
    try:
        noises = [(training.sigma(epsilon, n), epsilon) for epsilon in grid.budgets]
        noises += [
            (sigma, training.epsilon(sigma, n) if sigma > 0 else float("inf"))
            for sigma in grid.noise_multipliers
        ]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"field 'training': {error}") from error
    return [
        Plane(rule, scope, sigma, epsilon)
        for rule in grid.rules
        for scope in grid.scopes
        for sigma, epsilon in noises
    ]


def cells(config: SweepConfig, n_planes: int) -> list[Cell]:
    """Every cell, in the order of planes, then learning rates, then clipping norms."""
    return [
        Cell(plane, rate, norm)
        for plane in range(n_planes)
        for rate in config.grid.learning_rates
        for norm in config.grid.clip_norms
    ]


def config(**fields: Any) -> SweepConfig:
    """A checked configuration from ``fields``, sections as dictionaries.

    Raises
    ------
    ntkdp.experiment.ConfigError
        Naming each wrong field, its value, and for an unknown one the nearest.

    Examples
    --------
    >>> import ntkdp
    >>> ntkdp.sweep.config(grid={"clip_norms": [0.1, 1.0]}).grid.clip_norms
    [0.1, 1.0]
    """
    return check_as(SweepConfig, fields)


def load_config(path: str | os.PathLike[str]) -> SweepConfig:
    """A checked configuration from the TOML file at ``path``.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ntkdp.experiment.ConfigError
        If it is not TOML, or a field is unknown or has a wrong value.

    Examples
    --------
    >>> import ntkdp, pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "small.toml"
    >>> _ = path.write_text("data = {n_train = 64}")
    >>> ntkdp.sweep.load_config(path).data.n_train
    64
    """
    return load_as(SweepConfig, path)
