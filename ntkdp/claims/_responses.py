"""Claims C39 and C49: noisy runs of networks by their response, and of linear heads exactly."""

import functools
import itertools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import binomtest
from sklearn.datasets import load_wine

import ntkdp
from ntkdp import clipping, dp_sgd, losses, models, optimizers, stochastic_flow
from ntkdp._backend.types import ApplyFn, Array, Params
from ntkdp.claims._claim import Finding, at_least, at_most, claim, equal

_N_RUNS = 40


def _wine(n: int) -> tuple[Array, Array]:
    """Samples of norm sqrt(d), and their classes."""
    x, classes = load_wine(return_X_y=True)
    chosen = np.random.default_rng(0).permutation(len(x))[:n]
    x = (x - x.mean(0)) / x.std(0)
    x = x / np.linalg.norm(x, axis=1, keepdims=True) * x.shape[1] ** 0.5
    return jnp.asarray(x[chosen], jnp.float32), jnp.asarray(classes[chosen])


def _weights(widths: list[int]) -> list[Array]:
    """Standard normal weights."""
    keys = jax.random.split(jax.random.key(3), len(widths) - 1)
    return [
        jax.random.normal(key, shape, jnp.float32)
        for key, shape in zip(keys, itertools.pairwise(widths), strict=True)
    ]


def _standard(weights: Params, x: Array) -> Array:
    for w in weights[:-1]:
        x = jax.nn.silu(x @ w)
    outputs: Array = x @ weights[-1]
    return outputs


def _ntk(weights: Params, x: Array) -> Array:
    for w in weights[:-1]:
        x = jax.nn.relu(2**0.5 * x @ w / w.shape[0] ** 0.5)
    outputs: Array = x @ weights[-1] / weights[-1].shape[0] ** 0.5
    return outputs


@claim(
    "C39",
    statement="A run without noise, the noise on its output gradients and their linear response "
    "predict noisy clipped training of networks run by run, and so does the noise path alone while "
    "training moves the kernel little.",
    assumptions="64 and 32 wines, softmax loss, flat abadi, R = 1, full batches: SiLU, 2 x 96, in "
    "standard parameterisation, momentum 0.9, 60 steps, v = 0.004 (response), and ReLU, 2 x 256, "
    "in NTK parameterisation, 30 steps, v = 0.3 (noise path); 40 runs by plain per-sample "
    "gradients with the same noise; errors of the mean loss at every step",
    source="derived",
)
def responses_predict_networks_run_by_run() -> list[Finding]:
    findings = []
    with jax.enable_x64(False):
        silu = [1.5 * w / w.shape[0] ** 0.5 for w in _weights([13, 96, 96, 3])]
        relu = _weights([13, 256, 256, 3])
        cases = {
            "response": _losses("path", _standard, silu, 64, 0.02, 60, 0.9, 0.004),
            "noise path": _losses("start", _ntk, relu, 32, 0.5, 30, 0.0, 0.3),
        }
        for name, (observed, predicted, frozen) in cases.items():
            mean = observed.mean(0)
            error, of_frozen = (
                np.abs(loss.mean(0) / mean - 1)[1:].max() for loss in (predicted, frozen)
            )
            correlation = np.corrcoef(observed[:, -1], predicted[:, -1])[0, 1]
            spread = observed[:, -1].std() / predicted[:, -1].std()
            findings += [
                at_most(f"error of the {name}", error, 0.05),
                at_least("that of the frozen kernel, over it", of_frozen / error, 2.0),
                at_least(f"correlation of last losses, {name}", correlation, 0.85),
                equal(f"spread of last losses, runs over {name}", spread, 1.0, within=0.2),
            ]
    return findings


def _losses(
    about: Literal["path", "start"],
    apply: ApplyFn,
    weights: list[Array],
    n: int,
    rate: float,
    steps: int,
    momentum: float,
    variance: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses of runs, of their prediction by the same noise, and of a frozen kernel."""
    x, classes = _wine(n)
    loss, rule = losses.SoftmaxCrossEntropy(), clipping.Abadi(1.0)
    # Weights gather the variance v = steps (rate sigma R / n)^2 / (1 - momentum)^2.
    sigma = (variance / steps) ** 0.5 * (1 - momentum) * n / rate
    options: Any = {
        "learning_rate": rate,
        "steps": steps,
        "noise_multiplier": sigma,
        "optimizer": optimizers.SGD(momentum=momentum),
        "key": jax.random.split(jax.random.key(39), _N_RUNS),
    }
    run = functools.partial(dp_sgd.run, apply, weights, x, classes, loss, rule, gradients="vmap")
    flow = stochastic_flow.ResponseFlow(apply, weights, x, classes, loss, rule)
    respond = functools.partial(
        stochastic_flow.response_ensemble, flow, about=about, noise_at="steps"
    )
    kernel = ntkdp.KernelFlow(ntkdp.empirical_ntk(apply, weights, x), classes, loss, rule)
    freeze = functools.partial(stochastic_flow.ensemble, kernel, apply(weights, x))
    observed, predicted, frozen = (
        np.asarray(draw(**options).loss, np.float64) for draw in (run, respond, freeze)
    )
    return observed, predicted, frozen


@claim(
    "C49",
    statement="The runs that are drawn from the features of a linear head have the law of its "
    "private runs, with clipping, Poisson sampling and momentum, for training and test losses.",
    assumptions="96 wines and 48 others, 13 features and a bias in standard parameterisation, "
    "softmax loss, flat abadi, R = 2, sigma = 3, momentum 0.5, 20 steps at eta = 0.2, q = 0.3; 300 "
    "runs by plain per-sample gradients and 3000 that are drawn; means after 2, 5, 10 and 20 steps",
    source="derived",
)
def a_linear_head_is_exact_in_law() -> list[Finding]:
    x, classes = _wine(144)
    x = x.astype(jnp.float64)
    (x, x_test), (y, y_test) = (jnp.split(part, [96]) for part in (x, classes))
    model, loss, rule = models.linear(3), losses.SoftmaxCrossEntropy(), clipping.Abadi(2.0)
    params = model.init(jax.random.key(0), x)
    options: Any = {
        "learning_rate": 0.2,
        "steps": 20,
        "noise_multiplier": 3.0,
        "sample_rate": 0.3,
        "optimizer": optimizers.SGD(momentum=0.5),
    }
    observed = dp_sgd.run(
        model.apply, params, x, y, loss, rule, test_x=x_test, test_targets=y_test,
        gradients="vmap", key=jax.random.split(jax.random.key(1), 300), **options,
    )  # fmt: skip
    flow = ntkdp.KernelFlow(
        ntkdp.linear_ntk(model, x), y, loss, rule,
        test_kernel=ntkdp.linear_ntk(model, x_test, x), test_targets=y_test,
    )  # fmt: skip
    start = model.apply(params, x), model.apply(params, x_test)
    predicted = stochastic_flow.ensemble(
        flow, start, key=jax.random.split(jax.random.key(2), 3000), **options
    )
    findings = []
    for name in ("loss", "test_loss"):
        runs, drawn = (np.asarray(getattr(path, name)) for path in (observed, predicted))
        steps = [2, 5, 10, 20]
        difference = np.abs(runs.mean(0) - drawn.mean(0))[steps]
        error = np.sqrt(runs.var(0, ddof=1) / len(runs) + drawn.var(0, ddof=1) / len(drawn))[steps]
        low, high = np.quantile(drawn[:, -1], [0.05, 0.95])
        inside = int(np.sum((runs[:, -1] >= low) & (runs[:, -1] <= high)))
        words = name.replace("_", " ")
        findings += [
            at_most(f"mean {words}, off in standard errors", (difference / error).max(), 3.0),
            at_least(
                f"p-value of the runs in the 90% band, {words}",
                binomtest(inside, len(runs), 0.9).pvalue,
                0.01,
            ),
        ]
    return findings
