"""The errors of all predictions as a table, for a terminal and for the page."""

import math

import jax.numpy as jnp
import numpy as np
from rich.table import Table

from ntkdp._backend.types import Array
from ntkdp._results.console import add_row, open_console, say
from ntkdp.comparison import Comparison
from ntkdp.experiment._of_outputs import by_group as _by_group
from ntkdp.experiment._of_outputs.margins import error_of_margins
from ntkdp.experiment._predictions import KERNEL_OF, LABELS
from ntkdp.experiment._reporting.metrics import clipped_at_start
from ntkdp.experiment._reporting.verdict import verdict, warnings
from ntkdp.experiment._run import Case, Prediction, Results

#: Columns that hold words; the others hold numbers.
WORDS = ("clipping", "learning rate", "prediction", "kernel")
#: Columns for a terminal, wide or of eighty characters; report.html has them all.
_WIDE = (
    *WORDS, "clipped at start", "sup error of loss", "of the fall", "runs in the band",
    "final loss, predicted", "observed", "seconds, prediction", "run",
)  # fmt: skip
_NARROW = (
    "clipping", "learning rate", "prediction", "sup error of loss", "of the fall",
    "final loss, predicted", "observed",
)  # fmt: skip


def columns(results: Results) -> list[str]:
    """Names of the columns in which any row has something."""
    found = rows(results)
    return [name for name in found[0] if any(row[name] for row in found)]


def rows(results: Results) -> list[dict[str, str]]:
    """A row for each prediction of each case, by column."""
    return [
        _row(case, name, prediction)
        for case in results.cases
        for name, prediction in case.predictions.items()
    ]


def _row(case: Case, name: str, prediction: Prediction) -> dict[str, str]:
    compared, run = prediction.comparison, case.run
    clipped, seconds = clipped_at_start(run), case.run_seconds
    return {
        "clipping": case.clipping.label,
        "learning rate": f"{case.learning_rate:g}",
        "prediction": LABELS[name],
        "kernel": KERNEL_OF[name] or "",
        "clipped at start": "" if clipped is None else f"{clipped:.0%}",
        "sup error of loss": _percent(compared.sup_relative_error),
        "of the fall": _percent(compared.error_of_fall),
        "of the margins": _percent(error_of_margins(prediction.margins, case.run_margins)),
        "standard error of runs": _percent(_standard_error(run.loss)),
        "runs in the band": _in_band(compared),
        "p-value": _p_value(compared),
        "final loss, predicted": _with_spread(prediction.trajectory.loss[..., -1]),
        "observed": _with_spread(run.loss[..., -1]),
        "accuracy, predicted": _share(prediction.trajectory.accuracy),
        "accuracy, observed": _share(run.accuracy),
        "test accuracy, predicted": _share(prediction.trajectory.test_accuracy),
        "test accuracy, observed": _share(run.test_accuracy),
        "seconds, prediction": f"{prediction.seconds:.2f}",
        "run": "" if seconds is None else f"{seconds:.1f}",
    }


def group_rows(results: Results) -> list[tuple[str, ...]]:
    """Rows of the table by subgroup, of cases that have one."""
    lines: list[tuple[str, ...]] = []
    for case in results.cases:
        if case.by_group is not None:
            labels = {name: LABELS[name] for name in case.predictions}
            lines += _by_group.rows(case.clipping.label, labels, case.by_group)
    return lines


def group_words(results: Results) -> str:
    """What the epsilon of a subgroup is."""
    found = [case.by_group for case in results.cases if case.by_group is not None]
    if not found or not results.config.training.noisy:
        return ""
    return (
        f"Epsilon is the mean over the samples of a subgroup, at delta = {found[0]['delta']:.3g}."
    )


def _percent(error: float | None) -> str:
    if error is None:
        return ""
    return f"{error:.2%}" if math.isfinite(error) else "not finite"


def _standard_error(losses: Array) -> float | None:
    """That of the mean loss of several runs at the end, relative to it."""
    last = np.asarray(losses)[..., -1]
    if last.size < 2:
        return None
    return float(np.std(last, ddof=1) / np.sqrt(last.size) / np.mean(last))


def _in_band(compared: Comparison) -> str:
    """The share of the runs in the predicted band over all times, and the expected share."""
    covered = compared.band_coverage
    if covered is None:
        return ""
    return f"{np.mean(covered.share):.0%} of {covered.level:.0%}"


def _p_value(compared: Comparison) -> str:
    """How likely so many runs in the band at the end, or so few, are if the prediction is right."""
    covered = compared.band_coverage
    if covered is None or np.isnan(covered.p_value[-1]):
        return ""
    return f"{covered.p_value[-1]:.2g}"


def _with_spread(values: Array) -> str:
    runs = np.atleast_1d(np.asarray(values))
    spread = f" ± {np.std(runs, ddof=1):.4f}" if runs.size > 1 else ""
    return f"{np.mean(runs):.4f}{spread}"


def _share(values: Array | None) -> str:
    return "" if values is None else f"{float(jnp.mean(values[..., -1])):.1%}"


def print_table(results: Results) -> None:
    """Print the errors of all predictions, the verdict, and warnings if there are any."""
    console = open_console()
    shown = _WIDE if console.width >= 160 else _NARROW
    table = Table(title="Predicted against observed training loss", title_justify="left")
    for name in shown:
        table.add_column(name, justify="left" if name in WORDS else "right")
    previous = None
    for row in rows(results):
        case = (row["clipping"], row["learning rate"])
        if previous not in (None, case):
            table.add_section()
        cells = row | dict.fromkeys(("clipping", "learning rate"), "") if case == previous else row
        add_row(table, *(cells[name] for name in shown))
        previous = case
    console.print(table)
    for line in (*verdict(results), *warnings(results)):
        say(console, line)
