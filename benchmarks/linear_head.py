"""What 100 predicted private runs of a linear head cost, against running them.

    uv run python benchmarks/linear_head.py                  # features with a decaying spectrum
    uv run --extra data python benchmarks/linear_head.py --mnist   # 5,000 digits, 784 pixels

Runs are timed over a few steps and scaled up, and predictions are timed whole, each in a process of
its own and after compilation. Seconds are those of all cores together, so that other work on the
machine matters little. Prints a table in Markdown, and how far predictions with fewer features are
from those with all of them.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ntkdp
from ntkdp import clipping, dp_sgd, losses, models, ntk, stochastic_flow

N, N_TEST, D, K = 50_000, 2_000, 768, 10
RUNS, STEPS, RECORDS = 100, 300, 10
#: Runs and steps that are timed of the real training.
TIMED_RUNS, TIMED_STEPS = 4, (10, 40)
LOSS, RULE = losses.SoftmaxCrossEntropy(), clipping.Abadi(1.0)
MECHANISM: dict[str, Any] = {"learning_rate": 2.0, "noise_multiplier": 2.0}


def problem(mnist: bool) -> tuple[jax.Array, ...]:
    """Features of norm one and classes, of training and of test samples."""
    if mnist:
        data = ntkdp.datasets.mnist5k(n_train=4000, n_test=1000, standardise="none")
        x = np.concatenate([data.x_train, data.x_test])
        y, n = np.concatenate([data.y_train, data.y_test]), 4000
    else:
        rng, n = np.random.default_rng(0), N
        x = rng.normal(size=(N + N_TEST, D)) * np.arange(1, D + 1) ** -0.75
        teacher = 3 * rng.normal(size=(D, K)) / np.linalg.norm(x, axis=1).mean()
        y = np.argmax(x @ teacher + rng.gumbel(size=(len(x), K)), axis=1)
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    return tuple(jnp.asarray(part) for part in (x[:n], y[:n], x[n:], y[n:]))


def observed(mnist: bool, q: float, features: int) -> dict[str, Any]:
    """CPU seconds of all runs, from a few of them, a few steps each, and their records."""
    x, y, x_test, y_test = problem(mnist)
    model = models.linear(K, b_std=None)
    params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0), x))

    def seconds(steps: int, record_every: int) -> float:
        def run() -> float:
            start = time.process_time()
            path = dp_sgd.run(
                model.apply, params, x, y, LOSS, RULE, test_x=x_test, test_targets=y_test,
                steps=steps, record_every=record_every, sample_rate=q,
                key=jax.random.split(jax.random.key(1), TIMED_RUNS), **MECHANISM,
            )  # fmt: skip
            jax.block_until_ready(path.loss)
            return time.process_time() - start

        run()
        return min(run() for _ in range(3))

    few, many = TIMED_STEPS
    short = seconds(few, few)
    step = (seconds(many, many) - short) / (many - few) / TIMED_RUNS
    record = (seconds(few, 1) - short) / (few - 1) / TIMED_RUNS
    total = RUNS * (STEPS * step + (RECORDS + 1) * record)
    return {"seconds": total, "step": step, "record": record}


def predicted(mnist: bool, q: float, features: int) -> dict[str, Any]:
    """CPU seconds of all predicted runs, compilation apart, and what they predict."""
    x, y, x_test, y_test = problem(mnist)
    start = time.process_time()
    if features:
        x, x_test = ntk.fewer_features(x, x_test, n_features=features, key=jax.random.key(3))
        jax.block_until_ready((x, x_test))
    reduction = time.process_time() - start
    flow = ntkdp.KernelFlow(
        ntkdp.FeatureKernel(x), y, LOSS, RULE,
        test_kernel=ntkdp.FeatureKernel(x_test, x), test_targets=y_test,
    )  # fmt: skip
    outputs = tuple(jnp.zeros((len(part), K), jnp.float32) for part in (x, x_test))

    def draw() -> tuple[ntkdp.Trajectory, float]:
        start = time.process_time()
        runs = stochastic_flow.ensemble(
            flow, outputs, steps=STEPS, record_every=STEPS // RECORDS, sample_rate=q,
            key=jax.random.split(jax.random.key(2), RUNS), **MECHANISM,
        )  # fmt: skip
        jax.block_until_ready(runs.loss)
        return runs, time.process_time() - start

    _, first = draw()
    runs, again = draw()
    assert runs.test_loss is not None
    return {
        "seconds": again + reduction,
        "compilation": first - again,
        "reduction": reduction,
        "loss": [float(runs.loss[:, -1].mean()), float(runs.loss[:, -1].std())],
        "test_loss": [float(runs.test_loss[:, -1].mean()), float(runs.test_loss[:, -1].std())],
    }


JOBS = {job.__name__: job for job in (observed, predicted)}


def measured(job: str, mnist: bool, q: float, features: int) -> dict[str, Any]:
    """What a job found, in a process of its own."""
    command = [sys.executable, __file__, "--job", job, "--rate", str(q)]
    command += ["--features", str(features), *(["--mnist"] if mnist else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(job, f"q = {q}, features = {features or 'all'}", found, file=sys.stderr, flush=True)
    return found


def table(mnist: bool, rates: list[float], features: list[int]) -> str:
    """A row for each sampling rate and number of features."""
    lines = [
        "| q | features | CPU seconds | runs cost | peak memory | last loss | last test loss |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for q in rates:
        runs = measured("observed", mnist, q, 0)
        lines.append(
            f"| {q:g} | runs | {runs['seconds']:.0f} | | {runs['peak'] / 2**30:.2f} GiB | | |"
        )
        for number in features:
            found = measured("predicted", mnist, q, number)
            ratio = runs["seconds"] / found["seconds"]
            ends = [
                f"{mean:.4f} ± {spread:.4f}" for mean, spread in (found["loss"], found["test_loss"])
            ]
            lines.append(
                f"| {q:g} | {number or 'all'} | {found['seconds']:.1f} | {ratio:.1f} times | "
                f"{found['peak'] / 2**30:.2f} GiB | {ends[0]} | {ends[1]} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mnist", action="store_true")
    parser.add_argument("--job", choices=JOBS)
    parser.add_argument("--rate", type=float, nargs="+", default=[0.02, 0.1])
    parser.add_argument("--features", type=int, nargs="+", default=[0, 128, 64])
    given = parser.parse_args()
    if given.job is None:
        print(table(given.mnist, given.rate, given.features))
        return
    found = JOBS[given.job](given.mnist, given.rate[0], given.features[0])
    # On Linux in KiB.
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(found))


if __name__ == "__main__":
    main()
