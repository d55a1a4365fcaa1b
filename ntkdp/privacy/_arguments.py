"""The arguments of privacy accounting, checked."""

from typing import Any, Literal

from ntkdp._backend import validate

Accountant = Literal["pld", "rdp"]
ACCOUNTANTS: tuple[Accountant, ...] = ("pld", "rdp")


def number(**named: Any) -> float:
    """A single number."""
    (value,) = named.values()
    validate.scalar(**named)
    return float(value)


def probability(**named: Any) -> float:
    """A number in (0, 1)."""
    ((name, value),) = named.items()
    value = number(**{name: validate.positive(**named)})
    if value >= 1:
        raise ValueError(f"{name} must be in (0, 1), got {value!r}")
    return value


def checked_mechanism(
    noise_multiplier: Any, sample_rate: Any, steps: Any
) -> tuple[float, float, int]:
    """Noise multiplier, sampling rate and number of steps."""
    sigma = validate.non_negative(noise_multiplier=noise_multiplier)
    q = validate.fraction(sample_rate=sample_rate)
    return (
        number(noise_multiplier=sigma),
        number(sample_rate=q),
        validate.count(steps=steps),
    )
