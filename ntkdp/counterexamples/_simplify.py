"""A failure made plain: fewer samples, fewer layers, fewer digits."""

import dataclasses
from typing import NamedTuple

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

#: Leaving out and rounding may each cost half of the strength that the search reached.
_KEPT = 0.5
#: Numbers of significant digits to try; the last no longer changes a number.
_DIGITS = tuple(range(1, 18))


class Instance(NamedTuple):
    """Terms and outputs of all samples, and which samples take part."""

    terms: Array
    outputs: Array
    mask: Float[Array, " n"]


@eqx.filter_jit
def _strengths(problem: Problem, terms: Array, outputs: Array, masks: Array) -> Array:
    def score(mask: Array) -> Array:
        return problem.score(masked(terms, mask), outputs, mask)

    return jnp.asarray(lax.map(score, masks))


def strength(problem: Problem, instance: Instance) -> float:
    """The score of an instance."""
    return float(_strengths(problem, instance.terms, instance.outputs, instance.mask[None])[0])


def without_spare_samples(problem: Problem, instance: Instance) -> Instance:
    """The instance with samples left out one by one, each time the one that matters least."""
    enough = _KEPT * strength(problem, instance)
    everyone = np.eye(instance.mask.size)
    while True:
        without = np.maximum(np.asarray(instance.mask)[None] - everyone, 0)
        masks = jnp.asarray(without)
        strengths = np.asarray(_strengths(problem, instance.terms, instance.outputs, masks))
        # A sample that is already out must not be left out again.
        strengths = np.where(np.asarray(instance.mask) > 0, strengths, -np.inf)
        if not np.max(strengths) >= enough:
            return instance
        mask = masks[int(np.argmax(strengths))]
        instance = Instance(masked(instance.terms, mask), instance.outputs, mask)


def without_spare_layers(problem: Problem, instance: Instance) -> Instance:
    """The instance with layers left out while the rest is strong enough."""
    enough = _KEPT * strength(problem, instance)
    for r in range(instance.terms.shape[0]):
        fewer = instance._replace(terms=instance.terms.at[r].set(0.0))
        if strength(problem, fewer) >= enough:
            instance = fewer
    return instance


def rounded(problem: Problem, instance: Instance, *, kernel_too: bool) -> Instance:
    """The instance with as few digits as keep its strength and a positive definite kernel."""
    enough = _KEPT * strength(problem, instance)
    definite = _KEPT * _definiteness(instance)
    for digits in _DIGITS:
        terms = _significant(instance.terms, digits) if kernel_too else instance.terms
        shorter = Instance(terms, _significant(instance.outputs, digits), instance.mask)
        if strength(problem, shorter) >= enough and _definiteness(shorter) >= definite:
            return shorter
    return instance


def _definiteness(instance: Instance) -> float:
    return eigenvalue_ratio(_taking_part(instance)[0])


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
    """Equilibria near outputs, NaN where none is stable to first order, and terms."""
    terms = jax.vmap(problem.terms, in_axes=(0, None))(features, mask)
    # Products of short numbers are short; the error of binary multiplication is taken off.
    terms = _significant(terms, 15 if terms.dtype == jnp.float64 else 7)
    at, speeds, derivatives = (np.array(part) for part in _all_settled(problem, terms, outputs))
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
) -> Instance:
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
            return Instance(chosen, shorter, mask)
    return Instance(chosen, jnp.asarray(at[first]), mask)


def nearest(problem: Divergence, instance: Instance) -> Instance:
    """The instance with its outputs as near to fitting as they are still driven off."""
    enough = _KEPT * strength(problem, instance)
    for divisor in (1000.0, 500.0, 200.0, 100.0, 50.0, 20.0, 10.0, 5.0, 2.0):
        nearer = instance._replace(outputs=instance.outputs / divisor)
        if strength(problem, nearer) >= enough:
            return nearer
    return instance


def _taking_part(instance: Instance) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Terms of the samples and layers that take part, with the indices of both."""
    samples = np.flatnonzero(np.asarray(instance.mask))
    terms = np.asarray(instance.terms)[:, samples][:, :, samples]
    layers = np.flatnonzero(np.any(terms != 0, axis=tuple(range(1, terms.ndim))))
    return terms[layers], samples, layers


def as_data(kind: str, problem: Problem, instance: Instance) -> Counterexample:
    """The samples and layers that take part, as a counterexample with its measured numbers."""
    terms, samples, layers = _taking_part(instance)
    rule, rule_options = named(problem.rule)
    loss, loss_options = named_loss(problem.loss)
    several = {k: v for k, v in rule_options.items() if isinstance(v, tuple)}
    rule_options |= {k: tuple(v[r] for r in layers) for k, v in several.items()}
    example = Counterexample(
        kind=kind,
        kernel=as_numbers(terms),
        targets=as_numbers(problem.targets[samples]),
        outputs=as_numbers(instance.outputs[samples]),
        loss=loss,
        loss_options=loss_options,
        rule=rule,
        rule_options=rule_options,
        scope=problem.rule.scope,
    )
    return dataclasses.replace(example, measured=example.replay())
