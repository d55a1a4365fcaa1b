r"""Covariance of the outputs, whole or in the eigenbasis of the noise.

All that moves the outputs about their mean is in the range of the kernel: noise :math:`J z`,
sampling :math:`d_i = \sum_r H_r(\cdot, i)\varphi_{ir}`, and the drift. So beyond a few thousand
outputs the covariance is held as :math:`U S U^\top + \sum_k u_k s_k u_k^\top`, with U the leading
eigenvectors of the covariance of the noise, in which S is followed as the whole covariance is, and
:math:`u_k` the others, each of which is followed by itself: what is dropped are the correlations of
the latter, with one another and with the leading. In trials with DP noise the spread of the loss is
wrong by less than their share of the variance; where sampling is all the noise, which is far from
diagonal in this basis, by about the square root of it. If the kernel means
:math:`\Theta \otimes I_K` a :math:`u_k` has K coordinates, and :math:`s_k` is a block.
"""

from abc import abstractmethod
from typing import Any

import equinox as eqx
import jax.numpy as jnp

from ntkdp._excess_variance import Links
from ntkdp._kernel_flow import KernelFlow
from ntkdp._types import Array, Float

#: Part of the trace of the noise that the leading eigenvectors hold, and the most of them.
_SHARE, _MOST = 0.99, 500


class CovarianceForm(eqx.Module):
    """How the covariance of all points is represented: a pytree whose steps this knows."""

    @abstractmethod
    def zero(self) -> Any:
        """Covariance of outputs that are known."""

    @abstractmethod
    def own_blocks(self, covariance: Any) -> Float[Array, "N K K"]:
        """Each point's own covariance."""

    @abstractmethod
    def drift(self, clipped: Float[Array, "n R K"]) -> Float[Array, "N K"]:
        """Velocity of the mean, of mean clipped gradients."""

    @abstractmethod
    def step(self, covariance: Any, slope: Array, spread: Array, rate: Array) -> Any:
        """After a step; ``spread`` is the covariance of each sample's part, ``(n, R, K, R, K)``."""

    @abstractmethod
    def velocity(self, covariance: Any, slope: Array, spread: Array, rate: Array) -> Any:
        """In flow time."""

    @abstractmethod
    def variance(self, covariance: Any, rows: slice, g: Array, W: Array) -> Array:
        r"""Variance of :math:`\sum_i g_i^\top x_i + \tfrac12 x_i^\top W_i x_i` over some points."""

    @abstractmethod
    def links(self, covariance: Any, rows: slice, g: Array, W: Array) -> Links:
        """How each training sample bears on that sum."""

    @abstractmethod
    def matrix(self, covariance: Any) -> Float[Array, "NK NK"]:
        """The whole covariance."""

    @abstractmethod
    def truncation(self, covariance: Any) -> Float[Array, ""]:
        """Share of the variance whose correlations are dropped."""


class Full(CovarianceForm):
    """The whole covariance, ``(N K, N K)``; noise and operator over the reduction's divisor."""

    noise: Float[Array, "NK NK"]
    operator: Float[Array, "NK R n K"]

    def zero(self) -> Array:
        return jnp.zeros_like(self.noise)

    def _split(self, covariance: Array) -> Array:
        n_outputs = self.operator.shape[-1]
        n_points = covariance.shape[0] // n_outputs
        return covariance.reshape(n_points, n_outputs, n_points, n_outputs)

    def own_blocks(self, covariance: Array) -> Array:
        return jnp.moveaxis(jnp.diagonal(self._split(covariance), axis1=0, axis2=2), -1, 0)

    def drift(self, clipped: Array) -> Array:
        velocity = -jnp.einsum("arnk,nrk->a", self.operator, clipped)
        return velocity.reshape(-1, clipped.shape[-1])

    def _linear_map(self, slope: Array) -> Array:
        n_rows = self.operator.shape[0]
        towards = -jnp.einsum("arnk,nrkl->anl", self.operator, slope).reshape(n_rows, -1)
        return jnp.zeros_like(self.noise).at[:, : towards.shape[1]].set(towards)

    def _diffusion(self, spread: Array) -> Array:
        n_rows = self.operator.shape[0]
        moved = jnp.einsum("arnk,nrksl->asnl", self.operator, spread)
        return self.noise + moved.reshape(n_rows, -1) @ self.operator.reshape(n_rows, -1).T

    def step(self, covariance: Array, slope: Array, spread: Array, rate: Array) -> Array:
        moved = jnp.eye(len(covariance), dtype=covariance.dtype) + rate * self._linear_map(slope)
        covariance = moved @ covariance @ moved.T + rate**2 * self._diffusion(spread)
        return (covariance + covariance.T) / 2

    def velocity(self, covariance: Array, slope: Array, spread: Array, rate: Array) -> Array:
        half = self._linear_map(slope) @ covariance
        return half + half.T + rate * self._diffusion(spread)

    def variance(self, covariance: Array, rows: slice, g: Array, W: Array) -> Array:
        block = self._split(covariance)[rows][:, :, rows]
        through = jnp.einsum("ikl,iljm->ikjm", W, block)
        linear = jnp.einsum("ik,ikjl,jl->", g, block, g)
        return linear + 0.5 * jnp.einsum("ikjm,jmik->", through, through)

    def links(self, covariance: Array, rows: slice, g: Array, W: Array) -> Links:
        n_groups, n, n_outputs = self.operator.shape[1:]
        operator = self.operator.reshape(-1, n_outputs, n_groups, n, n_outputs)[rows]
        split = self._split(covariance)[rows]
        near = split[:, :, :n]
        turned = jnp.einsum("akrnl,akb->abrnl", operator, W)
        weighted = jnp.einsum("abim,abc->acim", split, W)[:, :, rows]
        far = jnp.einsum("acim,acjl->imjl", weighted, near)
        return Links(
            pull=jnp.einsum("akrnl,ak->nrl", operator, g),
            turn=jnp.einsum("abrnl,abnm->nrlm", turned, near),
            slope=jnp.einsum("ak,aknl->nl", g, near),
            bend=jnp.einsum("aknl,akb,abnm->nlm", near, W, near),
            far_pull=jnp.einsum("abrnl,abim,im->nrl", turned, split[:, :, rows], g),
            far_turn=jnp.einsum("abrnl,abnm->nrlm", turned, far),
        )

    def matrix(self, covariance: Array) -> Array:
        return covariance

    def truncation(self, covariance: Array) -> Array:
        return jnp.zeros((), covariance.dtype)


class Modes(eqx.Module):
    """Eigenvectors over points and outputs, ``(N, K, a)``, or ``(N, a)`` meaning ``(x) I_K``.

    ``drive`` holds the operator's coordinates in them, ``(R, n, ...)``, and ``noise`` the noise's
    variances. A mode has i coordinates: one, or K.
    """

    vectors: Array
    drive: Array
    noise: Float[Array, " a"]

    def gradient(self, rows: slice, g: Array) -> Float[Array, "a i"]:
        vectors = self.vectors[rows]
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

    def hessian(self, rows: slice, W: Array, *, each: bool) -> Array:
        return self._pairs(self.vectors[rows], W, self.vectors[rows], each)

    def linear_map(self, slope: Array, *, each: bool) -> Array:
        n = slope.shape[0]
        groups = enumerate(self.drive)
        return -sum(
            (self._pairs(drive, slope[:, r], self.vectors[:n], each) for r, drive in groups),
            start=jnp.zeros((), slope.dtype),
        )

    def spread(self, spread: Array, *, each: bool) -> Array:
        drives = list(enumerate(self.drive))
        return sum(
            (self._pairs(d, spread[:, r, :, s], e, each) for r, d in drives for s, e in drives),
            start=jnp.zeros((), spread.dtype),
        )


class LowRank(CovarianceForm):
    """Leading modes with all their correlations, the others each by itself.

    The state is a pair, ``(a, i, a, i)`` and ``(b, i, i)``.
    """

    operator: Float[Array, "..."]
    leading: Modes
    others: Modes
    n_outputs: int = eqx.field(static=True)

    @property
    def _inner(self) -> int:
        return self.n_outputs if self.leading.vectors.ndim == 2 else 1

    def zero(self) -> tuple[Array, Array]:
        a, b, i = self.leading.noise.size, self.others.noise.size, self._inner
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
        S, s = covariance
        leading, others = self.leading.vectors, self.others.vectors
        if leading.ndim == 2:
            own = jnp.einsum("na,akl->nkl", others**2, s)
        else:
            own = jnp.einsum("nka,a,nla->nkl", others, s[:, 0, 0], others)
        return self._between(leading, S, leading) + own

    def drift(self, clipped: Array) -> Array:
        weighted = jnp.moveaxis(clipped, 1, 0)
        return -(self.operator @ weighted.reshape(-1, self._inner)).reshape(-1, self.n_outputs)

    def _parts(self, slope: Array, spread: Array) -> tuple[Array, Array, Array, Array]:
        """Linear map and diffusion of the leading modes, and of each other."""
        eye = jnp.eye(self._inner, dtype=slope.dtype)
        size = self.leading.noise.size * self._inner
        maps = self.leading.linear_map(slope, each=False).reshape(size, size)
        moved = self.leading.spread(spread, each=False).reshape(size, size)
        moved = moved + jnp.diag(jnp.repeat(self.leading.noise, self._inner))
        own = self.others.spread(spread, each=True) + self.others.noise[:, None, None] * eye
        return maps, moved, self.others.linear_map(slope, each=True), own

    def step(
        self, covariance: tuple[Array, Array], slope: Array, spread: Array, rate: Array
    ) -> tuple[Array, Array]:
        maps, diffusion, own_maps, own_diffusion = self._parts(slope, spread)

        def one(covariance: Array, maps: Array, diffusion: Array) -> Array:
            moved = jnp.eye(maps.shape[-1], dtype=maps.dtype) + rate * maps
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

    def variance(self, covariance: tuple[Array, Array], rows: slice, g: Array, W: Array) -> Array:
        S, s = covariance
        of_leading = self.leading.gradient(rows, g).reshape(-1)
        through = self.leading.hessian(rows, W, each=False).reshape(S.shape) @ S
        of_others = self.others.gradient(rows, g)
        own = self.others.hessian(rows, W, each=True) @ s
        return (
            of_leading @ S @ of_leading
            + jnp.einsum("ak,akl,al->", of_others, s, of_others)
            + 0.5 * (jnp.sum(through * through.T) + jnp.einsum("akl,alk->", own, own))
        )

    def links(self, covariance: tuple[Array, Array], rows: slice, g: Array, W: Array) -> Links:
        """Of the leading modes."""
        S, _ = covariance
        gradient = self.leading.gradient(rows, g).reshape(-1)
        turned = self.leading.hessian(rows, W, each=False).reshape(S.shape) @ S
        n = self.leading.drive.shape[1]
        drives, vectors = self.leading.drive, self.leading.vectors[:n]

        def against(matrix: Array) -> Array:
            blocks = [self._between(drive, matrix, vectors) for drive in drives]
            return jnp.stack(blocks, axis=1)

        def along(vector: Array) -> Array:
            return jnp.stack([self._at(drive, vector) for drive in drives], axis=1)

        return Links(
            pull=along(gradient),
            turn=against(turned),
            slope=self._at(vectors, S @ gradient),
            bend=self._between(vectors, S @ turned, vectors),
            far_pull=along(turned @ gradient),
            far_turn=against(turned @ turned),
        )

    def matrix(self, covariance: tuple[Array, Array]) -> Array:
        S, s = covariance
        leading, others = self.leading.vectors, self.others.vectors
        if leading.ndim == 2:
            full = jnp.einsum("na,akbl,mb->nkml", leading, self._split(S), leading)
            full = full + jnp.einsum("na,akl,ma->nkml", others, s, others)
        else:
            full = jnp.einsum("nka,ab,mlb->nkml", leading, S, leading)
            full = full + jnp.einsum("nka,a,mla->nkml", others, s[:, 0, 0], others)
        size = full.shape[0] * full.shape[1]
        return full.reshape(size, size)

    def truncation(self, covariance: tuple[Array, Array]) -> Array:
        kept = jnp.trace(covariance[0])
        dropped = jnp.sum(jnp.trace(covariance[1], axis1=1, axis2=2))
        total = kept + dropped
        return jnp.where(total > 0, dropped / jnp.where(total > 0, total, 1.0), 0.0)


def _operator(flow: KernelFlow) -> Array:
    """Of all points, ``(N K, R n K)`` or ``(N, R n)``, over the divisor of the reduction."""
    rows = [flow.operator, *([] if flow.test_drive is None else [flow.test_drive])]
    operator = jnp.concatenate(rows)
    return operator / flow.targets.shape[0] if flow.reduction == "mean" else operator


def full(flow: KernelFlow, noise: Array | None, n_outputs: int) -> Full:
    """The whole covariance; ``noise`` is that of the flow's shape, None without."""
    operator = _operator(flow)
    n_groups, n = flow.diagonal.shape[:2]
    if flow.diagonal.ndim == 2:
        eye = jnp.eye(n_outputs, dtype=operator.dtype)
        operator = jnp.einsum("arn,kl->akrnl", operator.reshape(-1, n_groups, n), eye)
        noise = None if noise is None else jnp.kron(noise, eye)
    operator = operator.reshape(-1, n_groups, n, n_outputs)
    size = operator.shape[0]
    return Full(jnp.zeros((size, size), operator.dtype) if noise is None else noise, operator)


def low_rank(flow: KernelFlow, noise: Array | None, n_outputs: int, rank: int | None) -> LowRank:
    """Of this rank, by default what holds 99% of the trace, up to 500.

    Without noise the basis is that of the kernel's square, as sampling has it.
    """
    operator = _operator(flow)
    shared = flow.diagonal.ndim == 2
    n_groups, n = flow.diagonal.shape[:2]
    values, vectors = jnp.linalg.eigh(operator @ operator.T if noise is None else noise)
    values, vectors = jnp.maximum(values[::-1], 0), vectors[:, ::-1]
    per_mode = n_outputs if shared else 1
    if rank is None:
        held = jnp.cumsum(values) < _SHARE * jnp.sum(values)
        rank = min(_MOST, per_mode * (1 + int(jnp.sum(held))))
    kept = min(-(-rank // per_mode), values.size)
    drive = (operator.T @ vectors).reshape(n_groups, n, *(() if shared else (n_outputs,)), -1)
    shape = (-1, values.size) if shared else (values.size // n_outputs, n_outputs, values.size)
    vectors = vectors.reshape(shape)
    noise_of_modes = jnp.zeros_like(values) if noise is None else values
    leading, others = (
        Modes(vectors[..., part], drive[..., part], noise_of_modes[part])
        for part in (slice(0, kept), slice(kept, None))
    )
    return LowRank(operator, leading, others, n_outputs)
