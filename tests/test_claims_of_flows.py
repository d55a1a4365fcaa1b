"""Numbered claims about the flows, each with its expected number, by the public interface."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ntkdp
from ntkdp import clipping, losses


def kernel_flow(kernel: Any, targets: Any, rule: Any) -> ntkdp.KernelFlow:
    """Squared loss, summed over samples."""
    kernel = kernel if isinstance(kernel, ntkdp.LayerwiseKernel) else jnp.asarray(kernel)
    return ntkdp.KernelFlow(kernel, targets, losses.SquaredError(), rule, reduction="sum")


def solve(flow: ntkdp.KernelFlow, start: Any, times: Any) -> ntkdp.Trajectory:
    """Measured at 1001 times, so that flows of one shape share a compiled solver."""
    start, times = np.reshape(np.asarray(start, float), (-1, 1)), np.asarray(times, float)
    between = np.linspace(times[-2], times[-1], 1003 - len(times))[1:-1]
    dense = np.concatenate([times[:-1], between, times[-1:]])
    path = ntkdp.solve(flow, start, dense, rtol=1e-8, atol=1e-11, outputs=True)
    assert path.successful, path.message
    asked = np.append(np.arange(len(times) - 1), -1)
    return jax.tree.map(lambda leaf: leaf[asked] if np.ndim(leaf) else leaf, path)


H7 = np.ones((3, 3)) + 0.1 * np.eye(3)
Y7 = np.array([-3.0, 1.0, 1.0])


def test_c7_loss_rises_under_flat_clipping_and_converges() -> None:
    """dL/dt(0) = +.4767; L: 5.5, max 5.788 at t = .767, 2.437 at t = 10, 5.2e-8 at t = 100."""
    flow = kernel_flow(H7, Y7, clipping.Abadi(1.0))
    state = flow.init(np.zeros((3, 1)))
    slope = float(jnp.sum((state[0][:, 0] - Y7) * flow.velocity(state)[0][:, 0]))
    assert slope == pytest.approx(0.4767, abs=5e-5)
    times = np.concatenate([np.linspace(0, 1.8, 901), [10.0, 100.0]])
    path = solve(flow, np.zeros(3), times)
    assert float(path.loss[0]) == 5.5
    top = int(jnp.argmax(path.loss))
    assert float(path.loss[top]) == pytest.approx(5.788, abs=5e-4)
    assert float(path.times[top]) == pytest.approx(0.767, abs=2e-3)
    assert float(path.loss[-2]) == pytest.approx(2.437, abs=5e-4)
    assert float(path.loss[-1]) == pytest.approx(5.2e-8, abs=5e-10)
    tau = 1 / np.sqrt(1.1)
    a = np.abs(np.asarray(path.outputs[:, :, 0]) - Y7)
    psi = np.where(a <= tau, 0.5 * a**2, tau * (a - 0.5 * tau)).sum(1)
    assert np.all(np.diff(psi) < 0)


ONE = np.array([[4.0]])


def test_c9_one_sample_falls_linearly_and_then_exponentially() -> None:
    """a0 = 5, h = 4, R = 1: leaves the clipped zone at t* = 2.25, a(3) = .02489."""
    times = np.array([0.0, 1.0, 2.25, 3.0])
    path = solve(kernel_flow(ONE, np.zeros(1), clipping.Abadi(1.0)), [5.0], times)
    a = np.asarray(path.outputs[:, 0, 0])
    np.testing.assert_allclose(a[:3], [5.0, 3.0, 0.5], rtol=1e-6)
    assert a[3] == pytest.approx(0.02489, abs=5e-6)


def test_c10_time_in_the_clipped_zone_is_inverse_to_the_clipping_norm() -> None:
    """Log-log slope -1.00 +- .02 at the small end of R from .1 to .01, a0 = 5, h = 4."""
    left = []
    norms = np.array([0.02, 0.01])
    for R in norms:
        flow = kernel_flow(ONE, np.zeros(1), clipping.Abadi(R))
        path = solve(flow, [5.0], np.linspace(0, 2.6 / R, 1001))
        left.append(float(path.times[int(jnp.argmax(path.clip_fraction < 0.5))]))
    slope = np.diff(np.log(left)) / np.diff(np.log(norms))
    assert slope[0] == pytest.approx(-1.0, abs=0.02)


def test_c12_layerwise_clipping_gets_stuck_at_a_non_zero_loss() -> None:
    """From (5, -3) at L = 17 for ever; from (-1, -6) it ends at (1, -3.434); flat converges."""
    u, v = np.array([1.0, 2.0]), np.array([2.0, 1.0])
    kernel = ntkdp.LayerwiseKernel(
        ("first", "second"), jnp.asarray(np.stack([np.outer(u, u), np.outer(v, v)]))
    )
    np.testing.assert_array_equal(kernel.total, [[5.0, 4.0], [4.0, 5.0]])
    layerwise = kernel_flow(kernel, np.zeros(2), clipping.Abadi(1.0, scope="layerwise"))
    stuck = solve(layerwise, [5.0, -3.0], [0.0, 20.0, 60.0])
    np.testing.assert_allclose(stuck.loss, 17.0, rtol=1e-9)
    moved = solve(layerwise, [-1.0, -6.0], [0.0, 20.0, 60.0])
    np.testing.assert_allclose(moved.outputs[-1, :, 0], [1.0, -3.434], atol=5e-4)
    np.testing.assert_allclose(moved.outputs[1], moved.outputs[2], atol=1e-5)
    for start in ([5.0, -3.0], [-1.0, -6.0]):
        flat = solve(
            kernel_flow(kernel, np.zeros(2), clipping.Abadi(1.0)), start, [0.0, 20.0, 60.0]
        )
        assert float(flat.loss[-1]) < 1e-10


def test_c13_layerwise_clipping_diverges_though_every_term_is_positive() -> None:
    """From 20 (1, 1, 1): da/dt = (.064, .24, .064), L 600 -> 3387.8 at t = 200."""
    P = np.array([[1, -0.9, -0.22], [-0.9, 1, -0.22], [-0.22, -0.22, 1]])
    Q = np.array([[1, -0.22, -0.22], [-0.22, 1, -0.9], [-0.22, -0.9, 1]])
    D1, D2 = np.diag([1, 1, 0.1]), np.diag([0.1, 1, 1])
    terms = np.stack([D1 @ P @ D1, D2 @ Q @ D2])
    assert min(np.linalg.eigvalsh(term).min() for term in terms) > 0
    kernel = ntkdp.LayerwiseKernel(("first", "second"), jnp.asarray(terms))
    layerwise = kernel_flow(kernel, np.zeros(3), clipping.Abadi(1.0, scope="layerwise"))
    far, near = np.full(3, 20.0), np.full(3, 0.5)
    velocity = layerwise.velocity(layerwise.init(far[:, None]))[0]
    np.testing.assert_allclose(velocity[:, 0], [0.064, 0.24, 0.064], atol=5e-4)
    path = solve(layerwise, far, [0.0, 200.0])
    assert float(path.loss[0]) == pytest.approx(600.0)
    assert float(path.loss[1]) == pytest.approx(3387.8, abs=0.05)
    steps = ntkdp.recursion(
        layerwise, far[:, None], learning_rate=0.05, steps=4000, record_every=4000
    )
    assert float(steps.loss[-1]) == pytest.approx(3387.8, abs=0.5)
    assert float(solve(layerwise, near, [0.0, 3000.0]).loss[-1]) < 1e-8
    for rule in (clipping.Abadi(1.0), clipping.Abadi(1e6)):
        for start in (far, near):
            end = solve(kernel_flow(kernel, np.zeros(3), rule), start, [0.0, 3000.0])
            assert float(end.loss[-1]) < 1e-8


def test_c15_batch_clipping_is_monotone_and_flat_it_keeps_to_the_path_of_descent() -> None:
    """The point where the unclipped flow has the same loss is the same point."""
    fine = np.linspace(0.0, 40.0, 1001)
    batch = solve(kernel_flow(H7, Y7, clipping.Batch(0.1)), np.zeros(3), fine)
    assert np.all(np.diff(batch.loss) < 0)
    assert float(batch.clip_fraction[0]) == 1.0
    values, vectors = np.linalg.eigh(H7)
    modes = vectors.T @ -Y7
    # Each mode of descent is a power of another, whatever the time: compare along the path.
    found = (np.asarray(batch.outputs[:, :, 0]) - Y7) @ vectors
    elapsed = -np.log(found[:, 0] / modes[0]) / values[0]
    np.testing.assert_allclose(found, modes * np.exp(-np.outer(elapsed, values)), atol=1e-6)
    assert elapsed[-1] < 0.9 * fine[-1]
    terms = ntkdp.LayerwiseKernel(
        ("a", "b"), jnp.asarray(np.stack([np.ones((3, 3)), 0.1 * np.eye(3)]))
    )
    layered = kernel_flow(terms, Y7, clipping.Batch(0.2, scope="layerwise"))
    assert np.all(np.diff(solve(layered, np.zeros(3), np.linspace(0.0, 40.0, 401)).loss) < 0)


def test_c17_large_norms_give_the_closed_form_and_its_rate() -> None:
    """f - y = exp(-H t)(f0 - y); L(t) <= L(0) exp(-2 lambda_min t), mean: lambda/n."""
    times = np.linspace(0.0, 10.0, 11)
    values, vectors = np.linalg.eigh(H7)
    path = solve(kernel_flow(H7, Y7, clipping.Abadi(1e3)), np.zeros(3), times)
    assert not np.any(path.clip_fraction)
    expected = (np.exp(-np.outer(times, values)) * (vectors.T @ -Y7)) @ vectors.T
    np.testing.assert_allclose(path.outputs[:, :, 0] - Y7, expected, rtol=1e-6, atol=1e-7)
    bound = path.loss[0] * np.exp(-2 * values[0] * times)
    assert np.all(path.loss <= bound * (1 + 1e-6))
    # The bound is attained when only the slowest mode is there.
    slowest = solve(kernel_flow(H7, np.zeros(3), clipping.Abadi(1e3)), vectors[:, 0], times)
    np.testing.assert_allclose(slowest.loss, 0.5 * np.exp(-0.2 * times), rtol=1e-6)
    flow = ntkdp.KernelFlow(
        jnp.asarray(H7), np.zeros(3), losses.SquaredError(), clipping.Abadi(1e3)
    )
    mean = solve(flow, vectors[:, 0], times)
    np.testing.assert_allclose(mean.loss, np.exp(-0.2 * times / 3) / 6, rtol=1e-6)


def test_c18_the_global_rule_that_drops_nothing_is_descent_at_a_scaled_rate() -> None:
    """Learning rate eta R/Z."""
    R, Z, eta = 0.5, 20.0, 0.2
    ruled = ntkdp.recursion(
        kernel_flow(H7, Y7, clipping.Global(R, Z)),
        np.zeros((3, 1)),
        learning_rate=eta,
        steps=60,
        outputs=True,
    )
    f = np.zeros(3)
    for _ in range(60):
        f = f - eta * R / Z * H7 @ (f - Y7)
    np.testing.assert_allclose(ruled.outputs[-1, :, 0], f, rtol=1e-12)


def test_c21_clipped_descent_past_the_edge_of_stability_ends_in_a_two_cycle() -> None:
    """eta h = 6 > 2: |a_k| + |a_k+1| = eta R sqrt(h) = 3.0, mean L >= eta^2 R^2 h / 8."""
    options = {"learning_rate": 1.5, "steps": 200, "outputs": True}
    path = ntkdp.recursion(
        kernel_flow(ONE, np.zeros(1), clipping.Abadi(1.0)), np.array([[5.0]]), **options
    )
    a = np.abs(np.asarray(path.outputs[100:, 0, 0]))
    np.testing.assert_allclose(a[:-1] + a[1:], 3.0, rtol=1e-10)
    np.testing.assert_allclose(path.outputs[100:-2], path.outputs[102:], rtol=1e-10)
    assert float(jnp.mean(path.loss[101:])) >= 1.5**2 * 4.0 / 8 - 1e-12
    unclipped = ntkdp.recursion(
        kernel_flow(ONE, np.zeros(1), clipping.NoClipping()), np.array([[5.0]]), **options
    )
    np.testing.assert_allclose(unclipped.outputs[50, 0, 0], 5.0 * 5.0**50, rtol=1e-10)
