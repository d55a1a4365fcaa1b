"""The whole covariance of noisy outputs, its rows over the devices of a mesh."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jax import lax

from ntkdp._backend import devices
from ntkdp._backend.types import Array, Float
from ntkdp.gradient_flow import KernelFlow
from ntkdp.stochastic_flow._moments.covariance import CovarianceForm, Step, Tied
from ntkdp.stochastic_flow._moments.excess_variance import Links
from ntkdp.stochastic_flow._sharded_points import ShardedPoints, operator_of, points_of


class Full(CovarianceForm):
    """The whole covariance, ``(N K, N K)``; noise and operator are over the divisor of the loss."""

    noise: Float[Array, "NK NK"]
    operator: Float[Array, "NK R n K"]
    points: ShardedPoints = eqx.field(static=True)

    def zero(self) -> Array:
        return self.points.on_devices(_zeros_like, (0,), 0)(self.noise)

    def joint_zero(self, size: int) -> Array:
        """Zero; the axes are the rows, the parts of rows and of columns, and the columns."""

        def zeros(rows: Array) -> Array:
            return jnp.zeros((rows.shape[0], size, size, rows.shape[1]), rows.dtype)

        return self.points.on_devices(zeros, (0,), 0)(self.noise)

    def part(self, joint: Array, number: int) -> Array:
        return joint[:, number, number]

    def _split(self, rows: Array) -> Float[Array, "points K devices own K"]:
        """A device's rows, by point and output."""
        n_outputs = self.operator.shape[-1]
        own = self.points.own_points
        return rows.reshape(-1, n_outputs, self.points.n_devices, own, n_outputs)

    def _columns(self, rows: Array, test: bool) -> Float[Array, "points K part K"]:
        """Columns of the training or of the test points."""
        n_outputs = self.operator.shape[-1]
        part = self._split(rows)[:, :, :, self.points.part(test)]
        return part.reshape(part.shape[0], n_outputs, -1, n_outputs)

    def own_blocks(self, covariance: Array) -> Array:
        def blocks(rows: Array) -> Array:
            device = 0 if self.points.mesh is None else lax.axis_index(devices.AXIS)
            own = lax.dynamic_index_in_dim(self._split(rows), device, 2, keepdims=False)
            return jnp.moveaxis(jnp.diagonal(own, axis1=0, axis2=2), -1, 0)

        return self.points.by_point(blocks, (0,))(covariance)

    def drift(self, clipped: Array) -> Array:
        def velocity(operator: Array, clipped: Array) -> Array:
            moved = -jnp.einsum("arnk,nrk->a", operator, clipped)
            return moved.reshape(-1, clipped.shape[-1])

        return self.points.by_point(velocity, (0, None))(self.operator, clipped)

    def _linear_map(self, operator: Array, slope: Array) -> Array:
        """A device's rows of the linear map A."""
        n_rows, n_outputs = operator.shape[0], operator.shape[-1]
        towards = -jnp.einsum("arnk,nrkl->anl", operator, slope)
        towards = towards.reshape(n_rows, self.points.n_devices, -1, n_outputs)
        n_test = self.points.own_points - self.points.own_samples
        padded = jnp.pad(towards, ((0, 0), (0, 0), (0, n_test), (0, 0)))
        return padded.reshape(n_rows, -1)

    def _sampled(self, operator: Array, spread: Array) -> Array:
        """A device's rows of the covariance of the gradient."""
        n_rows = operator.shape[0]
        moved = jnp.einsum("arnk,nrksl->asnl", operator, spread)
        return devices.outer(
            self.points.mesh, moved.reshape(n_rows, -1), operator.reshape(n_rows, -1)
        )

    def _tied(self, operator: Array, maps: Array, joint: Array, tied: Tied) -> Array:
        """A device's rows of the second moment of the summed gradient, but for what is spread."""
        mesh, outputs = self.points.mesh, joint[:, 0, 0]
        mean = jnp.einsum("arnk,nrk->a", operator, tied.mean)[:, None]
        linear = devices.outer(mesh, devices.product(mesh, maps, outputs), maps)
        return tied.weight * (devices.outer(mesh, mean, mean) + linear)

    def _evolved(
        self,
        rows: Callable[..., Array],
        covariance: Array,
        slope: Array,
        spread: Array,
        step: Array | Step,
        tied: Tied | None = None,
    ) -> Array:
        """Apply ``rows`` to each device's rows of covariance, linear map, gradient and noise."""

        def own_rows(
            covariance: Array,
            operator: Array,
            noise: Array,
            slope: Array,
            spread: Array,
            step: Array | Step,
            tied: Tied | None,
        ) -> Array:
            linear_map, sampled = self._linear_map(operator, slope), self._sampled(operator, spread)
            if tied is not None:
                sampled = sampled - self._tied(operator, linear_map, covariance, tied)
            return rows(covariance, linear_map, sampled, noise, step)

        over_devices = self.points.on_devices(own_rows, (0, 0, 0, *[None] * 4), 0)
        return over_devices(covariance, self.operator, self.noise, slope, spread, step, tied)

    def step(
        self, joint: Array, slope: Array, spread: Array, step: Step, tied: Tied | None = None
    ) -> Array:
        mesh = self.points.mesh

        def rows(joint: Array, maps: Array, sampled: Array, noise: Array, step: Step) -> Array:
            """With T = M x I - b x (A of the outputs): T joint T^T + b b^T x Q + e e^T x noise."""
            M, b, e = step
            own, size = joint.shape[:2]
            drawn = devices.product(mesh, maps, joint[:, 0].reshape(own, -1))
            moved = jnp.einsum("ce,aedn->acdn", M, joint)
            moved = moved - jnp.einsum("c,adn->acdn", b, drawn.reshape(own, size, -1))
            back = devices.outer(mesh, moved[:, :, 0].reshape(own * size, -1), maps)
            after = jnp.einsum("de,acen->acdn", M, moved)
            after = after - jnp.einsum("d,acn->acdn", b, back.reshape(own, size, -1))
            after = after + jnp.einsum("c,d,an->acdn", b, b, sampled)
            after = after + jnp.einsum("c,d,an->acdn", e, e, noise)
            flipped = [
                devices.transposed(mesh, after[:, d, c]) for c in range(size) for d in range(size)
            ]
            return (after + jnp.stack(flipped, axis=1).reshape(after.shape)) / 2

        return self._evolved(rows, joint, slope, spread, step, tied)

    def velocity(self, covariance: Array, slope: Array, spread: Array, rate: Array) -> Array:
        mesh = self.points.mesh

        def rows(
            covariance: Array, linear_map: Array, sampled: Array, noise: Array, rate: Array
        ) -> Array:
            half = devices.product(mesh, linear_map, covariance)
            return half + devices.transposed(mesh, half) + rate * (noise + sampled)

        return self._evolved(rows, covariance, slope, spread, rate)

    def variance(self, covariance: Array, test: bool, g: Array, W: Array) -> Array:
        def own_terms(
            rows: Array, own_g: Array, own_W: Array, g: Array, W: Array
        ) -> Float[Array, ""]:
            block = self._columns(rows, test)[self.points.part(test)]
            linear = jnp.einsum("ik,ikjl,jl->", own_g, block, g)
            left = jnp.einsum("ikl,iljm->ikjm", own_W, block)
            right = jnp.einsum("ikjl,jml->ikjm", block, W)
            return devices.total(self.points.mesh, linear + 0.5 * jnp.sum(left * right))

        over_devices = self.points.on_devices(own_terms, (0, 0, 0, None, None), None)
        return over_devices(covariance, g, W, g, W)

    def links(self, covariance: Array, test: bool, g: Array, W: Array) -> Links:
        def own_terms(
            rows: Array, operator: Array, own_g: Array, own_W: Array, g: Array, W: Array
        ) -> Links:
            n_outputs = operator.shape[-1]
            operator = operator.reshape(-1, n_outputs, *operator.shape[1:])[self.points.part(test)]
            block, near = (
                self._columns(rows, which)[self.points.part(test)] for which in (test, False)
            )
            turned = jnp.einsum("akrnl,akb->abrnl", operator, own_W)
            weighted = jnp.einsum("imab,abc->imac", block, W)
            far = devices.product(
                self.points.mesh,
                weighted.reshape(block.shape[0] * n_outputs, -1),
                near.reshape(block.shape[0] * n_outputs, -1),
            ).reshape(near.shape)
            own = Links(
                pull=jnp.einsum("akrnl,ak->nrl", operator, own_g),
                turn=jnp.einsum("abrnl,abnm->nrlm", turned, near),
                slope=jnp.einsum("ak,aknl->nl", own_g, near),
                bend=jnp.einsum("aknl,akb,abnm->nlm", near, own_W, near),
                far_pull=jnp.einsum("abrnl,abim,im->nrl", turned, block, g),
                far_turn=jnp.einsum("abrnl,abnm->nrlm", turned, far),
            )
            return devices.total(self.points.mesh, own)

        over_devices = self.points.on_devices(own_terms, (0, 0, 0, 0, None, None), None)
        return over_devices(covariance, self.operator, g, W, g, W)

    def matrix(self, covariance: Array) -> Array:
        return self.points.in_order(covariance)

    def truncation(self, covariance: Array) -> Array:
        return jnp.zeros((), covariance.dtype)


def full(flow: KernelFlow, noise: Array | None, n_outputs: int) -> Full:
    """The form of the whole covariance; ``noise`` is a matrix as the flow's kernel, or None."""
    points = points_of(flow)
    shared_by = flow.drive.columns(n_outputs)
    n_groups, n = flow.diagonal.shape[:2]

    def rows(operator: Array, noise: Array | None) -> tuple[Array, Array]:
        if shared_by > 1:
            eye = jnp.eye(shared_by, dtype=operator.dtype)
            operator = jnp.einsum("arn,kl->akrnl", operator.reshape(-1, n_groups, n), eye)
            noise = None if noise is None else jnp.kron(noise, eye)
        operator = operator.reshape(-1, n_groups, n, n_outputs)
        size = points.n_points * n_outputs
        if noise is None:
            noise = jnp.zeros((operator.shape[0], size), operator.dtype)
        return noise, operator

    noise = None if noise is None else points.in_devices_order(noise)
    noise, operator = points.on_devices(rows, (0, 0), (0, 0))(operator_of(flow), noise)
    return Full(noise=noise, operator=operator, points=points)


def _zeros_like(rows: Array) -> Array:
    return jnp.zeros_like(rows)
