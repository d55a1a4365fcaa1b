"""The table and the figure of docs/phases.md: probing, fine-tuning and both, under privacy.

`python docs/figures/fine_tuning.py` draws docs/images/fine_tuning.png and prints the table, in
about ten minutes on two cores. A network is trained on the digits 0 to 4 without privacy, gets a
new head, and learns 5 to 9 under a budget. Learning rates are chosen by what the prediction says of
the training loss; that choice is not counted in the budget. `ntkdp[data]` has the digits.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import ntkdp
from ntkdp import Phase, clipping, datasets, dp_sgd, losses, models, plotting, stochastic_flow
from ntkdp.privacy import Budget

HEAD = "2"
N, M, WIDTH, STEPS, PROBING = 500, 500, 512, 60, 30
BUDGETS, DELTA = (2.0, 0.5), 1e-4
RATES = (1.0, 2.0, 4.0, 8.0)
RUNS, PREDICTED, EVERY = 3, 32, 3
LOSS, RULE = losses.SoftmaxCrossEntropy(), clipping.Abadi(1.0)
MODEL = models.mlp([WIDTH], 5)
COLOURS = {"LP": "#1b6ca8", "FT": "#c8553d", "LP-FT": "#3a7d44"}


class Task(NamedTuple):
    """The digits 5 to 9, and a network that knows 0 to 4, with a new head."""

    x: Any
    y: Any
    test_x: Any
    test_y: Any
    params: Any


class Kernels(NamedTuple):
    """Train with train, test with train, and all with all."""

    train: Any
    test: Any
    noise: Any


class Found(NamedTuple):
    """A method at a budget: its learning rate, predictions by name, and runs."""

    rate: float
    predicted: dict[str, ntkdp.Trajectory]
    runs: ntkdp.Trajectory


def pretrained() -> Task:
    """Trained on every image of the first five digits, by Adam."""
    data = datasets.load("mnist5k", n_train=4000, n_test=1000, standardise="unit")
    x = jnp.concatenate([data.x_train, data.x_test]).astype(jnp.float32)
    y = jnp.concatenate([data.y_train, data.y_test])
    known = y < 5
    training = dp_sgd.build(
        MODEL.apply, x[known], y[known], LOSS, clipping.NoClipping(), learning_rate=0.02,
        optimizer=optax.adam,
    )  # fmt: skip
    of_body, of_head = jax.random.split(jax.random.key(0))
    state, step = training.init(MODEL.init(of_body, x)), training.compile()
    for _ in range(60):
        state, _ = step(of_body, state)
    x, y = x[~known], y[~known] - 5
    params = [*state.params[:-1], MODEL.init(of_head, x)[-1]]
    return Task(x[:N], y[:N], x[N : N + M], y[N : N + M], params)


def kernels_at(task: Task, params: Any) -> dict[str, Kernels]:
    """Those of the head, which are (x) I_K, and of the whole network."""
    everyone = jnp.concatenate([task.x, task.test_x])
    kernel = ntkdp.layerwise_ntk(MODEL.apply, params, everyone)
    head, whole = kernel.select([HEAD]).values[..., 0, 0], kernel.total

    def parts(cut: Callable[[slice, slice], Any]) -> Kernels:
        train, test, all_ = slice(N), slice(N, None), slice(None)
        return Kernels(cut(train, train), cut(test, train), cut(all_, all_))

    return {
        "head": parts(lambda i, j: ntkdp.LayerwiseKernel((HEAD,), head[:, i, j])),
        "whole": parts(lambda i, j: whole[i, j]),
    }


def predict(
    task: Task, kernels: list[Kernels], phases: Callable[[Any], list[Phase]], rates: Any
) -> ntkdp.Trajectory:
    """Runs at every learning rate; all share the eigenvalues of the noise."""
    initial = (MODEL.apply(task.params, task.x), MODEL.apply(task.params, task.test_x))
    train, test, noise = (list(kind) for kind in zip(*kernels, strict=True))

    def at(rate: Any) -> ntkdp.Trajectory:
        return stochastic_flow.ensemble_phases(
            train, task.y, LOSS, phases(rate), initial, test_kernel=test, test_targets=task.test_y,
            noise_kernel=noise, record_every=EVERY,
            key=jax.random.split(jax.random.key(1), PREDICTED),
        )  # fmt: skip

    return jax.block_until_ready(jax.vmap(at)(jnp.asarray(rates)))


def best(paths: ntkdp.Trajectory) -> int:
    """The learning rate of the least training loss at the end."""
    final = jnp.mean(paths.loss[..., -1], axis=-1)
    return int(jnp.argmin(jnp.where(jnp.isfinite(final), final, jnp.inf)))


def of_rate(paths: ntkdp.Trajectory, chosen: int) -> ntkdp.Trajectory:
    return jax.tree.map(lambda leaf: leaf[chosen], paths)


def probed(task: Task, rate: float) -> Any:
    """Parameters after a probe without noise."""
    probe = dp_sgd.build(
        MODEL.apply, task.x, task.y, LOSS, RULE, learning_rate=rate, trainable=[HEAD]
    )
    state, step = probe.init(task.params), probe.compile()
    for _ in range(PROBING):
        state, _ = step(jax.random.key(0), state)
    return state.params


def observe(task: Task, phases: list[Phase]) -> ntkdp.Trajectory:
    return dp_sgd.run_phases(
        MODEL.apply, task.params, task.x, task.y, LOSS, phases, test_x=task.test_x,
        test_targets=task.test_y, record_every=EVERY,
        key=jax.random.split(jax.random.key(2), RUNS),
    )  # fmt: skip


def at_budget(task: Task, start: dict[str, Kernels], epsilon: float) -> dict[str, Found]:
    """The three methods, each at the learning rate that its prediction chooses."""
    sigma = Budget(epsilon, DELTA).noise_multiplier(STEPS)

    def probing(rate: Any, steps: int = STEPS) -> list[Phase]:
        return [Phase(steps, RULE, rate, sigma, trainable=[HEAD])]

    def tuning(rate: Any) -> list[Phase]:
        return [Phase(STEPS, RULE, rate, sigma)]

    found = {}
    for name, phases, kernel, rates in (
        ("LP", probing, start["head"], RATES),
        ("FT", tuning, start["whole"], RATES),
    ):
        paths = predict(task, [kernel], phases, rates)
        chosen = best(paths)
        rate = rates[chosen]
        found[name] = Found(rate, {"start": of_rate(paths, chosen)}, observe(task, phases(rate)))

    def both(rate: Any) -> list[Phase]:
        released = Phase(STEPS - PROBING, RULE, rate, sigma)
        return [*probing(found["LP"].rate, PROBING), released]

    release = kernels_at(task, probed(task, found["LP"].rate))
    anew = predict(task, [start["head"], release["whole"]], both, RATES)
    chosen = best(anew)
    rate = RATES[chosen]
    stale = predict(task, [start["head"], start["whole"]], both, [rate])
    predicted = {"release": of_rate(anew, chosen), "start": of_rate(stale, 0)}
    found["LP-FT"] = Found(rate, predicted, observe(task, both(rate)))
    return found


def rows(epsilon: float, found: dict[str, Found]) -> list[str]:
    """What training ends with, predicted and observed."""
    lines = []
    for name, one in found.items():
        for kind, path in one.predicted.items():
            ends = [
                f"{np.mean(getattr(path, what)[:, -1]):.3f} / {np.mean(seen[:, -1]):.3f} "
                f"± {np.std(seen[:, -1], ddof=1):.3f}"
                for what in ("loss", "test_loss", "test_accuracy")
                for seen in [np.asarray(getattr(one.runs, what))]
            ]
            lines.append(f"| {epsilon:g} | {name} | {one.rate:g} | {kind} | {' | '.join(ends)} |")
    return lines


def draw(results: dict[float, dict[str, Found]]) -> Figure:
    """Test accuracy and test loss over the steps, a column a budget."""
    figure = Figure(figsize=(9.2, 6.4), layout="constrained")
    axes = figure.subplots(2, len(results), sharex=True, sharey="row", squeeze=False)
    for column, (epsilon, found) in zip(axes.T, results.items(), strict=True):
        for ax, what in zip(column, ("test_accuracy", "test_loss"), strict=True):
            for name, one in found.items():
                for kind, path in one.predicted.items():
                    stale = name == "LP-FT" and kind == "start"
                    label = f"{name}, predicted" + (", kernel of the start" if stale else "")
                    mean = np.mean(getattr(path, what), axis=0)
                    style = {"ls": ":" if stale else "-", "color": COLOURS[name]}
                    ax.plot(path.steps, mean, lw=1.6, label=label, **style)
                    if not stale:
                        low, high = np.quantile(getattr(path, what), (0.05, 0.95), axis=0)
                        ax.fill_between(path.steps, low, high, color=style["color"], alpha=0.12)
                seen = np.mean(getattr(one.runs, what), axis=0)
                ax.plot(
                    one.runs.steps,
                    seen,
                    "o",
                    ms=3.5,
                    color=COLOURS[name],
                    label=f"{name}, {RUNS} runs",
                )
            ax.axvline(PROBING, color="0.7", lw=0.8, zorder=0)
            ax.grid(alpha=0.2)
        column[0].set_title(f"ε = {epsilon:g}")
        column[1].set_xlabel("step (LP-FT releases the body at the grey line)")
    axes[0, 0].set_ylabel("test accuracy")
    axes[1, 0].set_ylabel("test loss")
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


if __name__ == "__main__":
    task = pretrained()
    start = kernels_at(task, task.params)
    print(
        "| ε | method | learning rate | kernel of | training loss, predicted / observed "
        "| test loss | test accuracy |\n|---|---|---|---|---|---|---|"
    )
    results = {}
    for epsilon in BUDGETS:
        results[epsilon] = at_budget(task, start, epsilon)
        print("\n".join(rows(epsilon, results[epsilon])), flush=True)
    target = Path(__file__).parent.parent / "images" / "fine_tuning.png"
    plotting.save(draw(results), target, dpi=150)
