"""Claims C1-C21, C43 and C46 hold, and fail where the library is made wrong."""

from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from helpers import often_or_slow

from ntkdp import claims, clipping, privacy
from ntkdp._backend import norms as _norms
from ntkdp._gradients import per_sample
from ntkdp.dp_sgd import _algorithm
from ntkdp.gradient_flow import _kernel_flow, _kernel_matrix, _weight_flow
from ntkdp.ntk import _blocks
from ntkdp.spectrum import _dense
from ntkdp.stochastic_flow import Sampling


def changed(owner: Any, name: str, change: Callable[..., Any]) -> Callable[[Any], None]:
    """A mutation: what ``owner.name`` returns goes through ``change``, with its arguments."""
    original = getattr(owner, name)

    def mutant(*args: Any, **options: Any) -> Any:
        return change(original(*args, **options), *args)

    return lambda monkeypatch: monkeypatch.setattr(owner, name, mutant)


def replaced(owner: Any, name: str, value: Any) -> Callable[[Any], None]:
    return lambda monkeypatch: monkeypatch.setattr(owner, name, value)


def without_other_outputs(self: Any, a: Any) -> Any:
    """Norms from the diagonal of the K x K blocks alone."""
    if self.diagonal.ndim != 4:
        return FACTORS(self, a)
    block = self.diagonal * jnp.eye(self.diagonal.shape[-1])
    return FACTORS(eqx.tree_at(lambda flow: flow.diagonal, self, block), a)


def noise_of_one_size(noise: Any, self: Any, *args: Any) -> Any:
    """As if it did not scale with the sensitivity."""
    return jax.tree.map(lambda leaf: leaf / self.clipping.R, noise)


FACTORS = _kernel_flow.KernelFlow._factors
SIDE_BY_SIDE = _kernel_matrix._side_by_side
Algorithm, KernelFlow, WeightFlow = (
    _algorithm.Algorithm,
    _kernel_flow.KernelFlow,
    _weight_flow.WeightFlow,
)

MUTATIONS = {
    "no noise of sampling": (
        changed(Sampling, "of", lambda sampling, *_: Sampling(0.0, 0.0)),
        "C43",
    ),
    "no noise of sampling at a budget": (
        changed(Sampling, "of", lambda sampling, *_: Sampling(0.0, 0.0)),
        "C46",
    ),
    "noise of a budget as if batches were full": (
        replaced(privacy.Budget, "noise_multiplier", lambda self, steps, *_: steps**0.5 / self.mu),
        "C46",
    ),
    "kernel terms in reverse order": (
        changed(_blocks, "assemble", lambda terms, *_: terms[::-1]),
        "C1",
    ),
    "norms without the other outputs": (
        replaced(KernelFlow, "_factors", without_other_outputs),
        "C2",
    ),
    "factors on both sides": (
        replaced(
            _dense, "_operator", lambda terms, weights: _dense._congruent(terms[0], weights[0])
        ),
        "C3",
    ),
    "clip or drop": (
        replaced(clipping.Abadi, "_weight", lambda self, s, R: jnp.where(s <= R, 1.0, 0.0)),
        "C5",
    ),
    "gradients not clipped as a whole": (
        changed(
            Algorithm,
            "_clipped_sum_at_once",
            lambda out, *_: (jax.tree.map(lambda leaf: 2 * leaf, out[0]), *out[1:]),
        ),
        "C6",
    ),
    "norms of the engine five per cent too large": (
        changed(per_sample, "grouped_norms", lambda norms, *_: 1.05 * norms),
        "C6",
    ),
    "sums of the engine one per cent too large": (
        changed(per_sample, "weighted_sum", lambda total, *_: 1.01 * total),
        "C6",
    ),
    "mean of the weights' drift where the sum is asked for": (
        changed(
            WeightFlow, "velocity", lambda v, self, _: jax.tree.map(lambda g: g / len(self.x), v)
        ),
        "C6",
    ),
    "squares taken for norms": (replaced(_norms, "from_squares", lambda s: s), "C9"),
    "a factor of two": (changed(clipping.Abadi, "_weight", lambda factor, *_: factor / 2), "C10"),
    "noise that does not scale with R": (changed(Algorithm, "_noise", noise_of_one_size), "C11"),
    "layers in reverse order": (
        changed(
            _kernel_matrix,
            "_side_by_side",
            lambda matrix, terms, *rest: SIDE_BY_SIDE(terms[::-1], *rest),
        ),
        "C12",
    ),
    "one factor a sample under batch clipping": (
        replaced(clipping.Batch, "needs_total_norm", False),
        "C15",
    ),
    "nothing scaled under the global rule": (
        changed(clipping.Global, "_weight", lambda factor, *_: jnp.sign(factor)),
        "C18",
    ),
    "a drift one per cent too large": (
        changed(WeightFlow, "velocity", lambda v, *_: jax.tree.map(lambda g: 1.01 * g, v)),
        "C19",
    ),
}


@pytest.fixture
def fresh_programs() -> Iterator[None]:
    """No compiled program is taken over, neither into the test nor out of it."""
    for clear in (jax.clear_caches, eqx.clear_caches):
        clear()
    yield
    for clear in (jax.clear_caches, eqx.clear_caches):
        clear()


#: One of each kind, of claims that don't take long.
OFTEN = [
    "factors on both sides",
    "sums of the engine one per cent too large",
    "squares taken for norms",
    "a factor of two",
]


@pytest.mark.parametrize("mutation", often_or_slow(MUTATIONS, OFTEN))
def test_claim_fails_for_a_wrong_library(
    mutation: str, fresh_programs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate, name = MUTATIONS[mutation]
    mutate(monkeypatch)
    verdict = claims.verify(name)
    assert not verdict.holds, "\n".join(map(str, verdict.findings))
