"""Kernels of PyTorch modules are those of JAX for the same functions; errors name the way out."""

import sys
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ntkdp

torch = pytest.importorskip("torch")
nn = torch.nn


class Tokens(nn.Module):
    """A mean of embeddings, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 5), nn.Linear(5, 3)

    def forward(self, x: Any) -> Any:
        return self.head(torch.tanh(self.table(x).mean(1)))


class Attention(nn.Module):
    """One head of attention over four parts of the input, with its mean as output."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(3, 3, bias=False) for _ in range(3))

    def forward(self, x: Any) -> Any:
        parts = x.reshape(len(x), 4, 3)
        scores = torch.softmax(self.q(parts) @ self.k(parts).transpose(1, 2) / 3**0.5, -1)
        return (scores @ self.v(parts)).mean(1)


class Tied(nn.Module):
    """A layer that is used twice, around which the input is carried."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(12), nn.Linear(12, 12)

    def forward(self, x: Any) -> Any:
        for _ in range(2):
            x = x + nn.functional.gelu(self.layer(self.norm(x)))
        return x[:, :2]


def affine(p: Any, name: str, x: Any) -> Any:
    return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0.0)


def mlp(p: Any, x: Any) -> Any:
    return affine(p, "2", jnp.tanh(affine(p, "0", x)))


def convolution(p: Any, x: Any) -> Any:
    padding = [(1, 1), (1, 1)]
    x = jax.lax.conv_general_dilated(x, p["0.weight"], (1, 1), padding)
    x = x + p["0.bias"][:, None, None]
    grouped = x.reshape(len(x), 2, -1)
    centred = grouped - grouped.mean(2, keepdims=True)
    normal = centred / jnp.sqrt(jnp.mean(centred**2, 2, keepdims=True) + 1e-5)
    x = normal.reshape(x.shape) * p["1.weight"][:, None, None] + p["1.bias"][:, None, None]
    return affine(p, "4", jax.nn.relu(x).reshape(len(x), -1))


def tokens(p: Any, x: Any) -> Any:
    return affine(p, "head", jnp.tanh(p["table.weight"][x].mean(1)))


def attention(p: Any, x: Any) -> Any:
    parts = x.reshape(len(x), 4, 3)
    q, k, v = (affine(p, name, parts) for name in "qkv")
    return (jax.nn.softmax(q @ jnp.swapaxes(k, 1, 2) / 3**0.5, -1) @ v).mean(1)


def tied(p: Any, x: Any) -> Any:
    for _ in range(2):
        centred = x - x.mean(1, keepdims=True)
        normal = centred / jnp.sqrt(jnp.mean(centred**2, 1, keepdims=True) + 1e-5)
        normal = normal * p["norm.weight"] + p["norm.bias"]
        x = x + jax.nn.gelu(affine(p, "layer", normal), approximate=False)
    return x[:, :2]


CASES: dict[str, tuple[Callable[[], Any], Callable[[Any, Any], Any], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)), mlp, (12,)),
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(),
            nn.Linear(64, 3),
        ),
        convolution,
        (2, 4, 4),
    ),
    "tokens": (Tokens, tokens, (6,)),
    "attention": (Attention, attention, (12,)),
    "tied": (Tied, tied, (12,)),
}  # fmt: skip


def case(name: str, dtype: Any = torch.float64) -> tuple[Any, Any, Any, np.ndarray]:
    """The module, the same function in JAX, its parameters and inputs."""
    make, function, shape = CASES[name]
    torch.manual_seed(0)
    module = make().to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # no scale is one, no shift zero
    params = {key: jnp.asarray(value.detach()) for key, value in module.named_parameters()}
    rng = np.random.default_rng(0)
    x = rng.integers(0, 7, (5, *shape)) if name == "tokens" else rng.normal(size=(5, *shape))
    return module, function, params, x


@pytest.mark.parametrize("name", CASES)
def test_kernels_are_those_of_the_same_function_in_jax(name: str) -> None:
    module, function, params, x = case(name)
    expected = ntkdp.empirical_ntk(function, params, jnp.asarray(x))
    scale = float(jnp.max(jnp.abs(expected)))
    for size in (None, 2):
        found = ntkdp.torch.empirical_ntk(module, x, batch_size=size)
        np.testing.assert_allclose(found, expected, atol=1e-12 * scale)
    rectangle = ntkdp.torch.empirical_ntk(module, torch.as_tensor(x[:2]), x[1:], batch_size=2)
    np.testing.assert_allclose(rectangle, expected[:2, 1:], atol=1e-12 * scale)
    np.testing.assert_allclose(
        ntkdp.torch.outputs(module, x, batch_size=2), function(params, jnp.asarray(x)), rtol=1e-12
    )


@pytest.mark.parametrize("name", CASES)
def test_kernels_in_single_precision(name: str) -> None:
    module, function, params, x = case(name, torch.float32)
    found = ntkdp.torch.empirical_ntk(module, x)
    assert found.dtype == jnp.float32
    inputs = jnp.asarray(x) if name == "tokens" else jnp.asarray(x, jnp.float32)
    expected = ntkdp.empirical_ntk(function, params, inputs)
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.max(jnp.abs(expected))))


@pytest.mark.parametrize("name", CASES)
def test_layers_add_up_and_norms_are_those_of_backward_passes(name: str) -> None:
    module, _, _, x = case(name)
    layers = ntkdp.torch.layerwise_ntk(module, x)
    whole = ntkdp.torch.empirical_ntk(module, x)
    np.testing.assert_allclose(layers.total, whole, rtol=1e-12, atol=1e-13)
    owners = [key.rpartition(".")[0] for key, _ in module.named_parameters()]
    assert layers.names == tuple(dict.fromkeys(owners))

    a = np.random.default_rng(1).normal(size=(5, whole.shape[-1]))
    expected = []
    for x_i, a_i in zip(x, a, strict=True):
        module.zero_grad()
        (module(torch.as_tensor(x_i[None]))[0] * torch.as_tensor(a_i)).sum().backward()
        expected.append([float((one.grad**2).sum()) for one in module.parameters()])
    squares = np.array(expected).T
    norms = ntkdp.torch.per_sample_gradient_norms
    tensors = norms(module, x, a, groups=lambda key: key, batch_size=2)
    np.testing.assert_allclose(tensors, np.sqrt(squares), rtol=1e-10)
    np.testing.assert_allclose(norms(module, x, a), np.sqrt(squares.sum(0)), rtol=1e-10)


def test_parameters_that_are_not_trained_do_not_count() -> None:
    module, function, params, x = case("mlp")
    module[0].requires_grad_(False)
    head = {key: value for key, value in params.items() if key.startswith("2")}
    fixed = {key: value for key, value in params.items() if key not in head}
    expected = ntkdp.empirical_ntk(lambda p, x: function(p | fixed, x), head, jnp.asarray(x))
    np.testing.assert_allclose(ntkdp.torch.empirical_ntk(module, x), expected, rtol=1e-12)


def test_the_kernel_predicts_training_of_a_linear_module() -> None:
    """PyTorch's own clipped steps, one after another, against the recursion of the kernel."""
    torch.manual_seed(1)
    module = nn.Linear(4, 2, dtype=torch.float64)
    rng = np.random.default_rng(2)
    x, labels = rng.normal(size=(12, 4)), rng.integers(0, 2, 12)
    kernel, start = ntkdp.torch.empirical_ntk(module, x), ntkdp.torch.outputs(module, x)
    loss, rule = ntkdp.losses.SoftmaxCrossEntropy(), ntkdp.clipping.Abadi(0.3)
    flow = ntkdp.KernelFlow(kernel, labels, loss, rule)
    path = ntkdp.recursion(flow, start, learning_rate=0.5, steps=20, outputs=True)

    inputs, targets = torch.as_tensor(x), torch.as_tensor(labels)
    for _ in range(20):
        sums = [torch.zeros_like(one) for one in module.parameters()]
        for x_i, y_i in zip(inputs, targets, strict=True):
            module.zero_grad()
            nn.functional.cross_entropy(module(x_i[None]), y_i[None]).backward()
            gradients = [one.grad for one in module.parameters()]
            norm = torch.sqrt(sum((one**2).sum() for one in gradients))
            for total, one in zip(sums, gradients, strict=True):
                total += one * min(1.0, 0.3 / float(norm))
        with torch.no_grad():
            for one, total in zip(module.parameters(), sums, strict=True):
                one -= 0.5 * total / 12
    assert path.outputs is not None
    np.testing.assert_allclose(path.outputs[-1], module(inputs).detach().numpy(), rtol=1e-10)


def test_errors_name_the_way_out() -> None:
    x = np.ones((2, 3))
    kernel = ntkdp.torch.empirical_ntk
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got function"):
        kernel(cast(Any, mlp), x)
    with pytest.raises(ValueError, match="'1' normalises over the batch; use GroupNorm"):
        kernel(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), x)
    with pytest.raises(ValueError, match=r"'1' drops outputs; call module\.eval\(\)"):
        kernel(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)), x)
    assert kernel(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)).eval(), x).shape == (2, 2, 2, 2)
    with pytest.raises(ValueError, match="require gradients, got none"):
        kernel(nn.Linear(3, 2).requires_grad_(False), x)
    with pytest.raises(ValueError, match=r"shape \(1, K\) or \(1,\), got \(1, 3, 1\)"):
        kernel(nn.Sequential(nn.Unflatten(1, (3, 1)), nn.Linear(1, 1)), x)
    with pytest.raises(ValueError, match="x1 must hold at least one sample"):
        kernel(nn.Linear(3, 2), x[:0])
    broken = nn.Linear(3, 2)
    with torch.no_grad():
        broken.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="finite outputs"):
        kernel(broken, x)
    with pytest.raises(ValueError, match=r"shape of the outputs, \(2, 2\), got \(2, 1\)"):
        ntkdp.torch.per_sample_gradient_norms(nn.Linear(3, 2), x, x[:, :1])
    with pytest.raises(ValueError, match="batch_size"):
        kernel(nn.Linear(3, 2), x, batch_size=0)
    with pytest.raises(MemoryError, match="take fewer samples or groups"):
        kernel(nn.Linear(1, 100), np.ones((20_000, 1)))


def test_without_pytorch_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Linear(3, 2)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"pip install 'ntkdp\[torch\]'"):
        ntkdp.torch.outputs(module, np.ones((2, 3)))
