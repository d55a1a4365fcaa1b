"""Configuration files: TOML in, checked fields out; every error names its field."""

import os
import tomllib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from ntkdp._backend import validate

#: A kind of configuration.
Kind = TypeVar("Kind", bound=BaseModel)

#: Words of PyTorch, Opacus and their like: the field that is meant, and how it is found from them.
_WORDS = {
    "batch_size": ("sample_rate", "batch_size / n_train"),
    "expected_batch_size": ("sample_rate", "expected_batch_size / n_train"),
    "criterion": ("loss", ""),
    "epochs": ("steps", "epochs / sample_rate"),
    "iterations": ("steps", ""),
    "l2_norm_clip": ("clip_norm", ""),
    "loss_fn": ("loss", ""),
    "loss_reduction": ("reduction", ""),
    "lr": ("learning_rate", ""),
    "max_grad_norm": ("clip_norm", ""),
    "max_steps": ("steps", ""),
    "n_epochs": ("steps", "n_epochs / sample_rate"),
    "num_epochs": ("steps", "num_epochs / sample_rate"),
    "num_steps": ("steps", ""),
    "sigma": ("noise_multiplier", ""),
    "target_delta": ("delta", ""),
    "target_epsilon": ("epsilon", ""),
}


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the field and its value.

    Examples
    --------
    >>> import ntkdp
    >>> try:
    ...     ntkdp.experiment.config(data={"n_train": -1})
    ... except ntkdp.experiment.ConfigError as error:
    ...     print("data.n_train" in str(error))
    True
    """


class Section(BaseModel):
    """Checked fields: an unknown one is an error, and no value is converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def load_as(kind: type[Kind], path: str | os.PathLike[str]) -> Kind:
    """Read a TOML file as a configuration of this kind."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config file does not exist: {path}")
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # whole numbers too long, brackets too deep
        raise ConfigError(f"{path} is not TOML: {error}") from error
    try:
        return check_as(kind, tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def check_as(kind: type[Kind], tree: Mapping[str, object]) -> Kind:
    """Check nested dictionaries as a configuration of this kind."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(kind, item) for item in error.errors())) from error


def _explain(kind: type[BaseModel], item: ErrorDetails) -> str:
    where = ".".join(str(part) for part in item["loc"] if part not in ("float", "list[float]"))
    if item["type"] == "extra_forbidden":
        section = _section(kind, item["loc"][:-1])
        word = str(item["loc"][-1])
        hint = _place_of(kind, word) or validate.did_you_mean(word, section.model_fields)
        return f"unknown field {where!r}{hint}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error" and not where:
        return message
    value = repr(item["input"])
    hint = ""
    if item["type"] == "literal_error" and isinstance(item["input"], str):
        expected = [part.strip(" '") for part in item["ctx"]["expected"].split(",")]
        expected = [name for part in expected for name in part.replace("'", "").split(" or ")]
        hint = validate.did_you_mean(item["input"], expected)
    return f"field {where!r}: {message}, got {value[:80]}{hint}"


def _place_of(kind: type[BaseModel], word: str) -> str:
    """The tail of an error message: where the field is that a word means; empty if not known."""
    field, value = _WORDS.get(word.lower(), (word, ""))
    names = (field, f"{field}s")
    places = [path for path in _paths(kind) if path.rpartition(".")[2] in names]
    if not places:
        return ""
    of_value = f", which is {value}" if value else ""
    return f"; did you mean {' or '.join(map(repr, places))}{of_value}?"


def _paths(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every section and field by its place in the file."""
    for name, field in kind.model_fields.items():
        yield f"{prefix}{name}"
        nested = next(_models_in(field.annotation), None)
        if nested is not None:
            repeated = "[]" if typing.get_origin(field.annotation) is list else ""
            yield from _paths(nested, f"{prefix}{name}{repeated}.")


def _section(kind: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    section = kind
    for part in location:
        if isinstance(part, str):
            sections = _models_in(section.model_fields[part].annotation)
            section = next(sections, section)
    return section


def _models_in(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)


def describe(kind: type[BaseModel]) -> list[tuple[str, str, str]]:
    """Every field as (name, default, description), in the order of the file.

    The defaults are taken from ``kind()``, which may differ from the defaults of its sections.
    """
    return list(_describe(kind(), ""))


def _describe(section: BaseModel, prefix: str) -> Iterator[tuple[str, str, str]]:
    nested = []
    for name, field in type(section).model_fields.items():
        default = getattr(section, name)
        if isinstance(default, BaseModel):
            nested.append((f"{prefix}{name}.", default))
            continue
        repeated = next(_models_in(field.annotation), None)
        if repeated is not None:
            # Each block of a repeated section has the defaults of its class.
            nested.append((f"{prefix}{name}[].", repeated()))
            continue
        shown = "" if default is None else str(default).replace("'", '"')
        yield f"{prefix}{name}", shown, field.description or ""
    for nested_prefix, part in nested:
        yield from _describe(part, nested_prefix)
