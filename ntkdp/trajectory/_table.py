"""What a trajectory recorded, as a table in plain text and for a notebook."""

from typing import TYPE_CHECKING

import jax
import numpy as np

from ntkdp._backend.types import is_traced
from ntkdp._results import console, page
from ntkdp._results import setup as setups
from ntkdp.trajectory._seeds import mean_over_seeds

if TYPE_CHECKING:
    from ntkdp.trajectory._trajectory import Trajectory

_HEAD = ("", "first", "last")
_TITLES = {
    "loss": "training loss",
    "accuracy": "training accuracy",
    "clip_fraction": "clip fraction",
    "test_loss": "test loss",
    "test_accuracy": "test accuracy",
}


def as_text(path: "Trajectory") -> str:
    """The table in plain text; of what is no record of numbers yet, the fields."""
    if not _is_recorded(path):
        return repr(path)
    return console.plain_table(_title(path), _HEAD, _rows(path), _notes(path))


def as_html(path: "Trajectory") -> str:
    """The table as HTML."""
    if not _is_recorded(path):
        return page.summary(repr(path), _HEAD, [])
    return page.summary(_title(path), _HEAD, _rows(path), _notes(path))


def _is_recorded(path: "Trajectory") -> bool:
    """Whether it holds numbers over time: transformations put other things into a pytree."""
    parts = (path.times, path.loss)
    if is_traced(path) or not all(isinstance(part, jax.Array | np.ndarray) for part in parts):
        return False
    return path.times.ndim == 1 and path.loss.ndim in (1, 2) and path.loss.shape[-1:] != (0,)


def _title(path: "Trajectory") -> str:
    times = np.asarray(path.times)
    title = f"Trajectory of {len(times)} times, t = {times[0]:.4g} to {times[-1]:.4g}"
    if path.steps is not None:
        title += f", steps {int(path.steps[0])} to {int(path.steps[-1])}"
    return title + (f", mean of {len(path.loss)} seeds" if path.loss.ndim == 2 else "")


def _rows(path: "Trajectory") -> list[tuple[str, ...]]:
    found = {title: mean_over_seeds(path, name) for name, title in _TITLES.items()}
    return [
        (title, f"{values[0]:.4g}", f"{values[-1]:.4g}")
        for title, values in found.items()
        if values is not None
    ]


def _notes(path: "Trajectory") -> list[str]:
    phases = [setups.in_words(phase) for phase in path.setup]
    if len(phases) > 1:
        phases = [f"Phase {number}: {words}" for number, words in enumerate(phases, 1)]
    return phases if path.successful else [*phases, path.message]
