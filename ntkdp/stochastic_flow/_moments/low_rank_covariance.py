r"""Covariance of noisy outputs in the eigenbasis of the noise.

Everything that moves the outputs about their mean is in the range of the kernel: noise :math:`J z`,
sampling :math:`d_i = \sum_r H_r(\cdot, i)\varphi_{ir}`, and the drift. So beyond a few thousand
outputs the covariance is held as :math:`U S U^\top + \sum_k u_k s_k u_k^\top`. U are the leading
eigenvectors of the noise's covariance, and S evolves as the whole covariance does. The
:math:`u_k` are the other eigenvectors, and each :math:`s_k` evolves by itself: the correlations of
these with one another and with the leading ones are dropped. In trials with DP noise the error of
the loss's spread was less than their share of the variance. If sampling is the only noise, which is
far from diagonal in this basis, it was about the square root of that share. If the kernel means
:math:`\Theta \otimes I_K` a :math:`u_k` has K coordinates, and :math:`s_k` is a block. With the
features of a head all of this is computed from the factors, and there are as many :math:`u_k` as
features.

With a mesh, the rows of the modes are spread over the devices; S and the :math:`s_k` are whole on
each.
"""

from abc import abstractmethod
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from ntkdp._backend import devices
from ntkdp._backend.types import Array, Float
from ntkdp.gradient_flow import BlockKernel, Features, KernelFlow
from ntkdp.ntk import FeatureKernel
from ntkdp.stochastic_flow._matrix_root import eigh, square_root
from ntkdp.stochastic_flow._moments.covariance import CovarianceForm, Step, Tied
from ntkdp.stochastic_flow._moments.excess_variance import Links
from ntkdp.stochastic_flow._sharded_points import ShardedPoints, operator_of, points_of

#: Part of the trace of the noise that the leading eigenvectors hold by default,
_SHARE = 0.99
#: unless there would be more of them than this.
_MOST = 500


class Modes(eqx.Module):
    """Eigenvectors over points and outputs, and the operator's coordinates in them, ``drive``.

    A mode has i coordinates: one, or K. The methods are for a device's points, and sum over them.
    """

    vectors: eqx.AbstractVar[Array]
    drive: eqx.AbstractVar[Array]

    @abstractmethod
    def along(self, left: Array, g: Array) -> Float[Array, "a i"]:
        """Coordinates of the sum of a vector of each point."""

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

    def gradient(self, part: slice, g: Array) -> Float[Array, "a i"]:
        """Coordinates of a gradient over the points of ``part``."""
        return self.along(self.vectors[part], g)

    def summed(self, clipped: Float[Array, "n R K"]) -> Float[Array, "a i"]:
        """Coordinates of what the clipped gradients of all samples move."""
        return sum(
            (self.along(drive, clipped[:, r]) for r, drive in enumerate(self.drives)),
            start=jnp.zeros((), clipped.dtype),
        )

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

    def along(self, left: Array, g: Array) -> Float[Array, "a i"]:
        return jnp.einsum("na,nk->ak", left, g)

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

    def along(self, left: Array, g: Array) -> Float[Array, "a i"]:
        return jnp.einsum("nka,nk->a", left, g)[:, None]

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
    """Leading modes with all their correlations, and the others each by itself.

    The covariance is a pair, ``(a i, a i)`` of the leading modes and ``(b, i, i)`` of the others.
    """

    operator: Float[Array, "..."] | Features
    leading: Modes
    others: Modes
    leading_noise: Float[Array, " a"]
    others_noise: Float[Array, " b"]
    n_outputs: int = eqx.field(static=True)
    #: Coordinates of a mode, i.
    inner: int = eqx.field(static=True)
    points: ShardedPoints = eqx.field(static=True)

    def zero(self) -> tuple[Array, Array]:
        a, b, i = self.leading_noise.size, self.others_noise.size, self.inner
        dtype = self.operator.dtype
        return jnp.zeros((a * i, a * i), dtype), jnp.zeros((b, i, i), dtype)

    def joint_zero(self, size: int) -> tuple[Array, Array]:
        """Zero; both have two axes of the parts before those of the modes."""
        leading, others = (
            jnp.broadcast_to(zero, (size, size, *zero.shape)) for zero in self.zero()
        )
        return leading, others

    def part(self, joint: tuple[Array, Array], number: int) -> tuple[Array, Array]:
        leading, others = joint
        return leading[number, number], others[number, number]

    def own_blocks(self, covariance: tuple[Array, Array]) -> Array:
        def blocks(leading: Modes, others: Modes, S: Array, s: Array) -> Array:
            of_leading = leading.between(leading.vectors, S, leading.vectors)
            return of_leading + others.own_blocks(s)

        over_devices = self.points.by_point(blocks, (0, 0, None, None))
        return over_devices(self.leading, self.others, *covariance)

    def drift(self, clipped: Array) -> Array:
        def velocity(operator: Array | Features, clipped: Array) -> Array:
            by_group = jnp.moveaxis(clipped, 1, 0)
            if isinstance(operator, Features):
                return -operator.push(by_group)
            return -(operator @ by_group.reshape(-1, self.inner)).reshape(-1, self.n_outputs)

        return self.points.by_point(velocity, (0, None))(self.operator, clipped)

    def _noises(self) -> tuple[Array, Array]:
        """The noise of the leading modes together, and of each other mode."""
        eye = jnp.eye(self.inner, dtype=self.others_noise.dtype)
        together = jnp.diag(jnp.repeat(self.leading_noise, self.inner))
        return together, self.others_noise[:, None, None] * eye[None]

    def _parts(self, slope: Array, spread: Array) -> tuple[Array, Array, Array, Array]:
        """Linear map and gradient of the leading modes together, and of each other mode."""

        def own_terms(
            leading: Modes, others: Modes, slope: Array, spread: Array
        ) -> tuple[Array, Array, Array, Array]:
            parts = (
                leading.linear_map(slope, each=False),
                leading.spread(spread, each=False),
                others.linear_map(slope, each=True),
                others.spread(spread, each=True),
            )
            return devices.total(self.points.mesh, parts)

        over_devices = self.points.on_devices(own_terms, (0, 0, 0, 0), None)
        maps, moved, own_maps, own = over_devices(self.leading, self.others, slope, spread)
        size = self.leading_noise.size * self.inner
        return maps.reshape(size, size), moved.reshape(size, size), own_maps, own

    def step(
        self,
        joint: tuple[Array, Array],
        slope: Array,
        spread: Array,
        step: Step,
        tied: Tied | None = None,
    ) -> tuple[Array, Array]:
        maps, sampled, own_maps, own_sampled = self._parts(slope, spread)
        noise, own_noise = self._noises()
        S, s = joint
        if tied is not None:
            mean, own_mean = self._summed(tied.mean)
            sampled = sampled - tied.weight * _second_moment(mean, maps, S[0, 0])
            own_sampled = own_sampled - tied.weight * _second_moment(own_mean, own_maps, s[0, 0])
        return (
            _after_step(S, maps, sampled, noise, step),
            _after_step(s, own_maps, own_sampled, own_noise, step),
        )

    def velocity(
        self, covariance: tuple[Array, Array], slope: Array, spread: Array, rate: Array
    ) -> tuple[Array, Array]:
        maps, sampled, own_maps, own_sampled = self._parts(slope, spread)
        noise, own_noise = self._noises()

        def velocity_of(covariance: Array, maps: Array, diffusion: Array) -> Array:
            half = maps @ covariance
            return half + jnp.swapaxes(half, -1, -2) + rate * diffusion

        S, s = covariance
        return (
            velocity_of(S, maps, sampled + noise),
            velocity_of(s, own_maps, own_sampled + own_noise),
        )

    def _summed(self, clipped: Array) -> tuple[Array, Array]:
        """What clipped gradients move, in the leading modes together and in each other one."""

        def own_terms(leading: Modes, others: Modes, clipped: Array) -> tuple[Array, Array]:
            parts = leading.summed(clipped).reshape(-1), others.summed(clipped)
            return devices.total(self.points.mesh, parts)

        over_devices = self.points.on_devices(own_terms, (0, 0, 0), None)
        return over_devices(self.leading, self.others, clipped)

    def _expanded(self, test: bool, g: Array, W: Array) -> tuple[Array, Array, Array, Array]:
        """Gradient and Hessian of a sum over points, in the leading modes and in each other one."""

        def own_terms(
            leading: Modes, others: Modes, g: Array, W: Array
        ) -> tuple[Array, Array, Array, Array]:
            part = self.points.part(test)
            parts = (
                leading.gradient(part, g).reshape(-1),
                leading.hessian(part, W, each=False),
                others.gradient(part, g),
                others.hessian(part, W, each=True),
            )
            return devices.total(self.points.mesh, parts)

        over_devices = self.points.on_devices(own_terms, (0, 0, 0, 0), None)
        gradient, hessian, own_gradients, own_hessians = over_devices(
            self.leading, self.others, g, W
        )
        return gradient, hessian.reshape(len(gradient), -1), own_gradients, own_hessians

    def variance(self, covariance: tuple[Array, Array], test: bool, g: Array, W: Array) -> Array:
        S, s = covariance
        gradient, hessian, own_gradients, own_hessians = self._expanded(test, g, W)
        through, own = hessian @ S, own_hessians @ s
        return (
            gradient @ S @ gradient
            + jnp.einsum("ak,akl,al->", own_gradients, s, own_gradients)
            + 0.5 * (jnp.sum(through * through.T) + jnp.einsum("akl,alk->", own, own))
        )

    def links(self, covariance: tuple[Array, Array], test: bool, g: Array, W: Array) -> Links:
        """How each training sample affects the sum through the leading modes."""
        S, _ = covariance
        gradient, hessian, _, _ = self._expanded(test, g, W)
        mesh = self.points.mesh

        def own_links(leading: Modes, S: Array, gradient: Array, hessian: Array) -> Links:
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

        over_devices = self.points.on_devices(own_links, (0, None, None, None), None)
        return over_devices(self.leading, S, gradient, hessian)

    def matrix(self, covariance: tuple[Array, Array]) -> Array:
        def rows(leading: Modes, others: Modes, S: Array, s: Array) -> Array:
            kept = leading.coordinates(self.n_outputs)
            others_coordinates = others.coordinates(self.n_outputs)
            split = others_coordinates.reshape(len(others_coordinates), *s.shape[:2])
            spread = jnp.einsum("nak,akl->nal", split, s).reshape(others_coordinates.shape)
            return devices.outer(self.points.mesh, kept @ S, kept) + devices.outer(
                self.points.mesh, spread, others_coordinates
            )

        over_devices = self.points.on_devices(rows, (0, 0, None, None), 0)
        return self.points.in_order(over_devices(self.leading, self.others, *covariance))

    def truncation(self, covariance: tuple[Array, Array]) -> Array:
        kept = jnp.trace(covariance[0])
        dropped = jnp.sum(jnp.trace(covariance[1], axis1=1, axis2=2))
        total = kept + dropped
        return jnp.where(total > 0, dropped / jnp.where(total > 0, total, 1.0), 0.0)


def _second_moment(mean: Array, maps: Array, covariance: Array) -> Array:
    """Of a linear function of the outputs, with its mean."""
    return mean[..., :, None] * mean[..., None, :] + maps @ covariance @ jnp.swapaxes(maps, -1, -2)


def _after_step(joint: Array, maps: Array, sampled: Array, noise: Array, step: Step) -> Array:
    """With T = M x I - b x (A of the outputs): T joint T^T + b b^T x Q + e e^T x noise."""
    M, b, e = step
    moved = jnp.einsum("ce,ed...->cd...", M, joint)
    moved = moved - jnp.einsum("c,d...->cd...", b, maps @ joint[0])
    after = jnp.einsum("de,ce...->cd...", M, moved)
    back = moved[:, 0] @ jnp.swapaxes(maps, -1, -2)
    after = after - jnp.einsum("d,c...->cd...", b, back)
    after = after + jnp.einsum("c,d,...->cd...", b, b, sampled)
    after = after + jnp.einsum("c,d,...->cd...", e, e, noise)
    return (after + jnp.swapaxes(jnp.swapaxes(after, 0, 1), -1, -2)) / 2


class _Basis(NamedTuple):
    """What moves outputs, with its coordinates in an orthonormal basis, leading vectors first.

    ``values`` are the variances of noise, or what ranks the vectors if there is none.
    """

    operator: Array | Features
    values: Float[Array, " modes"]
    vectors: Array
    drive: Array


def low_rank(
    flow: KernelFlow, noise: Array | FeatureKernel | None, n_outputs: int, rank: int | None
) -> LowRank:
    """The form of this rank; by default, of the rank that holds 99% of the trace, up to 500.

    Without noise the basis is the eigenbasis of the kernel's square, as for sampling. Noise that is
    that of the weights of a head comes as features.
    """
    if isinstance(noise, FeatureKernel) or (noise is None and isinstance(flow.drive, Features)):
        basis = _basis_of_features(flow, noise)
    else:
        basis = _basis(flow, noise, n_outputs)
    operator, values, vectors, drive = basis
    per_mode = flow.drive.columns(n_outputs)
    if rank is None:
        held = jnp.cumsum(values) < _SHARE * jnp.sum(values)
        rank = min(_MOST, per_mode * (1 + int(jnp.sum(held))))
    kept = min(-(-rank // per_mode), values.size)
    noise_of_modes = jnp.zeros_like(values) if noise is None else values
    first, rest = slice(0, kept), slice(kept, None)
    kind = BlockModes if isinstance(flow.drive, BlockKernel) else SharedModes
    leading, others = (kind(vectors[..., part], drive[..., part]) for part in (first, rest))
    return LowRank(
        operator=operator,
        leading=leading,
        others=others,
        leading_noise=noise_of_modes[first],
        others_noise=noise_of_modes[rest],
        n_outputs=n_outputs,
        inner=per_mode,
        points=points_of(flow),
    )


def _basis(flow: KernelFlow, noise: Array | None, n_outputs: int) -> _Basis:
    """The eigenbasis of the noise's covariance, over all points."""
    points, mesh = points_of(flow), flow.mesh
    operator = operator_of(flow)
    n_groups, n = flow.diagonal.shape[:2]
    if noise is None:
        square = points.on_devices(lambda rows: devices.outer(mesh, rows, rows), (0,), 0)
        values, vectors = eigh(square(operator), mesh)
    else:
        values, vectors = eigh(points.in_devices_order(noise), mesh)
    values, vectors = jnp.maximum(values[::-1], 0), vectors[:, ::-1]
    per_point = (n_outputs,) if isinstance(flow.drive, BlockKernel) else ()

    def coordinates(operator: Array, vectors: Array) -> tuple[Array, Array]:
        """A device's rows of the vectors, and its samples' columns of the operator in them."""
        columns = operator.reshape(len(operator), n_groups, n, -1)
        columns = devices.columns(mesh, columns, axis=2)
        turned = jnp.moveaxis(columns, 0, 3).reshape(-1, len(columns))
        drive = devices.product(mesh, turned, vectors)
        drive = jnp.moveaxis(drive.reshape(n_groups, -1, *per_point, values.size), 0, 1)
        return vectors.reshape(-1, *per_point, values.size), drive

    vectors, drive = points.on_devices(coordinates, (0, 0), (0, 0))(operator, vectors)
    return _Basis(operator, values, vectors, drive)


def _basis_of_features(flow: KernelFlow, noise: FeatureKernel | None) -> _Basis:
    """The same from features alone: there are no more modes than features."""
    if flow.mesh is not None or not isinstance(flow.drive, Features):
        raise ValueError(
            "flow must have a FeatureKernel, on one device, for moments of a low rank in features; "
            "use stochastic_flow.ensemble"
        )
    samples, rows = flow.drive.samples, flow.drive.rows
    if isinstance(flow.test_drive, Features):
        rows = jnp.concatenate([rows, flow.test_drive.rows])
    operator = Features(rows / flow.data.divisor, samples)
    factor = noise.rows if noise is not None else operator.rows @ square_root(samples.T @ samples)
    vectors, roots, _ = jnp.linalg.svd(factor, full_matrices=False)
    drive = samples @ (operator.rows.T @ vectors)
    return _Basis(operator, roots**2, vectors, drive[:, None])
