"""An experiment: a configuration in, predictions, runs and their comparison out."""

import os
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ntkdp import (
    _config,
    _groups,
    clipping,
    comparison,
    datasets,
    dp_sgd,
    gradient_flow,
    losses,
    models,
    ntk,
)
from ntkdp._config import ClippingConfig, Config, ConfigError
from ntkdp._solve import recursion, solve
from ntkdp._types import Array, Params
from ntkdp.clipping import ClippingRule
from ntkdp.comparison import Comparison
from ntkdp.gradient_flow import Flow, HeavyBallFlow, KernelFlow, WeightFlow
from ntkdp.losses import Loss
from ntkdp.models import Model
from ntkdp.ntk import LayerwiseKernel
from ntkdp.trajectory import Trajectory

#: Called with what is being done and the fraction of it that is done.
Report = Callable[[str, float], None]

#: What a prediction needs to know of the network: the kernel's name in results, or None.
KERNEL_OF = {"exact": None, "frozen": "empirical", "infinite": "infinite", "recursion": "empirical"}
#: How predictions are called in tables and pictures.
LABELS = {
    "exact": "exact flow",
    "frozen": "frozen kernel",
    "infinite": "infinite width",
    "recursion": "kernel recursion",
}


class Problem(NamedTuple):
    """Model, data and loss, and the network's outputs at the start."""

    model: Model
    params: Params
    x: Array
    targets: Array
    test_x: Array
    test_targets: Array
    loss: Loss
    outputs: Array
    test_outputs: Array


class Kernel(NamedTuple):
    """A kernel of the training set, of the test set against it, and how long they took."""

    train: Array | LayerwiseKernel
    test: Array | LayerwiseKernel
    seconds: float


class Prediction(NamedTuple):
    """A predicted trajectory, held against the run."""

    trajectory: Trajectory
    comparison: Comparison
    seconds: float


class Case(NamedTuple):
    """One clipping rule: the run, and the predictions of it by name."""

    clipping: ClippingConfig
    run: Trajectory
    run_seconds: float
    predictions: dict[str, Prediction]


class Results(NamedTuple):
    """All cases of an experiment, and the kernels that the predictions used."""

    config: Config
    cases: list[Case]
    kernels: dict[str, Kernel]
    initial_norms: Array


def config(**fields: Any) -> Config:
    """A checked configuration from its fields, sections as dictionaries.

    Raises
    ------
    ConfigError
        Naming each wrong field, its value, and for an unknown one the nearest.

    Examples
    --------
    >>> import ntkdp
    >>> ntkdp.experiment.config(data={"n_train": 64}).data.n_train
    64
    """
    return _config.from_tree(fields)


def load_config(path: str | os.PathLike[str]) -> Config:
    """A checked configuration from a TOML file.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ConfigError
        If it is not TOML, or a field is unknown or has a wrong value.
    """
    return _config.load(path)


def rules_of(config: Config) -> list[ClippingRule]:
    """The clipping rules of a configuration, checked.

    Raises
    ------
    ConfigError
        An unknown rule or a parameter that is wrong or does not belong to the rule.
    """
    rules = []
    for number, case in enumerate(config.clipping):
        options: dict[str, Any] = {"scope": case.scope}
        options |= {
            name: getattr(case, name)
            for name in ("gamma", "r", "Z")
            if getattr(case, name) is not None
        }
        if case.rule != "none":
            options["R"] = case.clip_norm
        try:
            rule = clipping.from_name(case.rule, **options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"field 'clipping.{number}': {error}") from error
        if config.training.noise_multiplier > 0 and not rule.bounds_each_sample:
            raise ConfigError(
                f"field 'training.noise_multiplier': must be 0 with rule {case.rule!r}, whose "
                f"sensitivity is unbounded, got {config.training.noise_multiplier}"
            )
        rules.append(rule)
    return rules


def problem_of(config: Config) -> Problem:
    """Load the data, make the network and initialise it.

    Raises
    ------
    ConfigError
        Data or a model that cannot be had, a loss that does not fit the targets.
    """
    if config.dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise ConfigError(
            "field 'dtype': float64 needs JAX's 64-bit mode, call ntkdp.enable_x64() first"
        )
    data_config = config.data
    try:
        data = datasets.load(
            data_config.name,
            n_train=data_config.n_train,
            n_test=data_config.n_test,
            standardise=data_config.standardise,
            seed=config.seed,
            **({"flat": False} if _wants_images(config) else {}),
            **data_config.options,
        )
    except (OSError, TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"field 'data': {error}") from error
    options = {"delta": config.huber_delta} if config.loss == "huber" else {}
    loss = losses.from_name(config.loss, **options)
    # One output tells two classes apart for the logistic loss.
    n_outputs = 1 if config.loss == "logistic" else data.n_outputs
    x, test_x = (jnp.asarray(part, config.dtype) for part in (data.x_train, data.x_test))
    try:
        model = _model_of(config, n_outputs)
        params = model.init(jax.random.key(config.seed), x)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"field 'model': {config.model.kind} for samples of shape {x.shape[1:]}: {error}"
        ) from error
    params = jax.tree.map(lambda leaf: leaf.astype(config.dtype), params)
    targets, test_targets = (
        _as_targets(part, data.task, config, data.n_outputs) for part in (data.y_train, data.y_test)
    )
    try:
        targets = loss.check(targets, x.shape[0], n_outputs)
        test_targets = loss.check(test_targets, test_x.shape[0], n_outputs, "test targets")
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"field 'loss': {config.loss} does not fit the {data.task} data {data.name!r}: {error}"
        ) from error
    return Problem(
        model=model,
        params=params,
        x=x,
        targets=targets,
        test_x=test_x,
        test_targets=test_targets,
        loss=loss,
        outputs=model.apply(params, x),
        test_outputs=model.apply(params, test_x),
    )


def _wants_images(config: Config) -> bool:
    return config.model.kind == "cnn" and config.data.name in ("digits", "mnist5k")


def _as_targets(targets: Array, task: str, config: Config, n_classes: int) -> Array:
    if task == "classification" and config.loss in ("squared_error", "huber"):
        return jax.nn.one_hot(targets, n_classes, dtype=config.dtype)
    if jnp.issubdtype(targets.dtype, jnp.floating) or config.loss == "logistic":
        return targets.astype(config.dtype)
    return targets


def _model_of(config: Config, n_outputs: int) -> Model:
    settings = config.model
    build = models.mlp if settings.kind == "mlp" else models.cnn
    return build(
        settings.widths,
        n_outputs,
        activation=settings.activation,
        W_std=settings.W_std,
        b_std=settings.b_std,
        output_W_std=settings.output_W_std,
        parameterization=settings.parameterization,
    )


def kernel_of(config: Config, problem: Problem, kind: str) -> Kernel:
    """The empirical or infinite-width kernel, by layer if any rule needs the layers."""
    by_layer = any(case.scope == "layerwise" for case in config.clipping)
    start = time.perf_counter()
    if kind == "infinite":
        kernel_fn = ntk.layerwise_infinite_ntk if by_layer else ntk.infinite_ntk
        train = kernel_fn(problem.model, problem.x)
        test = kernel_fn(problem.model, problem.test_x, problem.x)
    else:
        empirical = ntk.layerwise_ntk if by_layer else ntk.empirical_ntk
        apply_fn, params, size = problem.model.apply, problem.params, config.batch_size
        train = empirical(apply_fn, params, problem.x, batch_size=size)
        test = empirical(apply_fn, params, problem.test_x, problem.x, batch_size=size)
    jax.block_until_ready((train, test))
    return Kernel(train, test, time.perf_counter() - start)


def run(config: Config, report: Report = lambda what, done: None) -> Results:
    """Predict training under each clipping rule, run it, and compare.

    Parameters
    ----------
    config : Config
        See :func:`ntkdp.experiment.load_config`; float64 needs :func:`ntkdp.enable_x64` first.
    report : callable, optional
        Called with what is being done and the fraction of it that is done.

    Returns
    -------
    Results
        ``seconds`` of flows exclude compilation; those of a run or a recursion include it, a few
        seconds the first time that their program is met.

    Raises
    ------
    ConfigError
        A field that does not fit the others, naming it.
    MemoryError
        A kernel that does not fit.

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
    rules = rules_of(config)
    report("loading data", 0.0)
    problem = problem_of(config)
    for number, rule in enumerate(rules):
        try:
            if rule.scope == "layerwise":
                rule.check_groups(_groups.resolve(problem.params).size)
        except ValueError as error:
            raise ConfigError(f"field 'clipping.{number}.clip_norm': {error}") from error
    needed = {KERNEL_OF[name] for name in config.predictions}
    kernels = {}
    for kind in sorted(kind for kind in needed if kind is not None):
        report(f"{kind} kernel", 0.0)
        kernels[kind] = kernel_of(config, problem, kind)
    gradient = problem.loss.output_gradient(problem.outputs, problem.targets)
    norms = ntk.per_sample_gradient_norms(problem.model.apply, problem.params, problem.x, gradient)
    cases = [
        _case(config, problem, kernels, case, rule, report)
        for case, rule in zip(config.clipping, rules, strict=True)
    ]
    return Results(config, cases, kernels, norms)


@cache
def _with_momentum(momentum: float) -> Callable[[Any], optax.GradientTransformation]:
    # One object for all cases: another would compile the same program again.
    return partial(optax.sgd, momentum=momentum)


def _case(
    config: Config,
    problem: Problem,
    kernels: dict[str, Kernel],
    case: ClippingConfig,
    rule: ClippingRule,
    report: Report,
) -> Case:
    training = config.training
    learning_rate = case.learning_rate or training.learning_rate
    steps = case.steps or training.steps
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
        learning_rate=learning_rate,
        steps=steps,
        noise_multiplier=training.noise_multiplier,
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

    predictions: dict[str, Prediction] = {}
    for name in config.predictions:
        what = f"{case.label}: {LABELS[name]}"
        report(what, 0.0)
        predicted, seconds = _predict(
            config,
            problem,
            kernels,
            rule,
            name,
            observed,
            learning_rate,
            steps,
            partial(report, what),
        )
        predictions[name] = Prediction(predicted, comparison.compare(predicted, observed), seconds)
    return Case(case, observed, run_seconds, predictions)


def _predict(
    config: Config,
    problem: Problem,
    kernels: dict[str, Kernel],
    rule: ClippingRule,
    name: str,
    observed: Trajectory,
    learning_rate: float,
    steps: int,
    progress: Callable[[float], None],
) -> tuple[Trajectory, float]:
    training = config.training
    flow, initial = _flow(config, problem, kernels, rule, name)
    if name == "recursion":
        assert isinstance(flow, KernelFlow)
        start = time.perf_counter()
        predicted = recursion(
            flow,
            initial,
            learning_rate=learning_rate,
            steps=steps,
            record_every=training.record_every,
            progress=progress,
        )
        jax.block_until_ready(predicted.loss)
        return predicted, time.perf_counter() - start

    unit = 1.0
    if training.momentum > 0:
        # The flow with inertia has its own unit of time, sqrt(learning_rate) a step.
        unit = learning_rate**0.5
        flow = HeavyBallFlow(flow, (1 - training.momentum) / unit)

    def solved(times: Array, progress: Any) -> Trajectory:
        path = solve(flow, initial, times, rtol=config.rtol, atol=config.atol, progress=progress)
        jax.block_until_ready(path.loss)
        return path

    times = observed.times / unit
    # A horizon this short takes a few steps: it compiles the program that is timed next.
    solved(times * 1e-9, progress)
    start = time.perf_counter()
    predicted = solved(times, progress)
    return predicted.rescale_time(unit), time.perf_counter() - start


def _flow(
    config: Config, problem: Problem, kernels: dict[str, Kernel], rule: ClippingRule, name: str
) -> tuple[Flow, Any]:
    kind = KERNEL_OF[name]
    if kind is None:
        weight_flow = WeightFlow(
            problem.model.apply,
            problem.x,
            problem.targets,
            problem.loss,
            rule,
            reduction=config.training.reduction,
            test_x=problem.test_x,
            test_targets=problem.test_targets,
        )
        return weight_flow, problem.params
    kernel = kernels[kind]
    kernel_flow = gradient_flow.KernelFlow(
        kernel.train,
        problem.targets,
        problem.loss,
        rule,
        reduction=config.training.reduction,
        test_kernel=kernel.test,
        test_targets=problem.test_targets,
    )
    return kernel_flow, (problem.outputs, problem.test_outputs)
