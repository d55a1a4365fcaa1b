"""Plans of private runs held against runs: agreement of the cells, and what the choice costs.

For each data set a plan predicts its grid. Some of its cells and the recommended ones are then
trained, a few runs each, and the two are compared: Spearman's rank correlation of test losses and
accuracies over the cells, and the regret of the recommendation at each budget against the best
observed cell of that budget. Needs the extra ``data`` and the files that the arguments name.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ntkdp
from ntkdp import advisor, clipping, comparison, datasets, dp_sgd, losses, models
from ntkdp._backend import files

DELTA = 1e-5
EPSILONS = (1.0, 3.0, 8.0)
STEPS, SAMPLE_RATES = (50, 150, 500), (0.05, 0.2, 1.0)
#: Passes over the data that a run may take.
EPOCHS = 250
#: Runs of an observed cell.
N_RUNS = 2


class Case(NamedTuple):
    """A data set with its network, and the axes of its plan."""

    data: datasets.Dataset
    width: int
    learning_rates: tuple[float, ...]
    clip_norms: tuple[float, ...]

    @property
    def is_regression(self) -> bool:
        """Whether its targets are numbers."""
        return bool(self.data.task == "regression")


def cases(wine: str, housing: str) -> dict[str, Any]:
    """The data sets by name, each made when it is asked for."""
    classes = ((1.0, 4.0, 16.0, 64.0), (0.03, 0.1, 0.3, 1.0))
    numbers = ((0.1, 0.4, 1.6, 6.4), (0.1, 0.3, 1.0, 3.0))
    return {
        "digits": lambda: Case(
            datasets.digits(n_train=1297, n_test=500, standardise="unit"), 512, *classes
        ),
        "mnist5k": lambda: Case(
            datasets.mnist5k(n_train=4000, n_test=1000, standardise="unit"), 256, *classes
        ),
        "wine": lambda: Case(
            datasets.load(
                wine, target="quality", n_train=1200, n_test=399, standardise="feature"
            ),
            512, *numbers,
        ),
        "housing": lambda: Case(
            datasets.load(
                housing, target="median_house_value", missing="drop", n_train=16000, n_test=4000,
                standardise="feature",
            ),
            512, *numbers,
        ),
    }  # fmt: skip


class Network(NamedTuple):
    """A network and its data in single precision."""

    model: models.Model
    params: Any
    data: tuple[Any, Any, Any, Any]
    loss: losses.Loss

    @classmethod
    def of(cls, case: Case) -> "Network":
        """The network of a case, at its start."""
        data = case.data
        x, x_test = (jnp.asarray(part, jnp.float32) for part in (data.x_train, data.x_test))
        y, y_test = data.y_train, data.y_test
        if case.is_regression:
            y, y_test = (jnp.asarray(part, jnp.float32) for part in (y, y_test))
        model = models.mlp([case.width], data.n_outputs, activation="erf", W_std=1.5)
        loss = losses.SquaredError() if case.is_regression else losses.SoftmaxCrossEntropy()
        return cls(model, model.init(jax.random.key(0), x), (x, y, x_test, y_test), loss)


def planned(case: Case, network: Network) -> tuple[advisor.BudgetPlan, dict[str, float]]:
    """The plan, and what it took: seconds, and seconds of all cores together."""
    begun, cpu = time.perf_counter(), time.process_time()
    plan = advisor.plan_budget(
        network.model, network.params, network.data, network.loss, clipping.Abadi(1.0),
        epsilons=EPSILONS, delta=DELTA, learning_rates=case.learning_rates,
        clip_norms=case.clip_norms, steps=STEPS, sample_rates=SAMPLE_RATES,
        max_compute=EPOCHS * len(network.data[0]), key=jax.random.key(1),
    )  # fmt: skip
    taken = {"wall": time.perf_counter() - begun, "cpu": time.process_time() - cpu}
    return plan, taken | plan.seconds


def observed(
    network: Network, cell: dict[str, Any], initial_loss: float
) -> dict[str, float | bool | None]:
    """Metrics of a cell's runs at their end, the mean over runs."""
    x, y, x_test, y_test = network.data
    run = dp_sgd.run(
        network.model.apply, network.params, x, y, network.loss,
        clipping.Abadi(cell["clip_norm"]), learning_rate=cell["learning_rate"],
        steps=cell["steps"], noise_multiplier=cell["noise_multiplier"],
        sample_rate=cell["sample_rate"], test_x=x_test, test_targets=y_test,
        record_every=cell["steps"], outputs=True,
        key=jax.random.split(jax.random.key(7), N_RUNS),
    )  # fmt: skip
    assert run.outputs is not None
    assert run.test_outputs is not None
    train = (run.outputs[None, :, -1], network.loss.check(y, len(y), run.outputs.shape[-1]))
    test = (
        run.test_outputs[None, :, -1],
        network.loss.check(y_test, len(y_test), run.outputs.shape[-1]),
    )
    return comparison.measure(network.loss, "mean", initial_loss, train, test).cell(0)


def cell_of(plan: advisor.BudgetPlan, index: int) -> dict[str, Any]:
    """What a run of a planned cell needs."""
    names = ("learning_rate", "clip_norm", "steps", "sample_rate", "epsilon", "noise_multiplier")
    return {name: getattr(plan.cells, name)[index].item() for name in names}


def chosen(plan: advisor.BudgetPlan, count: int) -> list[int]:
    """Cells of the grid that are observed, the same whatever is predicted, and the recommended."""
    drawn = np.random.default_rng(0).permutation(plan.n_grid)[:count]
    return [*drawn.tolist(), *(one.index for one in plan.recommended)]


def compared(name: str, case: Case, count: int, known: dict[str, Any], kept: Path) -> None:
    """Plan, observe what is not known yet, and print how far they agree."""
    network = Network.of(case)
    plan, seconds = planned(case, network)
    print(f"== {name}: {plan.n_grid} cells, {len(plan.cells.epsilon)} with refinement")
    print({part: round(value, 1) for part, value in seconds.items()})
    print(plan, flush=True)
    numbers = chosen(plan, count)
    initial = plan.initial["loss"]
    assert initial is not None
    found = []
    for number in numbers:
        cell = cell_of(plan, number)
        asked = f"{name} {case.width} {json.dumps(cell)}"
        if asked not in known:
            known[asked] = observed(network, cell, initial)
            with files.replacing(kept) as path:
                path.write_text(json.dumps(known))
        found.append(known[asked])
    of_runs = advisor.CellMetrics.of_cells(found)
    of_plan = advisor.CellMetrics.of_cells([plan.cells.metrics.cell(i) for i in numbers])
    grid = [
        advisor.CellMetrics.of_cells([cells.cell(i) for i in range(count)])
        for cells in (of_plan, of_runs)
    ]
    agreed = comparison.agreement(*grid)
    for metric, numbers_of in agreed.metrics.items():
        if metric in ("test_loss", "test_accuracy", "test_ece"):
            print(f"{metric}: Spearman {numbers_of.spearman:.3f}, median difference "
                  f"{numbers_of.median_difference:.4f}")  # fmt: skip
    print(f"divergence called right in {agreed.divergence_called_right:.1%}")
    for place, one in enumerate(plan.recommended, start=count):
        same = [i for i, n in enumerate(numbers) if plan.cells.epsilon[n] == one.epsilon]
        at_budget = advisor.CellMetrics.of_cells([of_runs.cell(i) for i in same])
        lost = advisor.regret(at_budget, same.index(place), plan.objective)
        seen = comparison.value_of(of_runs, plan.objective)[place]
        print(f"epsilon {one.epsilon:g}: predicted {one.value:.4f} +- {one.uncertainty:.4f}, "
              f"observed {seen:.4f}, regret {lost:.4f} over {len(same)} cells")  # fmt: skip


def main() -> None:
    """Compare the plans of some data sets with runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=["digits", "mnist5k", "wine", "housing"])
    parser.add_argument("--wine", default="winequality-red.csv.gz")
    parser.add_argument("--housing", default="california_housing.csv.gz")
    parser.add_argument("--cells", type=int, default=36, help="observed cells of a grid")
    parser.add_argument("--kept", type=Path, default=Path("observed.json"), help="file of runs")
    arguments = parser.parse_args()
    known = json.loads(arguments.kept.read_text()) if arguments.kept.exists() else {}
    made = cases(arguments.wine, arguments.housing)
    print(f"ntkdp {ntkdp.__version__}, JAX {jax.__version__} on {jax.default_backend()}")
    for name in arguments.cases:
        compared(name, made[name](), arguments.cells, known, arguments.kept)


if __name__ == "__main__":
    main()
