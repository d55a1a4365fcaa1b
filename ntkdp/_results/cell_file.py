"""The file of one cell: NumPy's ``.npz``, with the arrays as members and the rest as JSON in one.

An archive of this kind has a checksum of every member, which reading verifies.
"""

import io
import json
import math
import zipfile
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

#: What is read: plain values, lists of them, arrays, and dictionaries of all these, by name.
Content: TypeAlias = dict[str, Any]

SUFFIX = ".npz"
#: The member that holds everything but the arrays. No array has a name without a slash.
_TEXT = "json"


def encode(content: Mapping[str, object], label: Mapping[str, object]) -> bytes:
    """The bytes of a file with this content, and with a label that says where it belongs.

    Raises
    ------
    TypeError
        If a value is neither plain nor an array, or an array is in a list.
    ValueError
        If a name has a slash.
    """
    arrays: dict[str, np.ndarray] = {}
    plain = _take_arrays(content, "", arrays)
    text = json.dumps({"label": label, "arrays": list(arrays), "content": plain})
    file = io.BytesIO()
    members: Any = {_TEXT: np.array(text.encode()), **arrays}
    np.savez(file, **members)
    return file.getvalue()


def decode(data: bytes, label: Mapping[str, object]) -> Content:
    """The content of a file with this label. Bytes of another kind may raise any exception.

    Raises
    ------
    ValueError
        If the label is another one, or the bytes claim to hold more than there is of them.
    """
    check_sizes(io.BytesIO(data), len(data))
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        members = {name: file[name] for name in file.files}
    whole = json.loads(members.pop(_TEXT).item())
    if whole["label"] != label:
        raise ValueError("it belongs to other settings, or in another place")
    if list(members) != whole["arrays"]:
        raise ValueError("it has other arrays than those written")
    content = whole["content"]
    if not isinstance(content, dict):
        raise TypeError("its content has no names")
    for path, array in members.items():
        _put(content, path, array)
    return content


def check_sizes(archive: io.BytesIO | io.BufferedReader, size: int) -> None:
    """Raise before memory is taken for members that are larger than an archive of this size."""
    with zipfile.ZipFile(archive) as opened:
        for member in opened.infolist():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size > size:
                raise ValueError(f"{member.filename} is compressed, or larger than the file")
            with opened.open(member) as stream:
                version = np.lib.format.read_magic(stream)
                read = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = read(stream)
            if math.prod(shape) * dtype.itemsize > member.file_size:
                raise ValueError(f"{member.filename} claims to be larger than it is")


def _take_arrays(
    tree: Mapping[str, object], path: str, arrays: dict[str, np.ndarray]
) -> dict[str, object]:
    """The tree without its arrays, which are put into ``arrays`` by path."""
    plain: dict[str, object] = {}
    for name, value in tree.items():
        inner = f"{path}/{name}"
        if "/" in name:
            raise ValueError(f"names must not have a slash, got {inner!r}")
        if isinstance(value, np.ndarray):
            arrays[inner] = value
        else:
            plain[name] = _take_arrays(value, inner, arrays) if isinstance(value, dict) else value
    return plain


def _put(content: Content, path: str, array: np.ndarray) -> None:
    _, *above, name = path.split("/")
    for key in above:
        content = content[key]
    content[name] = array
