"""Predictions of PyTorch modules against private training by opacus, in its own environment.

For each module the frozen kernel, computed by ``ntkdp.torch`` at the module's initial weights,
predicts the runs that opacus then makes. Printed are the loss of the runs at their end and that
which was predicted, the standard error of both, and how many runs end inside the 90% band.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from bench import OPACUS
from contenders import opacus_training as training
from scipy.stats import binomtest

import ntkdp
from ntkdp import clipping, losses, stochastic_flow

HERE = Path(__file__).parent

#: Runs that are drawn for a prediction.
DRAWN = 100


def predicted(name: str) -> ntkdp.Trajectory:
    """Runs of a module, drawn under its frozen kernel."""
    module = training.make_module(name)
    images, labels = training.digits()
    n = training.N_TRAIN
    kernel = ntkdp.torch.empirical_ntk(module, images)
    outputs = ntkdp.torch.outputs(module, images)
    rate, norm, sigma = training.SETTINGS[name]
    flow = ntkdp.KernelFlow(
        kernel[:n, :n], labels[:n].numpy(), losses.SoftmaxCrossEntropy(), clipping.Abadi(norm),
        test_kernel=kernel[n:, :n], test_targets=labels[n:].numpy(),
    )  # fmt: skip
    return stochastic_flow.ensemble(
        flow, (outputs[:n], outputs[n:]), learning_rate=rate, steps=training.STEPS,
        noise_multiplier=sigma, sample_rate=training.BATCH_SIZE / n, noise_kernel=kernel,
        record_every=training.RECORD_EVERY, key=jax.random.split(jax.random.key(0), DRAWN),
    )  # fmt: skip


def observe(folder: Path, runs: int) -> None:
    """Let opacus train in an environment of its own."""
    needed = [part for package in (*OPACUS, "scikit-learn") for part in ("--with", package)]
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    command = ["uv", "run", "--no-project", "--quiet", "--python", python, *needed, "python"]
    script = HERE / "contenders" / "opacus_training.py"
    subprocess.run(
        [*command, str(script), str(folder), "--runs", str(runs)],
        check=True,
        cwd=folder,
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
    )


def column(path: Path, name: str) -> np.ndarray:
    """A column of a log, ``(runs, times)``."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    runs = len({row["seed"] for row in rows})
    return np.array([float(row[name]) for row in rows]).reshape(runs, -1)


def compared(name: str, path: Path) -> str:
    """One line: the end of the runs, predicted and observed."""
    begun = time.perf_counter()
    prediction = predicted(name)
    seconds = time.perf_counter() - begun
    assert prediction.test_accuracy is not None
    drawn, seen = np.asarray(prediction.loss), column(path, "loss")
    error = drawn.mean(0) - seen.mean(0)
    standard = np.sqrt(drawn.var(0, ddof=1) / len(drawn) + seen.var(0, ddof=1) / len(seen))
    low, high = np.quantile(drawn[:, -1], [0.05, 0.95])
    inside = int(np.sum((seen[:, -1] >= low) & (seen[:, -1] <= high)))
    p = binomtest(inside, len(seen), 0.9).pvalue
    accuracy = np.asarray(prediction.test_accuracy)[:, -1].mean()
    return (
        f"| {name} | {seen[:, 0].mean():.3f} | {seen[:, -1].mean():.4f} | "
        f"{drawn[:, -1].mean():.4f} | {error[-1] / seen[:, -1].mean():+.1%} | "
        f"{abs(error[-1]) / standard[-1]:.1f} | {np.max(np.abs(error) / seen.mean(0)):.1%} | "
        f"{inside} of {len(seen)} (p = {p:.2f}) | {accuracy:.1%} | "
        f"{column(path, 'test_accuracy')[:, -1].mean():.1%} | {seconds:.0f} s |"
    )


def main() -> None:
    """Train with opacus, predict, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--logs", type=Path, help="folder of logs; trained anew without it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.logs or Path(temporary)
        if arguments.logs is None or not (folder / "mlp.csv").exists():
            folder.mkdir(parents=True, exist_ok=True)
            observe(folder, arguments.runs)
        print("| module | loss at start | at the end, opacus | predicted | error | in standard "
              "errors | largest error | in the 90% band | test accuracy, predicted | opacus | "
              "prediction |")  # fmt: skip
        print("|" + "---|" * 11)
        for name in training.SETTINGS:
            print(compared(name, folder / f"{name}.csv"), flush=True)


if __name__ == "__main__":
    main()
