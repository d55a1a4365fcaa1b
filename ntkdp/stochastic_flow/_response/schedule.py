"""Steps in blocks, in cells between nodes, with what the optimizer's filter does in each."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ntkdp._backend.types import Array
from ntkdp.stochastic_flow import _linear_filter
from ntkdp.stochastic_flow._linear_filter import LinearFilter
from ntkdp.stochastic_flow._response import noise_free_path

#: A block is this part of a cell, as long as it has no more than so many steps.
_BLOCKS, _LONGEST, _SHORTEST = 8, 16, 2


class Schedule(NamedTuple):
    """A grid of steps in cells between nodes; arrays are ``(M, blocks, p, ...)``.

    Attributes
    ----------
    number
        Number of the step; places that fill a cell up have that of the last step.
    slot
        Where the state before the step is recorded; one past the last place if it is not.
    counts
        One for a step, zero for a place that fills a cell up.
    along
        How far between the nodes of its cell the step is, in time.
    middle
        The mean of that over the steps of the block.
    matrices, drives
        The filter of the optimizer ``(d, d)`` and ``(d,)``.
    since
        What the position is made of, in terms of the state at the beginning of the cell, ``(d,)``.
    weights
        Weights of the nodes in the mean of the noise path, ``(nodes,)``.
    gains, deviations
        The noise between the nodes, as in :class:`ntkdp.stochastic_flow._linear_filter.Bridge`.
    """

    number: Array
    slot: Array
    counts: Array
    along: Array
    middle: Array
    matrices: Array
    drives: Array
    since: Array
    weights: Array
    gains: Array
    deviations: Array


def scheduled(
    filter: LinearFilter,
    times: np.ndarray,
    nodes: np.ndarray,
    recorded: np.ndarray,
    dtype: np.dtype,
) -> tuple[Schedule, Array]:
    """Steps in blocks and cells, and propagators over whole cells ``(M, d, d)``.

    The last state, which no step follows, is inside the last cell.
    """
    steps, size = filter.steps, filter.size
    bridge = _linear_filter.bridge(filter, nodes)
    weights = _linear_filter.interpolation(filter, nodes)
    slot = np.full(steps + 1, len(recorded))
    slot[recorded] = np.arange(len(recorded))
    # The state after the last step stays where it is.
    matrices = np.concatenate([filter.matrices, np.eye(size)[None]])
    drives, gains = (
        np.concatenate([array, np.zeros((1, size))]) for array in (filter.drives, bridge.gains)
    )
    deviations = np.append(bridge.deviations, 0.0)
    _, along = noise_free_path.cells(times, nodes)
    per_cell = int(np.diff(nodes).max()) + 1
    per_block = min(max(per_cell // _BLOCKS, _SHORTEST), _LONGEST)
    per_cell = -(-per_cell // per_block) * per_block
    rows, whole = [], []
    for start, stop in zip(nodes[:-1].tolist(), nodes[1:].tolist(), strict=True):
        last = stop + (stop == steps)
        propagators = filter.propagators(start, stop)
        whole.append(propagators[-1])
        inside = np.arange(start, last)
        place = np.append(inside, np.full(per_cell - len(inside), steps))
        filled = np.arange(per_cell) < len(inside)
        since = propagators[np.minimum(place - start, stop - start), 0]
        shares = np.where(filled, along[place], 0.0).reshape(-1, per_block)
        counts = filled.reshape(-1, per_block).sum(axis=1)
        middle = shares.sum(axis=1) / np.maximum(counts, 1)
        columns: dict[str, np.ndarray] = {
            "number": place,
            "slot": np.where(filled, slot[place], len(recorded)),
            "counts": filled.astype(float),
            "along": np.where(filled, along[place], 1.0),
            "middle": np.repeat(middle, per_block),
            "matrices": np.where(filled[:, None, None], matrices[place], np.eye(size)),
            "drives": np.where(filled[:, None], drives[place], 0.0),
            "since": since,
            "weights": weights[place],
            "gains": np.where(filled[:, None], gains[place], 0.0),
            "deviations": np.where(filled, deviations[place], 0.0),
        }
        rows.append(columns)
    stacked = {name: np.stack([columns[name] for columns in rows]) for name in Schedule._fields}
    schedule = {
        name: jnp.asarray(
            column.reshape(len(column), -1, per_block, *column.shape[2:]),
            None if column.dtype.kind == "i" else dtype,
        )
        for name, column in stacked.items()
    }
    return Schedule(**schedule), jnp.asarray(np.stack(whole), dtype)


def middles(schedule: Schedule) -> tuple[np.ndarray, np.ndarray]:
    """The cell of each state, and how far along it the middle of its block is."""
    filled = np.asarray(schedule.counts) > 0
    cell = np.broadcast_to(np.arange(len(filled))[:, None, None], filled.shape)
    return cell[filled], np.asarray(schedule.middle)[filled]
