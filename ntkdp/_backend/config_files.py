"""Configuration files: TOML in, checked fields out, every error naming its field."""

import os
import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ntkdp._backend import validate

#: A kind of configuration.
Kind = TypeVar("Kind", bound=BaseModel)


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
    """Fields that are checked: unknown ones are errors, and nothing is converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def load_as(kind: type[Kind], path: str | os.PathLike[str]) -> Kind:
    """A TOML file as a configuration of this kind."""
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


def check_as(kind: type[Kind], tree: dict[str, Any]) -> Kind:
    """Nested dictionaries as a configuration of this kind."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(kind, item) for item in error.errors())) from error


def _explain(kind: type[BaseModel], item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"] if part not in ("float", "list[float]"))
    if item["type"] == "extra_forbidden":
        section = _section(kind, item["loc"][:-1])
        hint = validate.did_you_mean(str(item["loc"][-1]), section.model_fields)
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


def _section(kind: type[BaseModel], location: tuple[Any, ...]) -> type[BaseModel]:
    section = kind
    for part in location:
        if isinstance(part, str):
            kinds = _models_in(section.model_fields[part].annotation)
            section = next(kinds, section)
    return section


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)


def describe(kind: type[BaseModel]) -> list[tuple[str, str, str]]:
    """Every field as (name, default, description), in the order of the file.

    The defaults are those of ``kind()``, which may differ from those of its sections.
    """
    return list(_describe(kind(), ""))


def _describe(section: BaseModel, prefix: str) -> Iterator[tuple[str, str, str]]:
    nested = []
    for name, field in type(section).model_fields.items():
        default = getattr(section, name)
        if isinstance(default, BaseModel):
            nested.append((f"{prefix}{name}.", default))
            continue
        kinds = list(_models_in(field.annotation))
        if kinds:
            # Of a section that repeats, each block has the defaults of its kind.
            nested.append((f"{prefix}{name}[].", kinds[0]()))
            continue
        shown = "" if default is None else str(default).replace("'", '"')
        yield f"{prefix}{name}", shown, field.description or ""
    for nested_prefix, part in nested:
        yield from _describe(part, nested_prefix)
