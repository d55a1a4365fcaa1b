r"""Runs by their outputs: undriven outputs, plus the response to clipped gradients.

The response is a Volterra sum over earlier steps, with kernels that are linear in time between
nodes, in both arguments: with an earlier cell, between the kernels of its nodes, and in the cell
itself on the triangle of :math:`\Theta(a, a)`, :math:`\Theta(a + 1, a)` and
:math:`\Theta(a + 1, a + 1)`. So the past is a charge at each node, and the cell's own past is two
sums: of the clipped gradients, and of these times how far the step was along the cell. The filter
of the optimizer carries the charges, which are states of it with d entries.
"""

from typing import NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from ntkdp._backend import progress
from ntkdp._backend.progress import Listener
from ntkdp._backend.types import Array, Float, Key
from ntkdp.stochastic_flow._response.flow import ResponseFlow
from ntkdp.stochastic_flow._response.kernels import NodeKernels
from ntkdp.stochastic_flow._response.noise_free_path import NoiseFreePath
from ntkdp.stochastic_flow._response.schedule import Schedule
from ntkdp.stochastic_flow._sampling import batch_weights
from ntkdp.trajectory import Measurement


class Undriven(NamedTuple):
    """Runs on the noise path, which do not respond to it.

    Attributes
    ----------
    nodes
        Outputs at the nodes less those of the path, ``(nodes, N K, S)``; None if all are known.
    roots
        Roots of the covariance of the noise between the nodes, ``(M, N K, N K)``.
    steps
        Outputs at every step less those of the path, ``(steps + 1, N K, S)``, if they are known.
    blocks
        The kernel's blocks of each point with itself at the nodes, ``(nodes, T, N, K, K, S)``.
    corrections
        Gradient norms of the path over those of its blocks between the nodes, ``(steps + 1, T,
        n)``, where they are known.
    """

    nodes: Float[Array, "nodes NK S"] | None
    roots: Float[Array, "M NK NK"] | None
    steps: Float[Array, "steps1 NK S"] | None
    blocks: Float[Array, "nodes T N K K S"]
    corrections: Float[Array, "steps1 T n"] | None


class _Charges(NamedTuple):
    """Charges of a cell's own steps: clipped gradients, and these times how far along it."""

    gradients: Float[Array, "d T nK *S"]
    moments: Float[Array, "d T nK *S"]

    def after(self, at: Schedule, clipped: Float[Array, "T nK *S"]) -> "_Charges":
        """The charges after a step."""
        return _Charges(
            _filtered(at, self.gradients, clipped), _filtered(at, self.moments, at.along * clipped)
        )

    def placed(
        self, propagator: Array, charges: Float[Array, "nodes d T nK *S"], cell: Array
    ) -> Float[Array, "nodes d T nK *S"]:
        """Charges at the nodes after the cell, whose own are divided between its two nodes."""
        carried = jnp.einsum("de,ae...->ad...", propagator, charges)
        carried = carried.at[cell].add(self.gradients - self.moments)
        return carried.at[cell + 1].add(self.moments)


class _Triangle(NamedTuple):
    """Kernels in a cell: at its first node, from the first to the last, and at the last."""

    here: Float[Array, "T NK nK"]
    across: Float[Array, "T NK nK"]
    ahead: Float[Array, "T NK nK"]

    def apply(self, along: Array, charges: _Charges, first: "_Scales", last: "_Scales") -> Array:
        """Outputs that charges of the cell move at a place in it."""
        gradients, moments = charges.gradients[0], charges.moments[0]
        here = self.here @ (first.columns * (1 - along) * gradients)
        ahead = self.across @ (first.columns * (along * gradients - moments))
        ahead += self.ahead @ (last.columns * moments)
        return jnp.sum(first.rows * here + last.rows * ahead, axis=0)


class _Scales(NamedTuple):
    """How much longer the gradients of a run are at a node than on average.

    The kernel of a run is the mean one between such scales, so that a clipped gradient has the
    length that it should.
    """

    rows: Float[Array, "T NK S"]
    columns: Float[Array, "T nK S"]


class Runs(eqx.Module):
    """Steps of all runs at once; the last axis of an array is that of the runs."""

    flow: ResponseFlow
    path: NoiseFreePath
    kernels: NodeKernels
    undriven: Undriven
    keys: Key[Array, " S"]
    average: Array | None
    sample_rate: float = eqx.field(static=True)
    outputs: bool = eqx.field(static=True)

    def scales(self, node: Array) -> _Scales:
        """Scales of each run at a node."""
        flow = self.flow
        traces = jnp.trace(self.undriven.blocks[node], axis1=2, axis2=3)
        means = self.kernels.traces[node][..., None]
        scales = jnp.sqrt(jnp.where(means > 0, traces / jnp.where(means > 0, means, 1.0), 1.0))
        rows = jnp.repeat(scales, flow.n_outputs, axis=1)
        columns = rows[:, : flow.n_samples * flow.n_outputs]
        others = self.kernels.between.shape[-1] - columns.shape[1]
        return _Scales(rows, jnp.pad(columns, ((0, 0), (0, others), (0, 0)), constant_values=1.0))

    def pasts(self, node: Array, charges: Float[Array, "nodes d T nK S"]) -> Float[Array, "d NK S"]:
        """Outputs at a node that charges of all nodes up to it move, entry by entry."""
        kernels, number = self.kernels.between, self.kernels.number[node]

        def add(b: Array, total: Array) -> Array:
            return total + kernels[number[b]] @ (self.scales(b).columns * charges[b])

        shape = (charges.shape[1], *kernels.shape[1:3], self.keys.size)
        past: Array = lax.fori_loop(0, node + 1, add, jnp.zeros(shape, charges.dtype))
        return jnp.sum(self.scales(node).rows * past, axis=1)

    def triangle(self, cell: Array) -> _Triangle:
        kernels, number = self.kernels.between, self.kernels.number
        return _Triangle(
            kernels[number[cell, cell]],
            kernels[number[cell + 1, cell]],
            kernels[number[cell + 1, cell + 1]],
        )

    def by_run(self, f: Float[Array, "NK S"]) -> Float[Array, "S N K"]:
        return jnp.moveaxis(f, -1, 0).reshape(self.keys.size, -1, self.flow.n_outputs)

    def gradients(
        self, at: Schedule, f: Array, blocks: Float[Array, "T N K K S"], keys: Array
    ) -> tuple[Float[Array, "T nK S"], Array]:
        """Clipped gradients of the batches, and the factors by run."""
        n, correction = self.flow.n_samples, None
        if self.undriven.corrections is not None:
            correction = self.undriven.corrections[at.number]
        clipped, factors = jax.vmap(
            lambda own, blocks: self.flow.clipped(own[:n], blocks, correction), (0, -1)
        )(self.by_run(f), blocks[:, :n])
        if self.sample_rate < 1:
            batches = jax.vmap(
                lambda key: batch_weights(
                    jax.random.split(key)[0], self.sample_rate, n, clipped.dtype
                )
            )(keys)
            clipped = clipped * batches[:, None, :, None]
        return jnp.moveaxis(clipped, 0, -1).reshape(clipped.shape[1], -1, self.keys.size), factors

    def responding(self, at: Schedule, clipped: Float[Array, "T nK S"]) -> Array:
        """What the gradients differ by from those of the path, of samples that drive outputs."""
        path = self.path
        if path.charges is None:
            return clipped
        number = jnp.minimum(at.number, path.charges.shape[0] - 1)
        charges = path.charges[number].reshape(clipped.shape[0], -1, 1)
        if path.is_own:
            return clipped - charges
        charges = jnp.broadcast_to(-charges, (*charges.shape[:2], clipped.shape[2]))
        return jnp.concatenate([clipped, charges], axis=1)

    def measure(self, f: Array, factors: Array) -> Measurement:
        return jax.vmap(lambda own, c: self.flow.measure(own, c, self.outputs))(
            self.by_run(f), factors
        )

    def cell(
        self,
        cell: Array,
        steps: Schedule,
        charges: Float[Array, "nodes d T nK S"],
        bridge: Array,
        average: Array,
        record: Measurement,
    ) -> "_Carry":
        """Charges of a cell's own steps, noise and averages at its end, and the record."""
        undriven, own = self.undriven, self.triangle(cell)
        ends = self.scales(cell), self.scales(cell + 1)
        past = self.pasts(cell, charges), self.pasts(cell + 1, charges)
        root = None if undriven.roots is None else undriven.roots[cell]

        def undriven_at(at: Schedule, bridge: Array) -> Array:
            about = self.path.outputs[at.number].reshape(-1)[:, None]
            if undriven.steps is not None:
                return about + undriven.steps[at.number]
            assert undriven.nodes is not None
            f = about + jnp.tensordot(at.weights, undriven.nodes, 1)
            return f if root is None else f + root @ bridge[0]

        def step(carry: _Carry, at: Schedule) -> tuple[_Carry, None]:
            now, bridge, average, record = carry
            keys = jax.vmap(lambda key: jax.random.fold_in(key, at.number))(self.keys)
            f = undriven_at(at, bridge) + own.apply(at.along, now, *ends)
            f += jnp.tensordot(at.since, (1 - at.along) * past[0] + at.along * past[1], 1)
            blocks = (1 - at.along) * undriven.blocks[cell] + at.along * undriven.blocks[cell + 1]
            clipped, factors = self.gradients(at, f, blocks, keys)
            average, seen = self.averaged(at, f, average)
            record = jax.tree.map(
                lambda path, value: path.at[at.slot].set(value), record, self.measure(seen, factors)
            )
            if root is not None:
                bridge = self.follow_bridge(at, bridge, keys)
            return (now.after(at, self.responding(at, clipped)), bridge, average, record), None

        zeros = jnp.zeros_like(charges[0])
        end, _ = lax.scan(step, (_Charges(zeros, zeros), bridge, average, record), steps)
        return end

    def averaged(
        self, at: Schedule, f: Float[Array, "NK S"], average: Float[Array, "NK S"]
    ) -> tuple[Array, Array]:
        """Distance of outputs from those of the path, averaged, and the outputs of the average."""
        if self.average is None or self.path.averaged is None:
            return average, f
        kept = 1 - at.counts * (1 - self.average)
        distance = f - self.path.outputs[at.number].reshape(-1)[:, None]
        average = kept * average + (1 - kept) * distance
        return average, average + self.path.averaged[at.number].reshape(-1)[:, None]

    def follow_bridge(self, at: Schedule, bridge: Array, keys: Array) -> Float[Array, "d NK S"]:
        """Make a step of the standard noise that is zero at the nodes."""
        shape = bridge.shape[1:2]
        drawn = jax.vmap(
            lambda key: jax.random.normal(jax.random.split(key)[1], shape, bridge.dtype),
            out_axes=-1,
        )(keys)
        noise = at.deviations * drawn - jnp.tensordot(at.gains, bridge, 1)
        return _filtered(at, bridge, noise)


#: Charges of the cell, noise between its nodes, averages, and the record.
_Carry: TypeAlias = tuple[_Charges, Array, Array, Measurement]


def _filtered(at: Schedule, state: Array, gradient: Array) -> Array:
    """The state of the optimizer's filter after a step."""
    moved = jnp.tensordot(at.matrices, state, 1)
    return moved + at.drives.reshape(-1, *[1] * gradient.ndim) * gradient[None]


@eqx.filter_jit
def run(
    runs: Runs,
    schedule: Schedule,
    propagators: Float[Array, "M d d"],
    n_recorded: int,
    listener: Listener,
) -> Measurement:
    """Measurements ``(n_recorded, S)`` of all runs."""
    n_cells, size = propagators.shape[:2]
    kernels, count = runs.kernels, runs.keys.size
    _, n_groups, rows, columns = kernels.between.shape
    dtype = kernels.between.dtype

    def cell(carry: _Whole, at: tuple[Array, Schedule, Array]) -> tuple[_Whole, None]:
        number, steps, propagator = at
        charges, bridge, average, record = carry
        if listener is not None:
            progress.report(listener, number / n_cells)
        own, bridge, average, record = runs.cell(number, steps, charges, bridge, average, record)
        return (own.placed(propagator, charges, number), bridge, average, record), None

    charges = jnp.zeros((n_cells + 1, size, n_groups, columns, count), dtype)
    bridge = jnp.zeros((size, rows, count), dtype)
    measured = jax.eval_shape(
        lambda f: runs.measure(f, jnp.zeros((count, n_groups, runs.flow.n_samples), dtype)),
        jnp.zeros((rows, count), dtype),
    )
    # One more slot, where the steps that are not recorded are put.
    record = jax.tree.map(
        lambda leaf: jnp.zeros((n_recorded + 1, *leaf.shape), leaf.dtype), measured
    )
    end, _ = lax.scan(
        cell,
        (charges, bridge, jnp.zeros((rows, count), dtype), record),
        (jnp.arange(n_cells), schedule, propagators),
    )
    recorded: Measurement = jax.tree.map(lambda path: path[:-1], end[-1])
    return recorded


#: Charges at the nodes, noise between them, averages, and the record.
_Whole: TypeAlias = tuple[Float[Array, "nodes d T nK S"], Array, Array, Measurement]
