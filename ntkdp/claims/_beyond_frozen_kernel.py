"""Claims C33-C36: past the frozen kernel."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import erf

import ntkdp
from ntkdp import clipping, dp_sgd, gradient_flow, high_dimensional_sgd, losses, models
from ntkdp._backend.types import Array, Params, PRNGKeyArray
from ntkdp.claims._claim import Finding, at_least, at_most, claim, equal
from ntkdp.dp_sgd import State


def _difference_of_twins(params: Params, x: Array) -> Array:
    """Two tanh networks in NTK parameterisation, subtracted: zero where they are equal."""

    def network(twin: dict[str, Array]) -> Array:
        hidden = jnp.tanh(x @ twin["in"] / x.shape[1] ** 0.5)
        outputs: Array = hidden @ twin["out"] / hidden.shape[1] ** 0.5
        return outputs

    return (network(params["plus"]) - network(params["minus"])) / 2**0.5


@claim(
    "C33",
    statement="The change of the kernel over a clipped run, ||H(T) - H(0)|| / ||H(0)||, falls with "
    "the width as 1/width.",
    assumptions="One hidden tanh layer in NTK parameterisation, antisymmetric initialisation, flat "
    "abadi without noise, some samples clipped; widths 32 to 2048, averaged over 8 keys",
    source="derived",
)
def kernel_change_is_inverse_to_the_width() -> list[Finding]:
    x = jax.random.normal(jax.random.key(33), (6, 4))
    y = jnp.sign(x[:, :1])
    widths, keys = np.array([32, 256, 2048]), jax.random.split(jax.random.key(1), 8)
    algorithm = dp_sgd.build(
        _difference_of_twins,
        x,
        y,
        losses.SquaredError(),
        clipping.Abadi(0.5),
        learning_rate=0.5,
        gradients="vmap",
    )

    @eqx.filter_jit
    def change(width: int) -> tuple[Array, Array]:
        def of_network(key: PRNGKeyArray) -> tuple[Array, Array]:
            first, second = jax.random.split(key)
            twin = {
                "in": jax.random.normal(first, (x.shape[1], width)),
                "out": jax.random.normal(second, (width, 1)),
            }
            state = algorithm.init({"plus": twin, "minus": twin})

            def step(k: Array, pair: tuple[State, Array]) -> tuple[State, Array]:
                state, share = pair
                state, info = algorithm.step(key, state)
                return state, jnp.maximum(share, info.clip_fraction)

            end, share = lax.fori_loop(0, 60, step, (state, jnp.zeros(())))
            both = jax.tree.map(lambda *w: jnp.stack(w), state.params, end.params)
            before, after = jax.vmap(
                lambda params: ntkdp.empirical_ntk(_difference_of_twins, params, x)
            )(both)
            return jnp.linalg.norm(after - before) / jnp.linalg.norm(before), share

        changes, shares = jax.vmap(of_network)(keys)
        return jnp.mean(changes), jnp.min(shares)

    measured = [change(int(width)) for width in widths]
    changes = np.array([float(mean) for mean, _ in measured])
    slope = np.polyfit(np.log(widths), np.log(changes), 1)[0]
    return [
        equal("slope of log change in log width", slope, -1.0, within=0.15),
        at_least("change at width 32", changes[0], 1e-3),
        at_least(
            "least over keys of the largest clip fraction", min(float(s) for _, s in measured), 0.5
        ),
    ]


@claim(
    "C34",
    statement="Clipping moves the fixed point: with gradient noise of 2 (probability 1/3) or -1 "
    "(probability 2/3) it is max(0, 1 - c/2), not 0.",
    assumptions="the loss w^2/2 on the whole, of three samples with targets -2, 1, 1 of the "
    "constant function w; squared loss, abadi, R = c",
    source="derived",
)
def clipping_moves_the_fixed_point() -> list[Finding]:
    x, y = jnp.ones((3, 1)), jnp.array([[-2.0], [1.0], [1.0]])
    start, loss, ratios = (
        jnp.full((1, 1), 3.0),
        losses.SquaredError(),
        (0.25, 0.5, 1.0, 1.5, 2.0, 4.0),
    )
    findings = []
    for c in ratios:
        rule = clipping.Abadi(c)
        flow = gradient_flow.WeightFlow(_linear, x, y, loss, rule, reduction="sum")
        path = ntkdp.solve(flow, start, [0.0, 40.0], outputs=True)
        run = dp_sgd.run(
            _linear,
            start,
            x,
            y,
            loss,
            rule,
            learning_rate=0.2,
            steps=400,
            record_every=400,
            outputs=True,
            gradients="vmap",
            key=jax.random.key(0),
        )
        assert path.outputs is not None
        assert run.outputs is not None
        fixed = max(0.0, 1 - c / 2)
        findings += [
            equal(f"w, flow, c {c}", float(path.outputs[-1, 0, 0]), fixed, within=1e-5),
            equal(f"w, run, c {c}", float(run.outputs[-1, 0, 0]), fixed, within=1e-9),
        ]
    sampled = dp_sgd.run(
        _linear,
        start,
        x,
        y,
        loss,
        clipping.Abadi(1.0),
        learning_rate=0.02,
        steps=2000,
        record_every=10,
        sample_rate=1 / 3,
        outputs=True,
        key=jax.random.split(jax.random.key(34), 64),
    )
    assert sampled.outputs is not None
    means = np.mean(sampled.outputs[:, 100:, 0, 0], axis=1)
    return [
        *findings,
        equal("mean w, one sample a step on average, c 1", float(np.mean(means)), 0.5, within=0.02),
        at_most("its standard error", float(np.std(means)) / 8, 0.005),
    ]


def _linear(w: Array, x: Array) -> Array:
    return x @ w


@claim(
    "C35",
    statement="Clipped, noised SGD in high dimension follows the equation of its modes. In the "
    "isotropic case the risk is 0.606 at t = 0.25 and 0.111 at t = 1.",
    assumptions="One pass over Gaussian data, lam_j = 1, r(0) = 1, eta = 3, c = 0.5, zeta = 0.3, "
    "d/n = 0.1, noise of variance 0.2 for each coordinate and step; 400 runs of DP-SGD with "
    "d = 100",
    source="Marshall et al. 2406.11733; with noise derived",
)
def high_dimensional_regression_follows_its_equation() -> list[Finding]:
    def isotropic(d: int) -> high_dimensional_sgd.HighDimensionalSGD:
        R = 0.5 * d**0.5
        return high_dimensional_sgd.HighDimensionalSGD(
            jnp.ones(d),
            jnp.full(d, 1 / d),
            clip_norm=R,
            learning_rate=3.0,
            n_samples=10 * d,
            noise_multiplier=0.2**0.5 / R,
            label_noise=0.3,
        )

    times = [0.0, 0.25, 1.0]
    predicted = np.asarray(high_dimensional_sgd.solve(isotropic(200), times).risk)
    smaller = np.asarray(high_dimensional_sgd.solve(isotropic(100), times).risk)
    runs = _streaming_dp_sgd(isotropic(100), jax.random.split(jax.random.key(35), 400))
    ratio, error = np.mean(runs, axis=0) / smaller[1:], np.std(runs, axis=0) / 20 / smaller[1:]
    return [
        equal("r(1)", predicted[2], 0.111, within=5e-4),
        equal("r(0.25)", predicted[1], 0.606, within=5e-4),
        at_most("change of r(1) from d = 200 to 100", abs(smaller[2] - predicted[2]), 1e-6),
        equal("r(0.25), DP-SGD / predicted", ratio[0], 1.0, within=0.02),
        equal("r(1), DP-SGD / predicted", ratio[1], 1.0, within=0.02),
        at_most("standard error of the last", error[1], 0.01),
    ]


def _streaming_dp_sgd(problem: high_dimensional_sgd.HighDimensionalSGD, keys: Array) -> np.ndarray:
    """Risk of DP-SGD at t = 0.25 and 1, a fresh sample at every step, isotropic: (S, 2)."""
    d, n = problem.eigenvalues.size, int(problem.n_samples)
    algorithm = dp_sgd.build(
        _linear,
        jnp.zeros((1, d)),
        jnp.zeros((1, 1)),
        losses.SquaredError(),
        clipping.Abadi(problem.clip_norm),
        learning_rate=problem.learning_rate / n,
        noise_multiplier=problem.noise_multiplier,
        gradients="vmap",
    )

    @eqx.filter_jit
    @jax.vmap
    def risks(key: PRNGKeyArray) -> Array:
        def step(k: Array, state: State) -> State:
            of_data, of_step = jax.random.split(jax.random.fold_in(key, k))
            draw = jax.random.normal(of_data, (1, d + 1))
            sample, label = draw[:, :d], problem.label_noise * draw[:, d:]
            fresh = eqx.tree_at(lambda a: (a.x, a.targets), algorithm, (sample, label))
            after: State = fresh.step(of_step, state)[0]
            return after

        def proceed(state: State, span: Array) -> tuple[State, Array]:
            state = lax.fori_loop(span[0], span[1], step, state)
            return state, jnp.sum(state.params**2)

        state = algorithm.init(jnp.full((d, 1), d**-0.5))
        return lax.scan(proceed, state, jnp.array([[0, n // 4], [n // 4, n]]))[1]

    return np.asarray(risks(keys))


@claim(
    "C36",
    statement="The mean flow of DPZero is clipping with C_i = erf(c / (sqrt(2) ||g_i||)), whose "
    "sensitivity is c sqrt(2/pi).",
    assumptions="Directions u ~ N(0, I), two-point differences clipped at c = 1.5, small lam; "
    "C_i = 0.3115 at ||g|| = sqrt(14)",
    source="derived; DPZero is 2310.09639",
)
def mean_flow_of_dpzero() -> list[Finding]:
    c = 1.5
    bound = c * (2 / np.pi) ** 0.5

    def weight(s: Array) -> Array:
        return erf(c / (2**0.5 * s))

    rule = clipping.Custom(function=weight, R=bound)
    norms = jnp.concatenate([jnp.array([14**0.5]), jnp.logspace(-3, 5, 2001)])
    factors = np.asarray(rule.factors(norms))
    reach = np.max(norms * factors)
    loss = losses.SquaredError()

    x, y = jnp.array([[1.0, 2.0, 3.0]]), jnp.zeros((1, 1))
    one = _zeroth_order(
        _linear, jnp.array([[1.0], [0.0], [0.0]]), x, y, loss, rule, c, 1.0, 100_000
    )

    keys = jax.random.split(jax.random.key(36), 3)
    model = models.mlp([8], 2, activation="erf")
    inputs, targets = jax.random.normal(keys[0], (5, 3)), 4 * jax.random.normal(keys[1], (5, 2))
    params = model.init(keys[2], inputs)
    many = _zeroth_order(model.apply, params, inputs, targets, loss, rule, c, 1e-4, 50_000)
    return [
        equal("C at ||g|| = sqrt(14)", factors[0], 0.3115, within=5e-5),
        at_most("largest s w(s) / (c sqrt(2/pi))", reach / bound, 1.0, slack=1e-12),
        at_least("the same", reach / bound, 1.0 - 1e-6),
        *_agreement("linear model", *one),
        equal(
            "C by Monte Carlo, ||g|| = sqrt(14)",
            factors[0] * one[0],
            0.3115,
            within=5e-5 + factors[0] * 4 * one[1],
        ),
        *_agreement("network, 5 samples, 2 outputs", *many),
    ]


def _agreement(where: str, ratio: float, error: float) -> list[Finding]:
    return [
        equal(f"mean estimate along the flow, {where}", ratio, 1.0, within=4 * error),
        at_most(f"its standard error, {where}", error, 0.01),
    ]


def _zeroth_order(
    apply_fn: Callable[[Params, Array], Array],
    params: Params,
    x: Array,
    y: Array,
    loss: losses.Loss,
    rule: clipping.ClippingRule,
    c: float,
    lam: float,
    draws: int,
) -> tuple[float, float]:
    """Mean clipped two-point estimate along the flow's velocity, per its square; standard error."""
    flow = gradient_flow.WeightFlow(apply_fn, x, y, loss, rule, reduction="sum")
    velocity = flow.velocity(flow.init(params))
    leaves, structure = jax.tree.flatten(params)
    square = sum(jnp.sum(v**2) for v in jax.tree.leaves(velocity))

    def along(key: PRNGKeyArray) -> Array:
        keys = jax.random.split(key, len(leaves))
        u = jax.tree.unflatten(
            structure, [jax.random.normal(k, w.shape) for k, w in zip(keys, leaves, strict=True)]
        )

        def moved(sign: float) -> Array:
            return loss(apply_fn(jax.tree.map(lambda w, d: w + sign * lam * d, params, u), x), y)

        slopes = jnp.clip((moved(1.0) - moved(-1.0)) / (2 * lam), -c, c)
        inner = sum(
            jnp.sum(a * b)
            for a, b in zip(jax.tree.leaves(u), jax.tree.leaves(velocity), strict=True)
        )
        return -jnp.sum(slopes) * inner / square

    @jax.jit
    def estimate(keys: Array) -> Array:
        return jax.vmap(along)(keys)

    ratios = np.asarray(estimate(jax.random.split(jax.random.key(0), draws)))
    return float(np.mean(ratios)), float(np.std(ratios)) / draws**0.5
