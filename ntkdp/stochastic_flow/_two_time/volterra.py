r"""Steps of a Volterra equation whose kernel is known between nodes of time.

.. math:: f_k = g_k - \sum_{j < k} h_j\, \Theta(k, j)\, \varphi(f_j)

Steps are grouped in cells between nodes. A step lies at :math:`\lambda \in [0, 1]` between the two
nodes A and A + 1 of its cell, and the kernel is linear in :math:`\lambda`: with an earlier cell, it
is between the kernels of the nodes; in the cell itself, on the triangle of :math:`\Theta(A, A)`,
:math:`\Theta(A + 1, A)` and :math:`\Theta(A + 1, A + 1)`. So the past reduces to a charge at each
node, and the cell's own past to two sums: of the clipped gradients, and of these times
:math:`\lambda`. With a node at every step nothing is interpolated.
"""

from typing import NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ntkdp._backend import devices, progress
from ntkdp._backend.progress import Listener
from ntkdp._backend.types import Array, Float, Key
from ntkdp.stochastic_flow._sampling import batch_weights
from ntkdp.stochastic_flow._two_time.flow import TwoTimeFlow
from ntkdp.stochastic_flow._two_time.gaussian_process import OutputProcess
from ntkdp.trajectory import Measurement


class Steps(NamedTuple):
    """A grid of steps in cells between nodes; arrays are ``(M, p)``, with a row for each cell.

    ``along`` is how far between its nodes a step is and ``following`` how far the next one is, 1 at
    the end of the cell; ``slot`` is where its state is recorded; ``before`` and ``after`` are the
    lengths of the steps on its two sides.
    """

    number: Array
    along: Array
    following: Array
    slot: Array
    before: Array
    after: Array


def grid(times: np.ndarray, noise: np.ndarray, recorded: np.ndarray, per_cell: int) -> Steps:
    """Steps at ``times``, in cells of ``per_cell``; the last step is inside a cell."""
    steps = len(times) - 1
    n_cells = steps // per_cell + 1
    number = np.arange(n_cells * per_cell).reshape(n_cells, per_cell)
    inside = np.minimum(number, steps)
    ends = noise[np.minimum(per_cell * np.arange(n_cells + 1), steps)]
    span = np.diff(ends)[:, None]
    along = (noise[inside] - ends[:-1, None]) / np.where(span > 0, span, 1.0)
    slot = np.full(steps + 1, len(recorded))
    slot[recorded] = np.arange(len(recorded))
    lengths = np.concatenate([[0.0], np.diff(times), np.zeros(number.size - steps)])
    following = np.append(along[:, 1:], np.ones((n_cells, 1)), axis=1)
    return Steps(
        number=jnp.asarray(number),
        along=jnp.asarray(along),
        following=jnp.asarray(following),
        slot=jnp.asarray(np.where(number <= steps, slot[inside], len(recorded))),
        before=jnp.asarray(np.where(number <= steps, lengths[number], 0.0)),
        after=jnp.asarray(lengths[number + 1]),
    )


class _Nodes(NamedTuple):
    """Kernels and paths at the two nodes of a cell, and the bridge between them.

    A path is the outputs with the drift of all earlier cells.
    """

    here: Float[Array, "T N n"]
    across: Float[Array, "T N n"]
    ahead: Float[Array, "T N n"]
    path_here: Float[Array, "N C"]
    path_ahead: Float[Array, "N C"]
    bridge: Float[Array, "N N"] | None


class _Past(NamedTuple):
    """Sums over the cell's own steps, its bridge, the last clipped gradients and the record."""

    gradients: Float[Array, "T n C"]
    moments: Float[Array, "T n C"]
    bridge: Float[Array, "N C"]
    last: Float[Array, "T n C"]
    record: Measurement


#: The last node's kernel and path, charges of all nodes, last clipped gradients, and the record.
_NodeCarry: TypeAlias = tuple[Array, Array, Array, Array, Measurement]


class _Runs(eqx.Module):
    """Steps of all seeds at once; the C columns are seeds times outputs."""

    flow: TwoTimeFlow
    variances: Float[Array, "nodes R"]
    keys: Key[Array, " S"]
    sample_rate: float = eqx.field(static=True)
    trapezoidal: bool = eqx.field(static=True)
    outputs: bool = eqx.field(static=True)

    def kernels(self, later: Array) -> Float[Array, "nodes T N n"]:
        """Kernels of one node with all nodes up to it, and zero for those beyond."""
        flow, variances = self.flow, self.variances
        zeros = jnp.zeros((flow.n_terms, flow.points.shape[0], flow.n_samples), flow.points.dtype)

        def with_node(earlier: Array) -> Array:
            kernel: Array = lax.cond(
                earlier <= later,
                lambda: flow.drive(variances[later], variances[earlier]),
                lambda: zeros,
            )
            return kernel

        kernels: Array = lax.map(with_node, jnp.arange(variances.shape[0]))
        return kernels

    def apply(self, kernels: Array, charges: Array) -> Float[Array, "N C"]:
        """Outputs that charges move: the sum over leading axes, terms and samples."""
        mesh = self.flow.mesh

        def rows(kernels: Array, charges: Array) -> Array:
            return devices.gathered(mesh, jnp.einsum("...tNn,...tnc->Nc", kernels, charges))

        over_devices = devices.over_samples(rows, mesh, (kernels.ndim - 2, None), None)
        return over_devices(kernels, charges)

    def along_bridge(self, bridge: Float[Array, "N N"], path: Array) -> Float[Array, "N C"]:
        """Outputs on the paths of standard bridges."""
        mesh = self.flow.mesh

        def rows(bridge: Array, path: Array) -> Array:
            return devices.gathered(mesh, bridge @ path)

        return devices.over_samples(rows, mesh, (0, None), None)(bridge, path)

    def by_seed(self, columns: Array) -> Float[Array, "S rows K"]:
        split = columns.reshape(columns.shape[0], self.keys.size, self.flow.n_outputs)
        return jnp.moveaxis(split, 1, 0)

    def gradients(self, f: Array, kernel: Array, batch: Array | None) -> tuple[Array, Array]:
        """Clipped gradients ``(T, n, C)``, and the factors by seed."""
        n = self.flow.n_samples
        diagonal = devices.diagonal(self.flow.mesh, kernel)
        clipped, factors = jax.vmap(lambda outputs: self.flow.clipped(outputs, diagonal))(
            self.by_seed(f[:n])
        )
        if batch is not None:
            clipped = clipped * batch[:, None, :, None]
        return jnp.moveaxis(clipped, 0, 2).reshape(*clipped.shape[1:3], -1), factors

    def measure(self, f: Array, factors: Array) -> Measurement:
        return jax.vmap(lambda f, c: self.flow.measure(f, c, self.outputs))(
            self.by_seed(f), factors
        )

    def batch(self, keys: Key[Array, " S"]) -> Array | None:
        """Weights ``(S, n)`` of the samples of each seed's batch."""
        if self.sample_rate == 1:
            return None
        n, dtype = self.flow.n_samples, self.flow.points.dtype
        return jax.vmap(lambda key: batch_weights(key, self.sample_rate, n, dtype))(keys)

    def step(self, nodes: _Nodes, past: _Past, at: Steps) -> _Past:
        dtype = nodes.here.dtype
        keys = jax.vmap(lambda key: jax.random.fold_in(key, at.number))(self.keys)
        along, before, after = (v.astype(dtype) for v in (at.along, at.before, at.after))
        f = (1 - along) * nodes.path_here + along * nodes.path_ahead
        if nodes.bridge is not None:
            kernels = jnp.stack([nodes.here, nodes.across, nodes.ahead])
            charges = [
                (1 - along) * past.gradients,
                along * past.gradients - past.moments,
                past.moments,
            ]
            f = f - self.apply(kernels, jnp.stack(charges))
            f = f + self.along_bridge(nodes.bridge, past.bridge)
        own = (1 - along) * nodes.here + along * nodes.ahead
        batch = self.batch(keys)
        weight = after
        if self.trapezoidal:
            # The end of a step is on both sides of the equation: two rounds are second order.
            guess = f - before / 2 * self.apply(own, past.last)
            f = f - before / 2 * self.apply(own, self.gradients(guess, own, batch)[0])
            weight = (before + after) / 2
        clipped, factors = self.gradients(f, own, batch)
        record = jax.tree.map(
            lambda path, now: path.at[at.slot].set(now), past.record, self.measure(f, factors)
        )
        bridge = past.bridge
        if nodes.bridge is not None:
            bridge = self.follow_bridge(bridge, along, at.following.astype(dtype), keys)
        return _Past(
            gradients=past.gradients + weight * clipped,
            moments=past.moments + along * weight * clipped,
            bridge=bridge,
            last=clipped,
            record=record,
        )

    def follow_bridge(self, path: Array, along: Array, following: Array, keys: Array) -> Array:
        """Make a step of standard Brownian bridges that end at 1, ``(N, C)``."""
        left = jnp.where(along < 1, 1 - along, 1.0)
        shape = (path.shape[0], self.flow.n_outputs)
        drawn = jax.vmap(
            lambda key: jax.random.normal(jax.random.fold_in(key, 1), shape, path.dtype)
        )(keys)
        noise = jnp.moveaxis(drawn, 0, 1).reshape(path.shape)
        variance = jnp.maximum((1 - following) * (following - along) / left, 0)
        return path * (1 - following) / left + jnp.sqrt(variance) * noise


@eqx.filter_jit
def run(
    flow: TwoTimeFlow,
    process: OutputProcess,
    variances: Float[Array, "nodes R"],
    steps: Steps,
    keys: Key[Array, " S"],
    n_recorded: int,
    sample_rate: float,
    trapezoidal: bool,
    outputs: bool,
    listener: Listener,
) -> Measurement:
    """Measurements ``(n_recorded, S)`` of runs over the grid of steps."""
    process_keys, step_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    runs = _Runs(flow, variances, step_keys, sample_rate, trapezoidal, outputs)
    n_nodes = variances.shape[0]
    undriven = process.draw(process_keys, flow.n_outputs, flow.mesh)
    undriven = undriven.reshape(*undriven.shape[:2], -1)
    bridges = process.bridges(flow.mesh) if steps.number.shape[1] > 1 else None

    def node(carry: _NodeCarry, place: Array) -> tuple[_NodeCarry, None]:
        here, path_here, charges, last, record = carry
        if listener is not None:
            progress.report(listener, place / n_nodes)
        row = runs.kernels(place)

        def cell() -> tuple[Array, Array, Measurement]:
            """Make the steps between the node before and this one."""
            cell_steps, bridge = jax.tree.map(lambda leaf: leaf[place - 1], (steps, bridges))
            path_ahead = undriven[place] - runs.apply(row, charges)
            nodes = _Nodes(
                here=here,
                across=row[place - 1],
                ahead=row[place],
                path_here=path_here,
                path_ahead=path_ahead,
                bridge=bridge,
            )
            zeros = jnp.zeros_like(last)
            start = _Past(zeros, zeros, jnp.zeros_like(path_here), last, record)
            past, _ = lax.scan(
                lambda past, at: (runs.step(nodes, past, at), None), start, cell_steps
            )
            charged = charges.at[place - 1].add(past.gradients - past.moments)
            return charged.at[place].add(past.moments), past.last, past.record

        # The first node has no cell; its kernel is computed here anyway, by the same program.
        charges, last, record = lax.cond(place > 0, cell, lambda: (charges, last, record))
        path = undriven[place] - runs.apply(row, charges)
        return (row[place], path, charges, last, record), None

    kernel = jnp.zeros((flow.n_terms, undriven.shape[1], flow.n_samples), undriven.dtype)
    measured = jax.eval_shape(
        lambda f: runs.measure(f, runs.gradients(f, kernel, None)[1]), undriven[0]
    )
    # One more slot, where the steps that are not recorded are put.
    record = jax.tree.map(
        lambda leaf: jnp.zeros((n_recorded + 1, *leaf.shape), leaf.dtype), measured
    )
    last = jnp.zeros((flow.n_terms, flow.n_samples, undriven.shape[2]), undriven.dtype)
    charges = jnp.zeros((n_nodes, *last.shape), last.dtype)
    carry: _NodeCarry = (kernel, undriven[0], charges, last, record)
    last_carry, _ = lax.scan(node, carry, jnp.arange(n_nodes))
    recorded: Measurement = jax.tree.map(lambda path: path[:-1], last_carry[-1])
    return recorded
