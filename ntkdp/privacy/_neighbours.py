"""What neighbouring data sets differ in, by how batches are made."""

from ntkdp.batches import Batches, Cyclic, FixedSize, Shuffled
from ntkdp.batches import resolve as resolve_batches
from ntkdp.privacy._arguments import Sampling

_IN_WORDS: dict[Sampling, str] = {
    "poisson": "add or remove one sample",
    "fixed_size": "replace one sample",
}


def of_sampling(sampling: Sampling) -> str:
    """The relation that a way of sampling is counted for, in words."""
    return _IN_WORDS[sampling]


def neighbours(batches: Batches | None = None) -> str:
    """The relation of neighbouring data sets for which a run with such batches is private.

    Parameters
    ----------
    batches : batches.Batches, optional
        One of :mod:`ntkdp.batches`; by default full ones.

    Returns
    -------
    str
        With full batches and Poisson sampling, neighbours differ by adding or removing a sample; in
        batches of a fixed size by replacing it, which moves a sum twice as far; in cyclic and
        shuffled batches by leaving its place empty, so that the others keep their batches.

    Raises
    ------
    TypeError
        If they are no batches.

    Notes
    -----
    Figures for different relations are not comparable: replacing a sample is removing it and adding
    another, so that an epsilon for replacing promises more than the same for adding or removing.

    Examples
    --------
    >>> import ntkdp
    >>> ntkdp.privacy.neighbours(ntkdp.batches.FixedSize(64))
    'replace one sample'
    """
    made = resolve_batches(batches, 1.0)
    if isinstance(made, Cyclic | Shuffled):
        return "leave the place of one sample empty"
    return of_sampling("fixed_size" if isinstance(made, FixedSize) else "poisson")
