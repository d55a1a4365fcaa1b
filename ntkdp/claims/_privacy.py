"""Claims C30-C32, C44 and C45: accounting."""

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import ndtr

from ntkdp import clipping, dp_sgd, gradient_flow, losses, ntk, privacy
from ntkdp._backend.types import Array, ArrayLike, Params, PRNGKeyArray
from ntkdp.claims._claim import Finding, at_least, at_most, claim, equal

_SIGMA = 0.7
_ENORMOUS = 1e6
_RATE = 0.01
_N_KEYS = 1000


class _Step(NamedTuple):
    """One step of DP-SGD, of rate 1 and with the summed gradient, on four samples and a fifth."""

    rule: clipping.ClippingRule
    noise_per_group: bool = False
    gradients: Literal["structured", "vmap"] = "vmap"


def _network(params: dict[str, Array], x: Array) -> Array:
    return jnp.tanh(x @ params["first"]) @ params["second"]


def _weights() -> tuple[dict[str, Array], Array]:
    """Parameters of two layers, and inputs of five samples."""
    keys = jax.random.split(jax.random.key(1), 3)
    shapes = {"first": (4, 8), "second": (8, 2)}
    params = {
        name: jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys[:2], shapes.items(), strict=True)
    }
    return params, jax.random.normal(keys[2], (5, 4))


def _steps() -> Iterator[_Step]:
    """Every rule, flat and layerwise, each with two clipping norms; and both options of a run."""
    params, x = _weights()
    layers = ntk.per_sample_gradient_norms(
        _network, params, x[-1:], jnp.full((1, 2), _ENORMOUS), groups=lambda path: path
    )[:, 0]
    # Just above what the enormous sample has, where the 0/1 rule lets through the most.
    cuts = {"flat": 1.00001 * jnp.linalg.norm(layers), "layerwise": 1.00001 * layers}
    sizes: dict[clipping.Scope, tuple[np.ndarray, np.ndarray]] = {
        "flat": (np.asarray(0.05), np.asarray(3.0)),
        "layerwise": (np.full(2, 0.5), np.array([0.1, 2.0])),
    }
    for scope, norms in sizes.items():
        for R in norms:
            yield _Step(clipping.Abadi(R, scope=scope))
            yield _Step(clipping.Global(R, Z=cuts[scope], scope=scope))
            yield _Step(clipping.Automatic(R, gamma=0.0, scope=scope))
            yield _Step(clipping.Automatic(R, gamma=0.01, scope=scope))
            yield _Step(clipping.PSAC(R, r=0.1, scope=scope))
    uneven = clipping.Abadi(sizes["layerwise"][1], scope="layerwise")
    yield _Step(uneven, noise_per_group=True)
    yield _Step(uneven, gradients="structured")


def _noise_over_mark(one: _Step) -> tuple[float, float]:
    """Noise of one step over the largest mark that a sample leaves on it, and its standard error.

    Both are read off the parameters after the step. The noise is their variation between keys; the
    mark is their difference, for one key, between a residual of the fifth sample and the sample's
    absence. The mark is measured in units of the noise of each layer.
    """
    params, x = _weights()
    algorithm = dp_sgd.build(
        _network,
        x,
        jnp.ones((5, 2)),
        losses.SquaredError(),
        one.rule,
        learning_rate=1.0,
        reduction="sum",
        noise_multiplier=_SIGMA,
        noise_per_group=one.noise_per_group,
        gradients=one.gradients,
    )
    sizes = np.append(np.logspace(-3, 5, 15), _ENORMOUS)
    keys = jax.random.split(jax.random.key(2), _N_KEYS)
    after = _after(
        algorithm,
        params,
        jnp.concatenate([keys, jnp.repeat(keys[:1], len(sizes))]),
        jnp.concatenate([jnp.zeros(_N_KEYS), jnp.asarray(sizes)]),
    )
    shares, relative = [], []
    for leaf in jax.tree.leaves(after):
        noise = np.asarray(leaf[:_N_KEYS]).reshape(_N_KEYS, -1)
        marks = np.asarray(leaf[_N_KEYS:]).reshape(len(sizes), -1) - noise[0]
        shares.append(np.sum(marks**2, axis=1) / np.mean(np.var(noise, axis=0, ddof=1)))
        relative.append(math.sqrt(2 / (noise.size - noise.shape[1])))
    total = np.sum(shares, axis=0)
    worst = int(np.argmax(total))
    ratio = float(total[worst]) ** -0.5
    error = np.linalg.norm([share[worst] * r for share, r in zip(shares, relative, strict=True)])
    return ratio, ratio * float(error / total[worst]) / 2


def _after(algorithm: dp_sgd.Algorithm, params: Params, keys: Array, residuals: Array) -> Params:
    """Parameters after one step, for pairs of a key and the last sample's residual.

    Not compiled as a whole: most of it is random numbers, which all rules then share.
    """

    def after(key: PRNGKeyArray, residual: Array) -> Params:
        own = _network(params, algorithm.x[-1:])[0]
        # Without inputs the network has no gradient.
        x = algorithm.x.at[-1].multiply(residual != 0)
        targets = algorithm.targets.at[-1].set(own + residual)
        there = eqx.tree_at(lambda a: (a.x, a.data.targets), algorithm, (x, targets))
        return there.step(key, there.init(params))[0].params

    return jax.vmap(after)(keys, residuals)


def _line(weight: Array, x: Array) -> Array:
    return x @ weight


def _last_weights(
    x: ArrayLike, targets: ArrayLike, rule: clipping.ClippingRule, n_keys: int, **options: Any
) -> np.ndarray:
    """Last weight of many runs of a linear model of one weight, from 0, squared loss, summed."""
    steps = options["steps"]
    path = dp_sgd.run(
        _line,
        jnp.zeros((1, 1)),
        jnp.reshape(jnp.asarray(x, float), (-1, 1)),
        jnp.reshape(jnp.asarray(targets, float), (-1, 1)),
        losses.SquaredError(),
        rule,
        reduction="sum",
        test_x=jnp.ones((1, 1)),
        record_every=steps,
        outputs=True,
        key=jax.random.split(jax.random.key(3), n_keys),
        **options,
    )
    assert path.test_outputs is not None
    return np.asarray(path.test_outputs[:, -1, 0, 0])


def _attack(
    R: float, sigma: float, sample_rate: float, epsilon: float
) -> tuple[float, float, privacy.Audit]:
    """Delta that the best test of one step attains in simulation, and its standard error.

    The audit is at the delta that is promised with this epsilon.
    """
    rule = clipping.Abadi(R)
    options = {"steps": 1, "noise_multiplier": sigma, "sample_rate": sample_rate}
    # An input of zero has no gradient: the sample is not there.
    absent, present = (
        _last_weights([x], [_ENORMOUS], rule, 100_000, learning_rate=sample_rate / R, **options)
        for x in (0.0, 1.0)
    )
    # Where the likelihood ratio of the mixture exceeds exp(epsilon).
    cut = 0.5 + sigma**2 * math.log(1 + math.expm1(epsilon) / sample_rate)
    gains = (present > cut) - math.exp(epsilon) * (absent > cut)
    promised = privacy.delta(sigma, sample_rate, 1, epsilon)
    audit = privacy.audit(present, absent, promised, confidence=0.99)
    return float(gains.mean()), float(gains.std()) / math.sqrt(len(gains)), audit


@claim(
    "C30",
    statement=(
        "Epsilon depends neither on the clipping norm nor on the rule: noise over sensitivity is "
        "sigma. The sensitivity is R for flat and sqrt(sum R_r^2) for layerwise clipping, and a "
        "sample attains it."
    ),
    assumptions="add or remove one sample; noise of the sum has standard deviation sigma times S",
    source="known",
)
def epsilon_depends_on_neither_norm_nor_rule() -> list[Finding]:
    """One step of DP-SGD by every rule, and the best attack on it."""
    measured = [_noise_over_mark(one) for one in _steps()]
    findings = []
    for name, pick in (("smallest", min), ("largest", max)):
        ratio, error = pick(measured)
        findings.append(
            equal(f"{name} noise over sensitivity, sigma = 0.7", ratio, _SIGMA, within=5 * error)
        )
    sigma, sample_rate = 0.7, 0.3
    bound = privacy.delta(sigma, sample_rate, 1, 1.0)
    for R in (0.05, 3.0):
        delta, error, audit = _attack(R, sigma, sample_rate, 1.0)
        what = f"delta that the best test attains at epsilon = 1, R = {R:g}"
        proved = f"epsilon that an audit proves where 1 is promised, R = {R:g}"
        findings += [
            equal(what, delta, bound, within=4 * error),
            at_most(proved, audit.epsilon, 1.0),
            at_least(proved, audit.epsilon, 0.8),
        ]
    return findings


@claim(
    "C31",
    statement=(
        "The central limit theorem's mu = q sqrt(K (exp(1/sigma^2) - 1)) gives epsilon 1.254 for "
        "the paper's SNLI run. It is no guarantee: a test of the largest step shows that epsilon "
        "is above 4.9, and the bounds by PLD and RDP are 5.13 and 6.50."
    ),
    assumptions="n = 550152, batch 32, sigma = 0.4, 51576 steps, delta = 1/n, Poisson sampling",
    source="paper (1.25); the rest derived",
)
def the_central_limit_understates_epsilon() -> list[Finding]:
    """The accountants side by side, above what one attack proves."""
    n, sigma, steps = 550152, 0.4, 51576
    q, delta = 32 / n, 1 / n
    figures = privacy.report(sigma, q, steps, delta)
    # The test "some step shows more than t": its two error rates bound epsilon from below.
    t = np.linspace(1.5, 4.0, 501)
    without, with_one = ndtr(-t / sigma), (1 - q) * ndtr(-t / sigma) + q * ndtr((1 - t) / sigma)
    false, true = (-np.expm1(steps * np.log1p(-p)) for p in (without, with_one))
    proved = float(np.max(np.log(np.maximum(true - delta, 1e-300) / false)))
    limit = figures.gaussian
    return [
        equal("mu", limit.mu, 0.3004, within=5e-5),
        equal("epsilon by the central limit theorem", limit.epsilon, 1.254, within=5e-4),
        equal("1 where the figure passes for a guarantee", limit.is_guarantee, 0, within=0),
        at_least("epsilon that an attack proves", proved, 4.9),
        at_least("PLD, not below the attack", figures.pld, proved),
        at_least("RDP, not below PLD", figures.rdp, figures.pld),
        equal("epsilon by PLD", figures.pld, 5.13, within=5e-3),
        equal("epsilon by RDP", figures.rdp, 6.495, within=5e-4),
    ]


@claim(
    "C32",
    statement=(
        "Released alone, the last of 1000 noisy gradient steps on a quadratic gives away a "
        "divergence of 0.0855; all steps together give away 4.5."
    ),
    assumptions=(
        "curvature lam = 1, eta = 0.1, noise of a step sqrt(2 eta s^2) with s^2 = 0.5; neighbours "
        "whose gradients differ by D = 0.3 at every weight"
    ),
    source="derived",
)
def the_last_iterate_gives_away_less() -> list[Finding]:
    """Noisy, clipped descent on twelve samples, and on one more that is always clipped."""
    n, rate, R, n_keys = 12, 0.1, 0.3, 5_000
    sigma = math.sqrt(2 * rate * 0.5) / (rate * R)
    # The samples' gradients are w / n, never clipped; the neighbour has one of -R in addition.
    x = np.append(np.full(n, n**-0.5), 1.0)
    absent = np.append(np.full(n, n**-0.5), 0.0)
    targets = np.append(np.zeros(n), _ENORMOUS)

    def divergence(steps: int) -> tuple[float, float, float]:
        # The same noise for both, so that their means differ by more than chance.
        one, other = (
            _last_weights(
                inputs,
                targets,
                clipping.Abadi(R),
                n_keys,
                learning_rate=rate,
                noise_multiplier=sigma,
                steps=steps,
            )
            for inputs in (x, absent)
        )
        v, u = np.var(one), np.var(other)
        between = (one.mean() - other.mean()) ** 2 / u
        return float(0.5 * (v / u - 1 - np.log(v / u) + between)), float(v), float(u)

    def composed(steps: int) -> float:
        return privacy.gaussian_dp(sigma, 1.0, steps, 1e-5).mu ** 2 / 2

    # Relative error of a variance, four times.
    within = 4 * math.sqrt(2 / n_keys)
    last, variance, _ = divergence(1000)
    first, _, _ = divergence(1)
    together, alone = privacy.gaussian_dp(sigma, 1.0, 1000, 1e-5).epsilon, math.sqrt(2 * last)
    return [
        equal("divergence of the last iterate", last, 0.0855, within=0.0855 * within),
        equal("divergence of all steps", composed(1000), 4.5, within=1e-9),
        equal("variance of the last weight", variance, 0.1 / 0.19, within=0.1 / 0.19 * within),
        equal("divergence of one step", first, composed(1), within=composed(1) * within),
        at_most(
            "epsilon of the last iterate, below that of all",
            privacy.gaussian_dp(1 / alone, 1.0, 1, 1e-5).epsilon,
            together / 4,
        ),
    ]


def _two_layers(rule: clipping.ClippingRule) -> dict[str, Any]:
    """A run of five samples: the fourth has no gradient, the last is always clipped."""
    return {
        "x": _weights()[1].at[3].set(0.0),
        "targets": jnp.ones((5, 2)).at[4].set(_ENORMOUS),
        "loss": losses.SquaredError(),
        "clipping": rule,
        "learning_rate": _RATE,
        "reduction": "sum",
        "noise_multiplier": _SIGMA,
    }


def _added(rule: clipping.ClippingRule, steps: int) -> np.ndarray:
    """Mu of each sample by what it adds to the steps of a run, each made with it and without it."""
    algorithm = dp_sgd.build(_network, gradients="vmap", **_two_layers(rule))

    def step(key: PRNGKeyArray, state: dp_sgd.State, there: Array) -> dp_sgd.State:
        # Without inputs a sample has no gradient.
        part: dp_sgd.Algorithm = eqx.tree_at(lambda a: a.x, algorithm, algorithm.x * there[:, None])
        after, _ = part.step(key, state)
        return after

    # All samples, and all but one.
    there = jnp.concatenate([jnp.ones((1, 5)), 1 - jnp.eye(5)])
    steps_of_all = jax.jit(jax.vmap(step, (None, None, 0)))
    state, square = algorithm.init(_weights()[0]), np.zeros(5)
    for k in range(steps):
        after = steps_of_all(jax.random.fold_in(jax.random.key(4), k), state, there)
        for leaf in jax.tree.leaves(after.params):
            square += np.sum(np.square(leaf[1:] - leaf[0]), axis=(1, 2))
        state = jax.tree.map(lambda part: part[0], after)
    mus: np.ndarray = np.sqrt(square) / (_RATE * _SIGMA * float(rule.sensitivity(2)))
    return mus


@claim(
    "C44",
    statement=(
        "With full batches a sample pays mu_i^2 = sum_k (C_ik |g_ik|)^2 / (sigma S)^2: all of the "
        "promised mu if it is clipped in every step, less if not, and nothing without a gradient. "
        "Under a frozen kernel its outputs alone say how much."
    ),
    assumptions="add or remove one sample; all steps are seen; full batches; independent noise",
    source="2206.02617; form for full batches derived",
)
def a_sample_pays_for_what_it_adds() -> list[Finding]:
    """Recorded mus against steps with and without each sample, and against a kernel's."""
    steps, findings = 6, []
    promised = privacy.gaussian_dp(_SIGMA, 1.0, steps, 1e-5).mu
    params, x = _weights()
    rules: dict[str, clipping.ClippingRule] = {
        "flat": clipping.Abadi(20.0),
        "layerwise": clipping.Abadi([5.0, 20.0], scope="layerwise"),
    }
    for scope, rule in rules.items():
        run = dp_sgd.run(
            _network,
            params,
            steps=steps,
            individual=True,
            key=jax.random.key(4),
            **_two_layers(rule),
        )
        assert run.sensitivities is not None
        mu = privacy.individual(run.sensitivities, noise_multiplier=_SIGMA).mu
        gap = float(np.max(np.abs(mu - _added(rule, steps))))
        findings += [
            equal(f"mu of the clipped sample, {scope}", mu[4], promised, within=1e-12 * promised),
            at_most(f"mu of any other sample over it, {scope}", max(mu[:4]) / promised, 0.95),
            equal(f"mu of the sample without a gradient, {scope}", mu[3], 0.0, within=0.0),
            equal(f"largest gap to what samples add to steps, {scope}", gap, 0.0, within=1e-6),
        ]
    # A linear model, whose kernel never moves: from its outputs the kernel knows the norms.
    targets, rule = jnp.ones((5, 1)), rules["flat"]
    run = dp_sgd.run(
        _line,
        jnp.zeros((4, 1)),
        x,
        targets,
        losses.SquaredError(),
        rule,
        learning_rate=_RATE,
        steps=steps,
        noise_multiplier=_SIGMA,
        individual=True,
        outputs=True,
        gradients="vmap",
        key=jax.random.key(5),
    )
    assert run.sensitivities is not None
    assert run.outputs is not None
    flow = gradient_flow.KernelFlow(x @ x.T, targets, losses.SquaredError(), rule)
    by_kernel = privacy.individual(
        flow.sensitivities(run.outputs), noise_multiplier=_SIGMA, steps=run.steps
    ).mu
    by_run = privacy.individual(run.sensitivities, noise_multiplier=_SIGMA).mu
    error = float(np.max(np.abs(by_kernel / by_run - 1)))
    return [*findings, equal("largest relative error of a kernel's mu", error, 0, within=1e-9)]


@claim(
    "C45",
    statement=(
        "If a step on full batches brings weights closer by a factor a, the last of K iterates "
        "alone is mu-GDP with mu^2 = (1 - a^K) (1 + a) / ((1 + a^K) (1 - a)) / sigma^2. For many "
        "steps that tends to mu = 4.359/sigma at a = 0.9 and 14.107/sigma at a = 0.99."
    ),
    assumptions=(
        "add or remove one sample; a quadratic loss, whose samples are not clipped, and a sample "
        "that always is; nobody sees the steps before the last"
    ),
    source="2403.00278",
)
def a_contraction_hides_early_steps() -> list[Finding]:
    """The formula against a walk, step by step, and against runs with and without a sample."""
    findings = []
    for a, expected in ((0.9, 4.359), (0.99, 14.107)):
        limit = privacy.last_iterate(1.0, 100_000, 1e-5, contraction=a).mu
        findings.append(
            equal(f"mu times sigma of many steps, a = {a}", limit, expected, within=5e-4)
        )
    n, steps, sigma, n_keys = 12, 20, 2.0, 20_000
    gap = variance = 0.0
    for _ in range(steps):
        gap, variance = 0.9 * gap + 1.0, 0.9**2 * variance + sigma**2
    found = privacy.last_iterate(sigma, steps, 1e-5, contraction=0.9)
    together = privacy.gaussian_dp(sigma, 1.0, steps, 1e-5)
    # Gradients of the samples are w/n, never clipped; that of the last is -R, or nothing.
    targets = np.append(np.zeros(n), _ENORMOUS)
    present, absent = (
        _last_weights(
            np.append(np.full(n, n**-0.5), there),
            targets,
            clipping.Abadi(1.0),
            n_keys,
            learning_rate=0.1,
            noise_multiplier=sigma,
            steps=steps,
        )
        for there in (1.0, 0.0)
    )
    measured = float(np.mean(present - absent) / np.std(absent))
    return [
        *findings,
        equal("mu of 20 steps", found.mu, gap / math.sqrt(variance), within=1e-12),
        equal("the same in runs", measured, found.mu, within=4 * found.mu / math.sqrt(2 * n_keys)),
        at_most("over mu of all 20 iterates", found.mu / together.mu, 0.95),
    ]
