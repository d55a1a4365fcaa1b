"""Where the response of a network to noise holds, and where it fails: the figure of docs/noise.md.

`make figures` runs this file, which draws docs/images/response_edges.png and prints the numbers:
about half an hour on two cores. Every point is 200 runs by plain per-sample gradients against 400
drawn responses, of one network on the wine data. With `--cache FILE` the numbers are kept in a
file, and those that it has are not measured again.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator
from sklearn.datasets import load_wine

import ntkdp
from ntkdp import clipping, dp_sgd, losses, stochastic_flow

RUNS, PREDICTED, AT_ONCE = 200, 400, 50
LOSS, RULE = losses.SoftmaxCrossEntropy(), clipping.Abadi(1.0)
#: v(T) that each point of the first panel has.
NOISES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
WIDTHS = (16, 32, 64, 128, 256, 512)
DRAWS = ((1, 7), (2, 7), (3, 7), (8, 7), (3, 2), (3, 3), (3, 5), (3, 13))


class Setting(NamedTuple):
    """A network of two hidden layers, and how it is trained."""

    variance: float = 0.1
    width: int = 64
    n: int = 64
    learning_rate: float = 0.5
    sample_rate: float = 1.0
    steps: int = 60

    def options(self) -> dict[str, Any]:
        """Noise such that v(T) is the variance asked for."""
        scale = self.learning_rate / (self.sample_rate * self.n)
        sigma = (self.variance / self.steps) ** 0.5 / scale
        return {
            "learning_rate": self.learning_rate,
            "steps": self.steps,
            "noise_multiplier": sigma,
            "sample_rate": self.sample_rate,
        }

    def problem(self) -> tuple[ntkdp.models.Model, Any, jax.Array, jax.Array]:
        """Model, parameters, inputs of norm sqrt(d) and labels."""
        x, labels = load_wine(return_X_y=True)
        chosen = np.random.default_rng(0).permutation(len(x))[: self.n]
        x = (x - x.mean(0)) / x.std(0)
        x = x / np.linalg.norm(x, axis=1, keepdims=True) * x.shape[1] ** 0.5
        model = ntkdp.models.mlp([self.width] * 2, 3, activation="gelu")
        inputs = jnp.asarray(x[chosen], jnp.float32)
        params = model.init(jax.random.key(0), inputs)
        return model, params, inputs, jnp.asarray(labels[chosen])


def observed(setting: Setting) -> np.ndarray:
    """Losses of runs."""
    model, params, x, labels = setting.problem()
    keys = jnp.split(jax.random.split(jax.random.key(1), RUNS), RUNS // AT_ONCE)
    runs = [
        dp_sgd.run(
            model.apply, params, x, labels, LOSS, RULE, gradients="vmap", key=some,
            **setting.options(),
        ).loss
        for some in keys
    ]  # fmt: skip
    return np.concatenate(runs)


def errors(setting: Setting, runs: np.ndarray, draws: int, nodes: int) -> dict[str, float]:
    """Largest errors of the mean loss over all steps, by prediction, and its standard error."""
    model, params, x, labels = setting.problem()
    keys = jax.random.split(jax.random.key(2), PREDICTED)
    flow = stochastic_flow.ResponseFlow(model.apply, params, x, labels, LOSS, RULE)
    kernel = ntkdp.KernelFlow(ntkdp.empirical_ntk(model.apply, params, x), labels, LOSS, RULE)
    options = setting.options()
    response = stochastic_flow.response_ensemble(
        flow, key=keys, draws=draws, nodes=nodes, **options
    )
    path = np.asarray(response.loss)
    mean = runs.mean(0)
    frozen = stochastic_flow.ensemble(kernel, model.apply(params, x), key=keys, **options).loss
    spread = np.sqrt(runs.var(0) / len(runs) + path.var(0) / len(path)) / mean
    return {
        "response": float(np.abs(path.mean(0) / mean - 1).max()),
        "frozen": float(np.abs(np.asarray(frozen).mean(0) / mean - 1).max()),
        "standard error": float(spread.max()),
        "loss": float(mean[-1]),
    }


class Measurements:
    """Errors of settings by their names, in a file if there is one."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.known: dict[str, dict[str, float]] = {}
        if file is not None and file.exists():
            self.known = json.loads(file.read_text())

    def of(self, name: str, setting: Setting, draws: int = 3, nodes: int = 7) -> dict[str, float]:
        """Errors of a setting, measured if they are not known, and printed."""
        if name not in self.known:
            # Each network has programs of its own, which together take too much memory.
            jax.clear_caches()
            self.known[name] = errors(setting, observed(setting), draws, nodes)
            if self.file is not None:
                self.file.write_text(json.dumps(self.known, indent=1))
        numbers = " ".join(f"{k} {v:.4f}" for k, v in self.known[name].items())
        print(f"{name:<28}", numbers, flush=True)
        return self.known[name]


def draw(measurements: Measurements) -> None:
    """Draw the figure and print everything."""
    by_noise = [measurements.of(f"v = {v:g}", Setting(variance=v)) for v in NOISES]
    by_width = [measurements.of(f"width {w}", Setting(width=w)) for w in WIDTHS]
    by_draws = [
        measurements.of(f"{d} draws, {m} times", Setting(), draws=d, nodes=m) for d, m in DRAWS
    ]
    edges = {
        "learning rate 8": Setting(learning_rate=8.0, variance=0.1),
        "8 samples": Setting(n=8),
        "batches of 2": Setting(sample_rate=1 / 32),
        "batches of 8": Setting(sample_rate=1 / 8),
    }
    for name, setting in edges.items():
        measurements.of(name, setting)
    figure = Figure(figsize=(10.5, 3.6), layout="constrained")
    noise, width, draws = figure.subplots(1, 3)
    for ax, places, found in ((noise, NOISES, by_noise), (width, WIDTHS, by_width)):
        for name, marker in (("frozen", "s"), ("response", "o")):
            label = "frozen kernel" if name == "frozen" else name
            ax.loglog(places, [100 * one[name] for one in found], marker=marker, label=label)
        error = [100 * one["standard error"] for one in found]
        ax.loglog(places, error, ":", color="0.5", label="standard error")
        ax.set_xticks(places, [f"{place:g}" for place in places], minor=False)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.set_ylabel("largest error of the mean loss (%)")
    noise.set_xlabel("noise of the weights v(T), width 64")
    width.set_xlabel("width, v(T) = 0.1")
    noise.legend()
    for varied, marker, label in ((0, "o", "draws, of 7 times"), (1, "s", "times, of 3 draws")):
        chosen = [i for i, pair in enumerate(DRAWS) if pair[1 - varied] == (7, 3)[varied]]
        chosen = sorted(chosen, key=lambda i: DRAWS[i][varied])
        draws.semilogx(
            [DRAWS[i][varied] for i in chosen],
            [100 * by_draws[i]["response"] for i in chosen],
            color="C1",
            marker=marker,
            linestyle="-" if varied else "--",
            label=label,
        )
    draws.axhline(100 * by_draws[0]["standard error"], ls=":", color="0.5", label="standard error")
    numbers = sorted({number for pair in DRAWS for number in pair})
    draws.set_xticks(numbers, [str(number) for number in numbers], minor=False)
    draws.set_xlabel("number of draws, or of times")
    draws.set_ylabel("largest error of the mean loss (%)")
    draws.set_ylim(0, 6)
    draws.legend(loc="upper right")
    for ax in (noise, width, draws):
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.xaxis.set_minor_locator(NullLocator())
    figure.savefig(Path(__file__).parent.parent / "images" / "response_edges.png", dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, help="file of numbers that are not measured again")
    draw(Measurements(parser.parse_args().cache))
