"""The checks of types that the tests run with, which are written late."""

from collections.abc import Callable
from typing import cast

import pytest
import strict_types
from jaxtyping import TypeCheckError


def checked(function: Callable[..., object]) -> Callable[..., object]:
    return strict_types.jaxtyped(typechecker=strict_types.check)(function)


@checked
def half(number: float) -> float:
    return number / 2


def test_every_call_of_a_function_is_checked() -> None:
    for _ in range(2):
        assert half(3) == 1.5
        with pytest.raises(TypeCheckError, match="number"):
            half("3")


def test_the_first_of_the_functions_inside_of_one_is_checked() -> None:
    def made(wrong: bool) -> Callable[..., object]:
        @checked
        def inside(number: int) -> int:
            return cast(int, str(number)) if wrong else number

        return inside

    never_called = made(True)
    with pytest.raises(TypeCheckError, match="return"):
        made(True)(1)
    assert made(True)(1) == "1"
    assert never_called(2) == "2"
