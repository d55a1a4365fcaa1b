"""Models: kernels against stored values and wide networks, adapters against the packages."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import KEY, known, stored

from ntkdp import models
from ntkdp._backend import neural_tangents

stax = neural_tangents.stax


@pytest.mark.parametrize("name", ["mlp_relu", "cnn_pool", "layernorm_mlp"])
def test_outputs_kernels_and_terms_of_stored_networks(name: str) -> None:
    model, params, values = stored(name)
    x1, x2 = values["x1"], values["x2"]
    np.testing.assert_allclose(model.apply(params, x1), values["f1"], rtol=1e-12, atol=1e-14)

    @jax.jit
    def kernels(
        x1: jax.Array, x2: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        both = known(model.kernel_fn)(x1, x2, ("ntk", "nngp"))
        return both.ntk, both.nngp, known(model.layer_kernel_fn)(x1, x2)

    for suffix, second in (("11", None), ("12", x2)):
        ntk, nngp, terms = kernels(x1, second)
        np.testing.assert_allclose(ntk, values[f"inf_ntk{suffix}"], rtol=1e-6)
        np.testing.assert_allclose(nngp, values[f"inf_nngp{suffix}"], rtol=1e-6)
        np.testing.assert_allclose(sum(terms.values()), ntk, rtol=1e-12)
    layers = [str(i) for i, entry in enumerate(params) if jax.tree.leaves(entry)]
    assert list(terms) == layers
    assert {f"H11_layer{i}" for i in layers} <= set(values)


def empirical_terms(model: models.Model, params: list[Any], x: jax.Array) -> jax.Array:
    """Trace over outputs / K of J_r J_r^T for each group, plain autodiff: (R, n, n)."""
    jacobian = jax.jacrev(model.apply)(params, x)

    def term(entry: object) -> jax.Array:
        rows = [leaf.reshape(*leaf.shape[:2], -1) for leaf in jax.tree.leaves(entry)]
        return sum(jnp.einsum("iap,jap->ij", row, row) / row.shape[1] for row in rows)

    return jnp.stack([term(entry) for entry in jacobian if jax.tree.leaves(entry)])


WIDE: dict[str, tuple[Callable[[int], models.Model], tuple[int, ...]]] = {
    "mlp": (lambda n: models.mlp([n, n], 2, activation="erf", b_std=0.5), (3, 4)),
    "mlp, standard": (lambda n: models.mlp([n, n], 2, parameterization="standard"), (3, 4)),
    "cnn, average": (lambda n: models.cnn([n, n], 2, pooling="average"), (2, 4, 4, 2)),
    "cnn, global": (
        lambda n: models.cnn([n, n], 2, activation="gelu", pooling="global", padding="VALID"),
        (2, 6, 5, 2),
    ),
    "cnn, standard, strides": (
        lambda n: models.cnn(
            [n], 2, kernel_size=(3, 2), strides=2, parameterization="standard", b_std=None
        ),
        (3, 5, 5, 1),
    ),
    "layer norm": (
        lambda n: models.serial(
            stax.Dense(n, 1.2, 0.1),
            stax.LayerNorm(),
            stax.Relu(),
            stax.Dense(n, 1.2, 0.1),
            stax.LayerNorm(),
            stax.Relu(),
            stax.Dense(2, 1.0, 0.1),
        ),
        (3, 4),
    ),
    "residual block": (
        lambda n: models.serial(
            stax.Dense(n, 1.2, 0.1),
            stax.FanOut(2),
            stax.parallel(stax.Dense(n, 0.7), stax.serial(stax.Erf(), stax.Dense(n, 1.3, 0.1))),
            stax.FanInSum(),
            stax.Erf(),
            stax.Dense(2, 1.0),
        ),
        (3, 4),
    ),
}


@pytest.mark.filterwarnings("ignore:`FanIn` layers assume independent inputs:UserWarning")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "mlp" else pytest.mark.slow) for name in WIDE],
)
def test_each_layer_term_is_the_mean_of_wide_networks(name: str) -> None:
    make, shape = WIDE[name]
    width, draws = 64, 200
    model = make(width)
    x = jax.random.normal(jax.random.key(1), shape)
    terms = known(model.layer_kernel_fn)(x)
    total = known(model.kernel_fn)(x, None, "ntk")
    np.testing.assert_allclose(sum(terms.values()), total, rtol=1e-12)
    sample = jax.jit(lambda key: empirical_terms(model, model.init(key, x), x))
    drawn = jax.lax.map(sample, jax.random.split(jax.random.key(2), draws))
    mean, error = np.mean(drawn, 0), np.std(drawn, 0) / draws**0.5
    assert len(terms) == len(mean)
    for r, (layer, term) in enumerate(terms.items()):
        # The mean itself is off by O(1/width) of the term's scale.
        bias = 4.0 / width * float(jnp.max(jnp.abs(term)))
        assert np.all(np.abs(mean[r] - term) < 5 * error[r] + bias), (layer, mean[r], term)


def test_standard_parameterisation_scales_as_documented() -> None:
    """N / W_std^2 times the NTK term of the weights, and 1 / b_std^2 times that of the biases."""
    x = jax.random.normal(KEY, (4, 6))
    options: dict[str, Any] = {"W_std": 1.3, "output_W_std": 0.9}
    standard, ntk = (
        known(models.mlp([50], 1, b_std=None, parameterization=kind, **options).layer_kernel_fn)(x)
        for kind in ("standard", "ntk")
    )
    np.testing.assert_allclose(standard["0"], ntk["0"] * 6 / 1.3**2, rtol=1e-12)
    np.testing.assert_allclose(standard["2"], ntk["2"] * 50 / 0.9**2, rtol=1e-12)


def test_shapes_keys_and_static_apply() -> None:
    x = jnp.zeros((5, 2, 3))
    model = models.mlp([7], 4)
    for key in (jax.random.key(3), jax.random.PRNGKey(3)):
        params = model.init(key, x)
        assert model.apply(params, x).shape == (5, 4)
    assert [jnp.shape(leaf) for leaf in jax.tree.leaves(params)] == [
        (6, 7),
        (1, 7),
        (7, 4),
        (1, 4),
    ]
    assert not np.allclose(params[0][0], model.init(KEY, x)[0][0])
    call = jax.jit(lambda apply, p, x: apply(p, x), static_argnums=0)
    assert call(model.apply, params, x).shape == (5, 4)
    linear = models.mlp([], 1, b_std=None)
    assert list(known(linear.layer_kernel_fn)(x)) == ["0"]
    assert hash(linear) != hash(model)
    with pytest.raises(AttributeError):
        model.apply = None  # type: ignore[misc,assignment]


def test_float32_stays_float32() -> None:
    with jax.enable_x64(False):
        x = jax.random.normal(KEY, (3, 4), dtype=jnp.float32)
        model = models.mlp([8], 2)
        params = model.init(KEY, x)
        assert model.apply(params, x).dtype == jnp.float32
        terms = known(model.layer_kernel_fn)(x)
        assert all(term.dtype == jnp.float32 for term in terms.values())
        np.testing.assert_allclose(
            sum(terms.values()), known(model.kernel_fn)(x, None, "ntk"), rtol=1e-5
        )


def test_from_stax_has_kernels_but_no_terms() -> None:
    triple = stax.serial(stax.Dense(8), stax.Relu(), stax.Dense(2))
    model, of_layers = models.from_stax(*triple), models.mlp([8], 2, W_std=1.0, b_std=None)
    x = jax.random.normal(KEY, (4, 3))
    assert model.layer_kernel_fn is None
    np.testing.assert_allclose(
        known(model.kernel_fn)(x, None, "ntk"),
        known(of_layers.kernel_fn)(x, None, "ntk"),
        rtol=1e-12,
    )
    np.testing.assert_allclose(
        model.apply(model.init(KEY, x), x), of_layers.apply(of_layers.init(KEY, x), x), rtol=1e-12
    )
    assert models.from_stax(*triple[:2]).kernel_fn is None


def test_from_function_makes_outputs_two_dimensional() -> None:
    model = models.from_function(lambda key, x: jnp.ones(x.shape[1]), lambda w, x: x @ w)
    x = jnp.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(model.apply(jnp.ones(2), x), [[1.0], [5.0], [9.0]])
    assert model.kernel_fn is None
    assert model.layer_kernel_fn is None


class Linen(nn.Module):
    norm: bool = False
    rate: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Dense(6)(x)
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(self.rate, deterministic=not train)(nn.tanh(x))
        return nn.Dense(2)(x)


def test_linen() -> None:
    x = jax.random.normal(KEY, (5, 3))
    module = Linen()
    model = models.from_flax(module)
    params = model.init(KEY, x)
    assert set(params) == {"Dense_0", "Dense_1"}
    expected: Any = module.apply({"params": params}, x)
    np.testing.assert_allclose(model.apply(params, x), expected)
    per_sample = jax.vmap(lambda one: model.apply(params, one[None])[0])(x)
    np.testing.assert_allclose(model.apply(params, x), per_sample, rtol=1e-12)


def test_linen_batch_normalisation_and_dropout() -> None:
    x = jax.random.normal(KEY, (5, 3))
    module = Linen(norm=True)
    with pytest.raises(ValueError, match=r"reads collections \['batch_stats'\]"):
        models.from_flax(module).init(KEY, x)
    variables = module.init(KEY, x)
    state = {"batch_stats": jax.tree.map(lambda a: a + 0.3, variables["batch_stats"])}
    frozen = models.from_flax(module, state=state)
    expected: Any = module.apply({**variables, **state}, x)
    np.testing.assert_allclose(frozen.apply(variables["params"], x), expected)
    training = models.from_flax(module, state=state, train=True)
    with pytest.raises(ValueError, match="couples the samples of a batch"):
        training.init(KEY, x)
    with pytest.raises(ValueError, match=r"draws random numbers.*deterministic=True"):
        models.from_flax(Linen(rate=0.5), train=True).init(KEY, x)
    with pytest.raises(ValueError, match="module must have parameters"):
        models.from_flax(nn.Dropout(0.5, deterministic=True)).init(KEY, x)


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, norm: bool = False, rate: float = 0.0) -> None:
        self.hidden = nnx.List([nnx.Linear(3, 6, rngs=rngs), nnx.Linear(6, 6, rngs=rngs)])
        self.norm = nnx.BatchNorm(6, rngs=rngs) if norm else None
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.output = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.hidden:
            x = nnx.tanh(layer(x))
        x = x if self.norm is None else self.norm(x)
        return self.output(self.dropout(x))


def test_nnx() -> None:
    x = jax.random.normal(KEY, (5, 3))
    module = Nnx(nnx.Rngs(0))
    own = models.from_flax(module)
    params = own.init(KEY, x)
    np.testing.assert_array_equal(params["output"]["kernel"], module.output.kernel[...])
    np.testing.assert_allclose(jax.jit(own.apply)(params, x), module(x), rtol=1e-12)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, params)
    assert not np.allclose(own.apply(doubled, x), module(x))
    gradient = jax.grad(lambda p: jnp.sum(own.apply(p, x)))(params)
    np.testing.assert_allclose(gradient["output"]["bias"], [5.0, 5.0])

    fresh = models.from_flax(lambda key: Nnx(nnx.Rngs(key)))
    first, second = (fresh.init(jax.random.key(seed), x) for seed in (1, 2))
    assert str(jax.tree.structure(first)) == str(jax.tree.structure(params))
    assert not np.allclose(first["output"]["kernel"], second["output"]["kernel"])
    expected = Nnx(nnx.Rngs(jax.random.key(1)))(x)
    np.testing.assert_allclose(fresh.apply(first, x), expected, rtol=1e-12)
    stacked = jax.vmap(lambda key: fresh.init(key, x))(jax.random.split(KEY, 3))
    assert stacked["output"]["kernel"].shape == (3, 6, 2)


@pytest.mark.parametrize("options", [{"norm": True}, {"rate": 0.5}])
def test_nnx_batch_normalisation_and_dropout(options: dict[str, Any]) -> None:
    x = jax.random.normal(KEY, (5, 3), dtype=jnp.float32)
    module = Nnx(nnx.Rngs(0), **options)
    training = models.from_flax(module)
    with pytest.raises(
        ValueError, match=r"changes its state.*couples the samples.*module.eval\(\)"
    ):
        training.init(KEY, x)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat)))
    module.eval()
    frozen = models.from_flax(module)
    params = frozen.init(KEY, x)
    np.testing.assert_allclose(frozen.apply(params, x), module(x), rtol=1e-6)
    after = nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_equinox() -> None:
    x = jax.random.normal(KEY, (5, 3))
    module = eqx.nn.MLP(3, 2, width_size=6, depth=1, key=KEY)
    own = models.from_equinox(module)
    params = own.init(jax.random.key(7), x)
    np.testing.assert_allclose(own.apply(params, x), jax.vmap(module)(x), rtol=1e-12)
    assert all(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in jax.tree.leaves(params))

    fresh = models.from_equinox(lambda key: eqx.nn.MLP(3, "scalar", 6, 1, key=key))
    first, second = (fresh.init(jax.random.key(seed), x) for seed in (1, 2))
    assert not np.allclose(first.layers[0].weight, second.layers[0].weight)
    outputs = jax.jit(fresh.apply)(first, x)
    expected = jax.vmap(eqx.nn.MLP(3, "scalar", 6, 1, key=jax.random.key(1)))(x)
    np.testing.assert_allclose(outputs, expected[:, None], rtol=1e-12)


class WithState(eqx.Module):
    norm: eqx.nn.BatchNorm

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


def test_equinox_state_and_dropout() -> None:
    dropout = eqx.nn.Sequential([eqx.nn.Linear(3, 2, key=KEY), eqx.nn.Dropout(0.5)])
    with pytest.raises(ValueError, match=r"deterministic.*inference_mode"):
        models.from_equinox(dropout)
    quiet = models.from_equinox(eqx.nn.inference_mode(dropout))
    assert quiet.apply(quiet.init(KEY, jnp.ones((4, 3))), jnp.ones((4, 3))).shape == (4, 2)
    norm = eqx.nn.BatchNorm(3, axis_name="batch", mode="batch")
    with pytest.raises(ValueError, match="couples the samples of a batch"):
        models.from_equinox(WithState(norm))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: models.mlp([4], 1, activation="rleu"), ValueError, "'rleu'; did you mean 'relu'"),
        (lambda: models.mlp([4, 0], 1), ValueError, r"widths\[1\] must be at least 1, got 0"),
        (lambda: models.mlp([4], 0), ValueError, "n_outputs must be at least 1, got 0"),
        (lambda: models.mlp([4], 1, W_std=0.0), ValueError, "W_std must be positive"),
        (lambda: models.mlp([4], 1, b_std=-1.0), ValueError, "b_std must be at least 0"),
        (
            lambda: models.mlp([4], 1, output_W_std=-1.0),
            ValueError,
            "output_W_std must be positive",
        ),
        (lambda: models.cnn([], 1), ValueError, r"channels must name .*got \[\]"),
        (lambda: models.cnn([4, -1], 1), ValueError, r"channels\[1\] must be at least 1, got -1"),
        (lambda: models.cnn([4], 1, kernel_size=0), ValueError, "kernel_size must be at least 1"),
        (lambda: models.cnn([4], 1, strides=(1, 0)), ValueError, "strides must be at least 1"),
        (
            lambda: models.mlp([4, 5], 1, residual=True),
            ValueError,
            r"widths must be equal with residual=True.*got \[4, 5\]",
        ),
        (
            lambda: models.cnn([4, 4], 1, residual=True, padding="VALID"),
            ValueError,
            "images of one size.*padding='VALID'",
        ),
        (lambda: models.serial(), ValueError, "layers must not be empty"),
        (
            lambda: models.from_flax(lambda key: Nnx(nnx.Rngs(key)), state={}),
            ValueError,
            "state is for linen modules",
        ),
    ],
)
def test_wrong_constructions(
    call: Callable[[], models.Model], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


def test_wrong_inputs_and_outputs() -> None:
    with pytest.raises(ValueError, match=r"x must be images .* got shape \(4, 64\)"):
        models.cnn([4], 1).init(KEY, jnp.ones((4, 64)))
    shrinking: tuple[dict[str, Any], ...] = ({"padding": "VALID"}, {"pooling": "average"})
    for options in shrinking:
        deep = models.cnn([4, 4, 4], 1, **options)
        assert deep.init(KEY, jnp.ones((2, 8, 8, 1)))[-1][0].shape[0] > 0
        with pytest.raises(ValueError, match=r"got shape \(2, 6, 8, 1\).*leave no position"):
            deep.init(KEY, jnp.ones((2, 6, 8, 1)))
    wrong: tuple[Callable[..., Any], ...] = (
        lambda w, x: x[..., None],
        lambda w, x: x[:1],
        lambda w, x: (x, x),
    )
    for outputs in wrong:
        model = models.from_function(lambda key, x: jnp.ones(1), outputs)
        with pytest.raises(
            ValueError, match=r"outputs of a model must be of shape \(n, K\).*n = 4"
        ):
            model.init(KEY, jnp.ones((4, 3)))
    nested = models.serial(stax.serial(stax.Dense(3), stax.Relu(), stax.Dense(1)))
    with pytest.raises(ValueError, match=r"layers\[0\] holds all parameters in nested layers"):
        known(nested.layer_kernel_fn)(jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="layers must hold parameters"):
        known(models.serial(stax.Relu()).layer_kernel_fn)(jnp.ones((2, 3)))


def test_importing_models_is_light() -> None:
    program = (
        "import sys, ntkdp.models as m; print([n for n in ('flax', 'neural_tangents', 'optax') "
        "if n in sys.modules]); m.mlp([2], 1); print('neural_tangents' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:2] == ["[]", "True"]
