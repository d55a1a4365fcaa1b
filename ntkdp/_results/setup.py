"""The training behind a trajectory: numbers that tell whether two of them can be compared."""

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ntkdp._backend import schedules as _schedules
from ntkdp._backend.types import LearningRate, ScalarLike, is_traced

#: A rule or a loss by its fields: names, and numbers or text.
Description = tuple[tuple[str, str | tuple[float, ...]], ...]
#: Numbers that differ by less are the same, in single precision too.
_SAME = 1e-6
#: Properties in which two trajectories may differ, by the names that ``compare`` takes.
DIFFERENCES = (
    "clipping",
    "loss",
    "reduction",
    "learning_rate",
    "noise_multiplier",
    "sample_rate",
    "optimizer",
    "public",
    "zeroth_order",
    "sharpness_aware",
    "time",
    "phases",
)


#: Properties that are told in words, and what holds where nothing is said.
_USUAL = {
    "public": "no public rows",
    "zeroth_order": "steps of gradients",
    "sharpness_aware": "gradients at the weights",
}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A phase of training as far as it is known: plain numbers and text.

    ``learning_rate`` holds the rates of the steps 0, 1, 2, 4, ...: one number if it is constant,
    and none for a flow, which stands for every small learning rate. None stands for values that are
    not known, e.g. inside a JAX transformation. ``batches`` and ``noise`` are empty for Poisson
    sampling or full batches, and for independent noise. ``neglects`` names what a prediction leaves
    out by its nature: ``"noise"``, ``"sampling"``. ``method`` says in sentences how it was
    predicted, if that was chosen. ``optimizer`` names its kind, and ``optimizer_options``
    what is not as by default, without numbers where they are not known, e.g. the momentum.
    ``friction`` belongs to a flow with inertia, and
    ``time_scale`` is the number that times were multiplied by. ``adaptive`` says how the clipping
    norm moves, and is empty if it is constant. ``public`` says how many samples are public, and
    their weight. ``zeroth_order`` says what directions steps take, and is empty if they are those
    of gradients. ``noise_schedule`` says how the noise multiplier changes, which is None then.
    ``sharpness_aware`` says how far from the weights gradients are taken, and is
    empty if they are taken there.
    """

    clipping: Description
    loss: Description
    reduction: str
    learning_rate: tuple[float, ...] = ()
    steps: int | None = None
    noise_multiplier: float | None = None
    noise_per_group: bool = False
    sample_rate: float | None = None
    batches: str = ""
    noise: str = ""
    optimizer: str = "sgd"
    optimizer_options: Description = ()
    friction: float | None = None
    time_scale: float | None = 1.0
    neglects: tuple[str, ...] = ()
    method: str = ""
    adaptive: str = ""
    public: str = ""
    zeroth_order: str = ""
    sharpness_aware: str = ""
    noise_schedule: str = ""


def described(part: eqx.Module) -> Description:
    """A rule or a loss by its kind and its fields, without values that are only known later."""
    found: list[tuple[str, str | tuple[float, ...]]] = [("kind", type(part).__name__)]
    for field in fields(part):
        value = getattr(part, field.name)
        if not is_traced(value):
            found.append((field.name, _plain(value)))
    return tuple(found)


def batches_in_words(batches: eqx.Module) -> str:
    """Batches by their kind and numbers; nothing for full ones and Poisson sampling."""
    usual = type(batches).__name__ in ("Full", "Poisson")
    return "" if usual else _in_words(described(batches))


def noise_in_words(noise: eqx.Module) -> str:
    """Noise by its kind and numbers; nothing for independent noise."""
    return "" if type(noise).__name__ == "Independent" else _in_words(described(noise))


def _plain(value: object) -> str | tuple[float, ...]:
    if value is None or isinstance(value, str):
        return str(value)
    if callable(value):
        return _name(value)
    return tuple(np.ravel(np.asarray(value, np.float64)).tolist())


def _name(function: object) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__)).rpartition(".")[2]


def number(value: object) -> float | None:
    """A number if it is known by now."""
    return None if value is None or is_traced(value) else float(np.asarray(value))


def noise_of(noise_multiplier: Any) -> dict[str, Any]:
    """The fields of a setup for a noise multiplier that may change over the steps."""
    if _schedules.is_schedule(noise_multiplier):
        words = _schedules.in_words(noise_multiplier)
        return {"noise_multiplier": None, "noise_schedule": words}
    return {"noise_multiplier": number(noise_multiplier), "noise_schedule": ""}


def rates(learning_rate: LearningRate, steps: int) -> tuple[float, ...]:
    """A learning rate, or a schedule at the steps 0, 1, 2, 4, ...; none if it is not known."""
    if callable(learning_rate):
        doubling = [0, *(2**k for k in range(steps.bit_length()))]
        numbers = [step for step in doubling if step < steps]
        learning_rate = jax.vmap(learning_rate)(jnp.asarray(numbers, jnp.int32))
    if is_traced(learning_rate):
        return ()
    return tuple(np.ravel(np.asarray(learning_rate, np.float64)).tolist())


def optimizer_of(optimizer: Callable[..., object]) -> tuple[str, Description]:
    """Kind of an optimizer, a module or a function, and its options that are not as by default."""
    if isinstance(optimizer, eqx.Module):
        kind = type(optimizer)
        defaults = inspect.signature(kind).parameters
        given = {field.name: getattr(optimizer, field.name) for field in fields(optimizer)}
        changed = {
            name: value
            for name, value in given.items()
            if name not in defaults
            or is_traced(value)
            or _plain(value) != _plain(defaults[name].default)
        }
        return kind.__name__.lower(), _known(changed)
    options: dict[str, object] = {}
    while isinstance(optimizer, functools.partial):
        options = optimizer.keywords | options
        optimizer = optimizer.func
    name = _name(optimizer)
    if str(getattr(optimizer, "__module__", "")).startswith("optax."):
        name = f"optax.{name}"
    given = {key: value for key, value in options.items() if is_traced(value) or value}
    return name, _known(given)


def _known(options: Mapping[str, object]) -> Description:
    """Options as plain numbers and text, without numbers where they are not known."""

    def known(value: object) -> str | tuple[float, ...]:
        if is_traced(value):
            return ()
        return str(value) if isinstance(value, bool) else _plain(value)

    return tuple((name, known(value)) for name, value in options.items())


def _optimizer_in_words(setup: Setup) -> str:
    shown = ", ".join(f"{name}={_value(value)}" for name, value in setup.optimizer_options)
    return f"{setup.optimizer}({shown})" if shown else setup.optimizer


def _same_optimizer(one: Setup, other: Setup) -> bool:
    """Whether kinds and options are the same, as far as they are known."""
    if one.optimizer != other.optimizer:
        return False
    ours, theirs = dict(one.optimizer_options), dict(other.optimizer_options)
    if ours.keys() != theirs.keys():
        return False
    return all(
        () in (ours[name], theirs[name]) or _same_value(ours[name], theirs[name]) for name in ours
    )


def in_words(setup: Setup) -> str:
    """The training in a line, as far as it is known."""
    parts = [_in_words(setup.clipping), _in_words(setup.loss), f"reduction {setup.reduction}"]
    if setup.learning_rate:
        parts.append(f"learning rate {_numbers(dict.fromkeys(setup.learning_rate))}")
    if setup.steps is not None:
        parts.append(f"{setup.steps} steps")
    noise = setup.noise_schedule or setup.noise_multiplier
    if noise:
        parts.append(f"noise multiplier {noise if isinstance(noise, str) else f'{noise:g}'}")
    if setup.noise:
        parts.append(setup.noise)
    if setup.batches:
        parts.append(setup.batches)
    elif setup.sample_rate is not None:
        parts.append(f"sample rate {setup.sample_rate:g}")
    parts.append(_optimizer_in_words(setup))
    parts += [setup.adaptive, setup.public, setup.zeroth_order, setup.sharpness_aware]
    return ", ".join(part for part in parts if part)


def rescaled(setups: tuple[Setup, ...], factor: ScalarLike) -> tuple[Setup, ...]:
    """The setups of a trajectory after its times are multiplied by ``factor``."""
    by = number(factor)
    return tuple(
        replace(
            phase,
            time_scale=None if by is None or phase.time_scale is None else phase.time_scale * by,
        )
        for phase in setups
    )


def to_json(setups: tuple[Setup, ...]) -> str:
    """All phases as text."""
    from pydantic import TypeAdapter

    return TypeAdapter(tuple[Setup, ...]).dump_json(setups).decode()


def from_json(text: object) -> tuple[Setup, ...]:
    """The inverse of :func:`to_json`.

    Raises
    ------
    ValueError
        If it is no such text.
    """
    from pydantic import TypeAdapter

    if not isinstance(text, str):
        raise ValueError(f"setup must be text, got {type(text).__name__}")
    return TypeAdapter(tuple[Setup, ...]).validate_json(text)


def differences(prediction: tuple[Setup, ...], run: tuple[Setup, ...]) -> dict[str, str]:
    """Known differences in words, by the names of :data:`DIFFERENCES`.

    A single phase is compared with each of several.
    """
    if not prediction or not run:
        return {}
    if len(prediction) != len(run) and 1 not in (len(prediction), len(run)):
        return {"phases": f"{len(prediction)} predicted, {len(run)} in the run"}
    n_phases = max(len(prediction), len(run))
    found: dict[str, str] = {}
    for number_, (ours, theirs) in enumerate(
        zip(_each(prediction, n_phases), _each(run, n_phases), strict=True)
    ):
        where = f" in phase {number_ + 1}" if n_phases > 1 else ""
        for name, predicted, observed in _differing(ours, theirs):
            found.setdefault(name, f"{predicted} predicted, {observed} in the run{where}")
    return found


def steps_of(setups: tuple[Setup, ...]) -> int | None:
    """How many steps all phases have together; None if that is not known, as of a flow."""
    counts = [phase.steps for phase in setups]
    known = [count for count in counts if count is not None]
    return sum(known) if known and len(known) == len(counts) else None


def neglected(prediction: tuple[Setup, ...], run: tuple[Setup, ...]) -> tuple[str, ...]:
    """The parts of the run that the prediction leaves out by its nature: "noise", "sampling"."""
    has = {
        "noise": any((phase.noise_multiplier or 0.0) > 0 or phase.noise_schedule for phase in run),
        "sampling": any((phase.sample_rate or 1.0) < 1 for phase in run),
    }
    return tuple(
        name for name in has if has[name] and any(name in phase.neglects for phase in prediction)
    )


def _each(setups: tuple[Setup, ...], n_phases: int) -> tuple[Setup, ...]:
    return setups * n_phases if len(setups) == 1 else setups


def _differing(prediction: Setup, run: Setup) -> Iterator[tuple[str, str, str]]:
    """Names of properties that differ, with their values on either side."""
    for name in ("clipping", "loss"):
        ours, theirs = getattr(prediction, name), getattr(run, name)
        if not _same_description(ours, theirs):
            yield name, _in_words(ours), _in_words(theirs)
    if prediction.adaptive != run.adaptive:
        usual = "a constant clipping norm"
        yield "clipping", prediction.adaptive or usual, run.adaptive or usual
    if prediction.reduction != run.reduction:
        yield "reduction", prediction.reduction, run.reduction
    if not _same_rates(prediction.learning_rate, run.learning_rate):
        yield "learning_rate", _numbers(prediction.learning_rate), _numbers(run.learning_rate)
    if not {"noise"} & {*prediction.neglects, *run.neglects}:
        yield from _of_noise(prediction, run)
    if not {"sampling"} & {*prediction.neglects, *run.neglects}:
        ours, theirs = prediction.sample_rate, run.sample_rate
        if ours is not None and theirs is not None and not _same(ours, theirs):
            yield "sample_rate", f"{ours:g}", f"{theirs:g}"
        elif prediction.batches != run.batches:
            usual = "Poisson or full batches"
            yield "sample_rate", prediction.batches or usual, run.batches or usual
    for name, usual in _USUAL.items():
        said, done = getattr(prediction, name), getattr(run, name)
        if said != done:
            yield name, said or usual, done or usual
    yield from _of_optimizer(prediction, run)


def _of_noise(prediction: Setup, run: Setup) -> Iterator[tuple[str, str, str]]:
    ours, theirs = prediction.noise_multiplier, run.noise_multiplier
    schedules = (prediction.noise_schedule, run.noise_schedule)
    if schedules[0] != schedules[1] and not {"?"} & set(schedules):
        said, done = (
            schedule or ("an unknown number" if constant is None else f"{constant:g}")
            for schedule, constant in zip(schedules, (ours, theirs), strict=True)
        )
        yield "noise_multiplier", said, done
    if ours is None or theirs is None:
        return
    if not _same(ours, theirs):
        yield "noise_multiplier", f"{ours:g}", f"{theirs:g}"
    elif ours > 0 and prediction.noise != run.noise:
        usual = "independent noise"
        yield "noise_multiplier", prediction.noise or usual, run.noise or usual
    elif ours > 0 and prediction.noise_per_group != run.noise_per_group:
        shares = ("noise of one deviation", "noise by group")
        yield (
            "noise_multiplier",
            shares[prediction.noise_per_group],
            shares[run.noise_per_group],
        )


def _of_optimizer(prediction: Setup, run: Setup) -> Iterator[tuple[str, str, str]]:
    ours, theirs = _optimizer_in_words(prediction), _optimizer_in_words(run)
    rate = run.learning_rate[0] if len(run.learning_rate) == 1 else None
    scale = None
    if prediction.time_scale is not None and run.time_scale is not None:
        scale = run.time_scale / prediction.time_scale
    expected: float | None = 1.0
    if prediction.friction is not None and run.friction is None:
        # Its unit of time is the root of the learning rate a step.
        expected = None if rate is None else rate**-0.5
        options = dict(run.optimizer_options)
        momentum = options.pop("momentum", (0.0,))
        is_other = run.optimizer == "adam" or run.optimizer.startswith("optax.")
        if is_other or options.keys() - {"nesterov"}:
            yield "optimizer", ours, theirs
        elif rate is not None and isinstance(momentum, tuple) and momentum:
            expected_momentum = 1 - prediction.friction * math.sqrt(rate)
            if not math.isclose(expected_momentum, momentum[0], rel_tol=0, abs_tol=1e-4):
                yield "optimizer", f"{ours} of momentum {expected_momentum:.4g}", theirs
    elif prediction.optimizer != "preconditioned" and not _same_optimizer(prediction, run):
        yield "optimizer", ours, theirs
    if scale is not None and expected is not None and not _same(scale, expected):
        unit = f"{scale / expected:.4g} times that unit (see Trajectory.rescale_time)"
        yield "time", "one unit of time", unit


def _same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=_SAME)


def _same_rates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    if 1 in (len(one), len(other)):
        return all(_same(a, b) for a in one for b in other)
    return all(_same(a, b) for a, b in zip(one, other, strict=False))


def _same_description(one: Description, other: Description) -> bool:
    ours, theirs = dict(one), dict(other)
    if ours.get("kind") != theirs.get("kind"):
        return False
    return all(_same_value(ours[name], theirs[name]) for name in ours.keys() & theirs.keys())


def _same_value(one: str | tuple[float, ...], other: str | tuple[float, ...]) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    if len(one) != len(other) and 1 not in (len(one), len(other)):
        return False
    return bool(np.allclose(one, other, rtol=_SAME, atol=0))


def _in_words(description: Description) -> str:
    named = dict(description)
    kind = named.pop("kind", "")
    shown = ", ".join(f"{name}={_value(value)}" for name, value in named.items() if value != "None")
    return f"{kind}({shown})"


def _value(value: str | tuple[float, ...]) -> str:
    return value if isinstance(value, str) else _numbers(value) or "?"


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
