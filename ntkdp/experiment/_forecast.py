"""Private runs that are predicted, and nothing that is trained in private."""

import time
from typing import Any, NamedTuple

import jax
import numpy as np

from ntkdp import privacy, stochastic_flow
from ntkdp._backend.config_files import ConfigError
from ntkdp.clipping import ClippingRule
from ntkdp.experiment._config import ClippingConfig, Config
from ntkdp.experiment._predictions import Mechanism
from ntkdp.experiment._problem import ModelLike, Problem, problem_of, rules_of, with_model
from ntkdp.experiment._run import Report
from ntkdp.stochastic_flow import Method
from ntkdp.trajectory import Band, Trajectory, band

#: Quantiles of the band, which holds 90% of the runs.
_BAND = (0.05, 0.95)


class Forecast(NamedTuple):
    """A private run under one clipping rule, predicted.

    ``trajectory`` has the runs that were drawn along its first axis, or one run if nothing is
    random, and ``trajectory.method`` says how they were predicted and why. ``epsilon`` is what the
    run spends at ``delta``; both are None without noise.

    Made by :func:`forecast`.
    """

    clipping: ClippingConfig
    learning_rate: float
    steps: int
    noise_multiplier: float
    epsilon: float | None
    delta: float | None
    trajectory: Trajectory
    seconds: float

    def final(self, name: str) -> tuple[float, float, float] | None:
        """Mean and 90% band of a quantity after the last step, or None if it is not recorded."""
        values = getattr(self.trajectory, name)
        if values is None:
            return None
        last = np.atleast_1d(np.asarray(values)[..., -1])
        low, high = np.quantile(last, _BAND)
        return float(last.mean()), float(low), float(high)

    def band(self, name: str) -> Band:
        """Mean and 90% band of a quantity over time."""
        values = np.asarray(getattr(self.trajectory, name))
        return band(np.atleast_2d(values), _BAND)


def forecast(
    config: Config,
    report: Report | None = None,
    *,
    method: Method = "auto",
    model: ModelLike | None = None,
) -> list[Forecast]:
    """Predict a private run under each clipping rule by the method that may be trusted.

    Nothing is trained but, where the method needs it, a run without noise.

    Parameters
    ----------
    config : Config
        See :func:`ntkdp.experiment.load_config`; float64 needs :func:`ntkdp.enable_x64` first. Its
        ``predictions`` are not used.
    report : callable, optional
        Called with a description of the current task and the fraction of it that is done.
    method : str
        As for :func:`ntkdp.predict`: "auto" takes the one that may be trusted, which for a network
        may take minutes; "frozen" takes seconds.
    model : Model, callable or str, optional
        The network in place of ``config.model``, as for :func:`run`.

    Returns
    -------
    list of Forecast

    Raises
    ------
    TypeError
        If ``config`` is no ``Config``.
    ConfigError
        If a field does not fit the others, or the training has no such prediction.
    MemoryError
        If the prediction does not fit.

    Examples
    --------
    >>> import ntkdp
    >>> ntkdp.enable_x64()
    >>> config = ntkdp.experiment.config(
    ...     data={"n_train": 16, "n_test": 8}, model={"widths": []},
    ...     training={"steps": 4, "epsilon": 3.0, "delta": 1e-3}, clipping=[{"clip_norm": 0.1}])
    >>> (one,) = ntkdp.experiment.forecast(config)
    >>> mean, low, high = one.final("loss")
    >>> low < mean < high
    True
    """
    if not isinstance(config, Config):
        raise TypeError(
            "config must be a Config, e.g. ntkdp.experiment.load_config(path), got "
            f"{type(config).__name__}"
        )
    if model is not None:
        config = with_model(config, model)
    rules = rules_of(config)
    _refuse_other_training(config)
    if report is not None:
        report("loading data", 0.0)
    problem = problem_of(config, model if config.model.kind == "given" else None)
    forecasts = []
    for number, (case, rule) in enumerate(zip(config.clipping, rules, strict=True)):
        if report is not None:
            report(f"{case.label}: predicting", number / len(rules))
        forecasts.append(_forecast(config, problem, case, rule, method))
    return forecasts


def _refuse_other_training(config: Config) -> None:
    training = config.training
    others = list(training.other_steps)
    if training.adaptive.quantile is not None:
        others.append("adaptive")
    if training.noise.kind == "kernel_optimal":
        others.append("noise.kind")
    if others:
        raise ConfigError(
            f"field 'training.{others[0]}': must be left out where nothing is trained, since "
            "ntkdp.predict does not know it; ntkdp compare predicts it next to a run"
        )


def _forecast(
    config: Config, problem: Problem, case: ClippingConfig, rule: ClippingRule, method: Method
) -> Forecast:
    training = config.training
    mechanism = Mechanism.of(config, case, problem.n_params)
    start = time.perf_counter()
    options: dict[str, Any] = {
        "learning_rate": mechanism.learning_rate,
        "steps": mechanism.steps,
        "noise_multiplier": mechanism.noise_multiplier,
        "batches": mechanism.batches,
        "noise": mechanism.noise,
        "optimizer": training.as_optimizer,
        "reduction": training.reduction,
        "record_every": training.record_every,
        "method": method,
        "n_runs": training.n_predicted,
        "key": jax.random.key(config.seed + 1),
    }
    data = (problem.x, problem.targets, problem.test_x, problem.test_targets)
    try:
        predicted = stochastic_flow.predict(
            problem.model, problem.params, data, problem.loss, rule, **options
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"field 'clipping' with rule {case.rule!r}: {error}") from error
    jax.block_until_ready(predicted.loss)
    seconds = time.perf_counter() - start
    epsilon = delta = None
    if training.noisy:
        n = problem.x.shape[0]
        delta = training.delta or min(1e-5, 1 / (10 * n))
        epsilon = privacy.spent(
            mechanism.noise_multiplier,
            mechanism.steps,
            delta,
            batches=mechanism.batches,
            noise=mechanism.noise,
            n_samples=n,
        )
    return Forecast(
        case,
        mechanism.learning_rate,
        mechanism.steps,
        mechanism.noise_multiplier,
        epsilon,
        delta,
        predicted,
        seconds,
    )
