"""The demonstration: four parts at once, their sentences, and the folder that shows them."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ntkdp._results.figure_style import save_png
from ntkdp._results.own_files import OwnFiles
from ntkdp._results.page import render
from ntkdp._results.plain_json import as_text
from ntkdp._results.provenance import VERSION, provenance
from ntkdp.cli._demonstration import parts, pictures, problem
from ntkdp.cli._demonstration.compilation import Compilation
from ntkdp.cli._demonstration.parts import Failure, Map, Private
from ntkdp.comparison import compare
from ntkdp.experiment import Results

Report = Callable[[str, float], None]


class Demonstration(NamedTuple):
    """All parts, and the seconds that they took; those of compilation are summed over threads."""

    private: Private
    without_noise: Results
    map: Map
    failure: Failure
    seconds: float
    compiling: float


class _Part(NamedTuple):
    """A section of the page."""

    heading: str
    sentence: str
    picture: Path
    caption: str
    is_warning: bool = False
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


def run(report: Report) -> Demonstration:
    """Predict and train the four parts, two at a time."""
    start = time.perf_counter()
    report("data, network and kernel", 0.0)
    with Compilation() as compilation, ThreadPoolExecutor(2) as threads:
        # Without noise is the longest part, and needs nothing of the others.
        without_noise = threads.submit(parts.without_noise)
        made = problem.make()
        report("private runs", 0.1)
        private = parts.private(made)
        report("map of learning rate and clipping norm", 0.4)
        cells = parts.map_of_cells(made)
        report("where it fails", 0.7)
        failure = parts.failure(made)
        report("the flow without noise", 0.9)
        results = without_noise.result()
    seconds = time.perf_counter() - start
    return Demonstration(private, results, cells, failure, seconds, compilation.seconds)


def sentences(demo: Demonstration) -> dict[str, str]:
    """What each part has shown, and in the end what to do, in a sentence each."""
    private, failure, cells = demo.private, demo.failure, demo.map
    budget = problem.BUDGET
    predicted, observed = (
        float(np.mean(np.asarray(path.test_accuracy)[:, -1]))
        for path in (private.predicted, private.observed)
    )
    errors = {
        name: max(
            float(case.predictions[name].comparison.sup_relative_error)
            for case in demo.without_noise.cases
        )
        for name in pictures.LABELS
    }
    frozen, between = (
        float(compare(path, failure.observed).sup_relative_error)
        for path in (failure.frozen, failure.between_times)
    )
    advice = cells.advice
    return {
        "private": (
            f"Private training at epsilon {budget.epsilon:g} (delta {budget.delta:g}, sigma "
            f"{private.noise_multiplier:.1f}, {problem.STEPS} steps): {private.n_inside} of "
            f"{problem.OBSERVED} runs end inside the 90% band that was drawn before them. Test "
            f"accuracy: {predicted:.1%} predicted, {observed:.1%} observed."
        ),
        "without_noise": (
            "Without noise, over small and large clipping norms, flat and layerwise, the largest "
            f"error of the loss is {errors['exact']:.1%} for the exact flow, "
            f"{errors['frozen']:.1%} for the frozen kernel and {errors['infinite']:.1%} for the "
            "kernel of infinite width."
        ),
        "map": (
            f"Of {len(cells.observed.loss)} cells at the same epsilon, the prediction advises "
            f"learning rate {advice.learning_rate:g} with clipping norm {advice.clip_norm:g}. Its "
            f"runs lose {100 * cells.regret:.1f} points of test accuracy against the best cell "
            "that was observed."
        ),
        "failure": (
            f"At learning rate {parts.RATE_OF_THE_FAILURE:g}, noise adds v(T) = "
            f"{failure.weight_noise:.2g} times the weights' own variance. The frozen kernel is "
            f"{frozen:.0%} off there, and kernels between times are {between:.0%} off."
        ),
        "advice": (
            f"Train at learning rate {advice.learning_rate:g} with clipping norm "
            f"{advice.clip_norm:g} for {problem.STEPS} steps. Trust a frozen kernel while v(T) is "
            "small, and let ntkdp.predict choose where it is not."
        ),
    }


def write(demo: Demonstration, folder: Path) -> None:
    """Write pictures, report.html and metrics.json."""
    files = OwnFiles(folder)
    drawn = {
        "private": pictures.private(demo.private),
        "without_noise": pictures.without_noise(demo.without_noise),
        "map": pictures.map_of_cells(demo.map),
        "failure": pictures.failure(demo.failure),
    }
    for name, figure in drawn.items():
        save_png(figure, files, f"{name}.png")
    said = sentences(demo)
    page = render(
        "cli/_demonstration/page.html",
        title="ntkdp: private training, predicted",
        heading="Private training, predicted before it is run",
        summary=_summary(demo),
        parts=_page_parts(demo, said, folder),
        advice=said["advice"],
    )
    files.write("report.html", page)
    # Last, because a folder with metrics is complete.
    files.write("metrics.json", as_text(metrics(demo)) + "\n")


def metrics(demo: Demonstration) -> dict[str, object]:
    """All numbers of the page."""
    private, failure, cells = demo.private, demo.failure, demo.map
    covered = private.compared.band_coverage
    assert covered is not None
    return {
        **provenance("jax", "diffrax", "neural-tangents"),
        "seconds": round(demo.seconds, 1),
        "seconds_of_compilation": round(demo.compiling, 1),
        "private": {
            "noise_multiplier": private.noise_multiplier,
            "runs": problem.OBSERVED,
            "runs_inside_the_band": private.n_inside,
            "p_value": float(covered.p_value[-1]),
            "sup_relative_error": float(private.compared.sup_relative_error),
        },
        "without_noise": [
            {
                "clipping": case.clipping.label,
                **{
                    name: float(part.comparison.sup_relative_error)
                    for name, part in case.predictions.items()
                },
            }
            for case in demo.without_noise.cases
        ],
        "map": {
            "learning_rate": cells.advice.learning_rate,
            "clip_norm": cells.advice.clip_norm,
            "regret": cells.regret,
            "predicted": np.asarray(cells.predicted.metrics.test_accuracy).tolist(),
            "observed": np.asarray(cells.observed.test_accuracy).tolist(),
        },
        "failure": {
            "weight_noise_variance": failure.weight_noise,
            "frozen": float(compare(failure.frozen, failure.observed).sup_relative_error),
            "between_times": float(
                compare(failure.between_times, failure.observed).sup_relative_error
            ),
        },
        "sentences": sentences(demo),
    }


def in_seconds(demo: Demonstration) -> str:
    """How long all parts took, and how much of that was compilation."""
    return (
        f"{demo.seconds:.0f} s on {os.cpu_count()} cores, with {demo.compiling:.0f} s of "
        "compilation in two threads."
    )


def _summary(demo: Demonstration) -> str:
    return (
        f"Handwritten digits, {problem.N_TRAIN} training and {problem.N_TEST} test samples, one "
        f"hidden layer of {problem.WIDTH}, cross-entropy, full batches, clipping norm "
        f"{problem.RULE.R:g} unless said. The guarantee is for data sets that differ in one "
        f"sample, added or removed. {in_seconds(demo)} ntkdp {VERSION}."
    )


def _page_parts(demo: Demonstration, said: dict[str, str], folder: Path) -> list[_Part]:
    rows = tuple(
        (
            case.clipping.label,
            f"{case.learning_rate:g}",
            *(
                f"{float(case.predictions[name].comparison.sup_relative_error):.2%}"
                for name in pictures.LABELS
            ),
        )
        for case in demo.without_noise.cases
    )
    return [
        _Part(
            "A private run",
            said["private"],
            folder / "private.png",
            f"{problem.OBSERVED} runs of DP-SGD (grey) on the band that {problem.DRAWN} predicted "
            f"runs fill, at learning rate {parts.RATE:g}.",
        ),
        _Part(
            "The theory without noise",
            said["without_noise"],
            folder / "without_noise.png",
            "Runs without noise, and three predictions of each, all at the same learning rate. "
            "The errors are those of the training loss, the largest over time.",
            columns=("clipping", "learning rate", *pictures.LABELS.values()),
            rows=rows,
        ),
        _Part(
            "Which learning rate and clipping norm",
            said["map"],
            folder / "map.png",
            f"Test accuracy at epsilon {problem.BUDGET.epsilon:g} for every cell, predicted and "
            "observed. The star is the advised cell.",
        ),
        _Part(
            "Where it fails",
            said["failure"],
            folder / "failure.png",
            "The frozen kernel leaves the band of the runs when noise moves the kernel itself.",
            is_warning=True,
        ),
    ]
