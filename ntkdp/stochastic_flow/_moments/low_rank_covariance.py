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

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ntkdp._backend import devices
from ntkdp._backend.types import Array, Float
from ntkdp.gradient_flow import KernelFlow
from ntkdp.stochastic_flow import _sharded_points
from ntkdp.stochastic_flow._moments.covariance import CovarianceForm
from ntkdp.stochastic_flow._moments.excess_variance import Links
from ntkdp.stochastic_flow._output_noise import eigh
from ntkdp.stochastic_flow._sharded_points import FollowedPoints

#: Part of the trace of the noise that the leading eigenvectors hold, and the most of them.
_SHARE, _MOST = 0.99, 500


class Modes(eqx.Module):
    """Eigenvectors over points and outputs, ``(N, K, a)``, or ``(N, a)`` meaning ``(x) I_K``.

    ``drive`` holds the operator's coordinates in them, ``(n, R, ...)``. A mode has i coordinates:
    one, or K. The methods are for a device's points, and sum over them.
    """

    vectors: Array
    drive: Array

    def gradient(self, part: slice, g: Array) -> Float[Array, "a i"]:
        vectors = self.vectors[part]
        if vectors.ndim == 2:
            return jnp.einsum("na,nk->ak", vectors, g)
        return jnp.einsum("nka,nk->a", vectors, g)[:, None]

    def _pairs(self, left: Array, blocks: Array, right: Array, each: bool) -> Array:
        """Coordinates of block-diagonal matrices, ``(a, i, b, i)``; ``each``: of a mode alone."""
        if left.ndim == 2:
            return jnp.einsum("na,nkl,na->akl" if each else "na,nkl,nb->akbl", left, blocks, right)
        if each:
            return jnp.einsum("nka,nkl,nla->a", left, blocks, right)[:, None, None]
        return jnp.einsum("nka,nkl,nlb->ab", left, blocks, right)[:, None, :, None]

    def hessian(self, part: slice, W: Array, *, each: bool) -> Array:
        return self._pairs(self.vectors[part], W, self.vectors[part], each)

    @property
    def drives(self) -> list[Array]:
        """By group."""
        return [self.drive[:, r] for r in range(self.drive.shape[1])]

    def linear_map(self, slope: Array, *, each: bool) -> Array:
        vectors = self.vectors[: slope.shape[0]]
        groups = enumerate(self.drives)
        return -sum(
            (self._pairs(drive, slope[:, r], vectors, each) for r, drive in groups),
            start=jnp.zeros((), slope.dtype),
        )

    def spread(self, spread: Array, *, each: bool) -> Array:
        drives = list(enumerate(self.drives))
        return sum(
            (self._pairs(d, spread[:, r, :, s], e, each) for r, d in drives for s, e in drives),
            start=jnp.zeros((), spread.dtype),
        )

    def coordinates(self, n_outputs: int) -> Float[Array, "points_K modes"]:
        """Of every point's outputs in the modes."""
        if self.vectors.ndim == 3:
            n_points, _, n_modes = self.vectors.shape
            return self.vectors.reshape(n_points * n_outputs, n_modes)
        eye = jnp.eye(n_outputs, dtype=self.vectors.dtype)
        return jnp.kron(self.vectors, eye)


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
    points: FollowedPoints = eqx.field(static=True)

    @property
    def _inner(self) -> int:
        return self.n_outputs if self.leading.vectors.ndim == 2 else 1

    def zero(self) -> tuple[Array, Array]:
        a, b, i = self.leading_noise.size, self.others_noise.size, self._inner
        dtype = self.operator.dtype
        return jnp.zeros((a * i, a * i), dtype), jnp.zeros((b, i, i), dtype)

    def _split(self, S: Array) -> Array:
        return S.reshape(-1, self._inner, len(S) // self._inner, self._inner)

    def _between(self, left: Array, matrix: Array, right: Array) -> Array:
        """A matrix over the leading modes at each point, ``(n, K, K)``."""
        if left.ndim == 2:
            return jnp.einsum("na,akbl,nb->nkl", left, self._split(matrix), right)
        return jnp.einsum("nka,ab,nlb->nkl", left, matrix, right)

    def _at(self, left: Array, vector: Array) -> Array:
        """A vector over the leading modes at each point, ``(n, K)``."""
        if left.ndim == 2:
            return left @ vector.reshape(-1, self._inner)
        return left @ vector

    def own_blocks(self, covariance: tuple[Array, Array]) -> Array:
        def blocks(leading: Array, others: Array, S: Array, s: Array) -> Array:
            if leading.ndim == 2:
                own = jnp.einsum("na,akl->nkl", others**2, s)
            else:
                own = jnp.einsum("nka,a,nla->nkl", others, s[:, 0, 0], others)
            return self._between(leading, S, leading) + own

        vectors = self.leading.vectors, self.others.vectors
        return self.points.by_point(blocks, (0, 0, None, None), *vectors, *covariance)

    def drift(self, clipped: Array) -> Array:
        def velocity(operator: Array, clipped: Array) -> Array:
            weighted = jnp.moveaxis(clipped, 1, 0).reshape(-1, self._inner)
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
        size = self.leading_noise.size * self._inner
        noise = jnp.diag(jnp.repeat(self.leading_noise, self._inner))
        eye = jnp.eye(self._inner, dtype=slope.dtype)
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
                blocks = [self._between(drive, matrix, vectors) for drive in leading.drives]
                return jnp.stack(blocks, axis=1)

            def along(vector: Array) -> Array:
                return jnp.stack([self._at(drive, vector) for drive in leading.drives], axis=1)

            own = Links(
                pull=along(gradient),
                turn=against(turned),
                slope=self._at(vectors, S @ gradient),
                bend=self._between(vectors, S @ turned, vectors),
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
    shared = flow.diagonal.ndim == 2
    n_groups, n = flow.diagonal.shape[:2]
    if noise is None:
        square = points.on_devices(lambda rows: devices.outer(mesh, rows, rows), (0,), 0)
        values, vectors = eigh(square(operator), mesh)
    else:
        values, vectors = eigh(points.in_devices_order(noise), mesh)
    values, vectors = jnp.maximum(values[::-1], 0), vectors[:, ::-1]
    per_mode = n_outputs if shared else 1
    if rank is None:
        held = jnp.cumsum(values) < _SHARE * jnp.sum(values)
        rank = min(_MOST, per_mode * (1 + int(jnp.sum(held))))
    kept = min(-(-rank // per_mode), values.size)

    def coordinates(operator: Array, vectors: Array) -> tuple[Array, Array]:
        """A device's rows of the vectors, and its samples' columns of the operator in them."""
        columns = operator.reshape(len(operator), n_groups, n, -1)
        columns = devices.columns(mesh, columns, axis=2)
        turned = jnp.moveaxis(columns, 0, 3).reshape(-1, len(columns))
        drive = devices.product(mesh, turned, vectors)
        inner = () if shared else (n_outputs,)
        drive = jnp.moveaxis(drive.reshape(n_groups, -1, *inner, values.size), 0, 1)
        return vectors.reshape(-1, *inner, values.size), drive

    vectors, drive = points.on_devices(coordinates, (0, 0), (0, 0))(operator, vectors)
    noise_of_modes = jnp.zeros_like(values) if noise is None else values
    first, rest = slice(0, kept), slice(kept, None)
    leading, others = (Modes(vectors[..., part], drive[..., part]) for part in (first, rest))
    noises = noise_of_modes[first], noise_of_modes[rest]
    return LowRank(operator, leading, others, *noises, n_outputs, points)
