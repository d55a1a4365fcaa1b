r"""The Gaussian process that the outputs follow under noise alone, at a few times.

Between nodes of time the process is a straight line plus a Brownian bridge with the covariance of
the increment: outputs under noise are as rough as Brownian motion. If points and nodes are many,
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

from ntkdp._backend import devices
from ntkdp._backend.types import Array, Float, Key
from ntkdp.stochastic_flow._matrix_root import eigh
from ntkdp.stochastic_flow._two_time.flow import TwoTimeFlow


class OutputProcess(NamedTuple):
    """The law of g at nodes 0..M over all points; a pytree.

    Attributes
    ----------
    modes
        ``(N, N)``, orthonormal columns, or None for the points themselves.
    mean
        ``(M + 1, N, K)`` in the modes.
    head, tail
        Lower triangular roots over nodes: ``(D r, D r)`` of the leading modes together, ``(N - r,
        D, D)`` of the others one by one. D is the number of nodes that are drawn.
    place
        ``(M + 1,)``, which of the drawn nodes each node is; -1 if it is none, and g is the mean.
    bridge_head, bridge_tail
        ``(M, r, r)`` and ``(M, N - r)``, roots of the increments' covariances.
    left_out
        Share of the covariance, in the Frobenius norm, that the form leaves out.
    """

    modes: Array | None
    mean: Array
    head: Array
    tail: Array
    place: Array
    bridge_head: Array
    bridge_tail: Array
    left_out: Array

    def draw(self, keys: Key[Array, " S"], n_outputs: int, mesh: Mesh | None) -> Array:
        """Samples at the nodes, ``(M + 1, N, S, K)``."""
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

    def bridges(self, mesh: Mesh | None) -> Array:
        """Roots of the increments' covariances over the points, ``(M, N, N)``."""
        if self.modes is None:
            return self.bridge_head
        rank = self.bridge_head.shape[1]

        def rows(modes: Array, head: Array, tail: Array) -> Array:
            leading = jnp.einsum("Nr,arq->aNq", modes[:, :rank], head)
            return jnp.concatenate([leading, modes[:, rank:] * tail[:, None]], axis=2)

        over_devices = devices.over_samples(rows, mesh, (0, None, None), 1)
        return over_devices(self.modes, self.bridge_head, self.bridge_tail)


def output_process(
    flow: TwoTimeFlow, variances: np.ndarray, initial: Array | None, rank: int
) -> OutputProcess:
    """The process at nodes of the given variances ``(M + 1, R)``, non-decreasing.

    If ``initial`` outputs are given it is conditioned on them, and the first node must be without
    noise.
    """
    n_points = flow.points.shape[0]
    rank = min(rank, n_points)
    # Nodes without noise between them share their draw.
    distinct, place = np.unique(
        np.asarray(variances, flow.points.dtype), axis=0, return_inverse=True
    )
    place = place.reshape(-1)
    count = len(distinct)
    later, earlier = np.tril_indices(count)
    nodes = devices.everywhere(flow.mesh, jnp.asarray(distinct))
    pairs = devices.everywhere(flow.mesh, (jnp.asarray(later), jnp.asarray(earlier)))
    modes = None
    if rank < n_points:
        _, vectors = eigh(_covariance(flow, nodes[-1]), flow.mesh)
        modes = _signed(devices.spread(flow.mesh, vectors[:, ::-1]), flow.mesh)
    blocks = _blocks(flow, nodes, pairs, modes, rank)
    start = initial if initial is None or modes is None else _in_modes(modes, initial, flow.mesh)
    if flow.mesh is not None:
        # The rest is small, and computed once rather than by every device.
        blocks, start = jax.tree.map(
            lambda leaf: jnp.asarray(devices.on_host(leaf)), (blocks, start)
        )
    head, tail, squares = blocks
    # Each pair of different nodes stands for two blocks.
    total, kept = jnp.where(later > earlier, 2, 1) @ squares
    left_out = jnp.sqrt(jnp.maximum(1 - kept / total, 0))
    head = _symmetric(head, later, earlier, count)
    tail = _symmetric(tail[:, None, None], later, earlier, count)[:, :, 0, 0]

    increments = [
        over_nodes[1:, 1:] + over_nodes[:-1, :-1] - over_nodes[1:, :-1] - over_nodes[:-1, 1:]
        for over_nodes in (head, tail)
    ]
    steps = np.arange(count - 1)
    bridge_head = _roots(increments[0][steps, steps])
    bridge_tail = jnp.sqrt(jnp.maximum(increments[1][steps, steps], 0))
    # A cell between equal nodes has no bridge.
    within = np.where(np.diff(place) > 0, place[:-1], count - 1)
    bridge_head = jnp.concatenate([bridge_head, jnp.zeros_like(head[0, :1])])[within]
    bridge_tail = jnp.concatenate([bridge_tail, jnp.zeros_like(tail[0, :1])])[within]

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
        bridge_head=bridge_head,
        bridge_tail=bridge_tail,
        left_out=left_out,
    )
    return devices.everywhere(flow.mesh, small)._replace(modes=modes)


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
def _covariance(flow: TwoTimeFlow, v: Array) -> Array:
    return flow.covariance(v, v)


@eqx.filter_jit
def _blocks(
    flow: TwoTimeFlow,
    variances: Array,
    pairs: tuple[Array, Array],
    modes: Array | None,
    rank: int,
) -> tuple[Array, Array, Array]:
    """Covariances between pairs of nodes, of the leading modes and of the others, and norms."""
    mesh = flow.mesh

    def whole(covariance: Array) -> tuple[Array, Array]:
        return devices.gathered(mesh, covariance), covariance[0, :0]

    def in_modes(covariance: Array, modes: Array) -> tuple[Array, Array]:
        turned = devices.product(mesh, covariance, modes)
        head = modes[:, :rank].T @ turned[:, :rank]
        tail = jnp.sum(modes[:, rank:] * turned[:, rank:], axis=0)
        return devices.total(mesh, (head, tail))

    def blocks_of(pair: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        covariance = flow.covariance(variances[pair[0]], variances[pair[1]])
        if modes is None:
            head, tail = devices.over_samples(whole, mesh, (0,), None)(covariance)
        else:
            head, tail = devices.over_samples(in_modes, mesh, (0, 0), None)(covariance, modes)
        kept = jnp.sum(head**2) + jnp.sum(tail**2)
        return head, tail, jnp.stack([jnp.sum(covariance**2), kept])

    blocks: tuple[Array, Array, Array] = lax.map(blocks_of, pairs)
    return blocks


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
            roots = jnp.linalg.cholesky(matrices / scale + jitter * eye)
        if bool(jnp.all(jnp.isfinite(roots))):
            return jnp.where((largest > 0)[:, None, None], roots * jnp.sqrt(scale), 0.0)
        jitter *= 10
    raise ValueError(
        "the covariance of the outputs between times must be positive semi-definite up to "
        "rounding, and is not: use float64, or fewer nodes"
    )
