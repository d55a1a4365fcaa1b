r"""Batches: which samples take part in a step.

==============  =====================================================  ============  ==============
class           a batch                                                share q of n  a sample takes
                                                                                     part
==============  =====================================================  ============  ==============
`Full`          all samples                                            1             in every step
`Poisson`       each sample by a coin of its own                       q             at random
`FixedSize`     so many samples, drawn without replacement             size / n      at random
`Cyclic`        one of k fixed parts, in turn                          1 / k         every k steps
`Shuffled`      one of k parts, drawn anew in each epoch of k steps    1 / k         once an epoch
==============  =====================================================  ============  ==============

Gradients are summed over a batch and divided by q n (mean) or by q (sum), so their mean over
batches is the gradient on all samples.
"""

import math
from abc import abstractmethod
from typing import TypeAlias, final

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ntkdp._backend import validate
from ntkdp._backend.types import Array, Float, PRNGKeyArray, PyTree

#: Chance per step that a Poisson batch outgrows the memory planned for it.
OVERFLOW_PROBABILITY = 1e-12

#: Which samples are drawn, ``(n,)``; None if all are.
Drawn: TypeAlias = Array | None


class Batches(eqx.Module):
    """How batches are drawn; subclasses are final.

    Examples
    --------
    >>> import jax, ntkdp
    >>> batches = ntkdp.batches.Cyclic(2)
    >>> drawn, _ = batches.draw(jax.random.key(0), 1, batches.start(4), 4)
    >>> drawn.tolist(), batches.share(4)
    ([False, True, False, True], 0.5)
    """

    @abstractmethod
    def share(self, n_samples: int) -> float:
        """The expected share q of the samples in a batch."""

    @abstractmethod
    def largest(self, n_samples: int, overflow: float = OVERFLOW_PROBABILITY) -> int:
        """The size that a batch has at most, but with a chance of ``overflow``."""

    def start(self, n_samples: int) -> PyTree:
        """What is carried from step to step, before the first."""
        return None

    @abstractmethod
    def draw(
        self, key: PRNGKeyArray, number: Array | int, carried: PyTree, n_samples: int
    ) -> tuple[Drawn, PyTree]:
        """The samples of a step, by its key and its number, and what is carried on."""

    def draw_places(
        self, key: PRNGKeyArray, number: Array | int, carried: PyTree, n_samples: int
    ) -> tuple[Array, Array, PyTree]:
        """The numbers of a step's samples in :meth:`largest` places, and which places are filled.

        Batches have the law of :meth:`draw`, but perhaps not the same samples for a key.

        Examples
        --------
        >>> import jax, ntkdp
        >>> batches = ntkdp.batches.FixedSize(2)
        >>> places, filled, _ = batches.draw_places(jax.random.key(0), 0, None, 10)
        >>> places.shape, filled.tolist()
        ((2,), [True, True])
        """
        n_places = self.largest(n_samples)
        drawn, carried = self.draw(key, number, carried, n_samples)
        if drawn is None:
            return jnp.arange(n_samples), jnp.ones(n_samples, bool), carried
        (places,) = jnp.nonzero(drawn, size=n_places, fill_value=0)
        return places, jnp.arange(n_places) < jnp.sum(drawn), carried

    @property
    def takes_all(self) -> bool:
        """Whether every batch has all samples."""
        return False

    @property
    def is_random(self) -> bool:
        """Whether other keys draw other batches."""
        return not self.takes_all

    def check(self, n_samples: int) -> None:
        """Raise if there are too few samples for a batch."""
        _check_size("a batch", 1, n_samples)

    def weights(self, drawn: Array, dtype: DTypeLike) -> Float[Array, " n"]:
        """Weights of the samples: one over the share for those that are drawn, else zero."""
        return drawn.astype(dtype) / self.share(drawn.shape[0])


@final
class Full(Batches):
    """All samples in every step.

    Examples
    --------
    >>> import ntkdp
    >>> ntkdp.batches.Full().share(10)
    1.0
    """

    def share(self, n_samples: int) -> float:
        """One."""
        return 1.0

    @property
    def takes_all(self) -> bool:
        """True."""
        return True

    def largest(self, n_samples: int, overflow: float = OVERFLOW_PROBABILITY) -> int:
        """All samples."""
        return n_samples

    def draw(
        self, key: PRNGKeyArray, number: Array | int, carried: PyTree, n_samples: int
    ) -> tuple[Drawn, PyTree]:
        """None: all samples."""
        return None, carried


@final
class Poisson(Batches):
    """Each sample with probability q, whatever the others do.

    Parameters
    ----------
    q : float
        In (0, 1].

    Examples
    --------
    >>> import ntkdp
    >>> ntkdp.batches.Poisson(0.25).share(10)
    0.25
    """

    q: float = eqx.field(static=True)

    def __init__(self, q: float) -> None:
        self.q = float(validate.scalar(q=validate.fraction(q=q)))

    def share(self, n_samples: int) -> float:
        """The rate q."""
        return self.q

    @property
    def takes_all(self) -> bool:
        """At a rate of one."""
        return self.q == 1

    def largest(self, n_samples: int, overflow: float = OVERFLOW_PROBABILITY) -> int:
        """A quantile of the binomial distribution."""
        if self.q >= 1:
            return n_samples
        from scipy.stats import binom

        return max(1, min(n_samples, int(binom.isf(overflow, n_samples, self.q))))

    def draw(
        self, key: PRNGKeyArray, number: Array | int, carried: PyTree, n_samples: int
    ) -> tuple[Drawn, PyTree]:
        """A coin for each sample."""
        if self.q >= 1:
            return None, carried
        return jax.random.bernoulli(key, self.q, (n_samples,)), carried

    def draw_places(
        self, key: PRNGKeyArray, number: Array | int, carried: PyTree, n_samples: int
    ) -> tuple[Array, Array, PyTree]:
        """The gaps between heads of the coins, which are geometric, in place of all coins."""
        if self.q >= 1:
            return super().draw_places(key, number, carried, n_samples)
        uniform = 1 - jax.random.uniform(key, (self.largest(n_samples),))
        gaps = jnp.floor(jnp.log(uniform) / math.log1p(-self.q))
        places = jnp.cumsum(jnp.minimum(gaps, n_samples).astype(jnp.int32) + 1) - 1
        filled = places < n_samples
        return jnp.where(filled, places, 0), filled, carried


@final
class FixedSize(Batches):
    """So many different samples, each set of them as likely as any other.

    Parameters
    ----------
    size : int
        At least 1 and at most n.

    Examples
    --------
    >>> import jax, ntkdp
    >>> batches = ntkdp.batches.FixedSize(3)
    >>> drawn, _ = batches.draw(jax.random.key(0), 0, None, 10)
    >>> int(drawn.sum())
    3
    """

    size: int = eqx.field(static=True)

    def __init__(self, size: int) -> None:
        self.size = validate.count(size=size)

    def check(self, n_samples: int) -> None:
        """Raise if a batch has more samples than there are."""
        _check_size("size", self.size, n_samples)

    def share(self, n_samples: int) -> float:
        """The size over n."""
        return self.size / n_samples

    def largest(self, n_samples: int, overflow: float = OVERFLOW_PROBABILITY) -> int:
        """The size."""
        return min(self.size, n_samples)

    def draw(
        self, key: PRNGKeyArray, number: Array | int, carried: PyTree, n_samples: int
    ) -> tuple[Drawn, PyTree]:
        """The first of a random order."""
        return _places(key, n_samples) < self.size, carried


class _Parts(Batches):
    """One of k parts of the samples in turn."""

    n_batches: int = eqx.field(static=True)

    def __init__(self, n_batches: int) -> None:
        self.n_batches = validate.count(n_batches=n_batches)

    def check(self, n_samples: int) -> None:
        """Raise if there are more batches than samples."""
        _check_size("n_batches", self.n_batches, n_samples)

    def share(self, n_samples: int) -> float:
        """One over k."""
        return 1 / self.n_batches

    @property
    def takes_all(self) -> bool:
        """If there is one batch."""
        return self.n_batches == 1

    def largest(self, n_samples: int, overflow: float = OVERFLOW_PROBABILITY) -> int:
        """The largest part."""
        return -(-n_samples // self.n_batches)


@final
class Cyclic(_Parts):
    """One of k fixed parts in turn: sample i in the steps i modulo k, modulo k.

    Parameters
    ----------
    n_batches : int
        k, at least 1 and at most n; an epoch has as many steps.

    Examples
    --------
    >>> import ntkdp
    >>> ntkdp.batches.Cyclic(4).largest(10)
    3
    """

    @property
    def is_random(self) -> bool:
        """False: the parts are fixed."""
        return False

    def draw(
        self, key: PRNGKeyArray, number: Array | int, carried: PyTree, n_samples: int
    ) -> tuple[Drawn, PyTree]:
        """The part whose turn it is."""
        if self.n_batches == 1:
            return None, carried
        return jnp.arange(n_samples) % self.n_batches == number % self.n_batches, carried


@final
class Shuffled(_Parts):
    """One of k parts in turn, into which the samples are divided at random in each epoch.

    Parameters
    ----------
    n_batches : int
        k, at least 1 and at most n; an epoch has as many steps.

    Examples
    --------
    >>> import jax, ntkdp
    >>> batches = ntkdp.batches.Shuffled(2)
    >>> first, carried = batches.draw(jax.random.key(0), 0, batches.start(4), 4)
    >>> second, carried = batches.draw(jax.random.key(1), 1, carried, 4)
    >>> (first ^ second).tolist()
    [True, True, True, True]
    """

    def start(self, n_samples: int) -> PyTree:
        """Places of the samples in the order of an epoch."""
        return jnp.arange(n_samples)

    def draw(
        self, key: PRNGKeyArray, number: Array | int, carried: PyTree, n_samples: int
    ) -> tuple[Drawn, PyTree]:
        """The part whose turn it is, in an order that is drawn at the beginning of an epoch."""
        if self.n_batches == 1:
            return None, carried
        turn = number % self.n_batches
        places = jnp.where(turn == 0, _places(key, n_samples), carried)
        return places % self.n_batches == turn, places


def _places(key: PRNGKeyArray, n_samples: int) -> Array:
    """The place of each sample in a random order."""
    return jax.random.permutation(key, n_samples)


def _check_size(name: str, size: int, n_samples: int) -> None:
    if size > n_samples:
        raise ValueError(f"{name} must be at most the {n_samples} samples, got {size}")


def resolve(batches: Batches | None, sample_rate: float) -> Batches:
    """Batches as they are given, or by a rate: full ones at one, or else Poisson sampling.

    Parameters
    ----------
    batches : Batches or None
        Given in place of a rate.
    sample_rate : float
        In (0, 1], and 1 if batches are given.

    Returns
    -------
    Batches
        Those that a run draws.

    Raises
    ------
    ValueError, TypeError
        If both are given, or one is not what it should be.

    Examples
    --------
    >>> from ntkdp import batches
    >>> type(batches.resolve(None, 1.0)).__name__, type(batches.resolve(None, 0.5)).__name__
    ('Full', 'Poisson')
    """
    rate = float(validate.scalar(sample_rate=validate.fraction(sample_rate=sample_rate)))
    if batches is None:
        return Full() if rate == 1 else Poisson(rate)
    if not isinstance(batches, Batches):
        raise TypeError(
            f"batches must be one of ntkdp.batches or None, got {type(batches).__name__}"
        )
    if rate != 1:
        raise ValueError(f"give batches or sample_rate, not both, got {batches!r} and {rate:g}")
    return batches
