"""ntkdp: all layer terms of the kernel; a DP-SGD step with its diagnostics."""

from collections.abc import Callable
from functools import partial

import jax
import problems
from contenders.jax_models import kernel_problem, step_problem

import ntkdp


def kernel(case: str) -> Callable[[], None]:
    """All terms, one a group."""
    apply_fn, params, x = kernel_problem(case)

    def call() -> None:
        ntkdp.layerwise_ntk(apply_fn, params, x).values.block_until_ready()

    return call


def step(case: str) -> Callable[[], None]:
    """Clipped and noised; every call takes a step."""
    apply_fn, params, x, labels = step_problem(case)
    algorithm = ntkdp.dp_sgd.build(
        apply_fn,
        x,
        labels,
        ntkdp.losses.SoftmaxCrossEntropy(),
        ntkdp.clipping.Abadi(problems.CLIP_NORM),
        learning_rate=problems.LEARNING_RATE,
        noise_multiplier=problems.NOISE_MULTIPLIER,
    )
    compiled = algorithm.compile()
    states = [algorithm.init(params)]
    key = jax.random.key(0)

    def call() -> None:
        state, info = compiled(key, states.pop())
        states.append(jax.block_until_ready((state, info))[0])

    return call


_KERNELS = [*problems.MLP_WIDTHS, problems.KERNEL_CNN, problems.TRANSFORMER]
CASES: dict[str, Callable[[], Callable[[], None]]]
CASES = {case: partial(kernel, case) for case in _KERNELS}
CASES |= {case: partial(step, case) for case in (problems.STEP_MLP, problems.STEP_CNN)}
