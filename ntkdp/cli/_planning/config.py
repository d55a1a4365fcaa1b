"""The configuration of ``ntkdp plan``: the problem, and what may be spent on a run."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ntkdp._backend.config_files import Section
from ntkdp.experiment import DataConfig, ModelConfig, ProblemConfig
from ntkdp.trajectory import MOST_STEPS

Positive = Annotated[float, Field(gt=0)]
SampleRate = Annotated[float, Field(gt=0, le=1)]
Steps = Annotated[int, Field(ge=1, le=MOST_STEPS)]


class PlanConfig(Section):
    """The axes of the plan, and its limits."""

    epsilons: list[Positive] = Field(
        [1.0, 3.0, 8.0], min_length=1, description="budgets; each gets a recommendation"
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="of every budget")
    learning_rates: list[Positive] = Field(
        [1.0, 4.0, 16.0, 64.0], min_length=1, description="step sizes, best of constant ratio"
    )
    clip_norms: list[Positive] = Field(
        [0.03, 0.1, 0.3, 1.0], min_length=1, description="clipping norms R, best of constant ratio"
    )
    steps: list[Steps] = Field(
        [50, 150, 500], min_length=1, description="numbers of steps; refinement stays in between"
    )
    sample_rates: list[SampleRate] = Field(
        [0.05, 0.2, 1.0], min_length=1, description="Poisson sampling rates, 1 for full batches"
    )
    max_epochs: float | None = Field(
        None, gt=0, description="the most passes over the data, steps times sampling rate"
    )
    rule: Literal["abadi", "global", "automatic", "psac"] = Field(
        "abadi", description="clipping rule: abadi, global, automatic, psac"
    )
    momentum: float = Field(0.0, ge=0, lt=1, description="heavy-ball momentum")
    reduction: Literal["mean", "sum"] = Field("mean", description="reduction of the loss")
    objective: Literal["accuracy", "loss", "ece"] = Field(
        "accuracy", description="what the recommended run is best in, on the test set"
    )
    kernels: Literal["auto", "frozen"] = Field(
        "auto", description="auto: noise moves the kernels; frozen: those of the start"
    )
    refinements: int = Field(2, ge=0, le=8, description="rounds of finer cells around the best")
    n_runs: int = Field(8, ge=2, description="runs that the recommended value comes from")
    more_data: bool = Field(True, description="predict what twice the data would give")
    rank: int = Field(512, ge=1, description="the most features of the kernel")
    max_samples: int = Field(10_000, ge=4, description="the most training samples that predict")

    @model_validator(mode="after")
    def _each_value_once(self) -> "PlanConfig":
        for name in ("epsilons", "learning_rates", "clip_norms", "steps", "sample_rates"):
            values = getattr(self, name)
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise ValueError(f"plan.{name} must not hold a value twice, got {twice[0]!r} again")
        return self


class PlanningConfig(ProblemConfig):
    """A plan: predict private runs over all that may be chosen, and choose."""

    dtype: Literal["float32", "float64"] = Field("float32", description="of everything computed")
    data: DataConfig = Field(DataConfig(n_train=1000, n_test=500), description="what to train on")
    model: ModelConfig = Field(ModelConfig(widths=[512]), description="the network")
    plan: PlanConfig = Field(PlanConfig(), description="what may be spent, and the axes")

    @model_validator(mode="after")
    def _outputs_mean_something(self) -> "PlanningConfig":
        if self.loss in ("squared_error", "huber") and self.plan.objective != "loss":
            # With the loss of a regression, accuracy is only the default.
            if "objective" in self.plan.model_fields_set:
                raise ValueError(
                    f"plan.objective must be loss with loss = {self.loss!r}, got "
                    f"{self.plan.objective!r}"
                )
            plan = self.plan.model_copy(update={"objective": "loss"})
            object.__setattr__(self, "plan", plan)
        return self
