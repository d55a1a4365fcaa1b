"""Training of one cell, in this process or by a worker that gets instructions."""

import json
import time
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple, TypeAlias, TypedDict

import jax
import numpy as np

from ntkdp import clipping, dp_sgd, losses
from ntkdp._backend.config_files import check_as
from ntkdp._results.provenance import VERSION
from ntkdp.clipping import ClippingRule
from ntkdp.comparison import GroupMetrics, by_group, measure
from ntkdp.experiment import Problem, problem_of
from ntkdp.losses import Reduction
from ntkdp.noise import Correlated
from ntkdp.sweep._config import Cell, Plane, SweepConfig
from ntkdp.trajectory import Trajectory

#: Test losses and accuracies of the subgroups of a cell; None without subgroups, or accuracies.
GroupNumbers: TypeAlias = dict[str, list[float] | None]
#: Metrics of one cell by name, as :meth:`ntkdp.comparison.CellMetrics.cell` gives them.
Metrics: TypeAlias = dict[str, float | bool | None]
#: Called with a description of the current task and the fraction of it that is done.
Report: TypeAlias = Callable[[str, float], None]
#: Rounding changes a mean loss by less than this, in single precision too.
_SAME_DATA = 1e-5


class Observation(TypedDict):
    """A trained cell, as a folder can hold it."""

    cell: dict[str, int | float | str | tuple[float, ...]]
    metrics: Metrics
    by_group: GroupNumbers | None
    seconds: float


class Instructions(NamedTuple):
    """The settings of a sweep for a worker, and what it needs to check that it has them all."""

    version: str
    settings: str
    x64: bool
    #: Losses at the start, as text: unlike the number NaN, the text "NaN" equals itself.
    losses: str


def instructions(config: SweepConfig, problem: Problem) -> Instructions:
    """The instructions for the workers of a sweep."""
    return Instructions(
        VERSION,
        json.dumps(config.model_dump(mode="json")),
        jax.config.read("jax_enable_x64"),
        json.dumps(_losses_at_start(problem)),
    )


def _losses_at_start(problem: Problem) -> dict[str, float]:
    """Mean losses of both parts of the data, as equal as possible on all kinds of devices."""
    means = {}
    for name, x, targets in (
        ("training", problem.x, problem.targets),
        ("test", problem.test_x, problem.test_targets),
    ):
        # Some devices round the factors of products, and some sum sequentially.
        with jax.default_matmul_precision("highest"):
            outputs = problem.model.apply(problem.params, x)
        losses_of_samples = np.asarray(problem.loss(outputs, targets), np.float64)
        means[name] = losses_of_samples.mean().item()
    return means


def observe_on_worker(instructions: Instructions, plane: Plane, cell: Cell) -> Observation:
    """Train one cell in a process that has nothing but the instructions.

    Raises
    ------
    RuntimeError
        If the process has another version of ntkdp, or other data.
    """
    if instructions.version != VERSION:
        raise RuntimeError(
            f"the worker has ntkdp {VERSION}, the sweep ntkdp {instructions.version}"
        )
    with jax.enable_x64(instructions.x64):
        config, problem = _problem(instructions)
        return observe(config, problem, plane, cell)


# A worker makes the problem once, not for every cell. An error is not cached.
@lru_cache(maxsize=1)
def _problem(instructions: Instructions) -> tuple[SweepConfig, Problem]:
    config = check_as(SweepConfig, json.loads(instructions.settings))
    problem = problem_of(config)
    means = _losses_at_start(problem)
    for part, loss in json.loads(instructions.losses).items():
        if not np.isclose(means[part], loss, rtol=_SAME_DATA, atol=0, equal_nan=True):
            raise RuntimeError(
                f"the worker has other data: at the start the loss of the {part} part is "
                f"{means[part]:.9g}, not {loss:.9g}; data.name = {config.data.name!r} must be the "
                "same there"
            )
    return config, problem


def rule_of(plane: Plane, clip_norm: float) -> ClippingRule:
    """The clipping rule of a cell."""
    return clipping.from_name(plane.rule, R=clip_norm, scope=plane.scope)


def observe(config: SweepConfig, problem: Problem, plane: Plane, cell: Cell) -> Observation:
    """Train one cell and measure its final state."""
    training = config.training
    start = time.perf_counter()
    run = dp_sgd.run(
        problem.model.apply,
        problem.params,
        problem.x,
        problem.targets,
        problem.loss,
        rule_of(plane, cell.clip_norm),
        learning_rate=cell.learning_rate,
        steps=training.steps,
        noise_multiplier=plane.noise_multiplier,
        batches=training.as_batches,
        noise=training.as_noise() if cell.strategy is None else Correlated(cell.strategy),
        public=problem.public,
        sharpness_aware=training.sharpness_aware.make(problem.n_params),
        zeroth_order=training.zeroth_order.make(),
        reduction=training.reduction,
        test_x=problem.test_x,
        test_targets=problem.test_targets,
        record_every=training.steps,
        outputs=True,
        key=jax.random.split(jax.random.key(config.seed + 1), training.n_seeds),
    )
    of_cell = {name: part for name, part in cell._asdict().items() if part is not None}
    return {
        "cell": {**plane._asdict(), **of_cell},
        "metrics": metrics_of(problem, training.reduction, run),
        "by_group": groups_of(problem, run),
        "seconds": time.perf_counter() - start,
    }


def groups_of(problem: Problem, path: Trajectory) -> GroupNumbers | None:
    """Test losses and accuracies of subgroups at the end, means over seeds."""
    if problem.test_groups is None:
        return None
    assert path.test_outputs is not None
    last = path.test_outputs[..., -1, :, :]
    found = by_group(last, problem.test_targets, problem.loss, problem.test_groups)
    return numbers_of(found)


def numbers_of(found: GroupMetrics) -> GroupNumbers:
    """Plain numbers of subgroups, means over all leading axes."""
    return {
        name: None if part is None else part.reshape(-1, part.shape[-1]).mean(axis=0).tolist()
        for name, part in (("loss", found.loss), ("accuracy", found.accuracy))
    }


def metrics_of(problem: Problem, reduction: Reduction, path: Trajectory) -> Metrics:
    """Metrics of the last outputs of a run or a prediction, of one seed or many."""
    assert path.outputs is not None
    assert path.test_outputs is not None
    last, last_test = (
        outputs[None, None, -1] if outputs.ndim == 3 else outputs[None, :, -1]
        for outputs in (path.outputs, path.test_outputs)
    )
    initial = losses.mean_or_sum(problem.loss, problem.outputs, problem.targets, reduction)[0]
    metrics = measure(
        problem.loss,
        reduction,
        float(initial),
        (last, problem.targets),
        (last_test, problem.test_targets),
    )
    return metrics.cell(0)
