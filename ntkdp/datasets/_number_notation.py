"""Numbers as people write them: 1,5 and 1,000 and 10% and $5 and 1D+02.

A notation says what separates the decimals and what the thousands. An entry can be a number in
several notations: ``1,234`` is 1.234 or 1234. A column is numbers if some notation reads all of its
entries; it is ambiguous if the notations that the whole table allows read it differently.
"""

import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from ntkdp._backend.validate import choice

if TYPE_CHECKING:
    import pandas


class Notation(NamedTuple):
    """What separates the decimals, and what the thousands, if anything."""

    decimal: str
    thousands: str

    @property
    def option(self) -> str:
        """The argument that asks for this notation."""
        if self.thousands:
            return f"thousands={self.thousands!r}"
        return f"decimal={self.decimal!r}"


PLAIN = Notation(".", "")
DECIMALS = (".", ",")
THOUSANDS = (",", ".", " ", "'", "_")

#: Other characters for a space, an apostrophe and a minus sign.
_VARIANTS = str.maketrans("\u00a0\u2009\u202f\u2019\u2212", "   '-")
_CODES = "AUD|BRL|CAD|CHF|CNY|CZK|DKK|EUR|GBP|INR|JPY|KRW|MXN|NOK|PLN|SEK|TRY|USD|ZAR"
_UNIT = rf"%|\u2030|[A-Z]{{0,3}}[$\u00a2-\u00a5\u0e3f\u20a0-\u20c0]|{_CODES}"
_SCALE = {"%": 100.0, "\u2030": 1000.0}
_ENTRY = re.compile(
    rf"(?P<sign>[+-]?) ?(?P<before>{_UNIT})? ?(?P<inner>[+-]?)"
    rf"(?P<number>[0-9.,][0-9.,' _]*(?:[eEdD][+-]?[0-9]+)?) ?(?P<after>{_UNIT})?"
)
#: Accounting's (5) and 5-, and 1D2, which may be a label.
_ALMOST = re.compile(
    r"\((?P<brackets>.*[0-9].*)\)|(?P<minus>.*[0-9].*)-|(?P<mark>[0-9]+)[dD][0-9]+"
)


class _Parts(NamedTuple):
    sign: float
    unit: str
    number: str


def notations(decimal: str | None, thousands: str | None) -> list[Notation]:
    """The notations that the options leave; None leaves all."""
    if decimal is not None:
        choice(DECIMALS, decimal=decimal)
    if thousands is not None:
        choice(THOUSANDS, thousands=thousands)
        if thousands == decimal:
            raise ValueError(f"decimal and thousands must differ, got {decimal!r} for both")
    return [
        Notation(point, mark)
        for point in (DECIMALS if decimal is None else (decimal,))
        for mark in (("", *THOUSANDS) if thousands is None else (thousands,))
        if point != mark
    ]


@functools.cache
def _pattern(notation: Notation) -> re.Pattern[str]:
    point, mark = re.escape(notation.decimal), re.escape(notation.thousands)
    # Groups of two occur in India, between commas.
    group = "[0-9]{2,3}" if notation.thousands == "," else "[0-9]{3}"
    grouped = rf"|[1-9][0-9]{{0,2}}(?:{mark}{group})*{mark}[0-9]{{3}}" if mark else ""
    whole = f"(?:[0-9]+{grouped})"
    exponent = "(?:[eE][+-]?[0-9]+|[dD][+-][0-9]+)"
    with_point = rf"(?:{whole}{point}[0-9]*|{point}[0-9]+)(?:{exponent}|[dD][0-9]+)?"
    return re.compile(rf"{with_point}|{whole}{exponent}?")


def _parts(entry: str) -> _Parts | None:
    found = _ENTRY.fullmatch(entry.translate(_VARIANTS).strip())
    if found is None or (found["sign"] and found["inner"]) or (found["before"] and found["after"]):
        return None
    sign = -1.0 if "-" in (found["sign"], found["inner"]) else 1.0
    return _Parts(sign, found["before"] or found["after"] or "", found["number"].strip())


def _value(parts: _Parts, notation: Notation) -> float:
    digits = parts.number.replace(notation.thousands, "") if notation.thousands else parts.number
    plain = re.sub("[dD]", "e", digits.replace(notation.decimal, "."))
    return parts.sign * float(plain) / _SCALE.get(parts.unit, 1.0)


def readings(
    entries: Collection[object], allowed: Iterable[Notation]
) -> dict[Notation, dict[str, float]]:
    """The values of all ``entries`` in each of the notations that read them all.

    None does unless all are text with the same unit: a percent sign, a currency or nothing.
    """
    parts: dict[str, _Parts] = {}
    for entry in entries:
        if not isinstance(entry, str) or (found := _parts(entry)) is None:
            return {}
        parts[entry] = found
    if len({part.unit for part in parts.values()}) != 1:
        return {}
    return {
        notation: {entry: _value(part, notation) for entry, part in parts.items()}
        for notation in allowed
        if all(_pattern(notation).fullmatch(part.number) for part in parts.values())
    }


def looks_like_number(entry: str) -> bool:
    """Whether an entry is a number in some notation, or almost one."""
    almost = _ALMOST.fullmatch(entry.strip())
    core = entry if almost is None else next(group for group in almost.groups() if group)
    parts = _parts(core)
    return parts is not None and any(
        _pattern(notation).fullmatch(parts.number) for notation in notations(None, None)
    )


def _common(
    columns: Mapping[str, Mapping[Notation, Mapping[str, float]]], source: str
) -> set[Notation]:
    """The notations that read all columns of one table."""
    common = set.intersection(*(set(readings) for readings in columns.values()))
    if not common:
        most = max(map(len, columns.values()))
        shown = ", ".join(
            f"{next(iter(next(iter(readings.values()))))!r} in {name!r}"
            for name, readings in columns.items()
            if len(readings) < most
        )
        raise ValueError(
            f"{source} must write numbers in one way, got {shown}; rewrite the columns that "
            "differ, leave them out with features=, or keep text with categorical="
        )
    return common


def _one_reading(
    name: str, readings: Mapping[Notation, Mapping[str, float]], common: Collection[Notation]
) -> Mapping[str, float]:
    """The values of a column, if all notations that may be meant agree about them."""
    meant = [notation for notation in readings if notation in common or notation == PLAIN]
    first, *others = meant
    for entry, value in readings[first].items():
        for other in others:
            if readings[other][entry] != value:
                raise ValueError(
                    f"column {name!r} holds {entry!r}, which is {value:.15g} with {first.option} "
                    f"and {readings[other][entry]:.15g} with {other.option}; pass one of them, or "
                    "keep it as text with categorical="
                )
    return readings[first]


def read_numbers(
    frame: "pandas.DataFrame",
    as_written: "Callable[[], pandas.DataFrame]",
    *,
    decimal: str | None,
    thousands: str | None,
    source: str,
) -> "pandas.DataFrame":
    """A pandas frame whose columns of numbers in other notations are numbers.

    ``as_written`` gives the same frame as text; it is called if some column is not plain.

    Raises
    ------
    ValueError
        If a column of numbers can be read in two ways, or in none that the options leave.
    """
    allowed = notations(decimal, thousands)
    numeric, others = _numeric_columns(frame)
    found = {name: readings(_entries(frame[name]), allowed) for name in others}
    found = {name: reading for name, reading in found.items() if reading}
    if not found and decimal is None and thousands is None:
        return frame
    texts = as_written()
    for name in numeric:
        entries = _entries(texts[name])
        found[name] = readings(entries, allowed)
        if not found[name] and PLAIN not in allowed and entries:
            shown = next((entry for entry in entries if not readings([entry], allowed)), entries[0])
            raise ValueError(
                f"column {name!r} holds {shown!r}, which is no number with {allowed[0].option}; "
                "rewrite it, or leave it out with features="
            )
    found = {name: reading for name, reading in found.items() if reading}
    common = _common(found, source) if found else set()
    settled = numeric if PLAIN in common else []
    return frame.assign(
        **{
            name: texts[name].map(_one_reading(name, reading, common)).astype("float64")
            for name, reading in found.items()
            if name not in settled
        }
    )


def _numeric_columns(frame: "pandas.DataFrame") -> tuple[list[str], list[str]]:
    """Names of the columns of plain numbers, and of those of text."""
    from pandas.api import types

    numbers, texts = [], []
    for name, dtype in frame.dtypes.items():
        if types.is_numeric_dtype(dtype) and not types.is_bool_dtype(dtype):
            numbers.append(name)
        elif types.is_object_dtype(dtype) or types.is_string_dtype(dtype):
            texts.append(name)
    return numbers, texts


def _entries(column: "pandas.Series") -> list[object]:
    entries: list[object] = column.dropna().unique().tolist()
    return entries
