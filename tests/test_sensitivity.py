"""How much one sample adds to a clipped sum, measured in higher precision, over a dtype's range.

The networks are chosen so that the positions of a sample cancel. A search moves the sizes of
inputs, cotangents and gaps between positions to where a sample adds most.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import often_or_slow

from ntkdp import dp_sgd, losses
from ntkdp.clipping import PSAC, Abadi, Automatic, ClippingRule, Custom, Global

T, D = 4, 16
#: What a sample may add above the sensitivity, relative to it: rounding, by precision.
TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 1e-2, "float16": 1e-2}
#: Samples that are tried side by side.
TRIED = 64


class Family(NamedTuple):
    """A model of samples ``(T, D)``, or of T rows of a table, and its parameters."""

    apply: Callable[[Any, Any], Any]
    shapes: dict[str, Any]
    tokens: bool = False


def leaky(h: Any) -> Any:
    return jnp.where(h > 0, h, 0.1 * h)


def difference(p: Any, x: Any) -> Any:
    def branch(h: Any) -> Any:
        return leaky(h @ p["a"]["w"]) @ p["b"]["v"]

    return branch(x[:, 0]) - branch(x[:, 1])


def convolution(p: Any, x: Any) -> Any:
    signs = jnp.array([1.0, -1.0, 1.0, -1.0], x.dtype)
    moved = jax.lax.conv_general_dilated(
        x[:, :, None], p["a"]["w"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.einsum("nthc,t->nc", leaky(moved), signs) @ p["b"]["v"]


def attention(p: Any, x: Any) -> Any:
    q, k, v = (x @ p["a"][name] for name in "qkv")
    weights = jax.nn.softmax(q @ jnp.swapaxes(k, 1, 2) / 4.0)
    return jnp.mean(weights @ v - v, axis=1) @ p["b"]["v"]


def tied(p: Any, x: Any) -> Any:
    back = leaky(x[:, 0] @ p["a"]["w"]) @ p["a"]["w"].T
    return (back - x[:, 1] @ p["a"]["w"] @ p["a"]["w"].T) @ p["b"]["v"]


def recurrent(p: Any, x: Any) -> Any:
    def turn(h: Any, x_t: Any) -> Any:
        return leaky(0.5 * h @ p["a"]["w"] + x_t @ p["a"]["u"]), None

    start = jnp.zeros((x.shape[0], D), x.dtype)
    h, _ = jax.lax.scan(turn, start, jnp.swapaxes(x, 0, 1))
    return h @ p["b"]["v"]


def embedding(p: Any, x: Any) -> Any:
    rows = p["a"]["table"][x]
    return (rows[:, 0] - rows[:, 1] + rows[:, 2] - rows[:, 3]) @ p["b"]["v"]


def elementwise(p: Any, x: Any) -> Any:
    return (jnp.sort(x[:, 0] * p["a"]["s"]) + p["a"]["b"]) @ p["b"]["v"]


FAMILIES = {
    "difference": Family(difference, {"a": {"w": (D, D)}}),
    "convolution": Family(convolution, {"a": {"w": (1, 1, D, D)}}),
    "attention": Family(attention, {"a": {"q": (D, D), "k": (D, D), "v": (D, D)}}),
    "tied": Family(tied, {"a": {"w": (D, D)}}),
    "recurrent": Family(recurrent, {"a": {"w": (D, D), "u": (D, D)}}),
    "embedding": Family(embedding, {"a": {"table": (5, D)}}, tokens=True),
    "elementwise": Family(elementwise, {"a": {"s": (D,), "b": (D,)}}),
}


def rules(scope: Any) -> list[ClippingRule]:
    """All rules that bound a sample, with numbers that make their factors large near zero."""
    R: Any = 0.1 if scope == "flat" else np.array([0.08, 0.06])
    return [
        Abadi(R, scope=scope),
        Global(R, scope=scope),
        Global(R, Z=R * 1e-12, scope=scope),
        Automatic(R, gamma=0.0, scope=scope),
        Automatic(R, gamma=0.01, scope=scope),
        Automatic(R, gamma=1e-30, scope=scope),
        PSAC(R, r=0.01, scope=scope),
        Custom(lambda s: 0.06 / (s + 1e-12), R, scope=scope),
    ]


def few_rules(scope: Any) -> list[ClippingRule]:
    """Those whose factors are most unlike: they are compiled in half the time."""
    every = rules(scope)
    return [every[0], every[2], every[3], every[6]]


def parameters(family: Family, n_outputs: int, dtype: Any) -> Any:
    shapes = family.shapes | {"b": {"v": (D, n_outputs)}}
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda node: isinstance(node, tuple))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = [jax.random.normal(k, shape) / 4 for k, shape in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, [leaf.astype(dtype) for leaf in drawn])


def linear_loss(f: Any, y: Any) -> Any:
    """Whose output gradient is the target."""
    return jnp.sum(f * y)


def norm(leaves: list[np.ndarray]) -> np.ndarray:
    """Norms over all but the first axis, in extended precision."""
    flat = np.concatenate([np.reshape(v, (len(v), -1)) for v in leaves], 1).astype(np.longdouble)
    return np.sqrt(np.sum(flat**2, axis=1))


class Problem(NamedTuple):
    """Clipped sums with one sample more than the others, by all rules, for many samples at once."""

    family: Family
    n_outputs: int
    dtype: Any
    rules: list[ClippingRule]
    others: tuple[Any, Any]
    sums: Callable[[Any, Any], Any]
    without: list[Any]


def problem(
    name: str,
    dtype: str,
    scope: Any,
    gradients: Any,
    n_outputs: int,
    microbatch: int | None,
    *,
    tried_rules: Callable[[Any], list[ClippingRule]] = rules,
) -> Problem:
    family, numbers = FAMILIES[name], jnp.dtype(dtype)
    params = parameters(family, n_outputs, numbers)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, T, D))
    others = (
        jnp.asarray(rng.integers(0, 5, (2, T)) if family.tokens else x.astype(numbers)),
        jnp.asarray(rng.standard_normal((2, n_outputs)).astype(numbers)),
    )
    loss, tried = losses.Custom(linear_loss), tried_rules(scope)

    def sums(x: Any, y: Any) -> list[list[Any]]:
        found = []
        for rule in tried:
            algorithm = dp_sgd.build(
                family.apply, x, y, loss, rule, learning_rate=1.0, reduction="sum",
                gradients=gradients, microbatch_size=microbatch,
            )  # fmt: skip
            found.append(jax.tree.leaves(algorithm.clipped_sum(params, None)[0]))
        return found

    def with_one_more(x: Any, y: Any) -> list[list[Any]]:
        return sums(jnp.concatenate([others[0], x[None]]), jnp.concatenate([others[1], y[None]]))

    return Problem(
        family, n_outputs, numbers, tried, others,
        jax.jit(jax.vmap(with_one_more)), jax.jit(sums)(*others),
    )  # fmt: skip


def contributions(case: Problem, x: Any, y: Any) -> np.ndarray:
    """What each sample adds over the sensitivity, by rule: ``(rules, samples)``."""
    found = []
    for rule, with_it, without in zip(case.rules, case.sums(x, y), case.without, strict=True):
        moved = [
            np.asarray(one, np.longdouble) - np.asarray(other, np.longdouble)
            for one, other in zip(with_it, without, strict=True)
        ]
        found.append(norm(moved) / rule.sensitivity(2))
    return np.stack(found)


class Candidates(NamedTuple):
    """Samples by decimal logarithms of their sizes, directions of inputs and of cotangents."""

    scale: np.ndarray
    cotangent: np.ndarray
    gap: np.ndarray
    directions: np.ndarray
    outputs: np.ndarray

    def samples(self, case: Problem) -> tuple[Any, Any]:
        """A direction that all positions share, and a gap between them that is its own size."""
        limits = jnp.finfo(case.dtype)
        with np.errstate(over="ignore"):
            y = np.power(10.0, self.cotangent)[:, None] * self.outputs
            gaps = np.power(10.0, self.gap)[:, None, None] * self.directions[:, 1:]
            x = np.power(10.0, self.scale)[:, None, None] * (self.directions[:, :1] + gaps)
        y = np.clip(y, -float(limits.max), float(limits.max))
        x = np.clip(x, -float(limits.max), float(limits.max))
        if case.family.tokens:
            x = np.argsort(self.directions[:, 1 : T + 1, 0], axis=1)
            x[self.gap < -4] = 0
            return jnp.asarray(x), jnp.asarray(y).astype(case.dtype)
        return jnp.asarray(x).astype(case.dtype), jnp.asarray(y).astype(case.dtype)


def drawn(case: Problem, rng: np.random.Generator) -> Candidates:
    """From the smallest to the largest numbers of the dtype."""
    limits = jnp.finfo(case.dtype)
    low, high = np.log10(float(limits.tiny)), np.log10(float(limits.max))
    digits = -np.log10(float(limits.eps))
    return Candidates(
        rng.uniform(low, high, TRIED),
        rng.uniform(low, high, TRIED),
        rng.uniform(-digits - 1, 1, TRIED),
        rng.standard_normal((TRIED, T + 1, D)),
        rng.standard_normal((TRIED, case.n_outputs)),
    )


def bred(best: Candidates, rng: np.random.Generator, spread: float) -> Candidates:
    """Children of the better half, each a parent with everything moved a little."""
    parents = Candidates(*[np.repeat(field, 2, axis=0) for field in best])
    return Candidates(*[field + spread * rng.standard_normal(field.shape) for field in parents])


def searched(case: Problem, rounds: int) -> tuple[float, int]:
    """The largest contribution that an evolution of samples finds, and how many it tried."""
    rng = np.random.default_rng(2)
    candidates, largest, tried = drawn(case, rng), 0.0, 0
    for generation in range(rounds):
        found = contributions(case, *candidates.samples(case))
        assert np.all(np.isfinite(found))
        largest, tried = max(largest, float(np.max(found))), tried + found.size
        if generation % 8 == 7:
            candidates = drawn(case, rng)
            continue
        # Each rule has its weak places: the best of each count.
        score = np.max(found / np.max(found, axis=1, keepdims=True).clip(1e-300), axis=0)
        order = np.argsort(-np.asarray(score, float))[: TRIED // 2]
        candidates = bred(Candidates(*[f[order] for f in candidates]), rng, 0.5 / 2**generation)
    return largest, tried


#: Some kinds of places where the engine rounds; `make test-slow` tries all there are.
CASES = [
    ("difference", "bfloat16", "layerwise", "structured", 1, 2),
    ("embedding", "float32", "flat", "structured", 1000, None),
]
#: One of each other kind.
SLOW_CASES = [
    ("difference", "float32", "flat", "structured", 1, None),
    ("convolution", "float32", "flat", "structured", 1, None),
    ("attention", "float64", "flat", "structured", 1, None),
    ("difference", "float32", "flat", "vmap", 1, None),
]

ALL_CASES = [
    (family, dtype, scope, gradients, n_outputs, microbatch)
    for family in FAMILIES
    for dtype in TOLERANCES
    for scope in ("flat", "layerwise")
    for gradients in ("structured", "vmap")
    for n_outputs, microbatch in ((1, None), (1000, 2))
]


def check(
    case: tuple[Any, ...], rounds: int, tried_rules: Callable[[Any], list[ClippingRule]] = rules
) -> tuple[float, int]:
    largest, tried = searched(problem(*case, tried_rules=tried_rules), rounds)
    assert largest <= 1 + TOLERANCES[case[1]], case
    return largest, tried


@pytest.mark.parametrize(
    "case",
    [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW_CASES)],
    ids=lambda case: "-".join(map(str, case)),
)
def test_no_sample_adds_more_than_the_sensitivity(case: tuple[Any, ...]) -> None:
    largest, _ = check(case, 4, few_rules)
    # The bound is met: a smaller sensitivity would be broken.
    assert largest > 1 - 10 * TOLERANCES[case[1]]


@pytest.mark.parametrize("dtype", often_or_slow(["float64", "float32", "bfloat16"], ["float32"]))
def test_cotangents_that_leave_the_range_once_they_are_weighted(dtype: str) -> None:
    """Of positions that cancel, some would be lost and others not."""
    case = problem("difference", dtype, "flat", "structured", 64, None, tried_rules=few_rules)
    high = float(np.log10(float(jnp.finfo(dtype).max)))
    rng = np.random.default_rng(3)
    largest = 0.0
    for _ in range(4):
        candidates = drawn(case, rng)._replace(
            scale=rng.uniform(high - 6, high - 1.5, TRIED),
            cotangent=rng.uniform(-high + 1, -high + 9, TRIED),
            gap=rng.uniform(-2, -1, TRIED),
        )
        found = contributions(case, *candidates.samples(case))
        largest = max(largest, float(np.max(found)))
    assert 1 - 10 * TOLERANCES[dtype] < largest <= 1 + TOLERANCES[dtype]


def two_positions(p: Any, x: Any) -> Any:
    hidden = x @ p
    return hidden[:, 0] - 0.25 * hidden[:, 1]


@pytest.mark.parametrize("dtype", often_or_slow(["float64", "float32", "bfloat16"], ["float32"]))
@pytest.mark.parametrize("R", often_or_slow([0.1, 100.0, 1e3], [0.1, 1e3]))
def test_weighted_cotangents_that_overflow(dtype: str, R: float) -> None:
    """Inputs so tiny that a gradient of length R needs cotangents beyond the range."""
    numbers = jnp.dtype(dtype)
    limits = jnp.finfo(numbers)
    direction, gap = np.random.default_rng(4).standard_normal((2, 1, D))
    gap = gap * max(1e-3, 8 * float(limits.eps))
    for scale in (1e2, 1e3, 1e4):
        first = scale * float(limits.tiny) * direction
        second = 4 * scale * float(limits.tiny) * (direction + gap)
        x = jnp.asarray(np.stack([first, second], axis=1)).astype(numbers)
        algorithm = dp_sgd.build(
            two_positions, x, jnp.full((1, 64), 100.0, numbers), losses.Custom(linear_loss),
            Automatic(R, gamma=0.0), learning_rate=1.0, reduction="sum",
        )  # fmt: skip
        _, info = algorithm.step(jax.random.key(0), algorithm.init(jnp.zeros((D, 64), numbers)))
        assert float(info.gradient_norm) <= R * (1 + TOLERANCES[dtype])
        assert int(info.dropped) == int(info.gradient_norm == 0)


def test_cotangents_that_vanish_unseen_drop_no_sample() -> None:
    x = jnp.asarray(np.random.default_rng(5).standard_normal((3, 2, D)), jnp.float32)
    y = jnp.full((3, 64), 1e-37, jnp.float32).at[:, 0].set(1.0)
    found = []
    for gradients in ("structured", "vmap"):
        algorithm = dp_sgd.build(
            two_positions, x, y, losses.Custom(linear_loss), Abadi(1e-3), learning_rate=1.0,
            gradients=gradients,
        )  # fmt: skip
        state, info = algorithm.step(
            jax.random.key(0), algorithm.init(jnp.zeros((D, 64), jnp.float32))
        )
        assert int(info.dropped) == 0
        found.append(state.params)
    structured, plain = found
    np.testing.assert_allclose(structured, plain, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("gradients", ["structured", "vmap"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_one_more_of_thousands_moves_the_sum_by_no_more(dtype: str, gradients: Any) -> None:
    """All alike, so that a sum in half precision would stop growing or move in leaps."""
    numbers, R, n = jnp.dtype(dtype), 0.1, 4096
    x, y = jnp.ones((n, 4), numbers), jnp.ones((n, 1), numbers)
    params = jnp.zeros((4, 1), numbers)

    def summed(rows: slice) -> np.ndarray:
        algorithm = dp_sgd.build(
            lambda p, x: x @ p, x[rows], y[rows], losses.Custom(linear_loss), Abadi(R),
            learning_rate=1.0, reduction="sum", gradients=gradients,
        )  # fmt: skip
        return np.asarray(algorithm.clipped_sum(params, None)[0], np.float64)

    moved = np.linalg.norm(summed(slice(None)) - summed(slice(-1)))
    np.testing.assert_allclose(moved, R, rtol=5e-3)


@pytest.mark.parametrize("gradients", ["structured", "vmap"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_step_at_the_ends_of_the_range(dtype: str, gradients: Any) -> None:
    """The norm of what the dtype can hold, although its square is beyond it."""
    numbers = jnp.dtype(dtype)
    limits, R = jnp.finfo(numbers), 8.0
    for value in (float(limits.max) / 2, 2 * float(limits.tiny)):
        x = jnp.full((1, 4), value, numbers)
        algorithm = dp_sgd.build(
            lambda p, x: x @ p, x, jnp.ones((1, 1), numbers), losses.Custom(linear_loss),
            Automatic(R, gamma=0.0), learning_rate=1.0, reduction="sum", gradients=gradients,
        )  # fmt: skip
        _, info = algorithm.compile()(jax.random.key(0), algorithm.init(jnp.zeros((4, 1), numbers)))
        assert int(info.dropped) == 0
        np.testing.assert_allclose(info.norms, 2 * float(x[0, 0]), rtol=1e-6)
        np.testing.assert_allclose(info.gradient_norm, R, rtol=1e-6)


@pytest.mark.parametrize("gradients", ["structured", "vmap"])
def test_a_sample_with_a_factor_of_zero_is_not_dropped(gradients: Any) -> None:
    x, y = jnp.array([[1.0, 2.0], [3.0, 0.0]]), jnp.ones((2, 1))
    algorithm = dp_sgd.build(
        lambda p, x: x @ p, x, y, losses.Custom(linear_loss), Global(1.0), learning_rate=1.0,
        gradients=gradients,
    )  # fmt: skip
    _, info = algorithm.step(jax.random.key(0), algorithm.init(jnp.zeros((2, 1))))
    assert (int(info.dropped), float(info.clip_fraction)) == (0, 1.0)


@pytest.mark.parametrize("gradients", ["structured", "vmap"])
def test_a_sample_whose_factor_is_not_a_number_is_dropped(gradients: Any) -> None:
    rule = Custom(lambda s: jnp.where(s == 3.0, jnp.nan, 0.1 / (1 + s)), 0.5)
    x, y = jnp.array([[1.0], [3.0]]), jnp.ones((2, 1))
    algorithm = dp_sgd.build(
        lambda p, x: x @ p, x, y, losses.Custom(linear_loss), rule, learning_rate=1.0,
        reduction="sum", gradients=gradients,
    )  # fmt: skip
    state, info = algorithm.step(jax.random.key(0), algorithm.init(jnp.zeros((1, 1))))
    assert int(info.dropped) == 1
    np.testing.assert_allclose(state.params, -0.05, rtol=1e-12)


def test_noise_in_half_precision_is_neither_lost_nor_infinite() -> None:
    """Its deviation may be outside the range of the parameters; the mean brings it back."""
    n = 2**14
    for R, lowest in ((1e-6, 1e-8), (1e5, 1.0)):
        algorithm = dp_sgd.build(
            lambda p, x: x @ p, jnp.zeros((n, 1), jnp.float16), jnp.zeros((n, 64), jnp.float16),
            losses.SquaredError(), Abadi(R), learning_rate=1.0, noise_multiplier=1.0,
        )  # fmt: skip
        _, info = algorithm.step(jax.random.key(0), algorithm.init(jnp.zeros((1, 64), jnp.float16)))
        np.testing.assert_allclose(info.noise_norm, 8 * R, rtol=0.4)
        assert np.isfinite(info.noise_norm)
        assert info.noise_norm > lowest


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: "-".join(map(str, case)))
def test_no_sample_adds_more_than_the_sensitivity_at_length(case: tuple[Any, ...]) -> None:
    check(case, 24)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    for family in FAMILIES:
        tried = 0
        for dtype, tolerance in TOLERANCES.items():
            mine = [case for case in ALL_CASES if case[:2] == (family, dtype)]
            found = [check(case, 24) for case in mine]
            tried += sum(number for _, number in found)
            most = max(largest for largest, _ in found)
            print(f"{family} {dtype}: largest {most:.9f}, allowed {1 + tolerance}", flush=True)
        print(f"{family}: {tried} samples and rules tried")
