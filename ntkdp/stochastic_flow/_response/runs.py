r"""Runs by their outputs: undriven outputs, plus the response to clipped gradients.

The response is a Volterra sum over earlier steps, with kernels that are linear in time between
nodes, in both arguments: with an earlier cell, between the kernels of its nodes, and in the cell
itself on the triangle of :math:`\Theta(a, a)`, :math:`\Theta(a + 1, a)` and
:math:`\Theta(a + 1, a + 1)`. So the past is a charge at each node, and the cell's own past is two
sums: of the clipped gradients, and of these times how far the step was along the cell. The filter
of the optimizer carries the charges, which are states of it with d entries.

What earlier blocks and the noise move is read once for a block of steps, and within the block the
kernel is that of its middle: a step then costs one product of a kernel with the charges of all
runs.
"""

import functools
from typing import NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from ntkdp._backend import progress
from ntkdp._backend.progress import Listener
from ntkdp._backend.types import Array, Float, Key, PRNGKeyArray, PyTree
from ntkdp.batches import Batches, Drawn
from ntkdp.stochastic_flow._response.flow import ResponseFlow
from ntkdp.stochastic_flow._response.kernels import NodeKernels
from ntkdp.stochastic_flow._response.noise_free_path import NoiseFreePath
from ntkdp.stochastic_flow._response.noise_path import PathNorms, over
from ntkdp.stochastic_flow._response.schedule import Schedule, Span, Steps
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
    lengths
        Norms of gradients at the nodes in given directions, ``(nodes, T, N, S)``.
    """

    nodes: Float[Array, "nodes NK S"] | None
    roots: Float[Array, "M NK NK"] | None
    steps: Float[Array, "steps1 NK S"] | None
    lengths: Float[Array, "nodes T N S"]


class _Charges(NamedTuple):
    """Charges of a cell's own steps: clipped gradients, and these times how far along it."""

    gradients: Float[Array, "d T nK *S"]
    moments: Float[Array, "d T nK *S"]

    def after(
        self, span: Span, along: Float[Array, " p"], clipped: Float[Array, "p T nK *S"]
    ) -> "_Charges":
        """The charges after a block of steps."""
        return _Charges(
            _after(span, self.gradients, span.added, clipped),
            _after(span, self.moments, span.added * along, clipped),
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

    def read(self, charges: _Charges, first: "_Scales", last: "_Scales") -> "_Line":
        """Outputs that charges of the cell move, entry by entry, along the cell."""
        gradients, moments = first.columns * charges.gradients, first.columns * charges.moments
        both = self.across @ jnp.concatenate([gradients, moments], axis=-1)
        across, crossed = jnp.split(both, 2, axis=-1)
        here = first.rows * (self.here @ gradients)
        past = last.rows * (self.ahead @ (last.columns * charges.moments) - crossed)
        return _Line(jnp.sum(here + past, axis=1), jnp.sum(last.rows * across - here, axis=1))

    def at(self, along: Array, first: "_Scales", last: "_Scales") -> "_Kernel":
        """The kernel of a place in the cell with itself."""
        return _Kernel(
            (1 - along) * self.here + along * self.ahead,
            _Scales(
                (1 - along) * first.rows + along * last.rows,
                (1 - along) * first.columns + along * last.columns,
            ),
        )


class _Line(NamedTuple):
    """Outputs that are linear along a cell: at its first node, and their change up to its last."""

    start: Float[Array, "d NK S"]
    slope: Float[Array, "d NK S"]

    def terms(self, kept: Float[Array, "p d"], along: Float[Array, " p"]) -> list["_Term"]:
        """Outputs at places along the cell, where these are the weights of the d entries."""
        return [(kept, self.start), (along[:, None] * kept, self.slope)]


class _Scales(NamedTuple):
    """How much longer the gradients of a run are at a node than on average.

    The kernel of a run is the mean one between such scales, so that a clipped gradient has the
    length that it should.
    """

    rows: Float[Array, "T NK S"]
    columns: Float[Array, "T nK S"]


class _Kernel(NamedTuple):
    """A kernel of all runs, and what it is for each."""

    mean: Float[Array, "T NK nK"]
    scales: _Scales

    def apply(self, charges: Float[Array, "T nK S"]) -> Float[Array, "NK S"]:
        moved = self.scales.rows * (self.mean @ (self.scales.columns * charges))
        return jnp.sum(moved, axis=0)


class _Norms(NamedTuple):
    """Blocks of the path's kernel, and how much longer the gradients of each run are.

    A run has the length that its own output gradients have under the path's blocks, times its
    ratio to the path in the direction of the path's gradient.
    """

    blocks: Float[Array, "T n K K"]
    ratios: Float[Array, "T n S"]


class _Carry(NamedTuple):
    """What goes on from block to block, besides charges.

    Attributes
    ----------
    bridge
        The noise between the nodes, ``(D, N K, S)``.
    average
        Averages of distances from the path, ``(N K, S)``.
    order
        What the batches of each run carry.
    record
        Measurements so far.
    """

    bridge: Array
    average: Array
    order: PyTree
    record: Measurement


class Runs(eqx.Module):
    """Steps of all runs at once; the last axis of an array is that of the runs."""

    flow: ResponseFlow
    path: NoiseFreePath
    norms: PathNorms
    kernels: NodeKernels
    undriven: Undriven
    keys: Key[Array, " S"]
    average: Array | None
    batches: Batches
    outputs: bool = eqx.field(static=True)

    def scales(self, node: Array) -> _Scales:
        """Scales of each run at a node."""
        flow = self.flow
        scales = over(self.undriven.lengths[node], self.kernels.lengths[node][..., None])
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

    def norms_along(self, cell: Array, along: Array) -> "_Norms":
        """The norms of training samples at a place in a cell."""
        n, norms = self.flow.n_samples, self.norms
        here, ahead = (
            over(self.undriven.lengths[node][:, :n], norms.lengths[node][:, :n, None])
            for node in (cell, cell + 1)
        )
        blocks = (1 - along) * norms.blocks[cell] + along * norms.blocks[cell + 1]
        return _Norms(blocks[:, :n], (1 - along) * here + along * ahead)

    def triangle(self, cell: Array) -> _Triangle:
        kernels, number = self.kernels.between, self.kernels.number
        return _Triangle(
            kernels[number[cell, cell]],
            kernels[number[cell + 1, cell]],
            kernels[number[cell + 1, cell + 1]],
        )

    def by_point(self, f: Float[Array, "NK S"]) -> Float[Array, "N K S"]:
        return f.reshape(-1, self.flow.n_outputs, self.keys.size)

    def gradients(
        self, at: Steps, f: Array, norms: _Norms, order: PyTree
    ) -> tuple[Float[Array, "T nK S"], Array, PyTree]:
        """Clipped gradients of the batches, the factors, and what batches carry on."""
        n, ratios = self.flow.n_samples, norms.ratios
        if self.norms.corrections is not None:
            ratios = ratios * self.norms.corrections[at.number][:, :, None]
        clipped, factors = self.flow.clipped(self.by_point(f)[:n], norms.blocks, ratios)

        def draw(key: PRNGKeyArray, order: PyTree) -> tuple[Drawn, PyTree]:
            own = jax.random.split(jax.random.fold_in(key, at.number))[0]
            return self.batches.draw(own, at.number, order, n)

        drawn, after = jax.vmap(draw)(self.keys, order)
        if drawn is not None:
            weights = jax.vmap(lambda drawn: self.batches.weights(drawn, clipped.dtype), 0, 1)(
                drawn
            )
            clipped = clipped * weights[None, :, None]
            # A place that fills a cell up is no step.
            after = jax.tree.map(lambda new, old: jnp.where(at.counts > 0, new, old), after, order)
        return clipped.reshape(len(clipped), -1, self.keys.size), factors, after

    def responding(self, at: Steps, clipped: Float[Array, "T nK S"]) -> Array:
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
        return self.flow.measure(self.by_point(f), factors, self.outputs)

    def cell(
        self,
        cell: Array,
        blocks: Schedule,
        charges: Float[Array, "nodes d T nK S"],
        start: "_Carry",
    ) -> tuple[_Charges, "_Carry"]:
        """Charges of a cell's own steps, and what is carried on from its end.

        The noise between the nodes is followed in the outputs: what drives it is spread over them
        once, by the root of their covariance, and the optimizer's filter does the rest.
        """
        own, ends = self.triangle(cell), (self.scales(cell), self.scales(cell + 1))
        before = self.pasts(cell, charges)
        past = _Line(before, self.pasts(cell + 1, charges) - before)

        def block(number: Array, carry: tuple[_Charges, _Carry]) -> tuple[_Charges, _Carry]:
            at: Schedule = jax.tree.map(lambda leaf: leaf[number], blocks)
            charges, (bridge, average, order, record) = carry
            kernel, norms = own.at(at.middle, *ends), self.norms_along(cell, at.middle)
            steps, noise = at.steps, self.noise(at, cell)
            f = self.undriven_at(at, bridge, noise) + _weighted(
                [
                    *past.terms(steps.since, steps.along),
                    *own.read(charges, *ends).terms(at.gradients.kept, steps.along),
                ]
            )

            def step(carry: _InBlock, now: tuple[Steps, Array]) -> tuple[_InBlock, Array]:
                moved, average, order, record = carry
                at, f = now
                f = f + moved[0]
                clipped, factors, order = self.gradients(at, f, norms, order)
                average, seen = self.averaged(at, f, average)
                measured = self.measure(seen, factors)
                record = jax.tree.map(
                    lambda path, value: path.at[at.slot].set(value), record, measured
                )
                responding = self.responding(at, clipped)
                moved = _filtered(at, moved, kernel.apply(responding))
                return (moved, average, order, record), responding

            start = (jnp.zeros_like(past.start), average, order, record)
            (_, average, order, record), responding = lax.scan(step, start, (steps, f))
            charges = charges.after(at.gradients, steps.along, responding)
            if noise is not None:
                bridge = _after(at.noise, bridge, at.noise.added, noise)
            return charges, _Carry(bridge, average, order, record)

        zeros = jnp.zeros_like(charges[0])
        # Cells have more or fewer blocks than others; the empty ones are the last.
        n_blocks = jnp.sum(blocks.steps.counts[:, 0] > 0)
        end: tuple[_Charges, _Carry] = lax.fori_loop(
            0, n_blocks, block, (_Charges(zeros, zeros), start)
        )
        return end

    def undriven_at(self, at: Schedule, bridge: Array, noise: Array | None) -> Array:
        """Outputs on the noise path at the steps of a block, ``(p, N K, S)``."""
        undriven, steps = self.undriven, at.steps
        path = self.path.outputs[steps.number].reshape(steps.number.size, -1, 1)
        if undriven.steps is not None:
            return path + undriven.steps[steps.number]
        assert undriven.nodes is not None
        terms = [(steps.weights, undriven.nodes)]
        if noise is not None:
            terms += [(at.noise.kept, bridge), (at.noise.moved, noise)]
        return path + _weighted(terms)

    def averaged(
        self, at: Steps, f: Float[Array, "NK S"], average: Float[Array, "NK S"]
    ) -> tuple[Array, Array]:
        """Distance of outputs from those of the path, averaged, and the outputs of the average."""
        if self.average is None or self.path.averaged is None:
            return average, f
        kept = 1 - at.counts * (1 - self.average)
        distance = f - self.path.outputs[at.number].reshape(-1)[:, None]
        average = kept * average + (1 - kept) * distance
        return average, average + self.path.averaged[at.number].reshape(-1)[:, None]

    def noise(self, at: Schedule, cell: Array) -> Float[Array, "r NK S"] | None:
        """The numbers that drive the noise between the nodes in a block, by output."""
        if self.undriven.roots is None:
            return None
        root, n_numbers = self.undriven.roots[cell], at.noise.added.shape[1]

        def draw(key: PRNGKeyArray, number: Array) -> Array:
            own = jax.random.split(jax.random.fold_in(key, number))[1]
            return jax.random.normal(own, (root.shape[1],), root.dtype)

        numbers = at.steps.number[:n_numbers]
        drawn = jax.vmap(jax.vmap(draw, (0, None), 1), (None, 0), 1)(self.keys, numbers)
        moved = (root @ drawn.reshape(root.shape[1], -1)).reshape(-1, n_numbers, self.keys.size)
        return jnp.swapaxes(moved, 0, 1)


#: Outputs that the steps of a block move, averages, what batches carry, and the record.
_InBlock: TypeAlias = tuple[Float[Array, "d NK S"], Array, PyTree, Measurement]

#: Weights ``(p, m)`` of a few arrays ``(m, N K, S)``.
_Term: TypeAlias = tuple[Array, Array]


def _filtered(at: Steps, state: Array, gradient: Array) -> Array:
    """The state of the optimizer's filter after a step."""
    entries = [
        _mixed(row, state) + drive * gradient
        for row, drive in zip(at.matrices, at.drives, strict=True)
    ]
    return jnp.stack(entries)


def _mixed(weights: Float[Array, " d"], states: Float[Array, "d ..."]) -> Array:
    """A weighted sum of a few states, in one pass; a product of matrices would be slower."""
    terms = [weight * state for weight, state in zip(weights, states, strict=True)]
    total: Array = functools.reduce(jnp.add, terms)
    return total


def _weighted(terms: list[_Term]) -> Float[Array, "p NK S"]:
    """Weighted sums of all arrays, in one product."""
    weights, arrays = zip(*terms, strict=True)
    return jnp.tensordot(jnp.concatenate(weights, axis=1), jnp.concatenate(arrays), axes=1)


def _after(span: Span, state: Array, added: Float[Array, "d r"], driving: Array) -> Array:
    """The state after a block of steps, whose entries are on the first axis."""
    return jnp.tensordot(span.carried, state, axes=1) + jnp.tensordot(added, driving, axes=1)


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
        number, blocks, propagator = at
        charges, carried = carry
        if listener is not None:
            progress.report(listener, number / n_cells)
        own, carried = runs.cell(number, blocks, charges, carried)
        return (own.placed(propagator, charges, number), carried), None

    charges = jnp.zeros((n_cells + 1, size, n_groups, columns, count), dtype)
    bridge = jnp.zeros((schedule.noise.carried.shape[-1], rows, count), dtype)
    order = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)),
        runs.batches.start(runs.flow.n_samples),
    )
    measured = jax.eval_shape(
        lambda f: runs.measure(f, jnp.zeros((n_groups, runs.flow.n_samples, count), dtype)),
        jnp.zeros((rows, count), dtype),
    )
    # One more slot, where the steps that are not recorded are put.
    record = jax.tree.map(
        lambda leaf: jnp.zeros((n_recorded + 1, *leaf.shape), leaf.dtype), measured
    )
    start = _Carry(bridge, jnp.zeros((rows, count), dtype), order, record)
    (_, end), _ = lax.scan(cell, (charges, start), (jnp.arange(n_cells), schedule, propagators))
    recorded: Measurement = jax.tree.map(lambda path: path[:-1], end.record)
    return recorded


#: Charges at the nodes, and what else is carried.
_Whole: TypeAlias = tuple[Float[Array, "nodes d T nK S"], _Carry]
