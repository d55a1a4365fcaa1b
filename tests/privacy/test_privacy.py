"""Accounting against exact formulas, integrals of the definition, and known figures."""

import json
import math
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
import typer
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import rdp_privacy_accountant
from helpers import balle_and_wang
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize, stats
from typer.testing import CliRunner

from ntkdp import cli, privacy
from ntkdp.cli import _privacy
from ntkdp.privacy import _sampled_gaussian
from ntkdp.privacy._arguments import ACCOUNTANTS

MNIST = (256 / 60000, 14063, 1e-5)
SNLI = (32 / 550152, 51576, 1 / 550152)


def test_importing_it_does_not_import_the_accountants() -> None:
    code = "import sys, ntkdp.privacy; print('dp_accounting' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("sigma", "setting", "accountant", "expected"),
    [
        (1.1, MNIST, "rdp", 2.597),
        (1.1, MNIST, "pld", 2.382),
        (0.4, SNLI, "rdp", 6.495),
        (0.4, SNLI, "pld", 5.131),
    ],
)
def test_known_epsilons(sigma: float, setting: Any, accountant: Any, expected: float) -> None:
    q, steps, delta = setting
    found = privacy.epsilon(sigma, q, steps, delta, accountant)
    assert found == pytest.approx(expected, rel=3e-4)


@pytest.mark.parametrize(("accountant", "expected"), [("rdp", 1.0140), ("pld", 0.9684)])
def test_known_noise_multipliers(accountant: Any, expected: float) -> None:
    sigma = privacy.noise_multiplier(3.0, *MNIST, accountant)
    assert sigma == pytest.approx(expected, rel=5e-4)
    assert 3 * (1 - 2e-3) <= privacy.epsilon(sigma, *MNIST, accountant) <= 3


@pytest.mark.parametrize(("sigma", "steps"), [(10.0, 100), (1.0, 1), (3.0, 50), (50.0, 10)])
def test_full_batches_are_the_gaussian_mechanism(sigma: float, steps: int) -> None:
    mu, delta = math.sqrt(steps) / sigma, 1e-5
    exact = optimize.brentq(lambda e: balle_and_wang(mu, e) - delta, 0, 50, xtol=1e-13)
    assert privacy.epsilon(sigma, 1.0, steps, delta) == pytest.approx(exact, rel=1e-8)
    assert privacy.delta(sigma, 1.0, steps, exact) == pytest.approx(delta, rel=1e-7)
    gaussian = privacy.gaussian_dp(sigma, 1.0, steps, delta)
    assert gaussian.is_guarantee
    assert gaussian.mu == pytest.approx(mu, rel=1e-14)
    assert gaussian.epsilon == pytest.approx(exact, rel=1e-8)
    found = privacy.noise_multiplier(exact, 1.0, steps, delta)
    assert sigma * (1 - 1e-9) <= found <= sigma * (1 + 1e-3)


def hockey_stick(sigma: float, q: float, epsilon: float) -> float:
    """Delta of one subsampled step, from the definition, by quadrature, the worse direction."""

    def density(x: Any, q: float) -> Any:
        return (1 - q) * stats.norm.pdf(x, 0, sigma) + q * stats.norm.pdf(x, 1, sigma)

    x = np.linspace(-12 * sigma, 1 + 12 * sigma, 400_001)
    with_one, without = density(x, q), density(x, 0.0)
    removed = np.maximum(with_one - math.exp(epsilon) * without, 0)
    added = np.maximum(without - math.exp(epsilon) * with_one, 0)
    return max(float(integrate.trapezoid(gain, x)) for gain in (removed, added))


@pytest.mark.parametrize(
    ("sigma", "q", "epsilon"), [(1.0, 0.1, 0.5), (0.7, 0.3, 1.0), (2.0, 0.5, 0.1), (0.5, 0.01, 2.0)]
)
def test_one_subsampled_step_against_the_definition(sigma: float, q: float, epsilon: float) -> None:
    exact = hockey_stick(sigma, q, epsilon)
    found = privacy.delta(sigma, q, 1, epsilon)
    assert exact * (1 - 1e-6) <= found <= exact * 1.01
    back = privacy.epsilon(sigma, q, 1, exact)
    assert epsilon * (1 - 1e-6) <= back <= epsilon * 1.003
    assert privacy.delta(sigma, q, 1, epsilon, "rdp") >= exact


@pytest.mark.parametrize(("sigma", "steps"), [(10.0, 100), (2.0, 3)])
def test_renyi_divergence_of_the_gaussian(sigma: float, steps: int) -> None:
    """Divergence alpha mu^2 / 2, turned into epsilon by proposition 12 of Canonne et al. (2020)."""
    mu, delta = math.sqrt(steps) / sigma, 1e-5

    def epsilon(a: float) -> float:
        return a * mu**2 / 2 + math.log1p(-1 / a) - math.log(delta * a) / (a - 1)

    best = optimize.minimize_scalar(epsilon, bounds=(1.01, 200), method="bounded").fun
    # The accountant tries a grid of orders.
    assert best * (1 - 1e-9) <= privacy.epsilon(sigma, 1.0, steps, delta, "rdp") <= best * 1.001


def test_the_central_limit_is_labelled_and_understates() -> None:
    limit = privacy.gaussian_dp(0.4, *SNLI)
    assert not limit.is_guarantee
    assert limit.mu == pytest.approx(0.3004, abs=5e-5)
    assert limit.epsilon == pytest.approx(1.2535, abs=5e-5)
    report = privacy.report(0.4, *SNLI)
    assert report.pld / limit.epsilon > 4
    assert report.rdp > report.pld
    assert "not a guarantee" in str(limit)
    assert "not a guarantee" in str(report).splitlines()[-1]
    assert "not a guarantee" in report.as_dict()["gaussian"]["note"]
    assert "NOT A GUARANTEE" in (privacy.gaussian_dp.__doc__ or "")


def test_many_weak_steps_reach_the_central_limit() -> None:
    """The limit is of many steps at fixed q sqrt(K): there the accountant agrees with it."""
    sigma, delta = 2.0, 1e-5
    gaps = []
    for steps in (100, 10_000):
        q = 0.5 / math.sqrt(steps)
        found = privacy.epsilon(sigma, q, steps, delta)
        gaps.append(found / privacy.gaussian_dp(sigma, q, steps, delta).epsilon - 1)
    assert gaps[0] > 4 * gaps[1] > 0


def delta_of_many(sigma: float, q: float, steps: int, epsilon: float) -> float:
    """Delta of subsampled steps from the characteristic function of their loss, nothing rounded."""
    x = np.linspace(-14 * sigma, 1 + 14 * sigma, 4001)
    ratio = np.log1p(q * np.expm1((2 * x - 1) / (2 * sigma**2)))
    without = stats.norm.pdf(x, 0, sigma) * (x[1] - x[0])
    found = []
    for loss, weights in ((ratio, without * np.exp(ratio)), (-ratio, without)):
        deviation = math.sqrt(steps * float(weights @ loss**2))
        w = np.linspace(0, 9 / deviation, 801)
        of_sum = np.exp(steps * np.log1p(np.expm1(1j * np.outer(w, loss)) @ weights))
        above = np.linspace(epsilon, epsilon + 12 * deviation, 1201)
        waves = np.exp(-1j * np.outer(above, w)) * of_sum
        density = integrate.trapezoid(waves.real, w) / np.pi
        found.append(float(integrate.trapezoid(-np.expm1(epsilon - above) * density, above)))
    return max(found)


def test_millions_of_weak_steps() -> None:
    mechanism, delta = (10.0, 1e-5, 10**7), 1e-5
    found = privacy.epsilon(*mechanism, delta)
    assert found < privacy.epsilon(*mechanism, delta, "rdp")
    assert delta_of_many(*mechanism, found) < delta < delta_of_many(*mechanism, 0.98 * found)


def test_a_delta_below_the_rounding_of_transforms() -> None:
    """Here 0.7657 is exact, and 1e-16 lost at each step would be all of delta."""
    mechanism = (1.0, 1e-4, 1_000_001)
    found = privacy.epsilon(*mechanism, 1e-10)
    assert 0.7657 < found < 0.7657 * 1.002
    assert 1e-10 < privacy.delta(*mechanism, 0.7657) < 1.1e-10


@pytest.mark.parametrize(("sigma", "q", "steps"), [(1.3, 1e-3, 10_000), (0.6, 0.2, 7)])
def test_the_grid_against_that_of_dp_accounting(sigma: float, q: float, steps: int) -> None:
    """Both are bounds from above, to a part in a thousand."""
    event = PoissonSampledDpEvent(q, GaussianDpEvent(sigma))
    theirs = PLDAccountant(value_discretization_interval=1e-4).compose(event, steps)
    for delta in (1e-3, 1e-6):
        expected = theirs.get_epsilon(delta)
        assert privacy.epsilon(sigma, q, steps, delta) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(("sigma", "q"), [(0.8, 0.01), (3.0, 0.4), (0.3, 0.95)])
def test_renyi_moments_against_dp_accounting_and_the_definition(sigma: float, q: float) -> None:
    """At whole orders their sums are exact; between them their series is too large, or infinite."""
    orders, moments = _sampled_gaussian.ORDERS, _sampled_gaussian.renyi_moments(sigma, q)
    whole = orders % 1 == 0
    theirs = rdp_privacy_accountant._compute_rdp_poisson_subsampled_gaussian
    expected = theirs(q, sigma, orders[whole]) * (orders[whole] - 1)
    np.testing.assert_allclose(moments[whole], expected, rtol=1e-9)
    z = np.linspace(-14, 14 + 11 / sigma, 200_001)
    ratio = 1 - q + q * np.exp(z / sigma - 0.5 / sigma**2)
    for order, moment in zip(orders[~whole][::9], moments[~whole][::9], strict=True):
        # Less what has the mean 0, so that no digits cancel in the sum.
        power = np.exp(order * np.log(ratio) + stats.norm.logpdf(z))
        gain = power - (1 + order * (ratio - 1)) * stats.norm.pdf(z)
        expected = np.log1p(integrate.trapezoid(gain, z))
        assert moment == pytest.approx(expected, rel=1e-9)


mechanisms = st.tuples(st.floats(0.6, 20.0), st.floats(0.001, 1.0), st.integers(1, 300))


@pytest.mark.slow
@settings(max_examples=8)
@given(mechanisms, st.floats(1e-8, 1e-2))
def test_order_of_the_figures(mechanism: tuple[float, float, int], delta: float) -> None:
    sigma, q, steps = mechanism
    pld = privacy.epsilon(sigma, q, steps, delta)
    # Discretisation is from above, by a thousandth.
    assert 0 <= pld <= privacy.epsilon(sigma, q, steps, delta, "rdp") * 1.002 + 1e-9
    for worse in (
        (sigma / 1.2, q, steps),
        (sigma, min(1.0, 1.3 * q), steps),
        (sigma, q, 2 * steps),
    ):
        assert privacy.epsilon(*worse, delta) >= pld * 0.998
    # Sampling never costs.
    assert pld <= privacy.epsilon(sigma, 1.0, steps, delta) * 1.002 + 1e-9


@pytest.mark.parametrize(
    ("budget", "q", "steps", "accountant"),
    [(0.5, 0.01, 100, "pld"), (8.0, 0.3, 20, "pld"), (2.0, 1.0, 50, "pld"), (1.0, 0.1, 200, "rdp")],
)
def test_the_noise_found_keeps_the_budget(
    budget: float, q: float, steps: int, accountant: Any
) -> None:
    sigma = privacy.noise_multiplier(budget, q, steps, 1e-5, accountant)
    assert privacy.epsilon(sigma, q, steps, 1e-5, accountant) <= budget
    assert privacy.epsilon(0.99 * sigma, q, steps, 1e-5, accountant) > budget


def test_extremes() -> None:
    for accountant in ACCOUNTANTS:
        assert privacy.epsilon(0.0, 0.1, 10, 1e-5, accountant) == math.inf
        assert privacy.delta(0.0, 0.1, 10, 3.0, accountant) == 1.0
        assert privacy.epsilon(1e-9, 0.1, 1000, 1e-5, accountant) > 1e10
        assert privacy.epsilon(1e-9, 1.0, 1000, 1e-5, accountant) >= 0.5 * 1000 * 1e18
        assert privacy.epsilon(1e12, 1.0, 10, 1e-6, accountant) == 0
    assert privacy.gaussian_dp(0.0, 0.1, 10, 1e-5).epsilon == math.inf
    assert privacy.gaussian_dp(0.01, 0.1, 10, 1e-5).epsilon == math.inf
    # Whoever is drawn with probability 1e-7 loses nothing else at delta = 0.01.
    assert privacy.epsilon(0.01, 1e-8, 10, 0.01) == 0
    assert "epsilon = inf" in str(privacy.report(0.0, 0.1, 10, 1e-5))


def test_rounding_is_not_taken_for_privacy(caplog: pytest.LogCaptureFixture) -> None:
    """Divergences of sampling round below zero at enormous noise; and nothing is logged."""
    for sigma in (1e4, 1e6, 1e9):
        # No test of total variation t is worth less than t at epsilon 0.
        t = 0.5 * math.erf(0.5 / (sigma * math.sqrt(2))) * 2
        assert privacy.delta(sigma, 0.5, 1, 0.0, "rdp") >= 0.5 * t
        assert privacy.epsilon(sigma, 0.5, 1, 0.1 * t, "rdp") > 0
    assert privacy.epsilon(2.0, 0.5, 100, 1e-5, "rdp") > 0
    assert not caplog.records


def test_a_budget_out_of_reach() -> None:
    with pytest.raises(ValueError, match=r"epsilon = 1e-09 cannot be kept .* fewer steps"):
        privacy.noise_multiplier(1e-9, 0.5, 1000, 1e-300, "rdp")


GOOD = {"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 10, "delta": 1e-5}


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"noise_multiplier": -1.0}, ValueError, "noise_multiplier must be at least 0"),
        ({"noise_multiplier": math.nan}, ValueError, "noise_multiplier must be"),
        ({"noise_multiplier": math.inf}, ValueError, "noise_multiplier must be"),
        ({"noise_multiplier": np.ones(2)}, ValueError, r"single number, got shape \(2,\)"),
        ({"sample_rate": 0.0}, ValueError, r"sample_rate must be in \(0, 1\], got 0"),
        ({"sample_rate": 1.5}, ValueError, r"sample_rate must be in \(0, 1\], got 1.5"),
        ({"sample_rate": np.ones(2)}, ValueError, r"single number, got shape \(2,\)"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": -3}, ValueError, "steps must be at least 1, got -3"),
        ({"steps": True}, TypeError, "steps must be a whole number, got True"),
        ({"delta": 0.0}, ValueError, "delta must be positive"),
        ({"delta": 1.0}, ValueError, r"delta must be in \(0, 1\), got 1.0"),
        ({"delta": math.nan}, ValueError, "delta must be positive"),
    ],
)
def test_bad_inputs(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    # Types that the runtime checks of the tests would turn down before the function is reached.
    plain: Any = getattr(privacy.report, "__wrapped__", privacy.report)
    with pytest.raises(error, match=message):
        plain(**GOOD | wrong)


def test_bad_accountants_and_budgets() -> None:
    plain = {
        name: getattr(getattr(privacy, name), "__wrapped__", getattr(privacy, name))
        for name in ("epsilon", "delta", "noise_multiplier")
    }
    for name, function in plain.items():
        with pytest.raises(ValueError, match="unknown accountant 'pdl'; did you mean 'pld'"):
            function(1.0, 0.1, 10, 1e-5, "pdl")
        with pytest.raises(TypeError, match=r"whole number, got 1\.5"):
            function(1.0, 0.1, 1.5, 1e-5)
        assert name in privacy.__dict__
    for budget in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="epsilon must be positive and finite"):
            privacy.noise_multiplier(budget, 0.1, 10, 1e-5)
    with pytest.raises(ValueError, match="epsilon must be at least 0"):
        privacy.delta(1.0, 0.1, 10, -1.0)


def test_numbers_of_numpy_and_jax_are_numbers() -> None:
    plain = privacy.epsilon(1.0, 0.5, 10, 1e-5)
    wrapped: Any = getattr(privacy.epsilon, "__wrapped__", privacy.epsilon)
    assert wrapped(np.float64(1), np.float64(0.5), np.int64(10), jax.numpy.asarray(1e-5)) == plain


app = typer.Typer()
app.command("privacy")(_privacy.privacy)
app.callback()(lambda: None)
runner = CliRunner()


def run(*words: str) -> Any:
    return runner.invoke(app, ["privacy", *words])


def test_command_shows_all_methods() -> None:
    done = run(
        "--sigma", "1.1", "--n", "60000", "--batch", "256", "--steps", "14063", "--delta", "1e-5"
    )
    assert done.exit_code == 0, done.output
    for shown in ("2.382", "2.597", "not a guarantee", "14063 steps", "delta = 1e-05"):
        assert shown in done.output


def test_command_finds_the_noise_and_writes_json() -> None:
    done = run("--epsilon", "3", "--n", "1000", "--batch", "100", "--epochs", "5", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert found["steps"] == 50
    assert found["delta"] == 1e-5
    assert "the smaller of 1e-5 and 1/(10 n)" in found["delta_note"]
    assert found["sample_rate"] == 0.1
    assert 2.99 < found["pld"] <= 3 < found["rdp"]
    assert "not a guarantee" in found["gaussian"]["note"]
    kept = json.loads(
        run(
            *("--epsilon", "3", "--sample-rate", "0.1", "--steps", "50", "--delta", "1e-5"),
            *("--accountant", "rdp", "--json"),
        ).output
    )
    assert kept["noise_multiplier"] > found["noise_multiplier"]
    assert 2.99 < kept["rdp"] <= 3
    assert kept["delta_note"] == "as asked"


def test_command_says_what_delta_it_takes() -> None:
    """1/n would let one of the samples be published whole."""
    for n, delta in ((100, "1e-05"), (10**6, "1e-07")):
        done = run("--sigma", "1", "--n", str(n), "--sample-rate", "1", "--steps", "1")
        assert done.exit_code == 0, done.output
        said = f"delta = {delta} is the default, the smaller of 1e-5 and 1/(10 n)"
        assert said in done.output.splitlines()[-1]
    asked = run("--sigma", "1", "--n", "9", "--sample-rate", "1", "--steps", "1", "--delta", ".1")
    assert "the default" not in asked.output


def test_command_takes_a_noise_multiplier_by_name_and_by_letter() -> None:
    rest = ("--sample-rate", "1", "--steps", "1", "--delta", "1e-5", "--json")
    by_name, by_letter = (run(name, "2", *rest) for name in ("--noise-multiplier", "--sigma"))
    assert by_name.exit_code == 0, by_name.output
    assert by_name.output == by_letter.output
    assert json.loads(by_name.output)["noise_multiplier"] == 2


@pytest.mark.parametrize(("rate", "is_guarantee"), [("1", True), ("0.1", False)])
def test_command_spends_a_mu(rate: str, is_guarantee: bool) -> None:
    """Of full batches sqrt(K)/mu; with sampling what the central limit theorem asks for."""
    done = run("--mu", "0.5", "--sample-rate", rate, "--steps", "100", "--delta", "1e-5", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    q = float(rate)
    exact = 20 if is_guarantee else 1 / math.sqrt(math.log1p((0.5 / (q * 10)) ** 2))
    assert found["noise_multiplier"] == pytest.approx(exact, rel=1e-12)
    assert found["gaussian"]["mu"] == pytest.approx(0.5, rel=1e-9)
    assert found["gaussian"]["is_guarantee"] == is_guarantee


def test_command_without_noise_writes_valid_json() -> None:
    done = run("--sigma", "0", "--n", "100", "--batch", "100", "--epochs", "3", "--json")
    found = json.loads(done.output, parse_constant=lambda name: pytest.fail(name))
    assert found["pld"] == found["gaussian"]["epsilon"] == "inf"
    assert found["sample_rate"] == 1
    assert found["steps"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "give either --batch, with --n, or --sample-rate"),
        ("--sigma 1 --sample-rate .1 --steps 5", "give --delta, or --n for the smaller of"),
        ("--sigma 1 --batch 5 --steps 5", "--batch needs --n"),
        ("--sigma 1 --batch 5 --n 4 --steps 5", "--batch must not exceed --n = 4, got 5"),
        ("--sigma 1 --batch 0 --n 4 --steps 5", "--batch must be at least 1, got 0"),
        ("--sigma 1 --batch 2 --n 0 --steps 5", "--n must be at least 1, got 0"),
        ("--sigma 1 --batch 2 --n 4 --sample-rate .5 --steps 5", "give either --batch"),
        ("--sigma 1 --n 9 --sample-rate 2 --steps 5", "--sample-rate must be in (0, 1], got 2.0"),
        ("--sigma 1 --n 9 --sample-rate .5", "give either --steps or --epochs"),
        (
            "--sigma 1 --n 9 --sample-rate .5 --steps 5 --epochs 1",
            "give either --steps or --epochs",
        ),
        ("--sigma 1 --n 9 --sample-rate .5 --epochs 0", "--epochs must be positive"),
        ("--sigma 1 --n 9 --sample-rate .5 --epochs nan", "--epochs must be positive"),
        ("--sigma 1 --n 9 --sample-rate .5 --steps 0", "steps must be at least 1, got 0"),
        ("--n 9 --sample-rate .5 --steps 5", "give one of --noise-multiplier, --epsilon, --mu"),
        ("--sigma 1 --epsilon 1 --n 9 --sample-rate .5 --steps 5", "give one of"),
        ("--sigma 1 --mu 1 --n 9 --sample-rate .5 --steps 5", "give one of"),
        ("--mu 0 --n 9 --sample-rate .5 --steps 5", "mu must be positive"),
        ("--sigma -1 --n 9 --sample-rate .5 --steps 5", "noise_multiplier must be at least 0"),
        ("--epsilon 0 --n 9 --sample-rate .5 --steps 5", "epsilon must be positive"),
        ("--sigma 1 --delta 1 --sample-rate .5 --steps 5", "delta must be in (0, 1), got 1.0"),
        ("--sigma 1 --n 9 --sample-rate .5 --steps 5 --accountant pdl", "pdl"),
    ],
)
def test_command_refuses(words: str, message: str) -> None:
    done = run(*words.split())
    assert done.exit_code == 2
    assert message in done.stderr


@pytest.mark.parametrize("q", [0.1, 1.0])
@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_noise_whose_square_is_no_number_is_bounded_from_the_safe_side(
    q: float, accountant: Any
) -> None:
    """Never taken for more noise than it is."""
    for sigma in (5e-324, 1e-300, 1e-160, 1e-155, 1e-120):
        assert privacy.epsilon(sigma, q, 5, 1e-5, accountant) == math.inf
        assert privacy.delta(sigma, q, 5, 1.0, accountant) == 1.0
    for sigma in (1e50, 1e155, 1e300):
        assert privacy.epsilon(sigma, q, 5, 1e-5, accountant) == 0.0
        # The total variation distance of full batches, which is more.
        distance = privacy.delta(sigma, q, 5, 0.0, accountant)
        assert 0.3 * math.sqrt(5) / sigma <= distance < 1e-6


def test_a_number_of_epochs_that_no_float_holds_is_an_error_in_one_line() -> None:
    arguments = [
        "privacy",
        "--sigma",
        "1",
        "--sample-rate",
        "1e-300",
        "--delta",
        "1e-5",
        "--epochs",
        "1e10",
    ]
    shown = CliRunner().invoke(cli.app, arguments)
    assert shown.exit_code == 2
    assert "--epochs is too large for a sampling rate of 1e-300, got 1" in shown.stderr
