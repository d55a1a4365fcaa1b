"""Private runs along random directions, and their predictions."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dp_accounting import ComposedDpEvent, GaussianDpEvent
from dp_accounting.pld import PLDAccountant
from helpers import KEY, known, often_or_slow
from scipy.special import erf
from scipy.stats import ks_2samp

import ntkdp
from ntkdp import ZerothOrder, dp_sgd, privacy, stochastic_flow
from ntkdp.clipping import Abadi, Automatic, ClippingRule
from ntkdp.optimizers import SGD

N, M, D = 12, 3, 4
RNG = np.random.default_rng(0)
X, TEST_X = RNG.normal(size=(N, D)), RNG.normal(size=(M, D))
Y = 2 * X[:, :2] + 0.5 * RNG.normal(size=(N, 2))
TEST_Y = 2 * TEST_X[:, :2]
LOSS = ntkdp.losses.SquaredError()
W = {"a": jnp.asarray(RNG.normal(size=(2, 2))), "b": jnp.zeros((D - 2, 2))}
ALL = jnp.asarray(np.concatenate([X, TEST_X]))


def linear(w: Any, x: Any) -> jax.Array:
    return jnp.asarray(x[:, :2] @ w["a"] + x[:, 2:] @ w["b"])


KERNEL = ntkdp.empirical_ntk(linear, W, ALL)
START = (linear(W, X), linear(W, TEST_X))


def run(rule: ClippingRule, order: ZerothOrder, **options: Any) -> ntkdp.Trajectory:
    given: dict[str, Any] = {"learning_rate": 0.1, "key": KEY, "gradients": "vmap"} | options
    return dp_sgd.run(
        linear, W, X, Y, LOSS, rule, zeroth_order=order, test_x=TEST_X, test_targets=TEST_Y, **given
    )


def kernel_flow(rule: ClippingRule) -> ntkdp.KernelFlow:
    return ntkdp.KernelFlow(
        KERNEL[:N, :N], Y, LOSS, rule, test_kernel=KERNEL[N:, :N], test_targets=TEST_Y
    )


def linearised(rule: ClippingRule) -> ntkdp.LinearisedFlow:
    return ntkdp.LinearisedFlow(
        linear, W, X, Y, LOSS, rule, test_x=TEST_X, test_targets=TEST_Y, batch_size=5
    )


def flat(weights: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(weights)])


def residuals(w: np.ndarray) -> np.ndarray:
    matrix = w.reshape(2, 2, 2).reshape(D, 2)
    return np.asarray(X @ matrix - Y)


def gradients(w: np.ndarray) -> np.ndarray:
    return np.einsum("ni,nk->nik", X, residuals(w)).reshape(N, -1)


def textbook(rule_R: float, sigma: float, m: int, reach: float | None, steps: int) -> np.ndarray:
    """The algorithm in NumPy with the random numbers of the run's key: weights at the end."""
    w = flat(W)
    for k in range(steps):
        key = jax.random.fold_in(KEY, k)
        xi = np.asarray(jax.random.normal(jax.random.split(key)[1], (m,)))
        step = np.zeros_like(w)
        for j, own in enumerate(jax.random.split(jax.random.fold_in(key, 3), m)):
            z = flat([jax.random.normal(one, (2, 2)) for one in jax.random.split(own)])
            slopes = gradients(w) @ z
            if reach is not None:
                ahead, behind = (
                    0.5 * np.sum(residuals(w + sign * reach * z) ** 2, axis=1) for sign in (1, -1)
                )
                slopes = (ahead - behind) / (2 * reach)
            clipped = np.sum(np.clip(slopes, -rule_R, rule_R))
            step += z * (clipped + sigma * np.sqrt(m) * rule_R * xi[j])
        w = w - 0.1 * step / (m * N)
    return w


@pytest.mark.parametrize(
    ("m", "reach"), often_or_slow(itertools.product((1, 3), (None, 0.2)), [(3, None), (1, 0.2)])
)
def test_a_run_is_the_algorithm(m: int, reach: float | None) -> None:
    algorithm = dp_sgd.build(
        linear, X, Y, LOSS, Abadi(2.0), learning_rate=0.1, noise_multiplier=0.5,
        zeroth_order=ZerothOrder(m, reach),
    )  # fmt: skip
    state, step = algorithm.init(W), algorithm.compile()
    for k in range(5):
        state, info = step(jax.random.fold_in(KEY, k), state)
    np.testing.assert_allclose(flat(state.params), textbook(2.0, 0.5, m, reach, 5), rtol=1e-9)
    assert info.norms.shape == (m, N)


@pytest.mark.parametrize(
    ("reach", "q", "momentum"),
    often_or_slow(itertools.product((None, 0.3), (1.0, 0.5), (0.0, 0.8)), [(0.3, 0.5, 0.8)]),
)
def test_the_linearised_model_makes_the_run_of_its_key(
    reach: float | None, q: float, momentum: float
) -> None:
    options: dict[str, Any] = {
        "steps": 12, "noise_multiplier": 0.4, "sample_rate": q, "outputs": True,
        "optimizer": SGD(momentum), "record_every": 3,
    }  # fmt: skip
    order = ZerothOrder(2, reach)
    observed = run(Automatic(2.0), order, **options)
    predicted = stochastic_flow.ensemble(
        linearised(Automatic(2.0)), W, zeroth_order=order, learning_rate=0.1, key=KEY, **options
    )
    for name in ("outputs", "test_outputs", "test_loss", "clip_fraction"):
        np.testing.assert_allclose(
            getattr(predicted, name), getattr(observed, name), rtol=1e-9, err_msg=name
        )
    assert ntkdp.compare(predicted, observed).differences == {}
    assert predicted.setup[0].zeroth_order == observed.setup[0].zeroth_order
    assert "directions=2" in predicted.setup[0].zeroth_order


@pytest.mark.parametrize(
    ("m", "reach"), often_or_slow([(1, None), (4, None), (2, 0.5)], [(4, None)])
)
def test_an_ensemble_has_the_law_of_the_runs(m: int, reach: float | None) -> None:
    rule, order = Abadi(2.0), ZerothOrder(m, reach)
    options: dict[str, Any] = {
        "steps": 25, "noise_multiplier": privacy.Budget(mu=8.0), "sample_rate": 0.5,
        "record_every": 25,
    }  # fmt: skip
    observed = run(rule, order, **options | {"key": jax.random.split(jax.random.key(7), 400)})
    predicted = stochastic_flow.ensemble(
        kernel_flow(rule), START, learning_rate=0.1, noise_kernel=KERNEL, zeroth_order=order,
        **options | {"key": jax.random.split(jax.random.key(8), 400)},
    )  # fmt: skip
    for name in ("loss", "test_loss"):
        ours, theirs = (np.asarray(getattr(path, name)[:, -1]) for path in (predicted, observed))
        deviation = np.hypot(ours.std(), theirs.std()) / np.sqrt(400)
        assert abs(ours.mean() - theirs.mean()) < 3 * deviation
        assert ks_2samp(ours, theirs).pvalue > 0.01


def test_the_mean_step_has_the_factors_of_stein() -> None:
    """The mean of z clip(z.g) is g times the chance that z.g is within R."""
    R, keys = 1.5, jax.random.split(jax.random.key(1), 400)
    drawn = stochastic_flow.ensemble(
        kernel_flow(Abadi(R)), START, learning_rate=0.1, steps=1, noise_multiplier=0.1,
        zeroth_order=ZerothOrder(20), noise_kernel=KERNEL, outputs=True, key=keys,
    )  # fmt: skip
    g = gradients(flat(W))
    factors = erf(R / np.sqrt(2) / np.linalg.norm(g, axis=1))
    assert factors.min() < 0.4 < 0.7 < factors.max()
    mean_step = (-0.1 * factors @ g / N).reshape(D, 2)
    for name, x in (("outputs", X), ("test_outputs", TEST_X)):
        found = np.asarray(known(getattr(drawn, name)))
        steps = found[:, 1] - found[:, 0]
        error = np.abs(steps.mean(axis=0) - x @ mean_step)
        assert np.all(error < 4 * steps.std(axis=0) / np.sqrt(400))
        assert np.abs(x @ mean_step).max() > 20 * steps.std() / np.sqrt(400)


@pytest.mark.parametrize("m", often_or_slow([1, 4], [4]))
def test_one_sample_more_moves_the_sums_by_what_is_paid_for(m: int) -> None:
    """In units of the noise, at most 1 / sigma, and by that much for a sample that is clipped."""
    R, sigma, order = 0.5, 2.0, ZerothOrder(m)

    def after(x: Any, y: Any, noise_multiplier: float) -> np.ndarray:
        algorithm = dp_sgd.build(
            linear, x, y, LOSS, Abadi(R), learning_rate=1.0, noise_multiplier=noise_multiplier,
            zeroth_order=order, reduction="sum",
        )  # fmt: skip
        return flat(algorithm.step(KEY, algorithm.init(W))[0].params)

    directions = np.stack(
        [
            flat([jax.random.normal(one, (2, 2)) for one in jax.random.split(own)])
            for own in order.keys(KEY)
        ]
    )

    def sums(step: np.ndarray) -> np.ndarray:
        return np.linalg.lstsq(directions.T, step, rcond=None)[0]

    base = after(X, Y, 0.0)
    far_x, far_y = np.concatenate([X, 1e3 * X[:1]]), np.concatenate([Y, -Y[:1]])
    moved = np.linalg.norm(sums(after(far_x, far_y, 0.0) - base))
    xi = jax.random.normal(jax.random.split(KEY)[1], (m,))
    noise = -sums(after(X, Y, sigma) - base) / np.asarray(xi)
    np.testing.assert_allclose(noise, noise[0], rtol=1e-6)
    assert moved / noise[0] == pytest.approx(1 / sigma, rel=1e-6)


def test_a_budget_is_kept_by_releases_of_single_sums() -> None:
    """K steps of m sums, each with noise of sigma sqrt(m) R against R, by dp-accounting."""
    m, steps = 4, 30
    sigma = privacy.Budget(2.0, 1e-5).noise_multiplier(steps)
    one_sum = float(np.asarray(ZerothOrder(m).noise_deviation(Abadi(3.0), sigma))) * m / 3.0
    accountant = PLDAccountant()
    accountant.compose(ComposedDpEvent([GaussianDpEvent(one_sum)] * (m * steps)))
    assert accountant.get_epsilon(1e-5) == pytest.approx(2.0, rel=1e-3)


def test_a_sample_that_is_not_finite_has_no_part() -> None:
    x, y = np.concatenate([X, np.full((1, D), 1e200)]), np.concatenate([Y, -Y[:1]])
    steps = []
    for inputs, targets in ((X, Y), (x, y)):
        algorithm = dp_sgd.build(
            linear, inputs, targets, LOSS, Abadi(1.0), learning_rate=0.1, reduction="sum",
            zeroth_order=ZerothOrder(2),
        )  # fmt: skip
        state, info = algorithm.step(KEY, algorithm.init(W))
        steps.append(flat(state.params))
    np.testing.assert_allclose(steps[0], steps[1], rtol=1e-12)
    assert int(info.dropped) == 1
