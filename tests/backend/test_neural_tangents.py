"""neural-tangents on the installed JAX: JAX untouched, TensorFlow absent, numbers as released."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from helpers import DATA, often_or_slow

from ntkdp._backend import neural_tangents as _neural_tangents


def run(program: str) -> str:
    """What a fresh interpreter prints, with every warning an error."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


NAMES = """
import importlib, json, sys
for module in modules:
    importlib.import_module(module)
loaded = {n: m for n, m in sys.modules.items() if n.split(".")[0] in ("jax", "scipy")}
print(json.dumps({n: sorted(vars(m)) for n, m in loaded.items()}))
"""


@pytest.mark.slow
def test_jax_and_scipy_hold_the_names_they_hold_without_us() -> None:
    work = """
import ntkdp._backend.neural_tangents, neural_tangents, jax.numpy as jnp
from neural_tangents import stax
stax.serial(stax.Dense(4), stax.Relu(), stax.Dense(1))[2](jnp.eye(3), None, "ntk")
modules = []
"""
    changed = json.loads(run(work + NAMES))
    submodules = [n for n in changed if not any(part.startswith("_") for part in n.split("."))]
    plain = json.loads(run(f"modules = {submodules!r}" + NAMES))
    assert {"jax", "jax.core", "jax.tree_util", "jax.interpreters.ad", "scipy.linalg"} <= set(plain)
    assert ("jax.util" in changed) == ("jax.util" in plain)
    for module in submodules:
        # A lazily imported private submodule is an attribute only once something has used it.
        extra = set(changed[module]) ^ set(plain[module])
        assert not {n for n in extra if f"{module}.{n}" not in changed}, module


def test_jax_holds_the_same_objects_as_before() -> None:
    out = run("""
import sys, jax, jax.core, jax.extend.core, jax.interpreters.ad, jax.tree_util, scipy.linalg
seen = [jax, jax.core, jax.interpreters, jax.interpreters.ad, jax.tree_util, scipy.linalg]
before = [{k: id(v) for k, v in vars(m).items()} for m in seen]
import ntkdp._backend.neural_tangents, neural_tangents
for m, old in zip(seen, before):
    for name, identity in old.items():
        assert id(vars(m)[name]) == identity, (m, name)
import jax as again
assert again is sys.modules["jax"] and type(again.core) is type(sys)
print(hasattr(jax, "tree_map"), hasattr(jax.core, "Jaxpr"))
""")
    assert (
        out.split()
        == run("""
import jax, jax.extend.core
print(hasattr(jax, "tree_map"), hasattr(jax.core, "Jaxpr"))
""").split()
    )


def test_importing_it_is_lazy_and_never_needs_tensorflow() -> None:
    out = run("""
import sys
sys.modules["tensorflow"] = None  # importing it would raise
from ntkdp._backend import neural_tangents
print("jax" in sys.modules, "neural_tangents" in sys.modules)
neural_tangents.stax
print("neural_tangents" in sys.modules, "jax.experimental.jax2tf" in sys.modules)
""")
    assert out.split() == ["False", "False", "True", "False"]


def test_users_import_neural_tangents_as_usual() -> None:
    import neural_tangents
    from neural_tangents import stax

    assert _neural_tangents.stax is stax
    assert _neural_tangents.predict is neural_tangents.predict
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = _neural_tangents.no_such_name
    with pytest.raises(AttributeError, match="_private"):
        _ = _neural_tangents._private


def test_the_experimental_package_explains_itself() -> None:
    import neural_tangents

    with pytest.raises(ImportError, match=r"empirical_ntk_fn_tf is not available.*TensorFlow"):
        _ = neural_tangents.experimental.empirical_ntk_fn_tf
    with pytest.raises(ImportError, match="TensorFlow"):
        from neural_tangents.experimental import get_apply_fn_and_params  # noqa: F401
    assert not hasattr(neural_tangents.experimental, "__wrapped__")


def reference(name: str) -> tuple[Any, Callable[..., Any], dict[str, jax.Array]]:
    """A stored network and its kernels, computed by neural-tangents on a JAX it supports."""
    stax = _neural_tangents.stax
    wide, head = {"W_std": 1.4, "b_std": 0.1}, {"W_std": 1.0, "b_std": 0.1}
    networks = {
        "mlp_relu": [
            stax.Dense(32, 1.5, 0.1),
            stax.Relu(),
            stax.Dense(24, 1.5, 0.1),
            stax.Relu(),
            stax.Dense(3, **head),
        ],
        "cnn_pool": [
            stax.Conv(6, (3, 3), padding="SAME", **wide),
            stax.Relu(),
            stax.AvgPool((2, 2), strides=(2, 2)),
            stax.Conv(8, (3, 3), padding="VALID", **wide),
            stax.Relu(),
            stax.Flatten(),
            stax.Dense(4, **head),
        ],
        "layernorm_mlp": [
            stax.Dense(20, 1.2, 0.1),
            stax.LayerNorm(),
            stax.Relu(),
            stax.Dense(20, 1.2, 0.1),
            stax.LayerNorm(),
            stax.Relu(),
            stax.Dense(3, **head),
        ],
    }
    with np.load(DATA / f"{name}.npz") as stored:
        arrays = {key: jnp.asarray(stored[key]) for key in stored}
    init_fn, apply_fn, _ = stax.serial(*networks[name])
    _, example = init_fn(jax.random.key(0), arrays["x1"].shape)
    treedef: Any = jax.tree.structure(example)
    params = jax.tree.unflatten(treedef, [arrays[f"param{i}"] for i in range(treedef.num_leaves)])
    return params, apply_fn, arrays


@pytest.mark.parametrize(
    "name", often_or_slow(["mlp_relu", "cnn_pool", "layernorm_mlp"], ["mlp_relu"])
)
def test_empirical_kernels_equal_those_of_a_supported_jax(name: str) -> None:
    import neural_tangents

    params, apply_fn, stored = reference(name)
    x1, x2 = stored["x1"], stored["x2"]
    np.testing.assert_allclose(apply_fn(params, x1), stored["f1"], rtol=1e-12, atol=1e-14)
    for implementation in (1, 2):
        empirical = jax.jit(
            neural_tangents.empirical_ntk_fn(apply_fn, trace_axes=(), implementation=implementation)
        )
        scale = float(jnp.max(jnp.abs(stored["H11"])))
        for key, arguments in (("H11", (x1, None)), ("H21", (x2, x1))):
            np.testing.assert_allclose(
                empirical(*arguments, params), stored[key], rtol=1e-10, atol=1e-13 * scale
            )


def relu_ntk(x: np.ndarray, depth: int) -> np.ndarray:
    """Arc-cosine recursion (Cho & Saul 2009; Jacot et al. 2018), W_std^2 = 2, no bias."""
    nngp = ntk = x @ x.T / x.shape[1] * 2
    for layer in range(depth):
        norms = np.sqrt(np.outer(np.diag(nngp), np.diag(nngp)))
        angle = np.arccos(np.clip(nngp / norms, -1, 1))
        scale = 2 if layer < depth - 1 else 1
        derivative = scale * (np.pi - angle) / (2 * np.pi)
        nngp = scale * norms * (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / (2 * np.pi)
        ntk = nngp + ntk * derivative
    return ntk


def test_relu_kernel_is_the_closed_form() -> None:
    stax = _neural_tangents.stax
    x = np.random.default_rng(0).normal(size=(6, 5))
    layers = []
    for _ in range(3):
        layers += [stax.Dense(1, W_std=2**0.5), stax.Relu()]
    _, _, kernel_fn = stax.serial(*layers, stax.Dense(1))
    np.testing.assert_allclose(kernel_fn(jnp.asarray(x), None, "ntk"), relu_ntk(x, 3), rtol=1e-7)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Linear scaling attention:UserWarning")
@pytest.mark.filterwarnings("ignore:`FanIn` layers assume independent inputs:UserWarning")
@pytest.mark.filterwarnings("ignore:Got potentially mismatching `channel_axis`:UserWarning")
def test_many_layers_agree_with_a_wide_network() -> None:
    """Residual blocks, attention, pooling: the analytic NNGP is the covariance of outputs."""
    stax = _neural_tangents.stax
    options = {"W_std": 1.3, "b_std": 0.2}
    block = stax.serial(
        stax.FanOut(2),
        stax.parallel(
            stax.Dense(32, **options),
            stax.serial(stax.Erf(), stax.Conv(32, (3, 3), padding="SAME", **options)),
        ),
        stax.FanInSum(),
    )
    attention = stax.GlobalSelfAttention(
        32, n_chan_key=16, n_chan_val=16, n_heads=4, linear_scaling=True, W_key_std=1.0
    )
    init_fn, apply_fn, kernel_fn = stax.serial(
        stax.Conv(32, (3, 3), padding="SAME", **options),
        block,
        stax.LayerNorm(),
        stax.Gelu(),
        attention,
        stax.AvgPool((2, 2)),
        stax.GlobalAvgPool(),
        stax.Dense(200, **options),
    )
    x = jax.random.normal(jax.random.key(1), (2, 3, 4, 2))

    @jax.jit
    def covariance(key: jax.Array) -> jax.Array:
        outputs = apply_fn(init_fn(key, x.shape)[1], x)
        return outputs @ outputs.T / outputs.shape[1]

    draws = jax.lax.map(covariance, jax.random.split(jax.random.key(2), 50))
    mean, error = draws.mean(0), draws.std(0) / len(draws) ** 0.5
    analytic = kernel_fn(x, None, "nngp")
    # Five standard errors, and the finite width: corrections are of the order of 1/width.
    assert np.all(np.abs(mean - analytic) < 5 * error + 2.5 / 32 * np.abs(analytic))


def test_gradient_descent_predictions_equal_the_eigendecomposition() -> None:
    predict = _neural_tangents.predict
    rng = np.random.default_rng(0)
    factor, initial, targets = rng.normal(size=(6, 9)), rng.normal(size=(6, 1)), np.ones((6, 1))
    kernel, times = factor @ factor.T, np.array([0.0, 0.3, 2.0])
    exact = np.stack(
        [targets + scipy.linalg.expm(-t * kernel / 6) @ (initial - targets) for t in times]
    )
    mse = predict.gradient_descent_mse(jnp.asarray(kernel), jnp.asarray(targets))
    np.testing.assert_allclose(mse(jnp.asarray(times), jnp.asarray(initial)), exact, rtol=1e-9)

    def loss(f: jax.Array, y: jax.Array) -> jax.Array:
        return 0.5 * jnp.mean((f - y) ** 2)

    general = predict.gradient_descent(loss, jnp.asarray(kernel), jnp.asarray(targets))
    state = general(jnp.asarray(times), jnp.asarray(initial))
    np.testing.assert_allclose(state, exact, rtol=1e-5, atol=1e-6)


def test_predictions_inside_a_transformation() -> None:
    """The kernel itself traced: caches inside `predict` must not evaluate it too early."""
    predict = _neural_tangents.predict
    kernel = jnp.diag(jnp.array([1.0, 2.0]))

    @jax.jit
    def at_time_one(kernel: jax.Array) -> jax.Array:
        predictor = predict.gradient_descent_mse(kernel, jnp.ones((2, 1)))
        return predictor(1.0, jnp.zeros((2, 1)), None)

    expected = 1 - np.exp(-np.array([[1.0], [2.0]]) / 2)
    np.testing.assert_allclose(at_time_one(kernel), expected, rtol=1e-12)
    stacked = jax.vmap(at_time_one)(jnp.stack([kernel, 2 * kernel]))
    np.testing.assert_allclose(stacked[1], 1 - np.exp(-np.array([[1.0], [2.0]])), rtol=1e-12)


def test_the_ensemble_after_infinite_time_is_kernel_regression() -> None:
    stax, predict = _neural_tangents.stax, _neural_tangents.predict
    _, _, kernel_fn = stax.serial(stax.Dense(1, 1.2, 0.1), stax.Erf(), stax.Dense(1, 1.2, 0.1))
    rng = np.random.default_rng(1)
    train, test = jnp.asarray(rng.normal(size=(5, 3))), jnp.asarray(rng.normal(size=(4, 3)))
    targets = jnp.asarray(rng.normal(size=(5, 1)))
    ensemble = predict.gradient_descent_mse_ensemble(kernel_fn, train, targets)
    mean, covariance = ensemble(x_test=test, get="ntk", compute_cov=True)
    kernel, cross = kernel_fn(train, None, "ntk"), kernel_fn(test, train, "ntk")
    np.testing.assert_allclose(mean, cross @ np.linalg.solve(kernel, targets), rtol=1e-8)
    assert np.linalg.eigvalsh(covariance).min() > -1e-10


def test_the_largest_learning_rate_is_two_over_the_largest_eigenvalue() -> None:
    kernel = jnp.diag(jnp.array([1.0, 5.0, 2.0]))
    rate = _neural_tangents.predict.max_learning_rate(kernel, y_train_size=3)
    np.testing.assert_allclose(rate, 2 * 3 / 5.0, rtol=1e-6)
