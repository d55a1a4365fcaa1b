"""Steps in blocks, in cells between nodes, with what the optimizer's filter does in each."""

from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from ntkdp._backend.types import Array
from ntkdp.stochastic_flow import _linear_filter
from ntkdp.stochastic_flow._linear_filter import LinearFilter
from ntkdp.stochastic_flow._response import noise_free_path

#: A block is this part of a cell, as long as it has no more than so many steps.
_BLOCKS, _LONGEST, _SHORTEST = 8, 32, 2
#: Outputs up to which every step has noise of its own between the nodes.
_OWN_NOISE = 512
#: Eigenvalues below this part of the largest one are rounding errors of zero.
_ZERO = 1e-12


class Steps(NamedTuple):
    """A grid of steps in blocks, in cells between nodes; arrays are ``(M, blocks, p, ...)``.

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
    matrices, drives
        The filter of the optimizer ``(d, d)`` and ``(d,)``.
    since
        What the position is made of, in terms of the state at the beginning of the cell, ``(d,)``.
    weights
        Weights of the nodes in the mean of the noise path, ``(nodes,)``.
    """

    number: Array
    slot: Array
    counts: Array
    along: Array
    matrices: Array
    drives: Array
    since: Array
    weights: Array


class Span(NamedTuple):
    """What a linear filter makes of a block of steps; arrays are ``(M, blocks, ...)``.

    Attributes
    ----------
    kept, moved
        The position before each step, in terms of the state before the block ``(p, d)``, and of
        the r numbers that drive it ``(p, r)``.
    carried, added
        The state after the block, in the same terms, ``(d, d)`` and ``(d, r)``.
    """

    kept: Array
    moved: Array
    carried: Array
    added: Array


class Schedule(NamedTuple):
    """All steps, the place of each block in its cell, and filters of gradients and of noise.

    Attributes
    ----------
    middle
        The mean of how far the steps of a block are along the cell, ``(M, blocks)``.
    gradients
        The filter of the optimizer, which a gradient drives at each step.
    noise
        The noise between the nodes, which is zero at these, driven by standard normal numbers.
    """

    steps: Steps
    middle: Array
    gradients: Span
    noise: Span


def scheduled(
    filter: LinearFilter,
    of_noise: LinearFilter,
    times: np.ndarray,
    nodes: np.ndarray,
    recorded: np.ndarray,
    n_rows: int,
    dtype: np.dtype,
) -> tuple[Schedule, Array]:
    """Steps in blocks and cells, and propagators over whole cells ``(M, d, d)``.

    The last state, which no step follows, is inside the last cell. If there are many outputs, the
    steps of a block share as many normal numbers for the noise as a state has entries.
    """
    steps = filter.steps
    weights = _linear_filter.interpolation(of_noise, nodes)
    slot = np.full(steps + 1, len(recorded))
    slot[recorded] = np.arange(len(recorded))
    _, along = noise_free_path.cells(times, nodes)
    place, filled = _grid(nodes, steps)
    first = nodes[:-1, None, None]
    carried = [
        filter.propagators(*cell)
        for cell in zip(nodes[:-1].tolist(), nodes[1:].tolist(), strict=True)
    ]
    since = [
        at[np.minimum(numbers - start, len(at) - 1), 0]
        for at, numbers, start in zip(carried, place, first, strict=True)
    ]
    # The state after the last step stays where it is, and so does that of a place without one.
    taken = np.where(filled & (place < steps), place, steps)
    matrices, drives = _taken(filter, taken)
    counts = filled.sum(axis=2)

    def array(values: np.ndarray) -> Array:
        return jnp.asarray(values, None if values.dtype.kind == "i" else dtype)

    grid = Steps(
        number=array(place),
        slot=array(np.where(filled, slot[place], len(recorded))),
        counts=array(filled.astype(float)),
        along=array(np.where(filled, along[place], 1.0)),
        matrices=array(matrices),
        drives=array(drives),
        since=array(np.stack(since)),
        weights=array(weights[place]),
    )
    middle = np.sum(np.where(filled, along[place], 0.0), axis=2) / np.maximum(counts, 1)
    noise = _span(*_taken(_linear_filter.pinned(of_noise, nodes), taken))
    if n_rows > _OWN_NOISE and of_noise.size < place.shape[2]:
        noise = _shared(noise)
    gradients = Span(*map(array, _span(matrices, drives)))
    schedule = Schedule(grid, array(middle), gradients, Span(*map(array, noise)))
    return schedule, array(np.stack([at[-1] for at in carried]))


def _taken(filter: LinearFilter, taken: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Matrices and drives of steps, and of the step after all, which changes nothing."""
    eye, zeros = np.eye(filter.size)[None], np.zeros((1, filter.size))
    matrices = np.concatenate([filter.matrices, eye])
    return matrices[taken], np.concatenate([filter.drives, zeros])[taken]


def steps_of_block(n_steps: int) -> int:
    """The most steps of a block, in a cell of so many."""
    return min(max(n_steps // _BLOCKS, _SHORTEST), _LONGEST)


def _grid(nodes: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of steps ``(M, blocks, p)``, and which of the places are filled."""
    lengths = np.diff(nodes)
    lengths[-1] += 1
    longest = int(lengths.max())
    # Blocks of the size that leaves the fewest places empty, and of these the largest.
    most = steps_of_block(longest)
    sizes = np.arange(most, most // 2, -1)
    size = sizes[np.argmin(np.sum(-(-lengths // sizes[:, None]), axis=1) * sizes)]
    inside = np.arange(-(-longest // size) * size).reshape(-1, size)
    filled = inside < lengths[:, None, None]
    return np.where(filled, nodes[:-1, None, None] + inside, steps), filled


#: The arrays of a span, in double precision.
_Arrays: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _span(matrices: np.ndarray, drives: np.ndarray) -> _Arrays:
    """The filter over a block, from ``(M, blocks, p, d, d)`` and ``(M, blocks, p, d)``."""
    *grid, per_block, size = drives.shape
    state = np.broadcast_to(np.eye(size), (*grid, size, size))
    response = np.zeros((*grid, size, per_block))
    kept, moved = [], []
    for k in range(per_block):
        kept.append(state[..., 0, :])
        moved.append(response[..., 0, :])
        state, response = matrices[..., k, :, :] @ state, matrices[..., k, :, :] @ response
        response[..., k] = drives[..., k, :]
    return np.stack(kept, axis=-2), np.stack(moved, axis=-2), state, response


def _shared(noise: _Arrays) -> _Arrays:
    """As many numbers as a state has entries: exact after a block, and a mean given that inside.

    With :math:`A A^T = R R^T`, the numbers :math:`R^{-1} A x` are standard normal where x is.
    """
    kept, moved, carried, added = noise
    values, vectors = np.linalg.eigh(added @ np.swapaxes(added, -1, -2))
    usable = values > _ZERO * np.maximum(values[..., -1:], np.finfo(float).tiny)
    deviations = np.where(usable, np.sqrt(np.where(usable, values, 1.0)), 0.0)
    inverse = np.where(usable, 1 / np.where(usable, deviations, 1.0), 0.0)
    numbers = inverse[..., None] * (np.swapaxes(vectors, -1, -2) @ added)
    return kept, moved @ np.swapaxes(numbers, -1, -2), carried, vectors * deviations[..., None, :]


def middles(schedule: Schedule) -> tuple[np.ndarray, np.ndarray]:
    """The cell of each state, and how far along it the middle of its block is."""
    filled = np.asarray(schedule.steps.counts) > 0
    cell = np.broadcast_to(np.arange(len(filled))[:, None, None], filled.shape)
    middle = np.broadcast_to(np.asarray(schedule.middle)[..., None], filled.shape)
    return cell[filled], middle[filled]
