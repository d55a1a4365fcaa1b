"""Runs of DP-SGD under correlated noise and all kinds of batches, and their predictions."""

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
@pytest.mark.parametrize("batches", often_or_slow(BATCHES, [Shuffled(4), Poisson(0.4)]), ids=repr)
def test_losses_have_the_law_of_runs(batches: Batches, clips: bool) -> None:
    """Means and spreads of the last loss over 400 runs, within three standard errors."""
    flow = ntkdp.KernelFlow(ntkdp.empirical_ntk(linear, W, X), *problem(clips))
    asked = options(clips, noise=NOISES["Toeplitz"], batches=batches)
    runs = observed(clips, key=jax.random.split(jax.random.key(5), 400), **asked)
    drawn = stochastic_flow.ensemble(
        flow, linear(W, X), key=jax.random.split(jax.random.key(6), 2000), **asked
    )
    seen, predicted = np.asarray(runs.loss)[:, -1], np.asarray(drawn.loss)[:, -1]
    if seen.std() < 1e-12:
        np.testing.assert_allclose(predicted, seen[0], rtol=1e-9)
        return
    assert abs(ttest_ind(seen, predicted, equal_var=False).statistic) < 3
    squares = [(losses - losses.mean()) ** 2 for losses in (seen, predicted)]
    assert abs(ttest_ind(*squares, equal_var=False).statistic) < 3


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


def test_identity_strategy_and_one_batch_change_no_bit() -> None:
    asked = options(True, key=jax.random.key(3))
    flow = ntkdp.KernelFlow(ntkdp.empirical_ntk(linear, W, X), *problem(True))
    cases: list[dict[str, Any]] = [
        {"noise": Independent()}, {"noise": Correlated([1.0])}, {"batches": Cyclic(1)}
    ]  # fmt: skip
    for same in cases:
        for work in (
            lambda more: observed(True, **asked, **more),
            lambda more: stochastic_flow.ensemble(flow, linear(W, X), **asked, **more),
        ):
            np.testing.assert_array_equal(work(same).loss, work({}).loss)
    rate = observed(True, sample_rate=0.4, **asked)
    poisson = observed(True, batches=Poisson(0.4), **asked)
    np.testing.assert_array_equal(rate.loss, poisson.loss)


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
    with pytest.raises(ValueError, match=r"there is no accountant of FixedSize"):
        observed(True, key=jax.random.key(0),
            **(asked | {"batches": FixedSize(3)}),
        )  # fmt: skip


def test_corrected_adam_needs_independent_noise() -> None:
    with pytest.raises(ValueError, match=r"noise must be independent with correct_noise=True"):
        observed(True, noise=NOISES["Toeplitz"],
            optimizer=ntkdp.optimizers.Adam(correct_noise=True), key=jax.random.key(0),
            **options(True),
        )  # fmt: skip
