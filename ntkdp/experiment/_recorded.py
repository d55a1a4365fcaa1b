"""Runs that were recorded elsewhere, in place of those that an experiment trains."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from ntkdp._backend.config_files import ConfigError
from ntkdp._results import setup as setups
from ntkdp.clipping import ClippingRule
from ntkdp.experiment._config import Config
from ntkdp.experiment._predictions import Mechanism
from ntkdp.losses import Loss
from ntkdp.trajectory import Trajectory, has_times, recorded_steps, times_of_steps

#: How far a recorded time may be from that of its step, in steps.
_TOLERANCE = 0.01


def require_one_rule(config: Config) -> None:
    """Raise unless the configuration has the one clipping rule of recorded runs."""
    labels = [rule.label for rule in config.clipping]
    if len(labels) > 1:
        raise ConfigError(
            "field 'clipping': must hold the one rule that observed runs were made with, got "
            f"{len(labels)} ({', '.join(labels)}); write one [[clipping]], and compare the runs of "
            "another rule on their own"
        )


def read_recorded(
    config: Config, path: str | os.PathLike[str], columns: Mapping[str, str | None] | None = None
) -> Trajectory:
    """The runs in a CSV file, or in a ``.nc`` file that :meth:`ntkdp.Trajectory.save` wrote."""
    require_one_rule(config)
    if Path(path).suffix == ".nc":
        if columns:
            raise ConfigError(f"columns must be left out with a .nc file, got {columns!r}")
        return Trajectory.load(path)
    rate = config.clipping[0].learning_rate_in(config.training)
    timed = has_times(path, columns)
    return Trajectory.from_csv(path, learning_rate=None if timed else rate, columns=columns)


def as_recorded(
    config: Config, loss: Loss, rule: ClippingRule, mechanism: Mechanism, observed: Trajectory
) -> Trajectory:
    """Observed runs at the steps and times of the configuration.

    Raises
    ------
    ConfigError
        If the runs are not of the training that the configuration describes: naming its field.
    """
    if observed.times.ndim != 1 or observed.loss.shape[-1:] != observed.times.shape:
        raise ConfigError(
            "observed must have times of shape (T,) and a loss of shape (T,) or (S, T), got "
            f"{observed.times.shape} and {observed.loss.shape}"
        )
    runs = len(observed.loss) if observed.loss.ndim == 2 else 1
    if config.training.n_seeds not in (1, runs):
        raise ConfigError(
            f"field 'training.n_seeds': must be left out, or be the number of observed runs, "
            f"{runs}, got {config.training.n_seeds}"
        )
    if config.data.groups is not None:
        raise ConfigError(
            "field 'data.groups': must be left out with observed runs, which do not say whom they "
            f"clip, got {config.data.groups!r}"
        )
    steps = _steps(observed, mechanism.learning_rate)
    _check_steps(steps, mechanism.steps, config.training.record_every)
    _check_setup(observed, loss, rule, mechanism, config)
    return replace(
        observed,
        times=times_of_steps(mechanism.learning_rate, steps),
        steps=jnp.asarray(steps),
        start=jnp.zeros(()) if steps[0] > 0 else None,
    )


def _steps(observed: Trajectory, rate: float) -> np.ndarray:
    """The recorded steps, which take the recorded times."""
    times = np.asarray(observed.times, np.float64)
    if observed.steps is not None:
        steps = np.asarray(observed.steps)
        wrong = np.flatnonzero(~(np.abs(times - rate * steps) <= _tolerance(times, rate)))
        if wrong.size:
            time, step = times[wrong[-1]], steps[wrong[-1]]
            raise ConfigError(
                f"field 'training.learning_rate': {rate:g} takes step {step} to time "
                f"{rate * step:g}, but observed is at time {time:g} there; set the learning rate "
                "of the runs, or leave out a column that holds the time of a clock"
            )
        return steps
    steps = np.rint(times / rate).astype(np.int64)
    wrong = np.flatnonzero(~(np.abs(times - rate * steps) <= _tolerance(times, rate)))
    if wrong.size:
        raise ConfigError(
            f"field 'training.learning_rate': must divide the times of observed into whole steps, "
            f"got {rate:g} for time {times[wrong[0]]:g}"
        )
    return steps


def _tolerance(times: np.ndarray, rate: float) -> np.ndarray:
    """How far from those of steps times may be, which may be in single precision."""
    tolerance: np.ndarray = _TOLERANCE * rate + 1e-6 * times
    return tolerance


def _check_steps(steps: np.ndarray, last: int, record_every: int) -> None:
    """Raise unless predictions record all these steps, and end with them."""
    if steps[-1] != last:
        raise ConfigError(
            f"field 'training.steps': must be the last step of observed, {steps[-1]}, got {last}; "
            "for runs that went on, set noise_multiplier in place of a budget"
        )
    missing = np.setdiff1d(steps, recorded_steps(last, record_every))
    if missing.size:
        # The last step is recorded always.
        every = int(np.gcd.reduce(steps[steps < last]))
        raise ConfigError(
            f"field 'training.record_every': must make predictions record step {missing[0]}, as "
            f"observed does, got {record_every}; set {every}"
        )


def _check_setup(
    observed: Trajectory, loss: Loss, rule: ClippingRule, mechanism: Mechanism, config: Config
) -> None:
    """Raise unless runs that know what they are of are of this training.

    The rest, such as public samples, is compared with each prediction.
    """
    n_private = config.data.n_train - config.public.rows
    optimizer, options = setups.optimizer_of(config.training.as_optimizer)
    of_config = tuple(
        replace(
            phase,
            clipping=setups.described(rule),
            loss=setups.described(loss),
            reduction=config.training.reduction,
            learning_rate=(mechanism.learning_rate,),
            **setups.noise_of(mechanism.noise_multiplier),
            sample_rate=mechanism.batches.share(n_private),
            batches=setups.batches_in_words(mechanism.batches),
            optimizer=optimizer,
            optimizer_options=options,
        )
        for phase in observed.setup
    )
    found = setups.differences(of_config, observed.setup)
    if found:
        name, words = next(iter(found.items()))
        field = name if name in ("clipping", "loss") else f"training.{name}"
        raise ConfigError(f"field {field!r}: observed is of another training: {words}")
