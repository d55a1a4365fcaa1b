"""Claims C22-C25, C40 and C41: noise, momentum and Adam; noise that is correlated."""

from collections.abc import Mapping
from functools import partial

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax

import ntkdp
from ntkdp import clipping, dp_sgd, gradient_flow, losses, privacy, stochastic_flow
from ntkdp._backend.types import Array
from ntkdp.batches import Batches, Cyclic, Full
from ntkdp.claims._claim import Finding, at_least, at_most, claim, equal
from ntkdp.claims._instances import Instance, rising, stored
from ntkdp.noise import Correlated, Independent, Noise

#: A budget at which no gradient of these runs reaches the clipping norm of one.
_BUDGET = privacy.Budget(mu=1000.0)


def _linear(w: Array, x: Array) -> Array:
    return x @ w


def _linear_in_two_groups(w: dict[str, Array], x: Array) -> Array:
    half = x.shape[1] // 2
    return x[:, :half] @ w["first"] + x[:, half:] @ w["second"]


@claim(
    "C22",
    statement="The stationary mean loss is E L = 1/2 sum_k eta sigma^2 S^2 / (2 - eta lam_k).",
    assumptions="Linear model with kernel eigenvalues lam_k, squared loss (sum), R above every "
    "norm; S is the sensitivity, which is R for flat clipping. With the mean, eta/n takes the "
    "place of eta",
    source="derived",
)
def stationary_loss_of_a_linear_model() -> list[Finding]:
    eta, R, sigma, n_seeds, burn_in = 0.5, 100.0, 1e-3, 500, 100
    eigenvalues = np.linspace(0.5, 3.0, 6)
    left, right = np.asarray(jax.random.normal(jax.random.key(22), (2, 8, 6)))
    rotate, spread = np.linalg.qr(left[:6])[0], np.linalg.qr(right)[0]
    run = partial(
        dp_sgd.run,
        _linear_in_two_groups,
        {"first": jnp.zeros((4, 1)), "second": jnp.zeros((4, 1))},
        (rotate * np.sqrt(eigenvalues)) @ spread.T,
        jnp.zeros(6),
        losses.SquaredError(),
        steps=1500,
        record_every=2,
        noise_multiplier=sigma,
        groups={"first": "first", "second": "second"},
        key=jax.random.split(jax.random.key(1), n_seeds),
    )
    closed = 0.5 * float(np.sum(eta * (sigma * R) ** 2 / (2 - eta * eigenvalues)))
    flat = run(clipping=clipping.Abadi(R), learning_rate=eta, reduction="sum")
    # n times the step size makes the mean's iterates the sum's; its loss is 1/n of the sum's.
    layerwise = run(
        clipping=clipping.Abadi(np.array([3 * R, 4 * R]), scope="layerwise"),
        learning_rate=6 * eta,
        reduction="mean",
        gradients="vmap",
    )
    of_seed = np.mean(flat.loss[:, burn_in:], axis=1) / closed
    grouped = 6 * float(np.mean(layerwise.loss[:, burn_in:])) / (25 * closed)
    clipped = max(float(np.max(one.clip_fraction)) for one in (flat, layerwise))
    return [
        equal("E L / closed form", float(np.mean(of_seed)), 1.0, within=0.005),
        at_most("its standard error", float(np.std(of_seed)) / n_seeds**0.5, 0.0015),
        equal("E L / closed form, groups with R = 300, 400, mean", grouped, 1.0, within=0.005),
        at_most("largest clip fraction", clipped, 0.0),
    ]


@claim(
    "C23",
    statement="As eta -> 0 at fixed sigma, noise vanishes: Var f(T) / eta is about constant. At "
    "fixed privacy (mu-GDP, sigma = sqrt(T/eta)/mu) it does not: E L(T) stays above "
    "twice its value without noise, whatever eta is.",
    assumptions="Linear model with the stored J (8 samples, 30 weights), squared loss (sum), "
    "targets 0, f(0) = 30, abadi, R = 1, mu = 1, T = 20; Var f is summed over samples",
    source="derived",
)
def noise_vanishes_at_fixed_sigma_but_not_at_fixed_privacy() -> list[Finding]:
    J, horizon, n_runs = np.asarray(stored("c23_J")), 20.0, 500
    problem = (jnp.zeros((8, 1)), losses.SquaredError(), clipping.Abadi(1.0))
    outputs = np.full((8, 1), 30.0)
    flow = gradient_flow.KernelFlow(jnp.asarray(J @ J.T), *problem, reduction="sum")
    quiet = float(ntkdp.solve(flow, outputs, [0.0, horizon]).loss[-1])
    weights = np.linalg.pinv(J) @ outputs

    def at_the_end(eta: float, sigma: float, key: int) -> tuple[np.ndarray, np.ndarray]:
        # As many steps for each eta, past the horizon too: one compiled program serves all.
        run = dp_sgd.run(
            _linear,
            weights,
            J,
            *problem,
            learning_rate=eta,
            steps=800,
            record_every=100,
            noise_multiplier=sigma,
            reduction="sum",
            outputs=True,
            gradients="vmap",
            key=jax.random.split(jax.random.key(key), n_runs),
        )
        end = round(horizon / eta) // 100
        assert run.outputs is not None
        return np.asarray(run.loss[:, end]), np.asarray(run.outputs[:, end, :, 0])

    findings = [equal("L(T) without noise", quiet, 909.18, within=0.005)]
    rates, variances, means, errors = (0.2, 0.1, 0.05, 0.025), [], [], []
    for eta in rates:
        loss, f = at_the_end(eta, 1.0, round(1 / eta))
        squares = np.sum((f - np.mean(f, axis=0)) ** 2, axis=1) / eta
        variances.append(float(np.mean(squares)))
        within = 4.5 + 3 * float(np.std(squares)) / n_runs**0.5
        name = f"Var f(T) / eta at fixed sigma, eta {eta}"
        findings.append(equal(name, variances[-1], 126.5, within=within))
    findings.append(
        equal("E L(T) at fixed sigma, eta 0.025", np.mean(loss), quiet, within=0.005 * quiet)
    )
    for eta, expected in zip(rates, (2066.0, 2007.0, 2045.0, 2088.0), strict=True):
        loss, _ = at_the_end(eta, (horizon / eta) ** 0.5, round(1 / eta))
        means.append(float(np.mean(loss)))
        errors.append(float(np.std(loss)) / n_runs**0.5)
        # The expected number is a mean too, of a thousand runs.
        within = 3 * errors[-1] * (1 + n_runs / 1000) ** 0.5
        findings.append(equal(f"E L(T) at fixed mu, eta {eta}", means[-1], expected, within=within))
    doublings = np.array([1.5, 0.5, -0.5, -1.5]) / 5
    trend, error = doublings @ means, np.linalg.norm(doublings * errors)
    return [
        *findings,
        at_least("least E L(T) at fixed mu", min(means), 2 * quiet),
        equal("its change with each doubling of eta", float(trend), 0.0, within=3 * float(error)),
    ]


@claim(
    "C24",
    statement="Under inertia with friction alpha, the energy Psi + |w'|^2/2 never rises, dE/dt = "
    "-alpha |w'|^2, though the loss does.",
    assumptions="Frozen kernel, one output, flat abadi, squared loss; C7's instance with "
    "alpha = 0.3, where L rises from 5.5 to 6.66",
    source="derived",
)
def energy_of_the_heavy_ball_never_rises() -> list[Finding]:
    friction, rule, times = 0.3, clipping.Abadi(1.0), np.linspace(0.0, 60.0, 3001)
    instance = rising()
    ball = gradient_flow.HeavyBallFlow(instance.flow(rule), friction)
    path = ntkdp.solve(ball, instance.outputs, times, rtol=1e-9, atol=1e-11)

    def energy(kernel: Array, state: tuple[Array, Array]) -> Array:
        # f' = J w' and w' stays in the range of J^T, hence |w'|^2 = f'^T H^-1 f'.
        residuals, v = state
        kinetic: Array = 0.5 * v @ jnp.linalg.solve(kernel, v)
        return _potential(kernel, residuals) + kinetic

    # The momentum is not recorded along a path: the states come from the velocity itself.
    states = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, state, kernel: _velocity(kernel, rule, friction, state)),
        diffrax.Tsit5(),
        t0=0.0,
        t1=60.0,
        dt0=None,
        y0=(-instance.targets[:, 0], jnp.zeros(3)),
        args=instance.kernel,
        saveat=diffrax.SaveAt(
            ts=jnp.asarray(times), fn=lambda t, state, kernel: energy(kernel, state)
        ),
        stepsize_controller=diffrax.PIDController(rtol=1e-10, atol=1e-12),
        max_steps=100_000,
    )
    along = np.asarray(states.ys)

    @jax.jit
    @jax.vmap
    def imbalance(draw: Array) -> Array:
        kernel, state = draw[:5].T @ draw[:5], (3 * draw[5], 3 * draw[6])
        change = _velocity(kernel, rule, friction, state)
        _, rate = jax.jvp(partial(energy, kernel), (state,), (change,))
        lost = friction * state[1] @ jnp.linalg.solve(kernel, state[1])
        relative: Array = jnp.abs(rate + lost) / lost
        return relative

    worst = np.max(imbalance(jax.random.normal(jax.random.key(24), (500, 7, 3))))

    eta = 1e-4
    values, vectors = np.linalg.eigh(instance.kernel)
    run = dp_sgd.run(
        _linear,
        jnp.zeros((3, 1)),
        vectors * np.sqrt(values),
        instance.targets,
        losses.SquaredError(),
        rule,
        learning_rate=eta,
        steps=600,
        optimizer=partial(optax.sgd, momentum=1 - friction * eta**0.5),
        reduction="sum",
        gradients="vmap",
        key=jax.random.key(0),
    ).rescale_time(eta**-0.5)
    predicted = np.interp(run.times, times, path.loss)
    apart = np.max(np.abs(run.loss - predicted) / predicted)
    return [
        equal("largest L", np.max(path.loss), 6.66, within=0.005),
        equal("L(0)", float(path.loss[0]), 5.5, within=1e-12),
        at_most("largest rise of the energy", np.max(np.diff(along)), 0.0, slack=1e-9),
        at_most("energy at the end / at the start", along[-1] / along[0], 1e-3),
        at_most("|dE/dt + alpha |w'|^2|, relative, 500 random states", worst, 1e-8),
        equal("largest L of a run with momentum", np.max(run.loss), 6.66, within=0.02),
        at_most("sup |L_run - L_flow| / L_flow", apart, 0.01),
    ]


def _potential(kernel: Array, residuals: Array) -> Array:
    """Psi, whose gradient is the clipped residual: Huber's loss with a sample's own threshold."""

    def of_sample(a: Array, tau: Array) -> Array:
        return losses.Huber(tau)(a[None, None], jnp.zeros((1, 1)))[0]

    return jnp.sum(jax.vmap(of_sample)(residuals, jnp.diagonal(kernel) ** -0.5))


def _velocity(
    kernel: Array, rule: clipping.ClippingRule, friction: float, state: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Velocity of residuals and their momenta, each ``(n,)``."""
    residuals, v = state
    flow = Instance(kernel, jnp.zeros((3, 1)), residuals[:, None]).flow(rule)
    ball = gradient_flow.HeavyBallFlow(flow, friction)
    (df, _), (dv, _) = ball.velocity(((residuals[:, None], None), (v[:, None], None)))
    return df[:, 0], dv[:, 0]


def _tanh_network(params: dict[str, Array], x: Array) -> Array:
    return jnp.tanh(x @ params["in"]) @ params["out"]


@claim(
    "C25",
    statement="DP-Adam with eps_adam = 0 does not depend on R while every sample is clipped: its "
    "step is the same for a gradient and noise that are both multiplied by a number.",
    assumptions="Same key, every sample clipped throughout, noise multiplier fixed",
    source="derived",
)
def adam_without_epsilon_is_independent_of_the_clipping_norm() -> list[Finding]:
    keys = jax.random.split(jax.random.key(25), 3)
    train = partial(
        dp_sgd.run,
        _tanh_network,
        {
            "in": jax.random.normal(keys[0], (4, 10)) / 2,
            "out": jax.random.normal(keys[1], (10, 2)) / 3,
        },
        (data := jax.random.normal(keys[2], (8, 6)))[:, :4],
        3 * data[:, 4:],
        losses.SquaredError(),
        learning_rate=0.02,
        steps=40,
        noise_multiplier=0.5,
        optimizer=partial(optax.adam, eps=0.0),
        groups={"in": "in", "out": "out"},
        outputs=True,
        key=jax.random.key(0),
    )

    def apart(one: ntkdp.Trajectory, other: ntkdp.Trajectory) -> float:
        f, g = np.asarray(one.outputs), np.asarray(other.outputs)
        return float(np.max(np.abs(f - g)) / np.max(np.abs(f)))

    flat = [train(clipping=clipping.Abadi(R)) for R in (0.01, 1e-3, 1e-5, 100.0)]
    layerwise = [
        train(clipping=clipping.Abadi(R, scope="layerwise"), gradients="vmap") for R in (0.01, 1e-4)
    ]
    automatic = [train(clipping=clipping.Automatic(R, gamma=0.0)) for R in (1e-4, 1e4)]
    share = min(float(np.min(run.clip_fraction)) for run in (*flat[:3], *layerwise))
    return [
        at_most("largest change of the outputs, R 0.001 for 0.01", apart(*flat[:2]), 1e-9),
        at_most("the same, R 1e-5", apart(flat[0], flat[2]), 1e-9),
        at_most("the same layerwise, plain gradients, R 1e-4 for 0.01", apart(*layerwise), 1e-9),
        at_most("the same under the automatic rule, R 1e4 for 1e-4", apart(*automatic), 1e-9),
        at_least("least clip fraction of these", share, 1.0),
        at_least("change at R = 100, which clips none", apart(flat[0], flat[3]), 0.1),
    ]


def _root(a: float, steps: int) -> Correlated:
    """The strategy (1 - a z)^(-1/2)."""
    k = np.arange(1, steps)
    return Correlated(np.cumprod(np.append(1.0, a * (k - 0.5) / k)))


def _ratio(noise: Noise, a: float, steps: int, batches: Batches) -> float:
    """Variance of a mode after the last step over that of independent noise, at equal mu."""
    response = a ** np.arange(steps)[::-1]

    def variance(noise: Noise) -> float:
        moved = response @ noise.mixing(steps)
        return noise.sensitivity(batches, steps) ** 2 * float(moved @ moved)

    return variance(noise) / variance(Independent())


def _least_ratio(a: float, period: int) -> float:
    """What no Toeplitz strategy goes below: the mean square of the folded response."""
    angles = 2 * np.pi * np.arange(2**12 * period) / (2**12 * period)
    response = 1 / np.abs(1 - a * np.exp(1j * angles))
    folded = response.reshape(period, -1).mean(axis=0)
    return float(np.mean(folded**2) / np.mean(response**2))


def _last_losses(
    x: np.ndarray,
    batches: Batches,
    kinds: Mapping[str, Noise],
    *,
    learning_rate: float,
    steps: int,
    n_seeds: int,
) -> dict[str, float]:
    """The mean loss after runs that start at its minimum, under each noise."""
    found = {}
    for name, noise in kinds.items():
        run = dp_sgd.run(
            _linear, jnp.zeros((x.shape[1], 1)), x, jnp.zeros((len(x), 1)),
            losses.SquaredError(), clipping.Abadi(1.0), learning_rate=learning_rate, steps=steps,
            noise_multiplier=_BUDGET, batches=batches, noise=noise, record_every=steps,
            gradients="vmap", key=jax.random.split(jax.random.key(40), n_seeds),
        )  # fmt: skip
        found[name] = float(np.mean(run.loss[:, -1]))
    return found


@claim(
    "C40",
    statement="With the strategy C(z) = (1 - a z)^(-1/2) a mode that shrinks by a in each step has "
    "(1 - a^2) (2 K(a)/pi)^2 times the variance that it has under independent noise of equal mu, "
    "K the complete elliptic integral of modulus a, if each sample is used once in a long run. "
    "With full batches it has 2.655 times that variance (a = 0.9, 200 steps).",
    assumptions="Noise sigma S C^-1 Z of the summed gradient, with S = R sens(C), so that mu = "
    "1/sigma; frozen kernel, squared loss, R above every norm; runs of one weight",
    source="derived; the matrix mechanism is that of Denisov et al. 2202.08312",
)
def variance_under_correlated_noise() -> list[Finding]:
    from scipy.special import ellipk

    findings = []
    for a, known, steps in ((0.9, 0.4005, 400), (0.5, 0.8638, 100), (0.99, 0.0909, 1200)):
        closed = (1 - a**2) * (2 * float(ellipk(a**2)) / np.pi) ** 2
        ratio = _ratio(_root(a, steps), a, steps, Cyclic(steps))
        findings += [
            equal(f"variance over that of independent noise, used once, a {a}", ratio, known,
                  within=5e-5),
            equal(f"the same over its closed form, a {a}", ratio / closed, 1, within=1e-3),
        ]  # fmt: skip
    a, steps, n_seeds = 0.9, 200, 2000
    kinds = {"independent": Independent(), "root": _root(a, steps)}
    # One sample a step, all of them alike: the mode shrinks by a in every step.
    once = _last_losses(
        np.ones((steps, 1)), Cyclic(steps), kinds, learning_rate=1 - a, steps=steps,
        n_seeds=n_seeds,
    )  # fmt: skip
    full = _last_losses(
        np.ones((1, 1)), Full(), kinds, learning_rate=1 - a, steps=steps, n_seeds=n_seeds
    )
    flow = gradient_flow.KernelFlow(
        np.eye(1), jnp.zeros((1, 1)), losses.SquaredError(), clipping.Abadi(1.0)
    )
    drawn = {
        name: stochastic_flow.ensemble(
            flow, jnp.zeros((1, 1)), learning_rate=1 - a, steps=steps, noise_multiplier=_BUDGET,
            noise=noise, record_every=steps,
            key=jax.random.split(jax.random.key(41), n_seeds),
        ).loss[:, -1]
        for name, noise in kinds.items()
    }  # fmt: skip
    predicted = float(np.mean(drawn["root"]) / np.mean(drawn["independent"]))
    return [
        *findings,
        equal("loss over that of independent noise, runs, used once", once["root"]
              / once["independent"], 0.4005, within=0.04),
        equal("variance over that of independent noise, full batches",
              _ratio(kinds["root"], a, steps, Full()), 2.655, within=5e-4),
        equal("loss over that of independent noise, runs, full batches", full["root"]
              / full["independent"], 2.655, within=0.25),
        equal("the same, predicted runs", predicted, 2.655, within=0.25),
    ]  # fmt: skip


@claim(
    "C41",
    statement="With full batches independent noise is the best of all Toeplitz strategies. With "
    "batches in turn, k of them, none brings the variance of a mode, over that of independent "
    "noise of equal mu, below mean (1/k sum_j |h(t + 2 pi j/k)|)^2 / mean |h|^2, where h(t) = "
    "1/(1 - a e^(it)) and the means are over t: one at k = 1.",
    assumptions="Long runs, in which a^T is small; frozen kernel, squared loss, R above every "
    "norm. Strategies that are not Toeplitz can add less noise to the steps that count more",
    source="derived",
)
def independent_noise_is_best_for_full_batches() -> list[Finding]:
    a, steps = 0.9, 200
    findings = [equal("bound at k = 1", _least_ratio(a, 1), 1, within=1e-9)]
    for k, known in ((2, 0.6219), (4, 0.4666), (100, 0.4005)):
        findings.append(equal(f"bound at k = {k}", _least_ratio(a, k), known, within=5e-5))
    rng = np.random.default_rng(41)
    strategies = [
        Correlated(np.append(1.0, scale * rng.normal(size=n) * decay ** np.arange(n)))
        for n in (1, 2, 4, 8)
        for scale in (0.05, 0.3)
        for decay in (0.5, 0.9)
        for _ in range(3)
    ] + [_root(decay, n) for decay in (0.5, 0.9, 1.0) for n in (2, 8, 32)]
    for k in (1, 2, 4):
        batches = Cyclic(k)
        optimal = Correlated.optimal(
            [1.0], learning_rate=1 - a, steps=steps, n_bands=16, batches=batches
        )
        ratios = [_ratio(noise, a, steps, batches) for noise in strategies]
        over = min(ratios) / _least_ratio(a, k)
        findings.append(
            at_least(f"least ratio of {len(strategies)} strategies over the bound, k {k}", over, 1)
        )
        reached = _ratio(optimal, a, steps, batches) / _least_ratio(a, k)
        findings.append(equal(f"that of the optimal one, k {k}", reached, 1.01, within=0.011))
        if k == 1:
            later = float(np.max(optimal.strategy[1:]))
            findings.append(at_most("its largest coefficient after the first, k 1", later, 1e-6))
    x = np.asarray(jax.random.normal(jax.random.key(42), (8, 3)))
    learning_rate = 0.5
    kinds = {
        "independent": Independent(),
        "square root": Correlated.square_root(8),
        "made for samples used once": Correlated.optimal(
            x @ x.T, learning_rate=learning_rate, steps=200, n_bands=8, batches=Cyclic(200)
        ),
        "of the other sign": Correlated([1.0, -0.3, *[0.0] * 6]),
    }
    runs = _last_losses(x, Full(), kinds, learning_rate=learning_rate, steps=200, n_seeds=400)
    findings += [
        at_least(f"loss over that of independent noise, runs, {name}",
                 runs[name] / runs["independent"], 1)
        for name in list(kinds)[1:]
    ]  # fmt: skip
    return findings
