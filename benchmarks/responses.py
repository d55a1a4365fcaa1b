"""Responses of networks to noise held against independent runs, into docs/responses.md.

Twelve settings over architectures, parameterisations, optimizers, batches and budgets. Each is run
a hundred times with plain per-sample gradients, and predicted by the response, by a frozen kernel
and, where the network has one, by kernels between times at infinite width.
"""

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import binomtest
from sklearn.datasets import load_digits, load_wine

import ntkdp
from ntkdp import dp_sgd, optimizers, stochastic_flow
from ntkdp._backend import files

Array = jax.Array
Apply = Callable[[Any, Array], Array]

PAGE = Path(__file__).parent.parent / "docs" / "responses.md"
DELTA = 1e-3
N_RUNS, N_PREDICTED, AT_ONCE = 100, 400, 25
NODES, DRAWS = 7, 3
ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


class Setting(NamedTuple):
    """A network, its data, and how it is trained."""

    kind: str
    width: int
    depth: int
    activation: str
    parameterization: str
    data: str
    n: int
    optimizer: optimizers.Optimizer
    learning_rate: float
    steps: int
    sample_rate: float
    epsilon: float

    @property
    def name(self) -> str:
        """The network in words."""
        return (
            f"{self.kind} {self.activation}, {self.depth} x {self.width}, {self.parameterization}"
        )

    @property
    def training(self) -> str:
        """The training in words."""
        optimizer = type(self.optimizer).__name__
        if isinstance(self.optimizer, optimizers.SGD) and float(self.optimizer.momentum):
            optimizer = f"momentum {float(self.optimizer.momentum):g}"
        batches = "full" if self.sample_rate == 1 else f"q = {self.sample_rate:g}"
        return f"{optimizer}, {batches}, ε = {self.epsilon:g}"


SGD, MOMENTUM, ADAM = optimizers.SGD(), optimizers.SGD(momentum=0.9), optimizers.Adam()
SETTINGS = [
    Setting("dense", 256, 3, "relu", "NTK", "wine", 96, SGD, 0.3, 60, 0.25, 8),
    Setting("dense", 128, 2, "gelu", "standard", "wine", 96, MOMENTUM, 0.01, 60, 1.0, 3),
    Setting("dense", 1024, 1, "tanh", "NTK", "digits", 96, SGD, 0.5, 50, 1.0, 3),
    Setting("dense", 256, 2, "silu", "standard", "wine", 96, ADAM, 0.0005, 60, 0.1, 1),
    Setting("CNN", 16, 2, "relu", "NTK", "digits", 64, SGD, 0.3, 50, 0.5, 8),
    Setting("CNN", 24, 2, "gelu", "standard", "digits", 64, MOMENTUM, 0.01, 50, 0.25, 8),
    Setting("LayerNorm", 64, 2, "gelu", "standard", "wine", 96, SGD, 0.15, 60, 1.0, 3),
    Setting("LayerNorm", 256, 2, "relu", "NTK", "digits", 64, MOMENTUM, 0.05, 50, 1.0, 8),
    Setting("residual", 128, 3, "gelu", "standard", "wine", 96, ADAM, 0.001, 60, 1.0, 8),
    Setting("residual", 64, 3, "relu", "NTK", "wine", 128, SGD, 0.3, 60, 0.05, 8),
    Setting("attention", 32, 1, "gelu", "standard", "digits", 64, SGD, 0.1, 50, 0.5, 8),
    Setting("attention", 64, 1, "gelu", "standard", "digits", 64, ADAM, 0.001, 50, 0.5, 3),
]


def data_of(setting: Setting) -> tuple[Array, Array, int]:
    """Samples of norm sqrt(d), labels, and the number of classes."""
    load = {"wine": load_wine, "digits": load_digits}[setting.data]
    x, labels = load(return_X_y=True)
    chosen = np.random.default_rng(0).permutation(len(x))[: setting.n]
    x = (x - x.mean(0)) / (x.std(0) + 1e-6)
    x = x / np.linalg.norm(x, axis=1, keepdims=True) * np.sqrt(x.shape[1])
    n_classes = int(labels.max()) + 1
    return jnp.asarray(x[chosen], jnp.float32), jnp.asarray(labels[chosen]), n_classes


def network_of(setting: Setting, n_inputs: int, n_outputs: int) -> tuple[Any, Apply]:
    """Parameters and function, written out so that no layer of the package is used."""
    phi = ACTIVATIONS[setting.activation]
    gain = 2**0.5 if setting.activation == "relu" else 1.5
    is_ntk = setting.parameterization == "NTK"
    numbers = iter(jax.random.split(jax.random.key(3), 100))
    width = setting.width

    def matrix(*shape: int, scale: float = gain) -> tuple[Array, float]:
        """A weight and the factor that it is multiplied with."""
        fan_in = int(np.prod(shape[:-1]))
        drawn = jax.random.normal(next(numbers), shape, jnp.float32)
        size = scale / fan_in**0.5
        return (drawn, size) if is_ntk else (drawn * size, 1.0)

    def normalised(z: Array) -> Array:
        return (z - z.mean(-1, keepdims=True)) / (z.std(-1, keepdims=True) + 1e-3)

    if setting.kind == "CNN":
        layers = [matrix(3, 3, 1, width), matrix(3, 3, width, width), matrix(width, n_outputs)]

        def cnn(p: Any, x: Array) -> Array:
            h = x.reshape(-1, 8, 8, 1)
            for weight, (_, size) in zip(p[:2], layers[:2], strict=True):
                h = phi(
                    size
                    * jax.lax.conv_general_dilated(
                        h, weight, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
                    )
                )
            return layers[2][1] * 4 * h.mean((1, 2)) @ p[2]

        return [weight for weight, _ in layers], cnn
    if setting.kind == "attention":
        parts = {
            "in": matrix(8, width, scale=1.0),
            "query": matrix(width, width, scale=1.0),
            "key": matrix(width, width, scale=1.0),
            "value": matrix(width, width, scale=1.0),
            "up": matrix(width, 2 * width),
            "down": matrix(2 * width, width, scale=1.0),
            "out": matrix(width, n_outputs, scale=1.0),
        }
        places = jnp.asarray(np.random.default_rng(1).standard_normal((8, width)), jnp.float32)

        def block(p: Any, x: Array) -> Array:
            w = {name: parts[name][1] * p[name] for name in parts}
            h = x.reshape(-1, 8, 8) @ w["in"] + 0.5 * places
            z = normalised(h)
            scores = (z @ w["query"]) @ jnp.swapaxes(z @ w["key"], 1, 2) / width**0.5
            h = h + jax.nn.softmax(scores, axis=-1) @ (z @ w["value"])
            h = h + phi(normalised(h) @ w["up"]) @ w["down"]
            return normalised(h).mean(1) @ w["out"]

        return {name: weight for name, (weight, _) in parts.items()}, block
    sizes = [n_inputs, *[width] * setting.depth, n_outputs]
    layers = [
        matrix(before, after, scale=gain if i < setting.depth else 1.0)
        for i, (before, after) in enumerate(itertools.pairwise(sizes))
    ]

    def dense(p: Any, x: Array) -> Array:
        h = x
        for i, (weight, (_, size)) in enumerate(zip(p[:-1], layers[:-1], strict=True)):
            z = size * h @ weight
            z = phi(normalised(z) if setting.kind == "LayerNorm" else z)
            h = (z + h) / 2**0.5 if setting.kind == "residual" and i else z
        return layers[-1][1] * h @ p[-1]

    return [weight for weight, _ in layers], dense


class Row(NamedTuple):
    """Errors of the mean loss of each prediction, and how the response's bands hold."""

    start: float
    end: float
    errors: dict[str, float]
    standard_error: float
    spread: float
    p_values: list[float]


def measured(setting: Setting, cache: Path | None) -> Row:
    """Run and predict a setting."""
    x, labels, n_classes = data_of(setting)
    params, apply_fn = network_of(setting, x.shape[1], n_classes)
    loss, rule = ntkdp.losses.SoftmaxCrossEntropy(), ntkdp.clipping.Abadi(1.0)
    budget = ntkdp.privacy.Budget(setting.epsilon, DELTA)
    sigma = budget.noise_multiplier(setting.steps, setting.sample_rate)
    options: dict[str, Any] = {
        "learning_rate": setting.learning_rate,
        "steps": setting.steps,
        "noise_multiplier": sigma,
        "sample_rate": setting.sample_rate,
        "optimizer": setting.optimizer,
    }

    def runs() -> np.ndarray:
        keys = jax.random.split(jax.random.key(7), N_RUNS)
        losses = [
            dp_sgd.run(
                apply_fn, params, x, labels, loss, rule, gradients="vmap", key=some, **options
            ).loss
            for some in jnp.split(keys, N_RUNS // AT_ONCE)
        ]
        return np.concatenate(losses)

    stored = None if cache is None else cache / f"{SETTINGS.index(setting)}.npy"
    if stored is not None and stored.exists():
        observed = np.load(stored)
    else:
        observed = runs()
        if stored is not None:
            np.save(stored, observed)
    keys = jax.random.split(jax.random.key(11), N_PREDICTED)
    predicted: dict[str, np.ndarray] = {}
    network = stochastic_flow.ResponseFlow(apply_fn, params, x, labels, loss, rule)
    response = stochastic_flow.response_ensemble(
        network, key=keys, nodes=NODES, draws=DRAWS, **options
    )
    predicted["response"] = np.asarray(response.loss)
    if setting.optimizer.is_linear:
        kernel = ntkdp.KernelFlow(ntkdp.empirical_ntk(apply_fn, params, x), labels, loss, rule)
        frozen = stochastic_flow.ensemble(kernel, apply_fn(params, x), key=keys, **options)
        predicted["frozen"] = np.asarray(frozen.loss)
    mean = observed.mean(0)
    errors = {
        name: float(np.abs(path.mean(0) / mean - 1)[1:].max()) for name, path in predicted.items()
    }
    path = predicted["response"]
    low, high = np.quantile(path, [0.05, 0.95], axis=0)
    quarters = [round(setting.steps * quarter / 4) for quarter in (1, 2, 3, 4)]
    inside = [int(np.sum((observed >= low) & (observed <= high), axis=0)[k]) for k in quarters]
    uncertainty = np.sqrt(observed.var(0) / len(observed) + path.var(0) / len(path)) / mean
    return Row(
        start=float(mean[0]),
        end=float(mean[-1]),
        errors=errors,
        standard_error=float(uncertainty[1:].max()),
        spread=float(observed[:, -1].std() / path[:, -1].std()),
        p_values=[binomtest(count, len(observed), 0.9).pvalue for count in inside],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of settings; none is written")
    parser.add_argument("--cache", type=Path, help="folder where observed losses are kept")
    arguments = parser.parse_args()
    chosen = range(len(SETTINGS)) if arguments.only is None else arguments.only
    rows = {}
    for number in chosen:
        # Each network has programs of its own, and together they take too many pieces of memory.
        jax.clear_caches()
        rows[number] = measured(SETTINGS[number], arguments.cache)
        print(number, line(SETTINGS[number], rows[number]), flush=True)
    if arguments.only is None:
        with files.replacing(PAGE) as temporary:
            temporary.write_text(page(rows))


def line(setting: Setting, row: Row) -> str:
    """A row of the table."""
    shown = [
        setting.name,
        setting.training,
        f"{row.start:.2f}, {row.end:.3f}",
        f"{row.errors['frozen']:.1%}" if "frozen" in row.errors else "none",
        f"{row.errors['response']:.1%} ({row.standard_error:.1%})",
        f"{row.spread:.2f}",
        f"{min(row.p_values):.2g}",
    ]
    return f"| {' | '.join(shown)} |"


def page(rows: dict[int, Row]) -> str:
    """The page with its table."""
    errors = [row.errors["response"] for row in rows.values()]
    better = sum(
        "frozen" not in row.errors or row.errors["response"] < row.errors["frozen"]
        for row in rows.values()
    )
    held = sum(min(row.p_values) >= 0.01 for row in rows.values())
    table = "\n".join(line(SETTINGS[number], row) for number, row in rows.items())
    return f"""# Responses, measured

`make responses` writes this page. Each setting is run {N_RUNS} times by `dp_sgd.run` with plain
per-sample gradients, which share no code with the predictions. It is predicted by {N_PREDICTED}
draws of `stochastic_flow.response_ensemble` ({NODES} times, {DRAWS} draws of the noise) and, where
the optimizer is linear, of `stochastic_flow.ensemble` under the kernel of the start. R = 1,
δ = {DELTA:g}, single precision.

*loss* is the mean one at the start and the end. *error* is the largest error of the mean loss over
all steps, with the largest standard error of the difference in brackets. *spread* is the standard
deviation of the last loss, of runs over predicted. *least p* is the least of four two-sided
binomial tests of the 90% band, one at each quarter of the horizon.

| network | training | loss | error, frozen | error, response | spread | least p |
|---|---|---|---|---|---|---|
{table}

The median error of the response is {np.median(errors):.1%} and the worst {max(errors):.1%}. It is
better than the frozen kernel in {better} of {len(rows)} settings, and the bands are not rejected
at 1% in {held}.
"""


if __name__ == "__main__":
    main()
