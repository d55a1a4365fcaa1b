"""The files of a run folder: metrics, trajectories, pictures, and a page that shows them."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from ntkdp import plotting, privacy
from ntkdp._backend.types import Array
from ntkdp._results.console import add_row, open_console, say
from ntkdp._results.figure_style import LOOK, save_png
from ntkdp._results.own_files import OwnFiles
from ntkdp._results.page import render
from ntkdp._results.plain_json import as_text
from ntkdp._results.provenance import VERSION, provenance
from ntkdp.comparison import Comparison
from ntkdp.experiment._of_outputs import by_group as _by_group
from ntkdp.experiment._of_outputs.margins import error_of_margins
from ntkdp.experiment._predictions import KERNEL_OF, LABELS
from ntkdp.experiment._run import Results
from ntkdp.ntk import FeatureKernel, LayerwiseKernel
from ntkdp.trajectory import Trajectory, mean_over_seeds

#: Scope and rule of a case, its run, and its predictions by label.
Panels = dict[tuple[str, str], tuple[Trajectory, dict[str, Trajectory]]]
#: Rows of the largest matrix whose eigenvalues are drawn.
_LARGEST_SPECTRUM = 1024
_NEEDS_STILL_KERNEL = (
    " A frozen kernel needs a small v(T), and features that training does not move: see "
    "ntkdp.diagnose."
)


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
                    "initial_clip_fraction": _clipped_at_start(case.run),
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
        "runs": "recorded" if _are_recorded(results) else "trained",
        "neighbours": _neighbours(results),
        "kernel_seconds": {kind: kernel.seconds for kind, kernel in results.kernels.items()},
        "initial_gradient_norms": {
            f"quantile_{q:g}": float(np.quantile(norms, q)) for q in (0, 0.05, 0.5, 0.95, 1)
        },
        "results": entries,
    }


def _neighbours(results: Results) -> str | None:
    """What neighbouring data sets differ in; None without noise, which promises nothing."""
    training = results.config.training
    return privacy.neighbours(training.as_batches) if training.noisy else None


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


def _clipped_at_start(run: Trajectory) -> float | None:
    """The share of clipped samples at the start; None if a log does not say it."""
    start = run.times[0] if run.start is None else run.start
    if mean_over_seeds(run, "clip_fraction") is None or run.times[0] > start:
        return None
    return _mean_at(run.clip_fraction, 0)


def _are_recorded(results: Results) -> bool:
    """Whether the runs were recorded elsewhere, and not trained here."""
    return all(case.run_seconds is None for case in results.cases)


def _final(path: Trajectory) -> dict[str, float | None]:
    final = {"loss": _mean_at(path.loss, -1), "accuracy": None}
    if path.accuracy is not None:
        final["accuracy"] = _mean_at(path.accuracy, -1)
    if path.test_loss is not None:
        final["test_loss"] = _mean_at(path.test_loss, -1)
    if path.test_accuracy is not None:
        final["test_accuracy"] = _mean_at(path.test_accuracy, -1)
    return final


_COLUMNS = (
    "clipping",
    "learning rate",
    "prediction",
    "kernel",
    "clipped at start",
    "sup error of loss",
    "of the fall",
    "of the margins",
    "runs in the band",
    "final loss, predicted",
    "observed",
    "seconds, prediction",
    "run",
)

#: Columns for a terminal, wide or of eighty characters; report.html has them all.
_WIDE = tuple(number for number in range(len(_COLUMNS)) if _COLUMNS[number] != "of the margins")
_NARROW = (0, 1, 2, 5, 6, 9, 10)


def _rows(results: Results) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for case in results.cases:
        for name, prediction in case.predictions.items():
            compared = prediction.comparison
            clipped, seconds = _clipped_at_start(case.run), case.run_seconds
            rows.append(
                (
                    case.clipping.label,
                    f"{case.learning_rate:g}",
                    LABELS[name],
                    KERNEL_OF[name] or "",
                    "" if clipped is None else f"{clipped:.0%}",
                    _percent(compared.sup_relative_error),
                    _percent(compared.error_of_fall),
                    _percent(error_of_margins(prediction.margins, case.run_margins)),
                    _in_band(compared),
                    _with_spread(prediction.trajectory.loss[..., -1]),
                    _with_spread(case.run.loss[..., -1]),
                    f"{prediction.seconds:.2f}",
                    "" if seconds is None else f"{seconds:.1f}",
                )
            )
    return rows


def _group_rows(results: Results) -> list[tuple[str, ...]]:
    """Rows of the table by subgroup, of cases that have one."""
    lines: list[tuple[str, ...]] = []
    for case in results.cases:
        if case.by_group is not None:
            labels = {name: LABELS[name] for name in case.predictions}
            lines += _by_group.rows(case.clipping.label, labels, case.by_group)
    return lines


def _group_words(results: Results) -> str:
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


def _in_band(compared: Comparison) -> str:
    """The share of the runs in the predicted band over all times, and the expected share."""
    covered = compared.band_coverage
    if covered is None:
        return ""
    return f"{np.mean(covered.share):.0%} of {covered.level:.0%}"


def _with_spread(values: Array) -> str:
    runs = np.atleast_1d(np.asarray(values))
    spread = f" ± {np.std(runs, ddof=1):.4f}" if runs.size > 1 else ""
    return f"{np.mean(runs):.4f}{spread}"


def print_table(results: Results) -> None:
    """Print the errors of all predictions, and warnings if there are any."""
    console = open_console()
    shown = _WIDE if console.width >= 160 else _NARROW
    table = Table(title="Predicted against observed training loss", title_justify="left")
    for number in shown:
        table.add_column(_COLUMNS[number], justify="left" if number < 4 else "right")
    previous = None
    for row in _rows(results):
        case = row[:2]
        if previous not in (None, case):
            table.add_section()
        cells = (*(("", "") if case == previous else case), *row[2:])
        add_row(table, *(cells[number] for number in shown))
        previous = case
    console.print(table)
    for warning in _warnings(results):
        say(console, warning)


def _warnings(results: Results) -> list[str]:
    warnings = []
    if _are_recorded(results):
        warnings.append(
            "The runs were recorded elsewhere. Their learning rate and steps are those of the "
            "configuration; a log does not say what else they were made with."
        )
    for case in results.cases:
        if not case.run.successful:
            warnings.append(f"{case.clipping.label}, run: {case.run.message}")
        for name, prediction in case.predictions.items():
            if not prediction.trajectory.successful:
                message = prediction.trajectory.message
                warnings.append(f"{case.clipping.label}, {LABELS[name]}: {message}")
    if results.config.training.noisy:
        moved = ", ".join(
            f"{'unknown' if case.weight_noise is None else format(case.weight_noise, '.3g')} "
            f"({case.clipping.label})"
            for case in results.cases
        )
        warnings.append(
            "What is promised of privacy is for data sets that differ in one sample: "
            f"{_neighbours(results)}."
        )
        warnings.append(
            f"Noise adds v(T) times the weights' own variance by the end: {moved}."
            + ("" if results.config.model.is_linear else _NEEDS_STILL_KERNEL)
        )
    if any(
        prediction.trajectory.test_loss is None
        for case in results.cases
        for prediction in case.predictions.values()
    ):
        warnings.append(
            "The noisy kernel recursion leaves out the test points, whose noise would be drawn "
            "with that of the training points: too many outputs."
        )
    for neglected in ("noise", "sampling"):
        without = {
            LABELS[name]: None
            for case in results.cases
            for name, prediction in case.predictions.items()
            if neglected in prediction.comparison.neglected
        }
        if without:
            warnings.append(f"Without the {neglected}: {', '.join(without)}.")
    return warnings


def write_report(results: Results, folder: Path) -> None:
    """Write metrics, trajectories, pictures and the page into a folder."""
    measured = metrics(results)
    files = OwnFiles(folder)
    with files.replacing("trajectories.nc") as temporary:
        _write_trajectories(results, temporary)
    pictures = _draw(results, files)
    files.write("report.html", _page(results, measured, pictures, folder))
    # Last, because a folder with metrics is a whole run.
    files.write("metrics.json", as_text(measured) + "\n")


def _write_trajectories(results: Results, path: Path) -> None:
    import xarray as xr

    tree = {}
    for case in results.cases:
        tree[f"/{case.clipping.label}/observed"] = case.run.to_xarray()
        for name, prediction in case.predictions.items():
            tree[f"/{case.clipping.label}/{name}"] = prediction.trajectory.to_xarray()
    # The file is made in memory first, because HDF5 crashes the process if it cannot write one.
    path.write_bytes(xr.DataTree.from_dict(tree).to_netcdf(engine="h5netcdf"))


def _draw(results: Results, files: OwnFiles) -> list[tuple[str, str]]:
    """Draw every picture, and return (file name, caption) in the order of the page."""
    panels = {}
    for case in results.cases:
        scope, _, rule = case.title.partition(" ")
        predicted = {LABELS[name]: p.trajectory for name, p in case.predictions.items()}
        panels[scope, rule] = (case.run, predicted)
    # A prediction of many outputs leaves out the test points.
    tested = {
        title: (
            run,
            {label: path for label, path in paths.items() if path.test_loss is not None},
        )
        for title, (run, paths) in panels.items()
    }
    figures: dict[str, tuple[Figure | Axes, str]] = {
        "loss.png": (
            plotting.comparison_grid(panels),
            "Training loss, predicted and observed, with the largest relative error of each "
            "prediction.",
        ),
        "relative_error.png": (
            _each(panels, plotting.relative_error),
            "Relative error of the predicted training loss.",
        ),
        "clip_fraction.png": (
            _each(panels, plotting.clip_fraction),
            "Share of samples (layerwise: of samples and layers) that are clipped.",
        ),
    }
    if all(case.run.test_loss is not None for case in results.cases):
        figures["test_loss.png"] = (
            _each(tested, partial(plotting.loss_curves, test=True)),
            "Test loss, predicted and observed.",
        )
    if all(case.run.test_accuracy is not None for case in results.cases):
        figures["test_accuracy.png"] = (
            _each(tested, partial(plotting.accuracy, test=True)),
            "Test accuracy, predicted and observed.",
        )
    if all(case.run_margins is not None for case in results.cases):
        figures["margins.png"] = (
            _margins_of_classes(results),
            "Mean margin of each class at the end: its own output less the mean of the others, "
            "over its training samples and all runs. A loss may be right where these are not.",
        )
    for kind, kernel in results.kernels.items():
        axes = plotting.kernel_spectrum(_drawable(kernel.train), label=f"{kind} kernel")
        figures[f"spectrum_{kind}.png"] = (
            axes,
            f"Eigenvalues of the {kind} kernel on the training set"
            + (" and of its layers." if isinstance(kernel.train, LayerwiseKernel) else "."),
        )
    for name, (figure, _) in figures.items():
        save_png(figure, files, name)
    return [(name, caption) for name, (_, caption) in figures.items()]


def _each(panels: Panels, draw: Callable[..., Axes]) -> Figure:
    """One panel for every case, side by side."""
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(4.6 * columns, 3.3 * rows), layout="constrained")
        for number, ((scope, rule), (run, predicted)) in enumerate(panels.items()):
            ax = figure.add_subplot(rows, columns, number + 1)
            draw(predicted, run, ax=ax)
            ax.set_title(f"{scope}, {rule}")
    return figure


def _margins_of_classes(results: Results) -> Figure:
    """One panel for every case: bars of the runs, and a marker for each prediction."""
    columns = min(len(results.cases), 2)
    rows = -(-len(results.cases) // columns)
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(4.6 * columns, 3.3 * rows), layout="constrained")
        for number, case in enumerate(results.cases):
            ax = figure.add_subplot(rows, columns, number + 1)
            assert case.run_margins is not None
            place = np.arange(case.run_margins.shape[1])
            ax.bar(place, case.run_margins[-1], color="0.85", label="observed")
            shown = [(n, p) for n, p in case.predictions.items() if p.margins is not None]
            for (name, prediction), marker in zip(shown, "osD^v", strict=False):
                assert prediction.margins is not None
                ax.plot(place, prediction.margins[-1], marker, ms=5, label=LABELS[name], alpha=0.8)
            ax.set(xlabel="class", ylabel="mean margin", title=case.title)
            ax.set_xticks(place)
            ax.margins(y=0.35)
            ax.legend(ncols=2, fontsize="small")
    return figure


def _drawable(kernel: Array | LayerwiseKernel | FeatureKernel) -> Array | LayerwiseKernel:
    """The kernel on the first samples, so few that its eigenvalues take only seconds."""
    if isinstance(kernel, FeatureKernel):
        return FeatureKernel(kernel.rows[:_LARGEST_SPECTRUM]).written_out()
    values = kernel.values if isinstance(kernel, LayerwiseKernel) else kernel[None]
    n_outputs = values.shape[-1] if values.ndim == 5 else 1
    n_kept = max(1, _LARGEST_SPECTRUM // n_outputs)
    values = values[:, :n_kept, :n_kept]
    if isinstance(kernel, LayerwiseKernel):
        return LayerwiseKernel(kernel.names, values)
    return values[0]


def _page(
    results: Results, measured: dict[str, Any], pictures: list[tuple[str, str]], folder: Path
) -> str:
    seconds = ", ".join(f"{k} {s:.2f} s" for k, s in measured["kernel_seconds"].items())
    model = results.config.model
    summary = (
        f"{results.config.samples}; "
        f"{model.words}; {results.config.loss}. "
        f"Kernels: {seconds or 'none'}. ntkdp {VERSION}, {measured['machine']['platform']}."
    )
    name = results.config.name
    return render(
        "experiment/_report.html",
        title=f"ntkdp: {name}",
        heading=f"{name}: predicted against observed training",
        summary=summary,
        warnings=_warnings(results),
        columns=_COLUMNS,
        rows=_rows(results),
        group_columns=_by_group.COLUMNS,
        group_rows=_group_rows(results),
        group_words=_group_words(results),
        pictures=[(folder / file, caption) for file, caption in pictures],
        config=json.dumps(measured["config"], indent=2),
    )
