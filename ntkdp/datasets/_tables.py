"""Tables of named columns as arrays: CSV text, numbers and categories, missing values."""

import csv
import functools
import io
import warnings
from collections.abc import Callable, Sequence
from numbers import Real
from typing import TYPE_CHECKING, NamedTuple, Unpack

import numpy as np

from ntkdp._backend.validate import choice, did_you_mean
from ntkdp.datasets._dataset import Dataset, Split, build
from ntkdp.datasets._number_notation import looks_like_number, read_numbers

if TYPE_CHECKING:
    import pandas

_DELIMITERS = (",", ";", "\t", "|")
_MAX_CATEGORIES = 100
MISSING_POLICIES = ("error", "drop", "mean")


class Table(NamedTuple):
    """A table as numbers: NaN in ``x`` marks a missing value."""

    x: np.ndarray
    y: np.ndarray
    feature_names: tuple[str, ...]
    #: Which rows of the source it has.
    rows: np.ndarray


def sniff_delimiter(text: str) -> str:
    """The delimiter that splits the first line into most fields."""
    fields = {d: len(next(csv.reader(io.StringIO(text), delimiter=d), [])) for d in _DELIMITERS}
    return max(_DELIMITERS, key=fields.__getitem__)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def read_csv(
    text: str, source: str, delimiter: str | None
) -> "tuple[pandas.DataFrame, Callable[[], pandas.DataFrame]]":
    """The table of CSV text whose first line names the columns, as a pandas data frame.

    Returned with it is a function that gives the same table with its entries as they are written.

    Raises
    ------
    ValueError
        If the text is empty, has no header line, or has rows of unequal length.
    """
    if delimiter is not None and (not isinstance(delimiter, str) or len(delimiter) != 1):
        raise ValueError(f"delimiter must be a single character or None, got {delimiter!r}")
    if not text.strip():
        raise ValueError(f"{source} is empty")
    try:
        separator = sniff_delimiter(text) if delimiter is None else delimiter
    except csv.Error as error:
        raise ValueError(f"{source} is not a table: {error}") from error
    frame = _parsed(text, source, separator)
    if frame.shape[1] < 2:
        raise ValueError(
            f"{source} has one column, {frame.columns[0]!r}, when split at {separator!r}; "
            "pass delimiter="
        )
    if all(_is_number(name) for name in frame.columns):
        raise ValueError(
            f"the first line of {source} must name the columns, got {list(frame.columns)!r}"
        )
    return frame, lambda: _parsed(text, source, separator, dtype=str)


def _parsed(text: str, source: str, separator: str, **options: type[str]) -> "pandas.DataFrame":
    import pandas as pd  # on first use: it takes longer to import than this whole package

    try:
        with warnings.catch_warnings():
            # With index_col=False pandas only warns when it cuts rows that are too long.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            return pd.read_csv(
                io.StringIO(text),
                sep=separator,
                index_col=False,
                na_values=["?"],
                low_memory=False,
                skipinitialspace=True,
                **options,
            )
    except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
        raise ValueError(f"{source} is not a table: {error}") from error


def in_numbers(
    chosen: "tuple[pandas.DataFrame, pandas.Series]",
    as_written: "Callable[[], pandas.DataFrame]",
    target: str,
    categorical: Sequence[str],
    *,
    decimal: str | None,
    thousands: str | None,
    source: str,
) -> "tuple[pandas.DataFrame, pandas.Series]":
    """The features and the target with numbers in any notation read, and ``categorical`` as text.

    Raises
    ------
    ValueError
        If ``categorical`` names a column that is not there; as in :func:`read_numbers`.
    """
    features, targets = chosen
    frame = features.assign(**{target: targets})
    for name in categorical:
        if name not in frame.columns:
            hint = did_you_mean(str(name), map(str, frame.columns))
            raise ValueError(f"categorical: {source} has no column {name!r} in use{hint}")
    texts = functools.cache(lambda: as_written()[list(frame.columns)])
    frame = frame.assign(**{name: texts()[name].astype("category") for name in categorical})
    frame = read_numbers(frame, texts, decimal=decimal, thousands=thousands, source=source)
    return frame[list(features.columns)], frame[target]


def _counts(pairs: dict[str, int], shown: int = 5) -> str:
    text = ", ".join(f"{name!r} ({number})" for name, number in list(pairs.items())[:shown])
    return text if len(pairs) <= shown else f"{text} and {len(pairs) - shown} more"


def _as_numbers(column: "pandas.Series") -> "pandas.Series":
    """A column of numbers that pandas holds as objects, as truth values with gaps, as numbers."""
    present = column.dropna()
    is_number = column.dtype == object and all(isinstance(value, Real) for value in present)
    return column.astype(np.float64) if is_number and len(present) else column


def _check_text(column: "pandas.Series", name: str) -> None:
    """Raise if most entries of a column that is not marked as categories look like numbers."""
    if column.dtype == "category":
        return
    counts = column.dropna().astype(str).value_counts()
    alike = counts.index.map(looks_like_number).to_numpy(dtype=bool)
    if 2 * int(counts[alike].sum()) > int(counts.sum()):
        others = sorted(counts.index[~alike])[:3]
        mixed = f"mixed with text such as {', '.join(map(repr, others))}"
        shown = ", ".join(map(repr, sorted(counts.index[alike])[:3]))
        raise ValueError(
            f"column {name!r} holds numbers {mixed if others else f'written as {shown}'}; fix the "
            "entries, leave it out with features=, or keep it as text: from_csv takes categorical="
        )


def _one_hot(column: "pandas.Series", name: str) -> tuple[np.ndarray, list[str]]:
    _check_text(column, name)
    present = column.dropna()
    categories = sorted({str(value) for value in present})
    if len(categories) > _MAX_CATEGORIES:
        raise ValueError(
            f"column {name!r} is text with {len(categories)} distinct values, more than the "
            f"{_MAX_CATEGORIES} that are made one-hot; leave it out with features="
        )
    texts = column.astype(object).map(str, na_action="ignore").to_numpy()
    hot = np.equal.outer(texts, np.asarray(categories, dtype=object)).astype(np.float64)
    hot[column.isna().to_numpy()] = np.nan
    return hot, [f"{name}={category}" for category in categories]


def encode_table(
    features: "pandas.DataFrame",
    target: "pandas.Series",
    *,
    source: str,
    missing: str,
    task: str | None,
) -> Table:
    """Numbers from a pandas frame of features and a series of targets.

    Text and categorical columns become one column of zeros and ones per category, named
    ``"column=category"``. With ``missing="mean"`` their gaps stay NaN for the caller to fill.

    Raises
    ------
    ValueError
        If values are missing and ``missing`` does not allow it, or a column is not to be encoded.
    """
    import pandas as pd

    choice(MISSING_POLICIES, missing=missing)
    gaps = features.assign(**{str(target.name): target}).isna()
    incomplete = gaps.any(axis=1) if missing != "mean" else target.isna()
    if incomplete.any() and missing != "drop":
        columns = {str(k): int(v) for k, v in gaps.sum().items() if v}
        if missing == "mean":
            columns = {str(target.name): int(incomplete.sum())}
        ways = "missing='drop'" + (" or missing='mean'" if missing == "error" else "")
        raise ValueError(
            f"{source} lacks values in {int(incomplete.sum())} of {len(features)} rows, in columns "
            f"{_counts(columns)}, and missing={missing!r}; pass {ways}"
        )
    rows = ~incomplete.to_numpy() if missing == "drop" else np.ones(len(features), bool)
    features, target = features[rows], target[rows]
    blocks, names = [], []
    for name in features.columns:
        column = _as_numbers(features[name])
        if pd.api.types.is_numeric_dtype(column.dtype):
            blocks.append(column.to_numpy(dtype=np.float64, na_value=np.nan)[:, None])
            names.append(str(name))
        else:
            block, block_names = _one_hot(column, str(name))
            blocks.append(block)
            names.extend(block_names)
    if not blocks:
        raise ValueError(f"{source} has no feature column besides the target {target.name!r}")
    if task is None and not pd.api.types.is_numeric_dtype(target.dtype):
        _check_text(target, str(target.name))
    return Table(np.concatenate(blocks, axis=1), _target_values(target), tuple(names), rows)


def _target_values(target: "pandas.Series") -> np.ndarray:
    import pandas as pd

    if pd.api.types.is_numeric_dtype(target.dtype):
        numbers: np.ndarray = target.to_numpy()
        return numbers
    return np.asarray([str(value) for value in target], dtype=str)


def select_columns(
    frame: "pandas.DataFrame",
    target: str,
    features: Sequence[str] | None,
    source: str,
    groups: str | None = None,
) -> "tuple[pandas.DataFrame, pandas.Series]":
    """The feature columns (all but target and groups, or those named) and the target column."""
    names = [str(name) for name in frame.columns]
    for name in (target, *(features or ()), *([] if groups is None else [groups])):
        if name not in names:
            raise ValueError(f"{source} has no column {name!r}{did_you_mean(str(name), names)}")
    if features is not None and target in features:
        raise ValueError(f"features must not name the target column {target!r}, got {features!r}")
    chosen = (
        list(features) if features is not None else [n for n in names if n not in (target, groups)]
    )
    return frame[chosen], frame[target]


def from_table(
    features: "pandas.DataFrame",
    target: "pandas.Series",
    *,
    source: str,
    missing: str,
    name: str,
    task: str | None,
    groups: "pandas.Series | None" = None,
    **split: Unpack[Split],
) -> Dataset:
    table = encode_table(features, target, source=source, missing=missing, task=task)
    if task is None:
        task = "classification" if table.y.dtype.kind == "U" else "regression"
    labels = None
    if groups is not None:
        labels = groups[table.rows].astype(object).where(groups.notna()[table.rows], "missing")
    return build(
        table.x,
        table.y,
        name,
        task,
        None,
        table.feature_names,
        impute=missing == "mean",
        groups=None if labels is None else labels.to_numpy(),
        **split,
    )
