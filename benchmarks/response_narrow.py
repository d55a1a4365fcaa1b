"""Responses of six small networks held against runs with the same noise, run by run.

The networks, data and noise are those of a trial that shares no code with the package. Prints the
largest error of the mean loss over all steps, with its standard error, for a frozen kernel, the
noise path alone and the response; the correlation of the last losses run by run; and their spread.
"""

import argparse
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits, load_wine

import ntkdp
from ntkdp import dp_sgd, optimizers, stochastic_flow

Array = jax.Array

RUNS, AT_ONCE = 100, 25
ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu}


class Setting(NamedTuple):
    """A network, its data, and how it is trained; v is the variance of the noise by the end."""

    name: str
    kind: str
    activation: str
    width: int
    depth: int
    learning_rate: float
    v: float
    data: str = "wine"
    n: int = 64
    steps: int = 60
    momentum: float = 0.0
    sample_rate: float = 1.0
    nodes: int = 7
    draws: int = 3


SETTINGS = [
    Setting("ReLU, 3 x 64, NTK", "NTK", "relu", 64, 3, 1.0, 0.2),
    Setting("LayerNorm GELU, 2 x 128", "LayerNorm", "gelu", 128, 2, 0.3, 0.004, n=48),
    Setting("SiLU, 2 x 96, momentum", "standard", "silu", 96, 2, 0.02, 0.004, momentum=0.9),
    Setting(
        "the same, q = 0.25", "standard", "silu", 96, 2, 0.02, 0.004, momentum=0.9, sample_rate=0.25
    ),
    Setting(
        "residual GELU, 3 x 384", "residual", "gelu", 384, 3, 0.02, 0.0015, n=40, steps=40, nodes=5,
        draws=2,
    ),
    Setting(
        "digits, LayerNorm GELU, 2 x 64", "LayerNorm", "gelu", 64, 2, 0.3, 0.006, "digits", n=48,
        steps=50, sample_rate=0.5, nodes=6, draws=2,
    ),
]  # fmt: skip


def problem(setting: Setting) -> tuple[Any, Any, Array, Array]:
    """Function, parameters, inputs of norm sqrt(d) and labels."""
    x, labels = {"wine": load_wine, "digits": load_digits}[setting.data](return_X_y=True)
    chosen = np.random.default_rng(0).permutation(len(x))[: setting.n]
    x = (x - x.mean(0)) / (x.std(0) + 1e-6)
    x = x / np.linalg.norm(x, axis=1, keepdims=True) * np.sqrt(x.shape[1])
    phi, gain = ACTIVATIONS[setting.activation], 2**0.5 if setting.activation == "relu" else 1.5
    sizes = [x.shape[1], *[setting.width] * setting.depth, int(labels.max()) + 1]
    is_ntk, depth = setting.kind == "NTK", setting.depth
    params = []
    numbers = jax.random.split(jax.random.PRNGKey(3), 40)
    for layer, (key, p, q) in enumerate(zip(numbers, sizes, sizes[1:], strict=False)):
        drawn = jax.random.normal(key, (p, q), jnp.float32)
        scale = (gain if layer < depth else 1.0) / p**0.5
        bias = jax.random.normal(jax.random.fold_in(key, 1), (q,), jnp.float32)
        params.append((drawn, bias) if is_ntk else (drawn * scale, jnp.zeros_like(bias)))

    def apply(params: Any, x: Array) -> Array:
        h = x
        for layer, (weight, bias) in enumerate(params):
            scale = (gain if layer < depth else 1.0) / weight.shape[0] ** 0.5
            z = scale * h @ weight + 0.1 * bias if is_ntk else h @ weight + bias
            if layer < depth:
                if setting.kind == "LayerNorm":
                    mean, std = z.mean(-1, keepdims=True), z.std(-1, keepdims=True)
                    z = (z - mean) / (std + 1e-3)
                z = phi(z)
                if setting.kind == "residual" and layer:
                    z = (z + h) / 2**0.5
            h = z
        return h

    return apply, params, jnp.asarray(x[chosen], jnp.float32), jnp.asarray(labels[chosen])


def measured(setting: Setting) -> str:
    """A row of the table."""
    apply, params, x, labels = problem(setting)
    loss, rule = ntkdp.losses.SoftmaxCrossEntropy(), ntkdp.clipping.Abadi(1.0)
    deviation = (setting.v / setting.steps) ** 0.5 * (1 - setting.momentum)
    sigma = deviation * setting.sample_rate * setting.n / setting.learning_rate
    options: dict[str, Any] = {
        "learning_rate": setting.learning_rate,
        "steps": setting.steps,
        "noise_multiplier": sigma,
        "sample_rate": setting.sample_rate,
        "optimizer": optimizers.SGD(setting.momentum),
    }
    keys = jax.random.split(jax.random.key(1), RUNS)
    runs = np.concatenate(
        [
            dp_sgd.run(apply, params, x, labels, loss, rule, gradients="vmap", key=some, **options)
            .loss
            for some in jnp.split(keys, RUNS // AT_ONCE)
        ]
    )  # fmt: skip
    flow = stochastic_flow.ResponseFlow(apply, params, x, labels, loss, rule)
    kernel = ntkdp.KernelFlow(ntkdp.empirical_ntk(apply, params, x), labels, loss, rule)
    frozen = stochastic_flow.ensemble(kernel, apply(params, x), key=keys, **options).loss
    paths = {"frozen": np.asarray(frozen)}
    about: Literal["path", "start"]
    for name, about in (("noise path", "start"), ("response", "path")):
        paths[name] = np.asarray(
            stochastic_flow.response_ensemble(
                flow, about=about, noise_at="steps", nodes=setting.nodes, draws=setting.draws,
                key=keys, **options,
            ).loss
        )  # fmt: skip
    cells = [setting.name, f"{runs[:, 0].mean():.2f}, {runs[:, -1].mean():.3g}"]
    for path in paths.values():
        ratio = np.abs(path.mean(0) / runs.mean(0) - 1)
        # The noise is the same, so the error of the difference is that of paired runs.
        spread = (path - runs).std(0) / RUNS**0.5 / runs.mean(0)
        cells.append(f"{ratio.max():.1%} ({spread[ratio.argmax()]:.1%})")
    response = paths["response"]
    cells.append(f"{np.corrcoef(response[:, -1], runs[:, -1])[0, 1]:.3f}")
    cells.append(f"{runs[:, -1].std() / response[:, -1].std():.2f}")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, nargs="*", default=range(len(SETTINGS)))
    print("| network | loss | frozen | noise path | response | correlation | spread |")
    print("|---|---|---|---|---|---|---|")
    for number in parser.parse_args().only:
        print(measured(SETTINGS[number]), flush=True)


if __name__ == "__main__":
    main()
