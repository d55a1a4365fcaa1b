"""Claims C19-C21, C43 and C46: steps against flow, and what steps do at one budget."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ntkdp
from ntkdp import advisor, clipping, dp_sgd, gradient_flow, losses, privacy, stochastic_flow
from ntkdp._backend.types import Array, ArrayLike, PRNGKeyArray, PyTree
from ntkdp.claims import _instances
from ntkdp.claims._claim import Finding, at_least, at_most, claim, equal
from ntkdp.trajectory import Measurement, Trajectory


def _run(rule: clipping.ClippingRule, rate: float, steps: int, **options: Any) -> Trajectory:
    """C19's network at as many steps for every rate, so that one program serves all."""
    problem = _instances.networks()["tanh"]
    return problem.run(rule, learning_rate=rate, steps=steps, **options)


def _error(run: Trajectory, path: Trajectory, every: int) -> float:
    """Largest difference of the losses; a step of the run is ``every`` times of the path."""
    at_same_times = path.loss[::every]
    return float(jnp.max(jnp.abs(run.loss[: len(at_same_times)] - at_same_times)))


def _slopes(errors: ArrayLike, rates: ArrayLike) -> np.ndarray:
    slopes: np.ndarray = np.diff(np.log(errors)) / np.diff(np.log(rates))
    return slopes


@claim(
    "C19",
    statement="Clipped descent follows its flow to first order in the learning rate: "
    "sup_t |L_discrete - L_flow| = O(eta).",
    assumptions="a tanh network, all weights trained, squared loss (sum), abadi with R = 0.5, "
    "T = 4",
    source="derived",
)
def descent_follows_the_flow_to_first_order() -> list[Finding]:
    problem, rule = _instances.networks()["tanh"], clipping.Abadi(0.5)
    finest, every = 0.005, np.array([16, 8, 4, 2, 1])
    path = gradient_flow.solve(
        problem.flow(rule), problem.params, finest * np.arange(801), rtol=1e-9, atol=1e-12
    )
    errors = [_error(_run(rule, finest * m, 800), path, int(m)) for m in every]
    plain = _error(_run(rule, finest * 16, 50, gradients="vmap"), path, 16)
    slopes = _slopes(errors, every)
    return [
        equal("error at eta = 0.08", errors[0], 0.01131, within=5e-6),
        equal("error at eta = 0.005", errors[-1], 0.000698, within=5e-7),
        equal("error at eta = 0.08, vmap", plain, 0.01131, within=5e-6),
        *(equal("log-log slope", slope, 1.0, within=0.05) for slope in slopes),
        equal("first slope", slopes[0], 1.010, within=5e-4),
        equal("last slope", slopes[-1], 1.001, within=5e-4),
    ]


class _DescentOfSpeed(gradient_flow.Flow):
    """-(G + (eta/2) DG' G), DG' G = grad |G|^2/2: the modified equation if G were a gradient."""

    flow: gradient_flow.WeightFlow
    learning_rate: Array

    def init(self, initial: PyTree) -> PyTree:
        return self.flow.init(initial)

    def velocity(self, state: PyTree) -> PyTree:
        velocity, pull = jax.vjp(self.flow.velocity, state)
        (along,) = pull(velocity)
        return jax.tree.map(lambda v, d: v - 0.5 * self.learning_rate * d, velocity, along)

    def measure(self, state: PyTree, outputs: bool) -> Measurement:
        return self.flow.measure(state, outputs)


@claim(
    "C20",
    statement="Clipped descent follows the modified equation -(G + (eta/2) DG G), G = sum_i C_i "
    "g_i, to second order. The clipped drift is no gradient: with grad |G|^2/2 in place "
    "of DG G, descent follows it to first order only.",
    assumptions="away from the kinks of clipping: AUTO-S, or abadi with a fixed set of clipped "
    "samples; C19's network up to T = 0.8, where abadi clips four samples of five",
    source="derived",
)
def descent_follows_the_modified_equation_to_second_order() -> list[Finding]:
    problem, finest, steps = _instances.networks()["tanh"], 0.01, 80
    every = (2, 1)
    findings = []
    rules = (clipping.Automatic(0.5), clipping.Abadi(0.5))
    for name, rule, how in zip(("AUTO-S", "abadi"), rules, _instances.GRADIENTS, strict=True):
        runs = [_run(rule, finest * m, steps, gradients=how) for m in every]
        for right in (True, False) if name == "abadi" else (True,):
            modified = gradient_flow.ModifiedFlow if right else _DescentOfSpeed
            errors = []
            for m, run in zip(every, runs, strict=True):
                path = gradient_flow.solve(
                    modified(problem.flow(rule), jnp.asarray(finest * m)),
                    problem.params,
                    finest * np.arange(steps + 1),
                    rtol=1e-10,
                    atol=1e-13,
                )
                errors.append(_error(run, path, m))
            (order,) = _slopes(errors, every)
            findings.append(
                equal(f"{name}, DG G: order", order, 2.0, within=0.05)
                if right
                else at_most(f"{name}, grad |G|^2/2: order", order, 1.3)
            )
    # The last runs and path are abadi's; up to T = 0.8 none may meet a kink.
    shares = jnp.concatenate(
        [path.clip_fraction, runs[0].clip_fraction[: steps // 2 + 1], runs[1].clip_fraction]
    )
    findings += [
        equal("abadi: least share of clipped samples", float(jnp.min(shares)), 0.8, within=0.0),
        equal("abadi: largest share of clipped samples", float(jnp.max(shares)), 0.8, within=0.0),
    ]
    return findings


@claim(
    "C21",
    statement="Past the edge of stability, eta h > 2, clipped descent ends in a two-cycle with "
    "|a_k| + |a_(k+1)| = eta R sqrt(h) and mean L >= eta^2 R^2 h/8. Unclipped descent "
    "diverges.",
    assumptions="one sample, frozen kernel h, squared loss (sum), abadi",
    source="derived",
)
def clipped_descent_cycles_past_the_edge_of_stability() -> list[Finding]:
    one, rule = _instances.one_sample(), clipping.Abadi(1.0)
    options: dict[str, Any] = {"learning_rate": 1.5, "steps": 200, "outputs": True}
    paths = {"recursion": gradient_flow.recursion(one.flow(rule), one.outputs, **options)}
    for gradients in _instances.GRADIENTS:
        paths[f"run, {gradients}"] = one.model().run(rule, gradients=gradients, **options)
    findings = []
    for name, path in paths.items():
        a = np.abs(np.asarray(_instances.outputs_of(path)[100:, 0]))
        findings += [
            equal(f"{name}: |a_k| + |a_(k+1)|", a[-2] + a[-1], 3.0, within=1e-9),
            at_most(f"{name}: change over two steps", np.max(np.abs(a[2:] - a[:-2])), 1e-9),
            at_least(f"{name}: mean L", np.mean(path.loss[101:]), 1.125, slack=1e-9),
        ]

    unclipped = gradient_flow.recursion(one.flow(_instances.unclipped()), one.outputs, **options)
    a = _instances.outputs_of(unclipped)[:, 0]
    findings.append(equal("unclipped: a_50/5^51", a[50] / 5.0**51, 1.0, within=1e-9))

    @jax.jit
    @jax.vmap
    def cycle(key: PRNGKeyArray) -> tuple[Array, Array, Array]:
        """Sum, change over two steps and mean loss of a random problem, over the predicted ones."""
        sharpness, h, R, a0 = 10 ** jax.random.uniform(key, (4,), minval=-0.5, maxval=0.7)
        learning_rate = (2 + sharpness) / h
        flow = _instances.squared_flow(jnp.reshape(h, (1, 1)), jnp.zeros((1, 1)), clipping.Abadi(R))
        path = gradient_flow.recursion(
            flow, a0.reshape(1, 1), learning_rate=learning_rate, steps=400, outputs=True
        )
        a = jnp.abs(_instances.outputs_of(path)[:, 0])
        width = learning_rate * R * jnp.sqrt(h)
        mean = jnp.mean(path.loss[-200:])
        return (a[-1] + a[-2]) / width, jnp.abs(a[-1] - a[-3]) / width, 8 * mean / width**2

    sums, changes, means = cycle(jax.random.split(jax.random.key(210), 300))
    return [
        *findings,
        at_most("random: largest |sum/(eta R sqrt h) - 1|", jnp.max(jnp.abs(sums - 1)), 1e-9),
        at_most("random: largest change over two steps", jnp.max(changes), 1e-9),
        at_least("random: smallest mean L over eta^2 R^2 h/8", jnp.min(means), 1.0, slack=1e-9),
    ]


@claim(
    "C43",
    statement="One private step is expected to change the loss by -eta a'HCa/n^2 + (eta^2/2) "
    "(curvature + sampling + privacy): exactly for the squared loss under a frozen kernel, to "
    "second order in the step for other losses.",
    assumptions="Linear model with two groups of weights, 6 samples, Poisson sampling at 1/2, "
    "sigma 0.7, abadi, flat and by layer; sums over all 64 batches, and 20,000 steps of DP-SGD",
    source="Bu, Zhang, Dai and Wang 2402.18752; kernel form derived",
)
def parts_of_a_step_are_its_expected_change() -> list[Finding]:
    sigma, rate, q = 0.7, 0.4, 0.5
    x, y = jax.random.normal(jax.random.key(43), (2, 6, 4))
    params = {"first": 0.3 * jnp.ones((2, 2)), "second": -0.2 * jnp.ones((2, 2))}
    layered = clipping.Abadi(np.array([0.4, 0.8]), scope="layerwise")
    findings = []
    for name, rule in (("flat", clipping.Abadi(1.0)), ("by layer", layered)):
        kernel = ntkdp.layerwise_ntk(_linear_in_two_groups, params, x)
        flow = gradient_flow.KernelFlow(kernel, y[:, :2], losses.SquaredError(), rule)
        outputs = _linear_in_two_groups(params, x)
        parts = advisor.decompose(flow, outputs, noise_multiplier=sigma, sample_rate=q)
        change = _mean_over_all_batches(x, outputs - y[:, :2], rule, rate, q, sigma)
        error = abs(float(parts.train.total().change(rate)) / change - 1)
        findings.append(at_most(f"error of the squared loss, relative, {name}", error, 1e-10))
    flow = gradient_flow.KernelFlow(
        kernel.total, jnp.arange(6) % 2, losses.SoftmaxCrossEntropy(), clipping.Abadi(1.0)
    )
    total = advisor.decompose(flow, outputs, noise_multiplier=sigma, sample_rate=q).train.total()
    best = float(total.best_learning_rate())
    for name, chosen in (("a fifth of the best", best / 5), ("a tenth of the best", best / 10)):
        run = dp_sgd.run(
            _linear_in_two_groups, params, x, flow.targets, flow.loss, flow.clipping, steps=1,
            learning_rate=chosen, noise_multiplier=sigma, sample_rate=q,
            key=jax.random.split(jax.random.key(1), 20_000),
        )  # fmt: skip
        seen = np.asarray(run.loss[:, 1] - run.loss[:, 0])
        off = abs(seen.mean() - float(total.change(chosen))) / (seen.std() / len(seen) ** 0.5)
        findings.append(at_most(f"softmax, off in standard errors, at {name}", off, 3))
    return findings


def _linear_in_two_groups(w: dict[str, Array], x: Array) -> Array:
    return x[:, :2] @ w["first"] + x[:, 2:] @ w["second"]


def _mean_over_all_batches(
    x: Array, a: Array, rule: clipping.ClippingRule, rate: float, q: float, sigma: float
) -> float:
    """Expected change of the mean squared loss, from the weights' steps of all batches."""
    halves = np.split(np.asarray(x), 2, axis=1)
    lengths = np.linalg.norm(a, axis=1)
    norms = np.stack([np.linalg.norm(half, axis=1) * lengths for half in halves])
    if rule.scope == "flat":
        norms = np.tile(np.hypot(*norms), (2, 1))
    R = np.reshape(np.asarray(rule.group_norms(2)), (2, 1))
    factors = np.minimum(1, R / norms)
    sensitivity = R[0, 0] if rule.scope == "flat" else np.linalg.norm(R)
    n, before = len(a), 0.5 * np.sum(np.asarray(a) ** 2)
    after = 0.5 * (rate * sigma * sensitivity / (q * n)) ** 2 * np.sum(np.asarray(x) ** 2) * 2
    for drawn in itertools.product((0, 1), repeat=n):
        chance = q ** sum(drawn) * (1 - q) ** (n - sum(drawn))
        moved = sum(
            half @ (half.T @ ((factor * drawn)[:, None] * a))
            for half, factor in zip(halves, factors, strict=True)
        )
        after += chance * 0.5 * np.sum((a - rate * moved / (q * n)) ** 2)
    return float(after - before) / n


class _Horizon(NamedTuple):
    """A linear problem that is trained up to a time, at a budget of mu."""

    x: Array
    y: Array
    clip_norm: float
    horizon: float
    mu: float

    @property
    def variance(self) -> float:
        """What the noise of full batches adds to each weight, (T S/(n mu))^2."""
        return (self.horizon * self.clip_norm / (len(self.x) * self.mu)) ** 2

    @property
    def start(self) -> Array:
        return jnp.zeros((len(self.x), 1))

    def flow(self) -> gradient_flow.KernelFlow:
        rule = clipping.Abadi(self.clip_norm)
        return gradient_flow.KernelFlow(self.x @ self.x.T, self.y, losses.SquaredError(), rule)

    def training(self, q: float, steps: int) -> dict[str, Any]:
        """Steps up to the horizon, with the noise that spends the budget on them."""
        sigma = privacy.Budget(mu=self.mu).noise_multiplier(steps, q)
        rate = self.horizon / steps
        return {
            "learning_rate": rate, "steps": steps, "noise_multiplier": sigma, "sample_rate": q,
        }  # fmt: skip

    def loss(self, q: float, steps: int) -> float:
        """The predicted mean loss at the end."""
        training = self.training(q, steps)
        found = stochastic_flow.moments(self.flow(), self.start, **training, record_every=steps)
        return float(found.loss[-1])

    def noise_free(self, steps: int) -> float:
        """The loss at the end of full-batch descent without noise."""
        x, y = np.asarray(self.x), np.asarray(self.y)
        curvature, slope = x.T @ x / len(x), x.T @ y / len(x)
        best = np.linalg.lstsq(curvature, slope)[0]
        left = np.eye(len(curvature)) - self.horizon / steps * curvature
        residual = x @ (best - np.linalg.matrix_power(left, steps) @ best) - y
        return float(np.mean(residual**2) / 2)

    def weight_noise(self, q: float, steps: int) -> float:
        """v(T), as the library has it."""
        found = stochastic_flow.weight_noise_variance(
            clipping.Abadi(self.clip_norm), len(self.x), **self.training(q, steps)
        )
        return float(found[-1, 0])

    def runs(self, q: float, steps: int, n_keys: int) -> np.ndarray:
        """Losses at the end of real runs."""
        run = dp_sgd.run(
            lambda w, x: x @ w,
            jnp.zeros((self.x.shape[1], 1)),
            self.x,
            self.y,
            losses.SquaredError(),
            clipping.Abadi(self.clip_norm),
            **self.training(q, steps),
            record_every=steps,
            gradients="vmap",
            key=jax.random.split(jax.random.key(2), n_keys),
        )
        return np.asarray(run.loss[:, -1])


@claim(
    "C46",
    statement="At a fixed budget mu and a fixed horizon T, if sigma is large, noise adds v(T) = "
    "(T S/(n mu))^2 to each weight, whatever the sampling rate and the number of steps are, so the "
    "loss is the same for all of them, until the noise of sampling matters: its variance is "
    "n mu^2 (1 - q) E g^2 / (q K S^2) times that of privacy.",
    assumptions="mu by the central limit theorem, for which v(T) is 1 + 1/(2 sigma^2) times that; "
    "Poisson sampling, no sample clipped, squared loss. A linear model with 24 samples, mu = 1, "
    "T = 2; the end with one weight and 64 samples, mu = 2, T = 2",
    source="derived",
)
def the_budget_decides_whatever_the_batch_is() -> list[Finding]:
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (24, 3))
    y = x @ jnp.array([[1.0], [-1.0], [0.5]]) + 0.3 * jax.random.normal(keys[1], (24, 1))
    flat = _Horizon(x, y, clip_norm=12.0, horizon=2.0, mu=1.0)
    cells = [(1.0, 256), (0.5, 256), (0.25, 1024)]
    findings = []
    for q, steps in cells:
        sigma = flat.training(q, steps)["noise_multiplier"]
        more = 1 + (1 / (2 * sigma**2) if q < 1 else 0.0)
        measured = flat.weight_noise(q, steps) / flat.variance
        what = f"v(T) / (T S/(n mu))^2, q = {q:g}, K = {steps}"
        findings.append(equal(what, measured, more, within=1 / sigma**4))
    predicted = [flat.loss(q, steps) for q, steps in cells]
    due = [one - flat.noise_free(steps) for one, (_, steps) in zip(predicted, cells, strict=True)]
    for (q, steps), one in zip(cells[1:], due[1:], strict=True):
        what = f"loss that is due to noise, q = {q:g}, K = {steps}, over q = 1, K = 256"
        findings.append(equal(what, one / due[0], 1.0, within=0.02))
    findings.append(at_least("part of the loss that is due to noise", due[0] / predicted[0], 0.5))
    for (q, steps), one in zip(cells[:2], predicted[:2], strict=True):
        seen = flat.runs(q, steps, 400)
        error = seen.std(ddof=1) / np.sqrt(len(seen))
        what = f"mean loss of runs less the predicted one, q = {q:g}, K = {steps}, vmap"
        findings.append(equal(what, seen.mean() - one, 0.0, within=4 * error))
    # Targets that one weight cannot fit: gradients do not vanish, and neither does their sampling.
    ones = jnp.ones((64, 1))
    rough = _Horizon(ones, jnp.where(jnp.arange(64) % 2 == 0, 1.0, -1.0)[:, None], 2.0, 2.0, 2.0)
    q, steps = 0.25, 1024
    sampling = 64 * 2.0**2 * (1 - q) / (q * steps * 2.0**2)
    sigma = rough.training(q, steps)["noise_multiplier"]
    sampled, whole = (rough.loss(part, steps) - rough.noise_free(steps) for part in (q, 1.0))
    what = "the same where sampling matters, q = 0.25 over q = 1, K = 1024"
    expected = 1 + sampling + 1 / (2 * sigma**2)
    findings.append(equal(what, sampled / whole, expected, within=0.01))
    return findings
