"""The configuration of an experiment: TOML in, checked fields out; errors name their field."""

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from ntkdp import privacy
from ntkdp._backend.config_files import ConfigError as ConfigError
from ntkdp._backend.config_files import Section, check_as, load_as
from ntkdp.clipping import Adaptive
from ntkdp.experiment._batches_and_noise import MechanismConfig
from ntkdp.noise import Noise
from ntkdp.optimizers import SGD, Adam, Optimizer
from ntkdp.trajectory import MOST_STEPS

#: The most bytes in the name of a run.
_LONGEST_NAME = 150
PredictionName = Literal["exact", "frozen", "infinite", "recursion", "response"]


class DataConfig(Section):
    """The data to train on."""

    name: str = Field(
        "digits",
        description="data set (digits, diabetes, mnist5k, gaussian, separable, openml) or a file "
        "(.npz, .csv, IDX)",
    )
    n_train: int = Field(128, ge=2, description="training samples")
    n_test: int = Field(128, ge=1, description="test samples")
    standardise: Literal["feature", "unit", "none"] = Field(
        "unit",
        description="feature: mean 0, deviation 1 over the training part; unit: each sample "
        "scaled to norm sqrt(d); none",
    )
    options: dict[str, Any] = Field(
        {}, description="further options of the loader, e.g. {target = 'quality'} for a .csv"
    )


class ModelConfig(Section):
    """The network, in infinite-width terms, or a function that makes it."""

    kind: Literal["mlp", "cnn", "function"] = Field("mlp", description="mlp, cnn or function")
    function: str | None = Field(
        None,
        description="of kind function: 'module:name' of a function of the number of outputs that "
        "returns an ntkdp.models.Model; the folder where the command is run is searched too",
    )
    widths: list[Annotated[int, Field(ge=1)]] = Field(
        [768, 768],
        description="widths of the hidden layers, none for a linear head; or channels of a cnn",
    )
    activation: str = Field(
        "erf",
        description="relu, leaky_relu, abs, gelu, erf, sin, cos, identity, tanh, sigmoid, silu, "
        "softplus or elu",
    )
    layer_norm: bool = Field(False, description="normalise hidden numbers before each activation")
    residual: bool = Field(
        False, description="add each hidden layer but the first to its input; widths must be equal"
    )
    pooling: Literal["none", "average", "sum", "global", "global_sum"] = Field(
        "none", description="of a cnn: none, average, sum, global or global_sum"
    )
    W_std: float = Field(
        1.5, gt=0, description="standard deviation of the weights, scaled by width"
    )
    b_std: float = Field(0.1, ge=0, description="standard deviation of the biases")
    output_W_std: float = Field(1.0, gt=0, description="W_std of the output layer")
    parameterization: Literal["ntk", "standard"] = Field("ntk", description="ntk or standard")

    @model_validator(mode="after")
    def _a_function_makes_all(self) -> "ModelConfig":
        if (self.kind == "function") != (self.function is not None):
            raise ValueError(
                "model.kind = 'function' and model.function must come together, "
                f"got kind = {self.kind!r}, function = {self.function!r}"
            )
        if self.function is not None:
            module, _, name = self.function.partition(":")
            if not (all(map(str.isidentifier, module.split("."))) and name.isidentifier()):
                raise ValueError(
                    "model.function must name a module and a function, such as "
                    f"'my_models:transformer', got {self.function!r}"
                )
            others = self.model_fields_set - {"kind", "function"}
            if others:
                raise ValueError(
                    f"model.{min(others)} must be left out with model.kind = 'function', which "
                    "makes the whole network"
                )
        return self

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear head on the inputs."""
        return self.kind == "mlp" and not self.widths

    @property
    def words(self) -> str:
        """The network in a few words."""
        if self.function is not None:
            return f"the network of {self.function}"
        if self.is_linear:
            return "a linear head"
        return f"{self.kind} of widths {self.widths}, {self.activation}"

    @model_validator(mode="after")
    def _a_cnn_has_channels(self) -> "ModelConfig":
        if self.kind == "cnn" and not self.widths:
            raise ValueError(
                "model.widths must name the channels of at least one convolution with model.kind = "
                "'cnn', got []"
            )
        return self

    @model_validator(mode="after")
    def _pooling_is_of_images(self) -> "ModelConfig":
        if self.kind == "mlp" and self.pooling != "none":
            raise ValueError(
                f"model.pooling must be 'none' with model.kind = 'mlp', got {self.pooling!r}"
            )
        return self


class AdaptiveConfig(Section):
    """A clipping norm that moves until a share of the samples is not clipped."""

    quantile: float | None = Field(
        None,
        gt=0,
        le=1,
        description="the share that is not to be clipped; without it the clipping norm is constant",
    )
    rate: float = Field(0.2, gt=0, description="a step multiplies R by exp(rate) at most")
    count_noise: float = Field(
        0.0, ge=0, description="deviation of the noise of the count, in samples; above 0 with noise"
    )

    @model_validator(mode="after")
    def _needs_a_quantile(self) -> "AdaptiveConfig":
        fields = type(self).model_fields
        others = [name for name in fields if getattr(self, name) != fields[name].default]
        if self.quantile is None and others:
            raise ValueError(
                f"training.adaptive.{others[0]} must be left out without "
                "training.adaptive.quantile, which makes the clipping norm move"
            )
        return self

    def make(self) -> Adaptive | None:
        """What moves the clipping norm, or None if it is constant."""
        if self.quantile is None:
            return None
        return Adaptive(self.quantile, self.rate, self.count_noise)


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
    def _clipping_norms_may_move(self) -> "TrainingConfig":
        if self.adapts and self.optimizer == "adam":
            raise ValueError(
                "training.adaptive must be left out with training.optimizer = 'adam', since no "
                "prediction follows both"
            )
        if self.adapts and self.noise.kind != "independent":
            raise ValueError(
                "training.noise must be independent with training.adaptive, since later steps take "
                f"back noise in proportion to R, got kind = {self.noise.kind!r}"
            )
        return self

    @property
    def adapts(self) -> bool:
        """Whether the clipping norm moves."""
        return self.adaptive.quantile is not None

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
        return self.optimizer == "sgd" and plain and not self.adapts

    @property
    def is_random(self) -> bool:
        """Whether runs differ by their keys."""
        return self.noisy or self.as_batches.is_random

    def as_noise(self, steps: int) -> Noise | None:
        """How the noise of a run of so many steps is correlated; None if it is not."""
        return self.noise.make(steps, self.as_batches, self.momentum)

    def sigma(self, steps: int, noise: Noise | None, n_samples: int) -> float:
        """The noise multiplier of a run of so many steps, from the budget if there is one."""
        if self.epsilon is None and self.mu is None:
            return self.noise_multiplier
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


def _folder_name(name: str) -> str:
    """Return the name if a folder on any disk can have it and is not hidden."""
    is_path = any(separator in name for separator in "/\\")
    # Disks limit a name to 255 bytes, and a time is appended.
    too_long = len(name.encode(errors="replace")) > _LONGEST_NAME
    if is_path or too_long or not name.isprintable() or not name.strip() or name.startswith("."):
        raise ValueError(
            f"must be a name of printable characters, without / and \\, without a leading dot, "
            f"of at most {_LONGEST_NAME} bytes; --out sets where the folder is"
        )
    return name


class ProblemConfig(Section):
    """The settings of every verb that trains: network, data and loss."""

    name: Annotated[str, AfterValidator(_folder_name)] = Field(
        "digits", description="what the run folder is called: a name, not a path"
    )
    seed: int = Field(0, ge=0, lt=2**31, description="of initialisation, split, noise and sampling")
    dtype: Literal["float32", "float64"] = Field("float64", description="of everything computed")
    loss: Literal["softmax_cross_entropy", "squared_error", "logistic", "huber"] = Field(
        "softmax_cross_entropy", description="softmax_cross_entropy, squared_error, logistic, huber"
    )
    huber_delta: float = Field(1.0, gt=0, description="where the huber loss turns linear")
    batch_size: int | None = Field(
        None, ge=1, description="samples in a block of a kernel, to save memory"
    )
    data: DataConfig = Field(DataConfig(), description="what to train on")
    model: ModelConfig = Field(ModelConfig(), description="the network")


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
        if "response" in self.predictions and couples:
            raise ValueError(
                "predictions must not hold 'response' with rule 'batch', which couples samples; "
                "use exact, frozen or recursion"
            )
        return self

    def _not_followed(self, prediction: PredictionName) -> str:
        training = self.training
        if training.adapts:
            return (
                f"predictions must not hold {prediction!r} with training.adaptive, whose clipping "
                "norm moves; use recursion"
            )
        return (
            f"predictions must not hold {prediction!r} with training.optimizer = "
            f"{training.optimizer!r} and such options; use "
            + ("response" if training.optimizer == "adam" else "recursion or response")
        )

    def _follows(self, prediction: PredictionName) -> bool:
        """Whether a prediction knows the optimizer, and a clipping norm that moves."""
        training = self.training
        if training.adapts:
            return prediction == "recursion"  # by an optimizer that is linear, as is checked
        if training.optimizer == "adam":
            return prediction == "response"
        in_steps = prediction in ("recursion", "response")
        in_steps |= prediction == "infinite" and training.noisy
        return in_steps or training.has_flow

    def _default_predictions(self, couples: bool) -> list[PredictionName]:
        names = [name for name in self.predictions if self._follows(name)]
        if self.model.kind == "function":  # which need not have an infinite width
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
