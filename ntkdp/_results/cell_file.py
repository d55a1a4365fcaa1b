"""The file of one cell: NumPy's ``.npz``, with the arrays as members and the rest as JSON in one.

An archive of this kind has a checksum of every member, which reading verifies.
"""

import io
import json
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
        If the label is another one.
    """
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
