"""optax: DP-SGD from plain per-sample gradients, as its documentation shows."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import optax
import optax.contrib
import problems
from contenders.jax_models import cross_entropy, step_problem


def step(case: str) -> Callable[[], None]:
    """``differentially_private_aggregate`` on gradients of single samples."""
    apply_fn, params, x, labels = step_problem(case)
    optimizer = optax.contrib.dpsgd(
        problems.LEARNING_RATE, problems.CLIP_NORM, problems.NOISE_MULTIPLIER, seed=0
    )

    def loss(params: Any, x_i: jax.Array, label: jax.Array) -> jax.Array:
        return cross_entropy(apply_fn(params, x_i[None]), label[None])

    @jax.jit
    def advance(params: Any, state: Any) -> tuple[Any, Any]:
        gradients = jax.vmap(jax.grad(loss), (None, 0, 0))(params, x, labels)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    held = [(params, optimizer.init(params))]

    def call() -> None:
        held.append(jax.block_until_ready(advance(*held.pop())))

    return call


CASES = {case: partial(step, case) for case in (problems.STEP_MLP, problems.STEP_CNN)}
