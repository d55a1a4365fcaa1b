"""Checks of arguments: what passes unchanged, and messages with the argument's name and value."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkdp._backend import validate

BAD_NUMBERS = [np.nan, np.inf, -np.inf, -1.0]


@pytest.mark.parametrize(
    ("check", "good", "bad", "requirement"),
    [
        (
            validate.positive,
            [1, 0.5, np.float32(2), np.array([1.0, 2.0]), jnp.ones(3), jnp.ones(2, jnp.bfloat16)],
            [0, 0.0, *BAD_NUMBERS, np.array([1.0, 0.0])],
            "positive and finite",
        ),
        (
            validate.non_negative,
            [0, 0.0, 3, np.zeros(2)],
            [*BAD_NUMBERS, np.array([1.0, -1e-300])],
            "at least 0 and finite",
        ),
        (validate.fraction, [1, 1.0, 1e-300], [0.0, 1.0000001, *BAD_NUMBERS], r"in \(0, 1\]"),
    ],
)
def test_numbers(check: Any, good: list[Any], bad: list[Any], requirement: str) -> None:
    for value in good:
        assert check(argument=value) is value
    for value in bad:
        with pytest.raises(ValueError, match=f"^argument must be {requirement}, got") as info:
            check(argument=value)
        assert repr(value) in str(info.value)


@pytest.mark.parametrize("check", [validate.positive, validate.non_negative, validate.fraction])
@pytest.mark.parametrize("value", ["1", None, True, 1j, [1, "a"], {}, np.array([True])])
def test_what_is_not_a_number(check: Any, value: Any) -> None:
    with pytest.raises(TypeError, match=r"^argument must be a (real )?number") as info:
        check(argument=value)
    assert repr(value) in str(info.value)


def test_traced_numbers_are_checked_when_they_are_known() -> None:
    @eqx.filter_jit
    def double(value: jax.Array) -> jax.Array:
        return 2 * validate.positive(rate=value)

    np.testing.assert_array_equal(double(jnp.array([1.0, 2.0])), [2.0, 4.0])
    for bad in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(RuntimeError, match="rate must be positive and finite"):
            double(jnp.array([1.0, bad]))


def test_counts() -> None:
    for number, value in ((1, 1), (7, np.int64(7)), (3, jnp.array(3))):
        counted = validate.count(steps=value)
        assert type(counted) is int
        assert counted == number
    for low in (0, -2):
        with pytest.raises(ValueError, match=f"^steps must be at least 1, got {low}$"):
            validate.count(steps=low)
    for wrong in (1.0, "3", None, True, False, np.array([1, 2])):
        for minimum in (0, 1):
            with pytest.raises(TypeError, match=r"^steps must be a whole number, got") as info:
                validate.count(minimum, steps=wrong)
            assert repr(wrong) in str(info.value)


def test_counts_from_zero() -> None:
    for value in (0, np.int64(0), jnp.array(0), 3):
        counted = validate.count(0, n_test=value)
        assert type(counted) is int
        assert counted == int(value)
    with pytest.raises(ValueError, match=r"^n_test must be at least 0, got -1$"):
        validate.count(0, n_test=-1)


def test_finite_says_which_leaf() -> None:
    tree = {"a": jnp.ones(3), "b": [np.array([1.0, np.nan, np.inf]), jax.random.key(0)]}
    with pytest.raises(ValueError, match=r"^params\['b'\]\[0\] must be finite, got 2 .* of 3"):
        validate.finite(params=tree)
    fine = {"a": jnp.ones(3), "key": jax.random.key(0), "labels": np.arange(2)}
    assert validate.finite(params=fine) is fine
    with pytest.raises(ValueError, match=r"^x must be finite, got 1 NaN or infinite of 1"):
        validate.finite(x=jnp.array(jnp.nan, jnp.bfloat16))
    half_nan = jax.jit(lambda x: validate.finite(x=x))(jnp.array([1.0, np.nan]))
    assert np.isnan(half_nan[1])  # a traced value is not looked at


@pytest.mark.parametrize(
    ("times", "match"),
    [
        ([0.0, 1.0, 1.0], r"got times\[1\] = 1.0 before times\[2\] = 1.0"),
        ([0.0, 2.0, 1.0], r"got times\[1\] = 2.0 before times\[2\] = 1.0"),
        ([0.0], r"two or more, got shape=\(1,\)"),
        ([], r"two or more, got shape=\(0,\)"),
        (1.0, r"two or more, got shape=\(\)"),
        ([[0.0, 1.0]], r"got shape=\(1, 2\)"),
        ([0.0, np.nan, 1.0], "times must be finite, got"),
        ([0.0, np.inf], "times must be finite, got"),
    ],
)
def test_times_that_do_not_increase(times: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        validate.increasing(times=np.array(times))


def _increasing(times: jax.Array) -> jax.Array:
    return 1 * validate.increasing(times=times)


def test_increasing_times() -> None:
    times = np.array([-1.0, 0.0, 1e-9])
    assert validate.increasing(times=times) is times
    check: Callable[..., Any] = eqx.filter_jit(_increasing)
    np.testing.assert_array_equal(check(jnp.array(times)), times)
    with pytest.raises(RuntimeError, match="times must be strictly increasing"):
        check(jnp.array([1.0, 1.0]))


def test_choices() -> None:
    assert validate.choice(("mean", "sum"), reduction="sum") == "sum"
    with pytest.raises(
        ValueError, match=r"^unknown reduction 'Men'; did you mean 'mean'. known: m"
    ):
        validate.choice(("mean", "sum"), reduction="Men")
    with pytest.raises(ValueError, match=r"^unknown reduction 'xyzzy'; known: mean, sum$"):
        validate.choice(("mean", "sum"), reduction="xyzzy")
    with pytest.raises(ValueError, match=r"^unknown reduction 3"):
        validate.choice({"mean": 1}, reduction=3)


def test_exactly_one_argument_is_named() -> None:
    with pytest.raises(ValueError, match="unpack"):
        validate.positive(a=1, b=2)
