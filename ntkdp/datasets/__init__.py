"""Data sets by name, from OpenML and from the user's files.

Every function ends in :func:`from_arrays`, which states how samples are split (``n_train``,
``n_test``, ``seed``) and standardised (``standardise``), and what a bad array raises.
"""

from ntkdp.datasets._dataset import Dataset, from_arrays
from ntkdp.datasets._file_content import read_text as read_text
from ntkdp.datasets._files import from_csv, from_idx, from_npz
from ntkdp.datasets._named import (
    diabetes,
    digits,
    gaussian,
    load,
    mnist5k,
    names,
    openml,
    separable,
)
from ntkdp.datasets._tables import sniff_delimiter as sniff_delimiter

__all__ = [
    "Dataset",
    "diabetes",
    "digits",
    "from_arrays",
    "from_csv",
    "from_idx",
    "from_npz",
    "gaussian",
    "load",
    "mnist5k",
    "names",
    "openml",
    "separable",
]
