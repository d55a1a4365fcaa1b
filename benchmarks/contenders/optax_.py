"""optax: DP-SGD from plain per-sample gradients, as its documentation shows."""

import jax
import optax
import optax.contrib
import problems
from contenders.jax_models import cross_entropy, step_problem


def step(case):
    """``differentially_private_aggregate`` on gradients of single samples."""
    apply_fn, params, x, labels = step_problem(case)
    optimizer = optax.contrib.dpsgd(
        problems.LEARNING_RATE, problems.CLIP_NORM, problems.NOISE_MULTIPLIER, seed=0
    )

    def loss(params, x_i, label):
        return cross_entropy(apply_fn(params, x_i[None]), label[None])

    @jax.jit
    def advance(params, state):
        gradients = jax.vmap(jax.grad(loss), (None, 0, 0))(params, x, labels)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    held = [(params, optimizer.init(params))]

    def call():
        held.append(jax.block_until_ready(advance(*held.pop())))

    return call


CASES = {case: lambda case=case: step(case) for case in (problems.STEP_MLP, problems.STEP_CNN)}
