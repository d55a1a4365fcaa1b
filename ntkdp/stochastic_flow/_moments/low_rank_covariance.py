r"""Covariance of noisy outputs in the eigenbasis of the noise.

All that moves the outputs about their mean is in the range of the kernel: noise :math:`J z`,
sampling :math:`d_i = \sum_r H_r(\cdot, i)\varphi_{ir}`, and the drift. So beyond a few thousand
outputs the covariance is held as :math:`U S U^\top + \sum_k u_k s_k u_k^\top`, with U the leading
eigenvectors of the covariance of the noise, in which S is followed as the whole covariance is, and
:math:`u_k` the others, each of which is followed by itself: what is dropped are the correlations of
the latter, with one another and with the leading. In trials with DP noise the spread of the loss is
wrong by less than their share of the variance; where sampling is all the noise, which is far from
diagonal in this basis, by about the square root of it. If the kernel means
:math:`\Theta \otimes I_K` a :math:`u_k` has K coordinates, and :math:`s_k` is a block.

With a mesh, rows of the modes are over the devices, what is followed of them is whole on each.
"""

from abc import abstractmethod
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ntkdp._backend import devices
from ntkdp._backend.types import Array, Float
from ntkdp.gradient_flow import KernelFlow, SharedKernel
from ntkdp.stochastic_flow import _sharded_points
from ntkdp.stochastic_flow._moments.covariance import CovarianceForm
from ntkdp.stochastic_flow._moments.excess_variance import Links
from ntkdp.stochastic_flow._output_noise import eigh
from ntkdp.stochastic_flow._sharded_points import FollowedPoints

#: Part of the trace of the noise that the leading eigenvectors hold, and the most of them.
_SHARE, _MOST = 0.99, 500


class Modes(eqx.Module):
    """Eigenvectors over points and outputs, and the operator's coordinates in them, ``drive``.

    A mode has i coordinates: one, or K. The methods are for a device's points, and sum over them.
    """

    vectors: eqx.AbstractVar[Array]
    drive: eqx.AbstractVar[Array]

    @abstractmethod
    def gradient(self, part: slice, g: Array) -> Float[Array, "a i"]:
        """Coordinates of a gradient over the points of ``part``."""

    @abstractmethod
    def pairs(self, left: Array, blocks: Array, right: Array, each: bool) -> Array:
        """Coordinates of block-diagonal matrices, ``(a, i, b, i)``; ``each``: of a mode alone."""

    @abstractmethod
    def between(self, left: Array, matrix: Float[Array, "ai ai"], right: Array) -> Array:
        """A matrix over the modes at each point, ``(n, K, K)``."""

    @abstractmethod
    def at(self, left: Array, vector: Float[Array, " ai"]) -> Array:
        """A vector over the modes at each point, ``(n, K)``."""

    @abstractmethod
    def own_blocks(self, s: Float[Array, "a i i"]) -> Float[Array, "n K K"]:
        """Blocks of the points of modes that are followed each by itself."""

    @abstractmethod
    def coordinates(self, n_outputs: int) -> Float[Array, "points_K modes"]:
        """Coordinates of every point's outputs in the modes."""

    @property
    def drives(self) -> list[Array]:
        """The coordinates of the operator by group."""
        return [self.drive[:, r] for r in range(self.drive.shape[1])]

    def hessian(self, part: slice, W: Array, *, each: bool) -> Array:
        return self.pairs(self.vectors[part], W, self.vectors[part], each)

    def linear_map(self, slope: Array, *, each: bool) -> Array:
        vectors = self.vectors[: slope.shape[0]]
        groups = enumerate(self.drives)
        return -sum(
            (self.pairs(drive, slope[:, r], vectors, each) for r, drive in groups),
            start=jnp.zeros((), slope.dtype),
        )

    def spread(self, spread: Array, *, each: bool) -> Array:
        drives = list(enumerate(self.drives))
        return sum(
            (self.pairs(d, spread[:, r, :, s], e, each) for r, d in drives for s, e in drives),
            start=jnp.zeros((), spread.dtype),
        )


class SharedModes(Modes):
    """Modes ``(N, a)`` that mean ``(x) I_K``, with a drive ``(n, R, a)``."""

    vectors: Float[Array, "N a"]
    drive: Float[Array, "n R a"]

    def gradient(self, part: slice, g: Array) -> Float[Array, "a i"]:
        return jnp.einsum("na,nk->ak", self.vectors[part], g)

    def pairs(self, left: Array, blocks: Array, right: Array, each: bool) -> Array:
        return jnp.einsum("na,nkl,na->akl" if each else "na,nkl,nb->akbl", left, blocks, right)

    def between(self, left: Array, matrix: Float[Array, "ai ai"], right: Array) -> Array:
        n_modes = left.shape[1]
        split = matrix.reshape(n_modes, -1, n_modes, len(matrix) // n_modes)
        return jnp.einsum("na,akbl,nb->nkl", left, split, right)

    def at(self, left: Array, vector: Float[Array, " ai"]) -> Array:
        return left @ vector.reshape(left.shape[1], -1)

    def own_blocks(self, s: Float[Array, "a i i"]) -> Float[Array, "n K K"]:
        return jnp.einsum("na,akl->nkl", self.vectors**2, s)

    def coordinates(self, n_outputs: int) -> Float[Array, "points_K modes"]:
        return jnp.kron(self.vectors, jnp.eye(n_outputs, dtype=self.vectors.dtype))


class BlockModes(Modes):
    """Modes ``(N, K, a)`` over points and outputs, with a drive ``(n, R, K, a)``."""

    vectors: Float[Array, "N K a"]
    drive: Float[Array, "n R K a"]

    def gradient(self, part: slice, g: Array) -> Float[Array, "a i"]:
        return jnp.einsum("nka,nk->a", self.vectors[part], g)[:, None]

    def pairs(self, left: Array, blocks: Array, right: Array, each: bool) -> Array:
        if each:
            return jnp.einsum("nka,nkl,nla->a", left, blocks, right)[:, None, None]
        return jnp.einsum("nka,nkl,nlb->ab", left, blocks, right)[:, None, :, None]

    def between(self, left: Array, matrix: Float[Array, "ai ai"], right: Array) -> Array:
        return jnp.einsum("nka,ab,nlb->nkl", left, matrix, right)

    def at(self, left: Array, vector: Float[Array, " ai"]) -> Array:
        return left @ vector

    def own_blocks(self, s: Float[Array, "a i i"]) -> Float[Array, "n K K"]:
        return jnp.einsum("nka,a,nla->nkl", self.vectors, s[:, 0, 0], self.vectors)

    def coordinates(self, n_outputs: int) -> Float[Array, "points_K modes"]:
        n_points, _, n_modes = self.vectors.shape
        return self.vectors.reshape(n_points * n_outputs, n_modes)


class LowRank(CovarianceForm):
    """Leading modes with all their correlations, the others each by itself.

    The state is a pair, ``(a, i, a, i)`` and ``(b, i, i)``.
    """

    operator: Float[Array, "..."]
    leading: Modes
    others: Modes
    leading_noise: Float[Array, " a"]
    others_noise: Float[Array, " b"]
    n_outputs: int = eqx.field(static=True)
    #: Coordinates of a mode, i.
    inner: int = eqx.field(static=True)
    points: FollowedPoints = eqx.field(static=True)

    def zero(self) -> tuple[Array, Array]:
        a, b, i = self.leading_noise.size, self.others_noise.size, self.inner
        dtype = self.operator.dtype
        return jnp.zeros((a * i, a * i), dtype), jnp.zeros((b, i, i), dtype)

    def own_blocks(self, covariance: tuple[Array, Array]) -> Array:
        def blocks(leading: Modes, others: Modes, S: Array, s: Array) -> Array:
            of_leading = leading.between(leading.vectors, S, leading.vectors)
            return of_leading + others.own_blocks(s)

        modes = self.leading, self.others
        return self.points.by_point(blocks, (0, 0, None, None), *modes, *covariance)

    def drift(self, clipped: Array) -> Array:
        def velocity(operator: Array, clipped: Array) -> Array:
            weighted = jnp.moveaxis(clipped, 1, 0).reshape(-1, self.inner)
            return -(operator @ weighted).reshape(-1, self.n_outputs)

        return self.points.by_point(velocity, (0, None), self.operator, clipped)

    def _parts(self, slope: Array, spread: Array) -> tuple[Array, Array, Array, Array]:
        """Linear map and diffusion of the leading modes, and of each other."""

        def of_device(leading: Modes, others: Modes, slope: Array, spread: Array) -> Any:
            parts = [
                modes.linear_map(slope, each=each)
                if what is slope
                else modes.spread(what, each=each)
                for modes, each in ((leading, False), (others, True))
                for what in (slope, spread)
            ]
            return devices.total(self.points.mesh, tuple(parts))

        maps, moved, own_maps, own = self.points.on_devices(of_device, (0, 0, 0, 0), None)(
            self.leading, self.others, slope, spread
        )
        size = self.leading_noise.size * self.inner
        noise = jnp.diag(jnp.repeat(self.leading_noise, self.inner))
        eye = jnp.eye(self.inner, dtype=slope.dtype)
        own = own + self.others_noise[:, None, None] * eye[None]
        return maps.reshape(size, size), moved.reshape(size, size) + noise, own_maps, own

    def step(
        self, covariance: tuple[Array, Array], slope: Array, spread: Array, rate: Array
    ) -> tuple[Array, Array]:
        maps, diffusion, own_maps, own_diffusion = self._parts(slope, spread)

        def one(covariance: Array, maps: Array, diffusion: Array) -> Array:
            eye = jnp.broadcast_to(jnp.eye(maps.shape[-1], dtype=maps.dtype), maps.shape)
            moved = eye + rate * maps
            after = moved @ covariance @ jnp.swapaxes(moved, -1, -2) + rate**2 * diffusion
            return (after + jnp.swapaxes(after, -1, -2)) / 2

        S, s = covariance
        return one(S, maps, diffusion), one(s, own_maps, own_diffusion)

    def velocity(
        self, covariance: tuple[Array, Array], slope: Array, spread: Array, rate: Array
    ) -> tuple[Array, Array]:
        maps, diffusion, own_maps, own_diffusion = self._parts(slope, spread)

        def one(covariance: Array, maps: Array, diffusion: Array) -> Array:
            half = maps @ covariance
            return half + jnp.swapaxes(half, -1, -2) + rate * diffusion

        S, s = covariance
        return one(S, maps, diffusion), one(s, own_maps, own_diffusion)

    def _expanded(self, test: bool, g: Array, W: Array) -> tuple[Array, Array, Array, Array]:
        """Gradient and Hessian of a sum over points, in the leading modes and in each other."""

        def of_device(leading: Modes, others: Modes, g: Array, W: Array) -> Any:
            part = self.points.part(test)
            parts = (
                leading.gradient(part, g).reshape(-1),
                leading.hessian(part, W, each=False),
                others.gradient(part, g),
                others.hessian(part, W, each=True),
            )
            return devices.total(self.points.mesh, parts)

        gradient, hessian, *own = self.points.on_devices(of_device, (0, 0, 0, 0), None)(
            self.leading, self.others, g, W
        )
        return gradient, hessian.reshape(len(gradient), -1), own[0], own[1]

    def variance(self, covariance: tuple[Array, Array], test: bool, g: Array, W: Array) -> Array:
        S, s = covariance
        of_leading, hessian, of_others, own_hessian = self._expanded(test, g, W)
        through, own = hessian @ S, own_hessian @ s
        return (
            of_leading @ S @ of_leading
            + jnp.einsum("ak,akl,al->", of_others, s, of_others)
            + 0.5 * (jnp.sum(through * through.T) + jnp.einsum("akl,alk->", own, own))
        )

    def links(self, covariance: tuple[Array, Array], test: bool, g: Array, W: Array) -> Links:
        """Of the leading modes."""
        S, _ = covariance
        gradient, hessian, _, _ = self._expanded(test, g, W)
        mesh = self.points.mesh

        def of_device(leading: Modes, S: Array, gradient: Array, hessian: Array) -> Links:
            turned = hessian @ S
            vectors = leading.vectors[: self.points.own_samples]

            def against(matrix: Array) -> Array:
                blocks = [leading.between(drive, matrix, vectors) for drive in leading.drives]
                return jnp.stack(blocks, axis=1)

            def along(vector: Array) -> Array:
                return jnp.stack([leading.at(drive, vector) for drive in leading.drives], axis=1)

            own = Links(
                pull=along(gradient),
                turn=against(turned),
                slope=leading.at(vectors, S @ gradient),
                bend=leading.between(vectors, S @ turned, vectors),
                far_pull=along(turned @ gradient),
                far_turn=against(turned @ turned),
            )
            whole: Links = jax.tree.map(lambda part: devices.gathered(mesh, part), own)
            return whole

        over_devices = self.points.on_devices(of_device, (0, None, None, None), None)
        links: Links = over_devices(self.leading, S, gradient, hessian)
        return links

    def matrix(self, covariance: tuple[Array, Array]) -> Array:
        def rows(leading: Modes, others: Modes, S: Array, s: Array) -> Array:
            of_leading = leading.coordinates(self.n_outputs)
            of_others = others.coordinates(self.n_outputs)
            split = of_others.reshape(len(of_others), *s.shape[:2])
            spread = jnp.einsum("nak,akl->nal", split, s).reshape(of_others.shape)
            return devices.outer(self.points.mesh, of_leading @ S, of_leading) + devices.outer(
                self.points.mesh, spread, of_others
            )

        found = self.points.on_devices(rows, (0, 0, None, None), 0)(
            self.leading, self.others, *covariance
        )
        return self.points.in_order(found)

    def truncation(self, covariance: tuple[Array, Array]) -> Array:
        kept = jnp.trace(covariance[0])
        dropped = jnp.sum(jnp.trace(covariance[1], axis1=1, axis2=2))
        total = kept + dropped
        return jnp.where(total > 0, dropped / jnp.where(total > 0, total, 1.0), 0.0)


def low_rank(flow: KernelFlow, noise: Array | None, n_outputs: int, rank: int | None) -> LowRank:
    """Of this rank, by default what holds 99% of the trace, up to 500.

    Without noise the basis is that of the kernel's square, as sampling has it.
    """
    points, mesh = _sharded_points.of_flow(flow), flow.mesh
    operator = _sharded_points.operator(flow)
    n_groups, n = flow.diagonal.shape[:2]
    if noise is None:
        square = points.on_devices(lambda rows: devices.outer(mesh, rows, rows), (0,), 0)
        values, vectors = eigh(square(operator), mesh)
    else:
        values, vectors = eigh(points.in_devices_order(noise), mesh)
    values, vectors = jnp.maximum(values[::-1], 0), vectors[:, ::-1]
    per_mode = flow.drive.columns(n_outputs)
    if rank is None:
        held = jnp.cumsum(values) < _SHARE * jnp.sum(values)
        rank = min(_MOST, per_mode * (1 + int(jnp.sum(held))))
    kept = min(-(-rank // per_mode), values.size)

    shared = isinstance(flow.drive, SharedKernel)
    per_point = () if shared else (n_outputs,)

    def coordinates(operator: Array, vectors: Array) -> tuple[Array, Array]:
        """A device's rows of the vectors, and its samples' columns of the operator in them."""
        columns = operator.reshape(len(operator), n_groups, n, -1)
        columns = devices.columns(mesh, columns, axis=2)
        turned = jnp.moveaxis(columns, 0, 3).reshape(-1, len(columns))
        drive = devices.product(mesh, turned, vectors)
        drive = jnp.moveaxis(drive.reshape(n_groups, -1, *per_point, values.size), 0, 1)
        return vectors.reshape(-1, *per_point, values.size), drive

    vectors, drive = points.on_devices(coordinates, (0, 0), (0, 0))(operator, vectors)
    noise_of_modes = jnp.zeros_like(values) if noise is None else values
    first, rest = slice(0, kept), slice(kept, None)
    kind = SharedModes if shared else BlockModes
    leading, others = (kind(vectors[..., part], drive[..., part]) for part in (first, rest))
    noises = noise_of_modes[first], noise_of_modes[rest]
    return LowRank(operator, leading, others, *noises, n_outputs, per_mode, points)
