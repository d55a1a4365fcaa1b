"""Advice against closed forms, real runs and grids made by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import cells, known, linear
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import ntkdp
from ntkdp import advisor, clipping, losses, privacy, stochastic_flow
from ntkdp._backend import memory
from ntkdp.advisor import CellMetrics, Grid

# --- gradient norms ------------------------------------------------------------------------------


def two_layers(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["first"]) @ params["second"]


def test_gradient_norms_are_those_of_plain_gradients() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "first": jax.random.normal(keys[0], (4, 6)),
        "second": jax.random.normal(keys[1], (6, 3)),
    }
    x, labels = jax.random.normal(keys[2], (11, 4)), jnp.arange(11) % 3

    def of_sample(params: Any, x: Any, label: Any) -> Any:
        return -jax.nn.log_softmax(two_layers(params, x[None])[0])[label]

    gradients = jax.vmap(jax.grad(of_sample), in_axes=(None, 0, 0))(params, x, labels)
    by_group = np.stack([np.linalg.norm(g.reshape(11, -1), axis=1) for g in gradients.values()])
    shares = (0.0, 0.25, 0.9, 1.0)
    for groups, norms in ((None, np.linalg.norm(by_group, axis=0)), (lambda path: path, by_group)):
        found = advisor.gradient_norms(
            two_layers,
            params,
            x,
            labels,
            losses.SoftmaxCrossEntropy(),
            groups=groups,
            quantiles=shares,
        )
        expected = np.moveaxis(np.quantile(norms, shares, axis=-1), 0, -1)
        np.testing.assert_allclose(found.norms, expected, rtol=1e-10)
        assert found.groups == (None if groups is None else ("first", "second"))
        assert found.quantiles.tolist() == list(shares)


@pytest.mark.parametrize("quantiles", [[1.1], [-0.1], 0.5, [], [np.nan]])
def test_bad_quantiles_are_named(quantiles: Any) -> None:
    with pytest.raises(ValueError, match="quantiles must be"):
        advisor.gradient_norms(
            lambda w, x: x @ w,
            jnp.ones((2, 1)),
            jnp.ones((3, 2)),
            jnp.ones(3),
            losses.SquaredError(),
            quantiles=quantiles,
        )


# --- the largest stable learning rate ------------------------------------------------------------


def quadratic(
    eigenvalues: Any, rule: Any = None, reduction: Any = "mean", dtype: Any = jnp.float64
) -> tuple[Any, Any]:
    """A kernel with these eigenvalues and squared loss, targets zero, and outputs in all modes."""
    n = len(eigenvalues)
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(n, n)))[0]
    kernel = jnp.asarray(basis * np.asarray(eigenvalues) @ basis.T, dtype)
    rule = clipping.NoClipping() if rule is None else rule
    flow = ntkdp.KernelFlow(
        (kernel + kernel.T) / 2, jnp.zeros((n, 1), dtype), losses.SquaredError(), rule,
        reduction=reduction,
    )  # fmt: skip
    return flow, jnp.asarray(basis @ np.ones((n, 1)), dtype)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_without_clipping_it_tends_to_two_over_the_largest_eigenvalue(reduction: Any) -> None:
    flow, initial = quadratic([7.0, 2.0, 0.5, 0.1], reduction=reduction)
    limit = 2 / 7.0 * (4 if reduction == "mean" else 1)
    excess = []
    for steps in (25, 100, 400):
        rate = advisor.largest_stable_learning_rate(flow, initial, steps=steps, tolerance=1e-7)
        # Along the largest eigenvalue (1 - eta lambda)^2k = rho^2k, and all else only decays.
        modes = np.array([7.0, 2.0, 0.5, 0.1]) * rate * 2 / (7.0 * limit)
        loss = np.sum((1 - modes) ** (2 * steps)) / 4
        assert loss == pytest.approx(1.0, rel=2e-7 * 2 * steps * 2)
        excess.append(rate / limit - 1)
    # It is found where 2 k log(1 + 2 x) = log 4, so the excess x falls as 1/k.
    slopes = np.diff(np.log(excess)) / np.log(4)
    np.testing.assert_allclose(slopes, -1, atol=0.03)
    assert 0 < excess[-1] < 1e-3


def test_with_clipping_one_sample_has_its_closed_form() -> None:
    """Claim C21's cycle: clipped, |a| ends between 0 and eta R sqrt(h) and not above its start."""
    h, a0 = 4.0, 5.0
    flow = ntkdp.KernelFlow(
        h * jnp.eye(1), jnp.zeros((1, 1)), losses.SquaredError(), clipping.Abadi(1.0),
        reduction="sum",
    )  # fmt: skip
    # One step takes 5 to 5 - 2 eta, which is as large as before at eta = 5.
    rate = advisor.largest_stable_learning_rate(flow, jnp.array([[a0]]), steps=1, tolerance=1e-6)
    assert rate == pytest.approx(5.0, rel=2e-6)
    for clip_norm in (0.5, 4.0):
        rate = advisor.largest_stable_learning_rate(
            flow, jnp.array([[a0]]), steps=1, clip_norm=clip_norm, tolerance=1e-6
        )
        assert rate == pytest.approx(5.0 / clip_norm, rel=2e-6)


def test_without_an_end_it_is_infinite() -> None:
    """Labels that one step separates by any margin: the larger the rate, the lower the loss."""
    flow = ntkdp.KernelFlow(
        jnp.eye(2), jnp.array([0, 1]), losses.SoftmaxCrossEntropy(), clipping.NoClipping()
    )
    found = advisor.largest_stable_learning_rate(flow, jnp.zeros((2, 2)), steps=5)
    assert found == np.inf


def test_float32_and_large_rates_that_overflow() -> None:
    flow, initial = quadratic([3.0, 1.0], dtype=jnp.float32)
    rate = advisor.largest_stable_learning_rate(
        flow, initial, steps=500, high=1e30, tolerance=1e-12
    )
    np.testing.assert_allclose(rate, 2 * 2 / 3.0, rtol=2e-3)


def test_layerwise_flow_without_clipping_is_that_of_the_sum() -> None:
    terms = jnp.stack([jnp.diag(jnp.array([4.0, 1.0])), jnp.diag(jnp.array([1.0, 3.0]))])
    flow = ntkdp.KernelFlow(
        ntkdp.LayerwiseKernel(("a", "b"), terms),
        jnp.zeros((2, 1)),
        losses.SquaredError(),
        clipping.NoClipping(scope="layerwise"),
    )
    rate = advisor.largest_stable_learning_rate(flow, jnp.ones((2, 1)), steps=1000)
    assert rate == pytest.approx(2 * 2 / 5.0, rel=1.2e-2)


def test_noise_at_the_optimum_has_no_stable_rate() -> None:
    flow, _ = quadratic([3.0, 1.0], clipping.Abadi(1.0))
    with pytest.raises(ValueError, match=r"low must be a stable learning rate, got 0\.0001"):
        advisor.largest_stable_learning_rate(
            flow, jnp.zeros((2, 1)), steps=5, noise_multiplier=1.0, key=jax.random.key(0)
        )


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (None, {"low": 1.0, "high": 1.0}, "low must be below high"),
        (None, {"low": 0.0}, "low must be positive"),
        (None, {"tolerance": -1.0}, "tolerance must be positive"),
        (None, {"clip_norm": 1.0}, "clip_norm must be None with a flow that does not clip"),
        (None, {"low": 1e3}, "low must be a stable learning rate, got 1000"),
        (clipping.Abadi(1.0), {"clip_norm": -1.0}, "clip_norms must be positive"),
        (clipping.Abadi(1.0), {"steps": 0}, "steps must be at least 1"),
    ],
)
def test_bad_input_of_the_search(rule: Any, options: Any, message: str) -> None:
    flow, initial = quadratic([3.0, 1.0], rule)
    with pytest.raises(ValueError, match=message):
        advisor.largest_stable_learning_rate(flow, initial, **({"steps": 20} | options))


def test_norms_by_group_are_refused() -> None:
    flow = ntkdp.KernelFlow(
        ntkdp.LayerwiseKernel(("a", "b"), jnp.stack([jnp.eye(2)] * 2)),
        jnp.zeros((2, 1)),
        losses.SquaredError(),
        clipping.Abadi(jnp.array([1.0, 2.0]), scope="layerwise"),
    )
    with pytest.raises(ValueError, match="clip_norm must be given"):
        advisor.largest_stable_learning_rate(flow, jnp.ones((2, 1)), steps=2)
    found = advisor.largest_stable_learning_rate(flow, jnp.ones((2, 1)), steps=2, clip_norm=2.0)
    assert 0 < found < np.inf
    with pytest.raises(TypeError, match="flow"):
        advisor.largest_stable_learning_rate(
            None,  # type: ignore[arg-type]
            jnp.ones((2, 1)),
            steps=2,
        )


# --- the grid ------------------------------------------------------------------------------------

N, M, D = 12, 8, 5
RATES, NORMS, STEPS = np.array([0.5, 2.0, 400.0]), np.array([0.1, 5.0]), 9


def linear_problem(n_outputs: int = 3) -> tuple[Any, Any, Any, Any]:
    keys = jax.random.split(jax.random.key(1), 2)
    x = jax.random.normal(keys[0], (N + M, D))
    # Not separable: a rate that is far too large leaves a loss above the first.
    labels = jnp.arange(N + M) % n_outputs
    weights = 0.1 * jax.random.normal(keys[1], (D, n_outputs))
    flow = ntkdp.KernelFlow(
        x[:N] @ x[:N].T,
        labels[:N],
        losses.SoftmaxCrossEntropy(),
        clipping.Abadi(1.0),
        test_kernel=x[N:] @ x[:N].T,
        test_targets=labels[N:],
    )
    return flow, (x[:N] @ weights, x[N:] @ weights), (x, labels), weights


def test_cells_end_as_real_runs_of_a_linear_model_do() -> None:
    flow, initial, (x, labels), weights = linear_problem()
    grid = advisor.predict(flow, initial, learning_rates=RATES, clip_norms=NORMS, steps=STEPS)
    by_rate, by_norm = grid.cells()
    assert by_rate.tolist() == [0.5, 0.5, 2.0, 2.0, 400.0, 400.0]
    assert by_norm.tolist() == [0.1, 5.0] * 3
    for cell, (rate, norm) in enumerate(zip(by_rate, by_norm, strict=True)):
        run = ntkdp.dp_sgd.run(
            linear,
            weights,
            x[:N],
            labels[:N],
            losses.SoftmaxCrossEntropy(),
            clipping.Abadi(norm),
            learning_rate=rate,
            steps=STEPS,
            test_x=x[N:],
            test_targets=labels[N:],
            outputs=True,
            key=jax.random.key(0),
        )
        found = grid.metrics.cell(cell)
        for name in ("loss", "accuracy", "test_loss", "test_accuracy"):
            np.testing.assert_allclose(known(found[name]), getattr(run, name)[-1], rtol=1e-8)
        for prefix, outputs, truth in (
            ("", known(run.outputs)[-1], labels[:N]),
            ("test_", known(run.test_outputs)[-1], labels[N:]),
        ):
            confidence = np.max(np.asarray(jax.nn.softmax(outputs)), axis=1)
            right = np.argmax(np.asarray(outputs), axis=1) == np.asarray(truth)
            bins = np.clip(np.ceil(confidence * 15).astype(int) - 1, 0, 14)
            gaps = [np.sum((right - confidence)[bins == b]) / len(right) for b in range(15)]
            np.testing.assert_allclose(
                known(found[prefix + "ece"]), np.sum(np.abs(gaps)), atol=1e-9
            )
        assert found["diverged"] == (run.loss[-1] > run.loss[0])
        assert grid.initial_loss == pytest.approx(float(run.loss[0]))
    assert np.any(grid.metrics.diverged)
    assert not np.all(grid.metrics.diverged)


def test_parts_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """With memory for one cell at a time nothing changes, and progress runs from 0 to 1 once."""
    flow, initial, (x, _), _ = linear_problem()
    options: dict[str, Any] = {
        "learning_rates": RATES,
        "clip_norms": NORMS,
        "steps": STEPS,
        "noise_multiplier": 0.7,
        "sample_rate": 0.5,
        "noise_kernel": x @ x.T,
        "key": jax.random.split(jax.random.key(2), 3),
    }
    whole = advisor.predict(flow, initial, **options)
    of_cell = 8 * 2 * (N + M) * 3 * 3 * 8
    of_noise = 4 * (N + M) ** 2 * 8
    monkeypatch.setattr(memory, "available_bytes", lambda: of_noise + of_cell)
    told: list[float] = []
    parts = advisor.predict(flow, initial, progress=told.append, **options)
    for name in CellMetrics._fields:
        mine, theirs = (np.asarray(getattr(side.metrics, name)) for side in (whole, parts))
        np.testing.assert_allclose(mine, theirs, rtol=1e-10, atol=1e-12)
    assert told == sorted(told)
    # Every part reports as it goes, and its end is a whole number of sixths.
    assert {k / 6 for k in range(1, 7)} <= set(told)
    monkeypatch.setattr(memory, "available_bytes", lambda: of_noise + of_cell - 1)
    with pytest.raises(MemoryError, match="predicting a cell needs"):
        advisor.predict(flow, initial, **options)


def test_a_budget_is_its_noise_and_seeds_are_averaged() -> None:
    flow, initial, (x, _), _ = linear_problem()
    budget = privacy.Budget(mu=2.0)
    options: dict[str, Any] = {
        "learning_rates": [0.5],
        "clip_norms": [1.0],
        "steps": 16,
        "noise_kernel": x @ x.T,
    }
    keys = jax.random.split(jax.random.key(0), 3)
    grid = advisor.predict(flow, initial, noise_multiplier=budget, key=keys, **options)
    # mu-GDP of K full batches: sigma = sqrt K / mu.
    assert grid.noise_multiplier == pytest.approx(2.0)
    single = [
        advisor.predict(flow, initial, noise_multiplier=2.0, key=key, **options).metrics
        for key in keys
    ]
    for name in ("loss", "test_accuracy", "test_ece", "test_mce"):
        each = [getattr(one, name) for one in single]
        np.testing.assert_allclose(getattr(grid.metrics, name), np.mean(each, axis=0), rtol=1e-10)
    assert np.std([one.loss[0] for one in single]) > 1e-3


def test_rounding_is_no_divergence() -> None:
    """At the optimum nothing moves, and a loss that is equal but for rounding did not rise."""
    flow, _ = quadratic(np.linspace(1, 2, 50), clipping.Abadi(1.0))
    still = jnp.full((50, 1), 1e-9)
    grid = advisor.predict(flow, still, learning_rates=[1e-20], clip_norms=[1.0], steps=3)
    assert not grid.metrics.diverged[0]


def test_regression_and_no_test_set_have_fewer_metrics() -> None:
    flow, initial = quadratic([3.0, 1.0], clipping.Abadi(1.0))
    grid = advisor.predict(flow, initial, learning_rates=[0.1], clip_norms=[1.0], steps=2)
    known = {name for name, values in grid.metrics.items() if values is not None}
    assert known == {"loss", "diverged"}
    with pytest.raises(ValueError, match="a metric that grid has, loss; got 'test_accuracy'"):
        advisor.advise(grid)
    assert advisor.advise(grid, objective="loss").curve is None
    assert jax.tree.map(lambda leaf: leaf, grid)._fields == Grid._fields


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"learning_rates": 0.1}, ValueError, "learning_rates must be an array of one dimension"),
        ({"clip_norms": []}, ValueError, "clip_norms must be an array of one dimension"),
        ({"clip_norms": [[1.0]]}, ValueError, "clip_norms must be an array of one dimension"),
        ({"learning_rates": [0.1, np.nan]}, ValueError, "learning_rates must be positive"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"noise_multiplier": -1.0}, ValueError, "noise_multiplier must be at least 0"),
        ({"noise_multiplier": np.ones(2)}, ValueError, "noise_multiplier must be a single number"),
        ({"noise_multiplier": 1.0}, ValueError, "key must be given"),
        ({"sample_rate": 0.0}, ValueError, "sample_rate must be in"),
        ({"initial": jnp.ones((2, 1))}, ValueError, "initial must be a .train, test. pair"),
        ({"flow": None}, TypeError, "flow"),
    ],
)
def test_bad_input_of_predict(change: dict[str, Any], error: Any, message: str) -> None:
    flow, initial, _, _ = linear_problem()
    options = {"flow": flow, "initial": initial, "learning_rates": RATES, "clip_norms": NORMS}
    options |= {"steps": 2}
    with pytest.raises(error, match=message):
        advisor.predict(**(options | change))


# --- kernels between times -----------------------------------------------------------------------


def wide_problem(**options: Any) -> tuple[Any, Any, Any]:
    """A kernel flow, the same problem between times, and outputs at the start."""
    x = jax.random.normal(jax.random.key(0), (6, 3))
    labels, loss = jnp.arange(6) % 2, losses.SoftmaxCrossEntropy()
    model, rule = ntkdp.models.mlp([8], 2, activation="erf"), clipping.Abadi(1.0)
    flow = ntkdp.KernelFlow(ntkdp.infinite_ntk(model, x), labels, loss, rule)
    arguments: Any = {"targets": labels, "loss": loss, "clipping": rule} | options
    return flow, stochastic_flow.TwoTimeFlow(model, x, **arguments), jnp.zeros((6, 2))


@pytest.mark.slow
def test_cells_in_which_noise_moves_the_kernel_are_predicted_between_times() -> None:
    flow, between, initial = wide_problem()
    keys = jax.random.split(jax.random.key(1), 3)
    options: Any = {"steps": 5, "noise_multiplier": 2.0, "sample_rate": 0.8, "key": keys}
    axes: Any = {"learning_rates": [0.1, 2.0], "clip_norms": [0.1, 1.0]}
    grid = advisor.predict(flow, initial, between_times=between, **axes, **options)
    # v(T) = 5 (eta sigma R / (q n))^2, in NTK parameterisation.
    rates, norms = grid.cells()
    noise = known(grid.weight_noise)
    np.testing.assert_allclose(noise, 5 * (rates * 2 * norms / 4.8) ** 2, rtol=1e-12)
    assert grid.kernels is not None
    assert grid.kernels.tolist() == ["frozen", "frozen", "between times", "between times"]
    frozen, all_moved = (
        advisor.predict(flow, initial, between_times=between, kernels=choice, **axes, **options)
        for choice in ("frozen", "between times")
    )
    plain = advisor.predict(flow, initial, **axes, **options)
    assert plain.kernels is None
    np.testing.assert_array_equal(frozen.metrics.loss, plain.metrics.loss)
    np.testing.assert_array_equal(grid.metrics.loss[:2], frozen.metrics.loss[:2])
    np.testing.assert_allclose(grid.metrics.loss[2:], all_moved.metrics.loss[2:], rtol=1e-9)
    final = stochastic_flow.two_time_final_outputs(
        between, initial, learning_rates=rates, clip_norms=norms, steps=5, noise_multipliers=2.0,
        sample_rate=0.8, key=keys,
    )  # fmt: skip
    loss = jnp.mean(
        jax.vmap(jax.vmap(flow.loss, (0, None)), (0, None))(final.train, flow.targets), (1, 2)
    )
    np.testing.assert_allclose(all_moved.metrics.loss, loss, rtol=1e-9)
    assert np.all(np.abs(all_moved.metrics.loss[2:] / frozen.metrics.loss[2:] - 1) > 1e-3)
    from_ten = advisor.predict(
        flow, initial, between_times=between, moving_from=10.0, **axes, **options
    )
    assert from_ten.kernels is not None
    assert set(from_ten.kernels.tolist()) == {"frozen"}


@pytest.mark.parametrize(
    ("change", "problem", "error", "message"),
    [
        (
            {"between_times": None, "kernels": "between times"},
            {},
            ValueError,
            "must be given with k",
        ),
        ({}, {"clipping": clipping.Automatic(1.0)}, ValueError, "with Abadi.*got Automatic"),
        ({}, {"reduction": "sum"}, ValueError, "with reduction mean, got reduction sum"),
        ({"moving_from": -1.0}, {}, ValueError, "moving_from must be at least 0"),
        ({"key": None}, {}, ValueError, "key must be given with noise"),
    ],
)
def test_bad_kernels_between_times(
    change: dict[str, Any], problem: dict[str, Any], error: Any, message: str
) -> None:
    flow, between, initial = wide_problem(**problem)
    options: dict[str, Any] = {
        "learning_rates": [2.0], "clip_norms": [1.0], "steps": 2, "noise_multiplier": 1.0,
        "between_times": between, "key": jax.random.key(0),
    } | change  # fmt: skip
    with pytest.raises(error, match=message):
        advisor.predict(flow, initial, **options)


# --- advice --------------------------------------------------------------------------------------


def grid_of(metrics: CellMetrics, rates: Any, norms: Any) -> Grid:
    return Grid(np.asarray(rates, float), np.asarray(norms, float), metrics, 1.0, 0.0)


def test_the_best_cell_that_converges() -> None:
    metrics = cells(
        [False, False, False, True],
        test_accuracy=[0.5, 0.7, 0.8, 0.9],
        test_loss=[0.4, 0.9, 0.8, 0.1],
        test_ece=[0.01, 0.02, 0.2, 0.0],
    )
    grid = grid_of(metrics, [0.1, 1.0], [2.0, 20.0])
    advice = advisor.advise(grid)
    assert (advice.index, advice.learning_rate, advice.clip_norm) == (2, 1.0, 2.0)
    assert advice.predicted == metrics.cell(2)
    assert advisor.advise(grid, objective="test_loss").index == 0
    assert advice.curve is not None
    indices, values = advice.curve
    assert indices.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(values, [[0.5, 0.01], [0.7, 0.02], [0.8, 0.2]])


@pytest.mark.parametrize(("slack", "expected"), [(0.0, 3), (0.02, 2), (0.15, 1), (1.0, 0)])
@pytest.mark.parametrize("objective", ["test_ece", "test_mce"])
def test_calibration_is_asked_of_accurate_cells_only(
    objective: str, slack: float, expected: int
) -> None:
    """The less accurate, the better calibrated: the slack decides how far to go."""
    error = [0.0, 0.01, 0.02, 0.03]
    metrics = cells(
        test_accuracy=[0.1, 0.8, 0.89, 0.9], test_ece=error, test_mce=np.array(error) * 2
    )
    grid = grid_of(metrics, [0.1, 1.0], [2.0, 20.0])
    assert advisor.advise(grid, objective=objective, slack=slack).index == expected


def test_ties_go_to_the_smaller_rate_then_the_smaller_norm() -> None:
    """Whatever the order of the grid, and where the loss differs by rounding alone."""
    loss = np.array([0.5, 0.3, 0.3 - 1e-12, 0.3, 0.3, 0.9])
    for rates, norms, expected in (
        ([2.0, 1.0], [3.0, 2.0, 1.0], (1.0, 2.0)),
        ([1.0, 2.0], [1.0, 2.0, 3.0], (1.0, 2.0)),
        ([1.0, 2.0], [3.0, 2.0, 1.0], (1.0, 1.0)),
    ):
        advice = advisor.advise(grid_of(cells(loss=loss), rates, norms), objective="loss")
        assert (advice.learning_rate, advice.clip_norm) == expected


@given(
    arrays.arrays(np.float64, (2, 12), elements=st.integers(0, 5).map(lambda v: v / 5)),
    arrays.arrays(np.bool_, 12),
)
def test_front_by_exhaustive_search(values: Any, lost: Any) -> None:
    accuracy, ece = values
    metrics = cells(lost, test_accuracy=accuracy, test_ece=ece)
    indices, found = advisor.pareto_front(metrics)
    points = {(accuracy[i], ece[i]) for i in range(12) if not lost[i]}

    def beats(one: Any, other: Any) -> bool:
        return one != other and one[0] >= other[0] and one[1] <= other[1]

    best = {point for point in points if not any(beats(other, point) for other in points)}
    assert [tuple(point) for point in found.tolist()] == sorted(best)
    assert [(accuracy[i], ece[i]) for i in indices] == sorted(best)
    for i in indices:
        same = np.flatnonzero((accuracy == accuracy[i]) & (ece == ece[i]) & ~lost)
        assert i == same[0]


def test_advice_from_a_prediction_has_little_regret() -> None:
    """The whole way on a model whose kernel does not move: what is predicted is what happens."""
    flow, initial, _, _ = linear_problem()
    grid = advisor.predict(flow, initial, learning_rates=RATES, clip_norms=NORMS, steps=STEPS)
    for objective in ("test_accuracy", "test_loss", "ece"):
        advice = advisor.advise(grid, objective=objective)
        assert advisor.regret(grid.metrics, advice.index, objective) == pytest.approx(0, abs=1e-5)
        assert not grid.metrics.diverged[advice.index]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"objective": "test_los"}, ValueError, "did you mean 'test_loss'"),
        ({"objective": "diverged"}, ValueError, "unknown objective 'diverged'"),
        ({"objective": "mce"}, ValueError, "a metric that grid has, loss, accuracy; got 'mce'"),
        ({"slack": -1.0}, ValueError, "slack must be at least 0"),
        ({"grid": grid_of(cells([True], loss=[2.0]), [1.0], [1.0])}, ValueError, "none of 1"),
        ({"grid": grid_of(cells(loss=[2.0]), [1.0, 2.0], [1.0])}, ValueError, "each of 2 pairs"),
        ({"grid": None}, TypeError, "grid"),
    ],
)
def test_bad_input_of_advise(change: dict[str, Any], error: Any, message: str) -> None:
    options: dict[str, Any] = {"objective": "loss"}
    options["grid"] = grid_of(cells(loss=[2.0], accuracy=[0.1]), [1.0], [1.0])
    with pytest.raises(error, match=message):
        advisor.advise(**(options | change))


def test_front_needs_both_metrics() -> None:
    with pytest.raises(ValueError, match="metrics must have test_accuracy and test_ece, got no"):
        advisor.pareto_front(cells(test_accuracy=[0.1]))
    indices, values = advisor.pareto_front(cells([True], test_accuracy=[0.1], test_ece=[0.1]))
    assert indices.shape == (0,)
    assert values.shape == (0, 2)
