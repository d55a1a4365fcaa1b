"""Batches: how often each sample is drawn, and what is certain of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import binomtest, chi2, chisquare

from ntkdp import batches
from ntkdp.batches import Batches, Cyclic, FixedSize, Full, Poisson, Shuffled

N = 12
ALL = [Full(), Poisson(0.3), Poisson(1.0), FixedSize(4), Cyclic(3), Cyclic(5), Shuffled(3)]


def drawn(kind: Batches, steps: int, seed: int = 0) -> np.ndarray:
    """Which samples are drawn in each step, ``(steps, N)``."""
    keys = jax.random.split(jax.random.key(seed), steps)

    def step(carried: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        key, number = at
        mask, carried = kind.draw(key, number, carried, N)
        return carried, jnp.ones(N, bool) if mask is None else mask

    _, masks = jax.lax.scan(step, kind.start(N), (keys, jnp.arange(steps)))
    return np.asarray(masks)


@pytest.mark.parametrize("kind", ALL, ids=repr)
def test_each_sample_is_drawn_at_the_expected_share(kind: Batches) -> None:
    masks = drawn(kind, 3000)
    for count in masks.sum(0):
        p = binomtest(int(count), len(masks), kind.share(N)).pvalue if kind.share(N) < 1 else 1.0
        assert p > 1e-4
    assert masks.sum(1).max() <= kind.largest(N)
    assert kind.takes_all == bool(masks.all())


def test_sets_of_a_fixed_size_are_equally_likely() -> None:
    masks = drawn(FixedSize(2), 6600)
    assert np.all(masks.sum(1) == 2)
    pairs = masks.astype(int).T @ masks.astype(int)
    counts = pairs[np.triu_indices(N, 1)]
    assert chisquare(counts).pvalue > 1e-3


def test_cyclic_batches_take_each_sample_every_k_steps() -> None:
    masks = drawn(Cyclic(5), 20)
    np.testing.assert_array_equal(masks, np.arange(20)[:, None] % 5 == np.arange(N) % 5)


def test_shuffled_batches_divide_each_epoch_anew() -> None:
    masks = drawn(Shuffled(3), 300).reshape(100, 3, N)
    np.testing.assert_array_equal(masks.sum(1), 1)
    np.testing.assert_array_equal(masks.sum(2), 4)
    together = np.einsum("ekn,ekm->nm", masks.astype(float), masks.astype(float)) / 100
    # Two samples meet with probability 3 / 11: in a fixed division they would always or never.
    off = together[np.triu_indices(N, 1)]
    assert off.mean() == pytest.approx(3 / 11)
    assert 0.1 < off.min() < off.max() < 0.5


def test_weights_make_the_mean_over_batches_that_over_all_samples() -> None:
    values = np.random.default_rng(0).normal(size=N)
    for kind in (Cyclic(3), Shuffled(4)):
        masks = drawn(kind, 12)
        weights = np.asarray(jax.vmap(lambda m, kind=kind: kind.weights(m, jnp.float64))(masks))
        np.testing.assert_allclose((weights @ values).mean(), values.sum(), rtol=1e-12)


def test_a_rate_is_full_or_poisson() -> None:
    assert batches.resolve(None, 1.0) == Full()
    assert batches.resolve(None, 0.25) == Poisson(0.25)
    assert batches.resolve(Cyclic(2), 1.0) == Cyclic(2)
    with pytest.raises(ValueError, match=r"batches or sample_rate, not both"):
        batches.resolve(Cyclic(2), 0.5)


@pytest.mark.parametrize("kind", [FixedSize(13), Cyclic(13), Shuffled(13)], ids=repr)
def test_more_than_the_samples_is_refused(kind: Batches) -> None:
    with pytest.raises(ValueError, match=r"must be at most the 12 samples, got 13"):
        kind.check(N)


@pytest.mark.parametrize("make", [FixedSize, Cyclic, Shuffled])
def test_counts_are_checked(make: type[FixedSize]) -> None:
    with pytest.raises(ValueError, match=r"at least 1"):
        make(0)
    with pytest.raises(ValueError, match=r"q must be in"):
        Poisson(0.0)


def test_places_of_poisson_batches_are_coins_for_each_sample() -> None:
    """Heads of every sample and of every pair of neighbours, in 20,000 batches."""
    q, n, draws = 0.3, 8, 20_000
    one = batches.Poisson(q)
    keys = jax.random.split(jax.random.key(0), draws)
    places, filled, _ = jax.vmap(lambda key: one.draw_places(key, 0, None, n))(keys)
    assert places.shape == (draws, one.largest(n))
    drawn = np.zeros((draws, n), int)
    rows = np.broadcast_to(np.arange(draws)[:, None], places.shape)
    np.add.at(drawn, (rows[np.asarray(filled)], np.asarray(places)[np.asarray(filled)]), 1)
    assert drawn.max() == 1
    centred = (drawn - q) / (q * (1 - q)) ** 0.5
    heads = (centred.sum(0) ** 2 / draws).sum()
    pairs = (((centred[:, 1:] * centred[:, :-1]).sum(0)) ** 2 / draws).sum()
    sizes = ((drawn.sum(1) - n * q) ** 2).mean() / (n * q * (1 - q))
    assert 1e-3 < chi2.cdf(heads, n) < 1 - 1e-3
    assert 1e-3 < chi2.cdf(pairs, n - 1) < 1 - 1e-3
    assert abs(sizes - 1) < 4 * (2 / draws) ** 0.5


@pytest.mark.parametrize("one", [batches.Full(), batches.FixedSize(3), batches.Cyclic(4)], ids=repr)
def test_places_hold_the_samples_that_are_drawn(one: batches.Batches) -> None:
    key, n = jax.random.key(1), 8
    places, filled, _ = one.draw_places(key, 2, one.start(n), n)
    drawn, _ = one.draw(key, 2, one.start(n), n)
    expected = np.arange(n) if drawn is None else np.flatnonzero(np.asarray(drawn))
    assert np.asarray(places)[np.asarray(filled)].tolist() == expected.tolist()
    assert len(places) == one.largest(n)
