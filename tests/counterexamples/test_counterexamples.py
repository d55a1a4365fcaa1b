"""Counterexamples: found unaided where theory allows them, nowhere else, and data that replays."""

import dataclasses
import functools
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import examples, often_or_slow
from hypothesis import given
from hypothesis import strategies as st

import ntkdp
from ntkdp import clipping, counterexamples, losses
from ntkdp.counterexamples import Counterexample

LAYERWISE: dict[str, Any] = {"scope": "layerwise"}
RULES: dict[str, clipping.ClippingRule] = {
    "abadi": clipping.Abadi(1.0),
    "automatic 0": clipping.Automatic(1.0, gamma=0.0),
    "automatic": clipping.Automatic(1.0),
    "psac": clipping.PSAC(1.0),
    "abadi layerwise": clipping.Abadi(1.0, **LAYERWISE),
    "automatic 0 layerwise": clipping.Automatic(1.0, gamma=0.0, **LAYERWISE),
    "automatic layerwise": clipping.Automatic(1.0, **LAYERWISE),
    "psac layerwise": clipping.PSAC(1.0, **LAYERWISE),
    "global": clipping.Global(1.0),
    "global layerwise": clipping.Global(1.0, **LAYERWISE),
}
SATURATING_LAYERWISE = ["abadi layerwise", "automatic 0 layerwise", "automatic layerwise"]


@functools.cache
def smallest_rise(name: str) -> Counterexample | None:
    return counterexamples.find_smallest_rise(RULES[name], key=jax.random.key(1))


@functools.cache
def divergent(name: str) -> Counterexample:
    found = counterexamples.find_divergent(RULES[name], key=jax.random.key(2))
    assert found is not None
    return found


@functools.cache
def stuck(name: str) -> Counterexample | None:
    return counterexamples.find_stuck(RULES[name], key=jax.random.key(3))


def weight(name: str, s: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    """Factors of the rules, written anew."""
    R = np.reshape(options.get("R", 1.0), (-1, 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        if name == "abadi":
            return np.minimum(1, R / s)
        if name == "global":
            Z = np.reshape(options.get("Z", R), (-1, 1))
            return np.where(s <= Z, R / Z if "Z" in options else 1.0, 0.0)
        if name == "automatic":
            return np.where(s + options["gamma"] > 0, R / (s + options["gamma"]), 0.0)
        assert name == "psac"
        return R / (s + options["r"] / (s + options["r"]))


def output_gradient(example: Counterexample) -> np.ndarray:
    f, y = np.array(example.outputs), np.array(example.targets)
    match example.loss:
        case "squared_error":
            return f - y
        case "huber":
            delta = np.asarray(example.loss_options["delta"])
            return np.clip(f - y, -delta, delta)
        case "logistic":
            return 1 / (1 + np.exp(-f)) - y
    exponentials = np.exp(f - f.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True) - np.eye(f.shape[1])[y]


def by_hand(example: Counterexample) -> tuple[float, float]:
    """dL/dt = -sum_r a^T H_r C_r a, and over all gradients aligned, in NumPy."""
    a, terms = output_gradient(example), np.array(example.kernel)
    if terms.ndim == 3:
        terms = np.einsum("rij,kl->rijkl", terms, np.eye(a.shape[1]))
    norms = np.sqrt(np.einsum("ik,riikl,il->ri", a, terms, a))
    factors = weight(example.rule, norms, example.rule_options)
    rate = -np.einsum("ik,rijkl,rj,jl->", a, terms, factors, a)
    return rate, rate / np.sum(norms.sum(1) * (factors * norms).sum(1))


def decimal_digits(value: float) -> int:
    return len(repr(float(f"{value:.15e}")).split("e")[0].replace(".", "").strip("-0"))


@pytest.mark.parametrize("name", often_or_slow(RULES, ["abadi", "abadi layerwise", "global"]))
def test_the_smallest_rise_has_the_least_number_of_samples(name: str) -> None:
    """Three for rules with s w(s) non-decreasing (proved: two cannot), two for the 0/1 rule."""
    found = smallest_rise(name)
    assert found is not None
    assert len(found.outputs) == (2 if "global" in name else 3)
    rate, share = by_hand(found)
    replayed = found.replay()
    assert replayed["loss_rate"] == pytest.approx(rate, rel=1e-9)
    assert replayed["rise"] == pytest.approx(share, rel=1e-9)
    assert replayed == found.measured
    assert rate > 0
    assert share > 0.02
    assert found.holds()
    for term in np.array(found.kernel):
        assert np.linalg.eigvalsh(term).min() > 0
    assert max(decimal_digits(v) for v in np.array(found.outputs).ravel()) <= 5


@pytest.mark.parametrize(
    ("name", "seed"),
    often_or_slow(
        itertools.product(["abadi", "automatic 0", "automatic"], range(4)),
        [("abadi", 0), ("automatic", 2)],
    ),
)
def test_every_key_finds_three_and_none_finds_two(name: str, seed: int) -> None:
    """Two samples cannot make the loss rise, so a search that finds two would be wrong."""
    found = counterexamples.find_smallest_rise(RULES[name], key=jax.random.key(seed))
    assert found is not None
    assert len(found.outputs) == 3
    assert found.holds()


@pytest.mark.parametrize(
    "rule",
    [
        clipping.NoClipping(),
        pytest.param(clipping.Batch(0.1, **LAYERWISE), marks=pytest.mark.slow),
    ],
)
def test_symmetric_operators_never_make_the_loss_rise(rule: Any) -> None:
    """No clipping gives H, batch clipping sum_r c_r H_r: positive forms (Table 1)."""
    assert counterexamples.find_smallest_rise(rule, key=jax.random.key(0)) is None


@pytest.mark.slow
def test_batch_clipping_neither_sticks_nor_diverges() -> None:
    rule, key = clipping.Batch(0.1, **LAYERWISE), jax.random.key(0)
    assert counterexamples.find_divergent(rule, key=key) is None
    assert counterexamples.find_stuck(rule, key=key, max_samples=2) is None


@pytest.mark.parametrize("name", often_or_slow(["abadi", "automatic"], ["automatic"]))
def test_flat_rules_with_one_output_do_not_diverge(name: str) -> None:
    """C a is the gradient of a Huberised loss, which decreases until a = 0."""
    assert counterexamples.find_divergent(RULES[name], key=jax.random.key(0)) is None


@pytest.mark.slow
def test_flat_rules_do_not_stick() -> None:
    """H C a = 0 only where a = 0, for positive factors."""
    assert counterexamples.find_stuck(RULES["abadi"], key=jax.random.key(0)) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", SATURATING_LAYERWISE)
def test_layerwise_clipping_diverges_with_three_samples(name: str) -> None:
    """Two cannot: far off, sample i moves inwards by sum_r R_r sqrt(H_r,ii) (1 + rho_r) > 0."""
    found = divergent(name)
    assert len(found.outputs) == 3
    assert np.linalg.eigvalsh(np.array(found.kernel)).min() > 0
    assert found.holds()
    # An independent integration, by small steps of the formula.
    H, a = np.array(found.kernel), np.array(found.outputs)[:, 0]
    start, diagonal = 0.5 * np.sum(a**2), np.sqrt(np.diagonal(H, axis1=1, axis2=2))
    steps = 4000
    for _ in range(steps):
        factors = weight(found.rule, diagonal * np.abs(a), found.rule_options)
        a = a - found.measured["horizon"] / steps * np.einsum("rij,rj,j->i", H, factors, a)
    assert 0.5 * np.sum(a**2) / start == pytest.approx(found.measured["loss_growth"], rel=0.02)
    assert found.measured["loss_growth"] > 1000


@pytest.mark.slow
def test_layerwise_clipping_gets_stuck_with_two_samples() -> None:
    found = stuck("abadi layerwise")
    assert found is not None
    assert len(found.outputs) == 2
    H, a = np.array(found.kernel), np.array(found.outputs)[:, 0]
    assert np.linalg.eigvalsh(H.sum(0)).min() > 0
    assert np.linalg.matrix_rank(H).max() == 1
    norms = np.sqrt(np.diagonal(H, axis1=1, axis2=2)) * np.abs(a)
    factors = weight(found.rule, norms, found.rule_options)
    moves = np.einsum("rij,rj,j->ri", H, factors, a)
    np.testing.assert_allclose(moves.sum(0), 0, atol=1e-12 * np.abs(moves).sum())
    assert found.measured["loss"] > 0
    assert found.holds()
    path = ntkdp.solve(found.flow, found.outputs_array, [0.0, 50.0])
    np.testing.assert_allclose(path.loss, found.measured["loss"], rtol=1e-6)


@pytest.mark.slow
def test_the_zero_one_rule_is_stuck_once_every_sample_is_dropped() -> None:
    found = stuck("global")
    assert found is not None
    assert len(found.outputs) == 1
    assert np.sqrt(found.kernel[0][0][0]) * abs(found.outputs[0][0]) > 1


H7 = jnp.ones((3, 3)) + 0.1 * jnp.eye(3)
Y7 = jnp.array([-3.0, 1.0, 1.0])


def find_on_c7(rule: Any, kernel: Any = H7, targets: Any = Y7, **options: Any) -> Any:
    loss = losses.SquaredError()
    key = jax.random.key(0)
    return counterexamples.find_rise(kernel, targets, loss, rule, key=key, **options)


def test_the_rise_on_a_given_kernel_is_at_least_that_of_the_known_state() -> None:
    """C7: dL/dt = +0.4767 at f = 0."""
    known = Counterexample(
        "rise",
        kernel=(tuple(map(tuple, np.asarray(H7).tolist())),),
        targets=((-3.0,), (1.0,), (1.0,)),
        outputs=((0.0,),) * 3,
        loss="squared_error",
        loss_options={},
        rule="abadi",
        rule_options={"R": 1.0},
        scope="flat",
    )
    assert known.replay()["loss_rate"] == pytest.approx(0.4767, abs=5e-5)
    found = find_on_c7(clipping.Abadi(1.0))
    assert found.kernel == known.kernel
    assert found.measured["rise"] >= known.replay()["rise"]
    assert by_hand(found)[0] > 0


def test_samples_that_play_no_part_are_dropped() -> None:
    """Three samples of C7 next to four that nothing couples to them."""
    kernel = jnp.eye(7).at[jnp.ix_(jnp.array([1, 4, 5]), jnp.array([1, 4, 5]))].set(H7)
    found = find_on_c7(clipping.Abadi(1.0), kernel, jnp.arange(7.0))
    assert len(found.outputs) == 3
    assert np.ravel(found.targets).tolist() == [1.0, 4.0, 5.0]


def test_nothing_rises_on_a_diagonal_kernel() -> None:
    kernel, few = jnp.diag(jnp.arange(1.0, 4.0)), {"starts": 16, "steps": 100}
    assert find_on_c7(clipping.Abadi(0.1), kernel, **few) is None
    assert find_on_c7(clipping.Global(0.1), kernel, **few) is None


@pytest.mark.parametrize(
    "loss",
    [
        losses.Huber(2.0),
        pytest.param(losses.Logistic(), marks=pytest.mark.slow),
        pytest.param(losses.SoftmaxCrossEntropy(), marks=pytest.mark.slow),
    ],
)
def test_other_losses_rise_with_three_samples_too(loss: Any) -> None:
    options: dict[str, Any] = {"max_samples": 3, "key": jax.random.key(0)}
    found = counterexamples.find_smallest_rise(clipping.Abadi(0.5), loss, **options)
    assert found is not None
    assert len(found.outputs) == 3
    rate, share = by_hand(found)
    assert found.replay()["loss_rate"] == pytest.approx(rate, rel=1e-6)
    assert found.replay()["rise"] == pytest.approx(share, rel=1e-6)
    assert share > 0


def test_a_full_kernel_of_several_outputs_and_layers() -> None:
    """Blocks of K = 3 outputs, clipping norms of their own in two layers."""
    gradients = np.random.default_rng(0).normal(size=(2, 4, 3, 2))
    gradients[:, 1:] = -gradients[:, :1] + 0.1 * gradients[:, 1:]
    kernel = ntkdp.LayerwiseKernel(
        ("first", "second"), jnp.einsum("rikp,rjlp->rijkl", gradients, gradients)
    )
    rule = clipping.Abadi(jnp.array([0.1, 0.3]), scope="layerwise")
    labels = jnp.array([0, 0, 0, 1])
    found = counterexamples.find_rise(
        kernel, labels, losses.SoftmaxCrossEntropy(), rule, key=jax.random.key(0)
    )
    assert found is not None
    rate, share = by_hand(found)
    assert found.measured["loss_rate"] == pytest.approx(rate, rel=1e-9)
    assert share > 0
    assert Counterexample.from_json(found.to_json()) == found


@pytest.mark.parametrize("R", [1e-6, 1e6])
def test_the_search_does_not_depend_on_the_scale_of_the_clipping_norm(R: float) -> None:
    found = counterexamples.find_smallest_rise(clipping.Abadi(R), key=jax.random.key(1))
    assert found is not None
    assert len(found.outputs) == 3
    same = smallest_rise("abadi")
    assert same is not None
    assert found.measured["rise"] == pytest.approx(same.measured["rise"], abs=0.1)


def test_the_same_key_finds_the_same() -> None:
    again = counterexamples.find_smallest_rise(RULES["abadi"], key=jax.random.key(1))
    assert again == smallest_rise("abadi")


@examples(8, 20)
@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_the_rise_is_free_of_scale(length: float, distance: float) -> None:
    """Kernel and outputs scaled, the clipping norm with them."""
    found = smallest_rise("abadi")
    assert found is not None
    kernel = tuple(tuple(tuple(h * length**2 for h in row) for row in t) for t in found.kernel)
    outputs = tuple((f[0] * distance,) for f in found.outputs)
    scaled = dataclasses.replace(
        found, kernel=kernel, outputs=outputs, rule_options={"R": length * distance}
    )
    assert scaled.replay()["rise"] == pytest.approx(found.measured["rise"], rel=1e-9)


def every_kind() -> list[Counterexample]:
    found = [smallest_rise("global"), divergent("abadi layerwise"), stuck("abadi layerwise")]
    return [example for example in found if example is not None]


def test_data_survive_text_and_files(tmp_path: Path) -> None:
    for example in every_kind():
        path = tmp_path / "example.json"
        example.save(path)
        loaded = Counterexample.load(path)
        assert loaded == example
        assert loaded.measured == example.measured
        assert loaded.replay() == example.replay()
        assert hash(loaded) == hash(example)
        assert [p.name for p in tmp_path.iterdir()] == ["example.json"]
        text = str(example)
        assert example.kind in text
        assert example.rule in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version must be 1, got 2"),
        ({"version": None}, "version must be 1"),
        ({"colour": "red"}, "unknown field 'colour'"),
        ({"kinds": "rise"}, "did you mean 'kind'"),
        ({"kind": "fall"}, "unknown kind 'fall'"),
        ({"rule": "abadie"}, "did you mean 'abadi'"),
        ({"rule_options": {"Q": 1.0}}, "unknown rule_options 'Q'"),
        ({"rule_options": {"Z": 1.0}}, "missing rule_options.R"),
        ({"loss": "square"}, "did you mean 'squared_error'"),
        ({"rule_options": {"R": "1"}}, "rule_options.R"),
        ({"rule_options": {"R": -1.0}}, "R must be positive"),
        ({"kernel": [[[1.0, 2.0], [2.0, 1.0]]]}, "positive semi-definite"),
        ({"kernel": [[[1.0, 0.5], [0.0, 1.0]]]}, "symmetric"),
        ({"kernel": [[[1.0, 0.5], [0.0]]]}, "kernel.*rows of one length"),
        ({"kernel": []}, "kernel.*empty"),
        ({"kernel": [1.0]}, "kernel must hold terms"),
        ({"kernel": [[[1.0, 0.0], [0.0, 1.0]]] * 2}, "one with scope='flat'"),
        ({"outputs": [[0.0]]}, "initial must have shape"),
        ({"outputs": [[0.0], [True]]}, "numbers only"),
        ({"outputs": 3}, "JSON list, got int"),
        ({"scope": "global"}, "unknown scope"),
        ({"measured": {"rise": "high"}}, "measured.rise"),
    ],
)
def test_text_that_describes_nothing_is_refused(change: dict[str, Any], message: str) -> None:
    example = smallest_rise("global")
    assert example is not None
    data = json.loads(example.to_json()) | change
    with pytest.raises(ValueError, match=message):
        Counterexample.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"version": NaN}'])
def test_text_that_is_no_data_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="text must"):
        Counterexample.from_json(text)


def test_a_missing_field_is_named() -> None:
    example = smallest_rise("global")
    assert example is not None
    data = json.loads(example.to_json())
    del data["targets"]
    with pytest.raises(ValueError, match="missing field 'targets'"):
        Counterexample.from_json(json.dumps(data))


def test_bad_arguments_are_named() -> None:
    custom = clipping.Custom(lambda s: 1 / (1 + s), 1.0)
    key = jax.random.key(0)
    with pytest.raises(TypeError, match=r"rule must be one of .* got Custom"):
        counterexamples.find_smallest_rise(custom, key=key)
    with pytest.raises(TypeError, match="loss must be one of"):
        counterexamples.find_stuck(
            clipping.Abadi(1.0), losses.as_loss(lambda f, y: jnp.sum(f - y)), key=key
        )
    with pytest.raises(ValueError, match="max_samples must be at least 1"):
        counterexamples.find_smallest_rise(clipping.Abadi(1.0), key=key, max_samples=0)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        find_on_c7(clipping.Abadi(1.0), steps=0)
    with pytest.raises(ValueError, match="must be positive semi-definite"):
        find_on_c7(clipping.Abadi(1.0), -H7)
    with pytest.raises(ValueError, match="must be symmetric"):
        find_on_c7(clipping.Abadi(1.0), H7.at[0, 1].set(0.0))
    with pytest.raises(ValueError, match="LayerwiseKernel"):
        find_on_c7(clipping.Abadi(1.0, scope="layerwise"))
    with pytest.raises(ValueError, match="targets"):
        find_on_c7(clipping.Abadi(1.0), targets=jnp.zeros(4))
