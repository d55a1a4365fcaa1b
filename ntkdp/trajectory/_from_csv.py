"""A log of training, a CSV file that anything may have written, as what a trajectory records."""

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ntkdp._backend import validate
from ntkdp._backend.types import Array, LearningRate
from ntkdp.datasets import read_text, sniff_delimiter
from ntkdp.trajectory._stepping import MOST_STEPS, Stepping, times_of_steps
from ntkdp.trajectory._training_set import Measurement

#: The names that ``columns`` may map to those of a file.
NAMES = (
    "step",
    "time",
    "loss",
    "accuracy",
    "test_loss",
    "test_accuracy",
    "clip_fraction",
    "seed",
)
_OPTIONAL = ("accuracy", "test_loss", "test_accuracy")
_SHARES = ("accuracy", "test_accuracy", "clip_fraction")


class Log(NamedTuple):
    """What a log says: the arrays of a trajectory, and the time of its initial state."""

    times: Array
    steps: Array | None
    measured: Measurement
    start: Array | None


class _Table(NamedTuple):
    """The columns of a file that are used, as text by the names known here."""

    source: str
    headers: Mapping[str, str]
    texts: Mapping[str, Sequence[str]]
    #: The line of the file that each row ends in.
    lines: Sequence[int]

    def where(self, name: str) -> str:
        """The column in words."""
        return f"{self.source}: column {self.headers[name]!r}"


def read_log(
    path: str | os.PathLike[str],
    learning_rate: LearningRate | None,
    columns: Mapping[str, str | None] | None,
    delimiter: str | None,
) -> Log:
    """The log in a CSV file, as :meth:`ntkdp.Trajectory.from_csv` describes it."""
    table = _read_table(path, columns, delimiter)
    _check_clock(table, learning_rate)
    numbers = {name: _numbers(table, name) for name in NAMES if name in table.texts}
    rows = _rows_of_seeds(table)
    clock = "step" if "step" in numbers else "time"
    for row_numbers in rows.values():
        _check_increasing(table, numbers, clock, row_numbers)
    _check_same_clock(table, numbers, clock, rows)

    first = next(iter(rows.values()))
    steps = numbers["step"][first].astype(np.int64) if "step" in numbers else None
    dtype = jnp.result_type(float)
    if "time" in numbers:
        times = jnp.asarray(numbers["time"][first], dtype)
    else:
        assert steps is not None
        assert learning_rate is not None
        times = _times(learning_rate, steps)
    together = np.asarray(list(rows.values())) if "seed" in table.texts else first
    measured = {
        name: jnp.asarray(numbers[name][together], dtype)
        for name in ("loss", "clip_fraction", *_OPTIONAL)
        if name in numbers
    }
    measured.setdefault("clip_fraction", jnp.full_like(measured["loss"], jnp.nan))
    begins_late = bool(numbers[clock][first][0] > 0)
    return Log(
        times=times,
        steps=None if steps is None else jnp.asarray(steps, jnp.result_type(int)),
        measured=Measurement(**measured),
        start=jnp.zeros((), dtype) if begins_late else None,
    )


def has_times(
    path: str | os.PathLike[str], columns: Mapping[str, str | None] | None = None
) -> bool:
    """Whether a log has a column of times, so that it is read without a learning rate."""
    return "time" in _read_table(path, columns, None).texts


def _read_table(
    path: str | os.PathLike[str], columns: Mapping[str, str | None] | None, delimiter: str | None
) -> _Table:
    source = repr(str(path))
    if delimiter is not None and (not isinstance(delimiter, str) or len(delimiter) != 1):
        raise ValueError(f"delimiter must be a single character or None, got {delimiter!r}")
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{source} is empty")
    try:
        separator = sniff_delimiter(text) if delimiter is None else delimiter
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        split = [(reader.line_num, fields) for fields in reader if any(map(str.strip, fields))]
    except csv.Error as error:
        raise ValueError(f"{source} is not a table: {error}") from error
    if not split:
        raise ValueError(f"{source} is not a table: all its lines are empty")
    (_, header), rows = split[0], split[1:]
    header = [name.strip() for name in header]
    if not rows:
        raise ValueError(f"{source} has no rows after its first line, which names {header!r}")
    for line, fields in rows:
        if len(fields) != len(header):
            raise ValueError(
                f"{source} is not a table: line {line} has {len(fields)} fields when split at "
                f"{separator!r}, and the first line names {len(header)} columns"
            )
    headers = _headers(source, header, columns)
    places = {name: header.index(own) for name, own in headers.items()}
    return _Table(
        source=source,
        headers=headers,
        texts={name: [row[place].strip() for _, row in rows] for name, place in places.items()},
        lines=[line for line, _ in rows],
    )


def _headers(
    source: str, header: Sequence[str], columns: Mapping[str, str | None] | None
) -> dict[str, str]:
    """The file's own name of each column that it has."""
    columns = {} if columns is None else columns
    if not isinstance(columns, Mapping):
        raise TypeError(
            "columns must map names to those of the file, e.g. {'loss': 'train/loss'}, got "
            f"{columns!r}"
        )
    for name, own in columns.items():
        validate.choice(NAMES, columns=name)
        if own is not None and own not in header:
            hint = validate.did_you_mean(str(own), header)
            raise ValueError(f"columns[{name!r}]: {source} has no column {own!r}{hint}")
    wanted = {name: name for name in NAMES} | dict(columns)
    found = {name: own for name, own in wanted.items() if own is not None and own in header}
    for name, own in found.items():
        if header.count(own) > 1:
            raise ValueError(
                f"{source} must have one column {own!r}, got {header.count(own)}; rename all "
                f"but that of {name}"
            )
    if "loss" not in found:
        hint = validate.did_you_mean("loss", header)
        raise ValueError(
            f"{source} has no column 'loss'{hint}; name the one that holds the training loss, "
            "columns={'loss': ...}"
        )
    if "step" not in found and "time" not in found:
        hint = validate.did_you_mean("step", header)
        raise ValueError(
            f"{source} has no column 'step' or 'time'{hint}; name the one that holds the number "
            "of the step, columns={'step': ...}"
        )
    return found


def _check_clock(table: _Table, learning_rate: LearningRate | None) -> None:
    """Raise unless there is one way to know the times."""
    if "time" in table.texts:
        if learning_rate is not None:
            raise ValueError(
                f"learning_rate must be left out, got {learning_rate!r}, since "
                f"{table.where('time')} holds the time, learning rate x step; if it holds the "
                "time of a clock, pass columns={'time': None}"
            )
    elif learning_rate is None:
        raise ValueError(
            f"learning_rate must be given, got None: {table.source} has steps and no column "
            "'time', and the time is the running sum of the learning rate; pass the number or "
            "the schedule of the training"
        )


def _numbers(table: _Table, name: str) -> np.ndarray:
    """A column as numbers; one of text, the seed, as the places of its entries."""
    for line, text in zip(table.lines, table.texts[name], strict=True):
        if not text:
            way_out = "leave out the rows that lack it"
            if name not in ("loss", "step", "time"):
                way_out += f", or the column, columns={{{name!r}: None}}"
            raise ValueError(f"{table.where(name)} has no entry in line {line}; {way_out}")
    if name == "seed":
        return np.arange(len(table.lines))
    values = np.asarray([_number(text) for text in table.texts[name]], np.float64)
    requirement, holds = _requirement(name, values)
    readable = np.asarray([_is_number(text) for text in table.texts[name]])
    for bad, must in ((~readable, "hold plain numbers"), (~holds, requirement)):
        if bad.any():
            place = int(np.argmax(bad))
            raise ValueError(
                f"{table.where(name)} must {must}, got {table.texts[name][place]!r} in line "
                f"{table.lines[place]}" + _way_out(name, must)
            )
    return values


def _requirement(name: str, values: np.ndarray) -> tuple[str, np.ndarray]:
    """What the numbers of a column must be, and which are."""
    if name == "step":
        whole = (values >= 0) & (values <= MOST_STEPS) & (values == np.floor(values))
        return f"hold whole numbers from 0 to {MOST_STEPS:,}", whole
    if name == "time":
        return "hold finite numbers of at least 0", (values >= 0) & (values < np.inf)
    if name in _SHARES:
        # A run that diverged may have no accuracy.
        return "hold shares from 0 to 1", ((values >= 0) & (values <= 1)) | np.isnan(values)
    return "", np.ones(len(values), bool)


def _way_out(name: str, must: str) -> str:
    if name in _SHARES:
        return "; divide percentages by 100"
    return "" if must != "hold plain numbers" else "; write 1234.5 or 1.2e-3, and nan or inf"


def _number(text: str) -> float:
    try:
        # Python reads 1_000 too, which another program may not have meant as a number.
        return math.nan if "_" in text else float(text)
    except ValueError:
        return math.nan


def _is_number(text: str) -> bool:
    return not math.isnan(_number(text)) or text.lower().lstrip("+-") == "nan"


def _rows_of_seeds(table: _Table) -> dict[str, np.ndarray]:
    """The rows of each seed, in the order of the file; all of them if there is no such column."""
    if "seed" not in table.texts:
        return {"": np.arange(len(table.lines))}
    rows: dict[str, list[int]] = {}
    for row, label in enumerate(table.texts["seed"]):
        rows.setdefault(label, []).append(row)
    return {label: np.asarray(of_seed) for label, of_seed in rows.items()}


def _check_increasing(
    table: _Table, numbers: Mapping[str, np.ndarray], clock: str, rows: np.ndarray
) -> None:
    """Raise unless the rows of a run are in order; times may stay while the learning rate is 0."""
    for name in ("step", "time"):
        if name not in numbers:
            continue
        values = numbers[name][rows]
        ahead = np.diff(values) > 0 if name == clock else np.diff(values) >= 0
        if ahead.all():
            continue
        place = int(np.argmin(ahead)) + 1
        raise ValueError(
            f"{table.where(name)} must increase along a run, got {values[place]:g} after "
            f"{values[place - 1]:g} in line {table.lines[int(rows[place])]}; sort the rows, and "
            "name the column that tells several runs apart, columns={'seed': ...}"
        )


def _check_same_clock(
    table: _Table,
    numbers: Mapping[str, np.ndarray],
    clock: str,
    rows: Mapping[str, np.ndarray],
) -> None:
    """Raise unless all seeds have the same steps, and the same times."""
    (label, first), *others = rows.items()
    for other, of_other in others:
        ours, theirs = numbers[clock][first], numbers[clock][of_other]
        lacking, further = np.setdiff1d(ours, theirs), np.setdiff1d(theirs, ours)
        if lacking.size or further.size:
            what = f"lacks {lacking[0]:g}" if lacking.size else f"has {further[0]:g} as well"
            raise ValueError(
                f"{table.where(clock)} must be the same for all seeds, but seed {other!r} {what}, "
                f"unlike seed {label!r}; leave out the rows or the seeds that the others lack"
            )
        if "time" in numbers and not np.allclose(
            numbers["time"][first], numbers["time"][of_other], rtol=1e-6, atol=0
        ):
            raise ValueError(
                f"{table.where('time')} must be the same for all seeds, but that of seed {other!r} "
                f"differs from that of seed {label!r}; read seeds of other learning rates one by "
                "one"
            )


def _times(learning_rate: LearningRate, steps: np.ndarray) -> Array:
    """The running sum of the learning rate at the steps."""
    if not callable(learning_rate):
        validate.positive_number(learning_rate=learning_rate)
    # It checks the rates, and that those of so many steps fit into memory.
    last = max(int(steps[-1]), 1)
    return times_of_steps(Stepping(learning_rate, last, last).learning_rate, steps)
