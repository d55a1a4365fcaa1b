"""Claims C6-C11 and C48: flat clipping with a small clipping norm, or with one that adapts."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ntkdp
from ntkdp import clipping, dp_sgd, gradient_flow, losses, stochastic_flow
from ntkdp._backend.types import Array, PyTree
from ntkdp.claims import _instances
from ntkdp.claims._claim import Finding, at_least, at_most, claim, equal


@claim(
    "C6",
    statement="Flat clipping may make the loss rise: gradients (3, -1, -1) and R = 1 give "
    "dL/dt = +1.",
    assumptions="rank-one kernel, sum form, abadi",
    source="derived",
)
def the_loss_may_rise() -> list[Finding]:
    rule = clipping.Abadi(1.0)
    x, ones = jnp.array([[3.0], [-1.0], [-1.0]]), jnp.ones((3, 1))
    flow = _instances.squared_flow(x @ x.T, jnp.zeros((3, 1)), rule)
    rate = _instances.loss_rate(flow, ones)
    findings = [equal("dL/dt of the kernel's flow", rate, 1.0, within=1e-12)]

    # f = x w with all residuals one.
    problem = _instances.Problem(
        lambda w, x: x @ w, jnp.ones((1, 1)), x, x - ones, losses.SquaredError()
    )
    velocity = problem.flow(rule).velocity(problem.params)
    gradient = jnp.sum(x, axis=0)
    findings.append(
        equal("dL/dt of the weights' flow", jnp.sum(velocity[0] * gradient), 1.0, within=1e-12)
    )
    for gradients in _instances.GRADIENTS:
        run = problem.run(rule, learning_rate=1e-6, steps=1, gradients=gradients)
        # The second difference of a step is |x|^2/2 = 5.5 learning rates.
        observed = (run.loss[1] - run.loss[0]) / 1e-6
        findings.append(equal(f"rise a step, {gradients}", observed, 1.0, within=1e-5))
    return findings


@claim(
    "C7",
    statement="Flat clipping makes the loss rise at first and converge to zero in the end.",
    assumptions="H = 11' + 0.1 I, y = (-3, 1, 1), f(0) = 0, R = 1, squared loss (sum), abadi",
    source="derived",
)
def the_loss_rises_and_converges() -> list[Finding]:
    rising, rule = _instances.rising(), clipping.Abadi(1.0)
    flow = rising.flow(rule)
    late = (np.linspace(1.8, 10.0, 51)[1:], np.linspace(10.0, 100.0, 51)[1:])
    path = _instances.solved(
        flow, rising.outputs, np.concatenate([np.linspace(0, 1.8, 901), *late])
    )
    top = int(jnp.argmax(path.loss))
    findings = [
        equal("largest L", path.loss[top], 5.788, within=5e-4),
        equal("dL/dt(0)", _instances.loss_rate(flow, rising.outputs), 0.4767, within=5e-5),
        equal("L(0)", path.loss[0], 5.5, within=0.0),
        equal("time of the largest L", path.times[top], 0.767, within=2e-3),
        equal("L(10)", path.loss[950], 2.437, within=5e-4),
        equal("L(100)", path.loss[-1], 5.2e-8, within=5e-10),
    ]
    for gradients in _instances.GRADIENTS:
        run = rising.model().run(rule, learning_rate=1e-3, steps=10_000, gradients=gradients)
        findings += [
            equal(f"largest L of a run, {gradients}", jnp.max(run.loss), 5.788, within=2e-3),
            equal(f"L(10) of a run, {gradients}", run.loss[-1], 2.437, within=2e-3),
        ]
    return findings


@claim(
    "C8",
    statement="Psi = sum_i psi_i, with psi_i' = l_i' min(1, tau_i/|l_i'|) and "
    "tau_i = R/sqrt(H_ii), is Huber's form of each sample's loss. It always decreases, also "
    "where L rises.",
    assumptions="one output, frozen H > 0, flat clipping, abadi",
    source="derived",
)
def the_huberised_loss_decreases() -> list[Finding]:
    rising = _instances.rising()
    times = np.linspace(0.0, 40.0, 1001)
    flow = rising.flow(clipping.Abadi(1.0))
    path = _instances.solved(flow, rising.outputs, times)
    huber = losses.Huber(1 / np.sqrt(1.1))
    psi = jnp.sum(
        jax.vmap(lambda f: huber(f, rising.targets))(_instances.outputs_of(path)[..., None]), axis=1
    )
    findings = [
        at_most("largest increase of Psi over a fortieth of time", jnp.max(jnp.diff(psi)), -1e-6),
        at_least("largest increase of L", jnp.max(jnp.diff(path.loss)), 1e-3),
    ]

    terms, a = _instances.random_terms(jax.random.key(80), 500, 4)
    kernels = terms[:, 0, :, :, 0, 0]

    @jax.jit
    @jax.vmap
    def rates(kernel: Array, f: Array) -> list[tuple[Array, Array]]:
        R = 0.1
        tau = R / jnp.sqrt(jnp.diagonal(kernel))
        rates = []
        for loss in (losses.SquaredError(), losses.Logistic()):
            targets = (
                jnp.zeros((4, 1)) if isinstance(loss, losses.SquaredError) else jnp.array(_LABELS)
            )
            flow = gradient_flow.KernelFlow(
                kernel, targets, loss, clipping.Abadi(R), reduction="sum"
            )
            velocity = flow.velocity(flow.init(f))[0][:, 0]
            slope = loss.output_gradient(f, targets)[:, 0]
            flattened = jnp.clip(slope, -tau, tau)
            # Both over |psi'| |df/dt|, the largest value of an inner product.
            scale = jnp.linalg.norm(flattened) * jnp.linalg.norm(velocity)
            rates.append((jnp.sum(flattened * velocity) / scale, jnp.sum(slope * velocity)))
        return rates

    for name, (of_psi, of_loss) in zip(("squared", "logistic"), rates(kernels, a), strict=True):
        findings += [
            at_most(f"{name}: largest cosine of dPsi/dt", jnp.max(of_psi), -1e-6),
            at_least(f"{name}: instances of 500 where L rises", jnp.sum(of_loss > 0), 1),
        ]
    return findings


_LABELS = (0, 1, 1, 0)


@claim(
    "C9",
    statement="One sample leaves the clipped zone linearly, |a| = |a0| - R sqrt(h) t up to "
    "t* = (|a0| - R/sqrt(h))/(R sqrt(h)), then decays like exp(-h t).",
    assumptions="K = 1, frozen kernel, squared loss (sum), abadi; a0 = 5, h = 4, R = 1",
    source="derived",
)
def one_sample_leaves_the_clipped_zone() -> list[Finding]:
    one, rule = _instances.one_sample(), clipping.Abadi(1.0)
    path = _instances.solved(one.flow(rule), one.outputs, np.linspace(0.0, 3.0, 1001))
    a = _instances.outputs_of(path)[:, 0]
    free = jnp.argmax(path.clip_fraction < 0.5)
    findings = [
        equal("a(3)", a[-1], 0.02489, within=5e-6),
        equal("t*", path.times[free], 2.25, within=2 * 0.003),
        equal("a(1.5)", a[500], 2.0, within=1e-5),
        equal("rate in the clipped zone", (a[0] - a[700]) / 2.1, 2.0, within=1e-5),
        equal("rate beyond it", -jnp.log(a[1000] / a[800]) / 0.6, 4.0, within=1e-4),
    ]
    for gradients in _instances.GRADIENTS:
        run = one.model().run(
            rule, learning_rate=1e-3, steps=3000, outputs=True, gradients=gradients
        )
        findings += [
            equal(
                f"a(2) of a run, {gradients}", _instances.outputs_of(run)[2000, 0], 1.0, within=1e-9
            ),
            equal(
                f"a(3) of a run, {gradients}",
                _instances.outputs_of(run)[3000, 0],
                0.02489,
                within=3e-4,
            ),
        ]
    return findings


@claim(
    "C10",
    statement="The time to leave the clipped zone grows like 1/R.",
    assumptions="C9's sample, R from 0.1 to 0.01",
    source="derived",
)
def the_clipped_zone_lasts_as_one_over_the_norm() -> list[Finding]:
    one = _instances.one_sample()
    norms = np.array([0.1, 0.05, 0.02, 0.01])
    left = []
    for R in norms:
        times = np.linspace(0.0, 6.0 / R, 1001)
        path = _instances.solved(one.flow(clipping.Abadi(R)), one.outputs, times)
        # The gradient's norm is 2 |a|.
        inside = 2 * jnp.abs(_instances.outputs_of(path)[:, 0]) <= R
        left.append(float(path.times[jnp.argmax(inside)]))
    slopes = np.diff(np.log(left)) / np.diff(np.log(norms))
    return [
        equal("log-log slope at the small end", slopes[-1], -1.0, within=0.02),
        equal("log-log slope at the large end", slopes[0], -1.0, within=0.02),
        equal("time at R = 0.01", left[-1], (5 - 0.005) / 0.02, within=0.6),
    ]


@claim(
    "C11",
    statement="While every sample is clipped, only the product eta R matters: (R, eta) = "
    "(0.1, 0.1), (0.01, 1) and (0.001, 10) give the same run.",
    assumptions="abadi, the same key, noise included; flat or layerwise",
    source="paper",
)
def only_the_product_of_rate_and_norm_matters() -> list[Finding]:
    pairs = ((0.1, 0.1), (0.01, 1.0), (0.001, 10.0))
    shared = {"noise_multiplier": 0.5, "steps": 20, "outputs": True}
    findings = []
    cases: list[tuple[str, str, clipping.Scope, dict[str, Any]]] = [
        ("tanh, Poisson batches", "tanh", "flat", {"sample_rate": 0.6}),
        ("ReLU, by layer", "ReLU", "layerwise", {"reduction": "mean", "gradients": "vmap"}),
    ]
    for name, problem, scope, options in cases:
        runs = [
            _instances.networks()[problem].run(
                clipping.Abadi(R, scope=scope), learning_rate=eta, **shared, **options
            )
            for R, eta in pairs
        ]
        outputs: list[PyTree] = [run.outputs for run in runs]
        apart = [_instances.largest_difference(other, outputs[0]) for other in outputs[1:]]
        clipped = min(float(jnp.min(run.clip_fraction)) for run in runs)
        moved = _instances.largest_difference(outputs[0][-1], outputs[0][0])
        findings += [
            at_most(f"{name}: largest difference of outputs", max(apart), 1e-10),
            equal(f"{name}: smallest share of clipped samples", clipped, 1.0, within=0.0),
            at_least(f"{name}: how far the outputs went", moved, 1e-2),
        ]
    rising = _instances.rising()
    paths = [
        gradient_flow.recursion(
            rising.flow(clipping.Abadi(R)), rising.outputs, learning_rate=eta, steps=20
        )
        for R, eta in pairs
    ]
    apart = [_instances.largest_difference(path.loss, paths[0].loss) for path in paths[1:]]
    return [*findings, at_most("C7's recursion: largest difference of losses", max(apart), 1e-10)]


@claim(
    "C48",
    statement="Adaptive clipping ends at its quantile: R moves until the share of samples that are "
    "not clipped is gamma, whether R begins far above or far below. Runs and predictions have the "
    "same mean loss and R.",
    assumptions="linear model, 200 samples, squared loss (mean) with label noise, Poisson sampling "
    "at 1/2, sigma 4, noise of the count 10, rate 0.15; gradients are stationary at the end",
    source="Andrew et al. 1905.03871; predictions derived",
)
def adaptive_clipping_ends_at_its_quantile() -> list[Finding]:
    n, d, n_runs, steps, eta = 200, 5, 400, 120, 0.4
    x, noise = np.split(np.asarray(jax.random.normal(jax.random.key(48), (n, d + 1))), [d], axis=1)
    w, y, loss = jnp.zeros((d, 1)), x @ np.ones((d, 1)) + noise, losses.SquaredError()
    options: dict[str, Any] = {"learning_rate": eta, "steps": steps, "record_every": 12}
    noisy = options | {"noise_multiplier": 4.0, "sample_rate": 0.5}
    findings = []
    cases: list[tuple[float, float, _instances.Gradients]] = [
        (0.5, 20.0, "structured"),
        (0.8, 0.05, "vmap"),
    ]
    for quantile, R, gradients in cases:
        rule = clipping.Abadi(R)
        adaptive = clipping.Adaptive(quantile, rate=0.15, count_noise=10.0)
        flow = gradient_flow.KernelFlow(x @ x.T, y, loss, rule)
        run = dp_sgd.run(
            lambda w, x: x @ w, w, x, y, loss, rule, adaptive=adaptive, gradients=gradients,
            key=jax.random.split(jax.random.key(1), n_runs), **noisy,
        )  # fmt: skip
        drawn = stochastic_flow.ensemble(
            flow, x @ w, adaptive=adaptive,
            key=jax.random.split(jax.random.key(2), n_runs), **noisy,
        )  # fmt: skip
        steps_without = gradient_flow.recursion(flow, x @ w, adaptive=adaptive, **options)
        moving = gradient_flow.AdaptiveFlow(flow, adaptive, learning_rate=eta)
        path = ntkdp.solve(moving, x @ w, [0.0, eta * steps])
        where = f"gamma {quantile}, R(0) {R:g}"
        for name, one in (("runs", run), ("predicted runs", drawn), ("recursion", steps_without)):
            share = 1 - float(jnp.mean(one.clip_fraction[..., -1]))
            findings.append(
                equal(f"share unclipped, {name}, {where}", share, quantile, within=0.02)
            )
        share = 1 - float(path.clip_fraction[-1])
        findings.append(equal(f"share unclipped, flow, {where}", share, quantile, within=0.02))
        for name, quantity in (("mean loss", "loss"), ("mean R", "clip_norm")):
            ours, theirs = (
                np.asarray(getattr(one, quantity)).reshape(n_runs, -1)[:, 1:]
                for one in (drawn, run)
            )
            apart = np.abs(np.mean(ours, axis=0) - np.mean(theirs, axis=0))
            error = np.sqrt((np.var(ours, axis=0) + np.var(theirs, axis=0)) / n_runs)
            largest = np.max(apart / error)
            findings.append(at_most(f"{name}, off in standard errors, {where}", largest, 3.0))
    return findings
