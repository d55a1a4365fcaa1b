"""The searches for states on which a clipped flow fails."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from ntkdp import losses
from ntkdp._backend import validate
from ntkdp._backend.types import Array, ArrayLike, Key
from ntkdp.clipping import ClippingRule, Global
from ntkdp.counterexamples._counterexample import (
    Counterexample,
    check_kernel,
    fails,
    named,
    named_loss,
    rounding_margin,
)
from ntkdp.counterexamples._families import (
    Divergence,
    Equilibrium,
    RiseOnKernel,
    RiseOverKernels,
    family,
)
from ntkdp.counterexamples._search import Problem, ascend, evolve, instances
from ntkdp.counterexamples._simplify import (
    Instance,
    as_data,
    equilibria,
    nearest,
    rounded,
    simplest_equilibrium,
    strength,
    without_spare_layers,
    without_spare_samples,
)
from ntkdp.gradient_flow import KernelFlow
from ntkdp.losses import Loss
from ntkdp.ntk import LayerwiseKernel

#: Every number of samples up to this one is tried, then all samples at once.
_SMALL = 5
#: How many of the best equilibria are integrated from, to see whether they hold.
_CANDIDATES = 4


def find_rise(
    kernel: Array | LayerwiseKernel,
    targets: ArrayLike,
    loss: Loss,
    rule: ClippingRule,
    *,
    key: Key[Array, ""],
    starts: int = 64,
    steps: int = 300,
) -> Counterexample | None:
    r"""Outputs at which the loss rises under the flow of a given kernel, :math:`dL/dt > 0`.

    Maximises, over the outputs, dL/dt divided by the most that it could be (``measured["rise"]``,
    in [-1, 1], without scale): first for a few samples, while the others count as fitted, then for
    all. The search is by gradient ascent, or by evolution for the 0/1 rule, which has no gradient.

    Parameters
    ----------
    kernel : array or LayerwiseKernel
        ``(n, n, K, K)``, ``(n, n)`` meaning ``(x) I_K``, or a LayerwiseKernel of either; symmetric
        and positive semi-definite.
    targets : array
        As the loss takes them.
    loss : Loss
        SquaredError, Huber, Logistic or SoftmaxCrossEntropy.
    rule : ClippingRule
        Any but Custom; ``scope="layerwise"`` needs a LayerwiseKernel.
    key : PRNG key
        The same key gives the same result.
    starts, steps : int
        Random starts (fewer for a large kernel), and steps from each. It takes a few seconds for a
        few samples, and time grows in proportion to the size of the kernel.

    Returns
    -------
    Counterexample or None
        The kernel of as few samples as it takes, with rounded outputs. None is not a proof that the
        loss cannot rise.

    Raises
    ------
    ValueError, TypeError
        If shapes do not fit, the matrix is no kernel, or the loss or rule has no name.

    Notes
    -----
    *Derived.* Two samples are not enough for abadi, automatic and PSAC; no number is enough for no
    clipping and for batch clipping.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ntkdp
    >>> example = ntkdp.counterexamples.find_rise(
    ...     jnp.ones((3, 3)) + 0.1 * jnp.eye(3), jnp.array([-3.0, 1.0, 1.0]),
    ...     ntkdp.losses.SquaredError(), ntkdp.clipping.Abadi(1.0), key=jax.random.key(0))
    >>> example.kind, len(example.outputs), example.replay()["loss_rate"] > 0
    ('rise', 3, True)
    """
    named(rule), named_loss(loss)
    flow = KernelFlow(kernel, targets, loss, rule, reduction="sum")
    if isinstance(kernel, LayerwiseKernel):
        terms = kernel.values if rule.scope == "layerwise" else kernel.total[None]
    else:
        terms = validate.array(kernel=kernel)[None]
    terms = terms.astype(jnp.result_type(float))
    check_kernel(terms)
    n_outputs = flow.n_outputs or max(2, int(jnp.max(flow.targets)) + 1)
    problem = RiseOnKernel(terms, flow.targets, loss, rule, n_outputs)
    n = terms.shape[1]
    starts = validate.count(starts=starts)
    starts = max(min(8, starts), min(starts, 2**22 // terms.size))

    def masks(m: int, key: Array) -> Array:
        keys = jax.random.split(key, starts)
        ranks = jax.vmap(lambda key: jax.random.permutation(key, n))(keys)
        return (ranks < m).astype(terms.dtype)

    sizes = sorted({*range(1, min(n, _SMALL) + 1), n})
    instance = _fewest_samples(problem, sizes, masks, steps, key)
    if instance is None:
        return None
    instance = without_spare_samples(problem, instance)
    instance = without_spare_layers(problem, instance)
    return as_data("rise", problem, rounded(problem, instance, kernel_too=False))


def find_smallest_rise(
    rule: ClippingRule,
    loss: Loss | None = None,
    *,
    max_samples: int = 5,
    key: Key[Array, ""],
    starts: int = 64,
    steps: int = 300,
) -> Counterexample | None:
    r"""A positive definite kernel and outputs at which the loss rises, with the fewest samples.

    Searches like :func:`find_rise`, but over kernels :math:`H_r = G_r G_r^\top` (plus a ridge) as
    well, for 1, 2, ... samples until the loss rises. Targets are zeros.

    Parameters
    ----------
    rule : ClippingRule
        Any but Custom. With ``scope="layerwise"`` there are as many layers as R has entries, or two
        if it is one number; layers that are not needed are dropped.
    loss : Loss, optional
        SquaredError by default, or Huber, Logistic, SoftmaxCrossEntropy (with two outputs).
    max_samples : int
        The largest number of samples to try.
    key, starts, steps
        As for :func:`find_rise`.

    Returns
    -------
    Counterexample or None
        With rounded numbers. None is not a proof.

    Notes
    -----
    *Derived*: for every rule with s w(s) non-decreasing, flat or layerwise, the least number is at
    least 3, because clipping is an odd monotone map, so that
    :math:`\langle g_1 + g_2, P(g_1) + P(g_2) \rangle \ge 0`; the 0/1 rule fails with 2.

    Examples
    --------
    >>> import jax, ntkdp
    >>> example = ntkdp.counterexamples.find_smallest_rise(
    ...     ntkdp.clipping.Global(1.0), key=jax.random.key(0))
    >>> len(example.outputs), example.holds()
    (2, True)
    """
    loss = losses.SquaredError() if loss is None else loss
    named(rule), named_loss(loss)
    max_samples, starts = validate.count(max_samples=max_samples), validate.count(starts=starts)
    n_groups = _n_groups(rule, 2)
    problem = family(RiseOverKernels, loss, rule, max_samples, n_groups, max_samples)

    def masks(m: int, key: Array) -> Array:
        return _first_samples(m, max_samples, starts)

    instance = _fewest_samples(problem, range(1, max_samples + 1), masks, steps, key)
    if instance is None:
        return None
    instance = without_spare_layers(problem, instance)
    return as_data("rise", problem, rounded(problem, instance, kernel_too=True))


def find_divergent(
    rule: ClippingRule,
    loss: Loss | None = None,
    *,
    max_samples: int = 4,
    key: Key[Array, ""],
    starts: int = 64,
    steps: int = 300,
) -> Counterexample | None:
    r"""Positive definite layers and outputs from which the loss grows without bound.

    Looks, far from fitting, for kernels that drive the outputs of every sample further up its loss.
    There the clipped gradients no longer depend on the distance, so the drift lasts. This is then
    checked: the flow is integrated until it has moved by a hundred times the norm of the outputs;
    the loss must have grown fiftyfold and the speed must not have halved. A divergence in which
    some samples stay behind is not sought.

    Parameters
    ----------
    rule : ClippingRule
        Any but Custom; flat rules give None under a frozen kernel and one output.
    loss, max_samples, key, starts, steps
        As for :func:`find_smallest_rise`.

    Returns
    -------
    Counterexample or None
        None is not a proof.

    Notes
    -----
    *Derived.* With flat scope and one output, :math:`C a` is the gradient of a Huber-like version
    of each sample's loss, which always decreases: there is no divergence.

    Examples
    --------
    >>> import jax, ntkdp
    >>> rule = ntkdp.clipping.Abadi(1.0, scope="layerwise")
    >>> example = ntkdp.counterexamples.find_divergent(rule, key=jax.random.key(0))
    >>> len(example.outputs), example.holds()
    (3, True)
    """
    loss = losses.SquaredError() if loss is None else loss
    named(rule), named_loss(loss)
    max_samples, starts = validate.count(max_samples=max_samples), validate.count(starts=starts)
    problem = family(Divergence, loss, rule, max_samples, _n_groups(rule, 2), max_samples)

    def masks(m: int, key: Array) -> Array:
        return _first_samples(m, max_samples, starts)

    instance = _fewest_samples(problem, range(1, max_samples + 1), masks, steps, key)
    if instance is None:
        return None
    instance = without_spare_layers(problem, instance)
    instance = rounded(problem, nearest(problem, instance), kernel_too=True)
    example = as_data("divergence", problem, instance)
    return example if fails("divergence", example.measured) else None


def find_stuck(
    rule: ClippingRule,
    loss: Loss | None = None,
    *,
    max_samples: int = 3,
    key: Key[Array, ""],
    starts: int = 128,
    steps: int = 300,
) -> Counterexample | None:
    r"""A kernel that is positive definite as a whole, and outputs where the flow still stops.

    Looks for outputs with :math:`\sum_r H_r C_r a = 0` and non-zero loss, over kernels whose layers
    have one weight each (more if R has fewer entries than there are samples). Only stable
    equilibria are kept: no eigenvalue of the velocity's derivative is above zero, and a flow from
    nearby ends nearby.

    Parameters
    ----------
    rule : ClippingRule
        Any but Custom. Flat rules whose factors are positive give None: there the velocity vanishes
        with the loss's gradient alone. The 0/1 rule stops at once when every sample is dropped.
    loss, max_samples, key, starts, steps
        As for :func:`find_smallest_rise`.

    Returns
    -------
    Counterexample or None
        None is not a proof.

    Notes
    -----
    *Derived.*

    Examples
    --------
    >>> import jax, ntkdp
    >>> rule = ntkdp.clipping.Abadi(1.0, scope="layerwise")
    >>> example = ntkdp.counterexamples.find_stuck(rule, max_samples=2, key=jax.random.key(0))
    >>> len(example.outputs), example.measured["loss"] > 0, example.holds()
    (2, True, True)
    """
    loss = losses.SquaredError() if loss is None else loss
    named(rule), named_loss(loss)
    max_samples, starts = validate.count(max_samples=max_samples), validate.count(starts=starts)
    steps, key = validate.count(steps=steps), validate.key(key=key)
    n_groups = _n_groups(rule, max_samples)
    problem = family(Equilibrium, loss, rule, max_samples, n_groups, -(-max_samples // n_groups))
    search = evolve if isinstance(rule, Global) else ascend
    for m in range(1, max_samples + 1):
        key, now = jax.random.split(key)
        masks = _first_samples(m, max_samples, starts)
        mask = masks[0]
        parameters, scores = search(problem, masks, steps, now)
        outputs = instances(problem, parameters, masks)[1]
        features = problem.features(parameters[0])
        resting, _ = equilibria(problem, features, outputs, mask)
        ranked = [i for i in np.argsort(-np.asarray(scores)) if np.isfinite(resting[i]).all()]
        for best in ranked[:_CANDIDATES]:
            instance = simplest_equilibrium(problem, features[best], resting[best], mask)
            example = as_data("stuck", problem, instance)
            if fails("stuck", example.measured):
                return example
    return None


def _n_groups(rule: ClippingRule, default: int) -> int:
    if rule.scope == "flat":
        return 1
    return np.shape(rule.R)[0] if np.ndim(rule.R) else default


def _first_samples(m: int, n: int, starts: int) -> Array:
    """Masks that let the first ``m`` of ``n`` samples take part."""
    return jnp.asarray(np.tile(np.arange(n) < m, (starts, 1)), jnp.result_type(float))


def _fewest_samples(
    problem: Problem,
    sizes: Iterable[int],
    masks: Callable[[int, Array], Array],
    steps: int,
    key: Array,
) -> Instance | None:
    """The best instance with the fewest samples among those that fail."""
    steps, key = validate.count(steps=steps), validate.key(key=key)
    search = evolve if isinstance(problem.rule, Global) else ascend
    for size in sizes:
        key, now, subsets = jax.random.split(key, 3)
        taking_part = masks(size, subsets)
        parameters, scores = search(problem, taking_part, steps, now)
        terms, outputs = instances(problem, parameters, taking_part)
        best = int(np.argmax(scores))
        instance = Instance(terms[best], outputs[best], taking_part[best])
        if strength(problem, instance) > rounding_margin():
            return instance
    return None
