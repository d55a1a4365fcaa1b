"""The sections of a configuration for other steps than those of private gradients alone."""

from collections.abc import Iterable

from pydantic import Field, model_validator

from ntkdp._backend.config_files import Section
from ntkdp._estimators.sharpness_aware import SharpnessAware
from ntkdp._estimators.zeroth_order import ZerothOrder
from ntkdp.clipping import Adaptive


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
        if self.quantile is None:
            why = "training.adaptive.quantile, which makes the clipping norm move"
            _refuse("adaptive", self, ("rate", "count_noise"), why)
        return self

    def make(self) -> Adaptive | None:
        """What moves the clipping norm, or None if it is constant."""
        if self.quantile is None:
            return None
        return Adaptive(self.quantile, self.rate, self.count_noise)


class PublicConfig(Section):
    """Training samples that are not private."""

    rows: int = Field(
        0, ge=0, description="the first so many training samples are public, without clipping"
    )
    weight: float = Field(
        0.5, ge=0, le=1, description="of their gradient in a step; the private one has the rest"
    )

    @model_validator(mode="after")
    def _needs_rows(self) -> "PublicConfig":
        if not self.rows:
            _refuse("public", self, ("weight",), "training.public.rows")
        return self


class SharpnessAwareConfig(Section):
    """Gradients that are taken a little way up the noisy gradient of the step before."""

    radius: float = Field(0.0, ge=0, description="the way, in the unit of the weights; 0 for none")

    def make(self, n_params: int) -> SharpnessAware | None:
        """How gradients are taken in a network of so many weights, or None for at the weights."""
        return SharpnessAware(self.radius, n_params) if self.radius else None


class ZerothOrderConfig(Section):
    """Steps along random directions, without gradients."""

    directions: int = Field(0, ge=0, description="of a step; 0 for steps along gradients")
    reach: float | None = Field(
        None, gt=0, description="of finite differences; without it, slopes are derivatives"
    )

    @model_validator(mode="after")
    def _needs_directions(self) -> "ZerothOrderConfig":
        if not self.directions:
            _refuse("zeroth_order", self, ("reach",), "training.zeroth_order.directions")
        return self

    def make(self) -> ZerothOrder | None:
        """How steps are made, or None for along gradients."""
        return ZerothOrder(self.directions, self.reach) if self.directions else None


def _refuse(name: str, section: Section, fields: Iterable[str], without: str) -> None:
    """Raise if one of the fields is given, which mean nothing alone."""
    defaults = type(section).model_fields
    for field in fields:
        if getattr(section, field) != defaults[field].default:
            raise ValueError(f"training.{name}.{field} must be left out without {without}")
