"""The networks of the benchmarks in plain JAX, for every contender that takes any function."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import problems

Apply = Callable[[Any, jax.Array], jax.Array]


def mlp(params: Any, x: jax.Array) -> jax.Array:
    """ReLU network with biases."""
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def _conv(x: jax.Array, filters: jax.Array, stride: int, padding: Any) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, filters, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def kernel_cnn(params: Any, x: jax.Array) -> jax.Array:
    """Two convolutions without padding, the second with stride 2, and a dense layer."""
    x = jax.nn.relu(_conv(x, params["conv1"], 1, "VALID"))
    x = jax.nn.relu(_conv(x, params["conv2"], 2, "VALID"))
    return x.reshape(x.shape[0], -1) @ params["dense"]


def _norm(params: Any, name: str, x: jax.Array) -> jax.Array:
    centred = x - jnp.mean(x, -1, keepdims=True)
    scaled = centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-5)
    return scaled * params[f"{name}_scale"] + params[f"{name}_shift"]


def transformer(params: Any, tokens: jax.Array) -> jax.Array:
    """A pre-norm block on embedded tokens, the mean over positions, and a dense layer."""
    x = params["token"][tokens] + params["position"]
    h = _norm(params, "norm1", x)
    query, key, value = (
        jnp.einsum("ntd,dhe->nthe", h, params[name]) for name in ("query", "key", "value")
    )
    scores = jnp.einsum("nthe,nshe->nhts", query, key) / jnp.sqrt(1.0 * query.shape[-1])
    mixed = jnp.einsum("nhts,nshe->nthe", jax.nn.softmax(scores), value)
    x = x + jnp.einsum("nthe,hed->ntd", mixed, params["out"])
    h = jax.nn.gelu(_norm(params, "norm2", x) @ params["up"])
    x = x + h @ params["down"]
    return jnp.mean(_norm(params, "norm3", x), 1) @ params["head"]


def _max_pool(x: jax.Array) -> jax.Array:
    # Windows of 2 x 2, stride 1. `reduce_window` gives the same, and on processors without an
    # accelerator takes most of the step, its derivative being slow.
    x = jnp.maximum(x[:, :-1], x[:, 1:])
    return jnp.maximum(x[:, :, :-1], x[:, :, 1:])


def step_cnn(params: Any, x: jax.Array) -> jax.Array:
    """The network of opacus' MNIST example."""
    x = _max_pool(jax.nn.relu(_conv(x, params[0]["w"], 2, [(3, 3), (3, 3)]) + params[0]["b"]))
    x = _max_pool(jax.nn.relu(_conv(x, params[1]["w"], 2, "VALID") + params[1]["b"]))
    x = x.reshape(x.shape[0], -1)
    x = jax.nn.relu(x @ params[2]["w"] + params[2]["b"])
    return x @ params[3]["w"] + params[3]["b"]


def kernel_problem(case: str) -> tuple[Apply, Any, jax.Array]:
    """``(apply_fn, params, x)`` of a kernel case."""
    made: tuple[Apply, Any, Any]
    if case in problems.MLP_WIDTHS:
        made = mlp, problems.mlp(problems.MLP_WIDTHS[case]), problems.images(64, flat=True)
    elif case == problems.KERNEL_CNN:
        made = kernel_cnn, problems.kernel_cnn(), problems.images(32, flat=False)
    else:
        made = transformer, problems.transformer(), problems.tokens(32)
    apply_fn, params, x = made
    return apply_fn, jax.tree_util.tree_map(jnp.asarray, params), jnp.asarray(x)


def step_problem(case: str) -> tuple[Apply, Any, jax.Array, jax.Array]:
    """``(apply_fn, params, x, labels)`` of a training step."""
    x = problems.images(problems.BATCH, flat=case == problems.STEP_MLP)
    labels = jnp.asarray(problems.labels(problems.BATCH))
    apply_fn: Apply
    params: Any
    apply_fn, params = (
        (mlp, problems.mlp(512)) if case == problems.STEP_MLP else (step_cnn, problems.step_cnn())
    )
    return apply_fn, jax.tree_util.tree_map(jnp.asarray, params), jnp.asarray(x), labels


def cross_entropy(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over the batch."""
    log_probabilities = jax.nn.log_softmax(outputs)
    return -jnp.mean(jnp.take_along_axis(log_probabilities, labels[:, None], 1))
