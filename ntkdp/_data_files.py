"""Data sets in files that the user names: MNIST's IDX format, NumPy archives, CSV tables.

A gzipped IDX or CSV file is recognised by its content, whatever its suffix.
"""

import csv
import io
import math
import os
import warnings
import zipfile
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import numpy as np

from ntkdp._dataset import Dataset, Split, build, from_arrays
from ntkdp._file_content import existing_file, read_bytes, require_room
from ntkdp._validate import choice, did_you_mean

#: The third byte of an IDX file; the data follow in big-endian order.
_IDX_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
#: More axes than this are no images.
_MAX_RANK = 8
_DELIMITERS = (",", ";", "\t", "|")
_MAX_CATEGORIES = 100
MISSING_POLICIES = ("error", "drop", "mean")


class Table(NamedTuple):
    """A table as numbers: NaN in ``x`` marks a missing value."""

    x: np.ndarray
    y: np.ndarray
    feature_names: tuple[str, ...]


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """The array in an IDX file, gzipped or not, in native byte order.

    The format: two zero bytes, one byte for the type, one for the rank, each length as a big-endian
    32-bit number, then the entries in row-major order.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the magic number or the type is wrong, or the file is shorter or longer than it states.
    """
    content = read_bytes(path)
    if len(content) < 4 or content[:2] != b"\x00\x00":
        raise ValueError(
            f"{str(path)!r} is not an IDX file: its magic number {content[:4].hex()!r} "
            "does not start with two zero bytes"
        )
    code, rank = content[2], content[3]
    if code not in _IDX_DTYPES:
        known = ", ".join(f"{known:#04x}" for known in _IDX_DTYPES)
        raise ValueError(f"{str(path)!r} has the unknown IDX type {code:#04x}; known: {known}")
    if not 1 <= rank <= _MAX_RANK:
        raise ValueError(f"{str(path)!r} must hold an array of rank 1 to {_MAX_RANK}, got {rank}")
    header = 4 + 4 * rank
    if len(content) < header:
        raise ValueError(
            f"{str(path)!r} is truncated: a header of rank {rank} takes {header} bytes, "
            f"the file holds {len(content)}"
        )
    shape = tuple(int(length) for length in np.frombuffer(content, ">u4", rank, offset=4))
    dtype = np.dtype(_IDX_DTYPES[code])
    expected = header + math.prod(shape) * dtype.itemsize
    if len(content) != expected:
        state = "is truncated" if len(content) < expected else "has extra bytes at its end"
        raise ValueError(
            f"{str(path)!r} {state}: shape {shape} of {dtype.newbyteorder('=')} takes {expected} "
            f"bytes, the file holds {len(content)}"
        )
    return (
        np.frombuffer(content, dtype, offset=header).reshape(shape).astype(dtype.newbyteorder("="))
    )


def read_npz(path: str | os.PathLike[str], *names: str) -> tuple[np.ndarray, ...]:
    """The named arrays of a NumPy archive, never unpickled.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no archive, lacks a name, or holds pickled objects under it.
    """
    if not zipfile.is_zipfile(existing_file(path)):
        raise ValueError(
            f"{str(path)!r} is not an .npz archive, or is truncated; write it by np.savez"
        )
    require_room(path, _unpacked_size(path, names))
    try:
        with existing_file(path).open("rb") as file, np.load(file, allow_pickle=False) as archive:
            known = archive.files
            missing = [name for name in names if name not in known]
            found = () if missing else tuple(archive[name] for name in names)
    except Exception as error:  # of a damaged file the libraries raise errors of any kind
        raise ValueError(
            f"{str(path)!r}: arrays {', '.join(map(repr, names))} cannot be read ({error}); "
            "save plain numbers or text, which need no pickle"
        ) from error
    if missing:
        hint = did_you_mean(missing[0], known)
        raise ValueError(f"{str(path)!r} has no array {missing[0]!r}{hint}")
    return found


def _unpacked_size(path: str | os.PathLike[str], names: Sequence[str]) -> int:
    """Bytes that the named arrays of an archive take; no more are read of it."""
    wanted = {f"{name}.npy" for name in names}
    try:
        with zipfile.ZipFile(existing_file(path)) as archive:
            return sum(part.file_size for part in archive.infolist() if part.filename in wanted)
    except zipfile.BadZipFile:
        return 0


def _sniff_delimiter(text: str) -> str:
    """The delimiter that splits the first line into most fields."""
    fields = {d: len(next(csv.reader(io.StringIO(text), delimiter=d), [])) for d in _DELIMITERS}
    return max(_DELIMITERS, key=fields.__getitem__)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def read_csv(path: str | os.PathLike[str], delimiter: str | None) -> Any:
    """The table of a CSV file whose first line names the columns, as a pandas data frame.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is empty, is not UTF-8 text, has no header line, or has rows of unequal length.
    """
    import pandas as pd  # on first use: it takes longer to import than this whole package

    if delimiter is not None and (not isinstance(delimiter, str) or len(delimiter) != 1):
        raise ValueError(f"delimiter must be a single character or None, got {delimiter!r}")
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 text: {error}") from error
    if not text.strip():
        raise ValueError(f"{str(path)!r} is empty")
    try:
        separator = _sniff_delimiter(text) if delimiter is None else delimiter
        with warnings.catch_warnings():
            # With index_col=False pandas only warns when it cuts rows that are too long.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(
                io.StringIO(text),
                sep=separator,
                index_col=False,
                na_values=["?"],
                low_memory=False,
                skipinitialspace=True,
            )
    except (pd.errors.ParserError, pd.errors.ParserWarning, csv.Error) as error:
        raise ValueError(f"{str(path)!r} is not a table: {error}") from error
    if frame.shape[1] < 2:
        raise ValueError(
            f"{str(path)!r} has one column, {frame.columns[0]!r}, when split at {separator!r}; "
            "pass delimiter="
        )
    if all(_is_number(name) for name in frame.columns):
        raise ValueError(
            f"the first line of {str(path)!r} must name the columns, got {list(frame.columns)!r}"
        )
    return frame


def _counts(pairs: dict[str, int], shown: int = 5) -> str:
    text = ", ".join(f"{name!r} ({number})" for name, number in list(pairs.items())[:shown])
    return text if len(pairs) <= shown else f"{text} and {len(pairs) - shown} more"


def _as_numbers(column: Any) -> Any:
    """A column of numbers that pandas holds as objects, as truth values with gaps, as numbers."""
    present = column.dropna()
    is_number = column.dtype == object and all(isinstance(value, Real) for value in present)
    return column.astype(np.float64) if is_number and len(present) else column


def _one_hot(column: Any, name: str) -> tuple[np.ndarray, list[str]]:
    import pandas as pd

    present = column.dropna()
    numeric = pd.to_numeric(present, errors="coerce") if present.dtype != "category" else None
    if numeric is not None and 2 * int(numeric.notna().sum()) > len(present):
        others = sorted({str(value) for value in present[numeric.isna()]})[:3]
        raise ValueError(
            f"column {name!r} holds numbers mixed with text such as "
            f"{', '.join(map(repr, others))}; mend the entries, or leave it out with features="
        )
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


def encode_table(features: Any, target: Any, *, source: str, missing: str) -> Table:
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
    if missing == "drop":
        features, target = features[~incomplete], target[~incomplete]
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
        raise ValueError(f"{source} has no feature column beside the target {target.name!r}")
    return Table(np.concatenate(blocks, axis=1), _target_values(target), tuple(names))


def _target_values(target: Any) -> np.ndarray:
    import pandas as pd

    if pd.api.types.is_numeric_dtype(target.dtype):
        return target.to_numpy()
    return np.asarray([str(value) for value in target], dtype=str)


def select_columns(
    frame: Any, target: str, features: Sequence[str] | None, source: str
) -> tuple[Any, Any]:
    """The feature columns (all but the target, or those named) and the target column."""
    names = [str(name) for name in frame.columns]
    for name in (target, *(features or ())):
        if name not in names:
            raise ValueError(f"{source} has no column {name!r}{did_you_mean(str(name), names)}")
    if features is not None and target in features:
        raise ValueError(f"features must not name the target column {target!r}, got {features!r}")
    chosen = list(features) if features is not None else [n for n in names if n != target]
    return frame[chosen], frame[target]


def from_idx(
    images_path: str | os.PathLike[str],
    labels_path: str | os.PathLike[str],
    *,
    flat: bool = True,
    **split: Unpack[Split],
) -> Dataset:
    """Images and labels in the IDX format of MNIST and its kin, gzipped or not.

    Inputs are ``(n, h * w)``; with ``flat=False`` they keep their shape, with a channel axis added
    to grey images: ``(n, h, w, 1)``. By default each pixel is standardised over the training part;
    the other arguments are those of :func:`from_arrays`.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    ValueError, TypeError
        If a file is not IDX, truncated, too long or of the wrong rank; as in :func:`from_arrays`.

    Examples
    --------
    >>> from_idx("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")  # doctest: +SKIP
    """
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim < 2 or labels.ndim != 1:
        raise ValueError(
            f"images must have rank 2 or more and labels rank 1, got {images.shape} in "
            f"{str(images_path)!r} and {labels.shape} in {str(labels_path)!r}"
        )
    if not images.size:
        raise ValueError(f"{str(images_path)!r} is empty: its images have shape {images.shape}")
    return from_arrays(
        image_inputs(images, flat),
        labels,
        name=_stem(images_path),
        task="classification",
        **split,
    )


def from_npz(
    path: str | os.PathLike[str],
    *,
    x: str = "x",
    y: str = "y",
    task: str | None = None,
    **split: Unpack[Split],
) -> Dataset:
    """The arrays named ``x`` and ``y`` of a NumPy archive; nothing is unpickled.

    By default each feature is standardised over the training part; ``task`` and the other arguments
    are those of :func:`from_arrays`.

    Raises
    ------
    FileNotFoundError
        If the file is missing.
    ValueError, TypeError
        If it is not an archive, lacks an array or holds pickled objects; as in :func:`from_arrays`.

    Examples
    --------
    >>> from_npz("measured.npz", x="inputs", y="targets")  # doctest: +SKIP
    """
    inputs, targets = read_npz(path, x, y)
    return from_arrays(
        inputs,
        targets,
        name=_stem(path),
        task=task,
        **split,
    )


def from_csv(
    path: str | os.PathLike[str],
    *,
    target: str,
    features: Sequence[str] | None = None,
    task: str | None = None,
    delimiter: str | None = None,
    missing: str = "error",
    **split: Unpack[Split],
) -> Dataset:
    """A table in a text file whose first line names the columns, gzipped or not.

    A text column becomes one column of zeros and ones per category. By default each feature is
    standardised over the training part, and so are regression targets.

    Parameters
    ----------
    path : path
        The file.
    target : str
        The column to predict.
    features : sequence of str, optional
        The columns to predict it from; default: all others.
    task : "classification", "regression" or None
        None: numbers, whole ones too, mean regression, and text means classification.
    delimiter : str, optional
        Default: whichever of comma, semicolon, tab and bar splits the first line into most fields.
    missing : "error", "drop" or "mean"
        What to do about rows that lack a value (an empty field, ``NA``, ``NaN``, ``?``, ...):
        refuse, leave them out, or fill in the mean of the column over the training part (for a text
        column the frequency of each category). A missing target is never filled in.
    **split
        ``n_train``, ``n_test``, ``seed``, ``standardise``: as in :func:`from_arrays`.

    Returns
    -------
    Dataset
        The two parts, and what is known of them.

    Raises
    ------
    FileNotFoundError
        If the file is missing.
    ValueError, TypeError
        If the file is no table, lacks a column, has missing values (it says how many rows, in which
        columns) or a text column of more than 100 categories; as in :func:`from_arrays`.

    Examples
    --------
    >>> from_csv("winequality-red.csv.gz", target="quality")  # doctest: +SKIP
    """
    source = repr(str(path))
    choice(MISSING_POLICIES, missing=missing)
    frame = read_csv(path, delimiter)
    inputs, targets = select_columns(frame, target, features, source)
    return from_table(
        inputs,
        targets,
        source=source,
        missing=missing,
        name=_stem(path),
        task=task,
        **split,
    )


def from_table(
    features: Any,
    target: Any,
    *,
    source: str,
    missing: str,
    name: str,
    task: str | None,
    **split: Unpack[Split],
) -> Dataset:
    table = encode_table(features, target, source=source, missing=missing)
    if task is None:
        task = "classification" if table.y.dtype.kind == "U" else "regression"
    impute = missing == "mean"
    return build(table.x, table.y, name, task, None, table.feature_names, impute=impute, **split)


def image_inputs(images: np.ndarray, flat: bool) -> np.ndarray:
    if flat:
        return images.reshape(len(images), -1)
    return images[..., None] if images.ndim == 3 else images


def _stem(path: str | os.PathLike[str]) -> str:
    return Path(path).name.split(".")[0]
