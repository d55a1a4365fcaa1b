"""Data sets in files that the user names: MNIST's IDX format, NumPy archives, CSV tables.

A gzipped IDX or CSV file is recognised by its content, whatever its suffix.
"""

import math
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import numpy as np

from ntkdp._backend.validate import choice, did_you_mean
from ntkdp.datasets._dataset import Dataset, Split, from_arrays
from ntkdp.datasets._file_content import existing_file, read_bytes, read_text, require_room
from ntkdp.datasets._number_notation import notations
from ntkdp.datasets._tables import (
    MISSING_POLICIES,
    from_table,
    in_numbers,
    read_csv,
    select_columns,
)

#: The third byte of an IDX file; the data follow in big-endian order.
_IDX_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
#: More axes than this are no images.
_MAX_RANK = 8


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
    except Exception:  # damaged in any way: reading it says how
        return 0


def from_idx(
    images_path: str | os.PathLike[str],
    labels_path: str | os.PathLike[str],
    *,
    flat: bool = True,
    **split: Unpack[Split],
) -> Dataset:
    """A data set of images and labels in the IDX format of MNIST and similar sets, gzipped or not.

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
    groups: str | None = None,
    **split: Unpack[Split],
) -> Dataset:
    """A data set of the arrays ``x`` and ``y`` of a NumPy archive; nothing is unpickled.

    ``groups`` is the name of an array with labels of subgroups, if there is one. By default each
    feature is standardised over the training part; ``task`` and the other arguments
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
    inputs, targets, *labels = read_npz(path, x, y, *([] if groups is None else [groups]))
    return from_arrays(
        inputs,
        targets,
        groups=labels[0] if labels else None,
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
    decimal: str | None = None,
    thousands: str | None = None,
    categorical: Sequence[str] = (),
    missing: str = "error",
    groups: str | None = None,
    **split: Unpack[Split],
) -> Dataset:
    """A data set from a table in a text file whose first line names the columns, gzipped or not.

    A text column becomes one column of zeros and ones per category. By default each feature is
    standardised over the training part, and so are regression targets.

    Numbers may be written in another way: with a decimal comma, with thousands separated, with a
    percent sign (``10%`` is 0.1) or a currency before or after them, with Fortran's exponents
    (``1D+02``). They are read where all ways that the file as a whole allows give the same numbers.
    Where columns such as ``1,234`` leave it open whether 1.234 or 1234 is meant, ``decimal`` or
    ``thousands`` must say so.

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
    decimal : "." or ",", optional
        What separates the decimals, in all columns. Default: what the entries show.
    thousands : one of ``, . ' _`` or a space, optional
        What separates groups of three digits before them. Default: what the entries show.
    categorical : sequence of str
        Columns to take as text, though their entries are or look like numbers.
    missing : "error", "drop" or "mean"
        What to do about rows that lack a value (an empty field, ``NA``, ``NaN``, ``?``, ...):
        refuse them, leave them out, or fill in the mean of the column over the training part (for a
        text column the frequency of each category). A missing target is never filled in.
    groups : str, optional
        A column whose entries divide the samples into subgroups, by which results are shown. It is
        no feature unless ``features`` names it. Rows without an entry are a group of their own,
        ``"missing"``.
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
        columns), a text column of more than 100 categories or whose entries mostly look like
        numbers, or numbers that can be read in two ways; as in :func:`from_arrays`.

    Examples
    --------
    >>> from_csv("winequality-red.csv.gz", target="quality")  # doctest: +SKIP
    """
    source = repr(str(path))
    choice(MISSING_POLICIES, missing=missing)
    notations(decimal, thousands)  # a bad option before a file is read
    frame, as_written = read_csv(read_text(path), source, delimiter)
    chosen = select_columns(frame, target, features, source, groups)
    inputs, targets = in_numbers(
        chosen, as_written, target, categorical, decimal=decimal, thousands=thousands, source=source
    )
    return from_table(
        inputs,
        targets,
        source=source,
        missing=missing,
        name=_stem(path),
        task=task,
        groups=None if groups is None else frame[groups],
        **split,
    )


def image_inputs(images: np.ndarray, flat: bool) -> np.ndarray:
    images = images.astype(np.result_type(images, np.float16), copy=False)  # pixels are no tokens
    if flat:
        return images.reshape(len(images), -1)
    return images[..., None] if images.ndim == 3 else images


def _stem(path: str | os.PathLike[str]) -> str:
    return Path(path).name.split(".")[0]
