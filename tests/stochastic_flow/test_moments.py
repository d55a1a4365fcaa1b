"""Predicted mean and spread of noisy training against runs, closed forms and limits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import DATA, known, often_or_slow
from scipy.stats import binomtest

import ntkdp
from ntkdp import clipping, dp_sgd, losses, stochastic_flow
from ntkdp.optimizers import SGD
from ntkdp.stochastic_flow._moments import full_covariance, low_rank_covariance, moments
from ntkdp.stochastic_flow._moments.gaussian_closure import integration_points

N, P, M = 12, 20, 4
GROUPS = {"first": "first", "second": "second"}
RUNS = 400


def linear(w: dict[str, Any], x: jax.Array) -> jax.Array:
    half = P // 2
    return x[:, :half] @ w["first"] + x[:, half:] @ w["second"]


def problem(n_outputs: int) -> tuple[dict[str, jax.Array], jax.Array]:
    keys = jax.random.split(jax.random.key(3), 2)
    x = jax.random.normal(keys[0], (N + M, P)) / np.sqrt(P)
    w = 3 * jax.random.normal(keys[1], (P, n_outputs))
    return {"first": w[: P // 2], "second": w[P // 2 :]}, x


RULES = {
    "unclipped": clipping.Abadi(1e4),
    "abadi 0.5": clipping.Abadi(0.5),
    "abadi 1": clipping.Abadi(1.0),
    "layerwise": clipping.Abadi(np.array([0.4, 0.8]), scope="layerwise"),
    "automatic": clipping.Automatic(0.5, gamma=0.1),
    "psac": clipping.PSAC(0.5, 0.1),
}
#: Rule, loss, learning rate, noise multiplier, sampling rate, reduction, noise by group.
SETTINGS = [
    ("unclipped", "squared", 0.5, 2e-5, 1.0, "mean", False),
    ("unclipped", "squared", 0.1, 2e-5, 0.5, "mean", False),
    ("abadi 0.5", "squared", 1.0, 0.5, 1.0, "mean", False),
    ("abadi 1", "squared", 0.3, 0.5, 0.5, "mean", False),
    ("layerwise", "squared", 0.1, 0.5, 1.0, "sum", False),
    ("layerwise", "squared", 0.5, 0.5, 0.7, "mean", True),
    ("automatic", "softmax", 1.0, 0.5, 0.5, "mean", False),
    ("psac", "softmax", 0.1, 1.0, 1.0, "sum", False),
]


def error_of_spread(runs: np.ndarray) -> np.ndarray:
    """Bootstrap standard error of the standard deviation over runs."""
    drawn = np.random.default_rng(0).integers(len(runs), size=(500, len(runs)))
    return np.asarray(runs[drawn].std(axis=1).std(axis=0))


#: Like others before them; `make test-slow` runs them.
SLOW = (0, 1, 2, 4, 5, 6, 7)


@pytest.mark.parametrize(
    "setting",
    [
        pytest.param(setting, marks=pytest.mark.slow if number in SLOW else ())
        for number, setting in enumerate(SETTINGS)
    ],
)
def test_moments_of_the_loss_are_those_of_real_runs(setting: Any) -> None:
    """Means within 1% (clipped: 3%), deviations within 5%, or three (bootstrap) standard errors."""
    name, kind, rate, sigma, q, reduction, per_group = setting
    squared = kind == "squared"
    params, x = problem(1 if squared else 3)
    rule = RULES[name]
    loss: Any = losses.SquaredError() if squared else losses.SoftmaxCrossEntropy()
    y = jnp.zeros((N + M, 1)) if squared else jnp.arange(N + M) % 3
    options = {"learning_rate": rate, "steps": 40, "noise_multiplier": sigma, "sample_rate": q}
    options |= {"noise_per_group": per_group, "record_every": 10}
    runs = dp_sgd.run(
        linear,
        params,
        x[:N],
        y[:N],
        loss,
        rule,
        groups=GROUPS,
        reduction=reduction,
        test_x=x[N:],
        test_targets=y[N:],
        gradients="vmap",
        key=jax.random.split(jax.random.key(7), RUNS),
        **options,
    )
    kernel = ntkdp.layerwise_ntk(linear, params, x, groups=GROUPS)
    block = ntkdp.LayerwiseKernel(kernel.names, kernel.values[:, :N, :N])
    across = ntkdp.LayerwiseKernel(kernel.names, kernel.values[:, N:, :N])
    flow = ntkdp.KernelFlow(
        block, y[:N], loss, rule, reduction=reduction, test_kernel=across, test_targets=y[N:]
    )
    outputs = linear(params, x)
    found = stochastic_flow.moments(
        flow, (outputs[:N], outputs[N:]), noise_kernel=kernel, **options
    )
    np.testing.assert_array_equal(found.times, runs.times)
    np.testing.assert_array_equal(found.steps, runs.steps)
    allowed = 0.01 if name == "unclipped" else 0.03
    for mean, std, field in (
        (found.loss, found.loss_std, "loss"),
        (found.test_loss, found.test_loss_std, "test_loss"),
    ):
        real = np.asarray(getattr(runs, field))
        centre, spread = real.mean(0), real.std(0)
        error = spread / np.sqrt(RUNS)
        off = np.abs(np.asarray(mean) - centre)
        assert np.all(off <= np.maximum(allowed * centre, 3 * error)), (field, off / centre)
        of_spread = error_of_spread(real)[1:]
        off = np.abs(np.asarray(std)[1:] - spread[1:])
        assert np.all(off <= np.maximum(0.05 * spread[1:], 3 * of_spread)), (
            field,
            off / spread[1:],
        )
        assert float(known(std)[0]) < 1e-7
    if squared:
        assert found.accuracy is None
    else:
        real = np.asarray(runs.accuracy)
        error = real.std(0) / np.sqrt(RUNS)
        assert np.all(np.abs(found.accuracy - real.mean(0)) <= np.maximum(0.03, 4 * error))


def one_sample(**options: Any) -> ntkdp.KernelFlow:
    rule = clipping.Abadi(100.0)
    chosen = {"kernel": 2.0 * jnp.eye(1), "targets": jnp.zeros((1, 1)), "clipping": rule}
    return ntkdp.KernelFlow(loss=losses.SquaredError(), reduction="sum", **{**chosen, **options})


def test_moments_of_an_autoregression_are_exact() -> None:
    """f+ = (1 - eta h) f + eta sigma R sqrt(h) z: mean, variance, mean loss and its deviation."""
    eta, h, std, steps = 0.4, 2.0, 0.05, 9
    found = stochastic_flow.moments(
        one_sample(),
        jnp.ones((1, 1)),
        learning_rate=eta,
        steps=steps,
        noise_multiplier=std / 100,
        outputs=True,
    )
    factor = 1 - eta * h
    k = np.arange(steps + 1)
    mean = factor**k
    variance = eta**2 * h * std**2 * (1 - factor ** (2 * k)) / (1 - factor**2)
    np.testing.assert_allclose(known(found.mean)[:, 0, 0], mean, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(known(found.covariance)[:, 0, 0], variance, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(found.loss, (mean**2 + variance) / 2, rtol=1e-9)
    of_loss = np.sqrt(mean**2 * variance + variance**2 / 2)
    np.testing.assert_allclose(found.loss_std, of_loss, rtol=1e-6, atol=1e-8)


def test_moments_of_an_optimizer_are_exact() -> None:
    """Outputs, momentum and average of one mode, whose moments NumPy iterates as a 3 x 3 matrix."""
    eta, h, std, steps, origin = 0.3, 2.0, 0.05, 12, 0.7
    beta, decay, d = 0.8, 0.1, 0.6
    found = stochastic_flow.moments(
        one_sample(),
        jnp.ones((1, 1)),
        learning_rate=eta,
        steps=steps,
        noise_multiplier=std / 100,
        optimizer=SGD(beta, nesterov=True, weight_decay=decay, average=d),
        outputs_at_zero=jnp.full((1, 1), origin),
        outputs=True,
    )

    def step(f: float, m: float, average: float, noise: float) -> np.ndarray:
        g = h * f + decay * (f - origin) + noise
        m = beta * m + g
        f = f - eta * (g + beta * m)
        return np.array([f, m, d * average + (1 - d) * f])

    still = step(0.0, 0.0, 0.0, 0.0)
    units = [step(1, 0, 0, 0), step(0, 1, 0, 0), step(0, 0, 1, 0)]
    matrix = np.stack(units, axis=1) - still[:, None]
    of_noise = step(0.0, 0.0, 0.0, 1.0) - still
    mean, covariance = np.array([1.0, 0.0, 1.0]), np.zeros((3, 3))
    assert found.mean is not None
    assert found.covariance is not None
    for k in range(1, steps + 1):
        mean = matrix @ mean + still
        covariance = matrix @ covariance @ matrix.T + h * std**2 * np.outer(of_noise, of_noise)
        np.testing.assert_allclose(found.mean[k, 0, 0], mean[2], rtol=1e-10)
        np.testing.assert_allclose(found.covariance[k, 0, 0], covariance[2, 2], rtol=1e-9)
        np.testing.assert_allclose(found.loss[k], (mean[2] ** 2 + covariance[2, 2]) / 2, rtol=1e-9)


@pytest.mark.slow
def test_momentum_under_sampling_and_clipping_has_the_spread_of_many_runs() -> None:
    """Mean within 1.5%, deviation within 5% of 3000 drawn runs, or three standard errors."""
    params, x = problem(1)
    outputs = linear(params, x[:N])
    flow = ntkdp.KernelFlow(
        ntkdp.empirical_ntk(linear, params, x[:N]), jnp.zeros((N, 1)), losses.SquaredError(),
        RULES["abadi 1"],
    )  # fmt: skip
    options: dict[str, Any] = {
        "learning_rate": 0.15, "steps": 80, "noise_multiplier": 0.5, "sample_rate": 0.5,
        "record_every": 20, "optimizer": SGD(0.5),
    }  # fmt: skip
    keys = jax.random.split(jax.random.key(5), 3000)
    runs = np.asarray(stochastic_flow.ensemble(flow, outputs, key=keys, **options).loss)[:, 1:]
    found = stochastic_flow.moments(flow, outputs, **options)
    error = 3 * runs.std(0) / np.sqrt(len(runs))
    off = np.abs(np.asarray(found.loss)[1:] - runs.mean(0))
    assert np.all(off <= np.maximum(0.015 * runs.mean(0), error)), off / runs.mean(0)
    off = np.abs(np.asarray(found.loss_std)[1:] - runs.std(0))
    assert np.all(off <= np.maximum(0.05 * runs.std(0), 3 * error_of_spread(runs))), off


def test_moments_refuse_an_optimizer_that_is_not_linear() -> None:
    with pytest.raises(ValueError, match=r"optimizer must be linear in gradients .* got Adam"):
        stochastic_flow.moments(
            one_sample(), jnp.ones((1, 1)), learning_rate=0.1, steps=1, optimizer=optax.adam
        )


def test_covariance_under_poisson_sampling_of_a_linear_model_is_exact() -> None:
    """Unclipped squared loss: second moments obey a closed recursion, iterated by NumPy."""
    eta, q, steps = 0.15, 0.4, 6
    kernel = np.array([[2.0, 0.5, 0.1], [0.5, 1.0, 0.3], [0.1, 0.3, 1.5]])
    start = np.array([1.0, -2.0, 0.5])
    flow = one_sample(kernel=jnp.asarray(kernel), targets=jnp.zeros((3, 1)))
    found = stochastic_flow.moments(
        flow,
        jnp.asarray(start[:, None]),
        learning_rate=eta,
        steps=steps,
        sample_rate=q,
        outputs=True,
    )
    moved = np.eye(3) - eta * kernel
    mean, second = start, np.outer(start, start)
    for _ in range(steps):
        drawn = eta**2 * (1 / q - 1) * kernel @ np.diag(np.diag(second)) @ kernel
        mean, second = moved @ mean, moved @ second @ moved.T + drawn
    np.testing.assert_allclose(known(found.mean)[-1, :, 0], mean, rtol=1e-10)
    covariance = second - np.outer(mean, mean)
    np.testing.assert_allclose(known(found.covariance)[-1], covariance, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.loss[-1], np.trace(second) / 2, rtol=1e-9)


@pytest.mark.slow
def test_moments_in_flow_time_are_the_limit_of_small_steps() -> None:
    """The gap to the recursion, sigma^2 eta fixed, falls like the learning rate."""
    params, x = problem(1)
    kernel = ntkdp.empirical_ntk(linear, params, x[:N])
    rule = clipping.Automatic(0.5, gamma=0.1)
    flow = ntkdp.KernelFlow(kernel, jnp.zeros((N, 1)), losses.SquaredError(), rule)
    start, horizon = linear(params, x[:N]), 4.0
    limit = stochastic_flow.moment_flow(
        flow, start, [0.0, horizon], learning_rate=0.1, noise_multiplier=2.0, rtol=1e-8, atol=1e-11
    )
    assert limit.steps is None
    gaps = []
    rates = np.array([0.2, 0.1, 0.05])
    for rate in rates:
        steps = round(horizon / rate)
        stepped = stochastic_flow.moments(
            flow,
            start,
            learning_rate=rate,
            steps=steps,
            record_every=steps,
            noise_multiplier=2.0 * np.sqrt(0.1 / rate),
        )
        ends = [
            np.array([float(path.loss[-1]), float(path.loss_std[-1])]) for path in (stepped, limit)
        ]
        gaps.append(ends[0] - ends[1])
    slopes = np.diff(np.log(np.abs(gaps)), axis=0) / np.diff(np.log(rates))[:, None]
    np.testing.assert_allclose(slopes, 1.0, atol=0.15)


@pytest.mark.slow
def test_times_that_begin_late_are_counted_from_the_start() -> None:
    """df = -f dt + sqrt(D) dB from 0: the loss is D/4 (1 - exp(-2 t)), D = eta sigma^2 R^2."""
    flow = ntkdp.KernelFlow(
        jnp.eye(1), jnp.zeros((1, 1)), losses.SquaredError(), clipping.Abadi(1e3), reduction="sum"
    )
    start = jnp.zeros((1, 1))
    tight: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-11}
    times = np.array([0.5, 1.0])
    diffusion = 0.1 * 0.02**2 * 1e6
    late = stochastic_flow.moment_flow(
        flow, start, times, learning_rate=0.1, noise_multiplier=0.02, **tight
    )
    expected = diffusion / 4 * (1 - np.exp(-2 * times))
    np.testing.assert_allclose(late.loss, expected, rtol=1e-5)
    # The budget mu is spent from the start to t = 1, over a horizon T: D = T (R/mu)^2.
    for begin, horizon in ((0.0, 1.0), (0.5, 0.5)):
        found = stochastic_flow.fixed_privacy_flow(
            flow, start, times, mu=100.0, start=begin, **tight
        )
        expected = horizon * 100 / 4 * (1 - np.exp(-2 * (times - begin)))
        np.testing.assert_allclose(found.loss, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.slow
def test_at_fixed_privacy_the_noise_stays_as_the_step_shrinks() -> None:
    """Eight samples, mu = 1, T = 20: runs end near 2066 +- 30 whatever the step, 909.18 without."""
    J = np.load(DATA / "instances.npz")["c23_J"]
    problem = (jnp.zeros((8, 1)), losses.SquaredError(), clipping.Abadi(1.0))
    start = jnp.full((8, 1), 30.0)
    flow = ntkdp.KernelFlow(jnp.asarray(J @ J.T), *problem, reduction="sum")
    quiet = ntkdp.solve(flow, start, [0.0, 20.0])
    assert float(quiet.loss[-1]) == pytest.approx(909.18, abs=0.01)
    limit = stochastic_flow.fixed_privacy_flow(flow, start, [0.0, 20.0], mu=1.0)
    weights = jnp.asarray(np.linalg.pinv(J) @ np.full((8, 1), 30.0))
    eta = 0.05
    runs = dp_sgd.run(
        lambda w, x: x @ w,
        weights,
        J,
        *problem,
        learning_rate=eta,
        steps=400,
        record_every=400,
        noise_multiplier=np.sqrt(400.0),
        reduction="sum",
        key=jax.random.split(jax.random.key(0), 600),
    )
    end = np.asarray(runs.loss)[:, -1]
    spread = end.std()
    assert abs(float(limit.loss[-1]) / end.mean() - 1) < 0.05
    assert float(limit.loss[-1]) == pytest.approx(2066, rel=0.05)
    error = float(error_of_spread(end[:, None])[0])
    assert abs(float(limit.loss_std[-1]) - spread) < max(0.05 * spread, 3 * error)


@pytest.mark.slow
def test_the_spread_is_that_of_many_runs_where_the_outputs_are_not_gaussian() -> None:
    """Fixed privacy and Poisson sampling, 10,000 runs: within 5%; a Gaussian is off by over 8%."""
    J = np.load(DATA / "instances.npz")["c23_J"]
    params, x = problem(1)
    squared = losses.SquaredError()
    clipped = ntkdp.KernelFlow(
        jnp.asarray(J @ J.T), jnp.zeros((8, 1)), squared, clipping.Abadi(1.0), reduction="sum"
    )
    sampled = ntkdp.KernelFlow(
        ntkdp.empirical_ntk(linear, params, x[:N]), jnp.zeros((N, 1)), squared, RULES["unclipped"]
    )
    for flow, start, options in (
        (
            clipped,
            jnp.full((8, 1), 30.0),
            {"learning_rate": 0.1, "steps": 200, "noise_multiplier": np.sqrt(200.0)},
        ),
        (
            sampled,
            linear(params, x[:N]),
            {"learning_rate": 1.0, "steps": 40, "noise_multiplier": 2e-5, "sample_rate": 0.5},
        ),
    ):
        options |= {"record_every": options["steps"]}
        keys = jax.random.split(jax.random.key(11), 10_000)
        runs = np.asarray(stochastic_flow.ensemble(flow, start, key=keys, **options).loss)[:, -1]
        found = stochastic_flow.moments(flow, start, outputs=True, **options)
        assert abs(float(found.loss_std[-1]) / runs.std() - 1) < 0.05
        mean, covariance = known(found.mean)[-1, :, 0], known(found.covariance)[-1]
        gaussian = mean @ covariance @ mean + jnp.trace(covariance @ covariance) / 2
        scale = 1 if flow.reduction == "sum" else N
        assert float(jnp.sqrt(gaussian)) / scale < 0.92 * runs.std()


def test_spread_of_one_sampled_residual_is_that_of_its_fourth_moment() -> None:
    """f+ = (1 - eta h b / q) f: all moments of f are powers."""
    eta, q, h, steps = 0.02, 0.5, 2.0, 40
    found = stochastic_flow.moments(
        one_sample(), jnp.ones((1, 1)), learning_rate=eta, steps=steps, sample_rate=q
    )
    k = np.arange(steps + 1)
    second, fourth = (((1 - q) + q * (1 - eta * h / q) ** power) ** k for power in (2, 4))
    exact = np.sqrt(fourth - second**2) / 2
    np.testing.assert_allclose(found.loss_std[5:], exact[5:], rtol=0.04)
    # Of a Gaussian it would be too small.
    variance = second - (1 - eta * h) ** (2 * k)
    gaussian = np.sqrt((1 - eta * h) ** (2 * k) * variance + variance**2 / 2)
    assert gaussian[-1] < 0.92 * exact[-1]


def layered_problem(shared: bool) -> tuple[ntkdp.KernelFlow, tuple[Any, Any], dict[str, Any]]:
    """Two groups, train and test points, sampling, softmax; the kernel means (x) I_K or not."""
    params, x = problem(3)
    kernel = ntkdp.layerwise_ntk(linear, params, x, groups=GROUPS)
    values = kernel.values
    if shared:
        values = values[..., 0, 0]
    else:
        # Outputs that share some weights.
        mixed = jnp.eye(3) + 0.5 * jnp.ones((3, 3))
        values = values @ mixed
    whole = ntkdp.LayerwiseKernel(kernel.names, values)
    y = jnp.arange(N + M) % 3
    flow = ntkdp.KernelFlow(
        ntkdp.LayerwiseKernel(kernel.names, values[:, :N, :N]),
        y[:N],
        losses.SoftmaxCrossEntropy(),
        RULES["layerwise"],
        test_kernel=ntkdp.LayerwiseKernel(kernel.names, values[:, N:, :N]),
        test_targets=y[N:],
    )
    outputs = linear(params, x)
    options = {"noise_kernel": whole, "noise_multiplier": 0.5, "sample_rate": 0.5}
    return flow, (outputs[:N], outputs[N:]), options


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_all_modes_are_the_whole_covariance(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of basis changes nothing, step by step and in flow time."""
    flow, start, options = layered_problem(shared)
    options |= {"learning_rate": 1.0, "outputs": True, "rank": (N + M) * 3}

    def found() -> list[Any]:
        sgd = SGD(0.5, nesterov=True, average=0.5)
        stepped = stochastic_flow.moments(flow, start, steps=5, optimizer=sgd, **options)
        if shared:
            return [stepped]
        tight: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12}
        return [stepped, stochastic_flow.moment_flow(flow, start, [0.0, 3.0], **tight, **options)]

    whole = found()
    low_rank: Any = low_rank_covariance.low_rank
    monkeypatch.setattr(full_covariance, "full", lambda *of: low_rank(*of, options["rank"]))
    for full, modes in zip(whole, found(), strict=True):
        for field in ("loss", "loss_std", "test_loss", "test_loss_std", "mean", "covariance"):
            ours, theirs = getattr(modes, field), getattr(full, field)
            scale = float(jnp.max(jnp.abs(theirs)))
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7 * scale, err_msg=field)
        np.testing.assert_array_equal(modes.truncation, 0)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("noise", [0.5, 0.0])
def test_few_modes_lose_less_than_the_truncation(shared: bool, noise: float) -> None:
    """Against the whole covariance; under the noise of sampling alone only near full rank."""
    flow, start, options = layered_problem(shared)
    options |= {"noise_multiplier": noise, "learning_rate": 1.0, "steps": 20, "record_every": 20}
    options |= {"outputs": True}
    whole = stochastic_flow.moments(flow, start, **options)
    np.testing.assert_array_equal(whole.truncation, 0)
    assert whole.covariance is not None
    total = float(jnp.trace(whole.covariance[-1]))
    dropped = []
    for rank in (6, 30, 42):
        found = stochastic_flow.moments(flow, start, rank=rank, **options)
        assert found.covariance is not None
        share = float(found.truncation[-1])
        dropped.append(share)
        assert abs(float(jnp.trace(found.covariance[-1])) / total - 1) < 1.5 * share
        for field in ("loss", "test_loss"):
            np.testing.assert_allclose(getattr(found, field), getattr(whole, field), rtol=2e-3)
            spread, exact = (float(getattr(of, f"{field}_std")[-1]) for of in (found, whole))
            allowed = share if noise else {6: 0.5, 30: 0.15, 42: 0.05}[rank]
            assert abs(spread / exact - 1) < allowed, (field, rank)
    assert dropped == sorted(dropped, reverse=True)
    assert dropped[-1] < 0.01 < 0.4 < dropped[0]


@pytest.mark.slow
def test_beyond_the_limit_most_of_the_trace_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, start, options = layered_problem(True)
    options |= {"learning_rate": 1.0, "steps": 2}
    monkeypatch.setattr(moments, "_LARGEST_FULL", 10)
    found = stochastic_flow.moments(flow, start, **options)
    assert float(found.truncation[0]) == 0
    assert np.all((found.truncation[1:] > 0) & (found.truncation[1:] < 0.02))


def test_a_rank_is_a_count() -> None:
    for rank in (0, -1):
        with pytest.raises(ValueError, match="rank must be at least 1"):
            stochastic_flow.moments(
                one_sample(), jnp.ones((1, 1)), learning_rate=0.1, steps=1, rank=rank
            )


@pytest.mark.slow
def test_a_band_holds_its_share_of_the_runs() -> None:
    """Two-sided binomial test at 1% at each quarter of the horizon, 600 runs."""
    params, x = problem(1)
    kernel = ntkdp.empirical_ntk(linear, params, x[:N])
    flow = ntkdp.KernelFlow(kernel, jnp.zeros((N, 1)), losses.SquaredError(), clipping.Abadi(0.5))
    start = linear(params, x[:N])
    options: dict[str, Any] = {"learning_rate": 1.0, "steps": 40, "record_every": 10}
    options |= {"noise_multiplier": 1.0}
    low, high = stochastic_flow.moments(flow, start, **options).band(0.9)
    assert np.all(low <= high)
    np.testing.assert_allclose(low[0], high[0], rtol=1e-6)
    runs = dp_sgd.run(
        linear,
        params,
        x[:N],
        jnp.zeros((N, 1)),
        losses.SquaredError(),
        clipping.Abadi(0.5),
        key=jax.random.split(jax.random.key(8), 600),
        **options,
    )
    inside = (np.asarray(runs.loss) >= low) & (np.asarray(runs.loss) <= high)
    for share in inside[:, 1:].T:
        assert binomtest(int(share.sum()), share.size, 0.9).pvalue > 0.01


@pytest.mark.slow
def test_without_noise_the_mean_is_the_recursion() -> None:
    params, x = problem(3)
    kernel = ntkdp.empirical_ntk(linear, params, x[:N])
    y = jnp.arange(N) % 3
    flow = ntkdp.KernelFlow(kernel, y, losses.SoftmaxCrossEntropy(), clipping.Abadi(0.3))
    start = linear(params, x[:N])
    options: dict[str, Any] = {"learning_rate": 1.0, "steps": 7, "record_every": 3}
    found = stochastic_flow.moments(flow, start, outputs=True, **options)
    exact = ntkdp.recursion(flow, start, outputs=True, **options)
    np.testing.assert_allclose(known(found.mean), known(exact.outputs), rtol=1e-10)
    np.testing.assert_allclose(found.loss, exact.loss, rtol=1e-10)
    np.testing.assert_allclose(found.loss_std, 0, atol=1e-7)


@pytest.mark.parametrize("nan_is_an_error", often_or_slow([False, True], [False]))
def test_times_that_a_solve_does_not_reach_are_nan_with_advice(nan_is_an_error: bool) -> None:
    """The outputs obey df/dt = 4 f^3 but for the noise, and are infinite at t = 1/8."""

    def loss(f: jax.Array, y: jax.Array) -> jax.Array:
        return -jnp.sum(f**4)

    flow = ntkdp.KernelFlow(
        jnp.eye(1), jnp.zeros((1, 1)), loss, clipping.NoClipping(), reduction="sum"
    )
    with jax.debug_nans(nan_is_an_error):
        found = stochastic_flow.moment_flow(
            flow, jnp.ones((1, 1)), [0.0, 0.05, 1.0], learning_rate=1e-3
        )
    assert not found.successful
    assert "loosen rtol and atol" in found.message
    assert np.all(np.isfinite(found.loss[:2]))
    assert np.isnan(found.loss[2])
    assert np.isnan(found.loss_std[2])


def test_a_solve_that_reaches_all_times_is_successful() -> None:
    found = stochastic_flow.moment_flow(
        one_sample(), jnp.ones((1, 1)), [0.0, 1.0], learning_rate=0.1
    )
    assert found.successful
    assert found.message == "success"


@pytest.mark.parametrize("rule", [clipping.Global(1.0), clipping.Batch(1.0)])
def test_moments_need_a_continuous_rule_of_one_sample(rule: Any) -> None:
    with pytest.raises(ValueError, match=r"flow must have a rule.*use stochastic_flow.ensemble"):
        stochastic_flow.moments(
            one_sample(clipping=rule), jnp.ones((1, 1)), learning_rate=0.1, steps=1
        )


def test_a_band_of_test_losses_needs_test_targets() -> None:
    found = stochastic_flow.moments(one_sample(), jnp.ones((1, 1)), learning_rate=0.1, steps=1)
    with pytest.raises(ValueError, match="test=True needs a flow with test targets"):
        found.band(0.9, test=True)
    with pytest.raises(ValueError, match=r"level must be in \(0, 1\]"):
        found.band(1.5)


@pytest.mark.parametrize("n_outputs", [1, 2, 3, 10])
def test_integration_points_have_the_moments_of_the_normal_law(n_outputs: int) -> None:
    points, weights = integration_points(n_outputs)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-12)
    np.testing.assert_allclose(weights @ points, 0, atol=1e-12)
    second = np.einsum("p,pk,pl->kl", weights, points, points)
    np.testing.assert_allclose(second, np.eye(n_outputs), atol=1e-10)
