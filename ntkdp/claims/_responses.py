"""Claim C39: responses predict noisy runs of networks that a frozen kernel does not."""

import functools
import itertools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_wine

import ntkdp
from ntkdp import clipping, dp_sgd, losses, optimizers, stochastic_flow
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
