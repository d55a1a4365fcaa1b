"""The prediction of all cells of a sweep: at once, or one by one where each needs its own steps."""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple, TypedDict

import jax
import numpy as np

from ntkdp import advisor, gradient_flow, stochastic_flow
from ntkdp._backend.types import Array
from ntkdp._gradients import groups
from ntkdp.comparison import GroupMetrics
from ntkdp.experiment import ConfigError, Kernel, Problem, compute_kernel, least_noise
from ntkdp.noise import Correlated, Noise
from ntkdp.sweep._config import Plane, SweepConfig
from ntkdp.sweep._workers import (
    GroupNumbers,
    Metrics,
    Report,
    groups_of,
    metrics_of,
    numbers_of,
    rule_of,
)


class CellsPrediction(TypedDict):
    """The predicted metrics of all cells, as a folder can hold them.

    ``strategies`` are those of the noise, of cells that each have their own.
    """

    metrics: list[Metrics]
    by_group: list[GroupNumbers | None]
    kernels: list[str]
    weight_noise: list[float]
    strategies: list[list[float] | None]
    kernel_seconds: float
    prediction_seconds: float


class _Cell(NamedTuple):
    """The prediction of one cell."""

    metrics: Metrics
    by_group: GroupNumbers | None
    kernel: str
    weight_noise: float
    strategy: list[float] | None = None


class _Sweep(NamedTuple):
    """What the predictions of all cells share."""

    config: SweepConfig
    problem: Problem
    kernel: Kernel


def moves_at_random(config: SweepConfig, maps: list[Plane]) -> bool:
    """Whether steps of any map move the outputs of all points at random."""
    along = config.training.zeroth_order.directions > 0
    return along or any(plane.noise_multiplier > 0 for plane in maps)


def predict_cells(
    config: SweepConfig, problem: Problem, maps: list[Plane], report: Report
) -> CellsPrediction:
    """Predict every cell of all maps.

    Raises
    ------
    ConfigError
        If no strategy of the noise is the best under the kernel of a cell.
    """
    report(f"{config.prediction} kernel", 0.0)
    kernel = compute_kernel(
        problem,
        config.prediction,
        by_layer="layerwise" in config.grid.scopes,
        whole=moves_at_random(config, maps),
        batch_size=config.batch_size,
    )
    sweep = _Sweep(config, problem, kernel)
    start = time.perf_counter()
    found: list[_Cell] = []
    for number, plane in enumerate(maps):
        report(f"predicting {plane.label}", number / len(maps))
        found += _cells_of(sweep, plane)
    return {
        "metrics": [cell.metrics for cell in found],
        "by_group": [cell.by_group for cell in found],
        "kernels": [cell.kernel for cell in found],
        "weight_noise": [cell.weight_noise for cell in found],
        "strategies": [cell.strategy for cell in found],
        "kernel_seconds": kernel.seconds,
        "prediction_seconds": time.perf_counter() - start,
    }


def _cells_of(sweep: _Sweep, plane: Plane) -> Iterator[_Cell]:
    """Predict the cells of a map, in their order."""
    training, grid = sweep.config.training, sweep.config.grid
    if training.other_steps:
        of_one = _noise_of_one(sweep, plane, training.as_noise())
        for rate in grid.learning_rates:
            for norm in grid.clip_norms:
                found = _cell_of_other_steps(sweep, plane, rate, norm)
                yield _Cell(*found, "frozen", of_one * (rate * norm) ** 2)
    elif training.noise.kind == "kernel_optimal" and plane.noise_multiplier > 0:
        for rate in grid.learning_rates:
            for norm in grid.clip_norms:
                best = _best_noise(sweep, plane, rate, norm)
                (cell,) = _at_once(sweep, plane, [rate], [norm], best)
                yield cell._replace(strategy=best.strategy.tolist())
    else:
        noise = training.as_noise()
        yield from _at_once(sweep, plane, grid.learning_rates, grid.clip_norms, noise)


def _at_once(
    sweep: _Sweep, plane: Plane, rates: list[float], norms: list[float], noise: Noise | None
) -> Iterator[_Cell]:
    """Predict every rate with every norm, with the same noise but for its size."""
    config, problem, kernel = sweep
    predicted = advisor.predict(
        _flow(sweep, plane, 1.0),
        problem.start,
        learning_rates=rates,
        clip_norms=norms,
        steps=config.training.steps,
        noise_multiplier=plane.noise_multiplier,
        batches=config.training.as_batches,
        noise=noise,
        noise_kernel=kernel.whole if plane.noise_multiplier > 0 else None,
        between_times=_between_times(sweep, plane),
        kernels=config.kernels,
        moving_from=config.kernels_move_from,
        test_subgroups=problem.test_groups,
        key=_keys(config, plane),
    )
    products = np.multiply(*predicted.cells())
    weight_noise = (_noise_of_one(sweep, plane, noise) * products**2).tolist()
    used = predicted.kernels
    kernels = ["frozen"] * len(products) if used is None else used.tolist()
    for number, of_cell in enumerate(zip(kernels, weight_noise, strict=True)):
        groups_of_cell = None
        if predicted.test_by_group is not None:
            groups_of_cell = numbers_of(_cell_of(predicted.test_by_group, number))
        yield _Cell(predicted.metrics.cell(number), groups_of_cell, *of_cell)


def _cell_of(found: GroupMetrics, number: int) -> GroupMetrics:
    accuracy = None if found.accuracy is None else found.accuracy[number]
    return found._replace(loss=found.loss[number], accuracy=accuracy)


def _cell_of_other_steps(
    sweep: _Sweep, plane: Plane, rate: float, norm: float
) -> tuple[Metrics, GroupNumbers | None]:
    """Metrics, also by subgroup, of a cell whose steps are not private gradients alone."""
    config, problem, kernel = sweep
    training = config.training
    flow = _flow(sweep, plane, norm)
    options: Any = {
        "learning_rate": rate,
        "steps": training.steps,
        "record_every": training.steps,
        "outputs": True,
        "sharpness_aware": training.sharpness_aware.make(problem.n_params),
    }
    if _is_random(config, plane) or not training.as_batches.takes_all:
        path = stochastic_flow.ensemble(
            flow,
            problem.start,
            noise_multiplier=plane.noise_multiplier,
            batches=training.as_batches,
            noise=training.as_noise(),
            zeroth_order=training.zeroth_order.make(),
            noise_kernel=kernel.whole,
            key=_keys(config, plane),
            **options,
        )
    else:
        path = gradient_flow.recursion(flow, problem.start, **options)
    return metrics_of(problem, training.reduction, path), groups_of(problem, path)


def _best_noise(sweep: _Sweep, plane: Plane, rate: float, norm: float) -> Correlated:
    """The strategy that adds least to the predicted loss of a cell."""
    config, problem, _ = sweep
    training = config.training
    assert training.noise.n_bands is not None
    try:
        return least_noise(
            _flow(sweep, plane, norm, test=False),
            problem.outputs,
            learning_rate=rate,
            steps=training.steps,
            n_bands=training.noise.n_bands,
            batches=training.as_batches,
        )
    except ValueError as error:
        raise ConfigError(
            f"field 'training.noise': learning rate {rate:g} and clipping norm {norm:g} of "
            f"{plane.label}: {error}"
        ) from error


def _is_random(config: SweepConfig, plane: Plane) -> bool:
    return moves_at_random(config, [plane]) or config.training.as_batches.is_random


def _keys(config: SweepConfig, plane: Plane) -> Array:
    n_drawn = config.training.n_predicted if _is_random(config, plane) else 1
    return jax.random.split(jax.random.key(config.seed + 2), n_drawn)


def _noise_of_one(sweep: _Sweep, plane: Plane, noise: Noise | None) -> float:
    """v(T) of a cell whose learning rate and clipping norm are one, relative to the weights."""
    config, problem, _ = sweep
    if plane.noise_multiplier == 0:
        return 0.0
    variance = stochastic_flow.weight_noise_variance(
        rule_of(plane, 1.0),
        len(problem.x),
        learning_rate=1.0,
        steps=config.training.steps,
        noise_multiplier=plane.noise_multiplier * problem.private_share,
        batches=config.training.as_batches,
        noise=noise,
        n_groups=groups.resolve(problem.params).size,
        reduction=config.training.reduction,
    )
    relative = stochastic_flow.relative_weight_noise(
        variance[-1], problem.model, problem.params, problem.x
    )
    return float(relative)


def _between_times(sweep: _Sweep, plane: Plane) -> stochastic_flow.TwoTimeFlow | None:
    """The problem at infinite width, if there is noise and kernels may follow it."""
    config, problem, _ = sweep
    is_frozen = config.kernels == "frozen" or config.prediction == "empirical"
    # Nothing moves the kernel of a linear head.
    is_frozen |= config.kernels == "auto" and problem.model.features is not None
    if is_frozen or plane.noise_multiplier == 0:
        return None
    return stochastic_flow.TwoTimeFlow(
        problem.model,
        problem.x,
        problem.targets,
        problem.loss,
        rule_of(plane, 1.0),
        reduction=config.training.reduction,
        test_x=problem.test_x,
        test_targets=problem.test_targets,
    )


def _flow(
    sweep: _Sweep, plane: Plane, clip_norm: float, *, test: bool = True
) -> gradient_flow.KernelFlow:
    config, problem, kernel = sweep
    return gradient_flow.KernelFlow(
        kernel.train,
        problem.targets,
        problem.loss,
        rule_of(plane, clip_norm),
        reduction=config.training.reduction,
        test_kernel=kernel.test if test else None,
        test_targets=problem.test_targets if test else None,
        public=problem.public,
        public_kernel=kernel.public,
    )
