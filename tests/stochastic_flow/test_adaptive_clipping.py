"""Runs and predictions whose clipping norm follows a quantile."""

import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Gradients, known, often_or_slow

import ntkdp
from ntkdp import dp_sgd, gradient_flow, stochastic_flow
from ntkdp.batches import Cyclic
from ntkdp.clipping import Abadi, Adaptive, Automatic, Batch, ClippingRule, NoClipping, Scope
from ntkdp.noise import Correlated
from ntkdp.optimizers import SGD, Adam

N, D = 60, 4
X, LABEL_NOISE = np.split(np.random.default_rng(0).normal(size=(N, D + 1)), [D], axis=1)
Y = X @ np.ones((D, 1)) + LABEL_NOISE
LOSS = ntkdp.losses.SquaredError()
W = {"a": jnp.zeros((2, 1)), "b": jnp.zeros((D - 2, 1))}
START = jnp.zeros((N, 1))
ADAPTIVE = Adaptive(0.6, rate=0.2, count_noise=6.0)
SCOPES: list[Scope] = ["flat", "layerwise"]


def linear(w: Any, x: Any) -> jax.Array:
    return jnp.asarray(x[:, :2] @ w["a"] + x[:, 2:] @ w["b"])


KERNEL = ntkdp.layerwise_ntk(linear, W, jnp.asarray(X))


def run(rule: ClippingRule, **options: Any) -> ntkdp.Trajectory:
    return dp_sgd.run(linear, W, X, Y, LOSS, rule, learning_rate=0.3, **options)


def kernel_flow(rule: ClippingRule) -> ntkdp.KernelFlow:
    return ntkdp.KernelFlow(KERNEL, Y, LOSS, rule)


def linearised(rule: ClippingRule) -> ntkdp.LinearisedFlow:
    return ntkdp.LinearisedFlow(linear, W, X, Y, LOSS, rule)


def ensemble(rule: ClippingRule, **options: Any) -> ntkdp.Trajectory:
    return stochastic_flow.ensemble(kernel_flow(rule), START, learning_rate=0.3, **options)


def textbook(rule: Abadi, sigma: float, q: float, key: Any, steps: int) -> tuple[Any, Any]:
    """Andrew et al., algorithm 1, in NumPy: the weights and clipping norm after each step."""
    w, R, path = np.zeros((D, 1)), float(np.asarray(rule.R)), []
    of_sum = (sigma**-2 - (2 * 6.0) ** -2) ** -0.5
    for k in range(steps):
        step_key = jax.random.fold_in(key, k)
        sampling, noise = jax.random.split(step_key)
        batch = np.asarray(jax.random.bernoulli(sampling, q, (N,)))
        g = (X @ w - Y) * X
        norms = np.linalg.norm(g, axis=1)
        clipped = np.sum((g * np.minimum(1, R / norms)[:, None])[batch], axis=0)[:, None]
        z = [jax.random.normal(one, (2, 1)) for one in jax.random.split(noise, 2)]
        w = w - 0.3 * (clipped + of_sum * R * np.concatenate(z)) / (q * N)
        z_b = float(jax.random.normal(jax.random.fold_in(step_key, 2), (1,))[0])
        share = 0.5 + (np.sum((norms <= R)[batch] - 0.5) + 6.0 * z_b) / (q * N)
        R = R * np.exp(-0.2 * (share - 0.6))
        path.append((float(0.5 * np.mean((X @ w - Y) ** 2)), R))
    return tuple(np.array(path).T)


def test_a_run_is_the_algorithm_of_the_paper() -> None:
    key = jax.random.key(3)
    found = run(
        Abadi(5.0), adaptive=ADAPTIVE, steps=20, noise_multiplier=3.0, sample_rate=0.5, key=key
    )
    loss, R = textbook(Abadi(5.0), 3.0, 0.5, key, 20)
    np.testing.assert_allclose(found.loss[1:], loss, rtol=1e-10)
    assert known(found.clip_norm).shape == (21, 1)
    np.testing.assert_allclose(known(found.clip_norm)[1:, 0], R, rtol=1e-12)


@pytest.mark.parametrize(
    ("scope", "adam"),
    often_or_slow(itertools.product(SCOPES, (False, True)), [("layerwise", True)]),
)
def test_the_linearised_model_makes_the_run_of_its_key(scope: Scope, adam: bool) -> None:
    rule = Abadi(5.0, scope=scope)
    options: dict[str, Any] = {
        "adaptive": ADAPTIVE, "noise_multiplier": 3.0, "sample_rate": 0.5, "steps": 20,
        "noise_per_group": scope == "layerwise", "record_every": 3, "key": jax.random.key(3),
        "optimizer": Adam(correct_noise=True) if adam else None,
    }  # fmt: skip
    observed = run(rule, gradients="vmap", **options)
    predicted = stochastic_flow.ensemble(linearised(rule), W, learning_rate=0.3, **options)
    np.testing.assert_allclose(predicted.loss, observed.loss, rtol=1e-9)
    np.testing.assert_allclose(known(predicted.clip_norm), known(observed.clip_norm), rtol=1e-12)
    np.testing.assert_allclose(predicted.clip_fraction, observed.clip_fraction, atol=1e-12)
    assert known(observed.clip_norm).shape == (8, 1 if scope == "flat" else 2)
    assert predicted.setup[0].adaptive == "Adaptive(quantile=0.6, rate=0.2, count_noise=6)"
    assert ntkdp.compare(predicted, observed).differences == {}


@pytest.mark.parametrize("scope", often_or_slow(SCOPES, ["flat"]))
def test_without_noise_the_recursion_is_the_run(scope: Scope) -> None:
    rule, adaptive = Automatic(5.0, scope=scope), Adaptive(0.6, rate=0.2)
    observed = run(rule, adaptive=adaptive, steps=30, optimizer=SGD(0.5), key=jax.random.key(0))
    flows: list[tuple[Any, Any]] = [(kernel_flow(rule), START), (linearised(rule), W)]
    for flow, start in flows:
        path = ntkdp.recursion(
            flow, start, learning_rate=0.3, steps=30, optimizer=SGD(0.5), adaptive=adaptive
        )
        np.testing.assert_allclose(path.loss, observed.loss, rtol=1e-10)
        np.testing.assert_allclose(known(path.clip_norm), known(observed.clip_norm), rtol=1e-12)


@pytest.mark.parametrize("scope", often_or_slow(SCOPES, ["layerwise"]))
def test_an_ensemble_has_the_law_of_the_runs(scope: Scope) -> None:
    _compare_laws(scope, n_runs=100, steps=60, gradients="structured")


@pytest.mark.slow
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("gradients", ["structured", "vmap"])
def test_an_ensemble_has_the_law_of_many_runs(scope: Scope, gradients: Gradients) -> None:
    """An error of the law that 400 runs could just see is more than ten standard errors here."""
    _compare_laws(scope, n_runs=8000, steps=120, gradients=gradients, seed=3)


def _compare_laws(
    scope: Scope, n_runs: int, steps: int, gradients: Gradients, seed: int = 1
) -> None:
    """Mean loss, mean R and where the share of unclipped samples ends."""
    rule = Abadi(5.0, scope=scope)
    options: dict[str, Any] = {
        "adaptive": ADAPTIVE, "noise_multiplier": 3.0, "sample_rate": 0.5, "steps": steps,
        "record_every": steps // 6,
    }  # fmt: skip
    observed = run(
        rule, gradients=gradients, key=jax.random.split(jax.random.key(seed), n_runs), **options
    )
    predicted = ensemble(rule, key=jax.random.split(jax.random.key(seed + 1), n_runs), **options)
    for name in ("loss", "clip_norm"):
        ours, theirs = (
            np.asarray(getattr(one, name)).reshape(n_runs, 7, -1)[:, 1:]
            for one in (predicted, observed)
        )
        apart = np.abs(np.mean(ours, axis=0) - np.mean(theirs, axis=0))
        error = np.sqrt((np.var(ours, axis=0) + np.var(theirs, axis=0)) / n_runs)
        assert np.max(apart / error) < 3
    for one in (observed, predicted):
        assert abs(1 - float(jnp.mean(one.clip_fraction[:, -1])) - 0.6) < 0.02


def test_noise_follows_the_clipping_norm() -> None:
    """Where all samples are clipped R doubles in a few steps, and so does the noise."""
    far = Y + 1e6 * np.sign(Y)
    algorithm = dp_sgd.build(
        linear, X, far, LOSS, Abadi(1.0), learning_rate=1e-9, noise_multiplier=1.0,
        adaptive=Adaptive(1.0, rate=float(np.log(2)), count_noise=0.6),
    )  # fmt: skip
    state, step, norms = algorithm.init(W), algorithm.compile(), []
    for k in range(4):
        R = float(known(state.clip_norm)[0])
        state, info = step(jax.random.fold_in(jax.random.key(0), k), state)
        norms.append(float(info.noise_norm) / R)
        assert float(known(state.clip_norm)[0]) == pytest.approx(2 * R, rel=0.05)
    plain = dp_sgd.build(linear, X, far, LOSS, Abadi(1.0), learning_rate=1e-9, noise_multiplier=1.0)
    of_sum = float(np.asarray(Adaptive(1.0, 0.2, 0.6).sum_noise_multiplier(1.0)))
    expected = []
    at = plain.init(W)
    for k in range(4):
        at, info = plain.step(jax.random.fold_in(jax.random.key(0), k), at)
        expected.append(float(info.noise_norm) * of_sum)
    np.testing.assert_allclose(norms, expected, rtol=1e-10)


def test_batches_and_noise_of_a_key_do_not_change() -> None:
    """A norm that hardly moves and a count that costs nothing leave the run as it is."""
    still = Adaptive(0.5, rate=1e-30, count_noise=1e12)
    options: dict[str, Any] = {
        "steps": 10, "noise_multiplier": 2.0, "sample_rate": 0.5, "key": jax.random.key(0),
    }  # fmt: skip
    for make in (run, ensemble):
        plain, adaptive = make(Abadi(0.5), **options), make(Abadi(0.5), adaptive=still, **options)
        np.testing.assert_allclose(adaptive.loss, plain.loss, rtol=1e-13)
        assert plain.clip_norm is None


@pytest.mark.slow
def test_cyclic_batches_and_microbatches() -> None:
    options: dict[str, Any] = {"adaptive": ADAPTIVE, "steps": 9, "noise_multiplier": 2.0}
    options |= {"batches": Cyclic(3), "key": jax.random.key(0)}
    whole = run(Abadi(2.0), **options)
    parts = run(Abadi(2.0), microbatch_size=7, **options)
    predicted = stochastic_flow.ensemble(linearised(Abadi(2.0)), W, learning_rate=0.3, **options)
    for other in (parts, predicted):
        np.testing.assert_allclose(other.loss, whole.loss, rtol=1e-10)
        np.testing.assert_allclose(known(other.clip_norm), known(whole.clip_norm), rtol=1e-12)


@pytest.mark.slow
def test_devices_share_the_count() -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("samples",))
    options: dict[str, Any] = {"adaptive": ADAPTIVE, "steps": 5, "noise_multiplier": 2.0}
    options |= {"sample_rate": 0.5, "key": jax.random.key(0)}
    one, two = run(Abadi(2.0), **options), run(Abadi(2.0), mesh=mesh, **options)
    np.testing.assert_allclose(two.loss, one.loss, rtol=1e-10)
    np.testing.assert_allclose(known(two.clip_norm), known(one.clip_norm), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("scope", often_or_slow(SCOPES, ["flat"]))
def test_the_flow_ends_at_the_quantile_and_steps_tend_to_it(scope: Scope) -> None:
    rule, distances = Abadi(5.0, scope=scope), []
    flows: list[tuple[Any, Any]] = [
        (kernel_flow(rule), START),
        (ntkdp.WeightFlow(linear, X, Y, LOSS, rule), W),
        (linearised(rule), W),
    ]
    times = np.linspace(0, 30, 7)
    for eta in (0.1, 0.025):
        # The rate of a unit of time is the same for both.
        adaptive = Adaptive(0.6, rate=0.5 * eta)
        paths = [
            ntkdp.solve(gradient_flow.AdaptiveFlow(flow, adaptive, eta, 0.01), start, times)
            for flow, start in flows
        ]
        for path in paths[1:]:
            np.testing.assert_allclose(path.loss, paths[0].loss, rtol=1e-3)
            np.testing.assert_allclose(known(path.clip_norm), known(paths[0].clip_norm), rtol=2e-3)
        assert abs(1 - float(paths[0].clip_fraction[-1]) - 0.6) < 0.02
        steps = ntkdp.recursion(
            kernel_flow(rule), START, learning_rate=eta, steps=round(30 / eta),
            record_every=round(5 / eta), adaptive=adaptive,
        )  # fmt: skip
        distances.append(float(jnp.max(jnp.abs(steps.loss - paths[0].loss) / paths[0].loss)))
    assert distances[1] < 0.5 * distances[0] < 0.02


def test_a_clipping_norm_is_written_and_read(tmp_path: Path) -> None:
    found = ensemble(
        Abadi(5.0, scope="layerwise"), adaptive=ADAPTIVE, noise_multiplier=1.0, steps=4,
        key=jax.random.split(jax.random.key(0), 3),
    )  # fmt: skip
    assert known(found.clip_norm).shape == (3, 5, 2)
    found.save(tmp_path / "path.nc")
    again = ntkdp.Trajectory.load(tmp_path / "path.nc")
    np.testing.assert_array_equal(known(again.clip_norm), known(found.clip_norm))
    assert again.setup == found.setup
    assert known(found.then(found).clip_norm).shape == (3, 9, 2)


def test_comparisons_tell_a_norm_that_moves_from_one_that_does_not() -> None:
    options: dict[str, Any] = {"steps": 2, "key": jax.random.key(0)}
    plain, adaptive = run(Abadi(1.0), **options), run(Abadi(1.0), adaptive=ADAPTIVE, **options)
    found = ntkdp.compare(plain, adaptive, allow=("clipping",)).differences
    assert found["clipping"].startswith("a constant clipping norm predicted, Adaptive(quantile=")


def test_what_does_not_adapt_is_refused() -> None:
    options: dict[str, Any] = {"adaptive": ADAPTIVE, "steps": 2, "key": jax.random.key(0)}
    for rule in (NoClipping(), Batch(1.0)):
        for make in (run, ensemble):
            with pytest.raises(
                ValueError, match=f"adaptive must be None with {type(rule).__name__}"
            ):
                make(rule, **options)
    correlated = options | {"noise": Correlated([1.0, 0.5]), "noise_multiplier": 1.0}
    for make in (run, ensemble):
        with pytest.raises(ValueError, match="noise must be independent with adaptive clipping"):
            make(Abadi(1.0), **correlated)
        with pytest.raises(ValueError, match=r"count_noise must be above 20, got 6"):
            make(Abadi(1.0), noise_multiplier=40.0, **options)
    with pytest.raises(ValueError, match="noise_per_group must be False with adaptive clipping"):
        ensemble(Abadi(1.0, scope="layerwise"), noise_per_group=True, **options)
