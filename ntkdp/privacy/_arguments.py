"""The arguments of privacy accounting, checked."""

from typing import Any, Literal

from ntkdp._backend import validate
from ntkdp.privacy._mechanism import Mechanism

Accountant = Literal["pld", "rdp"]
ACCOUNTANTS: tuple[Accountant, ...] = ("pld", "rdp")
#: How batches are drawn at a sampling rate; the relation of neighbours follows from it.
Sampling = Literal["poisson", "fixed_size"]
SAMPLINGS: tuple[Sampling, ...] = ("poisson", "fixed_size")


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
    noise_multiplier: Any, sample_rate: Any, steps: Any, sampling: Any = "poisson"
) -> Mechanism:
    """The mechanism of a noise multiplier, a sampling rate and a number of steps."""
    sigma = validate.non_negative(noise_multiplier=noise_multiplier)
    q = validate.fraction(sample_rate=sample_rate)
    validate.choice(SAMPLINGS, sampling=sampling)
    replaced = sampling == "fixed_size"
    return Mechanism(
        # A sample and the one in its place lie up to two sensitivities apart.
        number(noise_multiplier=sigma) / (2 if replaced else 1),
        number(sample_rate=q),
        validate.count(steps=steps),
        replaced,
    )
