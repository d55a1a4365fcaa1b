"""The files of a run folder, written whole or not at all."""

import json
from pathlib import Path
from typing import Any

from ntkdp._results.figure_style import save_pictures
from ntkdp._results.interactive import charts
from ntkdp._results.own_files import OwnFiles
from ntkdp._results.page import render
from ntkdp._results.plain_json import as_text
from ntkdp._results.provenance import VERSION
from ntkdp.experiment._of_outputs import by_group as _by_group
from ntkdp.experiment._reporting import tables
from ntkdp.experiment._reporting.metrics import metrics
from ntkdp.experiment._reporting.pictures import Picture, pictures
from ntkdp.experiment._reporting.verdict import facts, verdict, warnings
from ntkdp.experiment._run import Results


def write_report(results: Results, folder: Path) -> None:
    """Write metrics, trajectories, pictures and the page into a folder."""
    measured = metrics(results)
    files = OwnFiles(folder)
    with files.replacing("trajectories.nc") as temporary:
        _write_trajectories(results, temporary)
    drawn = pictures(results)
    for picture in drawn:
        save_pictures(picture.figure, files, picture.name)
    files.write("report.html", _page(results, measured, drawn, folder))
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


def _page(results: Results, measured: dict[str, Any], drawn: list[Picture], folder: Path) -> str:
    seconds = ", ".join(f"{k} {s:.2f} s" for k, s in measured["kernel_seconds"].items())
    model = results.config.model
    summary = (
        f"{results.config.samples}; "
        f"{model.words}; {results.config.loss}. "
        f"Kernels: {seconds or 'none'}. ntkdp {VERSION}, {measured['machine']['platform']}."
    )
    name, columns = results.config.name, tables.columns(results)
    return render(
        "experiment/_reporting/page.html",
        title=f"ntkdp: {name}",
        heading=f"{name}: predicted against observed training",
        summary=summary,
        facts=facts(results),
        verdict=verdict(results),
        warnings=warnings(results),
        columns=columns,
        n_words=sum(name in tables.WORDS for name in columns),
        rows=[[row[name] for name in columns] for row in tables.rows(results)],
        group_columns=_by_group.COLUMNS,
        group_rows=tables.group_rows(results),
        group_words=tables.group_words(results),
        pictures=[
            (
                folder / picture.name,
                picture.caption,
                [charts.as_plain(panel) for panel in picture.chart or ()],
            )
            for picture in drawn
        ],
        config=json.dumps(measured["config"], indent=2),
    )
