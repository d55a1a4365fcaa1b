"""The files of a plan: all cells, pictures, and a page that shows them."""

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ntkdp import privacy
from ntkdp._results.figure_style import save_png
from ntkdp._results.own_files import OwnFiles
from ntkdp._results.page import render
from ntkdp._results.plain_json import as_text
from ntkdp._results.provenance import provenance
from ntkdp.advisor import BudgetPlan, Recommendation
from ntkdp.batches import Full, Poisson
from ntkdp.cli._planning import pictures
from ntkdp.cli._planning.config import PlanningConfig

_COLUMNS = (
    "epsilon", "q", "steps", "learning rate", "R", "sigma", "epochs", "predicted", "+-",
    "ECE", "twice the data", "v(T)", "kernels",
)  # fmt: skip


def write(plan: BudgetPlan, config: PlanningConfig, folder: Path) -> None:
    """Write the cells, the pictures, the page and, last, the metrics."""
    files = OwnFiles(folder)
    measured = metrics(plan, config)
    files.write("cells.csv", _as_csv(measured["cells"]))
    best = plan.recommended[-1]
    drawn = [
        ("epsilon.png", "What a budget buys, and what twice the data would.", pictures.of_epsilon),
        ("compute.png", "What compute buys, at each budget.", pictures.of_compute),
    ]
    for name, _, draw in drawn:
        save_png(draw(plan), files, name)
    shown = [(folder / name, caption) for name, caption, _ in drawn]
    for number, one in enumerate(reversed(plan.recommended)):
        name = f"map_{number}.png"
        save_png(pictures.maps(plan, one), files, name)
        caption = (
            f"Epsilon {one.epsilon:g}. The star is next to the recommended cell; none: no cell is "
            "allowed, or every one diverges."
        )
        shown.append((folder / name, caption))
    page = render(
        "cli/_planning/page.html",
        title=f"ntkdp plan: {config.name}",
        heading=f"{config.name}: a private run, planned",
        sentences=[str(one) for one in reversed(plan.recommended)],
        summary=summary(plan, config),
        columns=_COLUMNS,
        rows=[_row(plan, one) for one in reversed(plan.recommended)],
        pictures=shown,
        neighbours=privacy.neighbours(
            Full() if best.sample_rate == 1 else Poisson(best.sample_rate)
        ),
        config=json.dumps(measured["config"], indent=2),
    )
    files.write("report.html", page)
    files.write("metrics.json", as_text(measured) + "\n")


def metrics(plan: BudgetPlan, config: PlanningConfig) -> dict[str, Any]:
    """All numbers of a plan, as a tree of plain numbers and text."""
    return {
        **provenance("jax", "neural-tangents", "dp-accounting"),
        "config": config.model_dump(mode="json"),
        "seconds": plan.seconds,
        "objective": plan.objective,
        "n_samples": plan.n_samples,
        "rows": plan.rows,
        "rank": plan.rank,
        "share_left": plan.share_left,
        "initial": plan.initial,
        "recommended": [{"sentence": str(one), **asdict(one)} for one in plan.recommended],
        "frontiers_of_compute": {
            f"{one.epsilon:g}": plan.frontier_of_compute(one.epsilon).tolist()
            for one in plan.recommended
        },
        "n_grid": plan.n_grid,
        "cells": _cells(plan),
    }


def _cells(plan: BudgetPlan) -> list[dict[str, Any]]:
    """Every cell with its metrics, as plain numbers."""
    parts = plan.cells._asdict()
    predicted = parts.pop("metrics")
    return [
        {name: np.asarray(values)[index].item() for name, values in parts.items()}
        | predicted.cell(index)
        for index in range(len(plan.cells.epsilon))
    ]


def _as_csv(cells: list[dict[str, Any]]) -> str:
    written = io.StringIO()
    table = csv.DictWriter(written, list(cells[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(cells)
    return written.getvalue()


def summary(plan: BudgetPlan, config: PlanningConfig) -> list[str]:
    """Sentences about the whole plan."""
    data, cells = config.data, plan.cells
    seconds = sum(plan.seconds.values())
    moving = int(np.sum(cells.kernels == "between times"))
    changed = int(np.sum(cells.change > 0))
    rows = "" if plan.rows == plan.n_samples else f", of which {plan.rows:,} predict"
    lines = [
        f"{data.name}, {plan.n_samples:,} training{rows} and {data.n_test:,} test samples; "
        f"{config.model.words}; {config.loss}.",
        f"{len(cells.epsilon)} cells, {plan.n_grid} of them on the grid, predicted in "
        f"{seconds:.0f} s from one kernel of {plan.rank} features, which leave "
        f"{plan.share_left:.1%} of it to the diagonal.",
        f"Noise moves the kernel in {moving} cells. {changed} cells were predicted with fewer, "
        f"longer steps, and {int(np.sum(cells.metrics.diverged))} diverge.",
    ]
    lines += [edge for one in reversed(plan.recommended) for edge in _edges(plan, one)]
    return lines


def _edges(plan: BudgetPlan, one: Recommendation) -> list[str]:
    """Ends of the axes beyond which a better run may lie."""
    grid = {name: getattr(plan.cells, name)[: plan.n_grid] for name in ("steps", "sample_rate")}
    ends = [
        f"{'smallest' if getattr(one, name) == values.min() else 'largest'} "
        f"{'number of steps' if name == 'steps' else 'sampling rate'}"
        for name, values in grid.items()
        if values.min() < values.max()
        and getattr(one, name) in (values.min(), values.max())
        # Nothing lies beyond full batches.
        and getattr(one, name) != 1
    ]
    if not ends:
        return []
    return [
        f"At epsilon {one.epsilon:g} the recommended run has the {' and the '.join(ends)} of the "
        "grid: there may be a better one beyond."
    ]


def _row(plan: BudgetPlan, one: Recommendation) -> tuple[str, ...]:
    more = one.with_twice_the_data
    ece = one.predicted["test_ece"]
    return (
        f"{one.epsilon:g}",
        f"{one.sample_rate:.3g}",
        f"{one.steps}",
        f"{one.learning_rate:.3g}",
        f"{one.clip_norm:.3g}",
        f"{one.noise_multiplier:.3g}",
        f"{one.compute / plan.n_samples:.3g}",
        _amount(plan, one.value),
        _amount(plan, one.uncertainty),
        "" if ece is None else f"{ece:.2%}",
        "" if more is None else _amount(plan, more),
        f"{one.weight_noise:.3g}",
        one.kernels,
    )


def _amount(plan: BudgetPlan, value: float) -> str:
    return f"{value:.4g}" if plan.objective.endswith("loss") else f"{value:.2%}"
