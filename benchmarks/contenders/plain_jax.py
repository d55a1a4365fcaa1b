"""What one would write by hand in JAX: training without privacy, and per-sample Jacobians."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import problems
from contenders.jax_models import cross_entropy, kernel_problem, step_problem


def step(case: str, *, noise: bool) -> Callable[[], None]:
    """A step of SGD, with the noise of DP-SGD or without."""
    apply_fn, params, x, labels = step_problem(case)
    optimizer = optax.sgd(problems.LEARNING_RATE)

    @jax.jit
    def advance(params: Any, state: Any, key: jax.Array) -> tuple[Any, Any]:
        gradient = jax.grad(lambda p: cross_entropy(apply_fn(p, x), labels))(params)
        if noise:
            leaves, treedef = jax.tree.flatten(gradient)
            keys = jax.random.split(key, len(leaves))
            std = problems.NOISE_MULTIPLIER * problems.CLIP_NORM / problems.BATCH
            gradient = jax.tree.unflatten(
                treedef,
                [
                    leaf + std * jax.random.normal(k, leaf.shape, leaf.dtype)
                    for k, leaf in zip(keys, leaves, strict=True)
                ],
            )
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state

    held = [(params, optimizer.init(params))]
    key = jax.random.key(0)

    def call() -> None:
        held.append(jax.block_until_ready(advance(*held.pop(), key)))

    return call


def jacobian_kernel(case: str, block: int) -> Callable[[], None]:
    """Kernel by layer from the Jacobians of ``block`` samples at a time."""
    apply_fn, params, x = kernel_problem(case)

    @functools.partial(jax.jit, static_argnums=2)
    def kernel(params: Any, x: jax.Array, block: int) -> jax.Array:
        blocks = x.reshape(-1, block, *x.shape[1:])

        def jacobian(rows: jax.Array) -> list[jax.Array]:
            one = jax.jacrev(lambda p, x_i: apply_fn(p, x_i[None])[0])
            leaves = jax.tree.leaves(jax.vmap(one, (None, 0))(params, rows))
            return [leaf.reshape(block * problems.OUTPUTS, -1) for leaf in leaves]

        def row(rows: jax.Array) -> jax.Array:
            left = jacobian(rows)

            def pair(columns: jax.Array) -> jax.Array:
                right = jacobian(columns)
                return jnp.stack([a @ b.T for a, b in zip(left, right, strict=True)])

            return jax.lax.map(pair, blocks)

        return jax.lax.map(row, blocks)

    def call() -> None:
        kernel(params, x, block).block_until_ready()

    return call


CASES: dict[str, Callable[[], Callable[[], None]]] = {
    f"{case}, {name}": functools.partial(step, case, noise=noise)
    for case in (problems.STEP_MLP, problems.STEP_CNN)
    for name, noise in (("no privacy", False), ("noise alone", True))
}
CASES |= {
    f"{problems.TRANSFORMER}, blocks of {block}": functools.partial(
        jacobian_kernel, problems.TRANSFORMER, block
    )
    for block in (8, 16, 32)
}
