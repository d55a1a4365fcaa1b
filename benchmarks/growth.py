"""How time and memory grow with the number of samples, as slopes between logarithms."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import problems
from contenders.jax_models import mlp

import ntkdp

#: From where the work outweighs what every call costs.
KERNEL_SAMPLES = (128, 256, 512, 1024)
STEP_SAMPLES = (512, 1024, 2048, 4096)


def _network(width: int) -> Any:
    return jax.tree.map(jnp.asarray, problems.mlp(width))


def _kernel(n: int) -> Callable[[], jax.Array]:
    params, x = _network(128), jnp.asarray(problems.images(n, flat=True))
    return lambda: ntkdp.layerwise_ntk(mlp, params, x).values


def _kernel_bytes(n: int) -> tuple[int, int]:
    """Result and work, as the compiler plans them."""
    x = jax.ShapeDtypeStruct((n, 784), jnp.float32)
    program = jax.jit(lambda params, x: ntkdp.layerwise_ntk(mlp, params, x).values)
    planned: Any = program.lower(_network(128), x).compile().memory_analysis()
    return planned.output_size_in_bytes, planned.temp_size_in_bytes


def _norms(n: int) -> Callable[[], jax.Array]:
    params, x = _network(512), jnp.asarray(problems.images(n, flat=True))
    gradient = jnp.asarray(problems.normal(0, n, problems.OUTPUTS))
    return lambda: ntkdp.per_sample_gradient_norms(mlp, params, x, gradient)


def _step(n: int) -> Callable[[], object]:
    algorithm = ntkdp.dp_sgd.build(
        mlp,
        problems.images(n, flat=True),
        problems.labels(n),
        ntkdp.losses.SoftmaxCrossEntropy(),
        ntkdp.clipping.Abadi(problems.CLIP_NORM),
        learning_rate=problems.LEARNING_RATE,
    )
    step, state = algorithm.compile(), algorithm.init(_network(512))
    return lambda: step(jax.random.key(0), state)


def _seconds(calls: Sequence[Callable[[], object]], times: int = 9) -> list[float]:
    """Medians of several calls, all taken in turns."""
    taken: list[list[float]] = [[] for _ in calls]
    for turn in range(times + 1):
        for seconds, call in zip(taken, calls, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call())
            if turn:
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in taken]


def _row(
    what: str, samples: Sequence[int], values: Sequence[float], shown: Callable[[float], str]
) -> str:
    slope = np.polyfit(np.log(samples), np.log(values), 1)[0]
    steps = ", ".join(f"{n}: {shown(v)}" for n, v in zip(samples, values, strict=True))
    return f"| {what} | {slope:.2f} | {steps} |"


def table() -> str:
    """The slopes, in Markdown."""

    def seconds(v: float) -> str:
        return f"{1000 * v:.3g} ms"

    def mebibytes(v: float) -> str:
        return f"{v / 2**20:.4g} MiB"

    planned = [_kernel_bytes(n) for n in KERNEL_SAMPLES]
    kernel = _seconds([_kernel(n) for n in KERNEL_SAMPLES])
    norms = _seconds([_norms(n) for n in STEP_SAMPLES])
    steps = _seconds([_step(n) for n in STEP_SAMPLES])
    return "\n".join(
        [
            "## Growth with the number of samples",
            "",
            "| | slope | samples: median |",
            "|---|---:|---|",
            _row("kernel, MLP of width 128, time", KERNEL_SAMPLES, kernel, seconds),
            _row(
                "the same, memory with its result", KERNEL_SAMPLES, [*map(sum, planned)], mebibytes
            ),
            _row("per-sample gradient norms, width 512", STEP_SAMPLES, norms, seconds),
            _row("clipped step, width 512", STEP_SAMPLES, steps, seconds),
        ]
    )
