"""All cells of a sweep, predicted at once and observed one by one."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from ntkdp import advisor, gradient_flow
from ntkdp._results.checkpoints import CellFolder
from ntkdp.comparison import CellMetrics, check_cell, measure
from ntkdp.experiment import Kernel, Problem, compute_kernel, problem_of, require_memory
from ntkdp.sweep import _cluster
from ntkdp.sweep._config import Cell, Plane, SweepConfig, cells, planes
from ntkdp.sweep._workers import instructions, observe, observe_as_told, rule_of

if TYPE_CHECKING:
    from distributed import Client


#: Called with what is being done and the fraction of it that is done.
Report = Callable[[str, float], None]


class Results(NamedTuple):
    """Maps of a sweep, a plane an entry; of each the cells in the order of ``cells``.

    ``seconds`` are those of the kernels, of the prediction, and of all observed cells together,
    compilation included. ``initial`` are the metrics before training. ``notes`` say what went wrong
    on the way and was put right.

    Made by :func:`run`.
    """

    config: SweepConfig
    planes: list[Plane]
    cells: list[Cell]
    initial: CellMetrics
    predicted: list[CellMetrics]
    observed: list[CellMetrics] | None
    gradient_norms: advisor.GradientNorms
    seconds: dict[str, float]
    notes: list[str]


def run(
    config: SweepConfig,
    folder: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    client: "Client | None" = None,
    report: Report = lambda what, done: None,
) -> Results:
    """Predict every cell of a grid, then train every cell.

    Parameters
    ----------
    config : SweepConfig
        See :func:`ntkdp.sweep.load_config`; float64 needs :func:`ntkdp.enable_x64` first.
    folder : path, optional
        Where each cell lands as it finishes. Without, nothing is written.
    resume : bool
        Continue the sweep in the folder: cells that are there are read, not run again; one that is
        damaged is named in ``notes`` and run again.
    overwrite : bool
        Remove the sweep in the folder first.
    client : distributed.Client, optional
        Train the cells on the workers of its dask cluster, in any order. Each makes the problem
        from ``config`` for itself: a data file must be there too. On machines of one kind the
        results are those without a client, bit for bit. Not used where ``config.observe`` is false.
    report : callable, optional
        Called with what is being done and the fraction of it that is done.

    Returns
    -------
    Results

    Raises
    ------
    TypeError
        What is no config, or no client.
    ntkdp.experiment.ConfigError
        A field that does not fit the others, naming it.
    FileExistsError, FileNotFoundError, ValueError
        A folder that holds something else, nothing to resume, or another sweep.
    MemoryError
        If the kernel, runs and predictions do not fit, before any of them is made.
    ConnectionError
        A cluster without workers, or lost; a client that is closed.
    RuntimeError
        A cell that failed on the cluster, naming it. What has finished is in the folder.

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
    found_planes = planes(config)
    found_cells = cells(config, len(found_planes))
    disk = None
    if folder is not None:
        settings = config.model_dump(mode="json")
        disk = CellFolder(Path(folder), settings, resume=resume, overwrite=overwrite)
    report("loading data", 0.0)
    problem = problem_of(config)
    observe_missing = None
    if config.observe:
        observe_missing = partial(_observe_here, config, problem, found_planes)
        if client is not None:
            observe_missing = partial(_observe_there, config, problem, found_planes, client)
    initial = _initial(config, problem)
    of_cells: list[dict[str, Any]] = []
    _require_room(config, problem, found_planes)
    with nullcontext() if disk is None else disk.growing():
        predicted = None
        if disk is not None:
            of_prediction = partial(_found_prediction, initial, len(found_cells))
            predicted = disk.find("predicted", of_prediction)
        if predicted is None:
            predicted = _predict(config, problem, found_planes, report)
            if disk is not None:
                disk.write("predicted", predicted)
        if observe_missing is not None:
            of_cells = _of_cells(found_cells, initial, disk, observe_missing, report)
    seconds = {name: predicted[f"{name}_seconds"] for name in ("kernel", "prediction")}
    observed = None
    if of_cells:
        seconds["observation"] = sum(one["seconds"] for one in of_cells)
        observed = _by_plane([one["metrics"] for one in of_cells], len(found_planes))
    return Results(
        config,
        found_planes,
        found_cells,
        initial,
        _by_plane(predicted["metrics"], len(found_planes)),
        observed,
        advisor.gradient_norms(
            problem.model.apply, problem.params, problem.x, problem.targets, problem.loss
        ),
        seconds,
        [] if disk is None else disk.notes,
    )


#: Trains some cells, and gives the number and the content of each as it finishes.
Observe = Callable[[dict[int, Cell]], Iterator[tuple[int, dict[str, Any]]]]


def _of_cells(
    found_cells: list[Cell],
    initial: CellMetrics,
    disk: CellFolder | None,
    observe_missing: Observe,
    report: Report,
) -> list[dict[str, Any]]:
    """Every cell's content: what is on disk is read, and what is made is put there at once."""
    done = {}
    for number in range(len(found_cells)):
        content = None
        if disk is not None:
            content = disk.find(f"{number:05d}", partial(_found_cell, initial))
        if content is not None:
            done[number] = content

    def say() -> None:
        report(f"cell {len(done) + 1} of {len(found_cells)}", len(done) / len(found_cells))

    missing = {number: cell for number, cell in enumerate(found_cells) if number not in done}
    if missing:
        say()
    for number, content in observe_missing(missing):
        if disk is not None:
            disk.write(f"{number:05d}", content)
        done[number] = content
        if len(done) < len(found_cells):
            say()
    return [done[number] for number in range(len(found_cells))]


def _found_cell(initial: CellMetrics, content: Any) -> dict[str, Any]:
    """The cell of a folder, whose content may be anything: what is wrong is an error."""
    check_cell(content["metrics"], initial.cell(0))
    return {"metrics": content["metrics"], "seconds": float(content["seconds"])}


def _found_prediction(initial: CellMetrics, n_cells: int, content: Any) -> dict[str, Any]:
    """The same of the prediction of all cells."""
    if len(content["metrics"]) != n_cells:
        raise ValueError(f"it has {len(content['metrics'])} cells, not {n_cells}")
    for metrics in content["metrics"]:
        check_cell(metrics, initial.cell(0))
    return {
        "metrics": content["metrics"],
        "kernel_seconds": float(content["kernel_seconds"]),
        "prediction_seconds": float(content["prediction_seconds"]),
    }


def _observe_here(
    config: SweepConfig, problem: Problem, found_planes: list[Plane], missing: dict[int, Cell]
) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, cell in missing.items():
        yield number, observe(config, problem, found_planes[cell.plane], cell)


def _observe_there(
    config: SweepConfig,
    problem: Problem,
    found_planes: list[Plane],
    client: "Client",
    missing: dict[int, Cell],
) -> Iterator[tuple[int, dict[str, Any]]]:
    told = instructions(config, problem)
    numbers, tasks = {}, {}
    for number, cell in missing.items():
        plane = found_planes[cell.plane]
        name = (
            f"cell {number} ({plane.label}, learning rate {cell.learning_rate:g}, clipping norm "
            f"{cell.clip_norm:g})"
        )
        numbers[name] = number
        tasks[name] = (told, plane, cell)
    for name, content in _cluster.results(client, observe_as_told, tasks):
        yield numbers[name], content


def _by_plane(metrics: list[dict[str, Any]], n_planes: int) -> list[CellMetrics]:
    size = len(metrics) // n_planes
    return [
        CellMetrics.of_cells(metrics[plane * size : (plane + 1) * size])
        for plane in range(n_planes)
    ]


def _initial(config: SweepConfig, problem: Problem) -> CellMetrics:
    """Metrics of the network before training, of one cell."""
    return measure(
        problem.loss,
        config.training.reduction,
        float("inf"),
        (problem.outputs[None, None], problem.targets),
        (problem.test_outputs[None, None], problem.test_targets),
    )


def _require_room(config: SweepConfig, problem: Problem, found_planes: list[Plane]) -> None:
    training = config.training
    noisy = any(plane.noise_multiplier > 0 for plane in found_planes)
    require_memory(
        problem,
        {config.prediction},
        by_layer="layerwise" in config.grid.scopes,
        whole=noisy,
        noisy=noisy,
        exact=False,
        n_seeds=training.n_seeds if config.observe else 1,
        n_drawn=training.n_predicted if noisy or training.sample_rate < 1 else 1,
        steps=1,
    )


def _predict(
    config: SweepConfig, problem: Problem, found_planes: list[Plane], report: Report
) -> dict[str, Any]:
    training, grid = config.training, config.grid
    report(f"{config.prediction} kernel", 0.0)
    kernel = compute_kernel(
        problem,
        config.prediction,
        by_layer="layerwise" in grid.scopes,
        whole=any(plane.noise_multiplier > 0 for plane in found_planes),
        batch_size=config.batch_size,
    )
    start = time.perf_counter()
    metrics: list[dict[str, Any]] = []
    for number, plane in enumerate(found_planes):
        what = f"predicting {plane.label}"
        report(what, number / len(found_planes))
        random = plane.noise_multiplier > 0 or training.sample_rate < 1
        n_drawn = training.n_predicted if random else 1
        found = advisor.predict(
            _flow(config, problem, kernel, plane),
            (problem.outputs, problem.test_outputs),
            learning_rates=grid.learning_rates,
            clip_norms=grid.clip_norms,
            steps=training.steps,
            noise_multiplier=plane.noise_multiplier,
            sample_rate=training.sample_rate,
            noise_kernel=kernel.whole if plane.noise_multiplier > 0 else None,
            key=jax.random.split(jax.random.key(config.seed + 2), n_drawn),
        ).metrics
        metrics += [found.cell(index) for index in range(len(found.loss))]
    return {
        "metrics": metrics,
        "kernel_seconds": kernel.seconds,
        "prediction_seconds": time.perf_counter() - start,
    }


def _flow(
    config: SweepConfig, problem: Problem, kernel: Kernel, plane: Plane
) -> gradient_flow.KernelFlow:
    return gradient_flow.KernelFlow(
        kernel.train,
        problem.targets,
        problem.loss,
        rule_of(plane, 1.0),
        reduction=config.training.reduction,
        test_kernel=kernel.test,
        test_targets=problem.test_targets,
    )
