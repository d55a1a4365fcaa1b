"""jax-privacy: clipped gradients of single samples and Gaussian noise."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax_privacy
import optax
import problems
from contenders.jax_models import cross_entropy, step_problem


def step(case: str) -> Callable[[], None]:
    """``clipped_grad``, noise of its privatizer, and SGD."""
    apply_fn, params, x, labels = step_problem(case)
    clipped_gradient = jax_privacy.clipped_grad(
        lambda params, x, labels: cross_entropy(apply_fn(params, x), labels),
        l2_clip_norm=problems.CLIP_NORM,
        normalize_by=problems.BATCH,
        batch_argnums=(1, 2),
    )
    privatizer = jax_privacy.noise_addition.gaussian_privatizer(
        stddev=clipped_gradient.sensitivity() * problems.NOISE_MULTIPLIER,
        prng_key=jax.random.key(0),
    )
    optimizer = optax.sgd(problems.LEARNING_RATE)

    @jax.jit
    def advance(params: Any, noise_state: Any, state: Any) -> tuple[Any, Any, Any]:
        gradient = clipped_gradient(params, x, labels)
        gradient, noise_state = privatizer.update(gradient, noise_state)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), noise_state, state

    held = [(params, privatizer.init(params), optimizer.init(params))]

    def call() -> None:
        held.append(jax.block_until_ready(advance(*held.pop())))

    return call


CASES = {case: partial(step, case) for case in (problems.STEP_MLP, problems.STEP_CNN)}
