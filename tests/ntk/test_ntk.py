"""Kernels against stored values, plain Jacobians and identities; what cannot be answered raises."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal, stored

import ntkdp
from ntkdp import models
from ntkdp._backend import memory
from ntkdp._gradients import groups as _groups


@pytest.mark.parametrize("name", ["mlp_relu", "cnn_pool", "layernorm_mlp"])
def test_stored_kernels(name: str) -> None:
    model, params, values = stored(name)
    x1, x2 = values["x1"], values["x2"]
    H21 = ntkdp.empirical_ntk(model.apply, params, x2, x1)
    scale = float(jnp.max(jnp.abs(values["H11"])))
    np.testing.assert_allclose(H21, values["H21"], rtol=1e-10, atol=1e-12 * scale)
    layers = ntkdp.layerwise_ntk(model.apply, params, x1)
    np.testing.assert_allclose(layers.total, values["H11"], rtol=1e-10, atol=1e-12 * scale)
    assert list(layers.names) == [str(i) for i, p in enumerate(params) if jax.tree.leaves(p)]
    for layer, term in zip(layers.names, layers.values, strict=True):
        np.testing.assert_allclose(
            term, values[f"H11_layer{layer}"], rtol=1e-10, atol=1e-12 * scale, err_msg=layer
        )


@pytest.mark.parametrize("name", ["mlp_relu", "cnn_pool", "layernorm_mlp"])
def test_stored_infinite_kernels(name: str) -> None:
    model, _, values = stored(name)
    x1, x2 = values["x1"], values["x2"]

    @jax.jit
    def kernels(x1: jax.Array, x2: jax.Array) -> tuple[Any, ...]:
        layers = ntkdp.layerwise_infinite_ntk
        return ntkdp.infinite_ntk(model, x1, x2), layers(model, x1), layers(model, x1, x2)

    theta12, layers11, layers12 = kernels(x1, x2)
    np.testing.assert_allclose(theta12, values["inf_ntk12"], rtol=1e-6)
    np.testing.assert_allclose(layers12.total, values["inf_ntk12"], rtol=1e-6)
    np.testing.assert_allclose(layers11.total, values["inf_ntk11"], rtol=1e-6)
    assert list(layers11.names) == [key.split("layer")[1] for key in values if "layer" in key]
    # A term is a kernel of its own: on one set of points no eigenvalue lies below zero.
    for term in layers11.values:
        assert np.linalg.eigvalsh(term).min() > -1e-10


def network(p: dict[str, Any], x: jax.Array) -> jax.Array:
    h = jnp.tanh(x @ p["first"]["w"] + p["first"]["b"])
    return p["scale"] * h @ p["last"]["w"]


PARAMS = {
    "first": {"b": normal(0, 4), "w": normal(1, 3, 4)},
    "last": {"w": normal(2, 4, 2)},
    "scale": jnp.asarray(1.3),
}
X1, X2 = normal(3, 5, 3), normal(4, 3, 3)


def plain_jacobian(apply: Callable[..., jax.Array], params: Any, x: jax.Array) -> np.ndarray:
    """All of it, ``(n, K, P)``."""
    leaves = jax.tree.leaves(jax.jit(jax.jacrev(apply))(params, x))
    return np.concatenate([np.reshape(leaf, (*leaf.shape[:2], -1)) for leaf in leaves], -1)


J1, J2 = plain_jacobian(network, PARAMS, X1), plain_jacobian(network, PARAMS, X2)
H12 = np.einsum("ikp,jlp->ijkl", J1, J2)
H11 = np.einsum("ikp,jlp->ijkl", J1, J1)


def test_second_inputs_given_or_not() -> None:
    np.testing.assert_allclose(ntkdp.empirical_ntk(network, PARAMS, X1, X2), H12, rtol=1e-10)
    once = ntkdp.empirical_ntk(network, PARAMS, X1)
    np.testing.assert_allclose(once, H11, rtol=1e-10)
    np.testing.assert_allclose(ntkdp.empirical_ntk(network, PARAMS, X1, X1), once, rtol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 5, 100])
def test_blocks_of_any_size(batch_size: int) -> None:
    kernel = ntkdp.layerwise_ntk(network, PARAMS, X1, X2, batch_size=batch_size)
    np.testing.assert_allclose(kernel.total, H12, rtol=1e-10)
    assert kernel.names == ("first", "last", "scale")
    np.testing.assert_allclose(
        kernel.values[0], np.einsum("ikp,jlp->ijkl", J1[..., :16], J2[..., :16]), rtol=1e-9
    )


def test_under_jit_vmap_and_grad() -> None:
    def kernel(params: Any, batch_size: int | None = None) -> jax.Array:
        return ntkdp.empirical_ntk(network, params, X1, X2, batch_size=batch_size)

    np.testing.assert_allclose(jax.jit(kernel)(PARAMS), H12, rtol=1e-10)
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), PARAMS)
    mapped = jax.vmap(kernel)(several)
    np.testing.assert_allclose(mapped[0], H12, rtol=1e-10)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, PARAMS)
    np.testing.assert_allclose(mapped[1], kernel(doubled), rtol=1e-10)

    def plain(params: Any) -> jax.Array:
        rows, columns = (jax.tree.leaves(jax.jacrev(network)(params, x)) for x in (X1, X2))
        flat = zip(rows, columns, strict=True)
        products = [jnp.sum(r[1, 0].ravel() * c[2, 1].ravel()) for r, c in flat]
        return jnp.sum(jnp.stack(products))

    expected = jax.jit(jax.grad(plain))(PARAMS)
    for batch_size in (None, 2):
        found = jax.jit(jax.grad(lambda p, b=batch_size: kernel(p, b)[1, 2, 0, 1]))(PARAMS)
        jax.tree.map(
            lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-8, atol=1e-12), found, expected
        )


def test_float32() -> None:
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), PARAMS)
    x1, x2 = X1.astype(jnp.float32), X2.astype(jnp.float32)
    for batch_size in (None, 2):
        kernel = ntkdp.layerwise_ntk(network, single, x1, x2, batch_size=batch_size)
        assert kernel.values.dtype == jnp.float32
        np.testing.assert_allclose(kernel.total, H12, rtol=1e-4, atol=1e-5)
    model = ntkdp.models.mlp([8], 2)
    with jax.enable_x64(False):
        theta = ntkdp.infinite_ntk(model, x1)
        assert theta.dtype == jnp.float32
    np.testing.assert_allclose(theta, ntkdp.infinite_ntk(model, X1), rtol=1e-4, atol=1e-5)


def test_norms_are_quadratic_forms_of_the_diagonal_blocks() -> None:
    """||g_i||^2 = a_i^T H_ii a_i, flat and by group, below 1e-12."""
    a = normal(7, 5, 2)
    layers = ntkdp.layerwise_ntk(network, PARAMS, X1)
    forms = jnp.einsum("nk,rnnkl,nl->rn", a, layers.values, a)
    flat = ntkdp.per_sample_gradient_norms(network, PARAMS, X1, a)
    by_group = ntkdp.per_sample_gradient_norms(network, PARAMS, X1, a, groups=lambda path: path[0])
    assert flat.shape == (5,)
    assert by_group.shape == (3, 5)
    # Paths start with the letter of their group: first, last, scale.
    assert float(jnp.max(jnp.abs(by_group**2 / forms - 1))) < 1e-12
    assert float(jnp.max(jnp.abs(flat**2 / forms.sum(0) - 1))) < 1e-12


def test_norms_against_plain_gradients() -> None:
    a = normal(7, 5, 2)

    def loss(params: Any, x: jax.Array, a: jax.Array) -> jax.Array:
        return jnp.sum(network(params, x[None])[0] * a)

    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))(PARAMS, X1, a)
    squares = [np.sum(np.reshape(leaf, (5, -1)) ** 2, 1) for leaf in jax.tree.leaves(gradients)]
    by_leaf = ntkdp.per_sample_gradient_norms(network, PARAMS, X1, a, groups=lambda path: path)
    np.testing.assert_allclose(by_leaf**2, squares, rtol=1e-10)
    labels = {"first": "a", "last": "b", "scale": "a"}
    by_label = ntkdp.per_sample_gradient_norms(network, PARAMS, X1, a, groups=labels)
    expected = [squares[0] + squares[1] + squares[3], squares[2]]
    np.testing.assert_allclose(by_label**2, expected, rtol=1e-10)
    # A sample without a gradient has norm zero, and the derivative of its norm is finite.
    assert ntkdp.per_sample_gradient_norms(network, PARAMS, X1, a.at[0].set(0.0))[0] == 0.0
    slope = jax.grad(
        lambda p: jnp.sum(ntkdp.per_sample_gradient_norms(network, p, X1, a.at[0].set(0.0)))
    )(PARAMS)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(slope))


class Nested(eqx.Module):
    trunk: eqx.nn.MLP

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.trunk(x)


def test_default_groups_are_the_layers() -> None:
    x = normal(0, 2, 3)
    key = jax.random.key(0)
    linear = ntkdp.models.from_flax(nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(2)]))
    module = Nested(eqx.nn.MLP(3, 2, 4, 1, key=key))
    cases = {
        ("0", "2"): ntkdp.models.mlp([4], 2),
        ("layers_0", "layers_2"): linear,
        ("trunk/layers/0", "trunk/layers/1"): ntkdp.models.from_equinox(module),
    }
    for names, model in cases.items():
        kernel = ntkdp.layerwise_ntk(model.apply, model.init(key, x), x)
        assert kernel.names == names
    deep = {"net": {"blocks": [{"w": jnp.ones((3, 2))}, {"w": jnp.ones((2, 2))}]}}
    kernel = ntkdp.layerwise_ntk(
        lambda p, x: x @ p["net"]["blocks"][0]["w"] @ p["net"]["blocks"][1]["w"], deep, x
    )
    assert kernel.names == ("net/blocks/0", "net/blocks/1")
    alone = ntkdp.layerwise_ntk(lambda p, x: x @ p, jnp.ones((3, 2)), x)
    assert alone.names == ("params",)


def test_groups_of_the_user() -> None:
    whole = ntkdp.layerwise_ntk(network, PARAMS, X1)
    labels = {"first": {"b": "bias", "w": "weight"}, "last": "weight", "scale": "other"}
    by_prefix = ntkdp.layerwise_ntk(network, PARAMS, X1, groups=labels)
    assert by_prefix.names == ("bias", "weight", "other")
    np.testing.assert_allclose(by_prefix.total, whole.total, rtol=1e-12)
    np.testing.assert_allclose(by_prefix.values[2], whole.values[2], rtol=1e-12)
    by_path = ntkdp.layerwise_ntk(network, PARAMS, X1, groups=lambda path: path.split("/")[-1])
    assert by_path.names == ("b", "w", "scale")
    np.testing.assert_allclose(by_path.values[1], by_prefix.values[1], rtol=1e-12)
    with pytest.raises(ValueError, match="groups must be a pytree prefix of params"):
        ntkdp.layerwise_ntk(network, PARAMS, X1, groups={"first": "a"})


def test_leaves_that_the_outputs_do_not_depend_on() -> None:
    params = {"unused": jnp.ones(3), "w": jnp.ones((3, 2))}
    kernel = ntkdp.layerwise_ntk(lambda p, x: x @ p["w"], params, X1)
    assert kernel.names == ("unused", "w")
    assert not np.any(kernel.values[0])
    nothing = ntkdp.empirical_ntk(lambda p, x: x, jnp.ones(2), X1)
    assert not np.any(nothing)
    assert nothing.shape == (5, 5, 3, 3)


def test_preconditioned_kernel() -> None:
    preconditioner = jax.tree.map(lambda leaf: 0.5 + leaf**2, PARAMS)
    diagonal = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(preconditioner)])
    found = ntkdp.ntk.preconditioned_ntk(network, PARAMS, preconditioner, X1, X2)
    np.testing.assert_allclose(found, np.einsum("ikp,p,jlp->ijkl", J1, 1 / diagonal, J2), rtol=1e-9)
    blocks = ntkdp.ntk.preconditioned_ntk(network, PARAMS, preconditioner, X1, X2, batch_size=2)
    np.testing.assert_allclose(blocks, found, rtol=1e-10)
    with pytest.raises(ValueError, match="structure of params"):
        ntkdp.ntk.preconditioned_ntk(network, PARAMS, jnp.ones(3), X1)
    with pytest.raises(ValueError, match=r"preconditioner\['scale'\] must be positive"):
        ntkdp.ntk.preconditioned_ntk(network, PARAMS, preconditioner | {"scale": jnp.zeros(())}, X1)
    with pytest.raises(ValueError, match=r"preconditioner\['scale'\] must have shape"):
        ntkdp.ntk.preconditioned_ntk(network, PARAMS, preconditioner | {"scale": jnp.ones(2)}, X1)


def test_a_layerwise_kernel_is_a_pytree_that_checks_itself() -> None:
    kernel = ntkdp.LayerwiseKernel(("a", "b"), jnp.ones((2, 3, 3)))
    doubled = jax.tree.map(lambda leaf: 2 * leaf, kernel)
    assert doubled.names == ("a", "b")
    assert jax.jit(lambda k: k.total)(doubled)[0, 0] == 4.0
    with pytest.raises(ValueError, match="one term for each of the 1 names, got 2"):
        ntkdp.LayerwiseKernel(("a",), jnp.ones((2, 3, 3)))
    with pytest.raises(ValueError, match=r"values must have shape .* got \(2, 3\)"):
        ntkdp.LayerwiseKernel(("a", "b"), jnp.ones((2, 3)))


def test_a_kernel_larger_than_memory_raises_before_it_is_made() -> None:
    """116 TiB of kernel from 32 kB of inputs."""

    def wide(w: jax.Array, x: jax.Array) -> jax.Array:
        return x * w

    x = jnp.ones((4000, 1))
    needed = r"needs 128,000,000,000,000 bytes \(119209.3 GiB\) and [\d,]+ bytes .* available"
    with pytest.raises(MemoryError, match=needed) as caught:
        ntkdp.empirical_ntk(wide, jnp.ones((1, 1000)), x, batch_size=10)
    assert "infinite-width kernel" in str(caught.value)
    assert "fewer samples" in str(caught.value)


def test_memory_is_asked_for_every_kind_of_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ntkdp.models.mlp([4], 1)
    params = model.init(jax.random.key(0), X1)
    monkeypatch.setattr(memory, "available_bytes", lambda: 199)
    with pytest.raises(MemoryError, match="needs 200 bytes"):
        ntkdp.empirical_ntk(model.apply, params, X1)
    with pytest.raises(MemoryError, match="needs 400 bytes"):
        ntkdp.layerwise_ntk(model.apply, params, X1)
    ntkdp.empirical_ntk(model.apply, params, X1, X2)
    with pytest.raises(MemoryError, match="needs 200 bytes"):
        ntkdp.infinite_ntk(model, X1)
    with pytest.raises(MemoryError, match="needs 400 bytes"):
        ntkdp.layerwise_infinite_ntk(model, X1)


def batch_norm(w: jax.Array, x: jax.Array) -> jax.Array:
    h = x @ w
    return (h - jnp.mean(h, 0)) / (jnp.std(h, 0) + 1e-3)


def studentised(w: jax.Array, x: jax.Array) -> jax.Array:
    """NaN for a batch of one."""
    h = x @ w
    return h / jnp.std(h, 0)


@pytest.mark.parametrize("apply", [batch_norm, pytest.param(studentised, marks=pytest.mark.slow)])
def test_a_model_that_couples_samples_raises(apply: Callable[..., jax.Array]) -> None:
    w = normal(0, 3, 2)
    with pytest.raises(ValueError, match="couples the samples of a batch"):
        ntkdp.empirical_ntk(apply, w, X1)
    with pytest.raises(ValueError, match="couples the samples of a batch"):
        ntkdp.per_sample_gradient_norms(apply, w, X1, jnp.ones((5, 2)))


def test_what_has_no_infinite_kernel_raises() -> None:
    plain = ntkdp.models.from_function(lambda key, x: jnp.ones((3, 1)), lambda w, x: x @ w)
    with pytest.raises(ValueError, match=r"must have an infinite-width kernel, .*kernel_fn=None"):
        ntkdp.infinite_ntk(plain, X1)
    from neural_tangents import stax

    opaque = ntkdp.models.from_stax(*stax.serial(stax.Dense(4), stax.Relu(), stax.Dense(1)))
    assert ntkdp.infinite_ntk(opaque, X1).shape == (5, 5)
    for model in (plain, opaque):
        with pytest.raises(ValueError, match=r"layer terms .*mlp, cnn or serial"):
            ntkdp.layerwise_infinite_ntk(model, X1)


def test_a_model_of_another_class_has_its_infinite_kernels() -> None:
    """Of the inputs themselves, so that the kernel is the Gram matrix; and its two terms."""

    class Linear:
        def init(self, key: jax.Array, x: jax.Array) -> dict[str, jax.Array]:
            return {"a": jnp.ones((x.shape[1], 1)), "b": jnp.ones((1, 1))}

        def kernel_fn(self, x1: jax.Array, x2: jax.Array | None, get: str) -> jax.Array:
            assert get == "ntk"
            return x1 @ (x1 if x2 is None else x2).T + 1

        def layer_kernel_fn(
            self, x1: jax.Array, x2: jax.Array | None = None
        ) -> dict[str, jax.Array]:
            gram = x1 @ (x1 if x2 is None else x2).T
            return {"a": gram, "b": jnp.ones_like(gram)}

    np.testing.assert_allclose(ntkdp.infinite_ntk(Linear(), X1, X2), X1 @ X2.T + 1, rtol=1e-14)
    terms = ntkdp.layerwise_infinite_ntk(Linear(), X1)
    assert terms.names == ("a", "b")
    np.testing.assert_allclose(terms.total, X1 @ X1.T + 1, rtol=1e-14)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x1": X1.at[1, 2].set(jnp.nan)}, "x1 must be finite, got 1 NaN"),
        ({"x2": X2.at[0].set(jnp.inf)}, "x2 must be finite, got 3 NaN or infinite of 9"),
        (
            {"params": PARAMS | {"scale": jnp.asarray(jnp.nan)}},
            r"params\['scale'\] must be finite, got 1",
        ),
        ({"x1": X1[:0]}, r"x1 must have shape \(n, ...\) with n >= 1, got \(0, 3\)"),
        ({"x1": X1[0]}, r"x1 must have shape .* got \(3,\)"),
        ({"x2": X2[:, :2]}, r"fails for x2 of shape \(3, 2\)"),
        ({"x1": X1[:, :2]}, r"fails for x1 of shape \(5, 2\)"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"apply": lambda p, x: x[:, 0]}, r"must have shape \(n, K\) with n = 5, got \(5,\)"),
        ({"apply": lambda p, x: (x @ x.T)[:1]}, r"with n = 5, got \(1, 5\)"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"apply": network, "params": PARAMS, "x1": X1, "x2": X2} | change
    apply, params, x1, x2 = (arguments.pop(key) for key in ("apply", "params", "x1", "x2"))
    with pytest.raises(ValueError, match=message):
        ntkdp.empirical_ntk(apply, params, x1, x2, **arguments)


def test_bad_parameters_and_output_gradients_are_named() -> None:
    with pytest.raises(TypeError, match=r"params must be a floating-point array, got int64"):
        ntkdp.layerwise_ntk(lambda w, x: x @ w, jnp.ones((3, 1), int), X1)
    with pytest.raises(ValueError, match="params must hold at least one array"):
        ntkdp.layerwise_ntk(lambda w, x: x, {}, X1)
    with pytest.raises(ValueError, match=r"output_gradient must have the shape .* \(5, 2\), got"):
        ntkdp.per_sample_gradient_norms(network, PARAMS, X1, jnp.ones((5, 1)))
    a = jnp.ones((5, 2)).at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="output_gradient must be finite, got 1"):
        ntkdp.per_sample_gradient_norms(network, PARAMS, X1, a)
    model = ntkdp.models.mlp([4], 1)
    with pytest.raises(ValueError, match="x1 must be finite, got 1 NaN"):
        ntkdp.infinite_ntk(model, X1.at[0, 0].set(jnp.nan))
    with pytest.raises(ValueError, match=r"x2 must have samples of the shape of x1's, \(3,\)"):
        ntkdp.infinite_ntk(model, X1, X2[:, :2])
    with pytest.raises(ValueError, match=r"x1 must have shape .* got \(0, 3\)"):
        ntkdp.layerwise_infinite_ntk(model, X1[:0])


def test_a_kernel_between_two_networks_is_the_product_of_their_jacobians() -> None:
    """Also through a metric, and in blocks of samples."""
    model = models.mlp([8], 2)
    x1, x2 = normal(31, 5, 3), normal(32, 4, 3)
    first, second = (model.init(jax.random.key(seed), x1) for seed in (1, 2))
    groups = _groups.resolve(first)
    metric = jax.tree.map(lambda leaf: 1.5 + jnp.cos(leaf), first)
    jacobian = jax.jit(jax.jacrev(model.apply))
    jacobians = [jacobian(p, x) for p, x in ((first, x1), (second, x2))]
    kernel = ntkdp.ntk.between_parameters(model.apply, first, second, x1, x2, groups)
    scaled = ntkdp.ntk.between_parameters(model.apply, first, second, x1, x2, groups, metric)
    for weights, terms in ((jax.tree.map(jnp.ones_like, metric), kernel), (metric, scaled)):
        leaves = [jax.tree.leaves(tree) for tree in (weights, *jacobians)]
        expected = jnp.zeros((groups.size, 5, 4, 2, 2))
        for group, d, j1, j2 in zip(groups.leaf_to_group, *leaves, strict=True):
            flat = (j1 * d).reshape(5, 2, -1), j2.reshape(4, 2, -1)
            expected = expected.at[group].add(jnp.einsum("ikp,jlp->ijkl", *flat))
        np.testing.assert_allclose(terms, expected, atol=1e-12)
