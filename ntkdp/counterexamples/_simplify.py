"""Making a failure plain: fewer samples, fewer layers, fewer digits."""

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ntkdp._backend.types import Array, Float
from ntkdp.counterexamples._counterexample import (
    Counterexample,
    as_numbers,
    eigenvalue_ratio,
    named,
    named_loss,
    rest_margin,
    rounding_margin,
)
from ntkdp.counterexamples._families import Divergence, Equilibrium, masked
from ntkdp.counterexamples._search import Problem
from ntkdp.counterexamples._state import measured_state, settled

#: Reduction and rounding may each cost half of the strength that the search found.
_KEPT = 0.5
#: Significant digits to try; with the last, rounding no longer changes a number.
_DIGITS = tuple(range(1, 18))


class Found(NamedTuple):
    """An instance among masked samples."""

    terms: Array
    outputs: Array
    mask: Float[Array, " n"]


@eqx.filter_jit
def _strengths(problem: Problem, terms: Array, outputs: Array, masks: Array) -> Array:
    return lax.map(lambda mask: problem.score(masked(terms, mask), outputs, mask), masks)


def strength(problem: Problem, found: Found) -> float:
    return float(_strengths(problem, found.terms, found.outputs, found.mask[None])[0])


def without_spare_samples(problem: Problem, found: Found) -> Found:
    """Samples left out one by one, each time the one that is missed least."""
    enough = _KEPT * strength(problem, found)
    everyone = np.eye(found.mask.size)
    while True:
        without = np.maximum(np.asarray(found.mask)[None] - everyone, 0)
        masks = jnp.asarray(without)
        strengths = np.asarray(_strengths(problem, found.terms, found.outputs, masks))
        # A sample that is already out would be left out again.
        strengths = np.where(np.asarray(found.mask) > 0, strengths, -np.inf)
        if not np.max(strengths) >= enough:
            return found
        mask = masks[int(np.argmax(strengths))]
        found = Found(masked(found.terms, mask), found.outputs, mask)


def without_spare_layers(problem: Problem, found: Found) -> Found:
    """Layers left out while what is left is strong enough."""
    enough = _KEPT * strength(problem, found)
    for r in range(found.terms.shape[0]):
        fewer = found._replace(terms=found.terms.at[r].set(0.0))
        if strength(problem, fewer) >= enough:
            found = fewer
    return found


def rounded(problem: Problem, found: Found, *, kernel_too: bool) -> Found:
    """As few significant digits as keep the strength and the kernel positive definite."""
    enough = _KEPT * strength(problem, found)
    definite = _KEPT * _definiteness(found)
    for digits in _DIGITS:
        terms = _significant(found.terms, digits) if kernel_too else found.terms
        shorter = Found(terms, _significant(found.outputs, digits), found.mask)
        if strength(problem, shorter) >= enough and _definiteness(shorter) >= definite:
            return shorter
    return found


def _definiteness(found: Found) -> float:
    return eigenvalue_ratio(_taking_part(found)[0])


def _significant(values: Array, digits: int) -> Array:
    shorter = [float(f"{value:.{digits - 1}e}") for value in np.asarray(values).ravel().tolist()]
    return jnp.asarray(shorter, values.dtype).reshape(values.shape)


@eqx.filter_jit
def _all_settled(problem: Equilibrium, terms: Array, outputs: Array) -> tuple[Array, Array, Array]:
    settle = jax.vmap(settled, in_axes=(0, None, None, None, 0))
    return settle(terms, problem.targets, problem.loss, problem.rule, outputs)


def equilibria(
    problem: Equilibrium, features: Array, outputs: Array, mask: Array
) -> tuple[np.ndarray, Array]:
    """Equilibria near outputs, NaN where there is none that holds to first order; and terms."""
    terms = jax.vmap(problem.terms, in_axes=(0, None))(features, mask)
    # Products of short numbers are short; what binary multiplication adds is taken off.
    terms = _significant(terms, 15 if terms.dtype == jnp.float64 else 7)
    at, speeds, derivatives = (np.array(found) for found in _all_settled(problem, terms, outputs))
    for i, derivative in enumerate(derivatives):
        holds = speeds[i] <= rest_margin() and np.all(np.isfinite(derivative))
        if holds:
            growth = np.max(np.linalg.eigvals(derivative).real)
            holds = growth <= rounding_margin() * np.linalg.norm(derivative)
        if not holds:
            at[i] = np.nan
    return at, terms


def simplest_equilibrium(
    problem: Equilibrium, features: Array, outputs: np.ndarray, mask: Array
) -> Found:
    """Features and outputs with as few digits as leave an equilibrium."""
    choices = jnp.stack([_significant(features, digits) for digits in _DIGITS])
    starts = jnp.tile(jnp.asarray(outputs), (len(_DIGITS), 1, 1))
    at, terms = equilibria(problem, choices, starts, mask)
    first = int(np.argmax(np.isfinite(at).all(axis=(1, 2))))
    chosen = jnp.asarray(terms[first])
    for digits in _DIGITS:
        shorter = _significant(jnp.asarray(at[first]), digits)
        state = measured_state(chosen, problem.targets, problem.loss, problem.rule, shorter)
        if float(state.speed()) <= rest_margin():
            return Found(chosen, shorter, mask)
    return Found(chosen, jnp.asarray(at[first]), mask)


def nearest(problem: Divergence, found: Found) -> Found:
    """As near to fitting as the outputs are still driven off."""
    enough = _KEPT * strength(problem, found)
    for divisor in (1000.0, 500.0, 200.0, 100.0, 50.0, 20.0, 10.0, 5.0, 2.0):
        nearer = found._replace(outputs=found.outputs / divisor)
        if strength(problem, nearer) >= enough:
            return nearer
    return found


def _taking_part(found: Found) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Terms of the samples and layers that take part, which samples, and which layers."""
    samples = np.flatnonzero(np.asarray(found.mask))
    terms = np.asarray(found.terms)[:, samples][:, :, samples]
    layers = np.flatnonzero(np.any(terms != 0, axis=tuple(range(1, terms.ndim))))
    return terms[layers], samples, layers


def as_data(kind: str, problem: Any, found: Found) -> Counterexample:
    """The instance without what does not take part, with its measured numbers."""
    terms, samples, layers = _taking_part(found)
    rule, rule_options = named(problem.rule)
    loss, loss_options = named_loss(problem.loss)
    several = {k: v for k, v in rule_options.items() if isinstance(v, tuple)}
    rule_options |= {k: tuple(v[r] for r in layers) for k, v in several.items()}
    example = Counterexample(
        kind=kind,
        kernel=as_numbers(terms),
        targets=as_numbers(problem.targets[samples]),
        outputs=as_numbers(found.outputs[samples]),
        loss=loss,
        loss_options=loss_options,
        rule=rule,
        rule_options=rule_options,
        scope=problem.rule.scope,
    )
    return dataclasses.replace(example, measured=example.replay())
