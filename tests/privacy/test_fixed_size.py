"""Batches of a fixed size, a sample replaced: against dp-accounting, definitions, and attacks."""

import json
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SampledWithoutReplacementDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.privacy_accountant import NeighboringRelation
from dp_accounting.rdp import RdpAccountant
from helpers import balle_and_wang, linear
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats
from typer.testing import CliRunner

import ntkdp
from ntkdp import batches, cli, clipping, dp_sgd, losses, privacy, stochastic_flow
from ntkdp.privacy._arguments import ACCOUNTANTS


def epsilon(*mechanism: Any) -> float:
    return privacy.epsilon(*mechanism, sampling="fixed_size")


def delta(*mechanism: Any) -> float:
    return privacy.delta(*mechanism, sampling="fixed_size")


def of_one_step(sigma: float, q: float, epsilon: float) -> float:
    """Delta of a step: q times that of the Gaussian mechanism (Balle, Barthe, Gaboardi 2018)."""
    return q * balle_and_wang(2 / sigma, math.log1p(math.expm1(epsilon) / q))


@pytest.mark.parametrize(
    ("sigma", "q", "at"), [(2.0, 0.1, 0.5), (1.4, 0.3, 1.0), (4.0, 0.5, 0.1), (0.8, 0.01, 2.0)]
)
def test_one_step_is_exact(sigma: float, q: float, at: float) -> None:
    """The bound is the theorem's, and that is what the worst pair of data sets attains."""
    exact = of_one_step(sigma, q, at)
    x = np.linspace(-14, 14 + 2 / sigma, 400_001)
    absent = stats.norm.pdf(x)
    present = (1 - q) * absent + q * stats.norm.pdf(x - 2 / sigma)
    attained = integrate.trapezoid(np.maximum(present - math.exp(at) * absent, 0), x)
    assert attained == pytest.approx(exact, rel=1e-6)
    assert exact * (1 - 1e-9) <= delta(sigma, q, 1, at) <= exact * 1.01
    assert at * (1 - 1e-9) <= epsilon(sigma, q, 1, exact) <= at * 1.003
    assert delta(sigma, q, 1, at, "rdp") >= exact


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_an_attack_on_one_step_stays_below(accountant: Any) -> None:
    """The sample against its opposite, the others at 0: the best test of one against the other."""
    x = np.linspace(-40, 40, 200_001)
    for sigma, q, at in ((1.0, 0.2, 0.7), (3.0, 0.5, 0.2), (0.5, 0.05, 1.5)):
        one, other = (
            (1 - q) * stats.norm.pdf(x, 0, sigma) + q * stats.norm.pdf(x, shift, sigma)
            for shift in (1, -1)
        )
        attained = integrate.trapezoid(np.maximum(one - math.exp(at) * other, 0), x)
        assert 0 < attained <= delta(sigma, q, 1, at, accountant)


@pytest.mark.parametrize(("sigma", "steps"), [(20.0, 100), (2.0, 1)])
def test_whole_batches_are_the_gaussian_mechanism_at_twice_the_distance(
    sigma: float, steps: int
) -> None:
    mu = 2 * math.sqrt(steps) / sigma
    found = epsilon(sigma, 1.0, steps, 1e-5)
    assert balle_and_wang(mu, found) == pytest.approx(1e-5, rel=1e-7)
    limit = privacy.gaussian_dp(sigma, 1.0, steps, 1e-5, sampling="fixed_size")
    assert limit.is_guarantee
    assert limit.mu == pytest.approx(mu, rel=1e-14)
    # A share of nearly one is nearly that, from below.
    assert epsilon(sigma, 1 - 1e-9, steps, 1e-5) == pytest.approx(found, rel=2e-3)
    theirs = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE)
    theirs.compose(GaussianDpEvent(sigma / 2), steps)
    assert epsilon(sigma, 1.0, steps, 1e-5, "rdp") <= theirs.get_epsilon(1e-5) * (1 + 1e-9)


CASES = [(2.0, 10, 100), (8.0, 100, 1000), (1.2, 1, 500)]


@pytest.mark.parametrize(("sigma", "size", "steps"), CASES)
def test_between_a_pair_of_data_sets_and_the_bound_of_wang_et_al(
    sigma: float, size: int, steps: int
) -> None:
    """Both by dp-accounting, whose noise is in units of what moves the sum: half of it here.

    If all other samples move the sum the same way, and the replaced one the other way, outputs come
    from N(0, 1), or with probability q from N(2/sigma, 1): what a sampled Gaussian is.
    """
    event = SampledWithoutReplacementDpEvent(1000, size, GaussianDpEvent(sigma / 2))
    above = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE)
    above.compose(event, steps)
    pair = PoissonSampledDpEvent(size / 1000, GaussianDpEvent(sigma / 2))
    below = PLDAccountant(value_discretization_interval=1e-3).compose(pair, steps)
    for at in (1e-3, 1e-6):
        pld, rdp = (
            epsilon(sigma, size / 1000, steps, at, accountant) for accountant in ACCOUNTANTS
        )
        assert below.get_epsilon(at) * (1 - 3e-3) <= pld <= rdp
        assert rdp <= above.get_epsilon(at) * (1 + 1e-9)
        # Neither bound is a loose one of the other: nor is it that of full batches.
        assert pld <= 1.2 * below.get_epsilon(at)


def of_both_ways(sigma: float, q: float, steps: int, at: float) -> float:
    """Delta of the trade-off function of Dong, Roth and Su, from its characteristic function."""
    z = np.linspace(1 / sigma, 2 / sigma + 10, 3001)
    loss = np.log1p(q * np.expm1(2 * z / sigma - 2 / sigma**2))
    absent = stats.norm.pdf(z) * (z[1] - z[0])
    loss, masses = np.append(loss, -loss), np.append(absent * np.exp(loss), absent)
    deviation = math.sqrt(steps * float(masses @ loss**2))
    w = np.linspace(0, 9 / deviation, 401)
    of_sum = np.exp(steps * np.log1p(np.expm1(1j * np.outer(w, loss)) @ masses))
    above = np.linspace(at, at + 10 * deviation, 801)
    density = integrate.trapezoid((np.exp(-1j * np.outer(above, w)) * of_sum).real, w) / np.pi
    return float(integrate.trapezoid(-np.expm1(at - above) * density, above))


@pytest.mark.parametrize(("sigma", "q", "steps"), [(6.0, 0.05, 400), (3.0, 0.2, 50)])
def test_many_steps_are_those_of_the_trade_off_function(sigma: float, q: float, steps: int) -> None:
    found = epsilon(sigma, q, steps, 1e-3)
    assert (
        of_both_ways(sigma, q, steps, found) <= 1e-3 <= of_both_ways(sigma, q, steps, 0.99 * found)
    )


def test_it_falls_with_noise_and_delta_and_grows_with_share_and_steps() -> None:
    case = (3.0, 0.1, 200, 1e-4)
    better = [(3.1, 0.1, 200, 1e-4), (3.0, 0.09, 200, 1e-4), (3.0, 0.1, 190, 1e-4)]
    better += [(3.0, 0.1, 200, 2e-4)]
    for accountant in ACCOUNTANTS:
        found = epsilon(*case, accountant)
        assert max(epsilon(*other, accountant) for other in better) < found
        # More than for adding or removing, and less than for full batches.
        assert privacy.epsilon(*case, accountant) < found < epsilon(3.0, 1.0, 200, 1e-4, accountant)


GRID: Sequence[tuple[float, float, int]] = [
    (sigma, q, steps)
    for sigma in (0.1, 1.0, 50.0)
    for q in (1e-5, 0.3, 0.999)
    for steps in (1, 10**5)
]


@pytest.mark.slow
@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_the_worst_pair_stays_below_on_a_grid(accountant: Any) -> None:
    """Of outputs that a sample moves with probability q the epsilon is known to be attained."""
    for sigma, q, steps in GRID:
        for at in (1e-10, 1e-3):
            found = epsilon(sigma, q, steps, at, accountant)
            pair = privacy.epsilon(sigma / 2, q, steps, at, accountant)
            # Two grids of losses differ by a part in a thousand.
            assert pair * (1 - 2e-3) <= found
            for worse in ((0.9 * sigma, q, steps), (sigma, q, 2 * steps)):
                assert epsilon(*worse, at, accountant) >= found * (1 - 1e-9)


def test_an_attack_on_runs_that_spend_a_budget_attains_it() -> None:
    """One step of six samples, two of them in a batch, one of them replaced by its opposite."""
    sigma, q, at, n_runs = 1.5, 2 / 6, 0.8, 20_000
    budget = privacy.Budget(at, of_one_step(sigma, q, at))
    x, targets = jnp.ones((6, 1)), jnp.full((6, 1), -100.0).at[0].set(100.0)
    run = dp_sgd.run(
        linear, jnp.zeros((1, 1)), x, targets, losses.SquaredError(), clipping.Abadi(1.0),
        learning_rate=1.0, steps=1, noise_multiplier=budget, batches=batches.FixedSize(2),
        outputs=True, key=jax.random.split(jax.random.key(0), n_runs),
    )  # fmt: skip
    assert run.outputs is not None
    assert run.setup[0].noise_multiplier == pytest.approx(sigma, rel=3e-3)
    # A step divides by the size of a batch; the others alone would move the sum to -2.
    sums = (2 * np.asarray(run.outputs)[:, -1, 0, 0] + 2) / sigma
    best = sigma / 2 * math.log1p(math.expm1(at) / q) + 1 / sigma
    hit = np.mean(sums > best)
    attained = hit - math.exp(at) * stats.norm.sf(best)
    error = math.sqrt(hit * (1 - hit) / n_runs)
    assert attained == pytest.approx(delta(sigma, q, 1, at), abs=3 * error)
    assert attained > delta(1.1 * sigma, q, 1, at) + 3 * error


@pytest.mark.parametrize("sigma", [0.3, 2.0, 50.0])
def test_the_central_limit_is_the_mean_square_of_the_likelihood_ratio(sigma: float) -> None:
    """Of both ways, to the first order in q; a bound of a million steps of little q is its own."""
    s, q, steps = 2 / sigma, 1e-3, 10**6
    z = np.linspace(s / 2, 2 * s + 14, 400_001)
    square = 2 * integrate.simpson(np.expm1(s * z - s * s / 2) ** 2 * stats.norm.pdf(z), x=z)
    limit = privacy.gaussian_dp(sigma, q, steps, 1e-5, sampling="fixed_size")
    assert limit.mu == pytest.approx(q * math.sqrt(steps * square), rel=1e-9)
    assert not limit.is_guarantee
    if sigma > 1:
        assert epsilon(sigma, q, steps, 1e-5) == pytest.approx(limit.epsilon, rel=0.02)


@given(st.floats(1e-4, 1e3), st.floats(1e-6, 0.999), st.integers(1, 10**7))
def test_mu_of_a_budget_is_that_of_the_central_limit(mu: float, q: float, steps: int) -> None:
    size, n = max(1, round(1e6 * q)), 10**6
    sigma = privacy.Budget(mu=mu).noise_multiplier(
        steps, batches=batches.FixedSize(size), n_samples=n
    )
    reached = privacy.gaussian_dp(sigma, size / n, steps, 1e-5, sampling="fixed_size").mu
    assert reached == pytest.approx(mu, rel=1e-8)


def test_extreme_budgets_of_mu() -> None:
    half = batches.FixedSize(1)
    for mu in (1e-6, 1e200):
        sigma = privacy.Budget(mu=mu).noise_multiplier(1, batches=half, n_samples=2)
        # Little shifts count as they are, and of large ones the larger tail alone.
        expected = (
            4 / (mu / 0.5) / 2 if mu < 1 else 2 / math.sqrt(2 * math.log(2e200) - math.log(2))
        )
        assert sigma == pytest.approx(expected, rel=1e-5)
    whole = privacy.Budget(mu=0.5).noise_multiplier(100, batches=batches.FixedSize(7), n_samples=7)
    assert whole == 40


def test_extremes() -> None:
    for accountant in ACCOUNTANTS:
        assert epsilon(0.0, 0.1, 10, 1e-5, accountant) == math.inf
        assert delta(0.0, 0.1, 10, 3.0, accountant) == 1.0
        assert epsilon(1e-300, 0.1, 10, 1e-5, accountant) == math.inf
        assert epsilon(1e300, 0.5, 10, 1e-5, accountant) == 0.0
        assert epsilon(1e-9, 0.1, 1000, 1e-5, accountant) > 1e10
        for sigma in (1e4, 1e9):
            # The total variation distance, which no test is beyond.
            t = 0.5 * math.erf(1 / (sigma * math.sqrt(2)))
            assert delta(sigma, 0.5, 1, 0.0, accountant) >= t * (1 - 1e-6)
    # Whoever is drawn with probability 1e-7 loses nothing else at delta = 0.01.
    assert epsilon(0.01, 1e-8, 10, 0.01) == 0


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_the_noise_found_keeps_the_budget(accountant: Any) -> None:
    budget = privacy.Budget(2.0, 1e-5, accountant=accountant)
    sigma = budget.noise_multiplier(100, batches=batches.FixedSize(50), n_samples=500)
    assert sigma == privacy.noise_multiplier(2.0, 0.1, 100, 1e-5, accountant, sampling="fixed_size")
    assert epsilon(sigma, 0.1, 100, 1e-5, accountant) <= 2
    assert epsilon(0.99 * sigma, 0.1, 100, 1e-5, accountant) > 2


def test_pieces_are_composed() -> None:
    pieces = [(4.0, 0.1, 30), (4.0, 0.1, 70), (30.0, 1.0, 10)]
    together = privacy.composed_epsilon(pieces, 1e-5, sampling="fixed_size")
    assert epsilon(4.0, 0.1, 100, 1e-5) < together
    assert together < epsilon(4.0, 0.1, 100, 5e-6) + epsilon(30.0, 1.0, 10, 5e-6)
    whole = privacy.composed_epsilon(
        [(20.0, 1.0, 36), (20.0, 1.0, 64)], 1e-5, sampling="fixed_size"
    )
    assert balle_and_wang(1.0, whole) == pytest.approx(1e-5, rel=1e-7)


@pytest.mark.slow
def test_predictions_spend_a_budget_on_their_number_of_samples() -> None:
    x, y = jnp.linspace(-1, 1, 36).reshape(12, 3), jnp.ones((12, 1))
    model = ntkdp.models.mlp([4], 1)
    problem = (y, losses.SquaredError(), clipping.Abadi(0.5))
    params = model.init(jax.random.key(0), x)
    asked: dict[str, Any] = {
        "learning_rate": 0.3, "steps": 5, "batches": batches.FixedSize(3), "key": jax.random.key(1),
        "noise_multiplier": privacy.Budget(2.0, 1e-3),
    }  # fmt: skip
    kernel = ntkdp.KernelFlow(jnp.asarray(x @ x.T), *problem)
    response = stochastic_flow.ResponseFlow(model.apply, params, x, *problem)
    wide = stochastic_flow.TwoTimeFlow(model, x, *problem)
    expected = privacy.noise_multiplier(2.0, 0.25, 5, 1e-3, sampling="fixed_size")
    for path in (
        stochastic_flow.ensemble(kernel, np.zeros((12, 1)), **asked),
        stochastic_flow.response_ensemble(response, nodes=3, **asked),
        stochastic_flow.two_time_ensemble(wide, nodes=3, **asked),
        ntkdp.predict(model, params, (x, y), *problem[1:], **asked),
    ):
        assert path.setup[0].noise_multiplier == pytest.approx(expected, rel=1e-6)


def test_every_figure_says_what_neighbours_differ_in() -> None:
    report = privacy.report(2.0, 0.1, 100, 1e-5, sampling="fixed_size")
    assert report.setting.endswith("replace one sample")
    assert "batches of a fixed size, q = 0.1" in report.setting
    assert report.as_dict()["neighbours"] == "replace one sample"
    assert report.as_dict()["sampling"] == "fixed_size"
    assert report.pld == epsilon(2.0, 0.1, 100, 1e-5)
    assert report.rdp == epsilon(2.0, 0.1, 100, 1e-5, "rdp")
    whole = privacy.report(2.0, 1.0, 100, 1e-5, sampling="fixed_size")
    assert "full batches" in whole.setting
    assert "fixed size" not in whole.setting
    for made, words in (
        (None, "add or remove one sample"),
        (batches.Poisson(0.1), "add or remove one sample"),
        (batches.FixedSize(3), "replace one sample"),
        (batches.Cyclic(3), "leave the place of one sample empty"),
        (batches.Shuffled(3), "leave the place of one sample empty"),
    ):
        assert privacy.neighbours(made) == words


def run(*words: str) -> Any:
    return CliRunner().invoke(cli.app, ["privacy", *words])


def test_command_counts_batches_of_a_fixed_size() -> None:
    rest = ("--n", "1000", "--batch", "100", "--steps", "50", "--sampling", "fixed_size")
    shown = run("--sigma", "4", *rest)
    assert shown.exit_code == 0, shown.output
    assert "replace one sample" in shown.output
    assert f"{epsilon(4.0, 0.1, 50, 1e-5):.4g}" in shown.output
    found = json.loads(run("--epsilon", "3", *rest, "--json").output)
    assert 2.99 < found["pld"] <= 3 < found["rdp"]
    assert found["neighbours"] == "replace one sample"
    limit = json.loads(run("--mu", "0.5", *rest, "--json").output)["gaussian"]
    assert limit["mu"] == pytest.approx(0.5, rel=1e-8)
    refused = run("--sigma", "1", "--n", "9", "--sample-rate", ".5", *rest[4:])
    assert refused.exit_code == 2
    assert "--sampling fixed_size needs --batch, with --n" in refused.stderr
