r"""The Gaussian process that the outputs follow under noise alone, at a few times.

Between nodes of time the process is read off the nodes, and the rest of the weights' noise moves it
in first order: outputs under noise are as rough as the weights are. If points and nodes are many,
the covariance is taken in its eigenbasis at the last time: the ``rank`` leading modes together at
all times, and each of the others by itself. The share that this leaves out is reported.

On a mesh of devices, the rows of covariances and modes are spread; the covariances of the leading
modes are whole on every device.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from ntkdp._backend import decompositions, devices
from ntkdp._backend.types import Array, Float, Key
from ntkdp.models import WeightLaw
from ntkdp.stochastic_flow._matrix_root import eigh
from ntkdp.stochastic_flow._two_time.flow import TwoTimeFlow
from ntkdp.stochastic_flow._two_time.weight_path import Nodes


class OutputProcess(NamedTuple):
    """The law of g at Q nodes over all points; a pytree.

    Attributes
    ----------
    modes
        ``(N, N)``, orthonormal columns, or None for the points themselves.
    mean
        ``(Q, N, K)`` in the modes.
    head, tail
        Lower triangular roots over nodes: ``(D r, D r)`` of the leading modes together, ``(N - r,
        D, D)`` of the others one by one. D is the number of nodes that are drawn.
    place
        ``(Q,)``, which of the drawn nodes each node is; -1 if it is none, and g is the mean.
    rest_head, rest_tail
        ``(M, r, r)`` and ``(M, N - r)``, roots of the covariance that noise of unit variance on the
        weights adds between nodes; M is zero if every step is a node.
    left_out
        Share of the covariance, in the Frobenius norm, that the form leaves out.
    """

    modes: Array | None
    mean: Array
    head: Array
    tail: Array
    place: Array
    rest_head: Array
    rest_tail: Array
    left_out: Array

    def draw(self, keys: Key[Array, " S"], n_outputs: int, mesh: Mesh | None) -> Array:
        """Samples at the nodes, ``(Q, N, S, K)``."""
        n_modes, drawn = self.mean.shape[1], self.tail.shape[1]
        rank = n_modes - self.tail.shape[0]
        shape = (drawn * n_modes, n_outputs)
        numbers = jax.vmap(lambda key: jax.random.normal(key, shape, self.mean.dtype))(keys)
        numbers = jnp.moveaxis(numbers, 0, 1)
        head_numbers, tail_numbers = numbers[: drawn * rank], numbers[drawn * rank :]
        head = jnp.einsum("ij,jsk->isk", self.head, head_numbers)
        head = head.reshape(drawn, rank, *numbers.shape[1:])
        tail_numbers = tail_numbers.reshape(n_modes - rank, drawn, *numbers.shape[1:])
        tail = jnp.einsum("mab,mbsk->amsk", self.tail, tail_numbers)
        noise = jnp.concatenate([head, tail], axis=1)
        # Place -1 is the row of zeros that is added here.
        noise = jnp.pad(noise, ((0, 1), (0, 0), (0, 0), (0, 0)))
        paths = self.mean[:, :, None] + noise[self.place]
        if self.modes is None:
            return paths

        def rows(modes: Array, paths: Array) -> Array:
            return devices.gathered(mesh, jnp.einsum("Nm,amsk->aNsk", modes, paths), axis=1)

        return devices.over_samples(rows, mesh, (0, None), None)(self.modes, paths)

    def rests(self, mesh: Mesh | None) -> Array:
        """Roots over the points of what noise adds between nodes, ``(M, N, N)``."""
        if self.modes is None:
            return self.rest_head
        rank = self.rest_head.shape[1]

        def rows(modes: Array, head: Array, tail: Array) -> Array:
            leading = jnp.einsum("Nr,arq->aNq", modes[:, :rank], head)
            return jnp.concatenate([leading, modes[:, rank:] * tail[:, None]], axis=2)

        over_devices = devices.over_samples(rows, mesh, (0, None, None), 1)
        return over_devices(self.modes, self.rest_head, self.rest_tail)


def output_process(
    flow: TwoTimeFlow,
    nodes: Nodes,
    scales: np.ndarray,
    between: np.ndarray,
    initial: Array | None,
    rank: int,
) -> OutputProcess:
    """The process at nodes, the first of which is the start.

    ``scales`` ``(R,)`` are the layers' variances for noise of unit variance, and ``between`` are
    nodes between which, one and the next, there are steps. If ``initial`` outputs are given the
    process is conditioned on them.
    """
    n_points = flow.points.shape[0]
    rank = min(rank, n_points)
    # Nodes of one law share their draw.
    rows = np.column_stack([nodes.covariance, nodes.kept]).astype(flow.points.dtype)
    numbers: dict[bytes, int] = {}
    place = np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in rows])
    count = len(numbers)
    first = np.array([np.flatnonzero(place == number)[0] for number in range(count)])
    laws = Laws.of(nodes, scales, flow.points.dtype)
    later, earlier = np.tril_indices(count)
    widest = jnp.argmax(laws.covariance.diagonal())
    laws, pairs, widest, ends = devices.everywhere(
        flow.mesh,
        (
            laws,
            (jnp.asarray(first[later]), jnp.asarray(first[earlier])),
            widest,
            jnp.asarray(between),
        ),
    )
    modes = None
    if rank < n_points:
        _, vectors = eigh(_covariance(flow, laws, widest), flow.mesh)
        modes = _signed(devices.spread(flow.mesh, vectors[:, ::-1]), flow.mesh)
    blocks = _blocks(flow, laws, pairs, modes, rank)
    rest = (
        jnp.zeros((0, rank, rank), flow.points.dtype),
        jnp.zeros((0, n_points - rank), flow.points.dtype),
    )
    if len(between):
        rest = _responses(flow, laws, ends, modes, rank)
    start = initial if initial is None or modes is None else _in_modes(modes, initial, flow.mesh)
    if flow.mesh is not None:
        # The rest is small, and computed once rather than by every device.
        blocks, rest, start = jax.tree.map(
            lambda leaf: jnp.asarray(devices.on_host(leaf)), (blocks, rest, start)
        )
    head, tail, squares = blocks
    # Each pair of different nodes stands for two blocks.
    total, kept = jnp.where(later > earlier, 2, 1) @ squares
    left_out = jnp.sqrt(jnp.maximum(1 - kept / total, 0))
    head = _symmetric(head, later, earlier, count)
    tail = _symmetric(tail[:, None, None], later, earlier, count)[:, :, 0, 0]

    mean = jnp.zeros((count, n_points, flow.n_outputs), head.dtype)
    if start is not None:
        head_mean, head = _given_first(head, start[:rank])
        shares = tail[1:, 0] / tail[0, 0]
        tail_mean = shares[:, :, None] * start[rank:]
        tail = tail[1:, 1:] - tail[1:, :1] * shares
        later_mean = jnp.concatenate([head_mean, tail_mean], axis=1)
        mean = jnp.concatenate([start[None].astype(head.dtype), later_mean])
    drawn = head.shape[0]
    joint = jnp.swapaxes(head, 1, 2).reshape(drawn * rank, drawn * rank)
    small = OutputProcess(
        modes=None,
        mean=mean[place],
        head=_roots(joint[None])[0],
        tail=_roots(jnp.moveaxis(tail, -1, 0)),
        place=jnp.asarray(place if initial is None else place - 1),
        rest_head=_roots(rest[0]),
        rest_tail=jnp.sqrt(jnp.maximum(rest[1], 0)),
        left_out=left_out,
    )
    return devices.everywhere(flow.mesh, small)._replace(modes=modes)


class Laws(NamedTuple):
    """Covariances of the weights between nodes, for all layers; a pytree."""

    covariance: Float[Array, "Q Q"]
    kept: Float[Array, " Q"]
    scales: Float[Array, " R"]

    @classmethod
    def of(cls, nodes: Nodes, scales: np.ndarray, dtype: DTypeLike) -> "Laws":
        """The laws of nodes in the precision of a flow."""
        return cls(*(jnp.asarray(part, dtype) for part in (*nodes[:2], scales)))

    def between(self, later: Array | int, earlier: Array | int) -> WeightLaw:
        """The law between two nodes."""
        pairs = ((later, later), (later, earlier), (earlier, earlier))
        first, both, second = (self.scales * self.covariance[pair] for pair in pairs)
        return WeightLaw(first, both, second, self.kept[later], self.kept[earlier])


@eqx.filter_jit
def _signed(modes: Float[Array, "N N"], mesh: Mesh | None) -> Float[Array, "N N"]:
    """Modes with signs, and so draws, that do not depend on how the eigenvectors were computed."""

    def with_signs(rows: Array) -> Array:
        own = devices.own_part(mesh, rows.shape[1]) + jnp.arange(rows.shape[0])
        # Few vectors are orthogonal to these weights.
        weights = jnp.cos(own.astype(rows.dtype))
        return jnp.where(devices.total(mesh, weights @ rows) < 0, -rows, rows)

    return devices.over_samples(with_signs, mesh, (0,), 0)(modes)


@eqx.filter_jit
def _in_modes(
    modes: Float[Array, "N N"], outputs: Float[Array, "N K"], mesh: Mesh | None
) -> Float[Array, "N K"]:
    def coordinates(modes: Array, outputs: Array) -> Array:
        return devices.total(mesh, modes.T @ outputs)

    return devices.over_samples(coordinates, mesh, (0, 0), None)(modes, outputs)


@eqx.filter_jit
def _covariance(flow: TwoTimeFlow, laws: Laws, node: Array) -> Array:
    return flow.covariance(laws.between(node, node))


@eqx.filter_jit
def _blocks(
    flow: TwoTimeFlow,
    laws: Laws,
    pairs: tuple[Array, Array],
    modes: Array | None,
    rank: int,
) -> tuple[Array, Array, Array]:
    """Covariances between pairs of nodes, of the leading modes and of the others, and norms."""

    def blocks_of(pair: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        covariance = flow.covariance(laws.between(*pair))
        head, tail = _of_modes(flow.mesh, covariance, modes, rank)
        kept = jnp.sum(head**2) + jnp.sum(tail**2)
        return head, tail, jnp.stack([jnp.sum(covariance**2), kept])

    blocks: tuple[Array, Array, Array] = lax.map(blocks_of, pairs)
    return blocks


@eqx.filter_jit
def _responses(
    flow: TwoTimeFlow, laws: Laws, nodes: Array, modes: Array | None, rank: int
) -> tuple[Array, Array]:
    """What noise of unit variance adds, as the mean of one node and the next; in the modes."""

    def at(node: Array) -> tuple[Array, Array]:
        response = flow.response(laws.between(node, node), laws.scales)
        return _of_modes(flow.mesh, response, modes, rank)

    found: tuple[Array, Array] = lax.map(at, nodes)
    means: tuple[Array, Array] = jax.tree.map(lambda each: (each[1:] + each[:-1]) / 2, found)
    return means


def _of_modes(
    mesh: Mesh | None, matrix: Array, modes: Array | None, rank: int
) -> tuple[Array, Array]:
    """A matrix over the points in the leading modes, and its diagonal in the others."""

    def whole(matrix: Array) -> tuple[Array, Array]:
        return devices.gathered(mesh, matrix), matrix[0, :0]

    def in_modes(matrix: Array, modes: Array) -> tuple[Array, Array]:
        turned = devices.product(mesh, matrix, modes)
        head = modes[:, :rank].T @ turned[:, :rank]
        tail = jnp.sum(modes[:, rank:] * turned[:, rank:], axis=0)
        return devices.total(mesh, (head, tail))

    if modes is None:
        return devices.over_samples(whole, mesh, (0,), None)(matrix)
    return devices.over_samples(in_modes, mesh, (0, 0), None)(matrix, modes)


def _symmetric(blocks: Array, later: np.ndarray, earlier: np.ndarray, count: int) -> Array:
    """Blocks of pairs, and their transposes, as ``(count, count, ...)``."""
    whole = jnp.zeros((count, count, *blocks.shape[1:]), blocks.dtype)
    whole = whole.at[earlier, later].set(jnp.swapaxes(blocks, 1, 2))
    return whole.at[later, earlier].set(blocks)


def _given_first(head: Array, start: Array) -> tuple[Array, Array]:
    """Means and covariance blocks of the later nodes, given the first node."""
    root = _roots(head[:1, 0])[0]

    def whitened(right: Array) -> Array:
        return jax.scipy.linalg.solve_triangular(root, right, lower=True)

    across = jax.vmap(whitened)(jnp.swapaxes(head[1:, 0], 1, 2))
    mean = jnp.einsum("amr,mk->ark", across, whitened(start))
    return mean, head[1:, 1:] - jnp.einsum("amr,bms->abrs", across, across)


def _roots(matrices: Array) -> Array:
    """Lower triangular roots of positive semi-definite matrices; the root of zero is zero."""
    if matrices.size == 0:
        return matrices
    largest = jnp.max(jnp.diagonal(matrices, axis1=1, axis2=2), axis=1)
    size = matrices.shape[-1]
    scale = jnp.where(largest > 0, largest, 1.0)[:, None, None]
    jitter = size * float(jnp.finfo(matrices.dtype).eps)
    eye = jnp.eye(size, dtype=matrices.dtype)[None]
    while jitter < 1e-2:
        # A matrix that is not positive definite gives NaN, and is tried again with more jitter.
        with jax.debug_nans(False):
            roots = decompositions.cholesky(matrices / scale + jitter * eye)
        if bool(jnp.all(jnp.isfinite(roots))):
            return jnp.where((largest > 0)[:, None, None], roots * jnp.sqrt(scale), 0.0)
        jitter *= 10
    raise ValueError(
        "the covariance of the outputs between times must be positive semi-definite up to "
        "rounding, and is not: use float64, or fewer nodes"
    )
