"""A problem from a file of features: a linear head on them, and nothing else to say."""

import os
from pathlib import Path
from typing import Any

from ntkdp import datasets
from ntkdp._backend.config_files import ConfigError


def fields_of_features(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Fields of a configuration for a linear head on the features of a file.

    Of the samples, the share that :func:`ntkdp.datasets.load` takes by default trains the head, and
    the others test it. Classes are told apart by cross-entropy, numbers fitted by squared error.

    Parameters
    ----------
    path : path
        A .npz or .csv file, as for :func:`ntkdp.datasets.load`.

    Returns
    -------
    dict
        For :func:`config`, and for :func:`ntkdp.sweep.config`.

    Raises
    ------
    ConfigError
        If the file is no data set.

    Examples
    --------
    >>> import numpy as np, pathlib, tempfile, ntkdp
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "features.npz"
    ...     np.savez(path, x=np.eye(10), y=np.arange(10) % 2)
    ...     fields = ntkdp.experiment.fields_of_features(path)
    >>> fields["model"], fields["loss"], fields["data"]["n_train"]
    ({'widths': []}, 'softmax_cross_entropy', 8)
    """
    try:
        data = datasets.load(path)
    except (OSError, TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"features {os.fspath(path)!r}: {error}") from error
    regression = data.task == "regression"
    return {
        "name": Path(path).stem,
        "data": {
            "name": os.fspath(path),
            "n_train": len(data.y_train),
            "n_test": len(data.y_test),
        },
        "model": {"widths": []},
        "loss": "squared_error" if regression else "softmax_cross_entropy",
    }
