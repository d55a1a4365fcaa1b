"""Predictions and runs of every case, and their comparison."""

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from ntkdp import comparison, dp_sgd, ntk
from ntkdp._backend.config_files import ConfigError
from ntkdp._backend.types import Array, Progress
from ntkdp._gradients import groups
from ntkdp._results import setup as setups
from ntkdp._results.checkpoints import CellFolder, NoFolder, open_cells
from ntkdp.clipping import ClippingRule
from ntkdp.comparison import Comparison
from ntkdp.experiment._config import ClippingConfig, Config
from ntkdp.experiment._memory import require_memory
from ntkdp.experiment._of_outputs import by_group as _by_group
from ntkdp.experiment._of_outputs import margins as _margins
from ntkdp.experiment._of_outputs.by_group import ByGroup, OfGroups
from ntkdp.experiment._predictions import (
    KERNEL_OF,
    LABELS,
    Kernel,
    Mechanism,
    kernel_of,
    needed_kernels,
    needs_whole_kernel,
    predict,
    strategy_for,
    weight_noise,
)
from ntkdp.experiment._problem import (
    ModelLike,
    Problem,
    problem_of,
    require_infinite_width,
    rules_of,
    with_model,
)
from ntkdp.experiment._recorded import as_recorded, require_one_rule
from ntkdp.trajectory import Trajectory, recorded_steps, times_of_steps

#: Products of a weight and a number that one of the slower machines computes in a minute, forwards.
_PRODUCTS_OF_A_MINUTE = 5e11

#: Called with a description of the current task and the fraction of it that is done.
Report: TypeAlias = Callable[[str, float], None]
#: A trajectory as a folder can hold it: arrays by name, and the setup as JSON.
Fields: TypeAlias = Mapping[str, np.ndarray | str | None]


class MeasuredPrediction(TypedDict):
    """A predicted trajectory, and how long it took."""

    trajectory: Fields
    margins: np.ndarray | None
    seconds: float


class Measured(TypedDict):
    """The numbers of a case that took time to compute, as a folder can hold them."""

    noise_multiplier: float
    weight_noise: float | None
    run: Fields
    run_margins: np.ndarray | None
    run_seconds: float
    predictions: dict[str, MeasuredPrediction]
    by_group: ByGroup | None


class Prediction(NamedTuple):
    """A predicted trajectory, held against the run.

    ``margins`` ``(T, classes)`` holds how far the mean output of each class is above the mean of
    the others, over the training samples of the class and all runs; None without classes, or if
    the outputs of all runs take too much memory.

    Part of what :func:`run` returns.
    """

    trajectory: Trajectory
    comparison: Comparison
    seconds: float
    margins: np.ndarray | None = None


class Case(NamedTuple):
    """One clipping rule: the run, and the predictions of it by name.

    ``learning_rate`` is the one that the case trained with. ``noise_multiplier`` is sigma, and
    ``weight_noise`` the variance v(T) that noise has added to weights by the end, relative to the
    weights' own variance at the start, the largest over the layers. Compared with 1, it shows how
    far the noise moves the kernel; it is None where it is not known, as under Adam. ``run_seconds``
    is None if the run was recorded elsewhere.
    ``run_margins`` are those of the runs, as in :class:`Prediction`. ``by_group`` has numbers by
    subgroup, if ``data.groups`` asks for them and outputs do not take too much memory.

    Part of what :func:`run` returns.
    """

    clipping: ClippingConfig
    noise_multiplier: float
    weight_noise: float | None
    run: Trajectory
    run_seconds: float | None
    predictions: dict[str, Prediction]
    learning_rate: float
    run_margins: np.ndarray | None = None
    by_group: ByGroup | None = None

    @property
    def title(self) -> str:
        """The rule and the learning rate, for tables and pictures."""
        return f"{self.clipping.label}, learning rate {self.learning_rate:g}"


class Results(NamedTuple):
    """All cases of an experiment, and the kernels that the predictions used.

    ``notes`` name the problems that were met on the way and solved.

    Made by :func:`run`.
    """

    config: Config
    cases: list[Case]
    kernels: dict[str, Kernel]
    initial_norms: Array
    notes: list[str]


def run(
    config: Config,
    report: Report | None = None,
    *,
    observed: Trajectory | None = None,
    model: ModelLike | None = None,
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
        Called with a description of the current task and the fraction of it that is done. Without
        it, JAX's compilation cache can keep the programs.
    observed : Trajectory, optional
        Runs that were recorded elsewhere, as :meth:`ntkdp.Trajectory.from_csv` reads them: they
        are compared, and nothing is trained. The configuration has one clipping rule, and describes
        the training of the runs: its learning rate and steps, and more where ``observed`` knows
        what it is of, are checked. Initial weights are drawn by its seed, so the runs should start
        from the same ones, or the network be so wide that they do not matter.
    model : Model, callable or str, optional
        The network in place of ``config.model``, which must be left out: an
        :class:`ntkdp.models.Model`, a function of the number of outputs that returns one, or the
        name of such a function, ``"module:name"``, as in a file. A folder does not know which model
        was given, so resume with the same one.
    folder : path, optional
        Where each case is written as it finishes. Without a folder, nothing is written.
    resume : bool
        Continue the run in the folder: finished cases are read, not run again, and a damaged one
        is named in ``notes`` and run again. Kernels are computed again.
    overwrite : bool
        Remove the run in the folder first.

    Returns
    -------
    Results
        ``seconds`` of flows exclude compilation. Those of a run or a recursion include it, which
        is a few seconds for the first of several equal programs.

    Raises
    ------
    TypeError
        If ``config`` is no ``Config``, or ``observed`` no ``Trajectory``.
    ConfigError
        If a field does not fit the others, or the observed runs; the message names it.
    FileExistsError, FileNotFoundError, ValueError
        If the folder holds something else, nothing to resume, or another run, or is given with
        observed runs, of which nothing is left to resume.
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
    if model is not None:
        config = with_model(config, model)
    if observed is not None:
        _check_observed(config, observed, folder, resume or overwrite)
    rules = rules_of(config)
    cells = open_cells(folder, config, "run", resume=resume, overwrite=overwrite)
    _begin(report, "loading data")
    problem = problem_of(config, model if config.model.kind == "given" else None)
    for number, rule in enumerate(rules):
        n_groups = groups.resolve(problem.params).size if rule.scope == "layerwise" else 1
        try:
            if rule.scope == "layerwise":
                rule.check_groups(n_groups)
        except ValueError as error:
            raise ConfigError(f"field 'clipping.{number}.clip_norm': {error}") from error
        mechanism = Mechanism.of(config, config.clipping[number], problem.n_params)
        mechanism.check_adaptive(rule, n_groups)
        if observed is not None:
            observed = as_recorded(config, problem.loss, rule, mechanism, observed)
    if "infinite" in config.predictions:
        require_infinite_width(problem, "predictions")
    _require_room(config, problem)
    with cells.growing():
        return _run(config, problem, rules, cells, report, observed)


def _check_observed(config: Config, observed: object, folder: object, options: bool) -> None:
    """Raise unless recorded runs may take the place of those that the configuration trains."""
    if not isinstance(observed, Trajectory):
        raise TypeError(
            "observed must be a Trajectory, e.g. ntkdp.Trajectory.from_csv(path), got "
            f"{type(observed).__name__}"
        )
    if folder is not None or options:
        raise ValueError(
            "folder, resume and overwrite must be left out with observed runs: nothing is trained, "
            "so that there is nothing to resume"
        )
    require_one_rule(config)


def _begin(report: Report | None, task: str, *, is_long: bool = False) -> Progress:
    """Tell that a task begins; the progress of a long one is told by what is returned."""
    if report is None:
        return False
    report(task, 0.0)
    # Programs that call back are not kept by JAX's cache on disk, so short ones do not.
    return partial(report, task) if is_long else False


def _is_long(problem: Problem, steps: int, runs: int) -> bool:
    """Whether so many runs take about a minute or more."""
    weights: int = sum(leaf.size for leaf in jax.tree.leaves(problem.params))
    products: float = problem.x.shape[0] * weights * steps * runs
    return products > _PRODUCTS_OF_A_MINUTE


def _require_room(config: Config, problem: Problem) -> None:
    training = config.training
    require_memory(
        problem,
        needed_kernels(config),
        by_layer=any(case.scope == "layerwise" for case in config.clipping),
        whole=needs_whole_kernel(config, problem),
        noisy=training.moves_at_random and "recursion" in config.predictions,
        exact="exact" in config.predictions,
        n_seeds=training.n_seeds,
        n_drawn=training.n_predicted if training.is_random else 1,
        steps=max(case.steps or training.steps for case in config.clipping),
    )


def _run(
    config: Config,
    problem: Problem,
    rules: list[ClippingRule],
    cells: CellFolder | NoFolder,
    report: Report | None,
    observed: Trajectory | None,
) -> Results:
    kernels = {}
    for kind in sorted(needed_kernels(config)):
        _begin(report, f"{kind} kernel")
        kernels[kind] = kernel_of(config, problem, kind)
    gradient = problem.loss.output_gradient(problem.outputs, problem.targets)
    norms = ntk.per_sample_gradient_norms(problem.model.apply, problem.params, problem.x, gradient)
    cases = []
    for number, (case, rule) in enumerate(zip(config.clipping, rules, strict=True)):
        name = f"{number:05d}"
        finished = cells.find(name, partial(_checked_case, config, case))
        if finished is None:
            measured = _measured(config, problem, kernels, case, rule, report, observed)
            cells.write(name, measured)
            finished = _case(config, case, measured)
        if observed is not None:
            finished = finished._replace(run_seconds=None)
        cases.append(finished)
    return Results(config, cases, kernels, norms, cells.notes)


def _measured(
    config: Config,
    problem: Problem,
    kernels: dict[str, Kernel],
    case: ClippingConfig,
    rule: ClippingRule,
    report: Report | None,
    recorded: Trajectory | None,
) -> Measured:
    """Train one case, unless its runs are recorded, and predict it."""
    training = config.training
    best = strategy_for(config, problem, kernels, case, rule)
    mechanism = Mechanism.of(config, case, problem.n_params, best)

    labels = _margins.labels_of(problem)
    n_runs = max(training.n_seeds, training.n_predicted)
    n_recorded = -(-mechanism.steps // training.record_every) + 1
    outputs = _margins.keeps_outputs(problem, n_runs, n_recorded)
    if recorded is not None:
        outputs = outputs and recorded.outputs is not None
    by_group = outputs and problem.groups is not None
    is_long = _is_long(problem, mechanism.steps, n_runs)
    start = time.perf_counter()
    if recorded is None:
        progress = _begin(report, f"{case.label}: training", is_long=is_long)
        individual = by_group and _by_group.is_known_one_by_one(mechanism, rule)
        observed = _trained(config, problem, rule, mechanism, outputs, individual, progress)
    else:
        observed = recorded
    run_seconds = time.perf_counter() - start

    delta = _by_group.delta_of(training.delta, len(problem.x))
    predictions: dict[str, MeasuredPrediction] = {}
    groups_predicted: dict[str, OfGroups] = {}
    for name in config.predictions:
        progress = _begin(report, f"{case.label}: {LABELS[name]}", is_long=is_long)
        predicted, seconds = predict(
            config,
            problem,
            kernels,
            rule,
            mechanism,
            name,
            times_of_steps(
                mechanism.learning_rate, recorded_steps(mechanism.steps, training.record_every)
            ),
            outputs,
            progress,
        )
        predictions[name] = {
            "trajectory": _fields(predicted),
            "margins": _margins.margins(predicted, labels),
            "seconds": seconds,
        }
        if by_group:
            assert observed.steps is not None
            kernel = kernels.get(KERNEL_OF[name] or "")
            groups_predicted[name] = _by_group.of_prediction(
                problem, mechanism, rule, delta, kernel, observed.steps, predicted
            )
    groups_found: ByGroup | None = None
    if by_group:
        names = _by_group.names_of(problem)
        groups_found = {
            "names": names,
            "counts": _by_group.counts_of(names, problem.groups),
            "test_counts": _by_group.counts_of(names, problem.test_groups),
            "delta": delta,
            "run": _by_group.of_run(problem, mechanism, delta, observed),
            "predictions": groups_predicted,
        }
    return {
        "noise_multiplier": mechanism.noise_multiplier,
        "weight_noise": weight_noise(config, problem, rule, mechanism),
        "run": _fields(observed),
        "run_margins": _margins.margins(observed, labels),
        "run_seconds": run_seconds,
        "predictions": predictions,
        "by_group": groups_found,
    }


def _trained(
    config: Config,
    problem: Problem,
    rule: ClippingRule,
    mechanism: Mechanism,
    outputs: bool,
    individual: bool,
    progress: Progress,
) -> Trajectory:
    """The runs of a case."""
    training = config.training
    key = jax.random.key(config.seed + 1)
    observed = dp_sgd.run(
        problem.model.apply,
        problem.params,
        problem.x,
        problem.targets,
        problem.loss,
        rule,
        learning_rate=mechanism.learning_rate,
        steps=mechanism.steps,
        **mechanism.parts,
        public=problem.public,
        optimizer=training.as_optimizer,
        reduction=training.reduction,
        test_x=problem.test_x,
        test_targets=problem.test_targets,
        record_every=training.record_every,
        outputs=outputs,
        individual=individual,
        progress=progress,
        key=key if training.n_seeds == 1 else jax.random.split(key, training.n_seeds),
    )
    jax.block_until_ready(observed.loss)
    return observed


def _checked_case(config: Config, case: ClippingConfig, content: Measured) -> Case:
    """A case that was read from a folder, whose content may be anything; raises if it is wrong."""
    predictions = content["predictions"].values()
    for fields in (content["run"], *(prediction["trajectory"] for prediction in predictions)):
        if set(fields) != {field.name for field in dataclasses.fields(Trajectory)}:
            raise ValueError("the fields of a trajectory have other names")
        Trajectory.from_xarray(_trajectory(fields).to_xarray())
    n_times = len(np.asarray(content["run"]["times"]))
    for margins in (content["run_margins"], *(prediction["margins"] for prediction in predictions)):
        _margins.check(margins, n_times)
    _by_group.check(content["by_group"], list(config.predictions), n_times)
    return _case(config, case, content)


def _case(config: Config, case: ClippingConfig, measured: Measured) -> Case:
    observed = _trajectory(measured["run"])
    predictions: dict[str, Prediction] = {}
    for name in config.predictions:
        prediction = measured["predictions"][name]
        predicted = _trajectory(prediction["trajectory"])
        compared = comparison.compare(predicted, observed)
        predictions[name] = Prediction(
            predicted, compared, float(prediction["seconds"]), prediction["margins"]
        )
    noise = measured["weight_noise"]
    return Case(
        case,
        float(measured["noise_multiplier"]),
        None if noise is None else float(noise),
        observed,
        float(measured["run_seconds"]),
        predictions,
        case.learning_rate_in(config.training),
        measured["run_margins"],
        measured["by_group"],
    )


def _fields(path: Trajectory) -> Fields:
    # Outputs take much room, and have served for margins and subgroups.
    path = dataclasses.replace(
        path, outputs=None, test_outputs=None, sensitivities=None, params=None
    )
    recorded = {name: value for name, value in vars(path).items() if name != "setup"}
    fields: dict[str, np.ndarray | str | None] = {"setup": setups.to_json(path.setup)}
    for name, value in recorded.items():
        fields[name] = None if value is None else np.asarray(value)
    return fields


def _trajectory(fields: Fields) -> Trajectory:
    arrays: Any = {
        name: None if value is None else jnp.asarray(value)
        for name, value in fields.items()
        if name != "setup"
    }
    return Trajectory(setup=setups.from_json(fields["setup"]), **arrays)
