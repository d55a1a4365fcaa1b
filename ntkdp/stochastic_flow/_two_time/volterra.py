r"""Steps of a Volterra equation whose kernel is known between nodes of time.

.. math:: f_k = g_k + \sum_{j < k} h_{kj}\, \Theta(k, j)\, \varphi(f_j)

Steps are grouped in cells between nodes. A step lies at :math:`\lambda \in [0, 1]` between the two
nodes A and A + 1 of its cell, and the kernel is linear in :math:`\lambda`: with an earlier cell, it
is between the kernels of the nodes; in the cell itself, on the triangle of :math:`\Theta(A, A)`,
:math:`\Theta(A + 1, A)` and :math:`\Theta(A + 1, A + 1)`. So the past reduces to a charge at each
node, and the cell's own past to two sums: of the clipped gradients, and of these times
:math:`\lambda`. With a node at every step nothing is interpolated.

The filter h is a linear optimizer, which makes its steps in the charges: each is a state of C
numbers in place of one, of which the readers are read (`weight_path`).
"""

from typing import NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from ntkdp._backend import devices, progress
from ntkdp._backend.progress import Listener
from ntkdp._backend.types import Array, Float, Key, PRNGKeyArray, PyTree
from ntkdp.batches import Batches, Drawn
from ntkdp.stochastic_flow._linear_filter import LinearFilter
from ntkdp.stochastic_flow._two_time.flow import TwoTimeFlow
from ntkdp.stochastic_flow._two_time.gaussian_process import Laws, OutputProcess
from ntkdp.stochastic_flow._two_time.weight_path import Nodes, WeightPath
from ntkdp.trajectory import Measurement


class Steps(NamedTuple):
    """A grid of steps in cells between nodes; arrays are ``(M, p, ...)``, with a row for each cell.

    ``along`` is how far between its nodes a step is, and ``slot`` where its state is recorded.
    ``matrix`` and ``gain`` are those of the optimizer, ``response`` ``(readers, C)`` what the
    readers have by now of a state at the start of the cell. ``weights`` ``(readers, readers, W)``
    read the noise off W nodes, and ``rest`` and ``push`` move what is left of it, B numbers.
    ``before`` is the length of the step before.
    """

    number: Array
    along: Array
    slot: Array
    before: Array
    matrix: Array
    gain: Array
    response: Array
    weights: Array
    rest: Array
    push: Array


class Cells(NamedTuple):
    """What is known of each of M cells: its steps, and of the whole cell.

    ``matrix`` ``(M, C, C)`` is what the optimizer makes of a state over the cell, and ``window``
    ``(M,)`` the first of the nodes that its steps are read off.
    """

    steps: Steps
    matrix: Array
    window: Array


def grid(
    path: WeightPath,
    nodes: Nodes,
    rest: LinearFilter | None,
    recorded: np.ndarray,
    per_cell: int,
    dtype: DTypeLike,
    before: np.ndarray | None = None,
) -> Cells:
    """Steps of a path in cells of ``per_cell``; the last step is inside a cell.

    ``before`` are the lengths of the steps before each step, of the trapezoidal rule.
    """
    filter = path.filter
    steps, size = filter.steps, filter.size
    n_cells = steps // per_cell + 1
    number = np.arange(n_cells * per_cell).reshape(n_cells, per_cell)
    inside = np.minimum(number, steps)
    clock = path.clock
    ends = clock[np.minimum(per_cell * np.arange(n_cells + 1), steps)]
    span = np.diff(ends)[:, None]
    slot = np.full(steps + 1, len(recorded))
    slot[recorded] = np.arange(len(recorded))

    def filled(of_steps: np.ndarray, filling: np.ndarray | float) -> np.ndarray:
        """What steps after the last one have, too."""
        shape = (number.size - steps, *of_steps.shape[1:])
        return np.concatenate([of_steps, np.broadcast_to(filling, shape)])[number]

    matrix = filled(filter.matrices, np.eye(size))
    response = np.empty((n_cells, per_cell, len(path.readers), size))
    over_cell = np.broadcast_to(np.eye(size), (n_cells, size, size))
    for place in range(per_cell):
        response[:, place] = over_cell[:, list(path.readers)]
        over_cell = matrix[:, place] @ over_cell
    window, weights = _windows(nodes.weights[inside])
    if rest is None:
        rest = LinearFilter(np.zeros_like(filter.matrices), np.zeros_like(filter.drives))
    lengths = np.zeros(steps + 1) if before is None else before
    numbers = {
        "along": (clock[inside] - ends[:-1, None]) / np.where(span > 0, span, 1.0),
        "before": np.where(number <= steps, lengths[inside], 0.0),
        "matrix": matrix,
        "gain": filled(filter.drives, 0.0),
        "response": response,
        "weights": weights,
        "rest": filled(rest.matrices, 0.0),
        "push": filled(rest.drives, 0.0),
    }
    return Cells(
        Steps(
            number=jnp.asarray(number),
            slot=jnp.asarray(np.where(number <= steps, slot[inside], len(recorded))),
            **{name: jnp.asarray(value, dtype) for name, value in numbers.items()},
        ),
        jnp.asarray(over_cell, dtype),
        jnp.asarray(window),
    )


def _windows(
    weights: Float[np.ndarray, "M p readers Q"],
) -> tuple[np.ndarray, Float[np.ndarray, "M p readers readers W"]]:
    """For each cell the first of the few nodes that its steps are read off, and their weights."""
    n_cells, _, n_readers, n_all = weights.shape
    n_nodes = n_all // n_readers
    whole = weights.reshape(*weights.shape[:3], n_readers, n_nodes)
    used = np.any(whole != 0, axis=(1, 2, 3))
    first = np.argmax(used, axis=1)
    last = n_nodes - 1 - np.argmax(used[:, ::-1], axis=1)
    width = int(np.max(last - first)) + 1
    first = np.minimum(first, n_nodes - width)
    columns = first[:, None] + np.arange(width)
    rows = np.arange(n_cells)[:, None]
    # Advanced indices with slices between them come first.
    return first, np.moveaxis(whole[rows, :, :, :, columns], 1, -1)


class Cases(NamedTuple):
    """Clipping norms of runs, and their learning rates over that of the filter; each ``(S,)``."""

    clip_norms: Float[Array, " S"]
    rates: Float[Array, " S"]


class _Nodes(NamedTuple):
    """Kernels and paths at the two nodes of a cell, for each reader, and what is between them.

    A path is what the charges of all earlier cells add to the outputs, for each number of their
    state; ``window`` are outputs without charges at the nodes that steps are read off.
    """

    here: Float[Array, "V T N n"]
    across: Float[Array, "V T N n"]
    ahead: Float[Array, "V T N n"]
    path_here: Float[Array, "V C N D"]
    path_ahead: Float[Array, "V C N D"]
    window: Float[Array, "V W N D"]
    rest: Float[Array, "N N"] | None


class _Past(NamedTuple):
    """Sums over the cell's own steps, its noise, the last clipped gradients and the record.

    ``order`` is what the batches of each seed carry.
    """

    gradients: Float[Array, "C T n D"]
    moments: Float[Array, "C T n D"]
    noise: Float[Array, "B N D"]
    last: Float[Array, "T n D"]
    order: PyTree
    record: Measurement


#: The last node's kernels and paths, charges of all nodes, noise, last clipped gradients, order
#: of the batches, record.
_NodeCarry: TypeAlias = tuple[Array, Array, Array, Array, Array, PyTree, Measurement]


class _Runs(eqx.Module):
    """Steps of all seeds at once; the D columns are seeds times outputs."""

    flow: TwoTimeFlow
    laws: Laws
    keys: Key[Array, " S"]
    cases: Cases | None
    batches: Batches
    readers: tuple[int, ...] = eqx.field(static=True)
    trapezoidal: bool = eqx.field(static=True)
    outputs: bool = eqx.field(static=True)

    @property
    def n_nodes(self) -> int:
        """Nodes of each reader."""
        return self.laws.kept.shape[0] // len(self.readers)

    def kernels(self, later: Array) -> Float[Array, "V nodes T N n"]:
        """Kernels of one node with all nodes of the weights up to it, and zero beyond."""
        flow, n_nodes = self.flow, self.n_nodes
        zeros = jnp.zeros((flow.n_terms, flow.points.shape[0], flow.n_samples), flow.points.dtype)

        def with_node(pair: tuple[Array, Array]) -> Array:
            reader, earlier = pair
            kernel: Array = lax.cond(
                earlier <= later,
                lambda: flow.drive(self.laws.between(reader * n_nodes + later, earlier)),
                lambda: zeros,
            )
            return kernel

        reader, earlier = jnp.divmod(jnp.arange(n_nodes * len(self.readers)), n_nodes)
        kernels: Array = lax.map(with_node, (reader, earlier))
        return kernels.reshape(len(self.readers), n_nodes, *zeros.shape)

    def apply(self, kernels: Array, charges: Array) -> Float[Array, "N D"]:
        """Outputs that charges move: the sum over leading axes, terms and samples."""
        mesh = self.flow.mesh

        def rows(kernels: Array, charges: Array) -> Array:
            return devices.gathered(mesh, jnp.einsum("...tNn,...tnc->Nc", kernels, charges))

        over_devices = devices.over_samples(rows, mesh, (kernels.ndim - 2, None), None)
        return over_devices(kernels, charges)

    def paths(self, kernels: Array, charges: Array) -> Float[Array, "V C N D"]:
        """What each number of the charges' states adds to the outputs of each reader."""
        return jnp.stack(
            [
                jnp.stack([self.apply(row, charges[:, c]) for c in range(charges.shape[1])])
                for row in kernels
            ]
        )

    def along_rest(self, rest: Float[Array, "N N"], noise: Array) -> Float[Array, "N D"]:
        """Outputs that the noise between nodes adds."""
        mesh = self.flow.mesh

        def rows(rest: Array, noise: Array) -> Array:
            return devices.gathered(mesh, rest @ noise)

        return devices.over_samples(rows, mesh, (0, None), None)(rest, noise)

    def by_seed(self, columns: Array) -> Float[Array, "S rows K"]:
        split = columns.reshape(columns.shape[0], self.keys.size, self.flow.n_outputs)
        return jnp.moveaxis(split, 1, 0)

    def gradients(self, f: Array, kernel: Array, batch: Array | None) -> tuple[Array, Array]:
        """Clipped gradients ``(T, n, D)``, and the factors by seed."""
        n = self.flow.n_samples
        diagonal = devices.diagonal(self.flow.mesh, kernel)

        def of_seed(outputs: Array, case: Cases | None) -> tuple[Array, Array]:
            if case is None:
                return self.flow.clipped(outputs, diagonal)
            ruled = eqx.tree_at(lambda flow: flow.clipping.R, self.flow, case.clip_norms)
            clipped, factors = ruled.clipped(outputs, diagonal)
            return case.rates * clipped, factors

        clipped, factors = jax.vmap(of_seed)(self.by_seed(f[:n]), self.cases)
        if batch is not None:
            clipped = clipped * batch[:, None, :, None]
        return jnp.moveaxis(clipped, 0, 2).reshape(*clipped.shape[1:3], -1), factors

    def measure(self, f: Array, factors: Array) -> Measurement:
        return jax.vmap(lambda f, c: self.flow.measure(f, c, self.outputs))(
            self.by_seed(f), factors
        )

    def batch(
        self, keys: Key[Array, " S"], number: Array, order: PyTree
    ) -> tuple[Array | None, PyTree]:
        """Weights ``(S, n)`` of the samples of each seed's batch, and what is carried on."""
        n, dtype = self.flow.n_samples, self.flow.points.dtype

        def draw(key: PRNGKeyArray, order: PyTree) -> tuple[Drawn, PyTree]:
            return self.batches.draw(key, number, order, n)

        drawn, order = jax.vmap(draw)(keys, order)
        if drawn is None:
            return None, order
        return jax.vmap(lambda drawn: self.batches.weights(drawn, dtype))(drawn), order

    def read(self, number: int, nodes: _Nodes, past: _Past, at: Steps) -> Float[Array, "N D"]:
        """Outputs of a reader at a step."""
        along, reader = at.along, self.readers[number]
        f = jnp.einsum("vw,vwNd->Nd", at.weights[number], nodes.window)
        path = (1 - along) * nodes.path_here[number] + along * nodes.path_ahead[number]
        f = f + jnp.einsum("c,cNd->Nd", at.response[number], path)
        if nodes.rest is None:
            return f
        kernels = jnp.stack([nodes.here[number], nodes.across[number], nodes.ahead[number]])
        gradients, moments = past.gradients[reader], past.moments[reader]
        charges = [(1 - along) * gradients, along * gradients - moments, moments]
        f = f + self.apply(kernels, jnp.stack(charges))
        return f + self.along_rest(nodes.rest, past.noise[reader])

    def step(self, nodes: _Nodes, past: _Past, at: Steps) -> _Past:
        keys = jax.vmap(lambda key: jax.random.fold_in(key, at.number))(self.keys)
        f = self.read(0, nodes, past, at)
        own = (1 - at.along) * nodes.here[0] + at.along * nodes.ahead[0]
        batch, order = self.batch(keys, at.number, past.order)
        if self.trapezoidal:
            # The end of a step is on both sides of the equation: two rounds are second order.
            guess = f - at.before / 2 * self.apply(own, past.last)
            f = f - at.before / 2 * self.apply(own, self.gradients(guess, own, batch)[0])
        clipped, factors = self.gradients(f, own, batch)
        measured = f
        if len(self.readers) > 1:
            # Not at steps that are not recorded.
            is_recorded = at.slot < past.record.loss.shape[0] - 1
            measured = lax.cond(is_recorded, lambda: self.read(1, nodes, past, at), lambda: f)
        record = jax.tree.map(
            lambda path, now: path.at[at.slot].set(now),
            past.record,
            self.measure(measured, factors),
        )
        noise = past.noise
        if nodes.rest is not None:
            noise = self.move_noise(noise, at, keys)
        gain = at.gain[:, None, None, None]
        return _Past(
            gradients=_mixed(at.matrix, past.gradients) + gain * clipped,
            moments=_mixed(at.matrix, past.moments) + at.along * gain * clipped,
            noise=noise,
            last=clipped,
            order=order,
            record=record,
        )

    def move_noise(self, noise: Array, at: Steps, keys: Array) -> Array:
        """Make a step of the noise between nodes, ``(B, N, D)``."""
        shape = (noise.shape[1], self.flow.n_outputs)
        drawn = jax.vmap(
            lambda key: jax.random.normal(jax.random.fold_in(key, 1), shape, noise.dtype)
        )(keys)
        white = jnp.moveaxis(drawn, 0, 1).reshape(noise.shape[1:])
        return _mixed(at.rest, noise) + at.push[:, None, None] * white


def _mixed(matrix: Float[Array, "C C"], states: Array) -> Array:
    """States, whose numbers are along the first axis, after a step."""
    return jnp.tensordot(matrix, states, axes=1)


@eqx.filter_jit
def run(
    flow: TwoTimeFlow,
    process: OutputProcess,
    laws: Laws,
    cells: Cells,
    keys: Key[Array, " S"],
    cases: Cases | None,
    readers: tuple[int, ...],
    n_recorded: int,
    batches: Batches,
    trapezoidal: bool,
    outputs: bool,
    listener: Listener,
) -> Measurement:
    """Measurements ``(n_recorded, S)`` of runs over the grid of steps."""
    process_keys, step_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    runs = _Runs(flow, laws, step_keys, cases, batches, readers, trapezoidal, outputs)
    n_nodes, size = runs.n_nodes, cells.matrix.shape[-1]
    width = cells.steps.weights.shape[-1]
    undriven = process.draw(process_keys, flow.n_outputs, flow.mesh)
    undriven = undriven.reshape(len(readers), n_nodes, undriven.shape[1], -1)
    rests = process.rests(flow.mesh) if cells.steps.number.shape[1] > 1 else None

    def node(carry: _NodeCarry, place: Array) -> tuple[_NodeCarry, None]:
        here, path_here, charges, noise, last, order, record = carry
        if listener is not None:
            progress.report(listener, place / n_nodes)
        row = runs.kernels(place)

        def cell() -> tuple[Array, Array, Array, PyTree, Measurement]:
            """Make the steps between the node before and this one."""
            own, rest = jax.tree.map(lambda leaf: leaf[place - 1], (cells, rests))
            nodes = _Nodes(
                here=here,
                across=row[:, place - 1],
                ahead=row[:, place],
                path_here=path_here,
                path_ahead=runs.paths(row, charges),
                window=lax.dynamic_slice_in_dim(undriven, own.window, width, axis=1),
                rest=rest,
            )
            zeros = jnp.zeros((size, *last.shape), last.dtype)
            start = _Past(zeros, zeros, noise, last, order, record)
            past, _ = lax.scan(
                lambda past, at: (runs.step(nodes, past, at), None), start, own.steps
            )
            after = jnp.moveaxis(_mixed(own.matrix, jnp.moveaxis(charges, 1, 0)), 0, 1)
            charged = after.at[place - 1].add(past.gradients - past.moments)
            charged = charged.at[place].add(past.moments)
            return charged, past.noise, past.last, past.order, past.record

        # The first node has no cell; its kernel is computed here anyway, by the same program.
        moved = lax.cond(place > 0, cell, lambda: (charges, noise, last, order, record))
        return (row[:, place], runs.paths(row, moved[0]), *moved), None

    n_points, columns = undriven.shape[2:]
    kernel = jnp.zeros((len(readers), flow.n_terms, n_points, flow.n_samples), undriven.dtype)
    measured = jax.eval_shape(
        lambda f: runs.measure(f, runs.gradients(f, kernel[0], None)[1]), undriven[0, 0]
    )
    # One more slot, where the steps that are not recorded are put.
    record = jax.tree.map(
        lambda leaf: jnp.zeros((n_recorded + 1, *leaf.shape), leaf.dtype), measured
    )
    last = jnp.zeros((flow.n_terms, flow.n_samples, columns), undriven.dtype)
    charges = jnp.zeros((n_nodes, size, *last.shape), last.dtype)
    noise = jnp.zeros((cells.steps.push.shape[-1], n_points, columns), last.dtype)
    order = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (keys.size, *leaf.shape)),
        batches.start(flow.n_samples),
    )
    path = jnp.zeros((len(readers), size, n_points, columns), last.dtype)
    carry: _NodeCarry = (kernel, path, charges, noise, last, order, record)
    last_carry, _ = lax.scan(node, carry, jnp.arange(n_nodes))
    recorded: Measurement = jax.tree.map(lambda path: path[:-1], last_carry[-1])
    return recorded
