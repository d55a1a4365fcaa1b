"""The settings of every verb that trains: data, network and loss."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from ntkdp._backend.config_files import Section
from ntkdp.experiment._steps import PublicConfig

#: The most bytes in the name of a run.
_LONGEST_NAME = 150


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
    groups: str | None = Field(
        None,
        description="show results by subgroup as well: 'class', or the column of a .csv or the "
        "array of an .npz whose entries divide the samples",
    )
    options: dict[str, Any] = Field(
        {}, description="further options of the loader, e.g. {target = 'quality'} for a .csv"
    )


class ModelConfig(Section):
    """The network, in infinite-width terms, or a function that makes it.

    The name of a function, 'module:name', is short for the section of one.
    """

    kind: Literal["mlp", "cnn", "function", "given"] = Field(
        "mlp",
        description="mlp, cnn or function; given stands for the argument model of "
        "ntkdp.experiment.run",
    )
    function: str | None = Field(
        None,
        description="of kind function: 'module:name' of a function of the number of outputs that "
        "returns an ntkdp.models.Model; the folder where the command is run is searched too; model "
        "= 'module:name' is short for both",
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

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        if isinstance(value, str):
            return {"kind": "function", "function": value}
        if not isinstance(value, dict | cls):
            raise ValueError(
                "model must be a section, or the name of a function, such as "
                "'my_models:transformer'"
            )
        return value

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
        if self.is_own:
            fields = type(self).model_fields
            # Defaults may be written, as they are in the settings that a worker gets.
            others = {
                name
                for name in self.model_fields_set - {"kind", "function"}
                if getattr(self, name) != fields[name].default
            }
            if others:
                raise ValueError(
                    f"model.{min(others)} must be left out with model.kind = {self.kind!r}, which "
                    "makes the whole network"
                )
        return self

    @property
    def is_own(self) -> bool:
        """Whether it is a model that somebody else has made."""
        return self.kind in ("function", "given")

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear head on the inputs."""
        return self.kind == "mlp" and not self.widths

    @property
    def words(self) -> str:
        """The network in a few words."""
        if self.function is not None:
            return f"the network of {self.function}"
        if self.kind == "given":
            return "the network given"
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

    @property
    def public(self) -> PublicConfig:
        """Which of the training samples are public: none, unless training says so."""
        return PublicConfig()

    @property
    def samples(self) -> str:
        """The data in a few words."""
        data, n_public = self.data, self.public.rows
        public = f", {n_public} of the former public" if n_public else ""
        return f"{data.name}, {data.n_train} training and {data.n_test} test samples{public}"
