"""Plans of private runs, against loops in NumPy, closed forms and the laws of noise."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SQUARED, known, linear, often_or_slow

import ntkdp
from ntkdp import advisor, clipping, losses, models, optimizers, privacy
from ntkdp.advisor._planning.cells import Accounts, Cell, axes_of
from ntkdp.advisor._planning.ends import Problem, Steps, _refined, ends
from ntkdp.advisor._planning.features import Features, features_of
from ntkdp.advisor._planning.more_data import extrapolated
from ntkdp.advisor._planning.prediction import Setting, predict, steps_of
from ntkdp.noise import Correlated, Independent
from ntkdp.stochastic_flow import ResponseFlow

N, M, R, K = 6, 3, 4, 2
RNG = np.random.default_rng(5)
PHI = RNG.normal(size=(N + M, R))
LEFT = RNG.uniform(0.1, 0.5, size=N + M)
START, Y = RNG.normal(size=(N + M, K)), 2 * RNG.normal(size=(N, K))
KEYS = jax.random.split(jax.random.key(0), 2)


def frozen(phi: np.ndarray, left: np.ndarray) -> Features:
    """Features of a kernel that noise does not move."""
    own, modes = np.sum(phi**2, axis=1) + left, phi.shape[1] + 1
    still = (np.ones((1, 1, modes - 1)), np.ones((1, modes)), np.ones(1), np.zeros((1, modes)))
    return Features(*map(jnp.asarray, (phi, left, np.zeros(1), own[None], *still)))


def ends_of(problem: Problem, made: Steps, keys: Any, merged: bool = False) -> np.ndarray:
    return np.asarray(ends(problem, made, keys, jnp.asarray(0), merged))


def problem_of(**changes: Any) -> Problem:
    parts: dict[str, Any] = {
        "features": frozen(PHI, LEFT),
        "start": jnp.asarray(START),
        "targets": jnp.asarray(Y),
        "loss": SQUARED,
        "clipping": clipping.Abadi(1.0),
        "optimizer": optimizers.SGD(),
        "noise": Independent(),
    }
    return Problem(**parts | changes)


def setting_of(problem: Problem, sigma: float = 0.0, n_samples: int = N) -> Setting:
    """A setting whose cells all have one noise multiplier."""
    accounts = Accounts(1e-3, problem.noise, n_samples)
    accounts.noise_multiplier = lambda cell: sigma  # type: ignore[method-assign]
    return Setting(problem, None, "mean", 1e9, n_samples, accounts, "loss", 512)


def steps_for(setting: Setting, cells: list[Cell], counts: list[int] | None = None) -> Any:
    sigmas = setting.accounts.of_cells(cells)
    own = np.array([cell.steps for cell in cells])
    made = own if counts is None else np.array(counts)
    return steps_of(setting, cells, sigmas, made, setting.n_samples, setting.rows)


def kernel() -> np.ndarray:
    return PHI @ PHI.T + np.diag(LEFT)


def by_hand(rate: float, clip_norm: float, steps: int, momentum: float, average: float) -> Any:
    """Clipped descent under the kernel, in NumPy."""
    f, m, H = START.copy(), np.zeros((N + M, K)), kernel()[:, :N]
    mean = f.copy()
    for _ in range(steps):
        a = f[:N] - Y
        norms = np.sqrt(np.diag(H[:N]) * np.sum(a**2, axis=1))
        m = momentum * m + H @ (np.minimum(1, clip_norm / norms)[:, None] * a) / N
        f = f - rate * m
        mean = average * mean + (1 - average) * f
    return mean


@pytest.mark.parametrize(("momentum", "average"), [(0.0, None), (0.5, 0.3)])
def test_ends_without_noise_are_those_of_a_loop(momentum: float, average: float | None) -> None:
    problem = problem_of(optimizer=optimizers.SGD(momentum, average=average))
    cells = [Cell(0.3, 0.7, 5, 1.0, 1.0), Cell(0.2, 50.0, 3, 1.0, 1.0)]
    made = ends_of(problem, steps_for(setting_of(problem), cells), KEYS)
    assert made.shape == (2, 2, N + M, K)
    for outputs, cell in zip(made, cells, strict=True):
        expected = by_hand(cell.learning_rate, cell.clip_norm, cell.steps, momentum, average or 0.0)
        np.testing.assert_allclose(outputs[0], expected, rtol=1e-10)
        np.testing.assert_array_equal(outputs[0], outputs[1])


def law(rate: float, steps: int, variance: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of unclipped descent on the squared loss, with noise of this variance."""
    H = kernel()
    across = np.eye(N + M)
    across[:, :N] -= rate / N * H[:, :N]
    mean, covariance = START.copy(), np.zeros((N + M, N + M))
    for _ in range(steps):
        mean = mean - rate / N * H[:, :N] @ (mean[:N] - Y)
        covariance = across @ covariance @ across.T + rate**2 * variance * H
    return mean, covariance


@pytest.mark.parametrize("counts", often_or_slow([None, [6]], [None]))
def test_noise_has_the_law_of_private_descent(counts: list[int] | None) -> None:
    rate, clip_norm, steps, sigma = 0.02, 1e4, 24, 2e-3
    problem, cell = problem_of(), Cell(0.02, clip_norm, steps, 1.0, 1.0)
    keys = jax.random.split(jax.random.key(1), 3000)
    made = steps_for(setting_of(problem, sigma), [cell], counts)
    outputs = ends_of(problem, made, keys, counts is not None)[0]
    mean, covariance = law(rate, steps, (sigma * clip_norm / N) ** 2)
    deviation = np.sqrt(np.diag(covariance))[:, None]
    # Four steps in one move the mean a little; its error has a share 1/sqrt(3000) of the deviation.
    np.testing.assert_allclose(
        outputs.mean(axis=0),
        mean,
        atol=5 * deviation.max() / np.sqrt(3000) + 0.03 * (counts is not None),
    )
    spread = np.einsum(
        "sik,sjk->ij", outputs - outputs.mean(axis=0), outputs - outputs.mean(axis=0)
    )
    found = spread / (2 * 3000)
    relative = (found - covariance) / np.outer(deviation, deviation)
    assert np.abs(relative).max() < 0.1
    assert np.abs(found / 1.5 - covariance).max() > 0.1 * covariance.max()


def test_merged_steps_keep_what_noise_and_sampling_add() -> None:
    setting = setting_of(problem_of(), sigma=2.0)
    cells = [Cell(0.3, 0.7, 60, 0.25, 1.0)] * 3
    made = steps_for(setting, cells, [60, 30, 7])
    total = np.asarray(made.total * (made.rate * made.deviation) ** 2)
    np.testing.assert_allclose(total, 60 * (0.3 * 2.0 * 0.7 / (0.25 * N)) ** 2, rtol=1e-12)
    sampled = np.asarray(made.total * made.rate**2 * made.variance)
    np.testing.assert_allclose(sampled, 60 * 0.3**2 * 0.75 / 0.25, rtol=1e-12)
    np.testing.assert_allclose(made.total * made.rate, 60 * 0.3, rtol=1e-12)


@pytest.mark.slow
def test_a_part_of_the_samples_keeps_the_noise_of_all() -> None:
    # At the targets nothing descends, so that only noise moves the outputs: by v(T) H.
    problem = problem_of(start=jnp.asarray(np.concatenate([Y, START[N:]])))
    cell, sigma, all_samples = Cell(1e-3, 0.01, 20, 0.5, 1.0), 3.0, 5 * N
    setting = setting_of(problem, sigma, all_samples)
    keys = jax.random.split(jax.random.key(2), 2000)
    outputs = ends_of(problem, steps_for(setting, [cell]), keys)[0]
    v = ntkdp.stochastic_flow.weight_noise_variance(
        clipping.Abadi(0.01), all_samples, learning_rate=1e-3, steps=20, noise_multiplier=sigma,
        sample_rate=0.5,
    )[-1, 0]  # fmt: skip
    found = jnp.mean(jnp.var(outputs[:, N:], axis=0), axis=1)
    np.testing.assert_allclose(found, v * np.diag(kernel())[N:], rtol=0.08)


def test_sampling_has_the_variance_of_a_mean_over_all_samples() -> None:
    # One step from a common gradient: the sampled mean has variance (1 - q)/(q n) of its square.
    cell, all_samples, q = Cell(0.1, 1e6, 1, 0.25, 1.0), 4 * N, 0.25
    phi = np.zeros((N + M, R))
    phi[:, 0] = 1.0
    problem = problem_of(
        features=frozen(phi, np.zeros(N + M)),
        start=jnp.zeros((N + M, K)), targets=-jnp.ones((N, K)),
    )  # fmt: skip
    keys = jax.random.split(jax.random.key(3), 4000)
    outputs = ends_of(problem, steps_for(setting_of(problem, 0.0, all_samples), [cell]), keys)[0]
    moved = np.asarray(outputs[:, N, 0])
    assert abs(moved.mean() + 0.1) < 5 * moved.std() / np.sqrt(4000)
    np.testing.assert_allclose(moved.var(), 0.1**2 * (1 - q) / (q * all_samples), rtol=0.1)


def test_levels_of_merged_steps_follow_one_path() -> None:
    def path(level: int, seed: int = 0) -> np.ndarray:
        return np.stack(
            [
                _refined(
                    jax.random.key(seed),
                    jnp.asarray(k),
                    jnp.asarray(level),
                    (500,),
                    np.dtype(float),
                )
                for k in range(2 << level)
            ]
        )

    coarse, fine = path(1), path(2)
    np.testing.assert_allclose((fine[::2] + fine[1::2]) / np.sqrt(2), coarse, rtol=0, atol=1e-12)
    between = np.corrcoef(fine)
    assert np.abs(between - np.eye(len(fine))).max() < 0.2
    assert abs(fine.std() - 1) < 0.05


@pytest.mark.slow
def test_correlated_noise_passes_through_its_strategy() -> None:
    noise = Correlated([1.0, 0.5])
    problem = problem_of(noise=noise, start=jnp.asarray(np.concatenate([Y, START[N:]])))
    cell = Cell(1e-3, 0.01, 4, 1.0, 1.0)
    keys = jax.random.split(jax.random.key(4), 3000)
    outputs = ends_of(problem, steps_for(setting_of(problem, 2.0), [cell]), keys)
    # What all steps add up to: the columns of the inverse of the strategy.
    v = (1e-3 * 2.0 * 0.01 / N) ** 2 * np.sum(
        np.linalg.inv(noise.strategy_matrix(4)).sum(axis=0) ** 2
    )
    found = jnp.mean(jnp.var(outputs[0][:, N:], axis=0), axis=1)
    np.testing.assert_allclose(found, v * np.diag(kernel())[N:], rtol=0.08)


def test_thousands_of_steps_are_predicted_by_few() -> None:
    steps = 4000
    largest = np.linalg.eigvalsh(kernel()[:N, :N])[-1]
    rate = 3 * N / (largest * steps)
    setting = setting_of(problem_of())
    predicted = predict(setting, [Cell(rate, 1e6, steps, 1.0, 1.0)], KEYS)
    assert predicted.steps_made[0] < 300
    assert 0 < predicted.change[0] < 0.02
    mean, _ = law(rate, steps, 0.0)
    loss = np.mean(np.sum((mean[:N] - Y) ** 2, axis=1)) / 2
    np.testing.assert_allclose(predicted.metrics.loss[0], loss, rtol=0.02)


@pytest.mark.parametrize(("of_stable", "diverges"), [(0.9, False), (1.1, True)])
def test_the_stability_limit_is_that_of_the_runs_own_steps(
    of_stable: float, diverges: bool
) -> None:
    problem = problem_of()
    stable = 2 * N / np.linalg.eigvalsh(kernel()[:N, :N])[-1]
    initial = float(np.mean(np.sum((START[:N] - Y) ** 2, axis=1)) / 2)
    setting = replace(setting_of(problem), initial_loss=initial)
    predicted = predict(setting, [Cell(of_stable * stable, 1e9, 300, 1.0, 1.0)], KEYS)
    assert predicted.metrics.diverged[0] == diverges
    assert predicted.steps_made[0] == 300
    assert predicted.change[0] == 0


def test_few_samples_have_features_of_the_whole_kernel() -> None:
    x = jnp.asarray(RNG.normal(size=(7, 4)))
    model = models.mlp([8, 8], 1, activation="erf")
    flow = ResponseFlow(
        model.apply, model.init(jax.random.key(0), x), x[:5], jnp.zeros((5, 1)), SQUARED,
        clipping.Abadi(1.0), test_x=x[5:], test_targets=jnp.zeros((2, 1)),
    )  # fmt: skip
    found = features_of(flow, model, np.zeros(1), 10, 0)
    expected = ntkdp.infinite_ntk(model, x)
    whole = found.values @ found.values.T + jnp.diag(found.left)
    np.testing.assert_allclose(jnp.diag(whole), jnp.diag(expected), rtol=1e-6)
    np.testing.assert_allclose(whole[:, :5], expected[:, :5], rtol=2e-3, atol=1e-3)
    few = features_of(flow, model, np.zeros(1), 2, 0)
    assert few.values.shape == (7, 2)
    np.testing.assert_allclose(
        jnp.sum(few.values**2, axis=1) + few.left, jnp.diag(expected), rtol=1e-6
    )
    # No two features are closer to the kernel of the samples than by its third eigenvalue.
    off = np.asarray(few.values[:5] @ few.values[:5].T - expected[:5, :5])
    third = np.linalg.eigvalsh(np.asarray(expected[:5, :5]))[-3]
    assert np.linalg.norm(off, 2) == pytest.approx(third, rel=1e-2)


def test_a_function_has_features_of_its_own_kernel() -> None:
    x = jnp.asarray(RNG.normal(size=(5, 3)))
    flow = ResponseFlow(
        linear, jnp.ones((3, 2)), x, jnp.zeros((5, 2)), SQUARED, clipping.Abadi(1.0)
    )
    found = features_of(flow, None, np.zeros(1), 10, 0)
    np.testing.assert_allclose(found.values @ found.values.T, x @ x.T, atol=1e-8)
    np.testing.assert_allclose(found.left, 0, atol=1e-8)


def on_circle(n: int) -> jax.Array:
    angles = 2 * np.pi * np.arange(n) / n
    return jnp.asarray(np.column_stack([np.cos(angles), np.sin(angles)]) * np.sqrt(2))


@pytest.mark.parametrize("activation", often_or_slow(["relu", "erf"], ["erf"]))
def test_kernels_between_times_are_exact_where_they_share_their_modes(activation: str) -> None:
    # Equally spaced on a circle, all kernels are circulant.
    x, nodes = on_circle(8), np.array([0.0, 0.5, 2.0])
    model = models.mlp([8], 1, activation=activation)
    flow = ResponseFlow(
        model.apply, model.init(jax.random.key(0), x), x, jnp.zeros((8, 1)), SQUARED,
        clipping.Abadi(1.0),
    )  # fmt: skip
    found = features_of(flow, model, nodes, 8, 0)
    for later, v in enumerate(nodes):
        for earlier, w in enumerate(nodes):
            kernel = ntkdp.two_time_kernel(model, x, variance1=v, variance2=w).ntk.total
            alpha = jnp.sum(found.parts[later] * found.parts[earlier], axis=0)
            made = (found.values * alpha) @ found.values.T
            np.testing.assert_allclose(made, kernel, rtol=0, atol=1e-2 * float(kernel.max()))
            if later == earlier:
                np.testing.assert_allclose(found.own[later], jnp.diag(kernel), rtol=1e-6)


@pytest.mark.slow
def test_noise_alone_spreads_outputs_as_that_of_the_weights() -> None:
    # Of a wide network whose weights get noise by hand, without gradients.
    x, v, width = on_circle(4), 2.0, 4096
    model = models.mlp([width], 1, activation="erf", W_std=1.5)
    params = model.init(jax.random.key(0), x)
    flow = ResponseFlow(model.apply, params, x, jnp.zeros((4, 1)), SQUARED, clipping.Abadi(1.0))
    nodes = np.array([0.0, 0.05, 0.15, 0.4, 1.0, 2.5])
    start = model.apply(params, x)
    # At the targets nothing descends at first, and a tiny clipping norm lets nothing later.
    steps, clip_norm = 64, 1e-6
    problem = problem_of(features=features_of(flow, model, nodes, 4, 0), start=start, targets=start)
    deviation = np.sqrt(v / steps)
    cell = Cell(1.0, clip_norm, steps, 1.0, 1.0)
    made = steps_for(setting_of(problem, 4 * deviation / clip_norm, 4), [cell])
    predicted = ends_of(problem, made, jax.random.split(jax.random.key(1), 2000))[0, :, :, 0]

    def moved(key: jax.Array) -> jax.Array:
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        noisy = [
            w + jnp.sqrt(v) * jax.random.normal(k, w.shape)
            for w, k in zip(leaves, keys, strict=True)
        ]
        return model.apply(jax.tree.unflatten(tree, noisy), x)[:, 0]

    real = np.asarray(jax.lax.map(moved, jax.random.split(jax.random.key(2), 2000), batch_size=50))
    np.testing.assert_allclose(predicted.var(axis=0), real.var(axis=0), rtol=0.12)
    np.testing.assert_allclose(
        predicted.mean(axis=0), real.mean(axis=0), atol=5 * real.std() / np.sqrt(1000)
    )
    np.testing.assert_allclose(np.corrcoef(predicted.T), np.corrcoef(real.T), atol=0.1)
    # A frozen kernel gives another spread.
    assert np.all(np.abs(v * np.asarray(found_at_start(model, x)) / real.var(axis=0) - 1) > 0.2)


def found_at_start(model: models.Model, x: jax.Array) -> jax.Array:
    return jnp.diag(ntkdp.infinite_ntk(model, x))


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_a_power_law_is_extrapolated_exactly(power: float) -> None:
    quarter, half, whole, twice = (0.3 + 2 * m**-power for m in (250.0, 500.0, 1000.0, 2000.0))
    assert extrapolated(quarter, half, whole) == pytest.approx(twice, rel=1e-12)


def test_an_extrapolation_stays_near_what_is_known() -> None:
    assert extrapolated(0.5, 0.5, 0.6) == 0.6
    assert extrapolated(0.5, 0.4, 0.5) == 0.5
    assert extrapolated(0.5, 0.45, 0.2) == pytest.approx(-0.05)


def test_budgets_are_counted_with_the_sampling_of_their_cells() -> None:
    accounts = Accounts(1e-5, Independent(), 100)
    sampled, full = Cell(1.0, 1.0, 50, 0.1, 3.0), Cell(1.0, 1.0, 50, 1.0, 3.0)
    for cell in (sampled, full):
        sigma = accounts.noise_multiplier(cell)
        spent = privacy.epsilon(sigma, cell.sample_rate, cell.steps, 1e-5)
        assert 0.995 * 3.0 < spent <= 3.0
    assert accounts.noise_multiplier(sampled) < accounts.noise_multiplier(full)


@pytest.fixture(scope="module")
def plan() -> advisor.BudgetPlan:
    x = jnp.asarray(RNG.normal(size=(90, 5)))
    y = (x[:, 0] + 0.8 * RNG.normal(size=90) > 0).astype(int)
    model = models.mlp([64], 2, activation="erf")
    return advisor.plan_budget(
        model, model.init(jax.random.key(1), x), (x[:60], y[:60], x[60:], y[60:]),
        losses.SoftmaxCrossEntropy(), clipping.Abadi(1.0), epsilons=[1.0, 8.0], delta=1e-3,
        learning_rates=[0.5, 4.0, 1e5], clip_norms=[0.1, 1.0], steps=[8, 16],
        sample_rates=[0.5, 1.0], max_compute=12 * 60, refinements=1, kernels="frozen",
        n_runs=2, key=jax.random.key(2),
    )  # fmt: skip


def test_a_plan_spends_what_it_may(plan: advisor.BudgetPlan) -> None:
    cells = plan.cells
    # Of the two numbers of steps, full batches afford the smaller one.
    assert plan.n_grid == 3 * 2 * 3 * 2
    assert cells.compute.max() <= 12 * 60
    np.testing.assert_allclose(cells.compute, cells.steps * cells.sample_rate * 60)
    assert len(cells.epsilon) > plan.n_grid
    for one in plan.recommended:
        spent = privacy.epsilon(one.noise_multiplier, one.sample_rate, one.steps, 1e-3)
        assert 0.99 * one.epsilon < spent <= one.epsilon


def test_a_plan_recommends_a_cell_for_each_budget(plan: advisor.BudgetPlan) -> None:
    small, large = plan.recommended
    assert (small.epsilon, large.epsilon) == (1.0, 8.0)
    assert large.value > known(plan.initial["test_accuracy"])
    assert large.value > small.value - 0.05
    assert 0 < large.uncertainty < 0.2
    assert not plan.cells.metrics.diverged[large.index]
    assert large.learning_rate < 1e5
    assert str(plan).startswith("At epsilon 8: q = ")
    assert "twice the data would give about" in str(large)


def test_no_cell_beats_the_frontier(plan: advisor.BudgetPlan) -> None:
    frontier = plan.frontier_of_compute(8.0)
    cells, accuracy = plan.cells, np.asarray(plan.cells.metrics.test_accuracy)
    assert np.all(np.diff(cells.compute[frontier]) > 0)
    assert np.all(np.diff(accuracy[frontier]) > 0)
    usable = (cells.epsilon == 8.0) & ~cells.metrics.diverged
    for compute, reached in zip(cells.compute[usable], accuracy[usable], strict=True):
        as_cheap = frontier[cells.compute[frontier] <= compute]
        assert accuracy[as_cheap].max() >= reached
    with pytest.raises(ValueError, match="epsilon must be a budget of the plan"):
        plan.frontier_of_compute(2.0)


def test_the_noise_of_the_weights_is_that_of_the_runs(plan: advisor.BudgetPlan) -> None:
    one = plan.recommended[-1]
    v = (
        one.steps
        * (one.learning_rate * one.noise_multiplier * one.clip_norm / (one.sample_rate * 60)) ** 2
    )
    assert one.weight_noise == pytest.approx(v, rel=1e-6)


ARGUMENTS: dict[str, Any] = {
    "epsilons": 3.0, "delta": 1e-3, "learning_rates": [0.1], "clip_norms": [1.0], "steps": [4],
    "sample_rates": [1.0], "refinements": 0, "more_data": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"sample_rates": [0.5, 2.0]}, ValueError, "sample_rates must be at most 1, got 2"),
        ({"learning_rates": [-1.0]}, ValueError, "learning_rates must be positive"),
        ({"clip_norms": []}, ValueError, "clip_norms"),
        ({"steps": []}, ValueError, "steps must hold at least one"),
        ({"max_compute": 3}, ValueError, "max_compute must afford a cell"),
        ({"clipping": clipping.NoClipping()}, TypeError, "clipping must be a rule"),
        ({"clipping": clipping.Batch(1.0)}, ValueError, "clipping must"),
        (
            {"clipping": clipping.Abadi(1.0, scope="layerwise")}, ValueError,
            "clipping must be flat",
        ),
        ({"optimizer": optimizers.Adam()}, ValueError, "optimizer must be linear"),
        ({"optimizer": optimizers.SGD(weight_decay=0.1)}, ValueError, "must not decay weights"),
        ({"objective": "test_loss"}, ValueError, "unknown objective 'test_loss'"),
        ({"learning_rates": [1e9]}, ValueError, "a cell that converges"),
        ({"noise": Correlated([1.0, 0.5]), "sample_rates": 0.5}, ValueError, "no accountant"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_named(changes: Any, error: Any, words: str) -> None:
    options = ARGUMENTS | changes
    rule = options.pop("clipping", clipping.Abadi(1.0))
    with pytest.raises(error, match=words):
        advisor.plan_budget(
            linear, jnp.zeros((2, 1)), (jnp.eye(2), jnp.ones((2, 1))), SQUARED, rule,
            **options, key=jax.random.key(0),
        )  # fmt: skip


def test_axes_are_sorted_and_hold_each_value_once() -> None:
    axes = axes_of(
        learning_rates=[3.0, 1.0, 3.0], clip_norms=0.5, steps=[20, 10], sample_rates=[1.0],
        epsilons=[2.0],
    )  # fmt: skip
    assert axes.learning_rates == (1.0, 3.0)
    assert axes.steps == (10, 20)
    assert len(axes.cells(10, np.inf)) == 4
    assert len(axes.cells(10, 100.0)) == 2
