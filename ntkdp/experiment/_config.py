"""The configuration of an experiment: TOML in, checked fields out; errors name their field."""

import os
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from ntkdp import privacy
from ntkdp._backend.config_files import ConfigError as ConfigError
from ntkdp._backend.config_files import Section, check_as, load_as
from ntkdp.experiment._batches_and_noise import MechanismConfig, StrategyFor
from ntkdp.experiment._problem_config import ProblemConfig
from ntkdp.experiment._steps import AdaptiveConfig, PublicConfig
from ntkdp.noise import Noise
from ntkdp.optimizers import SGD, Adam, Optimizer
from ntkdp.trajectory import MOST_STEPS

PredictionName = Literal["exact", "frozen", "infinite", "recursion", "response"]


class TrainingConfig(MechanismConfig):
    """The mechanism, apart from clipping."""

    learning_rate: float = Field(1.5, gt=0, description="step size; time is learning_rate x step")
    steps: int = Field(100, ge=1, le=MOST_STEPS, description="number of steps")
    record_every: int = Field(2, ge=1, description="record every so many steps, and the last")
    optimizer: Literal["sgd", "adam"] = Field("sgd", description="what makes the steps")
    momentum: float = Field(
        0.0, ge=0, lt=1, description="of sgd: heavy-ball momentum, which gives the flows inertia"
    )
    nesterov: bool = Field(False, description="of sgd: look ahead along the momentum")
    weight_decay: float = Field(
        0.0, ge=0, description="added to the gradient of sgd, after noise; decoupled from Adam's"
    )
    average: float | None = Field(
        None, ge=0, lt=1, description="decay of an average of the weights, which is measured"
    )
    correct_noise: bool = Field(
        False, description="of adam: take the variance of the noise from the second moment"
    )
    noise_multiplier: float = Field(
        0.0,
        ge=0,
        description="sigma; the noise of the clipped sum has deviation sigma x sensitivity",
    )
    epsilon: float | None = Field(
        None, gt=0, description="with delta, the budget that sets the noise, in its place"
    )
    delta: float | None = Field(None, gt=0, lt=1, description="of the budget")
    mu: float | None = Field(
        None, gt=0, description="the budget as that of Gaussian differential privacy"
    )
    adaptive: AdaptiveConfig = Field(
        AdaptiveConfig(), description="a clipping norm that moves, which the recursion predicts"
    )
    reduction: Literal["mean", "sum"] = Field("mean", description="reduction of the loss")
    n_seeds: int = Field(1, ge=1, description="repeated runs, which differ in noise and sampling")
    n_predicted: int = Field(
        200, ge=2, description="runs that a prediction with noise or sampling draws"
    )

    @model_validator(mode="after")
    def _one_way_to_set_the_noise(self) -> "TrainingConfig":
        if (self.epsilon is None) != (self.delta is None):
            raise ValueError(
                "training.epsilon and training.delta must come together, "
                f"got epsilon = {self.epsilon}, delta = {self.delta}"
            )
        ways = {
            "noise_multiplier": self.noise_multiplier > 0,
            "epsilon": self.epsilon is not None,
            "mu": self.mu is not None,
        }
        if sum(ways.values()) > 1:
            given = " and ".join(f"training.{name}" for name, used in ways.items() if used)
            raise ValueError(f"one way to set the noise is enough, got {given}")
        return self

    @model_validator(mode="after")
    def _belongs_to_the_optimizer(self) -> "TrainingConfig":
        others = ("correct_noise",) if self.optimizer == "sgd" else ("momentum", "nesterov")
        for name in others:
            if getattr(self, name):
                raise ValueError(
                    f"training.{name} must be left out with training.optimizer = "
                    f"{self.optimizer!r}, got {getattr(self, name)}"
                )
        if self.nesterov and not self.momentum:
            raise ValueError("training.nesterov must be false without training.momentum, got true")
        return self

    @model_validator(mode="after")
    def _has_a_prediction(self) -> "TrainingConfig":
        needs_linear = self.other_steps
        if self.noise.kind == "kernel_optimal":
            needs_linear = [*needs_linear, "noise.kind = 'kernel_optimal'"]
        if needs_linear and self.optimizer == "adam":
            raise ValueError(
                f"training.{needs_linear[0]} must be left out with training.optimizer = 'adam', "
                "since no prediction follows both"
            )
        return self

    @property
    def adapts(self) -> bool:
        """Whether the clipping norm moves."""
        return self.adaptive.quantile is not None

    @property
    def other_steps(self) -> list[str]:
        """Names of the sections that make other steps than those of private gradients alone."""
        return [*super().other_steps, *(["adaptive"] if self.adapts else [])]

    @property
    def noisy(self) -> bool:
        """Whether runs add noise."""
        return self.noise_multiplier > 0 or self.epsilon is not None or self.mu is not None

    @property
    def as_optimizer(self) -> Optimizer:
        """What makes the steps, of runs and of predictions."""
        if self.optimizer == "adam":
            return Adam(
                weight_decay=self.weight_decay,
                correct_noise=self.correct_noise,
                average=self.average,
            )
        return SGD(self.momentum, self.nesterov, self.weight_decay, average=self.average)

    @property
    def has_flow(self) -> bool:
        """Whether the steps tend to a flow, with inertia or without."""
        plain = not self.nesterov and not self.weight_decay and self.average is None
        return self.optimizer == "sgd" and plain

    @property
    def moves_at_random(self) -> bool:
        """Whether a step moves the outputs of all points at random."""
        return self.noisy or self.zeroth_order.directions > 0

    @property
    def is_random(self) -> bool:
        """Whether runs differ by their keys."""
        return self.moves_at_random or self.as_batches.is_random

    def as_noise(self, steps: int, strategy_for: StrategyFor | None = None) -> Noise | None:
        """How the noise of a run of so many steps is correlated; None if it is not."""
        return self.noise.make(steps, self.as_batches, self.momentum, strategy_for)

    def sigma(self, steps: int, noise: Noise | None, n_samples: int) -> float:
        """The noise multiplier of a run of so many steps, from the budget if there is one."""
        if self.epsilon is None and self.mu is None:
            return self.noise_multiplier
        if self.noise.kind == "kernel_optimal":
            noise = None  # Its strategy is scaled to cost as much.
        budget = privacy.Budget(self.epsilon, self.delta, mu=self.mu)
        return budget.noise_multiplier(
            steps, batches=self.as_batches, noise=noise, n_samples=n_samples
        )


class ClippingConfig(Section):
    """One column of the comparison; repeat ``[[clipping]]`` for more."""

    model_config = ConfigDict(allow_inf_nan=True)  # The rules say what their numbers may be.

    rule: str = Field("abadi", description="none, abadi, global, automatic, psac or batch")
    scope: Literal["flat", "layerwise"] = Field("flat", description="flat or layerwise")
    clip_norm: float | list[float] = Field(
        1.0, description="R, positive; layerwise one number or one a layer"
    )
    gamma: float | None = Field(None, description="of rule automatic, default 0.01")
    r: float | None = Field(None, description="of rule psac, default 0.1")
    Z: float | None = Field(None, description="of rule global, default none")
    learning_rate: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="in place of training.learning_rate for this rule; without any [[clipping]], "
        "the default rules of R = 0.4 use 2.5, unless training.learning_rate is written",
    )
    steps: int | None = Field(
        None, ge=1, le=MOST_STEPS, description="in place of training.steps for this rule"
    )

    @property
    def label(self) -> str:
        """A short name, for titles and for groups in files."""
        norm = "" if self.rule == "none" else f" R={_number(self.clip_norm)}"
        return f"{self.scope} {self.rule}{norm}"

    def learning_rate_in(self, training: TrainingConfig) -> float:
        """The rule's own learning rate if it has one, otherwise that of all rules."""
        return training.learning_rate if self.learning_rate is None else self.learning_rate


#: The rules that are compared if a configuration names none, each with a suitable learning rate.
_DEFAULT_RULES = [
    ClippingConfig(scope="flat", clip_norm=0.4, learning_rate=2.5),
    ClippingConfig(scope="flat", clip_norm=1000.0),
    ClippingConfig(scope="layerwise", clip_norm=0.4, learning_rate=2.5),
    ClippingConfig(scope="layerwise", clip_norm=1000.0),
]


class Config(ProblemConfig):
    """An experiment: predict training under each clipping rule, run it, compare.

    Made by :func:`ntkdp.experiment.config` from fields, by
    :func:`ntkdp.experiment.load_config` from a file.
    """

    predictions: list[PredictionName] = Field(
        ["frozen", "infinite", "recursion"],
        min_length=1,
        description="exact: flow in weight space; frozen: flow of the empirical kernel; infinite: "
        "flow of the infinite-width kernel, with noise an ensemble under the kernels between "
        "times; recursion: discrete steps of the empirical kernel, with noise or sampling an "
        "ensemble of them; response: noisy runs of the network itself, about a run without noise; "
        "by default those that know the network and the optimizer, with response if there is noise",
    )
    rtol: float = Field(1e-5, gt=0, description="relative tolerance of the flows")
    atol: float = Field(1e-8, gt=0, description="absolute tolerance of the flows")
    training: TrainingConfig = Field(TrainingConfig(), description="the mechanism")
    clipping: list[ClippingConfig] = Field(
        _DEFAULT_RULES, min_length=1, description="the rules to compare"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        if "clipping" not in self.model_fields_set and (
            "learning_rate" in self.training.model_fields_set
        ):
            # A learning rate in the file takes precedence over those of the default rules.
            rules = [rule.model_copy(update={"learning_rate": None}) for rule in self.clipping]
            object.__setattr__(self, "clipping", rules)
        if "clipping" not in self.model_fields_set and self.training.flat_steps:
            flat = [rule for rule in self.clipping if rule.scope == "flat"]
            object.__setattr__(self, "clipping", flat)
        labels = [rule.label for rule in self.clipping]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"clipping must not hold the same rule twice, got {twice[0]!r} again")
        couples = any(rule.rule == "batch" for rule in self.clipping)
        if "predictions" not in self.model_fields_set:
            # A configuration is frozen for its users, but its defaults are not complete yet.
            object.__setattr__(self, "predictions", self._default_predictions(couples))
        for name in self.predictions:
            if not self._follows(name):
                raise ValueError(self._not_followed(name))
        self._check_rules()
        if "response" in self.predictions and couples:
            raise ValueError(
                "predictions must not hold 'response' with rule 'batch', which couples samples; "
                "use exact, frozen or recursion"
            )
        return self

    def _check_rules(self) -> None:
        """Raise unless the rules fit steps that need the norm or the slope of whole samples."""
        for name in self.training.flat_steps:
            for number, rule in enumerate(self.clipping):
                if rule.scope == "layerwise":
                    raise ValueError(
                        f"clipping.{number}.scope must be 'flat' with training.{name}, got "
                        "'layerwise'"
                    )
                if rule.rule == "batch" and name == "zeroth_order":
                    raise ValueError(
                        f"clipping.{number}.rule must clip each sample with "
                        "training.zeroth_order, got 'batch'"
                    )

    def _not_followed(self, prediction: PredictionName) -> str:
        training = self.training
        if training.other_steps:
            return (
                f"predictions must not hold {prediction!r} with training."
                f"{training.other_steps[0]}; use "
                + ("exact, frozen or recursion" if self._follows("frozen") else "recursion")
            )
        return (
            f"predictions must not hold {prediction!r} with training.optimizer = "
            f"{training.optimizer!r} and such options; use "
            + ("response" if training.optimizer == "adam" else "recursion or response")
        )

    def _follows(self, prediction: PredictionName) -> bool:
        """Whether a prediction knows the optimizer, and the steps that it is given."""
        training = self.training
        if training.other_steps:  # by an optimizer that is linear, as is checked
            flows = prediction in ("exact", "frozen")
            flows |= prediction == "infinite" and not training.noisy
            has_flow = training.has_flow and training.other_steps == ["public"]
            return prediction == "recursion" or (has_flow and flows)
        if training.optimizer == "adam":
            return prediction == "response"
        in_steps = prediction in ("recursion", "response")
        in_steps |= prediction == "infinite" and training.noisy
        return in_steps or training.has_flow

    @property
    def public(self) -> PublicConfig:
        """Which of the training samples are public."""
        return self.training.public

    def _default_predictions(self, couples: bool) -> list[PredictionName]:
        names = [name for name in self.predictions if self._follows(name)]
        if self.model.is_own:  # which need not have an infinite width
            names = [name for name in names if name != "infinite"]
        if self._follows("response") and not couples and (self.training.noisy or not names):
            names.append("response")
        return names


def _number(value: float | list[float]) -> str:
    values = value if isinstance(value, list) else [value]
    return ",".join(f"{number:g}" for number in values)


def config(**fields: Any) -> Config:
    """A checked configuration from ``fields``, sections as dictionaries.

    Raises
    ------
    ConfigError
        Naming each wrong field, its value, and for an unknown one the nearest.

    Examples
    --------
    >>> import ntkdp
    >>> ntkdp.experiment.config(data={"n_train": 64}).data.n_train
    64
    """
    return check_as(Config, fields)


def load_config(path: str | os.PathLike[str]) -> Config:
    """A checked configuration from the TOML file at ``path``.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ConfigError
        If it is not TOML, or a field is unknown or has a wrong value.

    Examples
    --------
    >>> import ntkdp, pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "small.toml"
    >>> _ = path.write_text("data = {n_train = 64}")
    >>> ntkdp.experiment.load_config(path).data.n_train
    64
    """
    return load_as(Config, path)
