"""Clipping norms that follow a quantile: the rule, the step of R, and what the count costs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dp_accounting import ComposedDpEvent, GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

import ntkdp
from ntkdp import dp_sgd, privacy
from ntkdp.clipping import (
    PSAC,
    Abadi,
    Adaptive,
    Automatic,
    ClippingRule,
    Custom,
    Global,
    rescaled,
)

NORMS = jnp.array([0.0, 1e-3, 0.2, 0.9, 1.0, 3.0, 50.0, jnp.inf, jnp.nan])
RULES: list[ClippingRule] = [
    Abadi(2.0),
    Global(2.0),
    Global(2.0, Z=4.0),
    Automatic(2.0, gamma=0.1),
    PSAC(2.0, r=0.3),
    Custom(lambda s: 2.0 / (1 + s), 2.0),
]


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("R", [0.01, 2.0, 300.0])
def test_a_rule_that_moved_is_the_rule_of_scaled_norms(rule: ClippingRule, R: float) -> None:
    moved = rescaled(rule, jnp.array([R]))
    factors = moved.factors(NORMS)
    np.testing.assert_allclose(factors, rule.factors(NORMS * (2.0 / R)), rtol=1e-12)
    assert float(moved.sensitivity()) == R
    finite = NORMS[:-2]
    assert float(jnp.max(jnp.abs(factors[:-2]) * finite)) <= R * (1 + 1e-12)


def test_abadi_and_dropping_move_to_the_same_rule_with_another_norm() -> None:
    for make in (Abadi, Global):
        moved = rescaled(make(2.0), jnp.array([0.5])).factors(NORMS)
        np.testing.assert_allclose(moved, make(0.5).factors(NORMS), rtol=1e-14)


def test_groups_move_apart() -> None:
    rule = rescaled(Abadi(1.0, scope="layerwise"), jnp.array([0.5, 3.0]))
    norms = jnp.array([[1.0, 0.1], [1.0, 6.0]])
    assert rule.factors(norms).tolist() == [[0.5, 1.0], [1.0, 0.5]]
    assert float(rule.sensitivity(2)) == pytest.approx(np.hypot(0.5, 3.0))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_norm_at_the_end_of_the_range_still_bounds(dtype: str) -> None:
    tiny = float(jnp.finfo(dtype).tiny)
    s = jnp.array([0.0, tiny, 100 * tiny, 1e-20, 1.0, jnp.finfo(dtype).max], dtype)
    for R in (tiny, 0.0):  # zero, once it is in the precision of the norms
        factors = rescaled(Abadi(100.0), jnp.array([R])).factors(s)
        assert bool(jnp.all(factors * s <= 1.001 * R))
    assert rescaled(Abadi(100.0), jnp.array([0.0])).factors(s)[0] == 1


def test_a_step_counts_what_is_not_clipped() -> None:
    adaptive = Adaptive(0.5, rate=0.2)
    norms = jnp.array([[1.0, 2.0, 3.0, jnp.nan], [9.0, 9.0, 9.0, jnp.inf]])
    R = jnp.array([2.0, 4.0])
    after = adaptive.next(R, norms)  # shares 2/4 and 0
    np.testing.assert_allclose(after, [2.0, 4 * np.exp(0.1)], rtol=1e-15)
    # Absent samples have no part, and the expected size of the batch divides.
    present = jnp.array([True, False, True, False])
    after = adaptive.next(R, norms, present, 4.0)
    np.testing.assert_allclose(after, [2.0, 4 * np.exp(-0.2 * (0.5 - 1 / 4 - 0.5))], rtol=1e-15)


def test_one_sample_moves_a_noiseless_share_by_half_of_its_part() -> None:
    adaptive, R = Adaptive(0.5, rate=1.0), jnp.array([1.0])
    with_it, without = (
        jnp.log(adaptive.next(R, jnp.ones((1, n)), jnp.arange(n) < here, 10.0))
        for n, here in ((8, 8), (8, 7))
    )
    assert float(abs(with_it - without)[0]) == pytest.approx(0.5 / 10, rel=1e-12)


def test_the_noise_of_the_count_has_its_deviation() -> None:
    adaptive = Adaptive(0.5, rate=1.0, count_noise=3.0)
    norms = jnp.ones((2, 10))
    keys = jax.random.split(jax.random.key(0), 4000)
    R = jax.vmap(lambda key: adaptive.next(jnp.array([1.0, 0.5]), norms, key=key))(keys)
    change = np.log(np.asarray(R) / [1.0, 0.5])
    np.testing.assert_allclose(np.mean(change, axis=0), [-0.5, 0.5], atol=0.015)
    np.testing.assert_allclose(np.std(change, axis=0), [0.3, 0.3], rtol=0.04)
    assert abs(np.corrcoef(change.T)[0, 1]) < 0.05


def test_a_norm_stays_within_the_range() -> None:
    adaptive = Adaptive(1.0, rate=1e3)
    for limit in (float(jnp.finfo(float).tiny), float(jnp.finfo(float).max)):
        norms = jnp.full((1, 3), 0.0 if limit < 1 else jnp.inf)
        R = jnp.array([limit])
        for _ in range(3):
            R = Adaptive(0.5, rate=1e3).next(R, norms)
        assert float(R[0]) == limit
    assert float(adaptive.next(jnp.array([1.0]), jnp.zeros((1, 3)))[0]) == 1.0


@pytest.mark.parametrize("n_groups", [1, 3])
@pytest.mark.parametrize(("q", "steps"), [(1.0, 30), (0.05, 300)])
def test_sum_and_counts_cost_what_the_noise_multiplier_costs(
    n_groups: int, q: float, steps: int
) -> None:
    """By accountants that compose the mechanisms of a step themselves."""
    sigma, count_noise = 1.3, 2.5
    of_sum = Adaptive(0.5, 0.2, count_noise).sum_noise_multiplier(sigma, n_groups)
    assert float(of_sum) > sigma
    counts = [GaussianDpEvent(2 * count_noise)] * n_groups
    pair: Any = ComposedDpEvent([GaussianDpEvent(float(of_sum)), *counts])
    alone: Any = GaussianDpEvent(sigma)
    if q < 1:
        pair, alone = PoissonSampledDpEvent(q, pair), PoissonSampledDpEvent(q, alone)
    # The library's grid takes no sampled pair: it is asked for the whole batch alone.
    for accountant in (RdpAccountant, PLDAccountant) if q == 1 else (RdpAccountant,):
        found, expected = (
            accountant().compose(event, steps).get_epsilon(1e-5) for event in (pair, alone)
        )
        assert found == pytest.approx(expected, rel=1e-9)
    ours = privacy.epsilon(sigma, q, steps, 1e-5, "pld" if q == 1 else "rdp")
    assert ours == pytest.approx(expected, rel=2e-3)


def test_a_budget_pays_for_the_count() -> None:
    """The run of a budget is that of its noise multiplier, with less noise left for the sum."""
    budget = privacy.Budget(3.0, 1e-5)
    x = jnp.linspace(-1, 1, 20)[:, None]
    adaptive = Adaptive(0.5, rate=0.2, count_noise=40.0)

    def run(**options: Any) -> ntkdp.Trajectory:
        return dp_sgd.run(
            lambda w, x: x @ w, jnp.zeros((1, 1)), x, x, ntkdp.losses.SquaredError(), Abadi(1.0),
            learning_rate=0.1, steps=10, sample_rate=0.5, key=jax.random.key(0), **options,
        )  # fmt: skip

    sigma = budget.noise_multiplier(10, 0.5)
    spent = run(noise_multiplier=budget, adaptive=adaptive)
    assert spent.setup[0].noise_multiplier == sigma
    np.testing.assert_array_equal(spent.loss, run(noise_multiplier=sigma, adaptive=adaptive).loss)


def test_too_little_noise_of_the_count_is_refused_with_the_way_out() -> None:
    adaptive = Adaptive(0.5, 0.2, count_noise=2.0)
    with pytest.raises(ValueError, match=r"count_noise must be above 2.*several times as large"):
        adaptive.sum_noise_multiplier(4.0)
    with pytest.raises(ValueError, match=r"above 3\.87298.*with 15 groups"):
        adaptive.sum_noise_multiplier(2.0, 15)
    with pytest.raises(ValueError, match=r"count_noise must be above 0\.5, got 0"):
        Adaptive(0.5).sum_noise_multiplier(1.0)
    assert float(Adaptive(0.5).sum_noise_multiplier(0.0)) == 0
    of_sum = jax.jit(lambda sigma: adaptive.sum_noise_multiplier(sigma))
    with pytest.raises(Exception, match="count_noise must be above"):
        jax.block_until_ready(of_sum(4.0))
    assert float(of_sum(2.4)) == pytest.approx(3.0)
