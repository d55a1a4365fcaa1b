"""A small problem for one device and for several, and what is compared."""

from collections.abc import Callable
from typing import Any, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np

import ntkdp
from ntkdp import clipping, losses

Arguments = ParamSpec("Arguments")

N, M, K = 16, 8, 3
LOSS = losses.SoftmaxCrossEntropy()
FLAT = clipping.Abadi(0.3)
LAYERWISE = clipping.Abadi(0.2, scope="layerwise")
KERNELS = ["whole", "by layer", "infinite", "infinite by layer"]

MODEL = ntkdp.models.mlp([8, 8], K, activation="erf", W_std=1.5)
X = jnp.asarray(np.random.default_rng(0).normal(size=(N + M, 4)))
X, TEST_X = X[:N], X[N:]
Y, TEST_Y = np.arange(N) % K, np.arange(M) % K
PARAMS = MODEL.init(jax.random.key(0), X)
OUTPUTS = MODEL.apply(PARAMS, X), MODEL.apply(PARAMS, TEST_X)


def mesh_of(n_devices: int) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.devices()[:n_devices]), ("any",))


def kernel(kind: str, mesh: Any, x1: Any = X, x2: Any = None) -> Any:
    if kind == "whole":
        return ntkdp.empirical_ntk(MODEL.apply, PARAMS, x1, x2, mesh=mesh)
    if kind == "by layer":
        return ntkdp.layerwise_ntk(MODEL.apply, PARAMS, x1, x2, mesh=mesh)
    if kind == "infinite":
        return ntkdp.infinite_ntk(MODEL, x1, x2, mesh=mesh)
    return ntkdp.layerwise_infinite_ntk(MODEL, x1, x2, mesh=mesh)


def flow(kind: str, mesh: Any, rule: Any = None, test: bool = True) -> ntkdp.KernelFlow:
    rule = (LAYERWISE if "layer" in kind else FLAT) if rule is None else rule
    with_test = (
        {"test_kernel": kernel(kind, mesh, TEST_X, X), "test_targets": TEST_Y} if test else {}
    )
    return ntkdp.KernelFlow(kernel(kind, mesh), Y, LOSS, rule, mesh=mesh, **with_test)


def assert_same(found: Any, expected: Any) -> None:
    found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=0, atol=1e-10)


def bytes_on_first_device(tree: Any) -> int:
    device = jax.devices()[0]
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        if isinstance(leaf, jax.Array)
        for shard in leaf.addressable_shards
        if shard.device == device
    )


def lowered(
    program: Callable[Arguments, object], *arguments: Arguments.args, **named: Arguments.kwargs
) -> Any:
    """What ``jit`` made of a function, before it is compiled for these arguments."""
    made_by_jit: Any = program
    return made_by_jit.lower(*arguments, **named)
