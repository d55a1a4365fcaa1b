"""Runs of DP-SGD under correlated noise and all kinds of batches, and their predictions."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import often_or_slow
from scipy.stats import ttest_ind

import ntkdp
from ntkdp import dp_sgd, stochastic_flow
from ntkdp.batches import Batches, Cyclic, FixedSize, Full, Poisson, Shuffled
from ntkdp.noise import BufferedToeplitz, Correlated, Independent, Noise
from ntkdp.optimizers import SGD
from ntkdp.stochastic_flow import (
    ResponseFlow,
    TwoTimeFlow,
    response_ensemble,
    two_time_ensemble,
)

X = jax.random.normal(jax.random.key(0), (12, 3))
Y = jnp.sign(X[:, :1])
W = jnp.zeros((3, 1))
STEPS = 20
NOISES: dict[str, Noise] = {
    "Toeplitz": Correlated([1.0, 0.5, 0.25]),
    "matrix": Correlated(np.eye(STEPS) + np.tril(0.1 * np.ones((STEPS, STEPS)), -1)),
    "buffered": BufferedToeplitz([0.9, 0.3], [0.2, 0.3]),
}
BATCHES: list[Batches] = [Full(), Cyclic(3), Shuffled(4), FixedSize(4), Poisson(0.4)]


def linear(w: jax.Array, x: jax.Array) -> jax.Array:
    return x @ w


def problem(clips: bool) -> tuple[Any, ...]:
    rule = ntkdp.clipping.Abadi(0.5 if clips else 50.0)
    return Y, ntkdp.losses.SquaredError(), rule


def options(clips: bool, **more: Any) -> dict[str, Any]:
    sigma = 2.0 if clips else 0.02
    return {"learning_rate": 0.3, "steps": STEPS, "noise_multiplier": sigma, **more}


def observed(clips: bool, **more: Any) -> ntkdp.Trajectory:
    """Runs of DP-SGD."""
    targets, loss, rule = problem(clips)
    return dp_sgd.run(linear, W, X, targets, loss, rule, **more)


#: All batches with one noise, and all noises with one kind of batches.
PAIRS = [("Toeplitz", batches) for batches in BATCHES] + [
    (name, Shuffled(4)) for name in ("matrix", "buffered")
]


#: The others are the same noise, and batches of one of these kinds.
PAIRS_OFTEN = [
    ("Toeplitz", Cyclic(3)),
    ("Toeplitz", Poisson(0.4)),
    ("matrix", Shuffled(4)),
    ("buffered", Shuffled(4)),
]


@pytest.mark.parametrize(("noise", "batches"), often_or_slow(PAIRS, PAIRS_OFTEN), ids=repr)
def test_the_linearised_model_makes_the_run_of_its_key(noise: str, batches: Batches) -> None:
    """Plain per-sample gradients of a linear model, step by step, and the flow of its weights."""
    flow = ntkdp.LinearisedFlow(linear, W, X, *problem(True))
    asked = options(True, noise=NOISES[noise], batches=batches, key=jax.random.key(3))
    run = observed(True, gradients="vmap", **asked)
    path = stochastic_flow.ensemble(flow, W, **asked)
    np.testing.assert_allclose(path.loss, run.loss, rtol=1e-9)


@pytest.mark.parametrize(
    "clips", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["clipped", "not clipped"]
)
@pytest.mark.parametrize("batches", often_or_slow(BATCHES, [Shuffled(4)]), ids=repr)
def test_losses_have_the_law_of_runs(batches: Batches, clips: bool) -> None:
    """Means and spreads of the last loss over 400 runs, within three standard errors."""
    flow = ntkdp.KernelFlow(ntkdp.empirical_ntk(linear, W, X), *problem(clips))
    asked = options(clips, noise=NOISES["Toeplitz"], batches=batches)
    runs = observed(clips, key=jax.random.split(jax.random.key(5), 400), **asked)
    drawn = stochastic_flow.ensemble(
        flow, linear(W, X), key=jax.random.split(jax.random.key(6), 2000), **asked
    )
    assert_same_law(drawn.loss[:, -1], runs.loss[:, -1])


def assert_same_law(predicted: Any, observed: Any) -> None:
    """Means and spreads agree within three standard errors."""
    predicted, seen = np.asarray(predicted), np.asarray(observed)
    assert seen.std() > 1e-12
    assert abs(ttest_ind(seen, predicted, equal_var=False).statistic) < 3
    squares = [(losses - losses.mean()) ** 2 for losses in (seen, predicted)]
    assert abs(ttest_ind(*squares, equal_var=False).statistic) < 3


@pytest.mark.parametrize(("noise", "batches"), often_or_slow(PAIRS, PAIRS_OFTEN[1:2]), ids=repr)
def test_the_response_of_a_linear_model_is_the_run_of_its_key(noise: str, batches: Batches) -> None:
    """Cells of two lengths, so that some of their places are no steps."""
    flow = ResponseFlow(linear, W, X, *problem(True))
    asked = options(True, noise=NOISES[noise], batches=batches, key=jax.random.key(3))
    asked |= {"optimizer": SGD(momentum=0.5)}
    run = observed(True, gradients="vmap", **asked)
    path = response_ensemble(flow, noise_at="steps", nodes=4, draws=1, **asked)
    np.testing.assert_allclose(path.loss, run.loss, rtol=1e-9)
    assert ntkdp.compare(path, run).sup_relative_error < 1e-9


@pytest.mark.parametrize(
    ("noise", "batches"), often_or_slow(PAIRS, [("Toeplitz", Shuffled(4))]), ids=repr
)
def test_noise_at_the_nodes_of_a_response_has_the_law_of_runs(noise: str, batches: Batches) -> None:
    """The last loss, and its change over a step between nodes."""
    flow = ResponseFlow(linear, W, X, *problem(True))
    asked = options(True, noise=NOISES[noise], batches=batches, optimizer=SGD(momentum=0.5))
    runs = observed(True, key=jax.random.split(jax.random.key(5), 400), **asked)
    drawn = response_ensemble(
        flow, nodes=4, draws=1, key=jax.random.split(jax.random.key(6), 2000), **asked
    )
    assert_same_law(drawn.loss[:, -1], runs.loss[:, -1])
    assert_same_law(drawn.loss[:, 10] - drawn.loss[:, 9], runs.loss[:, 10] - runs.loss[:, 9])


@pytest.mark.parametrize(
    ("noise", "batches"), often_or_slow(PAIRS, [("Toeplitz", Cyclic(3))]), ids=repr
)
def test_kernels_between_times_have_the_law_of_runs(noise: str, batches: Batches) -> None:
    """Of a model whose wide kernel is its own, with coarse nodes."""
    model = ntkdp.models.mlp([], 1, b_std=0.3)
    params = model.init(jax.random.key(1), X)
    flow = TwoTimeFlow(model, X, *problem(True))
    asked = options(True, noise=NOISES[noise], batches=batches, optimizer=SGD(momentum=0.5))
    runs = dp_sgd.run(
        model.apply, params, X, *problem(True),
        key=jax.random.split(jax.random.key(5), 400), **asked,
    )  # fmt: skip
    drawn = two_time_ensemble(
        flow, model.apply(params, X), nodes=4, key=jax.random.split(jax.random.key(6), 2000),
        **asked,
    )  # fmt: skip
    assert_same_law(drawn.loss[:, -1], runs.loss[:, -1])
    assert_same_law(drawn.loss[:, 10] - drawn.loss[:, 9], runs.loss[:, 10] - runs.loss[:, 9])


@pytest.mark.parametrize(
    ("noise", "batches", "rank"),
    often_or_slow(
        [
            ("Toeplitz", Full(), None), ("Toeplitz", Cyclic(3), None), ("matrix", Cyclic(3), None),
            ("buffered", Cyclic(5), 3), ("Toeplitz", Full(), 3),
        ],
        [("Toeplitz", Cyclic(3), None), ("buffered", Cyclic(5), 3)],
    ),
    ids=repr,
)  # fmt: skip
def test_moments_of_a_linear_model_are_those_of_its_weights(
    noise: str, batches: Batches, rank: int | None
) -> None:
    """Mean and covariance of the weights, in plain algebra with the noise of all steps."""
    flow = ntkdp.KernelFlow(ntkdp.empirical_ntk(linear, W, X), *problem(False))
    asked = options(False, noise=NOISES[noise], batches=batches)
    found = stochastic_flow.moments(flow, linear(W, X), outputs=True, rank=rank, **asked)
    x, y, n = np.asarray(X), np.asarray(Y), len(X)
    q, mixing = batches.share(n), NOISES[noise].mixing(STEPS)
    mean, driven = np.zeros((3, 1)), np.zeros((3, 3 * STEPS))
    for k in range(STEPS):
        rows = np.arange(n) % round(1 / q) == k % round(1 / q)
        hessian = x[rows].T @ x[rows] / (q * n)
        mean = mean - 0.3 * (hessian @ mean - x[rows].T @ y[rows] / (q * n))
        noise_of_step = 0.02 * 50 / (q * n) * np.kron(mixing[k], np.eye(3))
        driven = driven - 0.3 * (hessian @ driven + noise_of_step)
        assert found.mean is not None
        assert found.covariance is not None
        np.testing.assert_allclose(found.mean[k + 1], x @ mean, atol=1e-8)
        np.testing.assert_allclose(found.covariance[k + 1], x @ driven @ driven.T @ x.T, atol=1e-8)


@pytest.mark.parametrize(
    ("momentum", "rank"), often_or_slow([(0.5, None), (0.0, 3), (0.0, None)], [(0.5, None)])
)
def test_moments_of_batches_of_a_fixed_size_are_means_over_all_of_them(
    momentum: float, rank: int | None
) -> None:
    """Of a linear model's weights, in plain algebra, with each of 495 batches as likely."""
    flow = ntkdp.KernelFlow(ntkdp.empirical_ntk(linear, W, X), *problem(False))
    asked = options(False, batches=FixedSize(4), optimizer=SGD(momentum))
    found = stochastic_flow.moments(flow, linear(W, X), outputs=True, rank=rank, **asked)
    assert found.mean is not None
    assert found.covariance is not None
    # The state is (weights, momentum, 1), and its second moment is that of a mixture of steps.
    rows = np.concatenate([np.asarray(X), np.zeros((12, 3)), -np.asarray(Y)], axis=1)
    chosen = np.array(list(itertools.combinations(range(12), 4)))
    gradients = np.einsum("sia,sib->sab", np.asarray(X)[chosen], rows[chosen]) / 4
    steps = np.tile(np.diag([1.0, 1, 1, momentum, momentum, momentum, 1]), (len(chosen), 1, 1))
    steps[:, 3:6] += gradients
    steps[:, :3] -= 0.3 * steps[:, 3:6]
    of_noise = np.concatenate([-0.3 * np.eye(3), np.eye(3), np.zeros((1, 3))]) * 0.02 * 50 / 4
    second = np.outer(*[np.eye(7)[6]] * 2)
    for k in range(STEPS):
        second = np.mean(steps @ second @ steps.swapaxes(1, 2), axis=0) + of_noise @ of_noise.T
        mean = second[:3, 6:]
        spread = second[:3, :3] - mean @ mean.T
        np.testing.assert_allclose(found.mean[k + 1], X @ mean, atol=1e-8)
        np.testing.assert_allclose(found.covariance[k + 1], X @ spread @ X.T, atol=1e-8)


@pytest.mark.parametrize(
    "batches",
    often_or_slow([Poisson(0.4), Cyclic(3), Full(), FixedSize(4)], [FixedSize(4)]),
    ids=repr,
)
def test_moments_are_those_of_runs(batches: Batches) -> None:
    """Mean and deviation of the last loss over 400 runs with clipping, in three standard errors."""
    flow = ntkdp.KernelFlow(ntkdp.empirical_ntk(linear, W, X), *problem(True))
    asked = options(True, noise=NOISES["Toeplitz"], batches=batches)
    runs = observed(True, key=jax.random.split(jax.random.key(5), 400), **asked)
    found = stochastic_flow.moments(flow, linear(W, X), **asked)
    last = np.asarray(runs.loss)[:, -1]
    assert abs(last.mean() - found.loss[-1]) < 3 * last.std() / 400**0.5
    squares = (last - last.mean()) ** 2
    assert abs(squares.mean() - found.loss_std[-1] ** 2) < 3 * squares.std() / 400**0.5


def test_moments_refuse_batches_that_depend_on_those_before() -> None:
    flow = ntkdp.KernelFlow(ntkdp.empirical_ntk(linear, W, X), *problem(True))
    with pytest.raises(ValueError, match=r"got Shuffled\(n_batches=3\); stochastic_flow.ensemble"):
        stochastic_flow.moments(flow, linear(W, X), **options(True, batches=Shuffled(3)))


def test_moments_of_one_batch_of_a_fixed_size_are_those_of_full_ones() -> None:
    flow = ntkdp.KernelFlow(ntkdp.empirical_ntk(linear, W, X), *problem(True))
    whole, full = (
        stochastic_flow.moments(flow, linear(W, X), **options(True, batches=batches))
        for batches in (FixedSize(12), Full())
    )
    np.testing.assert_allclose(whole.loss_std, full.loss_std, rtol=1e-12)


@pytest.mark.slow
def test_a_network_is_predicted_with_correlated_noise_and_cyclic_batches() -> None:
    """Run by run to a tenth of how far its runs differ, and mean losses with other noise to 5%."""
    model = ntkdp.models.mlp([16], 1)
    params = model.init(jax.random.key(1), X)
    asked = options(True, noise=NOISES["Toeplitz"], batches=Cyclic(3), outputs=True)
    one, other = jax.random.split(jax.random.key(5), (2, 400))
    runs = dp_sgd.run(model.apply, params, X, *problem(True), key=one, **asked)
    alike = response_ensemble(
        ResponseFlow(model.apply, params, X, *problem(True)), noise_at="steps", nodes=21, draws=20,
        key=one[:8], **asked,
    )  # fmt: skip
    assert runs.outputs is not None
    assert alike.outputs is not None
    seen = runs.outputs[:8]
    left = jnp.sqrt(jnp.mean((alike.outputs - seen) ** 2))
    moved = jnp.sqrt(jnp.mean((seen - jnp.mean(seen, 0)) ** 2))
    assert left < 0.1 * moved
    drawn = ntkdp.predict(
        model, params, (X, Y), *problem(True)[1:], method="response", nodes=7, draws=10, key=other,
        **asked,
    )  # fmt: skip
    np.testing.assert_allclose(jnp.mean(drawn.loss, 0), jnp.mean(runs.loss, 0), rtol=0.05)


X_TEST = jax.random.normal(jax.random.key(9), (5, 3))
Y_TEST = jnp.ones((5, 1))


@pytest.mark.parametrize(
    ("noise", "batches"), often_or_slow(PAIRS, [("Toeplitz", Cyclic(3))]), ids=repr
)
def test_cells_of_a_grid_have_the_law_of_runs(noise: str, batches: Batches) -> None:
    """Training and test loss of a cell, 400 runs, by the kernel at the start and between times."""
    targets, loss, rule = problem(True)
    whole = jnp.concatenate([X, X_TEST])
    kernel = ntkdp.empirical_ntk(linear, W, whole)
    flow = ntkdp.KernelFlow(
        kernel[:12, :12], targets, loss, rule, test_kernel=kernel[12:, :12], test_targets=Y_TEST
    )
    given: dict[str, Any] = {"noise": NOISES[noise], "batches": batches, "steps": STEPS}
    runs = dp_sgd.run(
        linear, W, X, targets, loss, rule, learning_rate=0.3, noise_multiplier=2.0, test_x=X_TEST,
        test_targets=Y_TEST, key=jax.random.split(jax.random.key(5), 400), **given,
    )  # fmt: skip
    final = stochastic_flow.final_outputs(
        flow, (linear(W, X), linear(W, X_TEST)), learning_rates=0.3, clip_norms=[0.5, 0.1],
        noise_multipliers=2.0, noise_kernel=kernel, key=jax.random.split(jax.random.key(6), 2000),
        **given,
    )  # fmt: skip
    assert final.test is not None
    assert_same_law(jnp.mean((final.train[0] - Y) ** 2, (1, 2)) / 2, runs.loss[:, -1])
    assert runs.test_loss is not None
    assert_same_law(jnp.mean((final.test[0] - Y_TEST) ** 2, (1, 2)) / 2, runs.test_loss[:, -1])


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "batches"), PAIRS, ids=repr)
def test_cells_between_times_are_runs_between_times(noise: str, batches: Batches) -> None:
    flow = TwoTimeFlow(ntkdp.models.mlp([4], 1), X, *problem(True))
    given: dict[str, Any] = {"noise": NOISES[noise], "batches": batches, "steps": STEPS, "nodes": 4}
    keys = jax.random.split(jax.random.key(6), 2000)
    runs = two_time_ensemble(
        flow, 0 * Y, learning_rate=0.3, noise_multiplier=2.0, key=keys, **given
    )
    final = stochastic_flow.two_time_final_outputs(
        flow, 0 * Y, learning_rates=[0.3, 0.6], clip_norms=0.5, noise_multipliers=2.0,
        key=jax.random.split(jax.random.key(7), 2000), **given,
    )  # fmt: skip
    assert_same_law(jnp.mean((final.train[0] - Y) ** 2, (1, 2)) / 2, runs.loss[:, -1])


def test_the_variance_of_a_weight_is_that_of_sums_of_the_mixed_noise() -> None:
    """Plain steps sum the noise of the steps, rows of the inverse of the strategy."""
    for name, noise in NOISES.items():
        found = stochastic_flow.weight_noise_variance(
            ntkdp.clipping.Abadi(0.5), 12, learning_rate=0.3, steps=STEPS, noise_multiplier=2.0,
            batches=Cyclic(3), noise=noise,
        )[:, 0]  # fmt: skip
        sums = np.cumsum(np.linalg.inv(noise.strategy_matrix(STEPS)), axis=0)
        expected = (0.3 * 2.0 * 0.5 / 4) ** 2 * (sums**2).sum(1)
        np.testing.assert_allclose(found[1:], expected, rtol=1e-9, err_msg=name)
        assert found[0] == 0


def test_variance_at_the_end_is_that_of_the_mixed_noise() -> None:
    """Of a loss without gradients: tr H (eta sigma R / n)^2 |1' C^-1|^2."""
    noise, count = NOISES["Toeplitz"], 20_000
    flow = ntkdp.KernelFlow(
        ntkdp.empirical_ntk(linear, W, X), Y, lambda f, y: 0.0 * f[0], ntkdp.clipping.Abadi(0.5)
    )
    path = stochastic_flow.ensemble(
        flow, linear(W, X), outputs=True, noise=noise,
        key=jax.random.split(jax.random.key(7), count), **options(True),
    )  # fmt: skip
    assert path.outputs is not None
    moved = np.linalg.inv(noise.strategy_matrix(STEPS)).sum(0)
    expected = (0.3 * 2.0 * 0.5 / 12) ** 2 * (moved @ moved) * float(jnp.sum(X**2))
    reached = float(np.asarray(path.outputs)[:, -1].var(0).sum())
    assert reached == pytest.approx(expected, rel=4 * (2 / count) ** 0.5)


#: What gives back the noise and the batches that there are without them.
IDENTITIES: list[dict[str, Any]] = [
    {"noise": Independent()}, {"noise": Correlated([1.0])}, {"batches": Cyclic(1)}
]  # fmt: skip


def test_identity_strategy_and_one_batch_change_no_bit() -> None:
    asked = options(True, key=jax.random.key(3))
    flow = ntkdp.KernelFlow(ntkdp.empirical_ntk(linear, W, X), *problem(True))
    for work in (
        lambda more: observed(True, **asked, **more),
        lambda more: stochastic_flow.ensemble(flow, linear(W, X), **asked, **more),
    ):
        expected = work({}).loss
        for same in IDENTITIES:
            np.testing.assert_array_equal(work(same).loss, expected)
    rate = observed(True, sample_rate=0.4, **asked)
    poisson = observed(True, batches=Poisson(0.4), **asked)
    np.testing.assert_array_equal(rate.loss, poisson.loss)


@pytest.mark.slow
def test_they_change_no_bit_of_other_predictions() -> None:
    asked = options(True, key=jax.random.key(3))
    flow = ntkdp.KernelFlow(ntkdp.empirical_ntk(linear, W, X), *problem(True))
    response = ResponseFlow(linear, W, X, *problem(True))
    wide = TwoTimeFlow(ntkdp.models.mlp([4], 1), X, *problem(True))
    for predict in (
        lambda more: response_ensemble(response, nodes=3, **asked, **more),
        lambda more: two_time_ensemble(wide, nodes=3, **asked, **more),
        lambda more: stochastic_flow.moments(flow, linear(W, X), **options(True), **more),
    ):
        expected = predict({}).loss
        for same in IDENTITIES:
            np.testing.assert_array_equal(predict(same).loss, expected)


def test_a_step_carries_the_noise_of_the_last_ones() -> None:
    """A loop of one's own makes the run, and holds bands - 1 noise vectors."""
    noise, key = Correlated(0.5 ** np.arange(4)), jax.random.key(2)
    targets, loss, rule = problem(True)
    algorithm = dp_sgd.build(
        linear, X, targets, loss, rule, learning_rate=0.3, noise_multiplier=2.0, noise=noise,
        batches=Shuffled(3),
    )  # fmt: skip
    state, step = algorithm.init(W), algorithm.compile()
    assert state.noise_state.shape == (3, 3, 1)
    for k in range(STEPS):
        state, _ = step(jax.random.fold_in(key, k), state)
    run = observed(True, noise=noise, batches=Shuffled(3), key=key, outputs=True,
        **options(True),
    )  # fmt: skip
    assert run.outputs is not None
    np.testing.assert_allclose(run.outputs[-1], linear(state.params, X), rtol=1e-12)


def test_comparisons_tell_noise_and_batches_apart() -> None:
    flow = ntkdp.KernelFlow(ntkdp.empirical_ntk(linear, W, X), *problem(True))
    keys = jax.random.split(jax.random.key(3), 4)
    run = observed(True, noise=NOISES["Toeplitz"], key=keys, **options(True))
    plain = stochastic_flow.ensemble(flow, linear(W, X), key=keys, **options(True))
    with pytest.raises(ValueError, match=r"noise_multiplier.*independent noise predicted"):
        ntkdp.compare(plain, run)
    cyclic = observed(True, batches=Cyclic(2), key=keys, **options(True))
    poisson = stochastic_flow.ensemble(
        flow, linear(W, X), sample_rate=0.5, key=keys, **options(True)
    )
    with pytest.raises(ValueError, match=r"sample_rate.*Cyclic"):
        ntkdp.compare(poisson, cyclic)


def test_a_budget_is_spent_on_the_whole_run() -> None:
    budget = ntkdp.privacy.Budget(3.0, 1e-5)
    noise = Correlated.square_root(5)
    asked = options(True, batches=Cyclic(4), noise=noise) | {"noise_multiplier": budget}
    run = observed(True, key=jax.random.key(0), **asked)
    assert budget.mu is not None
    expected = noise.sensitivity(Cyclic(4), STEPS) / budget.mu
    assert run.setup[0].noise_multiplier == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match=r"there is no accountant of FixedSize.*with Correlated"):
        observed(True, key=jax.random.key(0),
            **(asked | {"batches": FixedSize(3)}),
        )  # fmt: skip


def test_corrected_adam_needs_independent_noise() -> None:
    with pytest.raises(ValueError, match=r"noise must be independent with correct_noise=True"):
        observed(True, noise=NOISES["Toeplitz"],
            optimizer=ntkdp.optimizers.Adam(correct_noise=True), key=jax.random.key(0),
            **options(True),
        )  # fmt: skip
