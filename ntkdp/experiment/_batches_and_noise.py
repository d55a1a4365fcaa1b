"""The sections of a configuration for batches and for noise that is correlated over steps."""

from collections.abc import Callable
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from ntkdp._backend.config_files import Section
from ntkdp.batches import Batches, Cyclic, FixedSize, Shuffled, resolve
from ntkdp.experiment._steps import PublicConfig, SharpnessAwareConfig, ZerothOrderConfig
from ntkdp.noise import Correlated, Noise

#: The field that each kind of batches or of noise needs.
_FIELD_OF = {
    "fixed_size": "size",
    "cyclic": "n_batches",
    "shuffled": "n_batches",
    "square_root": "n_bands",
    "optimal_for_sums": "n_bands",
    "kernel_optimal": "n_bands",
    "toeplitz": "coefficients",
}
#: Finds the strategy of so many bands that is best under a kernel.
StrategyFor: TypeAlias = Callable[[int], Noise]


class BatchesConfig(Section):
    """How the batches of a run are made, in place of a sampling rate."""

    kind: Literal["full", "fixed_size", "cyclic", "shuffled"] = Field(
        "full", description="full, fixed_size, cyclic or shuffled; Poisson is by sample_rate"
    )
    size: int | None = Field(None, ge=1, description="of fixed_size: samples of a batch")
    n_batches: int | None = Field(
        None, ge=1, description="of cyclic and shuffled: batches of an epoch"
    )

    @model_validator(mode="after")
    def _has_its_field(self) -> "BatchesConfig":
        _check_fields("batches", self, ("size", "n_batches"))
        return self

    def make(self) -> Batches | None:
        """The batches, or None for those of the sampling rate."""
        if self.kind == "fixed_size":
            assert self.size is not None
            return FixedSize(self.size)
        if self.kind == "full":
            return None
        assert self.n_batches is not None
        kind = Cyclic if self.kind == "cyclic" else Shuffled
        return kind(self.n_batches)


class NoiseConfig(Section):
    """How the noise of a run is correlated over its steps."""

    kind: Literal[
        "independent", "square_root", "optimal_for_sums", "kernel_optimal", "toeplitz"
    ] = Field(
        "independent",
        description="independent, square_root, optimal_for_sums, toeplitz, or kernel_optimal: the "
        "strategy that adds least to the predicted loss under the kernel, scaled so that sigma "
        "costs what it costs with independent noise",
    )
    n_bands: int | None = Field(
        None,
        ge=1,
        description="of square_root, optimal_for_sums and kernel_optimal: coefficients of the "
        "strategy",
    )
    coefficients: list[Annotated[float, Field(allow_inf_nan=False)]] | None = Field(
        None, min_length=1, description="of toeplitz: those of the strategy"
    )

    @model_validator(mode="after")
    def _has_its_field(self) -> "NoiseConfig":
        _check_fields("noise", self, ("n_bands", "coefficients"))
        return self

    def make(
        self, steps: int, chosen: Batches, momentum: float, strategy_for: StrategyFor | None
    ) -> Noise | None:
        """The noise of a run of so many steps, or None if it is independent.

        Without a ``strategy_for`` the kernel is not known yet, and noise that is the best under it
        is given as independent noise, at the same cost of privacy.

        Raises
        ------
        ValueError
            If the strategy has no coefficients, or no sensitivity under the batches.
        """
        if self.kind == "independent":
            return None
        if self.kind == "toeplitz":
            assert self.coefficients is not None
            return Correlated(self.coefficients)
        assert self.n_bands is not None
        if self.kind == "kernel_optimal":
            return None if strategy_for is None else strategy_for(self.n_bands)
        if self.kind == "square_root":
            return Correlated.square_root(self.n_bands)
        return Correlated.optimal_for_sums(
            steps=steps, n_bands=self.n_bands, batches=chosen, momentum=momentum
        )


def _check_fields(name: str, section: BatchesConfig | NoiseConfig, fields: tuple[str, ...]) -> None:
    """Raise unless the section has the field that its kind needs, and no other."""
    needed = _FIELD_OF.get(section.kind)
    for field in fields:
        value = getattr(section, field)
        if (value is not None) != (field == needed):
            what = "be given" if field == needed else "be left out"
            raise ValueError(
                f"training.{name}.{field} must {what} with kind = {section.kind!r}, got {value}"
            )


class MechanismConfig(Section):
    """How batches are made and noise is correlated, in every verb that trains."""

    sample_rate: float = Field(
        1.0, gt=0, le=1, description="1: full batch; below: Poisson sampling"
    )
    batches: BatchesConfig = Field(
        default_factory=BatchesConfig, description="in place of sample_rate"
    )
    noise: NoiseConfig = Field(
        default_factory=NoiseConfig, description="its correlation over the steps"
    )
    public: PublicConfig = Field(PublicConfig(), description="training samples that are public")
    sharpness_aware: SharpnessAwareConfig = Field(
        SharpnessAwareConfig(), description="gradients taken a little way up the last noisy one"
    )
    zeroth_order: ZerothOrderConfig = Field(
        ZerothOrderConfig(), description="steps along random directions, without gradients"
    )

    @model_validator(mode="after")
    def _one_way_to_make_batches(self) -> "MechanismConfig":
        if self.batches.kind != "full" and self.sample_rate < 1:
            raise ValueError(
                f"training.sample_rate must be left out with training.batches of kind "
                f"{self.batches.kind!r}, got {self.sample_rate}"
            )
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> "MechanismConfig":
        drawn = self.batches.kind == "fixed_size" or self.sample_rate < 1
        if self.noise.kind == "kernel_optimal" and drawn:
            raise ValueError(
                "training.noise.kind must not be 'kernel_optimal' with batches that are drawn at "
                "random, under which no strategy has a sensitivity; take full, cyclic or shuffled "
                "ones"
            )
        others = [name for name in self.other_steps if name != "zeroth_order"]
        if self.zeroth_order.directions and others:
            raise ValueError(
                f"training.zeroth_order must be left out with training.{others[0]}, which needs "
                "the steps of gradients"
            )
        for name in self.other_steps:
            independent = self.noise.kind == "independent"
            takes_all = name == "public" and self.noise.kind != "kernel_optimal"
            if not independent and not takes_all:
                raise ValueError(
                    f"training.noise must be independent with training.{name}, since no prediction "
                    f"of a configuration follows both, got kind = {self.noise.kind!r}"
                )
        return self

    @property
    def other_steps(self) -> list[str]:
        """Names of the sections that make other steps than those of private gradients alone."""
        sections = {
            "public": self.public.rows > 0,
            "sharpness_aware": self.sharpness_aware.radius > 0,
            "zeroth_order": self.zeroth_order.directions > 0,
        }
        return [name for name, used in sections.items() if used]

    @property
    def flat_steps(self) -> list[str]:
        """Those that need clipping of whole samples."""
        return [name for name in self.other_steps if name in ("sharpness_aware", "zeroth_order")]

    @property
    def as_batches(self) -> Batches:
        """How batches are made."""
        return resolve(self.batches.make(), self.sample_rate)
