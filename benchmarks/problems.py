"""The problems of the benchmarks: shapes and data, in NumPy, the same for every contender."""

import numpy as np

MLP_WIDTHS = {"kernel of an MLP, width 512": 512, "kernel of an MLP, width 2048": 2048}
KERNEL_CNN = "kernel of a CNN"
TRANSFORMER = "kernel of a transformer block"
STEP_MLP = "DP-SGD step of an MLP"
STEP_CNN = "DP-SGD step of a CNN"
OUTPUTS = 10

BATCH = 256
LEARNING_RATE = 0.1
CLIP_NORM = 1.0
NOISE_MULTIPLIER = 1.0

HEADS, WIDTH, TOKENS, VOCABULARY = 8, 128, 32, 64


def normal(seed: int, *shape: int) -> np.ndarray:
    """Standard normal numbers, float32."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def weight(seed: int, *shape: int, fan_in: int | None = None) -> np.ndarray:
    """A weight of variance 1 / fan_in."""
    return normal(seed, *shape) / np.float32(np.sqrt(fan_in or shape[0]))


def mlp(width: int) -> list[dict[str, np.ndarray]]:
    """Weights and biases of 784-width-width-10."""
    sizes = [784, width, width, OUTPUTS]
    return [
        {"b": 0.1 * normal(10 + i, sizes[i + 1]), "w": weight(i, sizes[i], sizes[i + 1])}
        for i in range(3)
    ]


def kernel_cnn() -> dict[str, np.ndarray]:
    """Filters and head of: 32 3x3, 32 3x3 with stride 2, dense; images NHWC, no padding."""
    return {
        "conv1": weight(0, 3, 3, 1, 32, fan_in=9),
        "conv2": weight(1, 3, 3, 32, 32, fan_in=288),
        "dense": weight(2, 12 * 12 * 32, OUTPUTS),
    }


def transformer() -> dict[str, np.ndarray]:
    """A pre-norm block: embedding, attention, feed-forward network of four times the width."""
    shapes = {
        "token": (VOCABULARY, WIDTH),
        "position": (TOKENS, WIDTH),
        "query": (WIDTH, HEADS, WIDTH // HEADS),
        "key": (WIDTH, HEADS, WIDTH // HEADS),
        "value": (WIDTH, HEADS, WIDTH // HEADS),
        "out": (HEADS, WIDTH // HEADS, WIDTH),
        "up": (WIDTH, 4 * WIDTH),
        "down": (4 * WIDTH, WIDTH),
        "head": (WIDTH, OUTPUTS),
    }
    fans = {"token": 1, "position": 1, "out": WIDTH}
    params = {
        name: weight(i, *shape, fan_in=fans.get(name))
        for i, (name, shape) in enumerate(shapes.items())
    }
    for i, name in enumerate(("norm1", "norm2", "norm3")):
        params[f"{name}_scale"] = 1 + 0.1 * normal(20 + i, WIDTH)
        params[f"{name}_shift"] = 0.1 * normal(30 + i, WIDTH)
    return params


def tokens(n: int) -> np.ndarray:
    """Sequences of tokens, ``(n, TOKENS)``."""
    return np.random.default_rng(5).integers(0, VOCABULARY, (n, TOKENS), dtype=np.int32)


def step_cnn() -> list[dict[str, np.ndarray]]:
    """The network of opacus' MNIST example, images NHWC: two convolutions, two dense layers."""
    shapes = [(8, 8, 1, 16), (4, 4, 16, 32), (512, 32), (32, OUTPUTS)]
    return [
        {
            "b": 0.1 * normal(10 + i, shape[-1]),
            "w": weight(i, *shape, fan_in=int(np.prod(shape[:-1]))),
        }
        for i, shape in enumerate(shapes)
    ]


def labels(n: int) -> np.ndarray:
    """Random classes ``(n,)``."""
    return np.random.default_rng(6).integers(0, OUTPUTS, n, dtype=np.int32)


def images(n: int, *, flat: bool) -> np.ndarray:
    """Random images of 28 x 28: ``(n, 784)`` or ``(n, 28, 28, 1)``."""
    return normal(7, n, 784) if flat else normal(7, n, 28, 28, 1)
