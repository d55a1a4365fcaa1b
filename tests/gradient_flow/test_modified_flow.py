"""The modified equation of descent: second order against steps, first order without it."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from helpers import SQUARED, often_or_slow
from test_gradient_flow import C19_PARAMS, C19_PROBLEM, c19_network

import ntkdp
from ntkdp import clipping
from ntkdp.gradient_flow import ModifiedFlow
from ntkdp.trajectory import Trajectory

FINEST, COUNT = 0.01, 80
#: A step of a run is so many of the finest; the last time common to all is 0.8, up to which abadi
#: clips the same four samples of five.
EVERY = (4, 2, 1)
RULES = {"abadi": clipping.Abadi(0.5), "AUTO-S": clipping.Automatic(0.5)}


def check_orders(flow: Any, initial: Any, make_run: Any) -> None:
    """Regressed orders of sup |L_discrete - L_flow| in the learning rate.

    All runs have as many steps, so that one program serves them.
    """
    times = FINEST * np.arange(COUNT + 1)

    def solved(one: Any) -> Trajectory:
        return ntkdp.solve(one, initial, times, rtol=1e-9, atol=1e-12)

    plain = solved(flow)
    errors: dict[str, list[float]] = {"plain": [], "modified": []}
    for every in EVERY:
        run = make_run(FINEST * every)
        kept = slice(COUNT // every + 1)
        if isinstance(flow.clipping, clipping.Abadi):
            np.testing.assert_array_equal(run.clip_fraction[kept], 0.8)
        for name, path in (
            ("plain", plain),
            ("modified", solved(ModifiedFlow(flow, FINEST * every))),
        ):
            np.testing.assert_allclose(run.times[kept], path.times[::every], rtol=1e-12)
            errors[name].append(float(jnp.max(jnp.abs(run.loss[kept] - path.loss[::every]))))
    found = {
        name: float(np.polyfit(np.log(EVERY), np.log(values), 1)[0])
        for name, values in errors.items()
    }
    assert found["plain"] == pytest.approx(1.0, abs=0.05)
    assert found["modified"] == pytest.approx(2.0, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "gradients"),
    [("abadi", "vmap"), ("AUTO-S", "structured")],
    ids=list(RULES),
)
def test_descent_of_a_network_meets_it_at_second_order(name: str, gradients: Any) -> None:
    problem = (*C19_PROBLEM[:2], SQUARED, RULES[name])
    check_orders(
        ntkdp.WeightFlow(c19_network, *problem, reduction="sum"),
        C19_PARAMS,
        lambda rate: ntkdp.dp_sgd.run(
            c19_network,
            C19_PARAMS,
            *problem,
            learning_rate=rate,
            steps=COUNT,
            reduction="sum",
            gradients=gradients,
            key=jax.random.key(0),
        ),
    )


@pytest.mark.parametrize("name", often_or_slow(RULES, ["AUTO-S"]))
def test_steps_of_a_kernel_meet_it_at_second_order(name: str) -> None:
    x, y, _, _ = C19_PROBLEM
    kernel = ntkdp.empirical_ntk(c19_network, C19_PARAMS, x, x)
    flow = ntkdp.KernelFlow(kernel, y, SQUARED, RULES[name], reduction="sum")
    initial = c19_network(C19_PARAMS, x)
    check_orders(
        flow,
        initial,
        lambda rate: ntkdp.recursion(flow, initial, learning_rate=rate, steps=COUNT),
    )


def linearised_network(params: Any, x: jax.Array) -> jax.Array:
    """The network linearised where it starts, a model of the same parameters."""
    moved = jax.tree.map(jnp.subtract, params, C19_PARAMS)
    f, df = jax.jvp(lambda p: c19_network(p, x), (C19_PARAMS,), (moved,))
    return f + df


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "n_devices"),
    [("abadi", 1), ("AUTO-S", 5)],
    ids=["abadi", "AUTO-S on five devices"],
)
def test_descent_of_a_linearised_network_meets_it_at_second_order(
    name: str, n_devices: int
) -> None:
    problem = (*C19_PROBLEM[:2], SQUARED, RULES[name])
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:n_devices]), ("any",))
    check_orders(
        ntkdp.LinearisedFlow(c19_network, C19_PARAMS, *problem, reduction="sum", mesh=mesh),
        C19_PARAMS,
        lambda rate: ntkdp.dp_sgd.run(
            linearised_network,
            C19_PARAMS,
            *problem,
            learning_rate=rate,
            steps=COUNT,
            reduction="sum",
            gradients="vmap",
            key=jax.random.key(0),
        ),
    )


def mean_errors(flow: Any, initial: Any) -> np.ndarray:
    """Mean sup |L_discrete - L_modified| over learning rates from 0.04 to 0.08, and an eighth."""

    def error(rate: float) -> float:
        run = ntkdp.recursion(flow, initial, learning_rate=rate, steps=200)
        path = ntkdp.solve(ModifiedFlow(flow, rate), initial, run.times, rtol=1e-8, atol=1e-11)
        return float(jnp.max(jnp.abs(run.loss - path.loss)))

    rates = 0.04 * 2 ** np.linspace(0.0, 1.0, 6, endpoint=False)
    return np.array([np.mean([error(scale * rate) for rate in rates]) for scale in (1, 1 / 8)])


@pytest.mark.slow
def test_a_kink_keeps_the_order_and_a_jump_takes_one() -> None:
    """One sample leaves abadi's clipped zone at t = 0.2; another comes back to the 0/1 rule's."""
    kink = ntkdp.KernelFlow(
        4 * jnp.eye(1), jnp.zeros((1, 1)), SQUARED, clipping.Abadi(1.0), reduction="sum"
    )
    coarse, fine = mean_errors(kink, jnp.array([[0.9]]))
    assert np.log(coarse / fine) / np.log(8) == pytest.approx(2.0, abs=0.3)
    # Sample 0 is dropped until its residual is 1: 1.2 - 0.45 (1 - exp(-t)), at t = 0.59.
    jump = ntkdp.KernelFlow(
        jnp.array([[1.0, 0.5], [0.5, 1.0]]),
        jnp.zeros((2, 1)),
        SQUARED,
        clipping.Global(1.0),
        reduction="sum",
    )
    coarse, fine = mean_errors(jump, jnp.array([[1.2], [0.9]]))
    assert np.log(coarse / fine) / np.log(8) == pytest.approx(1.0, abs=0.3)


def test_one_linear_sample_in_closed_form() -> None:
    """Steps (1 - eta h)^k, and exp(-(h + eta h^2/2) t)."""
    h, eta = 2.0, 0.05
    flow = ntkdp.KernelFlow(
        jnp.array([[h]]), jnp.zeros((1, 1)), SQUARED, clipping.NoClipping(), reduction="sum"
    )
    start = jnp.array([[3.0]])
    path = ntkdp.solve(
        ModifiedFlow(flow, eta), start, eta * np.arange(41), rtol=1e-10, atol=1e-13, outputs=True
    )
    assert path.outputs is not None
    found, t = np.asarray(path.outputs)[:, 0, 0], eta * np.arange(41)
    np.testing.assert_allclose(found, 3 * np.exp(-(h + eta * h**2 / 2) * t), rtol=1e-8)
    # The next term of log(1 - eta h) is what is missing.
    stepped = 3 * (1 - eta * h) ** np.arange(41)
    np.testing.assert_allclose(np.log(found / stepped)[1:], eta**2 * h**3 / 3 * t[1:], rtol=0.1)


def test_linear_kernels_with_test_points_in_closed_form() -> None:
    """f - y = expm(-(A + eta A^2/2) t) (f_0 - y) for A = H M^-1, which is not symmetric."""
    rng = np.random.default_rng(4)
    n, m, eta, horizon = 4, 2, 0.2, 3.0
    root = rng.normal(size=(n + m, 6))
    scales = rng.uniform(0.3, 1.0, 6)
    whole, driving = root @ root.T / 6, (root * scales) @ root.T / 6
    outputs, targets = rng.normal(size=(n + m, 2)), rng.normal(size=(n + m, 2))
    flow = ntkdp.KernelFlow(
        jnp.asarray(whole[:n, :n]),
        targets[:n],
        SQUARED,
        clipping.NoClipping(),
        test_kernel=jnp.asarray(driving[n:, :n]),
        test_targets=targets[n:],
        preconditioned_kernel=jnp.asarray(driving[:n, :n]),
    )
    path = ntkdp.solve(
        ModifiedFlow(flow, eta),
        (outputs[:n], outputs[n:]),
        [0.0, horizon],
        rtol=1e-10,
        atol=1e-12,
        outputs=True,
    )
    assert path.outputs is not None
    assert path.test_outputs is not None
    A = driving[:n, :n] / n
    residuals = outputs[:n] - targets[:n]
    left = scipy.linalg.expm(-(A + eta / 2 * A @ A) * horizon) @ residuals
    np.testing.assert_allclose(path.outputs[-1], targets[:n] + left, atol=1e-8)
    # Test points move by H(*, train) H^-1 times what the training points do.
    moved = driving[n:, :n] @ np.linalg.solve(driving[:n, :n], left - residuals)
    np.testing.assert_allclose(path.test_outputs[-1], outputs[n:] + moved, atol=1e-8)


@pytest.mark.slow
def test_clipped_drift_is_no_gradient() -> None:
    """The Jacobian of abadi's drift, written out: it is not symmetric, and DG G is what counts."""
    rng = np.random.default_rng(0)
    J, w, R, eta = rng.normal(size=(3, 2, 4)), rng.normal(size=4), 0.7, 0.3
    residuals = np.array([[2.0, -1.0], [0.5, -3.0], [0.05, 0.02]])
    drift, derivative = np.zeros(4), np.zeros((4, 4))
    for J_i, a in zip(J, residuals, strict=True):
        g, D = J_i.T @ a, J_i.T @ J_i
        s = np.linalg.norm(g)
        if s > R:
            g, D = R * g / s, R / s * (np.eye(4) - np.outer(g, g) / s**2) @ D
        drift, derivative = drift + g, derivative + D
    assert np.max(np.abs(derivative - derivative.T)) > 0.1
    flow = ntkdp.WeightFlow(
        lambda w, x: jnp.einsum("nkp,p->nk", x, w),
        J,
        J @ w - residuals,
        SQUARED,
        clipping.Abadi(R),
        reduction="sum",
    )
    expected = -(drift + eta / 2 * derivative @ drift)
    found = ModifiedFlow(flow, eta).velocity(jnp.asarray(w))
    np.testing.assert_allclose(found, expected, rtol=1e-11)
    start = jnp.asarray(rng.normal(size=4))
    linearised = ModifiedFlow(
        ntkdp.LinearisedFlow(
            flow.apply_fn, start, J, flow.targets, SQUARED, flow.clipping, reduction="sum"
        ),
        eta,
    )
    found = linearised.velocity(linearised.init(jnp.asarray(w)))
    np.testing.assert_allclose(found, expected, rtol=1e-11)


def test_float32_stays_float32() -> None:
    kernel, start = jnp.eye(2, dtype=jnp.float32), jnp.ones((2, 1), jnp.float32)
    flow = ntkdp.KernelFlow(kernel, jnp.zeros((2, 1), jnp.float32), SQUARED, RULES["abadi"])
    modified = ModifiedFlow(flow, 0.1)
    assert modified.velocity(modified.init(start))[0].dtype == jnp.float32


def test_bad_input() -> None:
    flow = ntkdp.KernelFlow(jnp.eye(1), jnp.zeros((1, 1)), SQUARED, RULES["abadi"])
    for rate in (0.0, -0.1, np.nan, np.inf):
        with pytest.raises(ValueError, match="learning_rate must be positive and finite"):
            ModifiedFlow(flow, rate)
    with pytest.raises(ValueError, match=r"learning_rate must be a single number, got shape"):
        ModifiedFlow(flow, np.array([0.1, 0.2]))
    for other in (ntkdp.HeavyBallFlow(flow, 1.0), ModifiedFlow(flow, 0.1)):
        with pytest.raises(TypeError, match="flow must be a KernelFlow, a WeightFlow or a Linear"):
            ModifiedFlow(other, 0.1)
    plain: Any = inspect.unwrap(ModifiedFlow.__init__)
    with pytest.raises(TypeError, match="KernelFlow, a WeightFlow or a LinearisedFlow, got str"):
        plain(object.__new__(ModifiedFlow), "flow", 0.1)
