"""Clipping rules: the table of rules in NumPy, the bound on every sample, and bad R."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import examples
from hypothesis.extra import numpy as hnp

from ntkdp import clipping
from ntkdp.clipping import PSAC, Abadi, Automatic, Batch, Custom, Global, NoClipping, Scope

R = 0.7
NORMS = np.array([1e-9, 0.01, 0.3, 0.69999, 0.7, 0.70001, 1.0, 1.4, 20.0, 1e9])


def saturating(s: jax.Array) -> jax.Array:
    return R / (1 + s)


#: Every rule at clipping norm R, and its factor in plain NumPy.
TABLE: dict[str, tuple[clipping.ClippingRule, Callable[[np.ndarray], Any]]] = {
    "none": (NoClipping(), lambda s: np.ones_like(s)),
    "abadi": (Abadi(R), lambda s: np.minimum(1, R / s)),
    "global": (Global(R), lambda s: np.where(s <= R, 1.0, 0.0)),
    "global, Z": (Global(R, Z=1.4), lambda s: np.where(s <= 1.4, R / 1.4, 0.0)),
    "automatic": (Automatic(R), lambda s: R / (s + 0.01)),
    "automatic, gamma": (Automatic(R, gamma=0.3), lambda s: R / (s + 0.3)),
    "auto-v": (Automatic(R, gamma=0.0), lambda s: R / s),
    "psac": (PSAC(R), lambda s: R / (s + 0.1 / (s + 0.1))),
    "psac, r": (PSAC(R, r=2.0), lambda s: R / (s + 2 / (s + 2))),
    "custom": (Custom(saturating, R), lambda s: R / (1 + s)),
}


@pytest.mark.parametrize("name", TABLE)
def test_flat_factors(name: str) -> None:
    rule, factor = TABLE[name]
    np.testing.assert_allclose(rule.factors(jnp.asarray(NORMS)), factor(NORMS), rtol=1e-14)


@pytest.mark.parametrize("name", TABLE)
def test_one_R_layerwise_is_R_in_every_group(name: str) -> None:
    rule, factor = TABLE[name]
    values = {f: getattr(rule, f) for f in ("R", "Z", "gamma", "r", "function") if hasattr(rule, f)}
    if name == "none":
        values = {}
    layerwise = type(rule)(**values, scope="layerwise")
    norms = np.stack([NORMS, NORMS[::-1], 2 * NORMS])
    np.testing.assert_allclose(layerwise.factors(jnp.asarray(norms)), factor(norms), rtol=1e-14)


def test_one_R_for_each_group() -> None:
    Rs, s = np.array([0.2, 1.0, 5.0]), np.stack([NORMS] * 3)
    column = Rs[:, None]
    expected = [
        (Abadi(Rs, scope="layerwise"), np.minimum(1, column / s)),
        (Global(Rs, scope="layerwise"), np.where(s <= column, 1.0, 0.0)),
        (Global(Rs, Z=0.5, scope="layerwise"), np.where(s <= 0.5, column / 0.5, 0.0)),
        (Global(Rs, Z=2 * Rs, scope="layerwise"), np.where(s <= 2 * column, 0.5, 0.0)),
        (Automatic(Rs, scope="layerwise"), column / (s + 0.01)),
        (PSAC(Rs, scope="layerwise"), column / (s + 0.1 / (s + 0.1))),
    ]
    for rule, factors in expected:
        np.testing.assert_allclose(rule.factors(jnp.asarray(s)), factors, rtol=1e-14)


def test_batch_has_one_factor() -> None:
    norms = jnp.array([0.1, 3.0, 50.0])
    np.testing.assert_allclose(Batch(R).factors(norms, jnp.array(2.0)), [R / 2] * 3, rtol=1e-15)
    np.testing.assert_array_equal(Batch(R).factors(norms, jnp.array(0.5)), [1.0] * 3)
    layerwise = Batch([1.0, 2.0], scope="layerwise")
    factors = layerwise.factors(jnp.stack([norms, norms]), jnp.array([4.0, 1.0]))
    np.testing.assert_array_equal(factors, [[0.25] * 3, [1.0] * 3])
    with pytest.raises(ValueError, match="Batch needs total_norm"):
        Batch(R).factors(norms)


EDGES = {
    "none": (NoClipping(), 1.0, 1.0),
    "abadi": (Abadi(R), 1.0, 0.0),
    "global": (Global(R), 1.0, 0.0),
    "global, Z": (Global(R, Z=1.4), 0.5, 0.0),
    "automatic": (Automatic(R, gamma=0.01), R / 0.01, 0.0),
    "auto-v": (Automatic(R, gamma=0.0), 0.0, 0.0),
    "psac": (PSAC(R), R, 0.0),
    "custom": (Custom(saturating, R), R, 0.0),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", EDGES)
def test_norms_of_zero_infinity_and_nan(name: str, dtype: Any) -> None:
    rule, at_zero, at_infinity = EDGES[name]
    factors = rule.factors(jnp.array([0.0, jnp.inf, jnp.nan], dtype))
    np.testing.assert_allclose(factors, [at_zero, at_infinity, np.nan], rtol=1e-6)
    assert factors.dtype == dtype


def test_total_norms_of_zero_infinity_and_nan() -> None:
    norms = jnp.ones(1)
    for total, factor in ((0.0, 1.0), (np.inf, 0.0), (np.nan, np.nan)):
        np.testing.assert_array_equal(Batch(R).factors(norms, jnp.array(total)), [factor])


#: Rules with numbers beyond single precision, and the bound on a clipped norm.
BEYOND: dict[str, tuple[Callable[[], clipping.ClippingRule], float]] = {
    "abadi": (lambda: Abadi(1e39), 1e39),
    "abadi, small": (lambda: Abadi(1e-50), 1e-50),
    "global": (lambda: Global(1e39), 1e39),
    "global, Z": (lambda: Global(1e39, Z=2e39), 1e39),
    "global, large Z": (lambda: Global(1.0, Z=1e39), 1.0),
    "global, small Z": (lambda: Global(1.0, Z=1e-50), 1.0),
    "global, large R over small Z": (lambda: Global(1e300, Z=1e-300), 1e300),
    "global, small": (lambda: Global(1e-50, Z=2e-50), 1e-50),
    "automatic": (lambda: Automatic(1e39), 1e39),
    "automatic, gamma": (lambda: Automatic(1e39, gamma=1e39), 1e39),
    "automatic, small": (lambda: Automatic(1e-50, gamma=1e-50), 1e-50),
    "automatic, small gamma": (lambda: Automatic(1.0, gamma=1e-50), 1.0),
    "auto-v": (lambda: Automatic(1e39, gamma=0.0), 1e39),
    "psac": (lambda: PSAC(1e39), 1e39),
    "psac, r": (lambda: PSAC(1.0, r=1e39), 1.0),
    "psac, small r": (lambda: PSAC(1e30, r=1e-50), 1e30),
    "psac, small": (lambda: PSAC(1e-50, r=1e-50), 1e-50),
    "custom": (lambda: Custom(lambda s: 1 / (1 + s), 1e39), 1e39),
    "custom, small": (lambda: Custom(lambda s: jnp.minimum(1.0, 1e-50 / s), 1e-50), 1e-50),
    "custom, large": (lambda: Custom(lambda s: 1 / (1 + s), 1e305), 1e305),
}


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", BEYOND)
def test_numbers_beyond_the_dtype(name: str, dtype: Any) -> None:
    """Factors are finite, keep to the bound, and let nothing infinite through."""
    make, bound = BEYOND[name]
    info = jnp.finfo(dtype)
    largest = float(info.max)
    norms = jnp.array([0.0, float(info.tiny), 1e-4, 0.5, 1.0, 100.0, largest, np.inf], dtype)
    for found in (make().factors(norms), factors_of(make(), norms)):
        factors = np.asarray(found, np.float64)
        assert np.all(np.isfinite(factors)), factors
        assert factors[-1] == 0
        clipped = np.asarray(norms[:-1], np.float64) * factors[:-1]
        assert np.all(clipped <= bound * (1 + 4 * float(info.eps))), clipped


def test_large_numbers_in_single_precision_are_those_in_double() -> None:
    norms = np.array([1e-3, 1.0, 1e3, 1e35])
    for make, _ in (BEYOND[name] for name in ("abadi", "global", "global, Z", "psac, r")):
        expected = make().factors(jnp.asarray(norms))
        found = make().factors(jnp.asarray(norms, jnp.float32))
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_an_infinite_norm_of_the_sum_is_clipped_to_nothing() -> None:
    norms = jnp.ones(1, jnp.float32)
    assert float(Batch(1e39).factors(norms, jnp.float32(np.inf))[0]) == 0
    assert float(Batch(1e39).factors(norms, jnp.float32(1e38))[0]) == 1


def test_custom_rules_are_checked_in_single_precision() -> None:
    with jax.enable_x64(False):
        norms = jnp.array([0.0, 1.0, 3e38, np.inf])
        factors = Custom(lambda s: 1 / (1 + s), 1e39).factors(norms)
        np.testing.assert_allclose(factors, [1.0, 0.5, 1 / 3e38, 0.0], rtol=1e-6, atol=1e-38)
        with pytest.raises(ValueError, match="must keep"):
            Custom(lambda s: 1e6 / s, 1.0)
        with pytest.raises(ValueError, match="must keep"):
            Custom(lambda s: jnp.full_like(s, 1e6), 1e33)


#: Each private rule at any clipping norm, flat.
PRIVATE: dict[str, Callable[..., clipping.ClippingRule]] = {
    "abadi": Abadi,
    "global": Global,
    "global, Z below R": lambda R, **k: Global(R, Z=R / 3, **k),
    "global, Z above R": lambda R, **k: Global(R, Z=3 * R, **k),
    "automatic": Automatic,
    "auto-v": lambda R, **k: Automatic(R, gamma=0.0, **k),
    "psac": PSAC,
    "psac, large r": lambda R, **k: PSAC(R, r=1e3, **k),
    "custom": lambda R, **k: Custom(lambda s: jnp.tanh(s) * np.min(R) / s, R, **k),
}

CUSTOM = Custom(lambda s: 1 / (1 + s), 1.0)
factors_of = eqx.filter_jit(lambda rule, norms: rule.factors(norms))


@pytest.mark.parametrize("name", PRIVATE)
@examples(60, 200)
@hypothesis.given(
    norms=hnp.arrays(
        np.float64, 8, elements=st.one_of(st.just(0.0), st.floats(1e-307, 1e300), st.floats(0, 10))
    ),
    log10_R=st.floats(-30, 30),
)
@hypothesis.example(norms=np.full(8, 1e-307), log10_R=30.0)
@hypothesis.example(norms=np.full(8, 1e300), log10_R=-30.0)
def test_no_clipped_norm_exceeds_R(name: str, norms: np.ndarray, log10_R: float) -> None:
    R = 10**log10_R
    # A custom function made anew would compile anew: only its R changes, and the cap binds.
    rule = (
        eqx.tree_at(lambda r: r.R, CUSTOM, np.asarray(R)) if name == "custom" else PRIVATE[name](R)
    )
    clipped = norms * np.asarray(factors_of(rule, jnp.asarray(norms)))
    assert np.all(np.abs(clipped) <= R * (1 + 4 * np.finfo(float).eps)), clipped


def clipped_sum(rule: clipping.ClippingRule, gradients: list[np.ndarray]) -> np.ndarray:
    """Sum of clipped gradients, given by group, in NumPy; only the factors are the library's."""
    norms = np.stack([np.linalg.norm(part, axis=1) for part in gradients])
    if rule.scope == "flat":
        norms = np.sqrt(np.sum(norms**2, axis=0))
        factors = np.broadcast_to(factors_of(rule, jnp.asarray(norms)), (3, len(norms)))
    else:
        factors = np.asarray(factors_of(rule, jnp.asarray(norms)))
    return np.concatenate([c @ part for c, part in zip(factors, gradients, strict=True)])


SCOPES = [("flat", 0.7), ("layerwise", 0.7), ("layerwise", np.array([0.1, 1.0, 4.0]))]
SIZES = (1, 4, 9)


@pytest.mark.parametrize(("scope", "R"), SCOPES, ids=["flat", "layerwise", "layerwise, each its R"])
@pytest.mark.parametrize("name", PRIVATE)
def test_one_sample_moves_the_clipped_sum_by_the_sensitivity(
    name: str, scope: Scope, R: Any
) -> None:
    rule = PRIVATE[name](R, scope=scope)
    expected = R if scope == "flat" else math.sqrt(np.sum(np.broadcast_to(R, 3) ** 2))
    bound = rule.sensitivity(3)
    assert bound == pytest.approx(expected, rel=1e-15)
    rng = np.random.default_rng(1)
    largest = np.zeros(2)
    for trial in range(40):
        scales = 10 ** rng.uniform(-3, 3, size=(8, 1))
        whole = [scales * rng.normal(size=(8, p)) for p in SIZES]
        if trial % 2:  # the worst: a sample at its bound in every group, replaced by its opposite
            Z = getattr(rule, "Z", None)
            at = np.broadcast_to(R if Z is None else Z, 3) if name.startswith("global") else 1e9
            at = at / np.sqrt(3) if scope == "flat" and name.startswith("global") else at
            for part, norm in zip(whole, np.broadcast_to(at, 3), strict=True):
                part[-1] *= (1 - 1e-12) * norm / np.linalg.norm(part[-1])
        removed = [part[:-1] for part in whole]
        replaced = [np.concatenate([part[:-1], -part[-1:]]) for part in whole]
        total = clipped_sum(rule, whole)
        moves = [np.linalg.norm(total - clipped_sum(rule, other)) for other in (removed, replaced)]
        largest = np.maximum(largest, moves)
    rounding = 1e-12 * (1 + bound)
    assert largest[0] <= bound + rounding
    assert largest[1] <= 2 * bound + rounding
    # A smaller claim would be refuted by these very samples.
    custom = name == "custom" and np.ndim(R) > 0  # its function keeps to the smallest R everywhere
    floor = math.sqrt(3) * np.min(R) if custom else bound
    assert largest[0] >= (1 - 1e-6) * floor
    assert largest[1] >= 2 * (1 - 1e-6) * floor


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_sensitivities_at_the_ends_of_the_range(scale: float) -> None:
    """Of thresholds whose squares are not numbers; with its slopes, if they are traced."""

    def sensitivity(R: Any) -> Any:
        return Abadi(R, scope="layerwise").sensitivity(2)

    R = scale * np.array([3.0, 4.0])
    assert sensitivity(R) == pytest.approx(5 * scale, rel=1e-15)
    assert sensitivity(scale) == pytest.approx(math.sqrt(2) * scale, rel=1e-15)
    np.testing.assert_allclose(jax.jit(sensitivity)(R), 5 * scale, rtol=1e-15)
    np.testing.assert_allclose(jax.jit(jax.grad(sensitivity))(R), [0.6, 0.8], rtol=1e-15)


def test_batch_and_no_clipping_bound_no_sample() -> None:
    for rule in (Batch(1.0), NoClipping(), Batch(1.0, scope="layerwise")):
        assert rule.sensitivity(3) == np.inf
        assert not rule.bounds_each_sample
    # Two opposite gradients cancel, so nothing is clipped, and a third moves the sum by its norm.
    pair, third = np.array([1e6, -1e6]), 1e6
    factor = Batch(1.0).factors(jnp.asarray(np.abs(pair)), jnp.asarray(abs(pair.sum())))
    before = np.sum(np.asarray(factor) * pair)
    assert before == 0
    # Removing one of the two moves it by R only, but its partner's contribution by a million.
    contribution = float(factor[0]) * pair[0]
    assert abs(contribution) > 1e5
    trio = np.append(pair, third)
    after = Batch(1.0).factors(jnp.asarray(np.abs(trio)), jnp.asarray(abs(trio.sum())))
    assert abs(float(after[0]) * trio[0] - contribution) > 1e5


def test_custom_rules_over_R_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must keep \|s w\(s\)\| <= R = 1.0, got s w\(s\) = 2.0"):
        Custom(lambda s: 2 / s, 1.0)
    with pytest.raises(ValueError, match="must keep"):
        Custom(lambda s: -2 / s, 1.0)
    with pytest.raises(ValueError, match="must keep"):
        Custom(lambda s: jnp.ones_like(s), 1.0)
    with pytest.raises(ValueError, match=r"got s w.s. = nan"):
        Custom(lambda s: jnp.full_like(s, jnp.nan), 1.0)


def test_custom_rules_are_capped_where_the_check_did_not_look() -> None:
    rule = Custom(lambda s: jnp.where(s > 1e7, 1.0, 0.0), 1.0)
    s = jnp.array([1.0, 1e8, 1e200])
    np.testing.assert_allclose(rule.factors(s) * s, [0, 1, 1], rtol=1e-15)
    rule = Custom(lambda s: jnp.where(s > 1e7, -1.0, 0.0), 1.0)
    np.testing.assert_allclose(rule.factors(s) * s, [0, -1, -1], rtol=1e-15)


@pytest.mark.parametrize("function", [lambda s: 1 / s, lambda s: jnp.tanh(s) / s], ids=["1/s", "x"])
def test_custom_rules_that_divide_by_zero_leave_a_zero_gradient_zero(function: Any) -> None:
    factors = Custom(function, 1.0).factors(jnp.array([0.0, 2.0]))
    np.testing.assert_array_equal(factors * jnp.array([0.0, 0.0]), [0.0, 0.0])


BAD_R = [0.0, -1.0, np.nan, np.inf, -np.inf]


@pytest.mark.parametrize("bad", BAD_R)
@pytest.mark.parametrize("kind", [Abadi, Global, Automatic, PSAC, Batch])
def test_bad_R(kind: Any, bad: float) -> None:
    with pytest.raises(ValueError, match=rf"R must be positive and finite, got .*{bad:.0f}"):
        kind(bad)
    with pytest.raises(ValueError, match="R must be positive and finite, got"):
        kind([1.0, bad], scope="layerwise")


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan])
def test_bad_options(bad: float) -> None:
    with pytest.raises(ValueError, match=f"Z must be positive and finite, got .*{bad:.0f}"):
        Global(1.0, Z=bad)
    with pytest.raises(ValueError, match=f"r must be positive and finite, got .*{bad:.0f}"):
        PSAC(1.0, r=bad)
    with pytest.raises(ValueError, match="gamma must be at least 0 and finite, got"):
        Automatic(1.0, gamma=bad or -0.1)
    with pytest.raises(
        ValueError, match=r"Z must be one number or have the shape of R, got \(2,\)"
    ):
        Global(1.0, Z=[1.0, 2.0], scope="layerwise")


@pytest.mark.parametrize("bad", ["abc", "0.1", None, True, 1j])
def test_R_that_is_no_number(bad: Any) -> None:
    # Of the library, or of the type checker of the tests; test_bad_inputs runs without that.
    with pytest.raises((TypeError, ValueError), match=r"R must be|parameter 'R'"):
        Abadi(bad)


@pytest.mark.parametrize("kind", [Abadi, Global, Automatic, PSAC, Batch, "custom"])
def test_no_R_at_all(kind: Any) -> None:
    make = (lambda R, scope: Custom(saturating, R, scope)) if kind == "custom" else kind
    empty: Any
    for empty in ([], np.zeros(0), jnp.zeros(0), jnp.zeros((2, 0))):
        with pytest.raises(ValueError, match="R must be one number, or one for each group, got"):
            make(empty, scope="layerwise")


def test_traced_R_is_checked_when_the_program_runs() -> None:
    clip = eqx.filter_jit(lambda R: Abadi(R).factors(jnp.ones(2)))
    np.testing.assert_array_equal(clip(jnp.array(0.5)), [0.5, 0.5])
    with pytest.raises(RuntimeError, match="R must be positive and finite"):
        clip(jnp.array(-1.0))


def test_scopes_and_shapes_that_do_not_fit() -> None:
    with pytest.raises(
        ValueError, match=r"R must be one number with scope='flat', got shape \(2,\)"
    ):
        Abadi([1.0, 2.0])
    with pytest.raises(ValueError, match=r"scope='layerwise', got shape \(1, 2\)"):
        Abadi(np.array([[1.0, 2.0]]), scope="layerwise")
    two = Abadi([1.0, 2.0], scope="layerwise")
    with pytest.raises(ValueError, match="R has 2 entries for 3 parameter groups"):
        two.factors(jnp.ones((3, 4)))
    with pytest.raises(ValueError, match="R has 2 entries for 3 parameter groups"):
        two.sensitivity(3)
    with pytest.raises(ValueError, match=r"norms must have shape \(n,\) .* got \(2, 3\)"):
        Abadi(1.0).factors(jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"norms must have shape \(groups, n\) .* got \(3,\)"):
        two.factors(jnp.ones(3))


def test_names() -> None:
    kinds = {
        "none": NoClipping,
        "abadi": Abadi,
        "global": Global,
        "automatic": Automatic,
        "psac": PSAC,
        "batch": Batch,
    }
    for name, kind in kinds.items():
        rule = clipping.from_name(name, **({} if name == "none" else {"R": 2.0}))
        assert type(rule) is kind
        assert clipping.class_of(name) is kind
        assert clipping.name_of(rule) == name
    assert clipping.names() == tuple(kinds)
    with pytest.raises(TypeError, match=r"rule must be one of abadi, .* got Custom"):
        clipping.name_of(Custom(lambda s: 1 / (1 + s), 1.0))
    automatic = clipping.from_name("automatic", R=1.0, gamma=0.5, scope="layerwise")
    assert isinstance(automatic, clipping.Automatic)
    assert automatic.gamma == 0.5
    with pytest.raises(ValueError, match="unknown rule 'abbadi'; did you mean 'abadi'"):
        clipping.from_name("abbadi", R=1.0)


@pytest.mark.parametrize("name", PRIVATE)
def test_another_R_compiles_nothing(name: str) -> None:
    traces = []

    @eqx.filter_jit
    def clip(rule: clipping.ClippingRule, norms: jax.Array) -> jax.Array:
        traces.append(rule)
        return rule.factors(norms)

    for other in (0.5, 1.3, 2):
        if name == "custom":
            rule = eqx.tree_at(lambda r: r.R, CUSTOM, np.asarray(other, float))
        else:
            rule = PRIVATE[name](other)
        clip(rule, jnp.ones(3))
    assert len(traces) == 1


def test_vmap_over_R() -> None:
    Rs = np.array([0.1, 1.0, 10.0])
    factors = jax.vmap(lambda R: Abadi(R).factors(jnp.asarray(NORMS)))(Rs)
    np.testing.assert_allclose(factors, np.minimum(1, Rs[:, None] / NORMS), rtol=1e-14)
    each = jax.vmap(lambda R: Abadi(R, scope="layerwise").sensitivity(2))(np.stack([Rs[:2]] * 2))
    np.testing.assert_allclose(each, math.sqrt(1.01), rtol=1e-14)


@pytest.mark.parametrize("name", TABLE)
def test_gradients_of_factors_are_finite(name: str) -> None:
    rule, _ = TABLE[name]
    norms = jnp.array([0.0, 1e-100, 0.3, 0.7, 1.0, 1e9])
    slopes = jax.vmap(jax.grad(lambda s: rule.factors(s[None])[0]))(norms)
    assert np.all(np.isfinite(slopes))


def test_gradients_of_norms_are_finite() -> None:
    squares = jnp.array([0.0, 1e-30, 2.0])
    slopes = jax.vmap(jax.grad(clipping.norms_from_squares))(squares)
    np.testing.assert_allclose(slopes, [0, 0.5e15, 0.5 / math.sqrt(2)], rtol=1e-14)


def test_norms_from_squares() -> None:
    squares = jnp.array([4.0, 0.0, -1e-20, jnp.inf, jnp.nan])
    np.testing.assert_array_equal(
        clipping.norms_from_squares(squares), [2.0, 0.0, 0.0, np.inf, np.nan]
    )


def test_clip_fraction_is_the_share_below_one() -> None:
    assert clipping.clip_fraction(jnp.array([1.0, 0.5, 1.0, 0.9])) == 0.5
    assert clipping.clip_fraction(jnp.array([[1.0, 0.5], [2.0, 0.0], [1.0, 1.0]])) == pytest.approx(
        1 / 3
    )
