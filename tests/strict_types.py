"""The run-time type checks of the tests, and when they are made."""

import functools
import types
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

#: Whole numbers pass for real ones, as in annotations.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))

_at_once = jaxtyping.jaxtyped
#: Functions inside of functions that were called with checks before, by their code.
_checked_inside: set[types.CodeType] = set()


def _at_first_call(function: Any, typechecker: Any) -> Any:
    if not isinstance(function, types.FunctionType):
        return _at_once(function, typechecker=typechecker)
    inside = "<locals>" in function.__qualname__
    checked: Callable[..., Any] | None = None

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal checked
        if checked is None:
            if inside and function.__code__ in _checked_inside:
                checked = function
            else:
                checked = _at_once(function, typechecker=typechecker)
                _checked_inside.add(function.__code__)
        return checked(*args, **kwargs)

    return called


def jaxtyped(*, typechecker: Any) -> Callable[[Any], Any]:
    """``jaxtyping.jaxtyped``, except that a check is written when it is first needed.

    To write one takes milliseconds. Most functions are not called in a process; and a function
    inside of another one is made anew at every call of that one, so that only the first of them is
    checked.
    """
    return lambda function: _at_first_call(function, typechecker)
