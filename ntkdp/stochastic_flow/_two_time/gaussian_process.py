r"""The Gaussian process of the outputs that noise alone draws, at a few times.

Between nodes of time the process is a straight line and a Brownian bridge, whose covariance is that
of the increment: outputs under noise are as rough as Brownian motion. Where points and nodes are
many, the covariance is taken in its eigenbasis at the last time: the ``rank`` leading modes with
each other at all times, the others each for itself. What this leaves out is reported.

On a mesh of devices, rows of covariances and modes are spread; what is of the size of the leading
modes at all times is on every device.
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
from ntkdp.stochastic_flow._output_noise import eigh
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
        D, D)`` of the others one by one. The D nodes drawn are expanded by ``place``.
    place
        ``(M + 1,)``, which of the drawn nodes each node is; -1 for none, where g is the mean.
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
        of_head, of_tail = numbers[: drawn * rank], numbers[drawn * rank :]
        head = jnp.einsum("ij,jsk->isk", self.head, of_head)
        head = head.reshape(drawn, rank, *numbers.shape[1:])
        of_tail = of_tail.reshape(n_modes - rank, drawn, *numbers.shape[1:])
        noise = jnp.concatenate([head, jnp.einsum("mab,mbsk->amsk", self.tail, of_tail)], axis=1)
        # Place -1 finds the zeros.
        noise = jnp.pad(noise, ((0, 1), (0, 0), (0, 0), (0, 0)))
        paths = self.mean[:, :, None] + noise[self.place]
        if self.modes is None:
            return paths

        def of_rows(modes: Array, paths: Array) -> Array:
            return devices.gathered(mesh, jnp.einsum("Nm,amsk->aNsk", modes, paths), axis=1)

        outputs: Array = devices.over_samples(of_rows, mesh, (0, None), None)(self.modes, paths)
        return outputs

    def bridges(self, mesh: Mesh | None) -> Array:
        """Roots of the increments' covariances over the points, ``(M, N, N)``."""
        if self.modes is None:
            return self.bridge_head
        rank = self.bridge_head.shape[1]

        def of_rows(modes: Array, head: Array, tail: Array) -> Array:
            leading = jnp.einsum("Nr,arq->aNq", modes[:, :rank], head)
            return jnp.concatenate([leading, modes[:, rank:] * tail[:, None]], axis=2)

        over_devices = devices.over_samples(of_rows, mesh, (0, None, None), 1)
        roots: Array = over_devices(self.modes, self.bridge_head, self.bridge_tail)
        return roots


def output_process(
    flow: TwoTimeFlow, variances: np.ndarray, initial: Array | None, rank: int
) -> OutputProcess:
    """The process at nodes of the given variances ``(M + 1, R)``, non-decreasing.

    With ``initial`` outputs it is conditioned on them; the first node must have no noise.
    """
    n_points = flow.points.shape[0]
    rank = min(rank, n_points)
    # Nodes without noise between them share what is drawn.
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
    found = _blocks(flow, nodes, pairs, modes, rank)
    start = initial if initial is None or modes is None else _in_modes(modes, initial, flow.mesh)
    if flow.mesh is not None:
        # What follows is small, and done once rather than by every device.
        found, start = jax.tree.map(lambda leaf: jnp.asarray(devices.on_host(leaf)), (found, start))
    head, tail, squares = found
    # Each pair of different nodes stands for two blocks.
    total, kept = jnp.where(later > earlier, 2, 1) @ squares
    left_out = jnp.sqrt(jnp.maximum(1 - kept / total, 0))
    head = _symmetric(head, later, earlier, count)
    tail = _symmetric(tail[:, None, None], later, earlier, count)[:, :, 0, 0]

    increments = [
        blocks[1:, 1:] + blocks[:-1, :-1] - blocks[1:, :-1] - blocks[:-1, 1:]
        for blocks in (head, tail)
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
        of_head, head = _given(head, start[:rank])
        shares = tail[1:, 0] / tail[0, 0]
        of_tail = shares[:, :, None] * start[rank:]
        tail = tail[1:, 1:] - tail[1:, :1] * shares
        later_mean = jnp.concatenate([of_head, of_tail], axis=1)
        mean = jnp.concatenate([start[None].astype(head.dtype), later_mean])
    drawn = head.shape[0]
    joint = jnp.swapaxes(head, 1, 2).reshape(drawn * rank, drawn * rank)
    small = (
        mean[place],
        _roots(joint[None])[0],
        _roots(jnp.moveaxis(tail, -1, 0)),
        jnp.asarray(place if initial is None else place - 1),
        bridge_head,
        bridge_tail,
        left_out,
    )
    return OutputProcess(modes, *devices.everywhere(flow.mesh, small))


@eqx.filter_jit
def _signed(modes: Float[Array, "N N"], mesh: Mesh | None) -> Float[Array, "N N"]:
    """Modes whose signs, and with them what is drawn, do not depend on who found them."""

    def of_rows(rows: Array) -> Array:
        own = devices.own_part(mesh, rows.shape[1]) + jnp.arange(rows.shape[0])
        # Hardly a vector is orthogonal to these.
        weights = jnp.cos(own.astype(rows.dtype))
        return jnp.where(devices.total(mesh, weights @ rows) < 0, -rows, rows)

    signed: Array = devices.over_samples(of_rows, mesh, (0,), 0)(modes)
    return signed


@eqx.filter_jit
def _in_modes(
    modes: Float[Array, "N N"], outputs: Float[Array, "N K"], mesh: Mesh | None
) -> Float[Array, "N K"]:
    def of_rows(modes: Array, outputs: Array) -> Array:
        summed: Array = devices.total(mesh, modes.T @ outputs)
        return summed

    turned: Array = devices.over_samples(of_rows, mesh, (0, 0), None)(modes, outputs)
    return turned


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
    """Covariances between pairs of nodes: of the leading modes, of the others, and norms."""

    mesh = flow.mesh

    def whole(covariance: Array) -> tuple[Array, Array]:
        return devices.gathered(mesh, covariance), covariance[0, :0]

    def in_modes(covariance: Array, modes: Array) -> tuple[Array, Array]:
        turned = devices.product(mesh, covariance, modes)
        head = modes[:, :rank].T @ turned[:, :rank]
        tail = jnp.sum(modes[:, rank:] * turned[:, rank:], axis=0)
        summed: tuple[Array, Array] = devices.total(mesh, (head, tail))
        return summed

    def of_pair(pair: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        covariance = flow.covariance(variances[pair[0]], variances[pair[1]])
        if modes is None:
            head, tail = devices.over_samples(whole, mesh, (0,), None)(covariance)
        else:
            head, tail = devices.over_samples(in_modes, mesh, (0, 0), None)(covariance, modes)
        kept = jnp.sum(head**2) + jnp.sum(tail**2)
        return head, tail, jnp.stack([jnp.sum(covariance**2), kept])

    return lax.map(of_pair, pairs)


def _symmetric(blocks: Array, later: np.ndarray, earlier: np.ndarray, count: int) -> Array:
    """Blocks of pairs as ``(count, count, ...)``, the transposed ones too."""
    whole = jnp.zeros((count, count, *blocks.shape[1:]), blocks.dtype)
    whole = whole.at[earlier, later].set(jnp.swapaxes(blocks, 1, 2))
    return whole.at[later, earlier].set(blocks)


def _given(head: Array, start: Array) -> tuple[Array, Array]:
    """Means and covariance blocks of the later nodes, given the first."""
    root = _roots(head[:1, 0])[0]

    def whitened(right: Array) -> Array:
        return jax.scipy.linalg.solve_triangular(root, right, lower=True)

    across = jax.vmap(whitened)(jnp.swapaxes(head[1:, 0], 1, 2))
    mean = jnp.einsum("amr,mk->ark", across, whitened(start))
    return mean, head[1:, 1:] - jnp.einsum("amr,bms->abrs", across, across)


def _roots(matrices: Array) -> Array:
    """Lower triangular roots of positive semi-definite matrices; zero for zero."""
    if matrices.size == 0:
        return matrices
    largest = jnp.max(jnp.diagonal(matrices, axis1=1, axis2=2), axis=1)
    size = matrices.shape[-1]
    scale = jnp.where(largest > 0, largest, 1.0)[:, None, None]
    jitter = size * float(jnp.finfo(matrices.dtype).eps)
    eye = jnp.eye(size, dtype=matrices.dtype)[None]
    while jitter < 1e-2:
        # A matrix that is not positive definite has a root of NaN, and is tried again.
        with jax.debug_nans(False):
            found = jnp.linalg.cholesky(matrices / scale + jitter * eye)
        if bool(jnp.all(jnp.isfinite(found))):
            return jnp.where((largest > 0)[:, None, None], found * jnp.sqrt(scale), 0.0)
        jitter *= 10
    raise ValueError(
        "the covariance of the outputs between times must be positive semi-definite, and is not "
        "to rounding: use float64, or fewer nodes"
    )
