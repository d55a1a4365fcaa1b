"""Where the sliders may stand, and the configuration that a place of them is."""

import json
from typing import Any, NamedTuple

from ntkdp import clipping, experiment
from ntkdp._backend.config_files import ConfigError
from ntkdp.clipping import ClippingRule
from ntkdp.experiment import Config

#: The width whose kernel is that of infinite width, and that of a network that a function makes.
INFINITE, OWN = "infinite", "its own"
#: Clipping rules that bound each sample.
RULES = ("abadi", "automatic", "psac", "global")
#: Without a file: handwritten digits.
DIGITS: dict[str, Any] = {
    "dtype": "float32",
    "data": {"n_train": 500, "n_test": 300},
    "model": {"widths": [768]},
    "training": {"learning_rate": 2.0, "steps": 40, "epsilon": 8.0, "delta": 1e-5},
    "clipping": [{"clip_norm": 1.0}],
}
#: What a slider of each kind offers, apart from where it starts.
_DECADE = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
_STEPS = (5, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500)
_SAMPLE_RATES = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0)
_WIDTHS = (64, 256, 1024)
_EPSILON = 3.0


class Position(NamedTuple):
    """Where the sliders stand: a private run that may be made."""

    rule: str
    clip_norm: float
    learning_rate: float
    epsilon: float
    steps: int
    sample_rate: float
    width: str


class Setting(NamedTuple):
    """A configuration to explore: what never moves, where sliders start, and what they offer.

    ``fields`` are those that the configuration was made of.
    """

    config: Config
    fields: dict[str, Any]
    start: Position
    choices: dict[str, tuple[Any, ...]]
    delta: float

    def rule(self, name: str) -> ClippingRule:
        """The clipping rule of this name with a clipping norm of one."""
        return clipping.from_name(name, R=1.0, **self._options_of(name))

    def _options_of(self, rule: str) -> dict[str, float]:
        """The parameters that the configuration gives to a rule."""
        case = self.config.clipping[0]
        if case.rule != rule:
            return {}
        named = {name: getattr(case, name) for name in ("gamma", "r", "Z")}
        return {name: value for name, value in named.items() if value is not None}

    def fields_at(self, place: Position) -> dict[str, Any]:
        """Fields of a configuration that makes the run of a place."""
        training = {
            **self.fields.get("training", {}),
            "learning_rate": place.learning_rate,
            "steps": place.steps,
            "sample_rate": place.sample_rate,
            "epsilon": place.epsilon,
            "delta": self.delta,
        }
        case = {"rule": place.rule, "clip_norm": place.clip_norm, **self._options_of(place.rule)}
        fields = {**self.fields, "training": training, "clipping": [case]}
        if place.width.isdigit():
            model = self.config.model
            widths = [int(place.width)] * len(model.widths)
            fields["model"] = {**self.fields.get("model", {}), "widths": widths}
        return fields

    def as_toml(self, place: Position) -> str:
        """A configuration file for ``ntkdp predict`` and ``ntkdp compare``."""
        return _as_toml(self.fields_at(place))


def setting_of(fields: dict[str, Any]) -> Setting:
    """What there is to explore around a configuration.

    Raises
    ------
    ConfigError
        If a field is wrong, or the training is none that the page predicts.
    """
    config = experiment.config(**fields)
    experiment.rules_of(config)
    _refuse_other_training(config)
    case, training, model = config.clipping[0], config.training, config.model
    widths: tuple[str, ...]
    if model.is_linear or model.kind == "function":
        widths = (OWN,)
    else:
        own = {*_WIDTHS, *model.widths} if len(set(model.widths)) == 1 else set(_WIDTHS)
        widths = (*(str(width) for width in sorted(own)), INFINITE)
    norm = case.clip_norm
    assert not isinstance(norm, list)
    start = Position(
        case.rule,
        norm,
        case.learning_rate_in(training),
        _EPSILON if training.epsilon is None else training.epsilon,
        training.steps if case.steps is None else case.steps,
        training.sample_rate,
        widths[-1],
    )
    choices: dict[str, tuple[Any, ...]] = {
        "rule": RULES,
        "clip_norm": _with(start.clip_norm, _decades(-2, 1)),
        "learning_rate": _with(start.learning_rate, _decades(-2, 1)),
        "epsilon": _with(start.epsilon, _decades(-1, 1)),
        "steps": _with(start.steps, _STEPS),
        "sample_rate": _with(start.sample_rate, _SAMPLE_RATES),
        "width": widths,
    }
    delta = training.delta or min(1e-5, 1 / (10 * config.data.n_train))
    return Setting(config, fields, start, choices, delta)


def _refuse_other_training(config: Config) -> None:
    training, case = config.training, config.clipping[0]
    wrong = {
        "training.optimizer": training.optimizer != "sgd" and training.optimizer,
        "training.momentum": training.momentum,
        "training.weight_decay": training.weight_decay,
        "training.average": training.average,
        "training.batches.kind": training.batches.kind != "full" and training.batches.kind,
        "training.noise.kind": training.noise.kind != "independent" and training.noise.kind,
        "training.noise_multiplier": training.noise_multiplier,
        "training.mu": training.mu,
        **{f"training.{name}": "a section" for name in training.other_steps},
        "clipping.0.scope": case.scope != "flat" and case.scope,
        "clipping.0.rule": case.rule not in RULES and case.rule,
    }
    for field, value in wrong.items():
        if value:
            raise ConfigError(
                f"field {field!r}: ntkdp explore predicts plain private steps with a flat rule "
                f"({', '.join(RULES)}) and a budget in training.epsilon, got {value}; change it, "
                "or take ntkdp predict"
            )


def _decades(first: int, last: int) -> tuple[float, ...]:
    """Numbers in steps of about one and a half, from 10^first to 10^(last + 1)."""
    powers = [float(f"{digit:g}e{power}") for power in range(first, last + 1) for digit in _DECADE]
    return (*powers, 10.0 ** (last + 1))


def _with(value: Any, offered: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(sorted({value, *offered}))


def _as_toml(fields: dict[str, Any]) -> str:
    """Nested fields as TOML: plain ones first, then sections, each under its own header."""
    lines, sections = [], []
    for name, value in fields.items():
        if isinstance(value, dict):
            sections.append((f"[{name}]", value))
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            sections += [(f"[[{name}]]", section) for section in value]
        else:
            lines.append(f"{name} = {_value(value)}")
    for header, section in sections:
        lines += ["", header, *(f"{name} = {_value(value)}" for name, value in section.items())]
    return "\n".join(lines).lstrip("\n") + "\n"


def _value(value: Any) -> str:
    """A number, a text, a list or an inline table; JSON writes the first two as TOML does."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {_value(own)}" for name, own in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
