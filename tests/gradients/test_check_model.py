"""What entry points say about parameters, shapes and classes that cannot work, and what can."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ntkdp
from ntkdp import models
from ntkdp.ntk import gradient_structure

X, Y, W = jnp.ones((2, 3)), jnp.ones((2, 1)), jnp.ones((3, 1))
LOSS, RULE, KEY = ntkdp.losses.SquaredError(), ntkdp.clipping.Abadi(1.0), jax.random.key(0)


def apply(p: Any, x: jax.Array) -> jax.Array:
    return x @ p["w"]


def train(p: Any) -> Any:
    return ntkdp.dp_sgd.run(apply, p, X, Y, LOSS, RULE, learning_rate=0.1, steps=1, key=KEY)


ENTRIES: dict[str, Callable[[Any], Any]] = {
    "empirical_ntk": lambda p: ntkdp.empirical_ntk(apply, p, X),
    "layerwise_ntk": lambda p: ntkdp.layerwise_ntk(apply, p, X),
    "preconditioned_ntk": lambda p: ntkdp.ntk.preconditioned_ntk(apply, p, p, X),
    "per_sample_gradient_norms": lambda p: ntkdp.per_sample_gradient_norms(apply, p, X, Y),
    "gradient_structure": lambda p: gradient_structure(apply, p, X),
    "gradient_norms": lambda p: ntkdp.advisor.gradient_norms(apply, p, X, Y, LOSS),
    "WeightFlow": lambda p: ntkdp.solve(ntkdp.WeightFlow(apply, X, Y, LOSS, RULE), p, [0.0, 1.0]),
    "LinearisedFlow": lambda p: ntkdp.LinearisedFlow(apply, p, X, Y, LOSS, RULE),
    "dp_sgd.run": train,
    "dp_sgd.build": lambda p: ntkdp.dp_sgd.build(apply, X, Y, LOSS, RULE, learning_rate=0.1).init(
        p
    ),
    "extreme_eigenvalues": lambda p: ntkdp.spectrum.extreme_eigenvalues(apply, p, X),
    "sharpness": lambda p: ntkdp.spectrum.sharpness(apply, p, X, Y, LOSS, RULE),
}
LEAVES = {
    "complex128": jnp.ones(2, complex),
    "int64": jnp.asarray(2),
    "bool": np.array([True]),
    "key<fry>": KEY,
    "PjitFunction": jnp.tanh,
    "str": "relu",
    "object": np.array([None]),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_leaves_that_are_no_parameters_are_named(entry: str) -> None:
    for kind, leaf in LEAVES.items():
        match = rf"(params|initial)\['n'\] must be a floating-point array, got {kind}; (close|pass)"
        with pytest.raises(TypeError, match=match):
            ENTRIES[entry]({"w": W, "n": leaf})
    with pytest.raises(ValueError, match=r"(params|initial) must hold at least one array"):
        ENTRIES[entry]({})


def test_numbers_are_parameters() -> None:
    def scaled(p: Any, x: jax.Array) -> jax.Array:
        return p["s"] * (x @ p["w"])

    found = ntkdp.empirical_ntk(scaled, {"w": W, "s": 2.0}, X)[0, 1, 0, 0]
    assert float(found) == 3 * 4 + 3 * 3


def test_weights_and_inputs_of_width_zero() -> None:
    empty = {"a": jnp.zeros((3, 0)), "c": jnp.zeros((0, 1)), "d": W}

    def around(p: Any, x: jax.Array) -> jax.Array:
        return (x @ p["a"]) @ p["c"] + x @ p["d"]

    np.testing.assert_allclose(ntkdp.empirical_ntk(around, empty, X)[..., 0, 0], X @ X.T)
    norms = ntkdp.per_sample_gradient_norms(around, empty, X, 2 * Y)
    np.testing.assert_allclose(norms, 2 * 3**0.5)
    run = ntkdp.dp_sgd.run(
        around, empty, X, Y, LOSS, ntkdp.clipping.NoClipping(), learning_rate=0.1, steps=1, key=KEY
    )
    np.testing.assert_allclose(run.loss, [2.0, 0.5 * (2 - 0.1 * 2 * 3) ** 2])

    def biased(p: Any, x: jax.Array) -> jax.Array:
        return x @ p["w"] + p["b"]

    blind = ntkdp.empirical_ntk(biased, {"w": jnp.zeros((0, 1)), "b": jnp.zeros(1)}, X[:, :0])
    np.testing.assert_array_equal(blind[..., 0, 0], 1.0)


def test_no_outputs_are_named() -> None:
    with pytest.raises(ValueError, match=r"K >= 1 outputs, got shape \(2, 0\)"):
        ntkdp.empirical_ntk(lambda p, x: x @ p, jnp.ones((3, 0)), X)


def test_labels_in_a_column_are_named() -> None:
    loss, labels = ntkdp.losses.SoftmaxCrossEntropy(), jnp.asarray([[0], [1]])
    with pytest.raises(ValueError, match=r"labels of shape \(2,\), got \(2, 1\); pass targets"):
        loss.check(labels, 2, 6)
    with pytest.raises(ValueError, match=r"labels of shape \(2,\), got \(2, 1\)"):
        ntkdp.dp_sgd.run(apply, {"w": jnp.ones((3, 6))}, X, labels, loss, RULE,
                         learning_rate=0.1, steps=1, key=KEY)  # fmt: skip


class Bare(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layer = nnx.Linear(3, 1, rngs=rngs)


class Keyed(eqx.Module):
    table: eqx.nn.Embedding
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        self.table = eqx.nn.Embedding(7, 3, key=key)
        self.head = eqx.nn.Linear(3, 2, key=key)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.head(jnp.tanh(jax.vmap(self.table)(tokens)).sum(0))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (models.from_flax, nn.Dense),
        (models.from_flax, nn.Module),
        (models.from_flax, Bare),
        (models.from_equinox, eqx.nn.MLP),
        (models.from_equinox, eqx.nn.Linear),
    ],
)
def test_a_class_in_place_of_an_instance_is_named(make: Any, kind: type) -> None:
    with pytest.raises(TypeError, match=f"got the class {kind.__name__}: make an instance"):
        make(kind)


def test_an_embedding_of_equinox_is_a_lookup() -> None:
    model = models.from_equinox(Keyed)  # a class that is a function of a key
    x = jnp.asarray([[1, 2, 1], [6, -1, 0]])
    params = model.init(KEY, x)
    found = gradient_structure(model.apply, params, x)
    assert found == {"table/weight": "lookup", "head/weight": "product",
                     "head/bias": "element by element"}  # fmt: skip
    J = jax.tree.leaves(jax.jacrev(model.apply)(params, x))
    truth = sum(np.einsum("nkp,mlp->nmkl", *[np.reshape(j, (2, 2, -1))] * 2) for j in J)
    np.testing.assert_allclose(ntkdp.empirical_ntk(model.apply, params, x), truth, rtol=1e-12)
