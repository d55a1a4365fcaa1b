"""Clipped sums of per-sample gradients in factored form."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ntkdp._backend import norms as _norms
from ntkdp._backend.norms import Scaled
from ntkdp._backend.types import ApplyFn, Array, Float, Params
from ntkdp._gradients import groups as _groups
from ntkdp._gradients import per_sample as per_sample
from ntkdp.clipping import ClippingRule
from ntkdp.losses import Loss

#: Gradients summed over the samples of a device, leaf by leaf, to those of all devices.
Total = Callable[[list[Array]], list[Array]]


class ClippedSum(NamedTuple):
    """``sum_i C_i g_i`` leaf by leaf, outputs, and norms and factors ``(R, n)`` (flat: R = 1)."""

    leaves: list[Array]
    outputs: Array
    norms: Array
    factors: Array


def clipped_sum(
    apply_fn: ApplyFn,
    loss: Loss,
    rule: ClippingRule,
    groups: _groups.Groups,
    params: Params,
    x: Array,
    targets: Array,
    present: Array | None,
    total: Total,
) -> ClippedSum:
    """The sum over the samples that are present, or over all of them if ``present`` is None.

    A sample that is present but whose norm or factor is not finite is left out of the sum, if the
    rule bounds each sample; so is one whose weighted gradient the dtype cannot hold in this form,
    and its factor is then NaN. If ``present`` is None no sample is left out: a solver sees numbers
    that are not finite, and the ends of the range are not looked at.
    """
    outputs, factors = gradients(apply_fn, params, x, loss.output_gradient, targets)
    norms = per_sample.grouped_norms(factors, groups.leaf_to_group, groups.size, x.shape[0])
    usable = jnp.ones(x.shape[0], bool) if present is None else present
    drops = present is not None and rule.bounds_each_sample
    if drops:
        usable &= jnp.all(jnp.isfinite(norms), axis=0)
    # Zero times NaN is NaN: gradients that are dropped must be zero before they are weighted.
    factors = [per_sample.keep(factor, usable) for factor in factors]
    leaves = jax.tree.leaves(params)
    totals = None
    if rule.needs_total_norm:
        unclipped = weighted_sums(factors, jnp.ones_like(norms), groups, leaves)
        totals = norms_of_sum(total(unclipped), groups)
    bounded = jnp.where(usable, norms, 0.0)
    weights = rule.by_group(bounded, totals)
    counted = jnp.where(usable, weights, 0.0)
    if drops:
        is_lost = _lost(factors, counted, counted * bounded, groups)
        weights = jnp.where(is_lost, jnp.nan, weights)
        counted = jnp.where(jnp.all(jnp.isfinite(counted), axis=0) & ~is_lost, counted, 0.0)
    return ClippedSum(weighted_sums(factors, counted, groups, leaves), outputs, norms, weights)


def _lost(
    factors: list[per_sample.Factor],
    weights: Array,
    contributions: Array,
    groups: _groups.Groups,
) -> Array:
    """Which samples have a weighted gradient in some leaf that would lose its precision."""
    is_lost = jnp.zeros(weights.shape[1], bool)
    for factor, group in zip(factors, groups.leaf_to_group, strict=True):
        is_lost |= per_sample.loses_precision(factor, weights[group], contributions[group])
    return is_lost


def gradients(
    apply_fn: ApplyFn,
    params: Params,
    x: Array,
    output_gradient: Callable[..., Array],
    *args: Array,
) -> tuple[Array, list[per_sample.Factor]]:
    """Outputs and per-sample gradients in the form for norms and sums.

    ``output_gradient`` maps outputs ``(n, K)`` and ``args`` to :math:`a_i`, sample by sample.
    """
    structure = per_sample.trace(apply_fn, params, x)

    def cotangent(f_i: Array, *args_i: Array) -> Array:
        # The gradients keep the precision of the network, whatever that of the targets.
        return output_gradient(f_i[None], *[a[None] for a in args_i]).astype(f_i.dtype)

    outputs, factors = per_sample.factored(structure, params, x, cotangent, *args)
    return outputs, [per_sample.for_norms(factor) for factor in factors]


def weighted_sums(
    factors: list[per_sample.Factor], weights: Array, groups: _groups.Groups, leaves: list[Array]
) -> list[Array]:
    """Gradients of each leaf summed over the samples, weighted by ``(groups, n)``."""
    return [
        per_sample.weighted_sum(factor, weights[group], leaf)
        for factor, group, leaf in zip(factors, groups.leaf_to_group, leaves, strict=True)
    ]


def norms_of_sum(gradient: list[Array], groups: _groups.Groups) -> Float[Array, " groups"]:
    """Norm in each group of a gradient summed over the samples."""
    norms: list[Scaled] = [_norms.by_sample(leaf[None]) for leaf in gradient]
    return _norms.combined(norms, groups.leaf_to_group, groups.size)[:, 0]
