"""All cells of a sweep, predicted at once and observed one by one."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from ntkdp import advisor
from ntkdp._backend.subgroups import subgroups
from ntkdp._results.checkpoints import CellFolder, NoFolder, open_cells
from ntkdp.comparison import CellMetrics, check_cell, measure
from ntkdp.experiment import (
    Problem,
    problem_of,
    require_infinite_width,
    require_memory,
)
from ntkdp.sweep import _cluster
from ntkdp.sweep._config import Cell, Plane, SweepConfig, cells, planes
from ntkdp.sweep._predictions import CellsPrediction, moves_at_random, predict_cells
from ntkdp.sweep._workers import (
    GroupNumbers,
    Metrics,
    Observation,
    Report,
    instructions,
    observe,
    observe_on_worker,
)

if TYPE_CHECKING:
    from distributed import Client


#: Trains some cells, and gives the number and the content of each as it finishes.
Observe: TypeAlias = Callable[[dict[int, Cell]], Iterator[tuple[int, Observation]]]


class Groups(NamedTuple):
    """Subgroups of the test samples, and their losses and accuracies in each cell.

    ``predicted`` and ``observed`` are in the order of the cells; the latter is None without runs.

    Part of what :func:`run` returns.
    """

    names: list[str]
    counts: list[int]
    predicted: list[GroupNumbers]
    observed: list[GroupNumbers] | None


class Results(NamedTuple):
    """Maps of a sweep, one entry for each plane, with cells in the order of ``cells``.

    ``kernels`` says of each cell which kernels predicted it, "frozen" or "between times", and
    ``weight_noise`` how much noise adds to the weights by the end, v(T), relative to their own
    variance. ``seconds`` has the times of the kernel, of the prediction, and of all observed cells
    together, compilation included. ``initial`` has the metrics before training. ``notes`` name the
    problems that were met on the way and solved. ``groups`` has numbers by subgroup, if
    ``data.groups`` asks for them.

    Made by :func:`run`.
    """

    config: SweepConfig
    planes: list[Plane]
    cells: list[Cell]
    initial: CellMetrics
    predicted: list[CellMetrics]
    observed: list[CellMetrics] | None
    kernels: list[str]
    weight_noise: list[float]
    gradient_norms: advisor.GradientNorms
    seconds: dict[str, float]
    notes: list[str]
    groups: Groups | None = None


def run(
    config: SweepConfig,
    folder: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    client: "Client | None" = None,
    report: Report = lambda task, done: None,
) -> Results:
    """Predict every cell of a grid, then train every cell.

    Parameters
    ----------
    config : SweepConfig
        See :func:`ntkdp.sweep.load_config`; float64 needs :func:`ntkdp.enable_x64` first.
    folder : path, optional
        Where each cell is written as it finishes. Without a folder, nothing is written.
    resume : bool
        Continue the sweep in the folder: finished cells are read, not run again, and a damaged one
        is named in ``notes`` and run again.
    overwrite : bool
        Remove the sweep in the folder first.
    client : distributed.Client, optional
        Train the cells on the workers of its dask cluster, in any order. Each worker makes the
        problem from ``config`` for itself, so a data file must be on its machine too. If all
        machines are of one kind, the results equal those without a client bit for bit. Unused if
        ``config.observe`` is false.
    report : callable, optional
        Called with a description of the current task and the fraction of it that is done.

    Returns
    -------
    Results

    Raises
    ------
    TypeError
        If ``config`` is no ``SweepConfig``, or ``client`` no client.
    ntkdp.experiment.ConfigError
        If a field does not fit the others; the message names it.
    FileExistsError, FileNotFoundError, ValueError
        If the folder holds something else, nothing to resume, or another sweep.
    MemoryError
        If the kernel, runs and predictions do not fit, before any of them is made.
    ConnectionError
        If the cluster has no workers or is lost, or the client is closed.
    RuntimeError
        If a cell failed on the cluster; the message names it. Finished cells are in the folder.

    Examples
    --------
    >>> import ntkdp
    >>> ntkdp.enable_x64()
    >>> config = ntkdp.sweep.config(
    ...     data={"n_train": 16, "n_test": 8}, model={"widths": [64]}, training={"steps": 4},
    ...     grid={"learning_rates": [0.1, 1.0], "clip_norms": [0.1, 1.0], "epsilons": [],
    ...           "noise_multipliers": [0.0]})
    >>> results = ntkdp.sweep.run(config)
    >>> results.predicted[0].test_loss.shape, results.observed[0].test_loss.shape
    ((4,), (4,))
    """
    if not isinstance(config, SweepConfig):
        raise TypeError(
            "config must be a SweepConfig, e.g. ntkdp.sweep.load_config(path), got "
            f"{type(config).__name__}"
        )
    if client is not None and config.observe:
        _cluster.check_client(client)
    maps = planes(config)
    grid = cells(config, len(maps))
    folder_cells = open_cells(folder, config, "sweep", resume=resume, overwrite=overwrite)
    report("loading data", 0.0)
    problem = problem_of(config)
    if config.prediction == "infinite":
        require_infinite_width(problem, "prediction")
    observe_missing = None
    if config.observe:
        observe_missing = partial(_observe_here, config, problem, maps)
        if client is not None:
            observe_missing = partial(_observe_on_cluster, config, problem, maps, client)
    initial = _initial(config, problem)
    observations: list[Observation] = []
    _require_room(config, problem, maps)
    with folder_cells.growing():
        predicted = folder_cells.find("predicted", partial(_prediction, initial, len(grid)))
        if predicted is None:
            predicted = predict_cells(config, problem, maps, report)
            folder_cells.write("predicted", predicted)
        grid = [
            cell if found is None else cell._replace(strategy=tuple(found))
            for cell, found in zip(grid, predicted["strategies"], strict=True)
        ]
        if observe_missing is not None:
            observations = _observations(grid, initial, folder_cells, observe_missing, report)
    seconds = {
        "kernel": predicted["kernel_seconds"],
        "prediction": predicted["prediction_seconds"],
    }
    observed = None
    if observations:
        seconds["observation"] = sum(observation["seconds"] for observation in observations)
        metrics = [observation["metrics"] for observation in observations]
        observed = _by_plane(metrics, len(maps))
    return Results(
        config,
        maps,
        grid,
        initial,
        _by_plane(predicted["metrics"], len(maps)),
        observed,
        predicted["kernels"],
        predicted["weight_noise"],
        advisor.gradient_norms(
            problem.model.apply, problem.params, problem.x, problem.targets, problem.loss
        ),
        seconds,
        folder_cells.notes,
        _groups(problem, predicted, observations),
    )


def _groups(
    problem: Problem, predicted: CellsPrediction, observations: list[Observation]
) -> Groups | None:
    if problem.test_groups is None:
        return None
    found = subgroups(problem.test_groups, len(problem.test_x))
    observed = [one["by_group"] for one in observations if one["by_group"] is not None]
    return Groups(
        list(found.names),
        found.counts.tolist(),
        [numbers for numbers in predicted["by_group"] if numbers is not None],
        observed or None,
    )


def _observations(
    grid: list[Cell],
    initial: CellMetrics,
    folder_cells: CellFolder | NoFolder,
    observe_missing: Observe,
    report: Report,
) -> list[Observation]:
    """Every cell's observation: read from disk, or else made and written at once."""
    done: dict[int, Observation] = {}
    for number in range(len(grid)):
        observation = folder_cells.find(f"{number:05d}", partial(_observation, initial))
        if observation is not None:
            done[number] = observation

    def say() -> None:
        report(f"cell {len(done) + 1} of {len(grid)}", len(done) / len(grid))

    missing = {number: cell for number, cell in enumerate(grid) if number not in done}
    if missing:
        say()
    for number, observation in observe_missing(missing):
        folder_cells.write(f"{number:05d}", observation)
        done[number] = observation
        if len(done) < len(grid):
            say()
    return [done[number] for number in range(len(grid))]


def _observation(initial: CellMetrics, content: Observation) -> Observation:
    """A cell that was read from a folder, whose content may be anything; raises if it is wrong."""
    check_cell(content["metrics"], initial.cell(0))
    return {
        "cell": content["cell"],
        "metrics": content["metrics"],
        "by_group": _checked_groups(content["by_group"]),
        "seconds": float(content["seconds"]),
    }


def _checked_groups(content: GroupNumbers | None) -> GroupNumbers | None:
    """Numbers of subgroups that were read from a folder; raises if they are wrong."""
    if content is None:
        return None
    if set(content) != {"loss", "accuracy"}:
        raise ValueError("the numbers by subgroup have other names")
    return {
        name: None if values is None else [float(value) for value in values]
        for name, values in content.items()
    }


def _prediction(initial: CellMetrics, n_cells: int, content: CellsPrediction) -> CellsPrediction:
    """The prediction of all cells, read from a folder; raises if it is wrong."""
    strategies = content["strategies"]
    of_cells = ("metrics", "by_group", "kernels", "weight_noise")
    for part in (*(content[name] for name in of_cells), strategies):  # type: ignore[literal-required]
        if len(part) != n_cells:
            raise ValueError(f"it has {len(part)} cells, not {n_cells}")
    for metrics in content["metrics"]:
        check_cell(metrics, initial.cell(0))
    return {
        "metrics": content["metrics"],
        "by_group": [_checked_groups(found) for found in content["by_group"]],
        "kernels": [str(used) for used in content["kernels"]],
        "weight_noise": [float(noise) for noise in content["weight_noise"]],
        "strategies": [
            None if found is None else [float(c) for c in found] for found in strategies
        ],
        "kernel_seconds": float(content["kernel_seconds"]),
        "prediction_seconds": float(content["prediction_seconds"]),
    }


def _observe_here(
    config: SweepConfig, problem: Problem, maps: list[Plane], missing: dict[int, Cell]
) -> Iterator[tuple[int, Observation]]:
    for number, cell in missing.items():
        yield number, observe(config, problem, maps[cell.plane], cell)


def _observe_on_cluster(
    config: SweepConfig,
    problem: Problem,
    maps: list[Plane],
    client: "Client",
    missing: dict[int, Cell],
) -> Iterator[tuple[int, Observation]]:
    for_workers = instructions(config, problem)
    numbers, tasks = {}, {}
    for number, cell in missing.items():
        plane = maps[cell.plane]
        name = (
            f"cell {number} ({plane.label}, learning rate {cell.learning_rate:g}, clipping norm "
            f"{cell.clip_norm:g})"
        )
        numbers[name] = number
        tasks[name] = (for_workers, plane, cell)
    for name, observation in _cluster.results(client, observe_on_worker, tasks):
        yield numbers[name], observation


def _by_plane(metrics: list[Metrics], n_planes: int) -> list[CellMetrics]:
    size = len(metrics) // n_planes
    return [
        CellMetrics.of_cells(metrics[plane * size : (plane + 1) * size])
        for plane in range(n_planes)
    ]


def _initial(config: SweepConfig, problem: Problem) -> CellMetrics:
    """Metrics of the network before training, which are those of a single cell."""
    return measure(
        problem.loss,
        config.training.reduction,
        float("inf"),
        (problem.outputs[None, None], problem.targets),
        (problem.test_outputs[None, None], problem.test_targets),
    )


def _require_room(config: SweepConfig, problem: Problem, maps: list[Plane]) -> None:
    training = config.training
    noisy = moves_at_random(config, maps)
    require_memory(
        problem,
        {config.prediction},
        by_layer="layerwise" in config.grid.scopes,
        whole=noisy,
        noisy=noisy,
        exact=False,
        n_seeds=training.n_seeds if config.observe else 1,
        n_drawn=training.n_predicted if noisy or training.as_batches.is_random else 1,
        steps=1,
    )
