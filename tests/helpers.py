"""What the tests of several rooms share: small models, data, losses and stored networks."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from ntkdp import losses, models
from ntkdp._backend.neural_tangents import stax
from ntkdp.advisor import CellMetrics

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
DATA = Path(__file__).parent / "data"

KEY = jax.random.key(0)
SQUARED, SOFTMAX = losses.SquaredError(), losses.SoftmaxCrossEntropy()

Value = TypeVar("Value")
Gradients = Literal["structured", "vmap"]
Apply = Callable[[Any, jax.Array], jax.Array]

#: The metrics that a cell of a sweep may have.
METRICS = (
    "loss", "accuracy", "ece", "mce", "test_loss", "test_accuracy", "test_ece", "test_mce",
)  # fmt: skip


def linear(w: Any, x: Any) -> Any:
    """The linear model, whose kernel is that of its inputs."""
    return x @ w


def known(value: Value | None) -> Value:
    """What a test knows to be there."""
    assert value is not None
    return value


def often_or_slow(cases: Iterable[Any], often: Iterable[Any]) -> list[Any]:
    """Cases of a test, tuples for several arguments: those not often are for ``make test-slow``."""
    usual = list(often)
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=[] if case in usual else pytest.mark.slow,
        )
        for case in cases
    ]


def examples(often: int, thorough: int) -> hypothesis.settings:
    """So many examples of a property, and more of them in ``make test-slow``."""
    is_thorough = hypothesis.settings.get_current_profile_name() == "thorough"
    return hypothesis.settings(max_examples=thorough if is_thorough else often)


def normal(seed: int, *shape: int) -> jax.Array:
    """Standard normal numbers, the same ones for a seed and shape."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def cells(diverged: Any = None, **given: Any) -> CellMetrics:
    """Cells of a sweep with the given metrics, None for the others."""
    values: Any = {name: np.asarray(array, float) for name, array in given.items()}
    size = len(next(iter(values.values())))
    lost = np.zeros(size, bool) if diverged is None else np.asarray(diverged)
    return CellMetrics(**{name: values.get(name) for name in METRICS}, diverged=lost)


def balle_and_wang(mu: float, epsilon: float) -> float:
    """Delta of the Gaussian mechanism: theorem 8 of Balle and Wang (2018)."""
    near, far = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
    return float(norm.cdf(near) - np.exp(epsilon) * norm.cdf(far))


def stored_model(name: str) -> models.Model:
    """A network whose kernels are stored in ``data``, by the public constructors."""
    if name == "mlp_relu":
        return models.mlp([32, 24], 3, W_std=1.5)
    if name == "cnn_pool":
        return models.serial(
            stax.Conv(6, (3, 3), padding="SAME", W_std=1.4, b_std=0.1),
            stax.Relu(),
            stax.AvgPool((2, 2), strides=(2, 2)),
            stax.Conv(8, (3, 3), padding="VALID", W_std=1.4, b_std=0.1),
            stax.Relu(),
            stax.Flatten(),
            stax.Dense(4, 1.0, 0.1),
        )
    block = [stax.Dense(20, 1.2, 0.1), stax.LayerNorm(), stax.Relu()]
    return models.serial(*block, *block, stax.Dense(3, 1.0, 0.1))


def stored(name: str) -> tuple[models.Model, Any, dict[str, jax.Array]]:
    """The model, its parameters and everything in the file."""
    with np.load(DATA / f"{name}.npz") as file:
        values = {key: jnp.asarray(file[key]) for key in file}
    model = stored_model(name)
    treedef: Any = jax.tree.structure(model.init(KEY, values["x1"]))
    leaves = [values[f"param{i}"] for i in range(treedef.num_leaves)]
    return model, jax.tree.unflatten(treedef, leaves), values
