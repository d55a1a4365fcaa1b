"""A plan from its configuration."""

from collections.abc import Callable

import jax

from ntkdp import advisor, clipping
from ntkdp.cli._planning.config import PlanningConfig
from ntkdp.experiment import ConfigError, problem_of
from ntkdp.optimizers import SGD


def planned(config: PlanningConfig, report: Callable[[str, float], None]) -> advisor.BudgetPlan:
    """The plan of a configuration."""
    report("loading data", 0.0)
    problem, asked = problem_of(config), config.plan
    epochs = asked.max_epochs
    report("kernel", 0.0)
    try:
        return advisor.plan_budget(
            problem.model,
            problem.params,
            (problem.x, problem.targets, problem.test_x, problem.test_targets),
            problem.loss,
            clipping.from_name(asked.rule, R=1.0),
            epsilons=asked.epsilons,
            delta=asked.delta,
            learning_rates=asked.learning_rates,
            clip_norms=asked.clip_norms,
            steps=asked.steps,
            sample_rates=asked.sample_rates,
            max_compute=None if epochs is None else epochs * len(problem.x),
            optimizer=SGD(momentum=asked.momentum),
            reduction=asked.reduction,
            objective=f"test_{asked.objective}",
            refinements=asked.refinements,
            n_runs=asked.n_runs,
            more_data=asked.more_data,
            kernels=asked.kernels,
            rank=asked.rank,
            max_samples=asked.max_samples,
            progress=lambda done: report("predicting the cells", done),
            key=jax.random.key(config.seed + 2),
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"field 'plan': {error}") from error
