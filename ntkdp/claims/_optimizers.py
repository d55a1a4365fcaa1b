"""Claims C42 and C47: momentum, and Adam where noise dominates."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ntkdp
from ntkdp import clipping, dp_sgd, gradient_flow, losses, stochastic_flow
from ntkdp._backend.types import Array
from ntkdp.claims._claim import Finding, at_most, claim, equal
from ntkdp.optimizers import SGD, Adam


def _linear(w: Array, x: Array) -> Array:
    return x @ w


def _linear_in_two_groups(w: dict[str, Array], x: Array) -> Array:
    half = x.shape[1] // 2
    return x[:, :half] @ w["first"] + x[:, half:] @ w["second"]


@claim(
    "C42",
    statement="With momentum beta (m <- beta m + g, w <- w - eta m) the stationary mean loss is "
    "E L = 1/2 sum_k eta sigma^2 S^2 (1 + beta) / ((1 - beta) (2 (1 + beta) - eta lam_k)).",
    assumptions="Linear model with kernel eigenvalues lam_k, squared loss (sum), R above every "
    "norm; S is the sensitivity, R flat. With the mean, eta/n takes the place of eta",
    source="derived",
)
def stationary_loss_of_the_heavy_ball() -> list[Finding]:
    eta, beta, R, sigma, n_seeds, burn_in = 0.1, 0.7, 100.0, 1e-3, 600, 100
    eigenvalues = np.linspace(0.5, 3.0, 6)
    left, right = np.asarray(jax.random.normal(jax.random.key(42), (2, 8, 6)))
    rotate, spread = np.linalg.qr(left[:6])[0], np.linalg.qr(right)[0]
    x = (rotate * np.sqrt(eigenvalues)) @ spread.T
    run = partial(
        dp_sgd.run,
        _linear_in_two_groups,
        {"first": jnp.zeros((4, 1)), "second": jnp.zeros((4, 1))},
        x,
        jnp.zeros(6),
        losses.SquaredError(),
        steps=1500,
        record_every=2,
        noise_multiplier=sigma,
        groups={"first": "first", "second": "second"},
        key=jax.random.split(jax.random.key(1), n_seeds),
    )

    def stationary(eigenvalues: np.ndarray, std: float) -> np.ndarray:
        """Variance of each mode's output."""
        left_over = (1 - beta) * (2 * (1 + beta) - eta * eigenvalues)
        variances: np.ndarray = eta * std**2 * (1 + beta) / left_over
        return variances

    closed = 0.5 * float(np.sum(stationary(eigenvalues, sigma * R)))
    flat = run(clipping=clipping.Abadi(R), learning_rate=eta, reduction="sum", optimizer=SGD(beta))
    # n times the step size makes the mean's iterates the sum's; its loss is 1/n of the sum's.
    layerwise = run(
        clipping=clipping.Abadi(np.array([3 * R, 4 * R]), scope="layerwise"),
        learning_rate=6 * eta,
        reduction="mean",
        optimizer=partial(optax.sgd, momentum=beta),
        gradients="vmap",
    )
    of_seed = np.mean(flat.loss[:, burn_in:], axis=1) / closed
    grouped = 6 * float(np.mean(layerwise.loss[:, burn_in:])) / (25 * closed)
    clipped = max(float(np.max(one.clip_fraction)) for one in (flat, layerwise))

    def predicted(kernel: np.ndarray, sigma: float, beta: float = beta) -> stochastic_flow.Moments:
        n = len(kernel)
        flow = gradient_flow.KernelFlow(
            kernel, jnp.zeros((n, 1)), losses.SquaredError(), clipping.Abadi(R), reduction="sum"
        )
        return stochastic_flow.moments(
            flow, jnp.zeros((n, 1)), learning_rate=eta, steps=1500, record_every=1500,
            noise_multiplier=sigma, optimizer=SGD(beta), outputs=True,
        )  # fmt: skip

    one_mode = predicted(np.eye(1), 1 / R, beta=0.9).covariance
    assert one_mode is not None
    moments = float(predicted(x @ x.T, sigma).loss[-1]) / closed
    return [
        equal("E L / closed form", float(np.mean(of_seed)), 1.0, within=0.005),
        at_most("its standard error", float(np.std(of_seed)) / n_seeds**0.5, 0.0015),
        equal("E L / closed form, groups with R = 300, 400, mean", grouped, 1.0, within=0.005),
        at_most("largest clip fraction", clipped, 0.0),
        equal("E L of the predicted moments / closed form", moments, 1.0, within=1e-6),
        equal(
            "variance of a mode, eta .1, beta .9, lam = sigma S = 1",
            float(one_mode[-1, 0, 0]),
            0.5135,
            within=1e-4,
        ),
    ]


@claim(
    "C47",
    statement="Where noise dominates, DP-Adam is momentum SGD at the rate eta B/(sigma S) in the "
    "end, (1 - b1) eta B/(sigma S) a step, so v(T) is about eta^2 K after K steps, whatever the "
    "privacy is.",
    assumptions="max |g| < .1 sigma S/B, as sigma >= 10 B makes sure for the mean loss, where no "
    "gradient exceeds S; K large compared with 1/(1 - b1). Linear model, 16 samples, squared loss, "
    "abadi with R = 1, sigma = 160 and 640, 1000 steps",
    source="derived",
)
def adam_is_momentum_where_noise_dominates() -> list[Finding]:
    n, seen, unseen, eta, steps, n_seeds = 16, 2, 40, 0.03, 1000, 100
    draws = np.asarray(jax.random.normal(jax.random.key(47), (n, seen)))
    # Weights of inputs that are always zero have no gradient: they show the noise alone.
    x = np.concatenate([draws, np.zeros((n, unseen))], axis=1)
    problem = (draws @ np.array([[3.0], [-3.0]]), losses.SquaredError(), clipping.Abadi(1.0))
    findings, falls = [], []
    for sigma in (160.0, 640.0):
        run = partial(
            dp_sgd.run,
            _linear,
            jnp.zeros((seen + unseen, 1)),
            x,
            *problem,
            steps=steps,
            record_every=100,
            noise_multiplier=sigma,
            test_x=np.eye(seen + unseen)[seen:],
            outputs=True,
            key=jax.random.split(jax.random.key(1), n_seeds),
        )
        adam = run(learning_rate=eta, optimizer=Adam(0.9), gradients="vmap")
        rate = (1 - 0.9) * eta * n / sigma
        momentum = run(learning_rate=rate, optimizer=SGD(0.9))
        predicted = stochastic_flow.moments(
            gradient_flow.KernelFlow(x @ x.T, *problem), jnp.zeros((n, 1)), learning_rate=rate,
            noise_multiplier=sigma, optimizer=SGD(0.9), steps=steps, record_every=100,
        )  # fmt: skip
        assert adam.test_outputs is not None
        variance = float(np.mean(np.asarray(adam.test_outputs)[:, -1] ** 2))
        mean = np.mean(adam.loss, axis=0)
        falls.append(float(mean[-1] / mean[0]))
        apart = np.max(np.abs(mean / np.mean(momentum.loss, axis=0) - 1))
        error = np.std(adam.loss, axis=0) / n_seeds**0.5
        off = np.abs(np.asarray(predicted.loss) - mean) - 0.05 * mean
        within = float(np.max(off[1:] / error[1:]))
        findings += [
            equal(
                f"v(T) / (eta^2 K), sigma {sigma:g}", variance / (eta**2 * steps), 1, within=0.05
            ),
            at_most(f"largest |E L of Adam / E L of momentum - 1|, sigma {sigma:g}", apart, 0.05),
            at_most(f"moments: error past 5%, in standard errors, sigma {sigma:g}", within, 3.0),
        ]
    noise = ntkdp.stochastic_flow.weight_noise_variance(
        problem[2], n, learning_rate=rate, steps=steps, noise_multiplier=sigma, optimizer=SGD(0.9)
    )
    return [
        *findings,
        equal("v(T) of that momentum / (eta^2 K)", noise[-1, 0] / (eta**2 * steps), 1, within=0.05),
        at_most("E L at the end / at the start, sigma 160", falls[0], 0.7),
    ]
