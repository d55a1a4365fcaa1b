"""Strategies of least error: against closed forms, jax-privacy and real runs."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import DATA, linear
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import approx_fprime
from scipy.signal import lfilter
from sklearn.datasets import load_digits, load_wine

import ntkdp
from ntkdp.batches import Batches, Cyclic, Full, Shuffled
from ntkdp.noise import BufferedToeplitz, Correlated, Independent, Noise, _least_error

#: The script strategies.py in the same folder wrote it, with jax-privacy 2.0.0.
JAX_PRIVACY = json.loads((DATA / "strategies.json").read_text())


def mode(a: float, steps: int) -> np.ndarray:
    """What noise of each step does to the last output of a mode."""
    return a ** np.arange(steps)[::-1]


def privacy_times_error(noise: Noise, rows: np.ndarray, batches: Batches) -> float:
    """Variance of rows of a workload at equal privacy."""
    steps = rows.shape[-1]
    moved = np.linalg.solve(noise.strategy_matrix(steps).T, rows.T)
    return noise.sensitivity(batches, steps) ** 2 * float(np.sum(moved**2))


def optimal_mode(a: float, steps: int, n_bands: int, batches: Batches) -> Correlated:
    return Correlated.optimal(
        [1.0], learning_rate=1 - a, steps=steps, n_bands=n_bands, batches=batches
    )


# ---------------------------------------------------------------------------- jax-privacy


@pytest.mark.parametrize("case", JAX_PRIVACY["sensitivities"])
def test_sensitivities_are_those_of_jax_privacy(case: dict[str, Any]) -> None:
    noise, steps, given = Correlated(case["strategy"]), case["steps"], case["given"]
    if case["pattern"] == "apart":
        reached = noise.separated_sensitivity(steps, given["separation"], given["most"])
    else:
        reached = noise.sensitivity(Cyclic(given.get("period", steps)), steps)
    assert reached == pytest.approx(case["sensitivity"], rel=1e-9)


@pytest.mark.parametrize("case", JAX_PRIVACY["optima"])
def test_optimal_strategies_for_sums_are_those_of_jax_privacy(case: dict[str, Any]) -> None:
    steps = case["steps"]
    noise = Correlated.optimal_for_sums(steps=steps, n_bands=case["bands"], batches=Cyclic(steps))
    error = privacy_times_error(noise, np.tri(steps), Cyclic(steps)) / steps
    assert error <= case["error"] * (1 + 1e-9)
    theirs = np.array(case["coefficients"])
    np.testing.assert_allclose(noise.strategy, theirs / theirs[0], atol=1e-5)


# ---------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize(
    ("epochs", "reference"),
    [(1, 0.4005), (4, 0.4009), (10, 0.4185), (20, 0.4916), (200, 2.655)],
)
def test_optimal_strategies_of_a_mode_beat_the_square_root(epochs: int, reference: float) -> None:
    """At most the variance of (1 - a z)^(-1/2), and no less than any Toeplitz strategy can have."""
    a, steps = 0.9, 200
    period = steps // epochs
    noise, batches = optimal_mode(a, steps, 60, Cyclic(period)), Cyclic(period)
    independent = privacy_times_error(Independent(), mode(a, steps), batches)
    ratio = privacy_times_error(noise, mode(a, steps), batches) / independent
    assert ratio <= min(reference, 1.0) + 5e-5
    # Among spectra, the best is as large as the response where steps of a period are told apart.
    angles = 2 * np.pi * np.arange(2**12 * period) / (2**12 * period)
    response = 1 / np.abs(1 - a * np.exp(1j * angles))
    folded = response.reshape(period, -1).mean(axis=0)
    least = np.mean(folded**2) / np.mean(response**2)
    assert least * (1 - 1e-3) <= ratio <= 1.02 * least


@pytest.mark.parametrize(("a", "ratio"), [(0.5, 0.8638), (0.9, 0.4005), (0.99, 0.0909)])
def test_optimal_strategies_of_a_mode_over_a_long_run(a: float, ratio: float) -> None:
    """With many bands they have the least variance that there is, in three digits."""
    steps, n_bands = (1200, 600) if a == 0.99 else (300, 100)
    noise = optimal_mode(a, steps, n_bands, Cyclic(steps))
    moved = np.linalg.solve(noise.strategy_matrix(steps).T, mode(a, steps))
    # A sample that takes part in the first step sees most of the strategy.
    reached = float(noise.strategy @ noise.strategy) * float(moved @ moved) * (1 - a**2)
    assert reached == pytest.approx(ratio, abs=6e-5)


@pytest.mark.parametrize("n_bands", [1, 2, 16])
def test_independent_noise_is_best_for_full_batches(n_bands: int) -> None:
    eigenvalues = np.linspace(0.5, 10.0, 7)
    noise = Correlated.optimal(
        eigenvalues, learning_rate=0.1, steps=150, n_bands=n_bands, batches=Full()
    )
    np.testing.assert_allclose(noise.strategy, np.eye(n_bands)[0], atol=1e-6)


# ---------------------------------------------------------------------------- properties

PATTERNS = [Full(), Cyclic(2), Cyclic(5), Cyclic(24), Shuffled(3), Shuffled(8)]


@given(
    rates=st.lists(st.floats(0.0, 1.2), min_size=1, max_size=4),
    n_bands=st.integers(1, 6),
    batches=st.sampled_from(PATTERNS),
    momentum=st.sampled_from([0.0, 0.5]),
)
@settings(max_examples=12)
def test_never_worse_than_standard_strategies_and_never_past_the_sensitivity(
    rates: list[float], n_bands: int, batches: Batches, momentum: float
) -> None:
    steps, rng = 24, np.random.default_rng(0)
    eigenvalues = np.array([0.5, *rates])
    sums = Correlated.optimal_for_sums(
        steps=steps, n_bands=n_bands, batches=batches, momentum=momentum
    )
    kernel = Correlated.optimal(
        eigenvalues,
        learning_rate=1.0,
        steps=steps,
        n_bands=n_bands,
        batches=batches,
        momentum=momentum,
    )
    lags = np.arange(steps)
    out_of_momentum = np.cumsum(momentum**lags)
    # Heavy balls at the rate 1, as filters of order two.
    balls = [
        lfilter([1.0], [1.0, v - 1 - momentum, momentum], np.eye(steps)[0]) for v in eigenvalues
    ]
    workloads = {
        "sums": np.tril(out_of_momentum[np.subtract.outer(lags, lags)]),
        "kernel": np.array(balls)[:, ::-1] * np.sqrt(eigenvalues)[:, None],
    }
    for noise, rows in ((sums, workloads["sums"]), (kernel, workloads["kernel"])):
        reached = privacy_times_error(noise, rows, batches)
        for other in (Independent(), Correlated.square_root(n_bands)):
            assert reached <= privacy_times_error(other, rows, batches) * (1 + 1e-9)
        # Gradients of one sample, in steps in which it may take part, move C G by no more.
        bound = noise.sensitivity(batches, steps)
        for _ in range(20):
            gradients = rng.normal(size=(steps, 2))
            gradients /= np.linalg.norm(gradients, axis=1, keepdims=True)
            taken = pattern(batches, steps, rng)[:, None]
            moved = noise.strategy_matrix(steps) @ (taken * gradients)
            assert np.linalg.norm(moved) <= bound * (1 + 1e-12)
            same = noise.strategy_matrix(steps) @ taken
            assert np.linalg.norm(same) <= bound * (1 + 1e-12)


def pattern(batches: Batches, steps: int, rng: np.random.Generator) -> np.ndarray:
    """Steps in which a sample takes part, drawn from those that are possible."""
    if isinstance(batches, Full):
        return np.ones(steps)
    assert isinstance(batches, Cyclic | Shuffled)
    k = batches.n_batches
    turns = rng.integers(k, size=-(-steps // k))
    if isinstance(batches, Cyclic):
        turns[:] = turns[0]
    return np.eye(k)[turns].reshape(-1)[:steps]


def heavy_ball(eigenvalue: float, learning_rate: Any, steps: int, momentum: float) -> np.ndarray:
    """The last output of a mode by the noise of each step, from optax's own steps."""
    optimizer = optax.sgd(learning_rate, momentum=momentum)

    def last(noise: jax.Array) -> jax.Array:
        def step(carried: Any, x: jax.Array) -> tuple[Any, None]:
            f, state = carried
            updates, state = optimizer.update(eigenvalue * f + x, state)
            return (f + updates, state), None

        start = jnp.zeros(())
        (f, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), noise)
        return f

    return np.asarray(jax.grad(last)(jnp.zeros(steps)))


def test_the_workload_of_a_kernel_is_that_of_its_steps() -> None:
    """With a schedule and momentum, from blocks or eigenvalues, against optax step by step."""
    steps, rng = 20, np.random.default_rng(1)
    factor = rng.normal(size=(6, 4))
    matrix = factor @ factor.T
    blocks = matrix.reshape(3, 2, 3, 2).swapaxes(1, 2)
    schedule = optax.linear_schedule(0.3, 0.05, steps)
    options: dict[str, Any] = {"steps": steps, "n_bands": 5, "batches": Cyclic(4)}
    options |= {"learning_rate": schedule, "momentum": 0.6}
    of_blocks = Correlated.optimal(blocks, **options).strategy
    eigenvalues = np.linalg.eigvalsh(matrix)
    given = Correlated.optimal(eigenvalues, scale=1 / 3, **options).strategy
    np.testing.assert_allclose(of_blocks, given, rtol=1e-6)
    rows = np.array([heavy_ball(v / 3, schedule, steps, 0.6) for v in eigenvalues])
    rows *= np.sqrt(np.maximum(eigenvalues, 0))[:, None]

    def objective(tail: np.ndarray) -> float:
        noise = Correlated(np.append(1.0, np.maximum(tail, 0.0)))
        return float(np.log(privacy_times_error(noise, rows, Cyclic(4))))

    slope = approx_fprime(given[1:], objective, 1e-7)
    assert np.abs(slope[given[1:] > 0]).max() < 1e-4
    assert slope.min() > -1e-4


@pytest.mark.parametrize("batches", PATTERNS)
def test_derivatives_of_the_sensitivity(batches: Batches) -> None:
    c = np.array([1.0, 0.6, 0.45, 0.2, 0.1])
    square, gradient = _least_error.squared_sensitivity(c, 24, batches)
    assert square == pytest.approx(Correlated(c).sensitivity(batches, 24) ** 2, rel=1e-12)
    for i, step in enumerate(1e-6 * np.eye(len(c))):
        ahead = _least_error.squared_sensitivity(c + step, 24, batches)[0]
        behind = _least_error.squared_sensitivity(c - step, 24, batches)[0]
        assert gradient[i] == pytest.approx((ahead - behind) / 2e-6, rel=1e-6)


# ---------------------------------------------------------------------------- real runs


def final_losses(
    data: Any, n: int, learning_rate: float, n_runs: int, kinds: dict[str, Noise]
) -> dict[str, np.ndarray]:
    """Last losses of a linear model under each noise, by the same keys, batches and budget."""
    x, labels = data(return_X_y=True)
    chosen = np.random.default_rng(0).permutation(len(x))[:n]
    x, targets = x[chosen], np.eye(labels.max() + 1)[labels[chosen]]
    x = (x - x.mean(axis=0)) / (x.std(axis=0) + 1e-9)
    x = np.concatenate([x, np.ones((n, 1))], axis=1) / np.sqrt(x.shape[1] + 1)
    # The share of the gradients that clipping leaves, at the start.
    rule = ntkdp.clipping.Abadi(1.0)
    share = np.minimum(1, 1 / np.linalg.norm(x, axis=1)).mean()
    kernel = Correlated.optimal(
        x @ x.T,
        learning_rate=learning_rate,
        steps=60,
        n_bands=12,
        batches=Cyclic(12),
        scale=share / n,
    )
    found = {}
    for name, noise in (kinds | {"kernel": kernel}).items():
        run = ntkdp.dp_sgd.run(
            linear,
            jnp.zeros((x.shape[1], targets.shape[1])),
            x,
            targets,
            ntkdp.losses.SquaredError(),
            rule,
            learning_rate=learning_rate,
            steps=60,
            batches=Cyclic(12),
            noise=noise,
            noise_multiplier=ntkdp.privacy.Budget(8.0, 1e-5),
            record_every=60,
            key=jax.random.split(jax.random.key(1), n_runs),
        )
        found[name] = np.asarray(run.loss[:, -1])
    return found


def in_standard_errors(difference: np.ndarray) -> float:
    return float(np.mean(difference) / np.std(difference, ddof=1) * np.sqrt(len(difference)))


def test_the_strategy_of_the_kernel_trains_best_on_wine() -> None:
    """Against those of the same shape, which share one program; two-sided at 1%."""
    kinds: dict[str, Noise] = {
        "independent": Correlated(np.eye(12)[0]),
        "square root": Correlated.square_root(12),
        "sums": Correlated.optimal_for_sums(steps=60, n_bands=12, batches=Cyclic(12)),
    }
    losses = final_losses(load_wine, 170, 2.0, 50, kinds)
    for name in kinds:
        assert in_standard_errors(losses["kernel"] - losses[name]) < -2.58
    assert losses["kernel"].mean() < 0.88 * losses["square root"].mean()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "n", "learning_rate"), [(load_wine, 170, 2.0), (load_digits, 1200, 4.0)]
)
def test_the_strategy_of_the_kernel_trains_best(data: Any, n: int, learning_rate: float) -> None:
    buffered = JAX_PRIVACY["buffered"]
    assert (buffered["steps"], buffered["period"]) == (60, 12)
    kinds: dict[str, Noise] = {
        "independent": Independent(),
        "square root": Correlated.square_root(12),
        "buffered": BufferedToeplitz(buffered["decays"], buffered["weights"]),
        "sums": Correlated.optimal_for_sums(steps=60, n_bands=12, batches=Cyclic(12)),
    }
    losses = final_losses(data, n, learning_rate, 150, kinds)
    for name in kinds:
        assert in_standard_errors(losses["kernel"] - losses[name]) < -2.58
    assert losses["kernel"].mean() < 0.5  # the loss at the start
