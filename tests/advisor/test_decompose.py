"""Parts of one private step, against sums over all batches and against runs."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import known, often_or_slow

import ntkdp
from ntkdp import advisor, clipping, dp_sgd, losses
from ntkdp.batches import Batches, Cyclic, FixedSize, Full, Poisson

N, K, M = 6, 2, 3
RNG = np.random.default_rng(3)
X, X_TEST = jnp.asarray(RNG.normal(size=(N, 4))), jnp.asarray(RNG.normal(size=(M, 4)))
Y, Y_TEST = 2 * RNG.normal(size=(N, K)), RNG.normal(size=(M, K))
PARAMS = {name: jnp.asarray(0.5 * RNG.normal(size=(2, K))) for name in "ab"}
SQUARED = losses.SquaredError()
SIGMA = 0.7


def linear(w: Any, x: Any) -> Any:
    """Linear in two groups of weights."""
    return x[:, :2] @ w["a"] + x[:, 2:] @ w["b"]


def flow_of(rule: Any, reduction: Any = "mean", loss: Any = SQUARED, y: Any = Y) -> Any:
    whole = ntkdp.layerwise_ntk(linear, PARAMS, jnp.concatenate([X, X_TEST]))
    train, test = (
        jax.tree.map(lambda values, rows=rows: values[:, rows, :N], whole)
        for rows in (slice(N), slice(N, None))
    )
    flow = ntkdp.KernelFlow(
        train, y, loss, rule, reduction=reduction, test_kernel=test,
        test_targets=Y_TEST if loss is SQUARED else np.zeros(M, int),
    )  # fmt: skip
    return flow, whole


def subsets(batches: Batches) -> list[tuple[float, np.ndarray]]:
    """All batches and their probabilities, by hand."""
    if isinstance(batches, Poisson):
        drawn = [np.array(bits) for bits in itertools.product([0, 1], repeat=N)]
        q = float(batches.q)
        return [(q ** b.sum() * (1 - q) ** (N - b.sum()), b) for b in drawn]
    size = batches.size if isinstance(batches, FixedSize) else N
    chosen = list(itertools.combinations(range(N), size))
    return [(1 / len(chosen), np.isin(np.arange(N), c).astype(int)) for c in chosen]


def expected_changes(
    rule: Any, reduction: str, batches: Batches, rate: float, per_group: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Changes of the samples' squared losses, summed over all batches, by weights alone."""
    q = batches.share(N)
    divisor = q * (N if reduction == "mean" else 1)
    inputs = {"a": np.asarray(X[:, :2]), "b": np.asarray(X[:, 2:])}
    a = np.asarray(linear(PARAMS, X)) - Y
    norms = np.stack(
        [np.linalg.norm(x, axis=1) * np.linalg.norm(a, axis=1) for x in inputs.values()]
    )
    R = np.broadcast_to(np.asarray(rule.R), 2)
    if rule.scope == "flat":
        factors = np.tile(np.minimum(1, R[0] / np.hypot(*norms)), (2, 1))
        stds = np.full(2, SIGMA * R[0])
    else:
        factors = np.minimum(1, R[:, None] / norms)
        stds = SIGMA * (2**0.5 * R if per_group else np.full(2, np.linalg.norm(R)))
    changes = []
    for x, y in ((X, Y), (X_TEST, Y_TEST)):
        f = np.asarray(linear(PARAMS, x))
        rows = (np.asarray(x[:, :2]), np.asarray(x[:, 2:]))
        total = np.zeros(len(x))
        for chance, b in subsets(batches):
            moved = sum(
                row @ (inputs[name].T @ ((b * factors[r])[:, None] * a)) / divisor
                for r, (name, row) in enumerate(zip(inputs, rows, strict=True))
            )
            total += chance * 0.5 * ((f - rate * moved - y) ** 2).sum(1)
        noise = sum(
            (std * np.linalg.norm(row, axis=1)) ** 2 for std, row in zip(stds, rows, strict=True)
        )
        total += 0.5 * K * (rate / divisor) ** 2 * noise
        changes.append(total - 0.5 * ((f - y) ** 2).sum(1))
    return changes[0], changes[1]


FLAT, LAYERED = clipping.Abadi(1.0), clipping.Abadi(np.array([0.5, 1.5]), scope="layerwise")
CASES = [
    (scope, reduction, batches, per_group)
    for scope, reduction, batches, per_group in itertools.product(
        ("flat", "layerwise"),
        ("mean", "sum"),
        (Full(), Poisson(0.3), FixedSize(2)),
        (False, True),
    )
    if not (per_group and scope == "flat")
]
OFTEN = [("flat", "mean", Poisson(0.3), False), ("layerwise", "sum", FixedSize(2), True)]


@pytest.mark.parametrize(
    ("scope", "reduction", "batches", "per_group"), often_or_slow(CASES, OFTEN), ids=repr
)
def test_it_is_the_sum_over_all_batches(
    scope: str, reduction: Any, batches: Batches, per_group: bool
) -> None:
    """Squared loss under a frozen kernel: exact, for each sample and each learning rate."""
    rule = FLAT if scope == "flat" else LAYERED
    flow, whole = flow_of(rule, reduction)
    outputs = (linear(PARAMS, X), linear(PARAMS, X_TEST))
    found = advisor.decompose(
        flow, outputs, noise_multiplier=SIGMA, batches=batches, noise_kernel=whole,
        noise_per_group=per_group,
    )  # fmt: skip
    for rate in (0.05, 0.8):
        train, test = expected_changes(rule, reduction, batches, rate, per_group)
        np.testing.assert_allclose(found.train.change(rate), train, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(known(found.test).change(rate), test, rtol=1e-10, atol=1e-12)
        gather = np.mean if reduction == "mean" else np.sum
        np.testing.assert_allclose(found.train.total().change(rate), gather(train), rtol=1e-9)


def softmax_parts(**options: Any) -> tuple[advisor.StepTerms, np.ndarray]:
    labels = np.arange(N) % K
    kernel = ntkdp.empirical_ntk(linear, PARAMS, X)
    flow = ntkdp.KernelFlow(kernel, labels, losses.SoftmaxCrossEntropy(), FLAT)
    return advisor.decompose(flow, linear(PARAMS, X), **options).train, labels


@pytest.mark.slow
def test_another_loss_is_within_three_standard_errors_of_runs() -> None:
    """2,000 steps of DP-SGD; what is left out is of third order in the step."""
    parts, labels = softmax_parts(noise_multiplier=SIGMA, sample_rate=0.5)
    loss, rate = losses.SoftmaxCrossEntropy(), 0.3
    runs = dp_sgd.run(
        linear, PARAMS, X, labels, loss, FLAT, learning_rate=rate, steps=1, noise_multiplier=SIGMA,
        sample_rate=0.5, key=jax.random.split(jax.random.key(0), 2000),
    ).loss  # fmt: skip
    change = np.asarray(runs[:, 1] - runs[:, 0])
    error = change.std() / 2000**0.5
    assert abs(float(parts.total().change(rate)) - change.mean()) < 3 * error
    assert error < 0.05 * abs(change.mean())


def test_the_best_learning_rate_is_the_best_of_all() -> None:
    parts = softmax_parts(noise_multiplier=SIGMA, sample_rate=0.5)[0].total()
    best, change = float(parts.best_learning_rate()), float(parts.best_change())
    rates = best * np.linspace(0.5, 1.5, 101)
    changes = [float(parts.change(rate)) for rate in rates]
    assert rates[int(np.argmin(changes))] == pytest.approx(best, rel=1e-9)
    assert min(changes) == pytest.approx(change, rel=1e-9)
    none = 0 * parts.descent
    uphill = advisor.StepTerms(-parts.descent, parts.curvature, none, none, "sum")
    assert float(uphill.best_learning_rate()) == float(uphill.best_change()) == 0.0
    free = advisor.StepTerms(parts.descent, none, none, none, "mean")
    assert float(free.best_learning_rate()) == np.inf


def test_along_a_run_and_by_group() -> None:
    flow, _ = flow_of(FLAT)
    alone = ntkdp.KernelFlow(flow.terms()[0], Y, SQUARED, FLAT)
    path = ntkdp.recursion(alone, linear(PARAMS, X), learning_rate=0.2, steps=3, outputs=True)
    parts = advisor.decompose(alone, known(path.outputs), sample_rate=0.5).train
    assert parts.descent.shape == (4, N)
    last = advisor.decompose(alone, known(path.outputs)[-1], sample_rate=0.5).train
    np.testing.assert_allclose(parts.sampling[-1], last.sampling, rtol=1e-12)
    labels = np.array([5, 1, 1, 5, 5, 1])
    grouped = parts.by_group(labels)
    assert grouped.descent.shape == (4, 2)
    np.testing.assert_allclose(grouped.curvature[:, 1], parts.curvature[:, labels == 5].mean(1))
    assert parts.total().privacy.shape == (4,)
    # Without noise a step does what descent and curvature say.
    quiet = advisor.decompose(alone, known(path.outputs)).train.total()
    np.testing.assert_allclose(np.diff(path.loss), quiet.change(0.2)[:-1], rtol=1e-10)


def test_what_cannot_be_split_is_named() -> None:
    flow, whole = flow_of(FLAT)
    outputs = (linear(PARAMS, X), linear(PARAMS, X_TEST))
    with pytest.raises(ValueError, match=r"batches must be full, Poisson or of a fixed size"):
        advisor.decompose(flow, outputs, batches=Cyclic(2))
    with pytest.raises(ValueError, match=r"noise_kernel must be the kernel of train and test"):
        advisor.decompose(flow, outputs, noise_multiplier=1.0)
    plain = ntkdp.KernelFlow(np.eye(N), Y, SQUARED, FLAT, preconditioned_kernel=2 * np.eye(N))
    with pytest.raises(ValueError, match=r"flow must have no preconditioned_kernel"):
        advisor.decompose(plain, outputs[0], noise_multiplier=1.0)
    with pytest.raises(ValueError, match=r"labels must have shape \(6,\)"):
        advisor.decompose(flow, outputs, noise_kernel=whole).train.by_group([0, 1])
