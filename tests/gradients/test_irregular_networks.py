"""One leaf at several sites, batches within a sample, narrow types of tokens, nothing to see."""

import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers import ROOT, Apply
from jax import lax
from plain_jacobians import Numbers, check


def conv(x: jax.Array, w: jax.Array, stride: int = 1, padding: str = "VALID") -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    h = lax.conv_general_dilated(x, w, (stride, stride), padding, dimension_numbers=numbers)
    return jnp.sin(h)


def as_type(kind: str, mode: str) -> Apply:
    def apply(p: jax.Array, x: jax.Array) -> jax.Array:
        options: dict[str, Any] = {"fill_value": 0.0} if mode == "fill" else {}
        rows = jnp.take(p, x.astype(kind), axis=0, mode=mode, **options)
        return jnp.sum(jnp.tanh(rows), 1)

    return apply


def two_modes(p: jax.Array, x: jax.Array) -> jax.Array:
    x = x.astype(int)
    rows = jnp.tanh(jnp.take(p, x, axis=0, mode="clip"))
    return jnp.sum(rows + jnp.sin(jnp.take(p, x, axis=0, mode="fill", fill_value=0.0)), 1)


TOKENS = jnp.asarray([[0.0, 3.0, 7.0], [1.0, 1.0, 9.0], [5.0, 2.0, 0.0]])
#: A model, the shape of its weight, and samples. Within a sample a leaf meets data of several
#: shapes, or data with a batch axis of its own.
IRREGULAR: dict[str, tuple[Apply, tuple[int, ...], Any]] = {
    "frames of a video": (
        lambda p, x: conv(x.reshape(-1, *x.shape[2:]), p).reshape(x.shape[0], -1, 2).sum(1),
        (2, 2, 2, 2), (3, 3, 4, 4, 2)),
    "batch in a sample": (
        lambda p, x: jnp.prod(
            conv(jnp.concatenate([x, x**2]), p).sum((1, 2)).reshape(2, -1, 2), 0),
        (2, 2, 2, 2), (3, 4, 4, 2)),
    "filters with two strides": (
        lambda p, x: conv(x, p).sum((1, 2)) + conv(x, p, stride=2).sum((1, 2)),
        (2, 2, 2, 2), (3, 5, 5, 2)),
    "filters with two paddings": (
        lambda p, x: conv(x, p).sum((1, 2)) + conv(x, p, padding="SAME").sum((1, 2)),
        (2, 2, 2, 2), (3, 4, 4, 2)),
    "positions and their mean": (
        lambda p, x: jnp.tanh(x @ p).sum(1) + jnp.sin(jnp.mean(x, 1) @ p),
        (3, 2), (3, 4, 3)),
    "two orders of axes": (
        lambda p, x: (jnp.tanh(jnp.einsum("nab,bk->nak", x, p))
                      * jnp.sin(jnp.einsum("nba,bk->nak", x, p))).sum(1),
        (3, 2), (3, 3, 3)),
    "two modes of a lookup": (two_modes, (6, 2), TOKENS),
    "rows that do not exist": (
        lambda p, x: jnp.sum(jnp.tanh(p[x.astype(int) - 2]), 1), (6, 2), TOKENS),
    "unsigned tokens": (as_type("uint8", "fill"), (6, 2), TOKENS),
    "short tokens": (as_type("int8", "fill"), (200, 2), TOKENS),
    "short tokens, clipped": (as_type("int8", "clip"), (200, 2), TOKENS),
    "no position": (
        lambda p, x: jnp.sum(conv(x, p), (1, 2)) + x.sum((1, 2)),
        (6, 6, 2, 2), (3, 4, 4, 2)),
}  # fmt: skip


def look_at(name: str) -> None:
    apply, shape, x = IRREGULAR[name]
    new = Numbers(5)
    check(lambda p, x: apply(p["w"], x), {"w": new(*shape)}, new(*x) if isinstance(x, tuple) else x)


@pytest.mark.parametrize("name", [name for name in IRREGULAR if "short" not in name])
def test_irregular_uses_of_a_leaf(name: str) -> None:
    look_at(name)


@pytest.mark.slow
def test_lookups_by_short_indices() -> None:
    # With XLA as users have it: the flags of the tests make such lookups wrong.
    code = (
        "import jax, test_irregular_networks as here\n"
        "jax.config.update('jax_enable_x64', True)\n"
        "for name in here.IRREGULAR:\n"
        "    if 'short' in name: here.look_at(name); print(name)\n"
    )
    tests = ROOT / "tests"
    folders = os.pathsep.join(map(str, (tests, tests / "gradients")))
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": folders}
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == ["short tokens", "short tokens, clipped"]
