"""A counterexample as plain data, which can be replayed, printed and kept in a text file."""

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from ntkdp import clipping, losses
from ntkdp._backend import validate
from ntkdp._backend.files import replacing
from ntkdp._backend.types import Array, ArrayLike
from ntkdp.counterexamples._state import flow_of, measured_state
from ntkdp.gradient_flow import KernelFlow, solve
from ntkdp.ntk import as_matrices

KINDS = ("rise", "stuck", "divergence")
#: The version of the text format.
_VERSION = 1

#: Distance by which outputs are moved off an equilibrium, relative to their norm.
_NUDGE = 1e-3
#: Distance from an equilibrium, relative to the norm of the outputs, within which a flow stays.
_STAYS = 1e-2
#: Multiples of the norm of the outputs that a flow could cover in the time given to leave.
_WAIT = 100.0
#: Multiples of the norm of the outputs over which a divergence is followed.
_FAR = 100.0
#: Factor by which the loss must have grown by then.
_GROWTH = 50.0
#: Share of its initial speed that a divergence must have kept by then.
_KEPT_SPEED = 0.5
#: A flow that takes more steps of the solver than this is not followed to its end.
_MAX_STEPS = 4000

#: Nested tuples of numbers.
Numbers: TypeAlias = tuple[Any, ...]
#: A field of a loss or a rule.
Option: TypeAlias = float | Numbers


@dataclass(frozen=True)
class Counterexample:
    r"""An instance on which a clipped flow fails, as numbers that can be read and checked.

    Everything is in the sum form: the loss is :math:`\sum_i \ell_i`, the flow is
    :math:`\dot f = -\sum_r H_r C_r a`, and its time is learning rate times steps.

    Parameters
    ----------
    kind : {"rise", "stuck", "divergence"}
        The loss rises at the outputs; or they stay where they are at non-zero loss although the
        kernel is positive definite; or the loss grows without bound although every term of the
        kernel is positive definite.
    kernel : nested tuples
        Terms ``(R, n, n)``, meaning ``(x) I_K``, or ``(R, n, n, K, K)``; one term with flat scope.
    targets, outputs : nested tuples
        Targets as the loss takes them, and outputs ``(n, K)``.
    loss, rule : str
        Names, as for ``ntkdp.losses.from_name`` and ``ntkdp.clipping.from_name``.
    loss_options, rule_options : dict
        Their fields.
    scope : {"flat", "layerwise"}
    measured : dict
        The result of :meth:`replay` at the time of the search; comparisons ignore it.

    Raises
    ------
    ValueError, TypeError
        If the numbers make no flow, or the kernel is not symmetric and positive semi-definite.

    Notes
    -----
    Besides the ``loss``, a replay measures the following.

    *rise*: ``loss_rate``, :math:`dL/dt = -\sum_r a^\top H_r C_r a`, and ``rise``, which is free of
    scale: this rate divided by :math:`\sum_r \sum_i \|g_{ir}\| \sum_i \|C_{ir} g_{ir}\|`.

    *stuck*: ``speed``, the velocity's norm divided by
    :math:`\sum_r \|J_r\|_F \sum_i \|C_{ir} g_{ir}\|`; ``eigenvalue_ratio``, the smallest eigenvalue
    of the whole kernel divided by the largest; ``departure``, the distance from the outputs at
    which the flow ends, divided by their norm, after they were nudged by a thousandth of it along
    each axis.

    *divergence*: ``eigenvalue_ratio``, the least over all terms; ``loss_growth`` over a long time,
    the ``horizon``; ``speed_ratio``, the speed at its end divided by the speed at its start.

    The measures are *derived* for this library, not taken from a paper.

    Examples
    --------
    >>> from ntkdp.counterexamples import Counterexample
    >>> example = Counterexample("rise", (((1.0,) * 3,) * 3,), ((0.0,),) * 3,
    ...                          ((3.0,), (-1.0,), (-1.0,)), "squared_error", {}, "abadi",
    ...                          {"R": 1.0}, "flat")
    >>> {name: round(value, 6) for name, value in example.replay().items()}
    {'loss': 5.5, 'loss_rate': 1.0, 'rise': 0.066667}
    >>> example.holds()
    True
    """

    kind: str
    kernel: Numbers
    targets: Numbers
    outputs: Numbers
    loss: str
    loss_options: dict[str, Option] = field(hash=False)
    rule: str
    rule_options: dict[str, Option] = field(hash=False)
    scope: str
    measured: dict[str, float] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        validate.choice(KINDS, kind=self.kind)
        terms = self.terms
        if terms.ndim not in (3, 5) or (self.scope == "flat" and len(terms) != 1):
            raise ValueError(
                "kernel must hold terms of shape (R, n, n) or (R, n, n, K, K), one with "
                f"scope='flat', got shape {terms.shape} with scope={self.scope!r}"
            )
        self.flow.init(self.outputs_array)
        check_kernel(terms)

    @property
    def terms(self) -> Array:
        """The kernel's terms as an array."""
        return jnp.asarray(self.kernel, jnp.result_type(float))

    @property
    def outputs_array(self) -> Array:
        """The outputs as an array, ``(n, K)``."""
        return jnp.asarray(self.outputs, jnp.result_type(float))

    @property
    def loss_function(self) -> losses.Loss:
        """The loss that ``loss`` names."""
        return losses.from_name(self.loss, **self.loss_options)

    @property
    def clipping(self) -> clipping.ClippingRule:
        """The rule that ``rule`` names."""
        return clipping.from_name(self.rule, **_arrays(self.rule_options), scope=self.scope)

    @property
    def flow(self) -> KernelFlow:
        """The flow, in the sum form: to integrate it, plot it, or take it apart."""
        targets = jnp.asarray(self.targets)
        return flow_of(self.terms, targets, self.loss_function, self.clipping)

    def replay(self) -> dict[str, float]:
        """The measured numbers, computed anew from the data through the public interface."""
        terms, outputs = self.terms, self.outputs_array
        state = measured_state(
            terms, jnp.asarray(self.targets), self.loss_function, self.clipping, outputs
        )
        measured = {"loss": float(jnp.sum(self.loss_function(outputs, state.flow.targets)))}
        if self.kind == "rise":
            return measured | {
                "loss_rate": float(state.loss_rate()),
                "rise": float(state.rise()),
            }
        if self.kind == "stuck":
            return measured | {
                "speed": float(state.speed()),
                "eigenvalue_ratio": eigenvalue_ratio(np.asarray(jnp.sum(terms, axis=0))[None]),
                "departure": _departure(state.flow, outputs, state.pace()),
            }
        speed = float(jnp.linalg.norm(state.velocity))
        horizon = _FAR * _size(outputs) / speed if speed > 0 else math.inf
        measured["eigenvalue_ratio"] = eigenvalue_ratio(np.asarray(terms))
        return measured | _after_long(state.flow, outputs, horizon, measured["loss"], speed)

    def holds(self) -> bool:
        """Whether a replay still fails, by a margin that rounding cannot explain."""
        return fails(self.kind, self.replay())

    def to_json(self) -> str:
        """The data as JSON, with all digits of its numbers."""
        data = {"version": _VERSION} | dataclasses.asdict(self)
        return json.dumps(data, indent=1, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> "Counterexample":
        """The counterexample that :meth:`to_json` wrote.

        Raises
        ------
        ValueError
            If the text is not JSON or of another version, a field is missing or unknown, or the
            values make no instance.
        """
        try:
            data = json.loads(text, parse_constant=_no_constant)
        except json.JSONDecodeError as error:
            raise ValueError(f"text must be JSON, got an error: {error}") from error
        if not isinstance(data, dict):
            raise ValueError(f"text must be a JSON object, got {type(data).__name__}")
        version = data.pop("version", None)
        if type(version) is not int or version != _VERSION:
            raise ValueError(
                f"version must be {_VERSION}, got {version!r}; "
                "another release of ntkdp may have written it"
            )
        names = [entry.name for entry in dataclasses.fields(Counterexample)]
        for name in sorted(set(data) ^ set(names)):
            known = validate.did_you_mean(name, names) if name in data else ""
            raise ValueError(f"{'unknown' if name in data else 'missing'} field {name!r}{known}")
        for name, kind in _JSON_TYPES.items():
            if not isinstance(data[name], kind):
                raise ValueError(
                    f"field {name!r} must be a JSON "
                    f"{_JSON_NAMES[kind]}, got {type(data[name]).__name__}"
                )
        for name in ("kernel", "targets", "outputs"):
            _check_numbers(name, data[name])
        validate.choice(clipping.SCOPES, scope=data["scope"])
        _check_options("loss", losses.class_of(data["loss"]), data)
        _check_options("rule", clipping.class_of(data["rule"]), data)
        for quantity, value in data["measured"].items():
            if isinstance(value, list):
                raise ValueError(f"field 'measured.{quantity}' must be a number, got a list")
            _check_numbers(f"measured.{quantity}", value)
        try:
            return Counterexample(**{name: _tuples(value) for name, value in data.items()})
        except TypeError as error:
            raise ValueError(f"text describes no instance: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the data to a file as JSON, whole or not at all."""
        with replacing(path) as temporary:
            temporary.write_text(self.to_json() + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Counterexample":
        """The counterexample in a file that :meth:`save` wrote."""
        return Counterexample.from_json(Path(path).read_text(encoding="utf-8"))

    def __str__(self) -> str:
        options = ", ".join(f"{k}={_shown(v)}" for k, v in self.rule_options.items())
        loss = ", ".join(f"{k}={_shown(v)}" for k, v in self.loss_options.items())
        n = len(self.outputs)
        lines = [
            f"{self.kind}: {n} sample{'s' if n > 1 else ''}, {self.loss}({loss}), "
            f"{self.rule}({options}), {self.scope}",
        ]
        for r, term in enumerate(self.kernel):
            name = "kernel" if self.scope == "flat" else f"layer {r + 1}"
            lines += [f"  {name}", *_rows(np.asarray(term))]
        lines.append(f"  targets  {_shown(np.squeeze(np.asarray(self.targets)).tolist())}")
        lines.append(f"  outputs  {_shown(np.squeeze(np.asarray(self.outputs)).tolist())}")
        lines += [f"  {name:<16} {value:.6g}" for name, value in self.measured.items()]
        return "\n".join(lines)


def fails(kind: str, measured: dict[str, float]) -> bool:
    """Whether measured numbers show a failure of the kind, beyond what rounding can explain."""
    margin = rounding_margin()
    if kind == "rise":
        return measured["rise"] > margin
    if kind == "stuck":
        return (
            measured["speed"] <= rest_margin()
            and measured["loss"] > 0
            and measured["eigenvalue_ratio"] > margin
            and measured["departure"] <= _STAYS
        )
    return (
        measured["loss_growth"] >= _GROWTH
        and measured["speed_ratio"] >= _KEPT_SPEED
        and measured["eigenvalue_ratio"] > margin
    )


def rounding_margin() -> float:
    """The square root of the precision: far above rounding, far below a failure of note."""
    return math.sqrt(float(jnp.finfo(jnp.result_type(float)).eps))


def rest_margin() -> float:
    """A relative speed that is nothing but rounding."""
    return 100 * float(jnp.finfo(jnp.result_type(float)).eps)


def named(rule: clipping.ClippingRule) -> tuple[str, dict[str, Option]]:
    """Name and fields of a rule."""
    return clipping.name_of(rule), _options(rule)


def named_loss(loss: losses.Loss) -> tuple[str, dict[str, Option]]:
    """Name and fields of a loss."""
    return losses.name_of(loss), _options(loss)


def eigenvalue_ratio(terms: np.ndarray) -> float:
    """The smallest eigenvalue divided by the largest, for the term where that is least."""
    eigenvalues = np.linalg.eigvalsh(np.asarray(as_matrices(terms), np.float64))
    return float(np.min(eigenvalues[:, 0] / np.maximum(eigenvalues[:, -1], np.finfo(float).tiny)))


def check_kernel(terms: Array) -> None:
    """Raise unless every term is symmetric and positive semi-definite."""
    matrices = np.asarray(as_matrices(np.asarray(terms)), np.float64)
    tolerance = 100 * matrices.shape[1] * float(jnp.finfo(terms.dtype).eps)
    size = np.max(np.abs(matrices))
    asymmetry = np.max(np.abs(matrices - matrices.swapaxes(1, 2)))
    if asymmetry > tolerance * size:
        raise ValueError(f"kernel must be symmetric, got entries that differ by {asymmetry}")
    smallest = float(np.min(np.linalg.eigvalsh(matrices)))
    if smallest < -tolerance * size:
        raise ValueError(
            "kernel must be positive semi-definite, as every sum of products of gradients is, got "
            f"an eigenvalue of {smallest}"
        )


def as_numbers(values: ArrayLike) -> Any:
    """Nested tuples of Python's numbers, or a number."""
    return _tuples(np.asarray(values).tolist())


def _departure(flow: KernelFlow, outputs: Array, pace: Array) -> float:
    """How far from the outputs the flow goes once they are nudged, divided by their norm."""
    size = _size(outputs)
    nudges = jnp.eye(outputs.size).reshape(-1, *outputs.shape)
    nudges = jnp.concatenate([jnp.zeros_like(nudges[:1]), nudges, -nudges])
    starts = outputs + _NUDGE * size * nudges
    # At pace zero nothing moves at all, and any time will do.
    times = jnp.array([0.0, _WAIT * size / (float(pace) or 1.0)])
    paths = eqx.filter_vmap(
        lambda start: solve(flow, start, times, outputs=True, max_steps=_MAX_STEPS)
    )(starts)
    assert paths.outputs is not None
    if not paths.successful:
        return math.nan
    distances = jnp.linalg.norm(paths.outputs[:, -1] - outputs, axis=(1, 2))
    return float(jnp.max(distances) / size)


def _size(outputs: Array) -> float:
    """Norm of the outputs, the unit of distance; one where they are zero."""
    return float(jnp.linalg.norm(outputs)) or 1.0


def _after_long(
    flow: KernelFlow, outputs: Array, horizon: float, loss: float, speed: float
) -> dict[str, float]:
    """Loss and speed after a long time, relative to the start."""
    nowhere = {"loss_growth": 1.0, "speed_ratio": 0.0, "horizon": 0.0}
    if not math.isfinite(horizon):
        return nowhere
    times = jnp.array([0.0, horizon])
    path = solve(flow, outputs, times, outputs=True, max_steps=_MAX_STEPS)
    if not path.successful or path.outputs is None:
        return nowhere
    velocity = flow.velocity(flow.init(path.outputs[-1]))[0]
    return {
        "loss_growth": float(path.loss[-1]) / loss,
        "speed_ratio": float(jnp.linalg.norm(velocity)) / speed,
        "horizon": horizon,
    }


def _options(module: eqx.Module) -> dict[str, Option]:
    """The fields of a loss or a rule that are set, without the scope."""
    values = {
        entry.name: getattr(module, entry.name)
        for entry in dataclasses.fields(module)
        if entry.name != "scope"
    }
    return {name: as_numbers(value) for name, value in values.items() if value is not None}


def _arrays(options: dict[str, Option]) -> dict[str, float | np.ndarray]:
    """The fields with tuples as arrays."""
    return {k: np.asarray(v) if isinstance(v, tuple) else v for k, v in options.items()}


_JSON_NAMES: dict[type, str] = {str: "string", list: "list", dict: "object"}
_JSON_TYPES: dict[str, type] = {
    "kind": str,
    "kernel": list,
    "targets": list,
    "outputs": list,
    "loss": str,
    "loss_options": dict,
    "rule": str,
    "rule_options": dict,
    "scope": str,
    "measured": dict,
}


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"text must hold finite numbers, got {name}")


def _check_options(kind: str, cls: type[eqx.Module], data: dict[str, Any]) -> None:
    """Raise unless a loss or rule takes the numbers that it is given."""
    given, name = data[f"{kind}_options"], f"{kind}_options"
    fields = [entry for entry in dataclasses.fields(cls) if entry.name != "scope"]
    for option in given:
        validate.choice([entry.name for entry in fields], **{name: option})
        _check_numbers(f"{name}.{option}", given[option])
    for entry in fields:
        if entry.default is dataclasses.MISSING and entry.name not in given:
            raise ValueError(f"missing {name}.{entry.name} of {kind} {data[kind]!r}")


def _check_numbers(name: str, value: object) -> None:
    """Raise unless a value is a finite number, or lists of them with rows of one length."""
    _check_each(name, value)
    try:
        np.asarray(value)
    except ValueError as error:
        raise ValueError(f"field {name!r} must hold rows of one length") from error


def _check_each(name: str, value: object) -> None:
    entries = value if isinstance(value, list) else [value]
    if not entries:
        raise ValueError(f"field {name!r} must not be empty")
    for entry in entries:
        if isinstance(entry, list):
            _check_each(name, entry)
        elif isinstance(entry, bool) or not isinstance(entry, int | float):
            raise ValueError(f"field {name!r} must hold numbers only, got {entry!r}")
        elif not math.isfinite(entry):
            raise ValueError(f"field {name!r} must hold finite numbers, got {entry!r}")


def _tuples(value: Any) -> Any:
    """A JSON value with tuples in place of lists."""
    if isinstance(value, dict):
        return {name: _tuples(entry) for name, entry in value.items()}
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list) else value


def _shown(value: object) -> str:
    """A number, or nested tuples of them, to six digits."""
    if isinstance(value, list | tuple):
        return "(" + ", ".join(_shown(entry) for entry in value) + ")"
    return f"{value:.6g}"


def _rows(term: np.ndarray) -> list[str]:
    matrix = np.asarray(as_matrices(term[None])[0], np.float64)
    cells = [[f"{entry:.6g}" for entry in row] for row in matrix]
    width = max(len(cell) for row in cells for cell in row)
    return ["    " + "  ".join(cell.rjust(width) for cell in row) for row in cells]
