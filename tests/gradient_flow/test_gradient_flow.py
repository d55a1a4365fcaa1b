"""Flows against independent solutions: eigenvectors, neural-tangents, SciPy, optax, plain steps."""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.integrate
import scipy.special
from helpers import DATA, SQUARED, Gradients, known, often_or_slow

import ntkdp
from ntkdp import clipping, losses
from ntkdp.clipping import Scope
from ntkdp.losses import Reduction

# A linear model with two parameter groups: outputs (n, K), Jacobians (n, K, P_r).
N, M, K = 4, 2, 2
SIZES = (3, 5)
_random = np.random.default_rng(0)
J_TRAIN = [_random.normal(size=(N, K, p)) for p in SIZES]
J_TEST = [_random.normal(size=(M, K, p)) for p in SIZES]
F_TRAIN, F_TEST = _random.normal(size=(N, K)), _random.normal(size=(M, K))
TARGETS = _random.normal(size=(N, K))


def layer_kernel(rows: list[np.ndarray], columns: list[np.ndarray], M_inv: Any = None) -> Any:
    M_inv = [np.ones(p) for p in SIZES] if M_inv is None else M_inv
    terms = [
        np.einsum("ikp,p,jlp->ijkl", a, m, b) for a, m, b in zip(rows, M_inv, columns, strict=True)
    ]
    return ntkdp.LayerwiseKernel(("first", "second"), jnp.asarray(np.stack(terms)))


def linear(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Inputs hold the Jacobians of both groups."""
    first, second = jnp.split(x, [SIZES[0]], axis=-1)
    return jnp.einsum("nkp,p->nk", first, params["first"]) + second @ params["second"]


X_TRAIN, X_TEST = np.concatenate(J_TRAIN, -1), np.concatenate(J_TEST, -1)
R_OF_GROUP = np.array([0.7, 1.3])


def psac(s: np.ndarray, R: Any) -> np.ndarray:
    return R / (s + 0.1 / (s + 0.1))


# Rule, and the same factor again in NumPy: norms (R, n), total norms (R, 1).
RULES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "none": (lambda R, s: clipping.NoClipping(scope=s), lambda s, total, R: np.ones_like(s)),
    "abadi": (
        lambda R, s: clipping.Abadi(R, scope=s),
        lambda s, total, R: np.minimum(1, R / s),
    ),
    "global": (
        lambda R, s: clipping.Global(R, scope=s),
        lambda s, total, R: (s <= R).astype(float),
    ),
    "automatic": (
        lambda R, s: clipping.Automatic(R, scope=s),
        lambda s, total, R: R / (s + 0.01),
    ),
    "psac": (lambda R, s: clipping.PSAC(R, scope=s), lambda s, total, R: psac(s, R)),
    "batch": (
        lambda R, s: clipping.Batch(R, scope=s),
        lambda s, total, R: np.minimum(1, R / total) * np.ones_like(s),
    ),
    "custom": (
        lambda R, s: clipping.Custom(lambda s: 0.3 * jnp.exp(-s), R, scope=s),
        lambda s, total, R: np.minimum(0.3 * np.exp(-s), R / s),
    ),
}


def clipped_directions(a: np.ndarray, rule: str, scope: Scope, R: Any) -> list[np.ndarray]:
    """Explicit ``sum_i C_ir g_ir`` of each group from explicit gradients."""
    gradients = [np.einsum("nkp,nk->np", J, a) for J in J_TRAIN]
    parts = gradients if scope == "layerwise" else [np.concatenate(gradients, 1)]
    s = np.stack([np.linalg.norm(part, axis=1) for part in parts])
    total = np.array([[np.linalg.norm(part.sum(0))] for part in parts])
    factors = RULES[rule][1](s, total, np.reshape(R, (-1, 1)))
    factors = factors if scope == "layerwise" else np.repeat(factors, len(SIZES), 0)
    return [c @ g for c, g in zip(factors, gradients, strict=True)]


CHOICES = often_or_slow(
    [(rule, scope) for rule in RULES for scope in ("flat", "layerwise")],
    [
        ("none", "flat"),
        ("abadi", "flat"),
        ("abadi", "layerwise"),
        ("automatic", "layerwise"),
        ("batch", "layerwise"),
    ],
)


def make_flow(rule: str, scope: Scope, **options: Any) -> tuple[ntkdp.KernelFlow, Any]:
    R = R_OF_GROUP if scope == "layerwise" else 0.9
    R = 2.5 * R if rule == "global" else R
    flow = ntkdp.KernelFlow(
        layer_kernel(J_TRAIN, J_TRAIN),
        TARGETS,
        SQUARED,
        RULES[rule][0](R, scope),
        test_kernel=layer_kernel(J_TEST, J_TRAIN),
        **options,
    )
    return flow, R


@pytest.mark.parametrize(("rule", "scope"), CHOICES)
def test_recursion_is_training_of_the_linearised_model(rule: str, scope: Scope) -> None:
    """To 1e-10 at step sizes where unclipped descent diverges, test outputs included."""
    flow, R = make_flow(rule, scope)
    eta, steps = 1.5, 25
    initial = (jnp.asarray(F_TRAIN), jnp.asarray(F_TEST))
    path = ntkdp.recursion(flow, initial, learning_rate=eta, steps=steps, outputs=True)
    w = [np.zeros(p) for p in SIZES]
    for k in range(steps + 1):
        f = F_TRAIN + sum(J @ w_r for J, w_r in zip(J_TRAIN, w, strict=True))
        f_test = F_TEST + sum(J @ w_r for J, w_r in zip(J_TEST, w, strict=True))
        scale = np.max(np.abs(f))
        np.testing.assert_allclose(known(path.outputs)[k], f, rtol=1e-10, atol=1e-10 * scale)
        np.testing.assert_allclose(
            known(path.test_outputs)[k], f_test, rtol=1e-10, atol=1e-10 * scale
        )
        np.testing.assert_allclose(
            path.loss[k], np.mean(0.5 * np.sum((f - TARGETS) ** 2, 1)), rtol=1e-10
        )
        directions = clipped_directions(f - TARGETS, rule, scope, R)
        w = [w_r - eta / N * d for w_r, d in zip(w, directions, strict=True)]
    if rule == "none":
        assert path.loss[-1] > 1e6 * path.loss[0]
    else:
        assert 0 < path.clip_fraction[0] <= 1


@pytest.mark.parametrize(("rule", "scope"), CHOICES)
def test_weight_flow_of_a_linear_model_is_its_kernel_flow(rule: str, scope: Scope) -> None:
    """J w' = f' at one state, without and with a preconditioner, mean and sum."""
    M_diagonal = [np.linspace(0.5, 2.0, p) for p in SIZES]
    w = {"first": jnp.linspace(-1, 1, SIZES[0]), "second": jnp.linspace(1, 2, SIZES[1])}
    f = linear(w, jnp.asarray(X_TRAIN))
    f_test = linear(w, jnp.asarray(X_TEST))
    R = R_OF_GROUP if scope == "layerwise" else 0.9
    directions = clipped_directions(np.asarray(f) - TARGETS, rule, scope, R)
    reductions: tuple[tuple[Reduction, int], ...]
    reductions = (("mean", N), ("sum", 1)) if rule == "abadi" else (("mean", N),)
    for reduction, divisor in reductions:
        for M_inv in (None, [1 / m for m in M_diagonal])[: len(reductions)]:
            diagonal = dict(zip(("first", "second"), map(jnp.asarray, M_diagonal), strict=True))
            weight_flow = ntkdp.WeightFlow(
                linear,
                X_TRAIN,
                TARGETS,
                SQUARED,
                RULES[rule][0](R, scope),
                reduction=reduction,
                preconditioner=None if M_inv is None else diagonal,
            )
            inverse = [np.ones(p) for p in SIZES] if M_inv is None else M_inv
            expected = [-m * d / divisor for m, d in zip(inverse, directions, strict=True)]
            velocity = eqx.filter_jit(weight_flow.velocity)(weight_flow.init(w))
            np.testing.assert_allclose(velocity["first"], expected[0], rtol=1e-10, atol=1e-12)
            np.testing.assert_allclose(velocity["second"], expected[1], rtol=1e-10, atol=1e-12)
            driven = None if M_inv is None else layer_kernel(J_TRAIN, J_TRAIN, M_inv)
            kernel_flow = ntkdp.KernelFlow(
                layer_kernel(J_TRAIN, J_TRAIN),
                TARGETS,
                SQUARED,
                RULES[rule][0](R, scope),
                reduction=reduction,
                test_kernel=layer_kernel(J_TEST, J_TRAIN, M_inv),
                preconditioned_kernel=driven,
            )
            d_train, d_test = kernel_flow.velocity(kernel_flow.init((f, f_test)))
            moved = [jnp.asarray(e) for e in expected]
            along = dict(zip(("first", "second"), moved, strict=True))
            np.testing.assert_allclose(
                d_train, linear(along, jnp.asarray(X_TRAIN)), rtol=1e-9, atol=1e-11
            )
            np.testing.assert_allclose(
                known(d_test), linear(along, jnp.asarray(X_TEST)), rtol=1e-9, atol=1e-11
            )


@pytest.mark.parametrize("rule", ["abadi", "batch"])
@pytest.mark.parametrize("scope", ["flat", "layerwise"])
def test_a_kernel_of_samples_is_its_expansion_by_the_identity(rule: str, scope: Scope) -> None:
    terms = np.stack([J[:, 0] @ J[:, 0].T for J in J_TRAIN])
    test_terms = np.stack([a[:, 0] @ b[:, 0].T for a, b in zip(J_TEST, J_TRAIN, strict=True)])
    found = []
    for expand in (False, True):
        kernel, test_kernel = (
            ntkdp.LayerwiseKernel(
                ("first", "second"),
                jnp.einsum("rij,kl->rijkl", t, np.eye(K)) if expand else jnp.asarray(t),
            )
            for t in (terms, test_terms)
        )
        flow = ntkdp.KernelFlow(
            kernel, TARGETS, SQUARED, RULES[rule][0](0.9, scope), test_kernel=test_kernel
        )
        state = flow.init((F_TRAIN, F_TEST))
        found.append((*flow.velocity(state), flow.measure(state, True).clip_fraction))
    for short, long in zip(*found, strict=True):
        np.testing.assert_allclose(short, long, rtol=1e-12, atol=1e-14)


def test_unclipped_squared_loss_has_closed_forms() -> None:
    """Against neural-tangents and the eigenvectors of the kernel, train and test, to 1e-6."""
    import neural_tangents as nt

    kernel = layer_kernel(J_TRAIN, J_TRAIN).total
    test_kernel = layer_kernel(J_TEST, J_TRAIN).total
    flow = ntkdp.KernelFlow(
        kernel,
        TARGETS,
        SQUARED,
        clipping.NoClipping(),
        test_kernel=test_kernel,
        test_targets=F_TEST,
    )
    times = np.linspace(0.0, 3.0, 7)
    path = ntkdp.solve(flow, (F_TRAIN, F_TEST), times, rtol=1e-9, atol=1e-12, outputs=True)
    assert path.successful

    H = np.transpose(kernel, (0, 2, 1, 3)).reshape(N * K, N * K)
    H_test = np.transpose(test_kernel, (0, 2, 1, 3)).reshape(M * K, N * K)
    values, vectors = np.linalg.eigh(H)
    modes = vectors.T @ (F_TRAIN - TARGETS).ravel()
    decay = np.exp(-np.outer(times, values) / N)
    train = TARGETS + ((decay * modes) @ vectors.T).reshape(-1, N, K)
    gone = -np.expm1(-np.outer(times, values) / N) / values * modes
    test = F_TEST - (gone @ vectors.T @ H_test.T).reshape(-1, M, K)
    np.testing.assert_allclose(known(path.outputs), train, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(known(path.test_outputs), test, rtol=1e-6, atol=1e-7)
    test_loss = np.mean(0.5 * np.sum((test - F_TEST) ** 2, 2), axis=1)
    np.testing.assert_allclose(known(path.test_loss), test_loss, rtol=1e-5, atol=1e-7)

    # Theirs is the mean over samples and outputs: K times as slow as the mean over samples.
    predict = nt.predict.gradient_descent_mse(kernel, jnp.asarray(TARGETS), trace_axes=())
    theirs = predict(jnp.asarray(times) * K, jnp.asarray(F_TRAIN), jnp.asarray(F_TEST), test_kernel)
    np.testing.assert_allclose(known(path.outputs), theirs[0], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(known(path.test_outputs), theirs[1], rtol=1e-6, atol=1e-7)


def huber_gradient(f: np.ndarray) -> np.ndarray:
    residual = f - TARGETS
    return residual / np.maximum(np.linalg.norm(residual, axis=1, keepdims=True) / 0.5, 1)


LABELS = np.array([0, 1, 1, 0])
GENERAL: dict[str, tuple[Any, Any, Callable[[np.ndarray], np.ndarray]]] = {
    "softmax": (
        losses.SoftmaxCrossEntropy(),
        LABELS,
        lambda f: scipy.special.softmax(f, 1) - np.eye(K)[LABELS],
    ),
    "huber": (losses.Huber(0.5), TARGETS, huber_gradient),
}


@pytest.mark.parametrize("name", list(GENERAL))
def test_flows_of_other_losses_against_scipy(name: str) -> None:
    loss, targets, gradient = GENERAL[name]
    scope: Scope = "layerwise" if name == "softmax" else "flat"
    rule = clipping.Abadi(R_OF_GROUP if scope == "layerwise" else 0.9, scope=scope)
    flow = ntkdp.KernelFlow(layer_kernel(J_TRAIN, J_TRAIN), targets, loss, rule)
    times = np.linspace(0.0, 4.0, 5)
    path = ntkdp.solve(flow, F_TRAIN, times, rtol=1e-8, atol=1e-10, outputs=True)

    def velocity(t: float, f: np.ndarray) -> np.ndarray:
        a = gradient(f.reshape(N, K))
        directions = clipped_directions(a, "abadi", scope, rule.R)
        moved = sum(J @ d for J, d in zip(J_TRAIN, directions, strict=True))
        return -np.ravel(moved) / N

    reference = scipy.integrate.solve_ivp(
        velocity, (0.0, 4.0), F_TRAIN.ravel(), t_eval=times, rtol=1e-9, atol=1e-11
    )
    expected = reference.y.T.reshape(-1, N, K)
    np.testing.assert_allclose(known(path.outputs), expected, rtol=1e-6, atol=1e-6)


def test_logistic_flow_against_scipy_and_its_accuracy() -> None:
    H = J_TRAIN[0][:, 0] @ J_TRAIN[0][:, 0].T + np.eye(N)
    f0 = F_TRAIN[:, :1]
    flow = ntkdp.KernelFlow(
        jnp.asarray(H), LABELS, losses.Logistic(), clipping.Automatic(0.5), reduction="sum"
    )
    times = np.linspace(0.0, 6.0, 4)
    path = ntkdp.solve(flow, f0, times, rtol=1e-8, atol=1e-10, outputs=True)

    def velocity(t: float, f: np.ndarray) -> np.ndarray:
        a = scipy.special.expit(f) - LABELS
        return -H @ (a * 0.5 / (np.sqrt(np.diag(H)) * np.abs(a) + 0.01))

    reference = scipy.integrate.solve_ivp(
        velocity, (0.0, 6.0), f0[:, 0], t_eval=times, rtol=1e-9, atol=1e-11
    ).y
    np.testing.assert_allclose(known(path.outputs)[:, :, 0], reference.T, rtol=1e-6, atol=1e-6)
    right = np.mean((reference.T > 0) == (LABELS == 1), axis=1)
    np.testing.assert_allclose(known(path.accuracy), right)
    signed = np.where(LABELS == 1, -1, 1) * reference.T
    np.testing.assert_allclose(path.loss, np.logaddexp(0, signed).sum(1), rtol=1e-5)


with np.load(DATA / "instances.npz") as _file:
    C19 = {name: jnp.asarray(_file[f"c19_{name}"]) for name in ("x", "y", "W", "v")}


def c19_network(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["W"].T) @ p["v"][:, None] / jnp.sqrt(20.0)


C19_PROBLEM = (
    C19["x"],
    jnp.reshape(C19["y"], (-1, 1)),
    SQUARED,
    clipping.Abadi(0.5),
)
C19_PARAMS = {"W": C19["W"], "v": C19["v"]}


@pytest.mark.slow
def test_descent_meets_the_exact_flow_at_first_order_in_the_step() -> None:
    """sup |L_discrete - L_flow| = O(eta), slope 1.00 +- 0.05: 0.0113 at 0.08, 0.0007 at 0.005."""
    finest, horizon = 0.005, 4.0
    flow = ntkdp.WeightFlow(c19_network, *C19_PROBLEM, reduction="sum")
    times = finest * np.arange(801)
    exact = ntkdp.solve(flow, C19_PARAMS, times, rtol=1e-9, atol=1e-12)
    errors = {}
    runs: list[tuple[float, Gradients]] = [
        (0.08, "vmap"), (0.08, "structured"), (0.005, "structured"),
    ]  # fmt: skip
    for eta, gradients in runs:
        run = ntkdp.dp_sgd.run(
            c19_network,
            C19_PARAMS,
            *C19_PROBLEM,
            learning_rate=eta,
            steps=round(horizon / eta),
            reduction="sum",
            gradients=gradients,
            key=jax.random.key(0),
        )
        at_same_times = exact.loss[:: round(eta / finest)]
        errors[eta, gradients] = float(jnp.max(jnp.abs(run.loss - at_same_times)))
    assert errors[0.08, "vmap"] == pytest.approx(0.01131, abs=5e-6)
    assert errors[0.08, "structured"] == pytest.approx(0.01131, abs=5e-6)
    assert errors[0.005, "structured"] == pytest.approx(0.000698, abs=5e-7)
    etas = [0.08, 0.005]
    slopes = np.diff(np.log([errors[eta, "structured"] for eta in etas])) / np.diff(np.log(etas))
    assert np.all(np.abs(slopes - 1.0) < 0.05), slopes


def test_velocity_of_a_network_is_plain_clipped_gradients() -> None:
    def loss(p: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return 0.5 * jnp.sum((c19_network(p, x[None])[0] - y) ** 2)

    x, y = C19_PROBLEM[:2]
    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))(C19_PARAMS, x, y)
    flat = {name: np.asarray(leaf).reshape(len(x), -1) for name, leaf in gradients.items()}
    for scope in ("flat", "layerwise"):
        flow = ntkdp.WeightFlow(c19_network, x, y, SQUARED, clipping.Abadi(0.2, scope=scope))
        velocity = eqx.filter_jit(flow.velocity)(C19_PARAMS)
        together = np.linalg.norm(np.concatenate(list(flat.values()), 1), axis=1)
        for name, g in flat.items():
            s = np.linalg.norm(g, axis=1) if scope == "layerwise" else together
            expected = -(np.minimum(1, 0.2 / s) @ g) / len(x)
            np.testing.assert_allclose(np.ravel(velocity[name]), expected, rtol=1e-9, atol=1e-13)


H7 = np.ones((3, 3)) + 0.1 * np.eye(3)
Y7 = np.array([-3.0, 1.0, 1.0])


def c7_flow(rule: Any) -> ntkdp.KernelFlow:
    return ntkdp.KernelFlow(jnp.asarray(H7), Y7, SQUARED, rule, reduction="sum")


def test_heavy_ball_against_scipy_and_its_energy() -> None:
    """L rises from 5.5 to 6.66 with friction 0.3, while Psi + |f'|^2 / 2 (in H^-1) never rises."""
    ball = ntkdp.HeavyBallFlow(c7_flow(clipping.Abadi(1.0)), friction=0.3)
    times = np.linspace(0.0, 12.0, 241)
    path = ntkdp.solve(ball, np.zeros((3, 1)), times, rtol=1e-8, atol=1e-10, outputs=True)

    def factors(f: np.ndarray) -> np.ndarray:
        return np.minimum(1, 1 / np.maximum(np.sqrt(1.1) * np.abs(f - Y7), 1e-300))

    def velocity(t: float, state: np.ndarray) -> np.ndarray:
        f, v = state[:3], state[3:]
        return np.concatenate([v, -H7 @ (factors(f) * (f - Y7)) - 0.3 * v])

    reference = scipy.integrate.solve_ivp(
        velocity, (0.0, 12.0), np.zeros(6), t_eval=times, rtol=1e-10, atol=1e-12
    ).y
    np.testing.assert_allclose(known(path.outputs)[:, :, 0], reference[:3].T, rtol=1e-5, atol=1e-6)
    assert float(path.loss[0]) == 5.5
    assert float(jnp.max(path.loss)) == pytest.approx(6.66, abs=0.005)
    tau = 1 / np.sqrt(1.1)
    a = np.abs(np.asarray(known(path.outputs)[:, :, 0]) - Y7)
    psi = np.where(a <= tau, 0.5 * a**2, tau * (a - 0.5 * tau)).sum(1)
    kinetic = 0.5 * np.einsum("it,ij,jt->t", reference[3:], np.linalg.inv(H7), reference[3:])
    energy = psi + kinetic
    assert np.all(np.diff(energy) < 1e-6)
    assert energy[-1] < 0.2 * energy[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kernel", "linearised"])
def test_heavy_ball_is_the_limit_of_momentum(kind: str) -> None:
    """The distance shrinks like the square root of the learning rate: its time step."""
    J = np.linalg.cholesky(H7)
    friction, horizon, errors = 1.0, 6.0, []
    start = jnp.zeros((3, 1))  # of outputs, and of weights
    flow: Any = c7_flow(clipping.Abadi(1.0))
    if kind == "linearised":
        flow = ntkdp.LinearisedFlow(
            lambda w, x: x @ w, start + 0.3, J, Y7, SQUARED, clipping.Abadi(1.0), reduction="sum"
        )
    ball = ntkdp.HeavyBallFlow(flow, friction)
    roots = [0.04, 0.01]
    exact = ntkdp.solve(ball, start, np.arange(601) * 0.01, rtol=1e-9, atol=1e-12)
    for root in roots:
        run = ntkdp.dp_sgd.run(
            lambda w, x: x @ w,
            jnp.zeros((3, 1)),
            J,
            Y7,
            SQUARED,
            clipping.Abadi(1.0),
            learning_rate=root**2,
            steps=round(horizon / root),
            optimizer=partial(optax.sgd, momentum=1 - friction * root),
            reduction="sum",
            key=jax.random.key(0),
        ).rescale_time(1 / root)
        every = round(root / 0.01)
        np.testing.assert_allclose(run.times, exact.times[::every], atol=1e-9)
        errors.append(float(jnp.max(jnp.abs(run.loss - exact.loss[::every]))))
    slopes = np.diff(np.log(errors)) / np.diff(np.log(roots))
    assert np.all(np.abs(slopes - 1.0) < 0.1), (errors, slopes)


KERNEL = jnp.eye(3)
ONES = np.ones((3, 2))
ABADI = clipping.Abadi(1.0)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((jnp.ones((3, 2)), np.zeros((3, 1))), {}, "square in the samples, got 3 by 2"),
        ((jnp.ones(3), np.zeros((3, 1))), {}, r"kernel must have shape .* got \(3,\)"),
        ((jnp.ones((3, 3, 2, 1)), np.zeros((3, 2))), {}, r"square K x K blocks, got \(2, 1\)"),
        ((jnp.ones((0, 0)), np.zeros((0, 1))), {}, "not empty"),
        ((KERNEL.at[0, 1].set(jnp.nan), np.zeros((3, 1))), {}, "kernel must be finite, got 1 NaN"),
        ((KERNEL, np.zeros((4, 1))), {}, r"targets must have one row a sample, 3.*got shape \(4"),
        ((jnp.ones((3, 3, 2, 2)), np.zeros((3, 1))), {}, r"targets .* \(3, 2\), got \(3, 1\)"),
        ((KERNEL, np.full((3, 1), np.inf)), {}, "targets must be finite, got 3"),
        ((KERNEL, np.zeros((3, 1))), {"test_targets": np.zeros((2, 1))}, "need a test_kernel"),
        ((KERNEL, np.zeros((3, 1))), {"test_kernel": jnp.ones((2, 4))}, "test_kernel must have"),
        (
            (KERNEL, np.zeros((3, 1))),
            {"test_kernel": jnp.ones((2, 3)), "test_targets": np.zeros((3, 1))},
            "test_targets must have one row a sample, 2",
        ),
        (
            (KERNEL, np.zeros((3, 1))),
            {"preconditioned_kernel": jnp.ones((2, 2))},
            r"preconditioned_kernel must have the shape of kernel, \(3, 3\), got \(2, 2\)",
        ),
        (
            (KERNEL, np.zeros((3, 1))),
            {"clipping": clipping.Abadi(1.0, scope="layerwise")},
            "kernel must be a LayerwiseKernel with scope='layerwise'",
        ),
        (
            (ntkdp.LayerwiseKernel(("a", "b"), jnp.ones((2, 3, 3))), np.zeros((3, 1))),
            {"clipping": clipping.Abadi([1.0, 1.0, 1.0], scope="layerwise")},
            "R has 3 entries for 2 parameter groups",
        ),
    ],
)
def test_bad_input_of_a_kernel_flow(
    arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    options = {"clipping": ABADI, "loss": SQUARED} | options
    with pytest.raises(ValueError, match=message):
        ntkdp.KernelFlow(*arguments, **options)


def test_bad_initial_states_and_types() -> None:
    flow = ntkdp.KernelFlow(KERNEL, np.zeros((3, 1)), SQUARED, ABADI)
    for initial, message in (
        (np.zeros((3, 2)), r"initial must have shape \(3, 1\), got \(3, 2\)"),
        (np.zeros((2, 1)), r"initial must have shape \(3, 1\), got \(2, 1\)"),
        (np.full((3, 1), np.nan), "initial must be finite, got 3"),
        ((np.zeros((3, 1)), np.zeros((2, 1))), "got a pair"),
    ):
        with pytest.raises(ValueError, match=message):
            flow.init(initial)
    tested = ntkdp.KernelFlow(
        KERNEL, np.zeros((3, 1)), SQUARED, ABADI, test_kernel=jnp.ones((2, 3))
    )
    with pytest.raises(ValueError, match="got one array"):
        tested.init(np.zeros((3, 1)))
    with pytest.raises(ValueError, match=r"initial\[1\] must have shape \(2, 1\), got \(3, 1\)"):
        tested.init((np.zeros((3, 1)), np.zeros((3, 1))))
    labels = ntkdp.KernelFlow(KERNEL, np.array([0, 1, 2]), losses.SoftmaxCrossEntropy(), ABADI)
    with pytest.raises(ValueError, match=r"labels in 0..1 for 2 outputs, got values from 0 to 2"):
        labels.init(np.zeros((3, 2)))
    with pytest.raises(TypeError, match="loss"):
        ntkdp.KernelFlow(KERNEL, np.zeros((3, 1)), "squared", ABADI)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="friction must be at least 0 and finite, got -1"):
        ntkdp.HeavyBallFlow(flow, -1.0)
    with pytest.raises(TypeError, match="flow must be a KernelFlow, a WeightFlow or a Linear"):
        ntkdp.HeavyBallFlow(ntkdp.HeavyBallFlow(flow, 1.0), 1.0)
    with pytest.raises(TypeError, match="flow must be a KernelFlow, a WeightFlow or a Linear"):
        ntkdp.HeavyBallFlow(ntkdp.ModifiedFlow(flow, 0.1), 1.0)


def test_bad_input_of_a_weight_flow() -> None:
    def flow(apply: Any = lambda w, x: x @ w, x: Any = ONES, **options: Any) -> Any:
        arguments: dict[str, Any] = {
            "targets": np.zeros((3, 1)),
            "loss": SQUARED,
            "clipping": ABADI,
        } | options
        return ntkdp.WeightFlow(apply, x, **arguments)

    w = jnp.ones((2, 1))
    with pytest.raises(ValueError, match="targets must have one row a sample, 3"):
        flow(targets=np.zeros((2, 1)))
    with pytest.raises(ValueError, match="test_targets need test_x"):
        flow(test_targets=np.zeros((2, 1)))
    with pytest.raises(ValueError, match="x must be finite, got 6"):
        flow(x=np.full((3, 2), np.nan)).init(w)
    with pytest.raises(ValueError, match="params must be finite, got 1"):
        flow().init(w.at[0].set(jnp.inf))
    with pytest.raises(ValueError, match=r"fails for test_x of shape \(4, 3\)"):
        flow(test_x=np.ones((4, 3))).init(w)
    with pytest.raises(ValueError, match="couples the samples"):
        flow(apply=lambda w, x: x @ w - jnp.mean(x @ w), x=np.arange(6.0).reshape(3, 2)).init(w)
    with pytest.raises(ValueError, match="preconditioner must be positive and finite"):
        flow(preconditioner=-w).init(w)
    with pytest.raises(ValueError, match=r"targets .* \(3, 2\), got \(3, 1\)"):
        flow().init(jnp.ones((2, 2)))
    three = clipping.Abadi([1.0, 1.0, 1.0], scope="layerwise")
    with pytest.raises(ValueError, match="R has 3 entries for 1 parameter groups"):
        flow(clipping=three).init(w)


@pytest.mark.slow
def test_float32() -> None:
    """Where float32 is JAX's default, and where a float32 network meets a float64 kernel."""
    steps: dict[str, Any] = {"learning_rate": 0.01, "steps": 76}
    double = ntkdp.recursion(c7_flow(ABADI), np.zeros((3, 1)), **steps)
    mixed = ntkdp.recursion(c7_flow(ABADI), jnp.zeros((3, 1), jnp.float32), **steps)
    np.testing.assert_allclose(mixed.loss, double.loss, rtol=1e-5)
    with jax.enable_x64(False):
        flow = ntkdp.KernelFlow(jnp.asarray(H7), Y7, SQUARED, ABADI, reduction="sum")
        path = ntkdp.solve(flow, np.zeros((3, 1)), [0.0, 0.767], rtol=1e-4, outputs=True)
        single = ntkdp.recursion(flow, np.zeros((3, 1)), **steps)
    assert path.loss.dtype == known(path.outputs).dtype == single.loss.dtype == jnp.float32
    assert path.successful
    assert float(path.loss[-1]) == pytest.approx(5.788, abs=1e-3)
    np.testing.assert_allclose(single.loss, double.loss, rtol=1e-5)
