"""The files of a sweep besides its cells: metrics, maps, and a page that shows them."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
from rich.console import Console
from rich.table import Table

from ntkdp import advisor, comparison, plotting, privacy
from ntkdp._results.console import add_row, literal, open_console, say
from ntkdp._results.figure_style import save_png
from ntkdp._results.folder_lock import held
from ntkdp._results.own_files import OwnFiles
from ntkdp._results.page import render
from ntkdp._results.plain_json import as_text
from ntkdp._results.provenance import provenance
from ntkdp.comparison import CellMetrics
from ntkdp.sweep._run import Results
from ntkdp.sweep._workers import Metrics

#: Names of metrics in tables and in the advice.
_LABELS = {
    "loss": "training loss",
    "accuracy": "training accuracy",
    "ece": "training ECE",
    "mce": "training MCE",
    "test_loss": "test loss",
    "test_accuracy": "test accuracy",
    "test_ece": "test ECE",
    "test_mce": "test MCE",
}
#: Metrics that an advised cell may be best in.
_OBJECTIVES = ("test_accuracy", "test_loss", "test_ece")


class AdviceEntry(TypedDict, total=False):
    """The advised cell for an objective, or a message if there is none."""

    message: str
    index: int
    learning_rate: float
    clip_norm: float
    at_the_edge: list[str]
    predicted: Metrics
    observed: Metrics
    regret: float


class MetricAgreement(TypedDict):
    """The agreement of predicted and observed cells in one metric."""

    spearman: float
    median_difference: float
    largest_difference: float


class AgreementEntry(TypedDict):
    """The agreement of predicted and observed cells of a plane."""

    metrics: dict[str, MetricAgreement]
    divergence_called_right: float
    n_cells: int
    n_converged: int


class PlaneEntry(TypedDict):
    """The part of an entry of a plane in the metrics that tables show."""

    agreement: AgreementEntry | None
    advice: dict[str, AdviceEntry]


def metrics(results: Results) -> dict[str, Any]:
    """All measurements, as a tree of plain numbers and text."""
    entries = []
    for number, plane in enumerate(results.planes):
        predicted = results.predicted[number]
        observed = None if results.observed is None else results.observed[number]
        numbers = [i for i, cell in enumerate(results.cells) if cell.plane == number]
        entries.append(
            {
                **plane._asdict(),
                "delta": results.config.training.delta,
                "cells": [
                    {
                        "learning_rate": results.cells[i].learning_rate,
                        "clip_norm": results.cells[i].clip_norm,
                        "weight_noise": results.weight_noise[i],
                        "kernels": results.kernels[i],
                        "predicted": predicted.cell(index),
                        "observed": None if observed is None else observed.cell(index),
                        "by_group": _groups_of_cell(results, i),
                    }
                    for index, i in enumerate(numbers)
                ],
                "agreement": None if observed is None else _agreement(predicted, observed),
                "advice": _advice(results, number),
            }
        )
    norms = results.gradient_norms
    quantiles = zip(np.asarray(norms.quantiles), np.asarray(norms.norms), strict=True)
    return {
        **provenance("jax", "neural-tangents", "dp-accounting"),
        "config": results.config.model_dump(mode="json"),
        "seconds": results.seconds,
        "speed_up": _speed_up(results),
        "initial": results.initial.cell(0),
        "initial_gradient_norms": {f"quantile_{q:g}": float(norm) for q, norm in quantiles},
        "notes": results.notes,
        "subgroups": None
        if results.groups is None
        else dict(zip(results.groups.names, results.groups.counts, strict=True)),
        "planes": entries,
    }


def _groups_of_cell(results: Results, number: int) -> dict[str, Any] | None:
    """Numbers of the subgroups in a cell, in the order of their names."""
    found = results.groups
    if found is None:
        return None
    observed = None if found.observed is None else found.observed[number]
    return {"predicted": found.predicted[number], "observed": observed}


def _agreement(predicted: CellMetrics, observed: CellMetrics) -> dict[str, Any]:
    agreement = comparison.agreement(predicted, observed)
    by_metric = {name: metric._asdict() for name, metric in agreement.metrics.items()}
    return {**agreement._asdict(), "metrics": by_metric}


def _speed_up(results: Results) -> float | None:
    if "observation" not in results.seconds:
        return None
    predicted = results.seconds["kernel"] + results.seconds["prediction"]
    return results.seconds["observation"] / predicted


def _objectives(results: Results, number: int) -> list[str]:
    """Objectives that apply, with that of the configuration first."""
    wanted = f"test_{results.config.objective}"
    predicted = dict(results.predicted[number].items())
    known = [name for name in _OBJECTIVES if predicted[name] is not None]
    return sorted(known, key=lambda name: name != wanted)


def _advice(results: Results, number: int) -> dict[str, AdviceEntry]:
    """The advised cell by objective, with its predicted metrics and its observed regret."""
    advised: dict[str, AdviceEntry] = {}
    for objective in _objectives(results, number):
        try:
            advice = advisor.advise(_grid(results, number), objective=objective)
        except ValueError as error:
            advised[objective] = {"message": str(error)}
            continue
        entry: AdviceEntry = {
            "index": advice.index,
            "learning_rate": advice.learning_rate,
            "clip_norm": advice.clip_norm,
            "at_the_edge": _edges(results, advice),
            "predicted": advice.predicted,
        }
        if results.observed is not None:
            observed = results.observed[number]
            entry["observed"] = observed.cell(advice.index)
            entry["regret"] = advisor.regret(observed, advice.index, objective=objective)
        advised[objective] = entry
    return advised


def _edges(results: Results, advice: advisor.Advice) -> list[str]:
    """Ends of the axes on which the advised cell lies; a better one may lie beyond."""
    grid = results.config.grid
    ends = []
    for name, chosen, axis in (
        ("learning rate", advice.learning_rate, grid.learning_rates),
        ("clipping norm", advice.clip_norm, grid.clip_norms),
    ):
        if len(axis) > 1 and chosen in (min(axis), max(axis)):
            ends.append(f"{'smallest' if chosen == min(axis) else 'largest'} {name}")
    return ends


def _grid(results: Results, number: int) -> advisor.Grid:
    grid = results.config.grid
    return advisor.Grid(
        np.asarray(grid.learning_rates),
        np.asarray(grid.clip_norms),
        results.predicted[number],
        results.initial.loss.item(),
        results.planes[number].noise_multiplier,
    )


def write_report(results: Results, folder: Path) -> dict[str, Any]:
    """Write pictures, the page and, last, the metrics into the folder, and return the metrics."""
    measured = metrics(results)
    files = OwnFiles(folder)
    with held(folder):
        pictures = _draw(results, measured, files)
        files.write("report.html", _page(results, measured, pictures, folder))
        files.write("metrics.json", as_text(measured) + "\n")
    return measured


def _draw(
    results: Results, measured: dict[str, Any], files: OwnFiles
) -> list[list[tuple[str, str]]]:
    """Draw the pictures of each plane, and return (file name, caption) of each."""
    pictures = []
    grid = results.config.grid
    for number, plane in enumerate(results.planes):
        predicted = results.predicted[number]
        observed = None if results.observed is None else results.observed[number]
        suffix = "" if len(results.planes) == 1 else f"_{number}"
        both = "predicted and observed" if observed is not None else "predicted"
        shown = [name for name in _SHOWN if dict(predicted.items())[name] is not None]
        figure = plotting.heat_maps(
            predicted,
            observed,
            grid.learning_rates,
            grid.clip_norms,
            names=tuple(shown),
            title=plane.label,
        )
        drawn = [(f"map{suffix}.png", f"{plane.label}: {both}. Hatched: the cell diverges.")]
        save_png(figure, files, drawn[0][0])
        if predicted.test_ece is not None:
            advice = measured["planes"][number]["advice"]
            chosen = advice.get(f"test_{results.config.objective}", {}).get("index")
            axes = plotting.trade_off(predicted, observed, chosen=chosen)
            drawn.append((f"trade_off{suffix}.png", "Accuracy against calibration error."))
            save_png(axes, files, drawn[1][0])
        pictures.append(drawn)
    return pictures


_SHOWN = ("test_accuracy", "test_ece", "test_mce", "test_loss")
_AGREEMENT_COLUMNS = ("metric", "rank correlation", "median difference", "largest difference")
_ADVICE_COLUMNS = ("best in", "learning rate", "clip norm", "predicted", "observed", "regret")
_GROUP_COLUMNS = (
    "subgroup",
    "tested",
    "test loss, predicted",
    "observed",
    "test accuracy, predicted",
    "observed",
)


def _agreement_rows(agreement: AgreementEntry) -> list[tuple[str, ...]]:
    return [
        (
            _LABELS[name],
            _text(metric["spearman"], ".3f"),
            _amount(name, metric["median_difference"]),
            _amount(name, metric["largest_difference"]),
        )
        for name, metric in agreement["metrics"].items()
    ]


def _advice_rows(entry: PlaneEntry) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for objective, advised in entry["advice"].items():
        if "message" in advised:
            rows.append((_LABELS[objective], advised["message"], "", "", "", ""))
            continue
        observed = advised.get("observed")
        rows.append(
            (
                _LABELS[objective],
                f"{advised['learning_rate']:g}",
                f"{advised['clip_norm']:g}",
                _amount(objective, advised["predicted"][objective]),
                "" if observed is None else _amount(objective, observed[objective]),
                "" if observed is None else _amount(objective, advised["regret"]),
            )
        )
    return rows


def _group_rows(results: Results, plane: int, entry: PlaneEntry) -> list[tuple[str, ...]]:
    """Rows of subgroups in the cell that is advised for the objective of the configuration."""
    found = results.groups
    index = entry["advice"].get(f"test_{results.config.objective}", {}).get("index")
    if found is None or index is None:
        return []
    cells = [number for number, cell in enumerate(results.cells) if cell.plane == plane]
    sides = [found.predicted, *([] if found.observed is None else [found.observed])]
    rows = []
    for group, (name, count) in enumerate(zip(found.names, found.counts, strict=True)):
        numbers = []
        for metric in ("loss", "accuracy"):
            of_sides = [side[cells[index]][metric] for side in sides]
            shown = ["" if v is None else _amount(f"test_{metric}", v[group]) for v in of_sides]
            numbers += [*shown, ""][:2]
        rows.append((name, str(count), *numbers))
    return rows


def _at_the_edge(entry: PlaneEntry) -> list[str]:
    """A sentence for each advised cell that lies at the end of an axis."""
    return [
        f"The cell best in {_LABELS[objective]} has the {' and the '.join(ends)} of the grid: "
        "there may be a better one beyond."
        for objective, advised in entry["advice"].items()
        if (ends := advised.get("at_the_edge"))
    ]


def _text(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "not finite"


def _amount(name: str, value: float | None) -> str:
    return "" if value is None else _text(value, ".4f" if "loss" in name else ".2%")


def _summary(results: Results) -> list[str]:
    """Sentences about the whole sweep."""
    model = results.config.model
    seconds = results.seconds
    lines = [
        f"{results.config.samples}; "
        f"{model.words}; {results.config.loss}; "
        f"{results.config.training.steps} steps."
    ]
    predicted = (
        f"Predicted in {seconds['prediction']:.1f} s, after {seconds['kernel']:.1f} s for the "
        f"{results.config.prediction} kernel"
    )
    speed_up = _speed_up(results)
    if speed_up is None:
        lines.append(f"{predicted}.")
    else:
        lines.append(
            f"{predicted}; observed in {seconds['observation']:.0f} s, {speed_up:.0f} times as "
            "long."
        )
    lines += _kernels_used(results)
    norms = results.gradient_norms
    low, middle, high = np.asarray(norms.norms)[[0, len(norms.norms) // 2, -1]]
    lines.append(
        f"Norms of the gradients at the start: median {middle:.3g}, from {low:.3g} to {high:.3g} "
        f"({norms.quantiles[0]:.0%} and {norms.quantiles[-1]:.0%} quantile)."
    )
    return lines


def _kernels_used(results: Results) -> list[str]:
    """A sentence about the kernels that predicted cells with noise, if there are any."""
    noisy = [i for i, noise in enumerate(results.weight_noise) if noise > 0]
    if not noisy:
        return []
    followed = sum(results.kernels[i] == "between times" for i in noisy)
    low, high = (of(results.weight_noise[i] for i in noisy) for of in (min, max))
    where = f"v(T) from {low:.3g} to {high:.3g} times the weights' own variance"
    if not followed:
        return [f"Noise adds {where}; a frozen kernel predicts all cells."]
    rest = "" if followed == len(noisy) else "; a frozen kernel predicts the others"
    least = f", from {results.config.kernels_move_from:g} on" if rest else ""
    return [
        f"Noise adds {where}; kernels between times predict {followed} of {len(noisy)} cells with "
        f"noise{least}{rest}."
    ]


def _divergence(agreement: AgreementEntry) -> str:
    return (
        f"Divergence called right in {agreement['divergence_called_right']:.1%} of "
        f"{agreement['n_cells']} cells; {agreement['n_converged']} converge in both."
    )


class _Section(NamedTuple):
    """The part of the page about one plane; without a run it has no agreement."""

    label: str
    advice: list[tuple[str, ...]]
    at_the_edge: list[str]
    agreement: list[tuple[str, ...]] | None
    divergence: str
    groups: list[tuple[str, ...]]
    pictures: list[tuple[Path, str]]


def _section(
    results: Results,
    number: int,
    entry: PlaneEntry,
    pictures: list[tuple[str, str]],
    folder: Path,
) -> _Section:
    plane = results.planes[number]
    agreement = entry["agreement"]
    return _Section(
        plane.label,
        _advice_rows(entry),
        _at_the_edge(entry),
        None if agreement is None else _agreement_rows(agreement),
        "" if agreement is None else _divergence(agreement),
        _group_rows(results, number, entry),
        [(folder / name, caption) for name, caption in pictures],
    )


def _page(
    results: Results,
    measured: dict[str, Any],
    pictures: list[list[tuple[str, str]]],
    folder: Path,
) -> str:
    name = results.config.name
    planes = enumerate(zip(measured["planes"], pictures, strict=True))
    return render(
        "sweep/_report.html",
        title=f"ntkdp sweep: {name}",
        heading=f"{name}: learning rate and clipping norm",
        summary=_summary(results),
        notes=results.notes,
        planes=[
            _section(results, number, entry, drawn, folder) for number, (entry, drawn) in planes
        ],
        group_columns=_GROUP_COLUMNS,
        advice_columns=_ADVICE_COLUMNS,
        agreement_columns=_AGREEMENT_COLUMNS,
        neighbours=privacy.neighbours(results.config.training.as_batches),
        config=json.dumps(measured["config"], indent=2),
    )


def print_table(results: Results, measured: dict[str, Any]) -> None:
    """Print advice and agreement of every plane, as :func:`write_report` returned them."""
    console = open_console()
    for line in _summary(results):
        say(console, line)
    for entry, plane in zip(measured["planes"], results.planes, strict=True):
        _print_rows(console, f"{plane.label}: choose", _ADVICE_COLUMNS, _advice_rows(entry))
        for line in _at_the_edge(entry):
            say(console, line)
        if entry["agreement"] is not None:
            rows = _agreement_rows(entry["agreement"])
            _print_rows(console, "Predicted against observed", _AGREEMENT_COLUMNS, rows)
            say(console, _divergence(entry["agreement"]))
    for note in results.notes:
        say(console, note)


def _print_rows(
    console: Console, title: str, head: tuple[str, ...], rows: list[tuple[str, ...]]
) -> None:
    table = Table(title=literal(title, "table.title"), title_justify="left")
    for number, name in enumerate(head):
        table.add_column(name, justify="left" if number == 0 else "right")
    for row in rows:
        add_row(table, *row)
    console.print(table)
