r"""A linear optimizer as a filter: how it carries gradients, and noise, through time.

The state of an optimizer that is linear, of momentum for example, and the position that it moves
are one vector for each weight, :math:`x = (w, m, \ldots)`, with
:math:`x_{k+1} = A_k x_k + b_k g_k`. All weights share the matrices, so the same filter carries
anything that is linear in the gradients: noise of the weights, outputs, or charges of a kernel.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from ntkdp._backend.types import Array, Float, LearningRate, PyTree
from ntkdp.noise import Recursion

#: Largest difference from linear, relative to the sizes of the numbers.
_TOLERANCE = 1e-4
#: Variance of a position that is known, relative to the largest variance of any: digits are lost in
#: the square of the deviation.
_PINNED = 1e-9


class LinearFilter(NamedTuple):
    """Matrices ``(steps, d, d)`` and drives ``(steps, d)``; the position is entry 0."""

    matrices: Float[np.ndarray, "steps d d"]
    drives: Float[np.ndarray, "steps d"]

    @property
    def steps(self) -> int:
        """The number of steps."""
        return len(self.drives)

    @property
    def size(self) -> int:
        """Entries d of a state."""
        size: int = self.drives.shape[1]
        return size

    def propagators(self, start: int, stop: int) -> Float[np.ndarray, "p d d"]:
        """Matrices that carry a state from ``start`` to each step up to ``stop``, both included."""
        carried = [np.eye(self.size)]
        for k in range(start, stop):
            carried.append(self.matrices[k] @ carried[-1])
        return np.stack(carried)

    def responses(self, start: int, stop: int) -> Float[np.ndarray, "p d"]:
        """States at ``stop`` after a unit gradient at each step from ``start`` on."""
        carried = np.eye(self.size)
        responses = []
        for k in range(stop - 1, start - 1, -1):
            responses.append(carried @ self.drives[k])
            carried = carried @ self.matrices[k]
        return np.stack(responses[::-1])

    def added_covariance(self, start: int, stop: int) -> Float[np.ndarray, "d d"]:
        """Covariance that unit noise of the gradients adds to a state between two steps."""
        added = np.zeros((self.size, self.size))
        for k in range(start, stop):
            matrix, drive = self.matrices[k], self.drives[k]
            added = matrix @ added @ matrix.T + np.outer(drive, drive)
        return added

    def position_covariance(self, nodes: np.ndarray) -> Float[np.ndarray, "steps1 nodes"]:
        """Covariance of the position at every step with that at the nodes, under unit noise."""
        return self.covariance(nodes, (0,))[:, 0]

    def covariance(
        self, nodes: np.ndarray, readers: tuple[int, ...]
    ) -> Float[np.ndarray, "steps1 readers all_nodes"]:
        """Covariance of some entries at every step with those at the nodes, under unit noise.

        The last axis are the nodes of the first of the ``readers``, then those of the next.
        """
        entries, own = list(readers), self.own_covariances()
        places = {node: np.flatnonzero(nodes == node) for node in set(nodes.tolist())}
        covariance = np.zeros((self.steps + 1, self.size, len(readers), len(nodes)))
        # Forward in time, what a state has in common with a node is carried on.
        common = np.zeros(covariance.shape[1:])
        for k in range(self.steps + 1):
            if k in places:
                common[:, :, places[k]] = own[k][:, entries, None]
            covariance[k] = common
            if k < self.steps:
                common = np.tensordot(self.matrices[k], common, axes=1)
        # Backward in time, `reach` carries a state to the entries at a node.
        reach = np.zeros(covariance.shape[1:])
        for k in range(self.steps, -1, -1):
            if k < self.steps:
                reach = np.tensordot(self.matrices[k].T, reach, axes=1)
            before = nodes > k
            covariance[k][:, :, before] = np.tensordot(own[k], reach, axes=1)[:, :, before]
            if k in places:
                reach[:, :, places[k]] = np.eye(self.size)[:, entries, None]
        return covariance[:, entries].reshape(self.steps + 1, len(readers), -1)

    def undriven(self, start: Float[np.ndarray, " d"]) -> Float[np.ndarray, "steps1 d"]:
        """States at every step without gradients."""
        states = [start]
        for matrix in self.matrices:
            states.append(matrix @ states[-1])
        return np.stack(states)

    def own_covariances(self) -> Float[np.ndarray, "steps1 d d"]:
        """Covariance of the state at every step, under unit noise."""
        covariances = [np.zeros((self.size, self.size))]
        for matrix, drive in zip(self.matrices, self.drives, strict=True):
            covariances.append(matrix @ covariances[-1] @ matrix.T + np.outer(drive, drive))
        return np.stack(covariances)


def averaged(filter: LinearFilter, decay: float) -> LinearFilter:
    """The filter with one more entry, the last: the moving average of the position."""
    steps, size = filter.drives.shape
    matrices, drives = np.zeros((steps, size + 1, size + 1)), np.zeros((steps, size + 1))
    matrices[:, :size, :size], drives[:, :size] = filter.matrices, filter.drives
    matrices[:, size, :size] = (1 - decay) * filter.matrices[:, 0]
    matrices[:, size, size] = decay
    drives[:, size] = (1 - decay) * filter.drives[:, 0]
    return LinearFilter(matrices, drives)


def mixed(filter: LinearFilter, noise: Recursion) -> LinearFilter:
    """The filter that white noise drives in place of the gradients, which it is mixed to first.

    Its state is that of the filter, and after it what the noise carries.
    """
    enters = np.concatenate(
        [filter.drives, np.broadcast_to(noise.enters, (filter.steps, len(noise.enters)))], axis=1
    )
    size, whole = filter.size, enters.shape[1]
    matrices = np.zeros((filter.steps, whole, whole))
    matrices[:, :size, :size], matrices[:, size:, size:] = filter.matrices, noise.carries
    matrices[:, :, size:] += enters[:, :, None] * noise.reads[:, None]
    return LinearFilter(matrices, enters * noise.draws[:, None])


class Bridge(NamedTuple):
    """Noise of the gradients that brings the position to zero at every node.

    The noise of step k is ``-gains[k] @ x_k`` plus a standard normal number times
    ``deviations[k]``.
    """

    gains: Float[np.ndarray, "steps d"]
    deviations: Float[np.ndarray, " steps"]


def linear_filter(
    optimizer: Callable[[LearningRate], optax.GradientTransformation],
    learning_rate: LearningRate,
    steps: int,
) -> LinearFilter:
    """The filter of an optimizer whose updates are linear in gradients and weights.

    Raises
    ------
    ValueError
        If the updates are not linear, as those of Adam.
    """
    matrices, drives, defect = _filter(optimizer, learning_rate, steps)
    if not bool(defect <= _TOLERANCE):
        raise ValueError(
            f"optimizer must be linear in the gradients, as SGD with momentum is, got {optimizer!r}"
        )
    return LinearFilter(np.asarray(matrices, np.float64), np.asarray(drives, np.float64))


@eqx.filter_jit
def _filter(
    optimizer: Callable[[LearningRate], optax.GradientTransformation],
    learning_rate: LearningRate,
    steps: int,
) -> tuple[Array, Array, Array]:
    transformation = optimizer(learning_rate)
    position = jnp.zeros(())
    state = transformation.init(position)
    numbers, _ = eqx.partition(state, eqx.is_inexact_array)
    leaves, structure = jax.tree.flatten((position, numbers))
    size = len(leaves)

    def moved(vector: Array, counts: PyTree) -> tuple[Array, PyTree]:
        """State after a step, from a state and a gradient."""
        entries = [entry.astype(leaf.dtype) for entry, leaf in zip(vector, leaves, strict=False)]
        position, numbers = jax.tree.unflatten(structure, entries)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, after = transformation.update(
                vector[-1], eqx.combine(numbers, counts), position
            )
        after_numbers, after_counts = eqx.partition(after, eqx.is_inexact_array)
        after_leaves = jax.tree.leaves((position + updates, after_numbers))
        return jnp.stack([leaf.astype(vector.dtype) for leaf in after_leaves]), after_counts

    def step(counts: PyTree, _: None) -> tuple[PyTree, tuple[Array, Array]]:
        columns, after = jax.vmap(moved, (0, None), (0, None))(jnp.eye(size + 1), counts)
        probe = jnp.cos(1.0 + jnp.arange(size + 1.0)) * 3
        straight = probe @ columns
        defect = jnp.max(jnp.abs(moved(probe, counts)[0] - straight)) / jnp.max(
            jnp.abs(probe) @ jnp.abs(columns) + 1e-30
        )
        return after, (columns.T, defect)

    _, counts = eqx.partition(state, eqx.is_inexact_array)
    _, (both, defects) = lax.scan(step, counts, None, length=steps)
    return both[:, :, :-1], both[:, :, -1], jnp.max(defects)


def interpolation(filter: LinearFilter, nodes: np.ndarray) -> Float[np.ndarray, "steps1 nodes"]:
    """Weights of the positions at the nodes in the mean position of every step, given those."""
    return readings(filter.covariance(nodes, (0,)), nodes)[:, 0]


def readings(
    covariance: Float[np.ndarray, "steps1 readers all_nodes"], nodes: np.ndarray
) -> Float[np.ndarray, "steps1 readers all_nodes"]:
    """Weights of the entries at the nodes in the mean of those at every step, given the former.

    ``covariance`` is that of :meth:`LinearFilter.covariance`.
    """
    n_readers = covariance.shape[1]
    between = np.swapaxes(covariance[nodes], 0, 1).reshape(-1, covariance.shape[-1])
    spread = np.sqrt(np.diagonal(between))
    # The start is known, and so is a node without noise since the one before.
    unit = np.where(spread > 0, spread, 1.0)
    inverse = np.linalg.pinv(between / np.outer(unit, unit), rcond=1e-12, hermitian=True)
    weights: Float[np.ndarray, "steps1 readers all_nodes"] = (covariance / unit) @ inverse / unit
    itself = np.eye(n_readers * len(nodes)).reshape(n_readers, len(nodes), -1)
    weights[nodes] = np.swapaxes(itself, 0, 1)
    return weights


def bridge(filter: LinearFilter, nodes: np.ndarray, readers: tuple[int, ...] = (0,)) -> Bridge:
    """The noise between nodes at each of which the position, or all ``readers``, are zero."""
    size, steps = filter.size, filter.steps
    variances = np.diagonal(filter.position_covariance(nodes)[nodes])
    pinned = 1 / (_PINNED * (float(variances.max()) or 1.0))
    known = set(np.asarray(nodes).tolist())
    precision = np.zeros((size, size))
    gains, deviations = np.zeros((steps, size)), np.zeros(steps)
    for k in range(steps - 1, -1, -1):
        if k + 1 in known:
            precision[list(readers), list(readers)] += pinned
        matrix, drive = filter.matrices[k], filter.drives[k]
        total = 1 + drive @ precision @ drive
        across = drive @ precision @ matrix
        gains[k], deviations[k] = across / total, total**-0.5
        precision = matrix.T @ precision @ matrix - np.outer(across, across) / total
    return Bridge(gains, deviations)


def pinned(
    filter: LinearFilter, nodes: np.ndarray, readers: tuple[int, ...] = (0,)
) -> LinearFilter:
    """The filter of the noise between nodes, at which the ``readers`` are zero."""
    gains, deviations = bridge(filter, nodes, readers)
    matrices = filter.matrices - filter.drives[:, :, None] * gains[:, None]
    return LinearFilter(matrices, filter.drives * deviations[:, None])
