"""Independent against correlated noise over 1, 4 and 20 epochs: the figure of noise_and_batches.md.

`make figures` runs this file, which draws docs/images/correlated_noise.png and prints the numbers.
Every point is 200 runs of a network of width 1024 on digits, or 100 on MNIST, against 400 or 200
draws by its infinite-width kernels between times; nothing is fitted. All have epsilon 3 and 200
steps, whose batches take turns. Both kinds of noise are made of the same normal numbers, which
steadies the gain; every number of epochs has its own. With `--cache FILE` the numbers are kept in a
file, and those that it has are not measured again.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import ntkdp
from ntkdp import batches, clipping, datasets, dp_sgd, losses, models, privacy, stochastic_flow
from ntkdp.noise import Correlated, Independent, Noise

DATA, EPOCHS, STEPS, BANDS = ("digits", "mnist5k"), (1, 4, 20), 200, 16
KINDS, SAMPLES = ("independent", "correlated"), 600
#: Observed runs of a point. Those on MNIST draw ten times the noise.
RUNS = {"digits": 200, "mnist5k": 100}
#: Runs at once, so that memory stays small.
AT_ONCE = 50
#: Fewer epochs have smaller batches, whose noise allows for smaller steps.
RATES = {1: 0.1, 4: 0.2, 20: 0.4}
LOSS, RULE = losses.SoftmaxCrossEntropy(), clipping.Abadi(1.0)
BUDGET = privacy.Budget(3.0, 1e-5)
#: Final losses, predicted and observed, by data, epochs and noise.
Numbers: TypeAlias = dict[str, dict[str, list[float]]]


class Losses(NamedTuple):
    """Final losses, predicted and observed."""

    predicted: np.ndarray
    observed: np.ndarray

    def error(self) -> float:
        """Error of the predicted mean, relative."""
        return float(self.predicted.mean() / self.observed.mean() - 1)


class Problem:
    """A wide network, its data and its kernel."""

    def __init__(self, name: str, n: int) -> None:
        data = datasets.load(name, n_train=n, n_test=1, standardise="unit")
        self.x = jnp.asarray(data.x_train, jnp.float32)
        self.labels = data.y_train
        self.model = models.mlp([1024], data.n_outputs)
        self.params = self.model.init(jax.random.key(0), self.x)
        self.start = self.model.apply(self.params, self.x)

    def noises(self, drawn: batches.Batches, learning_rate: float) -> dict[str, Noise]:
        """Independent noise, and the strategy that is best for the kernel of the network."""
        kernel = ntkdp.infinite_ntk(self.model, self.x)
        flow = ntkdp.KernelFlow(kernel, self.labels, LOSS, RULE)
        best = stochastic_flow.optimal_noise(
            flow, self.start, learning_rate=learning_rate, steps=STEPS, n_bands=BANDS, batches=drawn
        )
        assert isinstance(best, Correlated)
        return {"independent": Independent(), "correlated": best}

    def losses(self, epochs: int, noise: Noise, runs: int) -> Losses:
        """Predicted and observed losses after the last step."""
        options: dict[str, Any] = {
            "learning_rate": RATES[epochs], "steps": STEPS, "noise_multiplier": BUDGET,
            "batches": drawn_in(epochs), "noise": noise, "record_every": STEPS,
        }  # fmt: skip
        flow = stochastic_flow.TwoTimeFlow(self.model, self.x, self.labels, LOSS, RULE)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), epochs), 2 * runs)
        predicted = stochastic_flow.two_time_ensemble(
            flow, self.start, nodes=8, rank=64, key=keys, **options
        )
        keys = jax.random.split(jax.random.fold_in(jax.random.key(2), epochs), runs)
        observed = [
            dp_sgd.run(
                self.model.apply, self.params, self.x, self.labels, LOSS, RULE,
                key=keys[first : first + AT_ONCE], **options,
            ).loss[:, -1]
            for first in range(0, runs, AT_ONCE)
        ]  # fmt: skip
        return Losses(np.asarray(predicted.loss)[:, -1], np.concatenate(observed))


def drawn_in(epochs: int) -> batches.Batches:
    """The batches of so many epochs in all steps."""
    return batches.Cyclic(STEPS // epochs)


def measured(
    chosen: list[str], cache: Path | None, runs: int | None
) -> dict[str, dict[str, list[float]]]:
    """Final losses by data, epochs and noise, from a file if there is one."""
    known: Numbers = {}
    if cache is not None and cache.exists():
        known = json.loads(cache.read_text())
    for data in chosen:
        problem = Problem(data, SAMPLES)
        for epochs in EPOCHS:
            noises = None
            for kind in KINDS:
                name = f"{data}, {epochs} epochs, {kind}"
                if name in known:
                    continue
                noises = noises or problem.noises(drawn_in(epochs), RATES[epochs])
                jax.clear_caches()
                final = problem.losses(epochs, noises[kind], runs or RUNS[data])
                known[name] = {part: values.tolist() for part, values in final._asdict().items()}
                print(f"{name:<36} {final.error():+.1%}", flush=True)
                if cache is not None:
                    cache.write_text(json.dumps(known))
    return known


def draw(chosen: list[str], numbers: Numbers) -> None:
    """Draw the figure, and print means, errors and gains."""
    figure = Figure(figsize=(0.4 + 4.3 * len(chosen), 3.8), layout="constrained")
    axes = figure.subplots(1, len(chosen), squeeze=False)[0]
    for ax, data in zip(axes, chosen, strict=True):
        places = np.arange(len(EPOCHS))
        for number, kind in enumerate(KINDS):
            cells = [numbers[f"{data}, {epochs} epochs, {kind}"] for epochs in EPOCHS]
            for shift, (part, marker) in enumerate((("predicted", "o"), ("observed", "x"))):
                means, spreads = np.array([[np.mean(c[part]), np.std(c[part])] for c in cells]).T
                at = places + 0.2 * (number - 0.5) + 0.07 * (shift - 0.5)
                ax.errorbar(
                    at, means, spreads, fmt=marker, color=f"C{number}", capsize=3,
                    markerfacecolor="none", label=f"{kind} noise, {part}",
                )  # fmt: skip
        ax.set_xticks(places, [str(epochs) for epochs in EPOCHS])
        ax.set_xlabel("epochs in 200 steps")
        ax.set_ylabel("final loss")
        ax.set_title({"digits": "digits", "mnist5k": "MNIST"}[data])
        for epochs in EPOCHS:
            print(data, epochs, *gains(numbers, data, epochs))
    figure.axes[-1].legend(fontsize="small")
    figure.savefig(Path(__file__).parent.parent / "images" / "correlated_noise.png", dpi=150)


def gains(numbers: Numbers, data: str, epochs: int) -> list[str]:
    """How much of the loss correlated noise saves, predicted and observed, and the errors."""
    cells = {kind: numbers[f"{data}, {epochs} epochs, {kind}"] for kind in KINDS}
    words = []
    for part in ("predicted", "observed"):
        one, other = (np.array(cells[kind][part]) for kind in KINDS)
        saved = one - other
        words.append(
            f"{part}: {one.mean():.3f} and {other.mean():.3f}, gain {saved.mean():.3f} "
            f"+- {saved.std() / np.sqrt(saved.size):.3f}"
        )
    return words


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, help="file of numbers that are not measured again")
    parser.add_argument("--runs", type=int, help="observed runs of a point")
    parser.add_argument(
        "--data", nargs="*", default=list(DATA), choices=DATA, help="by default all"
    )
    given = parser.parse_args()
    draw(given.data, measured(given.data, given.cache, given.runs))
