"""One cell trained, here or by a worker that is told of the sweep."""

import json
import time
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from ntkdp import clipping, dp_sgd, losses
from ntkdp._backend.config_files import check_as
from ntkdp._results.provenance import VERSION
from ntkdp.clipping import ClippingRule
from ntkdp.comparison import measure
from ntkdp.experiment import Problem, problem_of
from ntkdp.losses import Reduction
from ntkdp.sweep._config import Cell, Plane, SweepConfig

if TYPE_CHECKING:
    pass


#: Rounding, of single precision too, changes a mean loss by less.
_SAME_DATA = 1e-5


class Instructions(NamedTuple):
    """What a worker needs to know of a sweep, and to see that it has the same."""

    version: str
    settings: str
    x64: bool
    #: At the start, as text: what is not a number equals itself there.
    losses: str


def instructions(config: SweepConfig, problem: Problem) -> Instructions:
    return Instructions(
        VERSION,
        json.dumps(config.model_dump(mode="json")),
        jax.config.read("jax_enable_x64"),
        json.dumps(_losses_at_start(problem)),
    )


def _losses_at_start(problem: Problem) -> dict[str, float]:
    """Mean losses of both parts of the data, as alike on all devices as they can be had."""
    found = {}
    for name, x, targets in (
        ("training", problem.x, problem.targets),
        ("test", problem.test_x, problem.test_targets),
    ):
        # Some devices shorten the factors of products, and some add up one by one.
        with jax.default_matmul_precision("highest"):
            outputs = problem.model.apply(problem.params, x)
        of_samples = np.asarray(problem.loss(outputs, targets), np.float64)
        found[name] = of_samples.mean().item()
    return found


def observe_as_told(told: Instructions, plane: Plane, cell: Cell) -> dict[str, Any]:
    if told.version != VERSION:
        raise RuntimeError(f"the worker has ntkdp {VERSION}, the sweep ntkdp {told.version}")
    with jax.enable_x64(told.x64):
        config, problem = _made_as_told(told)
        return observe(config, problem, plane, cell)


# A worker makes the problem once, not for every cell; one that it refuses it makes again.
@lru_cache(maxsize=1)
def _made_as_told(told: Instructions) -> tuple[SweepConfig, Problem]:
    config = check_as(SweepConfig, json.loads(told.settings))
    problem = problem_of(config)
    found = _losses_at_start(problem)
    for part, loss in json.loads(told.losses).items():
        if not np.isclose(found[part], loss, rtol=_SAME_DATA, atol=0, equal_nan=True):
            raise RuntimeError(
                f"the worker has other data: at the start the loss of the {part} part is "
                f"{found[part]:.9g}, not {loss:.9g}; data.name = {config.data.name!r} must be the "
                "same there"
            )
    return config, problem


def rule_of(plane: Plane, clip_norm: float) -> ClippingRule:
    return clipping.from_name(plane.rule, R=clip_norm, scope=plane.scope)


def observe(config: SweepConfig, problem: Problem, plane: Plane, cell: Cell) -> dict[str, Any]:
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
        sample_rate=training.sample_rate,
        reduction=training.reduction,
        test_x=problem.test_x,
        test_targets=problem.test_targets,
        record_every=training.steps,
        outputs=True,
        key=jax.random.split(jax.random.key(config.seed + 1), training.n_seeds),
    )
    assert run.outputs is not None
    assert run.test_outputs is not None
    initial_loss = _reduced(problem, training.reduction)
    metrics = measure(
        problem.loss,
        training.reduction,
        initial_loss,
        (run.outputs[None, :, -1], problem.targets),
        (run.test_outputs[None, :, -1], problem.test_targets),
    )
    return {
        "cell": {**plane._asdict(), **cell._asdict()},
        "metrics": metrics.cell(0),
        "seconds": time.perf_counter() - start,
    }


def _reduced(problem: Problem, reduction: Reduction) -> float:
    return float(losses.mean_or_sum(problem.loss, problem.outputs, problem.targets, reduction)[0])
