"""The points whose outputs are followed, in parts over the devices of a mesh.

Each device has equal parts of the training points and of the test points, and its training points
come first: the devices' order. On one device that is train before test, as elsewhere.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ntkdp._backend import devices
from ntkdp._backend.types import Array
from ntkdp.gradient_flow import KernelFlow


class FollowedPoints(NamedTuple):
    """Numbers of training points and of all, and the devices that they are spread over."""

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

    def on_devices(self, function: Callable[..., Any], in_axes: Any, out_axes: Any) -> Any:
        """``function`` on each device's parts."""
        return devices.over_samples(function, self.mesh, in_axes, out_axes)

    def by_point(self, function: Callable[..., Array], in_axes: Any, *args: Any) -> Array:
        """What each device finds of its points, of all of them, train before test."""

        def parts(*args: Any) -> Array:
            found = function(*args)
            train, test = (found[self.part(which)] for which in (False, True))
            return jnp.concatenate([devices.gathered(self.mesh, part) for part in (train, test)])

        by_point: Array = self.on_devices(parts, in_axes, None)(*args)
        return by_point

    def in_devices_order(self, matrix: Array) -> Array:
        """Rows and columns of a covariance of the points, its rows over the devices."""
        return self._reordered(matrix, self._order())

    def in_order(self, matrix: Array) -> Array:
        """The same taken back: train before test."""
        return self._reordered(matrix, np.argsort(self._order()))

    def blocks(self, matrix: Array) -> tuple[Array, Array, Array]:
        """Of a covariance: train with train, test with train, and test with test."""
        n_outputs = len(matrix) // self.n_points
        index = _by_output(self._order(), n_outputs)
        own, n = self.own_samples * n_outputs, self.n_samples * n_outputs

        def cut(rows: Array) -> tuple[Array, Array, Array]:
            turned = _rows_in_order(self.mesh, rows, index)
            return turned[:own, :n], turned[own:, :n], turned[own:, n:]

        found: tuple[Array, Array, Array] = self.on_devices(cut, (0,), (0, 0, 0))(
            devices.spread(self.mesh, matrix)
        )
        return found

    def _reordered(self, matrix: Array, order: np.ndarray) -> Array:
        spread: Array = devices.spread(self.mesh, matrix)
        if np.array_equal(order, np.arange(self.n_points)):
            return spread
        index = _by_output(order, len(matrix) // self.n_points)
        turned: Array = self.on_devices(
            lambda rows: _rows_in_order(self.mesh, rows, index)[:, index], (0,), 0
        )(spread)
        return turned

    def _order(self) -> np.ndarray:
        train = np.arange(self.n_samples).reshape(self.n_devices, -1)
        test = np.arange(self.n_samples, self.n_points).reshape(self.n_devices, -1)
        return np.concatenate([train, test], axis=1).ravel()


def of_flow(flow: KernelFlow) -> FollowedPoints:
    """The points of a flow."""
    n = flow.targets.shape[0]
    n_test = 0 if flow.test_drive is None else flow.test_drive.n_points
    return FollowedPoints(n, n + n_test, flow.mesh)


def operator(flow: KernelFlow) -> Array:
    """What moves all points, ``(N K, R n K)`` or ``(N, R n)``, in the devices' order.

    Over the divisor of the reduction.
    """

    def rows(train: Array, test: Array | None) -> Array:
        both = train if test is None else jnp.concatenate([train, test])
        return both / flow.targets.shape[0] if flow.reduction == "mean" else both

    test = None if flow.test_drive is None else flow.test_drive.matrix
    matrix: Array = devices.over_samples(rows, flow.mesh, (0, 0), 0)(flow.drive.matrix, test)
    return matrix


def _by_output(order: np.ndarray, n_outputs: int) -> np.ndarray:
    """An order of points as one of their outputs."""
    return (order[:, None] * n_outputs + np.arange(n_outputs)).ravel()


def _rows_in_order(mesh: Mesh | None, rows: Array, index: np.ndarray) -> Array:
    """A device's rows of a symmetric matrix whose rows are put in another order.

    They are exchanged as the columns that they also are, so that no device holds them all.
    """
    return devices.transposed(mesh, rows[:, index])
