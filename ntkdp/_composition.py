"""Privacy of several mechanisms one after another."""

from collections.abc import Iterable

from ntkdp import _accounting
from ntkdp._backend import validate
from ntkdp._mechanism import ACCOUNTANTS, Accountant, mechanism, probability


def composed_epsilon(
    mechanisms: Iterable[tuple[float, float, int]],
    delta: float,
    accountant: Accountant = "pld",
) -> float:
    r"""Epsilon of several pieces of DP-SGD on the same data, one after another: an upper bound.

    With full batches, exactly that of :math:`\mu`-GDP with :math:`\mu^2 = \sum_p K_p/\sigma_p^2`.

    Parameters
    ----------
    mechanisms : sequence of (noise_multiplier, sample_rate, steps)
        :math:`\sigma_p`, :math:`q_p` and :math:`K_p` of each piece, as for :func:`epsilon`;
        ``phase.mechanism(sample_rate)`` is that of a :class:`ntkdp.Phase`. Their order does not
        matter.
    delta, accountant
        As for :func:`epsilon`.

    Returns
    -------
    float
        For neighbours by adding or removing one sample, in :func:`epsilon`'s tolerance. Falls as a
        piece's noise multiplier or delta grows, and grows with its sampling rate and steps.

    Raises
    ------
    ValueError, TypeError
        An argument out of its range, or no mechanism.

    Notes
    -----
    A later piece may be chosen by the outcome of an earlier one, but its noise, sampling rate and
    number of steps must be settled beforehand. PLD: Doroshenko et al. 2207.04380; RDP: Mironov et
    al. 1908.10530; Gaussian: Dong, Roth, Su 1905.02383.

    Examples
    --------
    >>> import ntkdp
    >>> probing, tuning = (20.0, 1.0, 100), (40.0, 1.0, 1200)
    >>> round(ntkdp.privacy.composed_epsilon([probing, tuning], 1e-5), 3)
    4.377
    """
    if not isinstance(mechanisms, Iterable):
        raise TypeError(
            "mechanisms must be a sequence of (noise_multiplier, sample_rate, steps), "
            f"got {mechanisms!r}"
        )
    pieces = []
    for piece in mechanisms:
        if not isinstance(piece, tuple | list) or len(piece) != 3:
            raise ValueError(
                "mechanisms must hold (noise_multiplier, sample_rate, steps) of each piece, "
                f"got {piece!r}"
            )
        pieces.append(mechanism(*piece))
    if not pieces:
        raise ValueError("mechanisms must hold at least one piece, got none")
    delta = probability(delta=delta)
    validate.choice(ACCOUNTANTS, accountant=accountant)
    return _accounting.composed_epsilon_of(pieces, delta, accountant)
