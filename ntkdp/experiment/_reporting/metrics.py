"""All measurements of an experiment, as a tree of plain numbers and text."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from ntkdp._backend.types import Array
from ntkdp._results.provenance import provenance
from ntkdp.comparison import Comparison
from ntkdp.experiment._of_outputs import by_group as _by_group
from ntkdp.experiment._of_outputs.margins import error_of_margins
from ntkdp.experiment._predictions import KERNEL_OF
from ntkdp.experiment._reporting.verdict import are_recorded, facts, neighbours, verdict
from ntkdp.experiment._run import Results
from ntkdp.trajectory import Trajectory, mean_over_seeds


def metrics(results: Results) -> dict[str, Any]:
    """All measurements, as a tree of plain numbers and text."""
    entries = []
    for case in results.cases:
        for name, prediction in case.predictions.items():
            entries.append(
                {
                    "clipping": {
                        "rule": case.clipping.rule,
                        "scope": case.clipping.scope,
                        "clip_norm": None
                        if case.clipping.rule == "none"
                        else case.clipping.clip_norm,
                    },
                    "learning_rate": case.learning_rate,
                    "steps": case.clipping.steps or results.config.training.steps,
                    "prediction": name,
                    "kernel": KERNEL_OF[name],
                    "sup_relative_error": float(prediction.comparison.sup_relative_error),
                    "mean_relative_error": float(prediction.comparison.mean_relative_error),
                    "error_of_fall": prediction.comparison.error_of_fall,
                    "error_of_margins": error_of_margins(prediction.margins, case.run_margins),
                    "subgroups": _by_group.as_entries(case.by_group, name),
                    "weight_noise_variance": case.weight_noise,
                    "noise_multiplier": case.noise_multiplier,
                    "band": _band(prediction.comparison),
                    "initial_clip_fraction": clipped_at_start(case.run),
                    "final": {
                        "predicted": _final(prediction.trajectory),
                        "observed": _final(case.run),
                    },
                    "seconds": {
                        "prediction": prediction.seconds,
                        "observation": case.run_seconds,
                    },
                    "message": {
                        "prediction": prediction.trajectory.message,
                        "observation": case.run.message,
                    },
                }
            )
    norms = np.asarray(results.initial_norms)
    return {
        **provenance("jax", "diffrax", "neural-tangents"),
        "config": results.config.model_dump(mode="json"),
        "runs": "recorded" if are_recorded(results) else "trained",
        "facts": dict(facts(results)),
        "verdict": verdict(results),
        "neighbours": neighbours(results),
        "kernel_seconds": {kind: kernel.seconds for kind, kernel in results.kernels.items()},
        "initial_gradient_norms": {
            f"quantile_{q:g}": float(np.quantile(norms, q)) for q in (0, 0.05, 0.5, 0.95, 1)
        },
        "results": entries,
    }


def _band(compared: Comparison) -> dict[str, Any] | None:
    """The place of the runs in the predicted band at the last time; None for a single path."""
    covered, crps, z = compared.band_coverage, compared.mean_crps, compared.standardised_error
    if covered is None or crps is None:
        return None
    return {
        "level": covered.level,
        "share_of_runs": float(covered.share[-1]),
        "p_value": float(covered.p_value[-1]),
        "mean_crps": float(crps),
        "standardised_error": None if z is None else float(z[-1]),
    }


def _mean_at(values: Array, index: int) -> float:
    """The mean over seeds of recorded values at one place in time."""
    return float(jnp.mean(values[..., index]))


def clipped_at_start(run: Trajectory) -> float | None:
    """The share of clipped samples at the start; None if a log does not say it."""
    start = run.times[0] if run.start is None else run.start
    if mean_over_seeds(run, "clip_fraction") is None or run.times[0] > start:
        return None
    return _mean_at(run.clip_fraction, 0)


def _final(path: Trajectory) -> dict[str, float | None]:
    final = {"loss": _mean_at(path.loss, -1), "accuracy": None}
    if path.accuracy is not None:
        final["accuracy"] = _mean_at(path.accuracy, -1)
    if path.test_loss is not None:
        final["test_loss"] = _mean_at(path.test_loss, -1)
    if path.test_accuracy is not None:
        final["test_accuracy"] = _mean_at(path.test_accuracy, -1)
    return final
