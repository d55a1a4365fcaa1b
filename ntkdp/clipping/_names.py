"""Clipping rules by the names that configurations use."""

from typing import Any

from ntkdp._backend import validate
from ntkdp.clipping._rule import ClippingRule
from ntkdp.clipping._rules import PSAC, Abadi, Automatic, Batch, Global, NoClipping

_CLASSES: dict[str, type[ClippingRule]] = {
    "none": NoClipping,
    "abadi": Abadi,
    "global": Global,
    "automatic": Automatic,
    "psac": PSAC,
    "batch": Batch,
}


def names() -> tuple[str, ...]:
    """The names of all rules, as :func:`from_name` takes them.

    Examples
    --------
    >>> import ntkdp
    >>> ntkdp.clipping.names()
    ('none', 'abadi', 'global', 'automatic', 'psac', 'batch')
    """
    return tuple(_CLASSES)


def class_of(rule: str) -> type[ClippingRule]:
    """The class of the rule called ``rule``.

    Raises
    ------
    ValueError
        If the name is not known; the message gives the nearest one.

    Examples
    --------
    >>> import ntkdp
    >>> ntkdp.clipping.class_of("abadi") is ntkdp.clipping.Abadi
    True
    """
    return validate.lookup(_CLASSES, rule=rule)


def name_of(rule: ClippingRule) -> str:
    """The name under which :func:`from_name` makes a rule like ``rule``.

    Raises
    ------
    TypeError
        If the rule has no name, as :class:`Custom` has none.

    Examples
    --------
    >>> import ntkdp
    >>> ntkdp.clipping.name_of(ntkdp.clipping.Abadi(1.0))
    'abadi'
    """
    for name, known in _CLASSES.items():
        if type(rule) is known:
            return name
    raise TypeError(
        f"rule must be one of {', '.join(sorted(_CLASSES))}, got {type(rule).__name__}: "
        "a function cannot be written down as data"
    )


def from_name(rule: str, **options: Any) -> ClippingRule:
    """The rule called ``rule``: none, abadi, global, automatic, psac or batch.

    ``options`` are the fields of the rule: R, scope and those of its own.

    Raises
    ------
    ValueError
        If the name is not known; the message gives the nearest one.

    Examples
    --------
    >>> import ntkdp
    >>> type(ntkdp.clipping.from_name("abadi", R=1.0)).__name__
    'Abadi'
    """
    return class_of(rule)(**options)
