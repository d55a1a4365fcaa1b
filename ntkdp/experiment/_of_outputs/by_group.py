"""Results by subgroup of the samples: losses, accuracies, clipping, and what privacy costs."""

from typing import Any, TypedDict

import numpy as np

from ntkdp import comparison, privacy
from ntkdp._backend.types import Array
from ntkdp.batches import Full, Poisson
from ntkdp.clipping import ClippingRule
from ntkdp.experiment._predictions import Kernel, Mechanism
from ntkdp.experiment._problem import Problem
from ntkdp.gradient_flow import KernelFlow
from ntkdp.noise import Independent
from ntkdp.trajectory import Trajectory


class OfGroups(TypedDict):
    """Numbers by subgroup of a run or a prediction, means over samples and seeds.

    Losses and accuracies are ``(T, G)``, the others ``(G,)``. NaN stands for a subgroup without a
    sample, and None for what is not known.
    """

    loss: np.ndarray
    accuracy: np.ndarray | None
    test_loss: np.ndarray | None
    test_accuracy: np.ndarray | None
    clipped: np.ndarray | None
    epsilon: np.ndarray | None


class ByGroup(TypedDict):
    """Names and sizes of the subgroups, and numbers by subgroup of the run and its predictions."""

    names: list[str]
    counts: list[int]
    test_counts: list[int]
    delta: float
    run: OfGroups
    predictions: dict[str, OfGroups]


def names_of(problem: Problem) -> list[str]:
    """Names of the subgroups of the training and the test samples together."""
    parts = [part for part in (problem.groups, problem.test_groups) if part is not None]
    return sorted({str(label) for part in parts for label in part.tolist()})


def counts_of(names: list[str], labels: np.ndarray | None) -> list[int]:
    """How many samples each subgroup has."""
    return [0 if labels is None else int(np.sum(labels == name)) for name in names]


def is_known_one_by_one(mechanism: Mechanism, rule: ClippingRule) -> bool:
    """Whether a run can record what each sample adds to it."""
    independent = mechanism.noise is None or isinstance(mechanism.noise, Independent)
    others = (mechanism.adaptive, mechanism.sharpness_aware, mechanism.zeroth_order)
    plain = all(part is None for part in others)
    drawn = isinstance(mechanism.batches, Full | Poisson)
    return drawn and independent and plain and rule.bounds_each_sample


def delta_of(given: float | None, n_samples: int) -> float:
    """The delta at which epsilon is shown: that of the budget, or one over the samples."""
    return 1 / n_samples if given is None else given


def of_run(problem: Problem, mechanism: Mechanism, delta: float, path: Trajectory) -> OfGroups:
    """Numbers by subgroup of runs."""
    record, clipped, epsilon = path.sensitivities, None, None
    if record is not None:
        clipped = np.asarray(record.clipped / record.steps[..., None])
        if mechanism.noise_multiplier > 0:
            costs = privacy.individual(
                record,
                noise_multiplier=mechanism.noise_multiplier,
                batches=mechanism.batches,
            )
            epsilon = costs.epsilon(delta)
    return _of_groups(problem, path, clipped, epsilon)


def of_prediction(
    problem: Problem,
    mechanism: Mechanism,
    rule: ClippingRule,
    delta: float,
    kernel: Kernel | None,
    steps: Array,
    path: Trajectory,
) -> OfGroups:
    """The same of a prediction; without a kernel it does not say whom it clips."""
    clipped = epsilon = None
    if kernel is not None and is_known_one_by_one(mechanism, rule):
        assert path.outputs is not None
        flow = KernelFlow(kernel.train, problem.targets, problem.loss, rule)
        lasts = np.diff(np.asarray(steps))
        states = path.outputs[..., :-1, :, :]
        clipped = np.average(np.asarray(flow.clipped(states)), axis=-2, weights=lasts)
        if mechanism.noise_multiplier > 0:
            costs = privacy.individual(
                flow.sensitivities(path.outputs),
                noise_multiplier=mechanism.noise_multiplier,
                batches=mechanism.batches,
                steps=steps,
            )
            epsilon = costs.epsilon(delta)
    return _of_groups(problem, path, clipped, epsilon)


def _of_groups(
    problem: Problem, path: Trajectory, clipped: np.ndarray | None, epsilon: np.ndarray | None
) -> OfGroups:
    names = names_of(problem)

    def of_outputs(outputs: Array | None, targets: Array, labels: np.ndarray | None) -> Any:
        if outputs is None or labels is None:
            return None, None
        found = comparison.by_group(outputs, targets, problem.loss, labels)
        return tuple(
            None if part is None else _spread(part, found.labels, names)
            for part in (found.loss, found.accuracy)
        )

    def of_samples(values: np.ndarray | None) -> np.ndarray | None:
        if values is None or problem.groups is None:
            return None
        mean = values.reshape(-1, values.shape[-1]).mean(axis=0)
        of_names = [mean[problem.groups == name] for name in names]
        return np.array([part.mean() if part.size else np.nan for part in of_names])

    loss, accuracy = of_outputs(path.outputs, problem.targets, problem.groups)
    test_loss, test_accuracy = of_outputs(
        path.test_outputs, problem.test_targets, problem.test_groups
    )
    return {
        "loss": loss,
        "accuracy": accuracy,
        "test_loss": test_loss,
        "test_accuracy": test_accuracy,
        "clipped": of_samples(clipped),
        "epsilon": of_samples(epsilon),
    }


def _spread(values: np.ndarray, labels: np.ndarray, names: list[str]) -> np.ndarray:
    """Means over seeds ``(T, G)`` in the order of the names, NaN for those without a sample."""
    mean = values.reshape(-1, *values.shape[-2:]).mean(axis=0)
    spread = np.full((len(mean), len(names)), np.nan)
    spread[:, [names.index(str(label)) for label in labels]] = mean
    return spread


def check(found: object, predictions: list[str], n_times: int) -> None:
    """Raise unless these are numbers by subgroup of such a case, or None."""
    if found is None:
        return
    if not isinstance(found, dict) or set(found) != set(ByGroup.__annotations__):
        raise ValueError("the numbers by subgroup have other names")
    n_groups = len(found["names"])
    for name, kind in (("names", str), ("counts", int), ("test_counts", int)):
        part = found[name]
        if not isinstance(part, list) or [type(one) for one in part] != [kind] * n_groups:
            raise ValueError(f"{name} of subgroups must be {n_groups} of {kind.__name__}")
    if not isinstance(found["delta"], float):
        raise ValueError("delta by subgroup must be a number")
    if list(found["predictions"]) != predictions:
        raise ValueError("there are other predictions by subgroup")
    for part in (found["run"], *found["predictions"].values()):
        if set(part) != set(OfGroups.__annotations__):
            raise ValueError("the numbers of a subgroup have other names")
        for name, values in part.items():
            shape = (n_groups,) if name in ("clipped", "epsilon") else (n_times, n_groups)
            if values is None and name != "loss":
                continue
            numbers = isinstance(values, np.ndarray) and values.dtype.kind == "f"
            if not numbers or values.shape != shape:
                raise ValueError(f"{name} by subgroup must be numbers of shape {shape}")


#: Columns of the table of a report.
COLUMNS = (
    "clipping",
    "prediction",
    "subgroup",
    "samples",
    "tested",
    "final loss, predicted",
    "observed",
    "test loss, predicted",
    "observed",
    "test accuracy, predicted",
    "observed",
    "clipped, predicted",
    "observed",
    "epsilon, predicted",
    "observed",
)


def rows(case: str, labels: dict[str, str], found: ByGroup) -> list[tuple[str, ...]]:
    """Rows of the table of a case, a subgroup of a prediction each."""
    lines: list[tuple[str, ...]] = []
    run = found["run"]
    for prediction, label in labels.items():
        own = found["predictions"][prediction]
        for number, name in enumerate(found["names"]):
            pairs = [
                _last(part[kind], number, form)  # type: ignore[literal-required]
                for kind, form in (
                    ("loss", ".4f"),
                    ("test_loss", ".4f"),
                    ("test_accuracy", ".1%"),
                    ("clipped", ".0%"),
                    ("epsilon", ".2f"),
                )
                for part in (own, run)
            ]
            sizes = (str(found["counts"][number]), str(found["test_counts"][number]))
            lines.append((case, label, name, *sizes, *pairs))
    return lines


def _last(values: np.ndarray | None, number: int, form: str) -> str:
    if values is None:
        return ""
    last = float(values[-1, number] if values.ndim == 2 else values[number])
    return "" if np.isnan(last) else format(last, form)


def as_entries(found: ByGroup | None, prediction: str) -> list[dict[str, Any]] | None:
    """Numbers of the subgroups at the end, for ``metrics.json``."""
    if found is None:
        return None

    def of(part: OfGroups, number: int) -> dict[str, float | None]:
        kinds: Any = part
        return {
            name: None
            if kinds[name] is None
            else float(kinds[name][-1, number] if kinds[name].ndim == 2 else kinds[name][number])
            for name in OfGroups.__annotations__
        }

    return [
        {
            "name": name,
            "samples": found["counts"][number],
            "test_samples": found["test_counts"][number],
            "predicted": of(found["predictions"][prediction], number),
            "observed": of(found["run"], number),
        }
        for number, name in enumerate(found["names"])
    ]
