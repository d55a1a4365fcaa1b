"""Predictions and runs of every case, and their comparison."""

import dataclasses
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ntkdp import _setup, comparison, dp_sgd, ntk
from ntkdp._backend.config_files import ConfigError
from ntkdp._backend.types import Array
from ntkdp._gradients import groups
from ntkdp._results.checkpoints import CellFolder
from ntkdp.clipping import ClippingRule
from ntkdp.comparison import Comparison
from ntkdp.experiment._config import ClippingConfig, Config
from ntkdp.experiment._memory import require_memory
from ntkdp.experiment._predictions import (
    LABELS,
    Kernel,
    Mechanism,
    kernel_of,
    needed_kernels,
    needs_whole_kernel,
    predict,
    weight_noise,
)
from ntkdp.experiment._problem import Problem, problem_of, rules_of
from ntkdp.trajectory import Trajectory

#: Called with what is being done and the fraction of it that is done.
Report = Callable[[str, float], None]


class Prediction(NamedTuple):
    """A predicted trajectory, held against the run.

    Part of what :func:`run` returns.
    """

    trajectory: Trajectory
    comparison: Comparison
    seconds: float


class Case(NamedTuple):
    """One clipping rule: the run, and the predictions of it by name.

    ``learning_rate`` is the one that the case trained with. ``noise_multiplier`` is sigma, and
    ``weight_noise`` the variance v(T) that noise has added to each weight by the end: beside 1, the
    variance of the weights at the start, it says how far the noise moves the kernel.

    Part of what :func:`run` returns.
    """

    clipping: ClippingConfig
    noise_multiplier: float
    weight_noise: float
    run: Trajectory
    run_seconds: float
    predictions: dict[str, Prediction]
    learning_rate: float

    @property
    def title(self) -> str:
        """The rule and the learning rate, for tables and pictures."""
        return f"{self.clipping.label}, learning rate {self.learning_rate:g}"


class Results(NamedTuple):
    """All cases of an experiment, and the kernels that the predictions used.

    ``notes`` say what went wrong on the way and was put right.

    Made by :func:`run`.
    """

    config: Config
    cases: list[Case]
    kernels: dict[str, Kernel]
    initial_norms: Array
    notes: list[str]


def run(
    config: Config,
    report: Report = lambda what, done: None,
    *,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Results:
    """Predict training under each clipping rule, run it, and compare.

    Parameters
    ----------
    config : Config
        See :func:`ntkdp.experiment.load_config`; float64 needs :func:`ntkdp.enable_x64` first.
    report : callable, optional
        Called with what is being done and the fraction of it that is done.
    folder : path, optional
        Where each case lands as it finishes. Without, nothing is written.
    resume : bool
        Continue the run in the folder: cases that are there are read, not run again; one that is
        damaged is named in ``notes`` and run again. Kernels are computed again.
    overwrite : bool
        Remove the run in the folder first.

    Returns
    -------
    Results
        ``seconds`` of flows exclude compilation; those of a run or a recursion include it, a few
        seconds the first time that their program is met.

    Raises
    ------
    TypeError
        What is no config.
    ConfigError
        A field that does not fit the others, naming it.
    FileExistsError, FileNotFoundError, ValueError
        A folder that holds something else, nothing to resume, or another run.
    MemoryError
        If the kernels, runs and predictions do not fit, before any of them is made.

    Examples
    --------
    >>> import ntkdp
    >>> ntkdp.enable_x64()
    >>> config = ntkdp.experiment.config(
    ...     predictions=["recursion"], data={"n_train": 16, "n_test": 8},
    ...     model={"widths": [32]}, training={"steps": 4}, clipping=[{"clip_norm": 0.1}])
    >>> results = ntkdp.experiment.run(config)
    >>> results.cases[0].predictions["recursion"].comparison.sup_relative_error < 0.1
    True
    """
    if not isinstance(config, Config):
        raise TypeError(
            "config must be a Config, e.g. ntkdp.experiment.load_config(path), got "
            f"{type(config).__name__}"
        )
    rules = rules_of(config)
    disk = None
    if folder is not None:
        settings = config.model_dump(mode="json")
        disk = CellFolder(Path(folder), settings, resume=resume, overwrite=overwrite, what="run")
    report("loading data", 0.0)
    problem = problem_of(config)
    for number, rule in enumerate(rules):
        try:
            if rule.scope == "layerwise":
                rule.check_groups(groups.resolve(problem.params).size)
        except ValueError as error:
            raise ConfigError(f"field 'clipping.{number}.clip_norm': {error}") from error
    _require_room(config, problem)
    with nullcontext() if disk is None else disk.growing():
        return _run(config, problem, rules, disk, report)


def _require_room(config: Config, problem: Problem) -> None:
    training = config.training
    random = training.noisy or training.sample_rate < 1
    require_memory(
        problem,
        needed_kernels(config),
        by_layer=any(case.scope == "layerwise" for case in config.clipping),
        whole=needs_whole_kernel(config, problem),
        noisy=training.noisy and "recursion" in config.predictions,
        exact="exact" in config.predictions,
        n_seeds=training.n_seeds,
        n_drawn=training.n_predicted if random else 1,
        steps=max(case.steps or training.steps for case in config.clipping),
    )


def _run(
    config: Config,
    problem: Problem,
    rules: list[ClippingRule],
    disk: CellFolder | None,
    report: Report,
) -> Results:
    kernels = {}
    for kind in sorted(needed_kernels(config)):
        report(f"{kind} kernel", 0.0)
        kernels[kind] = kernel_of(config, problem, kind)
    gradient = problem.loss.output_gradient(problem.outputs, problem.targets)
    norms = ntk.per_sample_gradient_norms(problem.model.apply, problem.params, problem.x, gradient)
    cases = []
    for number, (case, rule) in enumerate(zip(config.clipping, rules, strict=True)):
        name = f"{number:05d}"
        found = None if disk is None else disk.find(name, partial(_found_case, config, case))
        if found is None:
            measured = _measured(config, problem, kernels, case, rule, report)
            if disk is not None:
                disk.write(name, measured)
            found = _case(config, case, measured)
        cases.append(found)
    return Results(config, cases, kernels, norms, [] if disk is None else disk.notes)


@cache
def _with_momentum(momentum: float) -> Callable[[Any], optax.GradientTransformation]:
    # One object for all cases: another would compile the same program again.
    return partial(optax.sgd, momentum=momentum)


def _measured(
    config: Config,
    problem: Problem,
    kernels: dict[str, Kernel],
    case: ClippingConfig,
    rule: ClippingRule,
    report: Report,
) -> dict[str, Any]:
    """What took time to find out about a case, as a folder can hold it."""
    training = config.training
    mechanism = Mechanism.of(config, case)
    key = jax.random.key(config.seed + 1)

    report(f"{case.label}: training", 0.0)
    start = time.perf_counter()
    observed = dp_sgd.run(
        problem.model.apply,
        problem.params,
        problem.x,
        problem.targets,
        problem.loss,
        rule,
        learning_rate=mechanism.learning_rate,
        steps=mechanism.steps,
        noise_multiplier=mechanism.noise_multiplier,
        sample_rate=training.sample_rate,
        optimizer=_with_momentum(training.momentum) if training.momentum > 0 else None,
        reduction=training.reduction,
        test_x=problem.test_x,
        test_targets=problem.test_targets,
        record_every=training.record_every,
        progress=partial(report, f"{case.label}: training"),
        key=key if training.n_seeds == 1 else jax.random.split(key, training.n_seeds),
    )
    jax.block_until_ready(observed.loss)
    run_seconds = time.perf_counter() - start

    predictions = {}
    for name in config.predictions:
        what = f"{case.label}: {LABELS[name]}"
        report(what, 0.0)
        predicted, seconds = predict(
            config,
            problem,
            kernels,
            rule,
            mechanism,
            name,
            observed.times,
            partial(report, what),
        )
        predictions[name] = {"trajectory": _arrays(predicted), "seconds": seconds}
    return {
        "noise_multiplier": mechanism.noise_multiplier,
        "weight_noise": weight_noise(config, problem, rule, mechanism),
        "run": _arrays(observed),
        "run_seconds": run_seconds,
        "predictions": predictions,
    }


def _found_case(config: Config, case: ClippingConfig, content: Any) -> Case:
    """The case of a folder, whose content may be anything: what is wrong is an error."""
    for part in (content["run"], *(of["trajectory"] for of in content["predictions"].values())):
        if set(part) != {field.name for field in dataclasses.fields(Trajectory)}:
            raise ValueError("what a trajectory records has other names")
        Trajectory.from_xarray(_trajectory(part).to_xarray())
    return _case(config, case, content)


def _case(config: Config, case: ClippingConfig, measured: dict[str, Any]) -> Case:
    observed = _trajectory(measured["run"])
    predictions: dict[str, Prediction] = {}
    for name in config.predictions:
        found = measured["predictions"][name]
        predicted = _trajectory(found["trajectory"])
        compared = comparison.compare(predicted, observed)
        predictions[name] = Prediction(predicted, compared, float(found["seconds"]))
    return Case(
        case,
        float(measured["noise_multiplier"]),
        float(measured["weight_noise"]),
        observed,
        float(measured["run_seconds"]),
        predictions,
        case.learning_rate_in(config.training),
    )


def _arrays(path: Trajectory) -> dict[str, Any]:
    fields = {name: value for name, value in vars(path).items() if name != "setup"}
    arrays: dict[str, Any] = {
        name: None if value is None else np.asarray(value) for name, value in fields.items()
    }
    return arrays | {"setup": _setup.to_json(path.setup)}


def _trajectory(arrays: dict[str, Any]) -> Trajectory:
    fields: dict[str, Any] = {
        name: None if value is None else jnp.asarray(value)
        for name, value in arrays.items()
        if name != "setup"
    }
    # Cells of an older version say nothing of it.
    return Trajectory(setup=_setup.from_json(arrays.get("setup", "[]")), **fields)
