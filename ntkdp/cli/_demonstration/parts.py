"""The four parts of the demonstration: predictions, and the runs that they are held against."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ntkdp
from ntkdp import advisor, comparison, dp_sgd, experiment, stochastic_flow
from ntkdp._backend.types import Array
from ntkdp.advisor import Advice, Grid
from ntkdp.cli._demonstration.problem import (
    BUDGET,
    DRAWN,
    LOSS,
    N_TRAIN,
    OBSERVED,
    RULE,
    STEPS,
    Problem,
)
from ntkdp.comparison import CellMetrics, Comparison
from ntkdp.experiment import Results
from ntkdp.trajectory import Trajectory

#: Learning rates and clipping norms of the map, and runs of each cell.
RATES, NORMS, RUNS_OF_A_CELL = (0.5, 1.0, 2.0, 4.0), (0.1, 0.3, 1.0, 3.0, 10.0), 2
#: Learning rates of the private run, and of the one in which noise moves the kernel.
RATE, RATE_OF_THE_FAILURE = 2.0, 8.0
_RECORD_EVERY = 3


class Private(NamedTuple):
    """Private runs, and the runs that were drawn before them."""

    predicted: Trajectory
    observed: Trajectory
    noise_multiplier: float

    @property
    def compared(self) -> Comparison:
        """How far the predicted runs are from the observed ones."""
        return ntkdp.compare(self.predicted, self.observed)

    @property
    def predicted_band(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper end of the 90% band of the training loss, over time."""
        low, high = comparison.band(self.predicted.loss, (0.05, 0.95)).quantiles
        return np.asarray(low), np.asarray(high)

    @property
    def n_inside(self) -> int:
        """Observed runs that end inside the 90% band."""
        low, high = self.predicted_band
        final = self.observed.loss[:, -1]
        return int(jnp.sum((final >= low[-1]) & (final <= high[-1])))


class Map(NamedTuple):
    """Cells of learning rate and clipping norm, predicted and observed."""

    predicted: Grid
    observed: CellMetrics
    advice: Advice

    @property
    def regret(self) -> float:
        """Test accuracy that the advised cell loses against the best observed one."""
        return comparison.regret(self.observed, self.advice.index)


class Failure(NamedTuple):
    """Runs in which noise moves the kernel, the frozen kernel, and kernels between times."""

    frozen: Trajectory
    between_times: Trajectory
    observed: Trajectory
    weight_noise: float


def private(problem: Problem) -> Private:
    """A private run: the band is drawn first, under the frozen kernel, then the runs are made."""
    predicted = stochastic_flow.ensemble(
        problem.flow(),
        problem.outputs,
        noise_kernel=problem.kernel,
        key=jax.random.split(jax.random.key(1), DRAWN),
        **_mechanism(RATE),
    )
    sigma = BUDGET.noise_multiplier(STEPS, 1.0)
    return Private(predicted, _observed(problem, RATE, 2), float(sigma))


def without_noise() -> Results:
    """The paper's flow without noise: exact, frozen and of infinite width, on one learning rate."""
    settings: Any = {
        "name": "demo",
        "data": {"n_train": 128, "n_test": 64},
        "model": {"widths": [512]},
        "predictions": ["exact", "frozen", "infinite"],
        "training": {"learning_rate": 1.5, "steps": 80},
        "clipping": [
            {"scope": scope, "clip_norm": norm}
            for scope in ("flat", "layerwise")
            for norm in (1.0, 1000.0)
        ],
        "dtype": "float32",
    }
    return experiment.run(experiment.config(**settings))


def map_of_cells(problem: Problem) -> Map:
    """Every learning rate with every clipping norm, predicted, then observed."""
    options = {**_mechanism(RATE), "record_every": STEPS}
    del options["learning_rate"], options["record_every"]
    grid = advisor.predict(
        problem.flow(),
        problem.outputs,
        learning_rates=RATES,
        clip_norms=NORMS,
        noise_kernel=problem.kernel,
        key=jax.random.split(jax.random.key(3), 8),
        **options,
    )
    rates, norms = grid.cells()
    keys = jax.random.split(jax.random.key(4), RUNS_OF_A_CELL)
    cells = []
    for rate, norm in zip(rates, norms, strict=True):
        rule = ntkdp.clipping.Abadi(float(norm))
        run = _run(problem, rule, float(rate), keys, record_every=STEPS, outputs=True)
        assert run.outputs is not None
        assert run.test_outputs is not None
        cells.append(
            comparison.measure(
                LOSS,
                "mean",
                grid.initial_loss,
                (run.outputs[None, :, -1], problem.y),
                (run.test_outputs[None, :, -1], problem.test_y),
            )
        )
    observed = jax.tree.map(lambda *parts: np.concatenate(parts), *cells)
    return Map(grid, observed, advisor.advise(grid))


def failure(problem: Problem) -> Failure:
    """A learning rate at which noise moves the kernel, so that a frozen one cannot predict."""
    options = _mechanism(RATE_OF_THE_FAILURE)
    keys = jax.random.split(jax.random.key(5), DRAWN)
    frozen = stochastic_flow.ensemble(
        problem.flow(), problem.outputs, noise_kernel=problem.kernel, key=keys, **options
    )
    flow = stochastic_flow.TwoTimeFlow(problem.model, problem.x, problem.y, LOSS, RULE)
    between = stochastic_flow.two_time_ensemble(flow, problem.outputs[0], key=keys, **options)
    variance = stochastic_flow.weight_noise_variance(
        RULE, N_TRAIN, learning_rate=RATE_OF_THE_FAILURE, steps=STEPS, noise_multiplier=BUDGET
    )
    observed = _observed(problem, RATE_OF_THE_FAILURE, 6)
    return Failure(frozen, between, observed, float(np.max(np.asarray(variance)[-1])))


def _mechanism(learning_rate: float) -> dict[str, Any]:
    return {
        "learning_rate": learning_rate,
        "steps": STEPS,
        "noise_multiplier": BUDGET,
        "record_every": _RECORD_EVERY,
    }


def _observed(problem: Problem, learning_rate: float, seed: int) -> Trajectory:
    keys = jax.random.split(jax.random.key(seed), OBSERVED)
    return _run(problem, RULE, learning_rate, keys, record_every=_RECORD_EVERY)


def _run(
    problem: Problem,
    rule: ntkdp.clipping.Abadi,
    learning_rate: float,
    keys: Array,
    *,
    record_every: int,
    outputs: bool = False,
) -> Trajectory:
    return dp_sgd.run(
        problem.model.apply,
        problem.params,
        problem.x,
        problem.y,
        LOSS,
        rule,
        test_x=problem.test_x,
        test_targets=problem.test_y,
        outputs=outputs,
        key=keys,
        **{**_mechanism(learning_rate), "record_every": record_every},
    )
