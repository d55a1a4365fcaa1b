"""Claims C26-C29: calibration and the grid of learning rate and clipping norm."""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntkdp import calibration, clipping, datasets, dp_sgd, losses, models, ntk
from ntkdp._backend.types import Array
from ntkdp.claims._claim import Finding, at_least, at_most, claim, equal
from ntkdp.gradient_flow import KernelFlow, WeightFlow, recursion, solve
from ntkdp.trajectory import Trajectory


def _linear(weights: Array, x: Array) -> Array:
    return x @ weights


@claim(
    "C26",
    statement=(
        "The flat flow converges to p = max(q, 1 - tau (1 - q)/q) with tau = R/||x||. So the ECE "
        "is (1 - q)(1 - tau/q) where that is positive and 0 otherwise, and the accuracy is q for "
        "every R: with a small R the network is as accurate, and over-confident."
    ),
    assumptions="logistic loss, one output, all samples share x, P(y = 1) = q > 1/2, abadi",
    source="derived",
)
def small_clipping_norms_make_over_confident() -> list[Finding]:
    x = jnp.array([0.9, -1.1, 0.4])
    length = float(jnp.linalg.norm(x))
    inputs, start = jnp.tile(x, (10, 1)), jnp.zeros((3, 1))
    times = np.array([0.0, 1000.0])

    def problem(q: float, tau: float) -> tuple[Array, losses.Loss, clipping.ClippingRule]:
        y = (jnp.arange(10) < round(10 * q)).astype(float)[:, None]
        return y, losses.Logistic(), clipping.Abadi(tau * length)

    def limit(path: Trajectory, y: Array) -> tuple[float, float, float]:
        """P(y = 1) at the end, its ECE and the accuracy."""
        p = jax.nn.sigmoid(_outputs(path)[-1])
        error = calibration.expected_calibration_error(p, y[:, 0].astype(int))
        assert path.accuracy is not None
        return float(p[0, 0]), float(error), float(path.accuracy[-1])

    def kernel_flow(q: float, tau: float) -> tuple[float, float, float]:
        y, loss, rule = problem(q, tau)
        flow = KernelFlow(inputs @ inputs.T, y, loss, rule)
        return limit(solve(flow, jnp.zeros((10, 1)), times, outputs=True), y)

    def weight_flow(q: float, tau: float) -> tuple[float, float, float]:
        flow = WeightFlow(_linear, inputs, *problem(q, tau))
        return limit(solve(flow, start, times, outputs=True), flow.targets)

    def run(
        q: float, tau: float, gradients: Literal["structured", "vmap"] = "structured"
    ) -> tuple[float, float, float]:
        y, loss, rule = problem(q, tau)
        path = dp_sgd.run(
            _linear, start, inputs, y, loss, rule, learning_rate=2.0, steps=500, record_every=500,
            outputs=True, gradients=gradients, key=jax.random.key(0),
        )  # fmt: skip
        return limit(path, y)

    def error(q: float, tau: float) -> float:
        return (1 - q) * max(1 - tau / q, 0.0)

    findings = []
    for way in (weight_flow, kernel_flow, run):
        for tau, p in ((1.0, 0.7), (0.5, 0.7857), (0.2, 0.9143), (0.05, 0.9786)):
            found, ece, accuracy = way(0.7, tau)
            where = f"q = 0.7, tau = {tau}, {way.__name__.replace('_', ' ')}"
            findings += [
                equal(f"p ({where})", found, p, within=5e-5),
                equal(f"ECE ({where})", ece, error(0.7, tau), within=1e-6),
                equal(f"accuracy ({where})", accuracy, 0.7, within=1e-12),
            ]
    _, ece, _ = run(0.7, 0.2, "vmap")
    elsewhere = np.random.default_rng(26).uniform(0.1, 1.2, (3, 8))
    worst = max(
        abs(way(q, tau)[1] - error(q, tau))
        for q, taus in zip((0.6, 0.8, 0.9), elsewhere, strict=True)
        for tau in taus
        for way in (kernel_flow, run)
    )
    return [
        *findings,
        equal(
            "ECE (q = 0.7, tau = 0.2, run by plain gradients)", ece, error(0.7, 0.2), within=1e-6
        ),
        at_most("error of the ECE, 24 other q and tau", worst, 1e-6),
    ]


@claim(
    "C27",
    statement=(
        "AUTO-V (gamma = 0) makes the logits grow like t; without clipping, with abadi and with "
        "AUTO-S they grow like ln t in the end."
    ),
    assumptions="logistic loss, one output, separable data, model linear in its weights",
    source="derived; ln t without clipping: Soudry et al. 2018",
)
def automatic_clipping_makes_logits_grow_linearly() -> list[Finding]:
    data = datasets.separable(n_train=24, n_test=8, n_features=4, margin=1.0, seed=27)
    x, y = jnp.asarray(data.x_train), jnp.asarray(data.y_train)[:, None].astype(float)
    loss, start = losses.Logistic(), jnp.zeros((4, 1))
    kernel = ntk.empirical_ntk(_linear, start, x)

    def flow(rule: clipping.ClippingRule, times: np.ndarray) -> Trajectory:
        predicted = KernelFlow(kernel, y, loss, rule)
        return solve(predicted, jnp.zeros_like(y), times, outputs=True)

    def run(rule: clipping.ClippingRule, **options: Any) -> Trajectory:
        return dp_sgd.run(
            _linear, start, x, y, loss, rule, outputs=True, key=jax.random.key(0), **options
        )

    def margins(path: Trajectory) -> np.ndarray:
        """The smallest logit on the side of its label, after the start."""
        return np.asarray(jnp.min((2 * y - 1) * _outputs(path), axis=(1, 2)))[1:]

    auto_v = clipping.Automatic(1.0, gamma=0.0)
    # Unit vectors are all that is left of the gradients: the weights move along their mean.
    sides = np.asarray((2 * y - 1) * x)
    speed = float(np.min(sides @ np.mean(sides / np.linalg.norm(x, axis=1)[:, None], axis=0)))
    times = np.linspace(0.0, 30.0 / speed, 6)
    straight = {"flow": flow(auto_v, times)} | {
        f"run, {how} gradients": run(
            auto_v, learning_rate=times[1] / 20, steps=100, record_every=20, gradients=how
        )
        for how in ("structured", "vmap")
    }
    findings = []
    for way, path in straight.items():
        slope = _slope(np.log(times[1:]), np.log(margins(path)))
        findings += [
            equal(f"slope of ln logit in ln t (AUTO-V, {way})", slope, 1.0, within=1e-4),
            equal(f"smallest logit (AUTO-V, {way})", margins(path)[-1], 30.0, within=0.003),
        ]
    late = np.concatenate([[0.0], np.geomspace(1e4, 1e6, 5)])
    for name, rule in (
        ("none", clipping.from_name("none")),
        ("abadi", clipping.Abadi(0.1)),
        ("AUTO-S", clipping.Automatic(1.0, gamma=0.01)),
    ):
        slope = _slope(np.log(late[1:]), margins(flow(rule, late)))
        findings.append(equal(f"slope of logit in ln t ({name}, flow)", slope, 1.0, within=0.05))
    path = run(clipping.Abadi(0.1), learning_rate=2.0, steps=10000, record_every=2500)
    slope = _slope(np.log(np.asarray(path.times[1:])), margins(path))
    return [*findings, equal("slope of logit in ln t (abadi, run)", slope, 1.0, within=0.05)]


@claim(
    "C28",
    statement=(
        "ECE and MCE are those of bins counted by hand; temperature scaling keeps the top labels "
        "and lowers the negative log-likelihood of data that it was not fitted on."
    ),
    assumptions="bins (lo, hi]; an over-confident network, held-out data of the same distribution",
    source="derived; temperature scaling: Guo et al. 2017",
)
def temperature_scaling_keeps_the_top_labels() -> list[Finding]:
    # Five bins. (0.4, 0.6]: two samples, none right; (0.6, 0.8]: 0.7, 0.7, 0.8, 0.8, three right,
    # no gap; (0.8, 1]: four at 0.95, three right, a gap of 0.2.
    confidence = jnp.array([0.55, 0.55, 0.7, 0.7, 0.8, 0.8, 0.95, 0.95, 0.95, 0.95])
    right = jnp.array([0, 0, 1, 1, 1, 0, 1, 1, 1, 0])
    rest = (1 - confidence) / 2
    three = jnp.stack([rest, confidence, rest], axis=1)
    findings = []
    for kind, probs, labels in (("two classes", confidence, right), ("three", three, right)):
        ece = float(calibration.expected_calibration_error(probs, labels, 5))
        mce = float(calibration.maximum_calibration_error(probs, labels, 5))
        findings += [
            equal(f"ECE by hand ({kind})", ece, 0.4 * 0.2 + 0.2 * 0.55, within=1e-12),
            equal(f"MCE by hand ({kind})", mce, 0.55, within=1e-12),
        ]

    generator = np.random.default_rng(28)
    kept, changes, ratios = [], [], []
    for k in range(100):
        n_outputs, true = (2, 10)[k % 2], generator.uniform(1.5, 4.0)
        logits = generator.normal(0.0, 2.0, (1000, n_outputs))
        labels = np.argmax(logits + generator.gumbel(size=logits.shape), axis=1)
        found = _recalibrated(jnp.asarray(true * logits), jnp.asarray(labels))
        kept.append(found.kept)
        changes.append(found.nll_after - found.nll_before)
        ratios.append(found.temperature / true)
    findings += [
        equal("share of top labels kept, 100 instances", min(kept), 1.0, within=0.0),
        at_most("largest change of the held-out NLL, 100 instances", max(changes), 0.0),
        equal("mean of fitted over true temperature", float(np.mean(ratios)), 1.0, within=0.02),
    ]

    data = datasets.digits(n_train=100, n_test=1000, seed=28)
    model = models.mlp([32], data.n_outputs)
    x_held_out, y_held_out = jnp.asarray(data.x_test), jnp.asarray(data.y_test)
    run = dp_sgd.run(
        model.apply, model.init(jax.random.key(28), data.x_train), data.x_train, data.y_train,
        losses.SoftmaxCrossEntropy(), clipping.Automatic(1.0), learning_rate=0.5, steps=400,
        record_every=400, test_x=x_held_out, outputs=True, key=jax.random.key(0),
    )  # fmt: skip
    assert run.test_outputs is not None
    digits = _recalibrated(run.test_outputs[-1], y_held_out)
    return [
        *findings,
        equal("share of top labels kept (digits)", digits.kept, 1.0, within=0.0),
        at_least("fitted temperature (digits, AUTO-S)", digits.temperature, 1.1),
        at_most("held-out NLL (digits)", digits.nll_after, digits.nll_before),
    ]


class _Recalibrated(NamedTuple):
    """Temperature scaling fitted on the first half of the samples and measured on the other."""

    temperature: float
    kept: float
    nll_before: float
    nll_after: float


def _recalibrated(logits: Array, labels: Array) -> _Recalibrated:
    half = len(labels) // 2
    scaling = calibration.fit_temperature(logits[:half], labels[:half])
    before, after = logits[half:], scaling(logits[half:])
    kept = jnp.mean(jnp.argmax(before, axis=1) == jnp.argmax(after, axis=1))
    nll = [
        float(calibration.negative_log_likelihood(jax.nn.softmax(f), labels[half:]))
        for f in (before, after)
    ]
    return _Recalibrated(float(scaling.temperature), float(kept), *nll)


@claim(
    "C29",
    statement=(
        "Along an anti-diagonal of the grid of learning rate and clipping norm in powers of two, "
        "eta R is constant. There losses, accuracies and calibration errors, predicted and "
        "observed, are equal up to rounding while all samples are clipped."
    ),
    assumptions="real data (digits), abadi, flat and layerwise, with and without noise, same key",
    source="derived; seen in the paper's Figure 3",
)
def the_grid_repeats_along_anti_diagonals() -> list[Finding]:
    data = datasets.digits(n_train=64, n_test=10, seed=29)
    x, y, loss = jnp.asarray(data.x_train), jnp.asarray(data.y_train), losses.SoftmaxCrossEntropy()
    model = models.mlp([24], data.n_outputs)
    params = model.init(jax.random.key(29), x)
    initial, kernel = model.apply(params, x), ntk.layerwise_ntk(model.apply, params, x)
    steps = 20

    def prediction(rate: float, rule: clipping.ClippingRule) -> Trajectory:
        flow = KernelFlow(kernel, y, loss, rule)
        return recursion(flow, initial, learning_rate=rate, steps=steps, outputs=True)

    def run(rate: float, rule: clipping.ClippingRule, **options: Any) -> Trajectory:
        return dp_sgd.run(
            model.apply, params, x, y, loss, rule, learning_rate=rate, steps=steps, outputs=True,
            key=jax.random.key(0), **options,
        )  # fmt: skip

    def numbers(path: Trajectory) -> np.ndarray:
        """Losses at all steps, then accuracy, ECE and MCE at the end."""
        probs = jax.nn.softmax(_outputs(path)[-1])
        assert path.accuracy is not None
        errors = [
            metric(probs, y)
            for metric in (
                calibration.expected_calibration_error,
                calibration.maximum_calibration_error,
            )
        ]
        return np.array([*path.loss, path.accuracy[-1], *errors])

    flat, layerwise = clipping.Abadi, partial(clipping.Abadi, scope="layerwise")
    rates, norms = 2.0 ** np.arange(3, 7), 2.0 ** np.arange(-9, -5)
    findings = []
    for name, way, rule in (
        ("recursion, flat", prediction, flat),
        ("recursion, layerwise", prediction, layerwise),
        ("run, flat", run, flat),
        ("run with noise, layerwise", partial(run, noise_multiplier=1.0), layerwise),
        ("run by plain gradients, flat", partial(run, gradients="vmap"), flat),
    ):
        diagonals: dict[float, list[np.ndarray]] = {}
        clipped = 1.0
        for rate in rates:
            for R in norms:
                path = way(rate, rule(R))
                diagonals.setdefault(rate * R, []).append(numbers(path))
                clipped = min(clipped, float(jnp.min(path.clip_fraction)))
        worst = max(np.max(np.ptp(cells, axis=0)) for cells in diagonals.values())
        ends = [cells[0][steps] for _, cells in sorted(diagonals.items())]
        findings += [
            at_most(f"difference along anti-diagonals ({name})", worst, 1e-12),
            equal(f"smallest share of clipped samples ({name})", clipped, 1.0, within=0.0),
            at_least(f"largest over smallest final loss ({name})", max(ends) / min(ends), 1.2),
        ]
    for name, way in (("recursion", prediction), ("run", run)):
        one, other = (numbers(way(2.0**-k, clipping.Abadi(2.0**k))) for k in (3, 5))
        findings.append(
            at_least(
                f"difference where none is clipped ({name})", np.max(np.abs(one - other)), 0.05
            )
        )
    return findings


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.polyfit(x, y, 1)[0])


def _outputs(path: Trajectory) -> Array:
    assert path.outputs is not None
    return path.outputs
