"""The points whose outputs are predicted, in parts over the devices of a mesh.

Each device has equal parts of the training points and of the test points, its training points
first: this is the devices' order. On one device it is train before test, as elsewhere.
"""

from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ntkdp._backend import devices
from ntkdp._backend.types import Array, Float
from ntkdp.gradient_flow import KernelFlow

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class ShardedPoints(NamedTuple):
    """Numbers of training points and of all points, and the devices that they are spread over."""

    n_samples: int
    n_points: int
    mesh: Mesh | None

    @property
    def n_devices(self) -> int:
        return 1 if self.mesh is None else self.mesh.size

    @property
    def own_samples(self) -> int:
        """Training points of a device."""
        return self.n_samples // self.n_devices

    @property
    def own_points(self) -> int:
        """All points of a device."""
        return self.n_points // self.n_devices

    def part(self, test: bool) -> slice:
        """A device's training or test points among its own."""
        return slice(self.own_samples, None) if test else slice(0, self.own_samples)

    def on_devices(
        self,
        function: Callable[_Arguments, _Result],
        in_axes: tuple[int | None, ...],
        out_axes: devices.OutAxes,
    ) -> Callable[_Arguments, _Result]:
        """Run ``function`` on each device's parts; axes as for :func:`devices.over_samples`."""
        return devices.over_samples(function, self.mesh, in_axes, out_axes)

    def by_point(
        self, function: Callable[_Arguments, Array], in_axes: tuple[int | None, ...]
    ) -> Callable[_Arguments, Array]:
        """Run ``function`` on each device's points; returns the rows of all, train before test."""

        def rows_of_all(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Array:
            rows = function(*args, **kwargs)
            train, test = (rows[self.part(which)] for which in (False, True))
            return jnp.concatenate([devices.gathered(self.mesh, part) for part in (train, test)])

        return self.on_devices(rows_of_all, in_axes, None)

    def in_devices_order(self, covariance: Float[Array, "NK NK"]) -> Float[Array, "NK NK"]:
        """A covariance with rows and columns in the devices' order, its rows over the devices."""
        return self._reordered(covariance, self._order())

    def in_order(self, covariance: Float[Array, "NK NK"]) -> Float[Array, "NK NK"]:
        """A covariance in the devices' order brought back to train before test."""
        return self._reordered(covariance, np.argsort(self._order()))

    def blocks(self, covariance: Float[Array, "NK NK"]) -> tuple[Array, Array, Array]:
        """Covariances of train with train, test with train, and test with test points."""
        n_outputs = len(covariance) // self.n_points
        index = _by_output(self._order(), n_outputs)
        own, n = self.own_samples * n_outputs, self.n_samples * n_outputs

        def cut(rows: Array) -> tuple[Array, Array, Array]:
            reordered = _reordered_rows(self.mesh, rows, index)
            return reordered[:own, :n], reordered[own:, :n], reordered[own:, n:]

        return self.on_devices(cut, (0,), (0, 0, 0))(devices.spread(self.mesh, covariance))

    def _reordered(self, matrix: Array, order: np.ndarray) -> Array:
        spread = devices.spread(self.mesh, matrix)
        if np.array_equal(order, np.arange(self.n_points)):
            return spread
        index = _by_output(order, len(matrix) // self.n_points)

        def reorder(rows: Array) -> Array:
            return _reordered_rows(self.mesh, rows, index)[:, index]

        return self.on_devices(reorder, (0,), 0)(spread)

    def _order(self) -> np.ndarray:
        train = np.arange(self.n_samples).reshape(self.n_devices, -1)
        test = np.arange(self.n_samples, self.n_points).reshape(self.n_devices, -1)
        return np.concatenate([train, test], axis=1).ravel()


def points_of(flow: KernelFlow) -> ShardedPoints:
    """The training and test points of a flow."""
    n = flow.targets.shape[0]
    n_test = 0 if flow.test_drive is None else flow.test_drive.n_points
    return ShardedPoints(n, n + n_test, flow.mesh)


def operator_of(flow: KernelFlow) -> Array:
    """The kernel matrix that moves all points, in the devices' order, over the divisor of the loss.

    Its shape is ``(N K, R n K)``, or ``(N, R n)`` for a kernel that means ``(x) I_K``.
    """

    def rows(train: Array, test: Array | None) -> Array:
        both = train if test is None else jnp.concatenate([train, test])
        return both / flow.data.divisor

    test = None if flow.test_drive is None else flow.test_drive.written_out()
    return devices.over_samples(rows, flow.mesh, (0, 0), 0)(flow.drive.written_out(), test)


def _by_output(order: np.ndarray, n_outputs: int) -> np.ndarray:
    """An order of points as an order of their outputs."""
    return (order[:, None] * n_outputs + np.arange(n_outputs)).ravel()


def _reordered_rows(mesh: Mesh | None, rows: Array, index: np.ndarray) -> Array:
    """A device's rows of a symmetric matrix whose rows are put in another order.

    They are exchanged as columns, which are equal to them, so that no device holds all rows.
    """
    return devices.transposed(mesh, rows[:, index])
