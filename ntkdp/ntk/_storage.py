"""Kernels on disk: NumPy's ``.npz`` without pickle, written whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import jax.numpy as jnp
import numpy as np

from ntkdp._backend import memory, validate
from ntkdp._backend.files import replacing
from ntkdp._backend.types import Array, ArrayLike
from ntkdp._results.cell_file import check_sizes
from ntkdp._results.provenance import VERSION
from ntkdp.ntk._feature_kernel import FeatureKernel
from ntkdp.ntk._layerwise_kernel import LayerwiseKernel

Kernel: TypeAlias = Array | LayerwiseKernel | FeatureKernel
Kind = TypeVar("Kind", LayerwiseKernel, FeatureKernel)

#: The member that says what the others are, as JSON.
_LABEL = "kernel"
#: Raised whenever files of the former number would be read as something else.
_FORMAT = 1
#: Names of the arrays of each kind.
_MEMBERS = {"array": ["values"], "layerwise": ["values"], "features": ["rows", "columns"]}


def save_kernel(
    kernel: ArrayLike | LayerwiseKernel | FeatureKernel, path: str | os.PathLike[str]
) -> None:
    """Write a kernel to a file, whole or not at all.

    Parameters
    ----------
    kernel : array, LayerwiseKernel or FeatureKernel
        An array is ``(n1, n2)`` or ``(n1, n2, K, K)``.
    path : path
        NumPy's ``.npz``, without pickle: ``np.load`` reads the arrays too.

    Raises
    ------
    TypeError, ValueError
        If it is no kernel.
    FileNotFoundError
        If the folder does not exist.
    FileExistsError, PermissionError
        If there is something else than a file, or a file that is read-only.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp, pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "kernel.npz"
    >>> ntkdp.ntk.save_kernel(jnp.eye(3), path)
    >>> ntkdp.ntk.load_kernel(path).shape
    (3, 3)
    """
    label: dict[str, Any] = {"format": _FORMAT, "ntkdp": VERSION}
    if isinstance(kernel, LayerwiseKernel):
        label |= {"kind": "layerwise", "names": list(kernel.names)}
        arrays = {"values": kernel.values}
    elif isinstance(kernel, FeatureKernel):
        label["kind"] = "features"
        arrays = {"rows": kernel.rows, "columns": kernel.columns}
    else:
        label["kind"] = "array"
        arrays = {"values": _checked(kernel)}
    stored = {name: np.asarray(array) for name, array in arrays.items()}
    # NumPy has no bfloat16, which single precision holds exactly.
    halves = {name: str(array.dtype) for name, array in stored.items() if array.dtype.itemsize < 4}
    stored |= {name: stored[name].astype(np.float32) for name in halves}
    label["computed_in"] = halves
    members: Any = {_LABEL: np.array(json.dumps(label)), **stored}
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **members)


def load_kernel(path: str | os.PathLike[str]) -> Kernel:
    """Read what :func:`save_kernel` wrote.

    Parameters
    ----------
    path : path
        The file.

    Returns
    -------
    array, LayerwiseKernel or FeatureKernel
        As it was written; numbers in double precision need :func:`ntkdp.enable_x64`.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no such file, is damaged, or has a format that this version does not know.
    MemoryError
        If the kernel does not fit.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp, pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "kernel.npz"
    >>> ntkdp.LayerwiseKernel(("hidden", "output"), jnp.ones((2, 3, 3))).save(path)
    >>> ntkdp.ntk.load_kernel(path).names
    ('hidden', 'output')
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"path does not exist: {path}")
    if not path.is_file():
        raise ValueError(f"path is no plain file: {path}")
    size = path.stat().st_size
    memory.require(
        size, f"the kernel in {path}", "use one of fewer samples, or a machine with more"
    )
    try:
        with path.open("rb") as file:
            check_sizes(file, size)
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                members = {name: archive[name] for name in archive.files}
        label = json.loads(str(members.pop(_LABEL)[()]))
        known = label["format"] == _FORMAT
    except MemoryError:
        raise
    except Exception as error:  # bytes that somebody else wrote may break any part of it
        raise ValueError(f"path is no file of a kernel, or damaged: {path} ({error!r})") from error
    if not known:
        raise ValueError(
            f"path has format {label['format']!r}, and ntkdp {VERSION} reads format {_FORMAT}: "
            f"{path} was written by ntkdp {label.get('ntkdp')}; use that version, or save the "
            "kernel again"
        )
    try:
        return _kernel(label, members)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"path holds no kernel: {path} ({error})") from error


def load_as(kind: type[Kind], path: str | os.PathLike[str]) -> Kind:
    """Read a kernel of this class."""
    kernel = load_kernel(path)
    if not isinstance(kernel, kind):
        raise ValueError(
            f"path must hold a {kind.__name__}, got {_kind_of(kernel)}: {path}; "
            "ntkdp.ntk.load_kernel reads all kinds"
        )
    return kernel


def _kind_of(kernel: Kernel) -> str:
    is_array = not isinstance(kernel, LayerwiseKernel | FeatureKernel)
    return "an array" if is_array else f"a {type(kernel).__name__}"


def _kernel(label: dict[str, Any], members: dict[str, np.ndarray]) -> Kernel:
    kind = label["kind"]
    if list(members) != _MEMBERS[kind]:
        raise ValueError(f"it has the arrays {list(members)}")
    arrays = {name: validate.array(**{name: array}) for name, array in members.items()}
    arrays |= {name: arrays[name].astype(dtype) for name, dtype in label["computed_in"].items()}
    if kind == "layerwise":
        return LayerwiseKernel(tuple(map(str, label["names"])), **arrays)
    if kind == "features":
        return FeatureKernel(**arrays)
    return _checked(arrays["values"])


def _checked(kernel: ArrayLike) -> Array:
    """An array that may be a kernel."""
    values = validate.array(kernel=kernel)
    is_square = values.ndim == 2 or (values.ndim == 4 and values.shape[2] == values.shape[3])
    if not is_square or not jnp.issubdtype(values.dtype, jnp.floating):
        raise ValueError(
            "kernel must be an array of shape (n1, n2) or (n1, n2, K, K) in floating point, got "
            f"{values.shape} of {values.dtype}"
        )
    return values
