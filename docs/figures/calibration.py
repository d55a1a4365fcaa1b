"""The figures of docs/choosing.md on calibration: reliability diagrams, and the late switch.

`make experiments` runs this file too; alone, `python docs/figures/calibration.py` takes about ten
minutes on two cores. It draws docs/images/reliability_*.png and late_switch.png and prints tables.
Names of data sets (digits, mnist5k) as arguments restrict it to them.
"""

import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import ntkdp
from ntkdp import calibration, clipping, datasets, dp_sgd, losses, models, plotting, stochastic_flow

IMAGES = Path(__file__).parent.parent / "images"
N, EPSILON, DELTA, SEEDS, PREDICTED = 1000, 8.0, 1e-4, 3, 4
WIDTH = {"digits": 512, "mnist5k": 1024}
LOSS = losses.SoftmaxCrossEntropy()


class Problem(NamedTuple):
    """Data, network and kernel of all points, in single precision."""

    model: Any
    params: Any
    train: tuple[Any, Any]
    test: tuple[Any, Any]
    kernel: Any

    @classmethod
    def of(cls, name: str) -> "Problem":
        data = datasets.load(name, n_train=N, n_test=600, standardise="unit", seed=0)
        x, test_x = (jnp.asarray(part, jnp.float32) for part in (data.x_train, data.x_test))
        model = models.mlp([WIDTH[name]], data.n_outputs, activation="erf", W_std=1.5, b_std=0.1)
        params = jax.tree.map(
            lambda leaf: leaf.astype(jnp.float32), model.init(jax.random.key(0), x)
        )
        kernel = ntkdp.infinite_ntk(model, jnp.concatenate([x, test_x]))
        return cls(model, params, (x, data.y_train), (test_x, data.y_test), kernel)


def observe(problem: Problem, phases: list[ntkdp.Phase]) -> ntkdp.Trajectory:
    """Runs of the network."""
    return dp_sgd.run_phases(
        problem.model.apply,
        problem.params,
        *problem.train,
        LOSS,
        phases,
        test_x=problem.test[0],
        test_targets=problem.test[1],
        record_every=5,
        outputs=True,
        key=jax.random.split(jax.random.key(1), SEEDS),
    )


def predict(problem: Problem, phases: list[ntkdp.Phase]) -> ntkdp.Trajectory:
    """The same from the kernel of infinite width."""
    initial = tuple(
        problem.model.apply(problem.params, x) for x, _ in (problem.train, problem.test)
    )
    return stochastic_flow.ensemble_phases(
        problem.kernel[:N, :N],
        problem.train[1],
        LOSS,
        phases,
        initial,
        test_kernel=problem.kernel[N:, :N],
        test_targets=problem.test[1],
        noise_kernel=problem.kernel,
        record_every=5,
        outputs=True,
        key=jax.random.split(jax.random.key(2), PREDICTED),
    )


def phase(R: float, rate: float, steps: int, sigma: float) -> ntkdp.Phase:
    """Flat clipping at R."""
    return ntkdp.Phase(steps, clipping.Abadi(R), rate, noise_multiplier=sigma)


def final_probabilities(path: ntkdp.Trajectory) -> jax.Array:
    """Probabilities of the test points at the end, of the first run."""
    assert path.test_outputs is not None
    return jax.nn.softmax(path.test_outputs[0, -1])


def reliability(name: str) -> Figure:
    """Small R, large R and no privacy, at the learning rates that the map advises for each."""
    problem, steps = Problem.of(name), 100
    sigma = ntkdp.privacy.noise_multiplier(EPSILON, 1.0, steps, DELTA)
    runs = {
        "small R = 0.03": [phase(0.03, 100.0, steps, sigma)],
        "large R = 3": [phase(3.0, 10.0, steps, sigma)],
        "no privacy": [phase(1e6, 30.0, steps, 0.0)],
    }
    figure = Figure(figsize=(10.2, 7.0), layout="constrained")
    panels = figure.subplots(2, 3)
    for column, (title, phases) in enumerate(runs.items()):
        for row, (side, path) in enumerate(
            {"predicted": predict(problem, phases), "observed": observe(problem, phases)}.items()
        ):
            ax = panels[row, column]
            probs = final_probabilities(path)
            calibration.reliability_diagram(probs, problem.test[1], ax=ax)
            ax.set_title(f"{title}, {side}: {ax.get_title()}", fontsize=9)
            print(f"| {name} | {title} | {side} | {' | '.join(summary(path, problem))} |")
    return figure


def summary(path: ntkdp.Trajectory, problem: Problem) -> list[str]:
    """Test accuracy, ECE, MCE and loss at the end, means over runs."""
    curves = test_curves(path, problem)
    return [
        f"{100 * np.mean(curves['accuracy'][:, -1]):.1f}%",
        f"{100 * np.mean(curves['ECE'][:, -1]):.1f}%",
        f"{100 * np.mean(curves['MCE'][:, -1]):.0f}%",
        f"{np.mean(curves['loss'][:, -1]):.3f}",
    ]


def test_curves(path: ntkdp.Trajectory, problem: Problem) -> dict[str, np.ndarray]:
    """Measured on the test set along the way, ``(S, T)``."""
    assert path.test_outputs is not None
    probs, labels = jax.nn.softmax(path.test_outputs), jnp.asarray(problem.test[1])

    def along(error: Any) -> np.ndarray:
        return np.asarray(jax.jit(jax.vmap(jax.vmap(lambda p: error(p, labels))))(probs))

    return {
        "loss": np.asarray(path.test_loss),
        "accuracy": np.asarray(path.test_accuracy),
        "ECE": along(calibration.expected_calibration_error),
        "MCE": along(calibration.maximum_calibration_error),
    }


def late_switch(name: str) -> Figure:
    """Small R throughout, large R throughout, and large R for the last tenth."""
    problem, steps, rate, small, large = Problem.of(name), 200, 10.0, 0.1, 1.0
    sigma = ntkdp.privacy.noise_multiplier(EPSILON, 1.0, steps, DELTA)
    late = steps // 10
    runs = {
        f"R = {small}": [phase(small, rate, steps, sigma)],
        f"R = {small}, then {large:g}": [
            phase(small, rate, steps - late, sigma),
            phase(large, rate, late, sigma),
        ],
        f"R = {large:g}": [phase(large, rate, steps, sigma)],
    }
    figure = Figure(figsize=(10.2, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    styles = (("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", ":"))
    for (title, phases), (colour, dashes) in zip(runs.items(), styles, strict=True):
        for side, path in (
            ("observed", observe(problem, phases)),
            ("predicted", predict(problem, phases)),
        ):
            curves = test_curves(path, problem)
            print(f"| {name} | {title} | {side} | {' | '.join(summary(path, problem))} |")
            assert path.steps is not None
            for ax, quantity in zip(panels, ("loss", "accuracy", "ECE"), strict=True):
                middle = np.mean(curves[quantity], axis=0)
                if side == "observed":
                    ax.plot(path.steps, middle, color=colour, linewidth=4.5, alpha=0.3)
                else:
                    ax.plot(path.steps, middle, color=colour, linestyle=dashes, label=title)
                ax.set_xlabel("step")
                ax.set_ylabel(f"test {quantity}")
    for ax in panels:
        ax.axvline(steps - late, color="0.6", linewidth=0.8)
        ax.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(bottom=0)
    panels[1].legend(title="predicted (wide: observed)", frameon=False, loc="lower right")
    return figure


def main(names: list[str]) -> None:
    """Draw the figures and print the rows of the tables."""
    ntkdp.enable_x64()
    start = time.perf_counter()
    for name in names:
        plotting.save(reliability(name), IMAGES / f"reliability_{name}.png", dpi=150)
    plotting.save(late_switch(names[-1]), IMAGES / "late_switch.png", dpi=150)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:] or ["digits", "mnist5k"])
