"""The claims on accounting hold, and fail where the library is made wrong."""

from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkdp import claims, clipping, privacy
from ntkdp.dp_sgd._algorithm import Algorithm
from ntkdp.privacy import _bounds, _report


def told(verdict: claims.Verdict) -> str:
    return "\n".join(f"{'holds' if f.holds else 'FAILS'}: {f}" for f in verdict.findings)


@pytest.fixture
def forget() -> Iterator[Callable[[], None]]:
    """Compiled programs do not see a patch: forget them before and after."""

    def clear() -> None:
        jax.clear_caches()
        eqx.clear_caches()

    clear()
    yield clear
    clear()


def halved_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Algorithm._noise
    monkeypatch.setattr(
        Algorithm, "_noise", lambda *a: jax.tree.map(lambda leaf: leaf / 2, real(*a))
    )


def norms_summed_not_squared(monkeypatch: pytest.MonkeyPatch) -> None:
    real = clipping.ClippingRule.sensitivity

    def sensitivity(self: Any, n_groups: int = 1) -> Any:
        if self.scope == "flat":
            return real(self, n_groups)
        return jnp.sum(jnp.asarray(self.group_norms(n_groups)))

    monkeypatch.setattr(clipping.ClippingRule, "sensitivity", sensitivity)


def noise_per_group_without_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    real = clipping.ClippingRule.group_norms
    monkeypatch.setattr(
        clipping.ClippingRule, "group_norms", lambda self, n: real(self, n) / np.sqrt(n)
    )


def no_amplification(monkeypatch: pytest.MonkeyPatch) -> None:
    real = _bounds.delta_of
    monkeypatch.setattr(
        _bounds, "delta_of", lambda mechanism, *rest: real(mechanism._replace(q=1.0), *rest)
    )


def limit_for_a_guarantee(monkeypatch: pytest.MonkeyPatch) -> None:
    real = privacy.gaussian_dp
    monkeypatch.setattr(
        _report,
        "gaussian_dp",
        lambda *a, **k: privacy.GaussianDP(real(*a).mu, real(*a).epsilon, True),
    )


def accountant_of_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    real = privacy.gaussian_dp
    monkeypatch.setattr(
        _bounds,
        "epsilon_of",
        lambda steps, delta, *rest: real(steps[0].sigma, steps[0].q, steps[0].steps, delta).epsilon,
    )


def shares_of_groups_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def shares(self: Any, norms: Any, noise_per_group: bool = False) -> Any:
        clipped = self.by_group(norms) * norms / self.sensitivity(norms.shape[0])
        return jnp.sum(jnp.nan_to_num(clipped), axis=0)

    monkeypatch.setattr(clipping.ClippingRule, "shares", shares)


def shares_before_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    def shares(self: Any, norms: Any, noise_per_group: bool = False) -> Any:
        return jnp.linalg.norm(norms, axis=0) / self.sensitivity(norms.shape[0])

    monkeypatch.setattr(clipping.ClippingRule, "shares", shares)


def all_iterates_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        privacy, "last_iterate", lambda sigma, *rest, **a: privacy.gaussian_dp(sigma, 1.0, *rest)
    )


def contraction_squared(monkeypatch: pytest.MonkeyPatch) -> None:
    real = privacy.last_iterate
    monkeypatch.setattr(
        privacy,
        "last_iterate",
        lambda *given, contraction: real(*given, contraction=contraction**2),
    )


@pytest.mark.parametrize(
    ("name", "mutate"),
    [
        pytest.param("C30", norms_summed_not_squared, marks=pytest.mark.slow),
        pytest.param("C30", noise_per_group_without_its_share, marks=pytest.mark.slow),
        pytest.param("C30", no_amplification, marks=pytest.mark.slow),
        ("C31", limit_for_a_guarantee),
        ("C31", accountant_of_the_limit),
        pytest.param("C32", halved_noise, marks=pytest.mark.slow),
        ("C44", shares_of_groups_added_up),
        pytest.param("C44", shares_before_clipping, marks=pytest.mark.slow),
        ("C45", all_iterates_seen),
        pytest.param("C45", contraction_squared, marks=pytest.mark.slow),
        pytest.param("C45", halved_noise, marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_claim_fails_where_the_library_is_wrong(
    name: str,
    mutate: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
    forget: Callable[[], None],
) -> None:
    mutate(monkeypatch)
    assert not claims.verify(name).holds
    monkeypatch.undo()
