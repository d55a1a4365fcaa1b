"""Measurements behind the computed table: random instances, trajectories and a circling network."""

import functools
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ntkdp import clipping, losses, ntk, spectrum
from ntkdp._backend import decompositions
from ntkdp._backend.types import Array, Float, Key, Params, PRNGKeyArray
from ntkdp.clipping import ClippingRule
from ntkdp.gradient_flow import KernelFlow, WeightFlow, recursion
from ntkdp.losses import Loss
from ntkdp.ntk import LayerwiseKernel

#: Number of random states over which the worst case of each "yes" is taken.
N_STATES = 4096
#: Number of random trajectories over which the worst case is taken.
N_TRAJECTORIES = 32
#: Samples of a random instance.
_SAMPLES = 4
#: The layers of a random instance.
_LAYER_NAMES = ("first", "second")
#: Learning rate of the trajectories, small enough to follow the flow.
_STEP = 0.02
#: Steps of a trajectory.
_STEPS = 10_000
#: Recorded states of a trajectory.
_RECORDS = 200


class Worst(NamedTuple):
    """Worst cases over random states, each relative to the norm of the operator."""

    asymmetry: float
    quadratic_form: float
    eigenvalue: float
    rise: float


class Paths(NamedTuple):
    """Worst cases over random trajectories of the squared loss, relative to the initial loss."""

    final_loss: float
    last_change: float
    largest_rise: float


def _terms(key: PRNGKeyArray) -> Float[Array, "R n n"]:
    """Positive definite terms of layers, with condition numbers up to about a hundred."""
    factors = jax.random.normal(key, (len(_LAYER_NAMES), _SAMPLES, _SAMPLES))
    return factors @ jnp.swapaxes(factors, 1, 2) / _SAMPLES + 0.1 * jnp.eye(_SAMPLES)


def _problems() -> list[tuple[Loss, Array, int]]:
    """Losses, with targets and numbers of outputs."""
    labels = jnp.arange(_SAMPLES)
    return [
        (losses.SquaredError(), jnp.zeros((_SAMPLES, 1)), 1),
        (losses.Logistic(), (labels % 2)[:, None] * 1.0, 1),
        (losses.SoftmaxCrossEntropy(), labels % 3, 3),
    ]


def _flow(terms: Array, targets: Array, loss: Loss, rule: ClippingRule) -> KernelFlow:
    return KernelFlow(LayerwiseKernel(_LAYER_NAMES, terms), targets, loss, rule, reduction="sum")


def _operator_numbers(terms: Array, a: Array, rule: ClippingRule) -> tuple[Array, Array, Array]:
    """Asymmetry, smallest eigenvalue of the symmetric part, smallest real part; all relative."""
    kernel = terms if rule.scope == "layerwise" else jnp.sum(terms, 0, keepdims=True)
    diagonal = jnp.diagonal(kernel, axis1=1, axis2=2)
    norms = jnp.sqrt(diagonal * jnp.sum(a**2, axis=1))
    totals = jnp.sqrt(jnp.einsum("rij,ik,jk->r", kernel, a, a))
    driving: Array | LayerwiseKernel = kernel[0]
    factors = rule.by_group(norms, totals)
    if rule.scope == "layerwise":
        driving = LayerwiseKernel(_LAYER_NAMES, kernel)
    else:
        factors = factors[0]
    operator = spectrum.clipped_operator(driving, factors)
    size = jnp.linalg.norm(operator)
    return (
        jnp.linalg.norm(operator - operator.T) / size,
        spectrum.symmetric_eigenvalues(driving, factors)[0] / size,
        jnp.real(spectrum.eigenvalues(driving, factors))[0] / size,
    )


def _rise(terms: Array, outputs: Array, targets: Array, loss: Loss, rule: ClippingRule) -> Array:
    """dL/dt divided by the norms of output gradient and velocity: a cosine."""
    flow = _flow(terms, targets, loss, rule)
    velocity = flow.velocity((outputs, None))[0]
    a = loss.output_gradient(outputs, targets)
    cosine: Array = jnp.vdot(a, velocity) / (jnp.linalg.norm(a) * jnp.linalg.norm(velocity))
    return cosine


@eqx.filter_jit
def _states(rule: ClippingRule, keys: Key[Array, " n"]) -> tuple[Array, ...]:
    def one_state(key: PRNGKeyArray) -> tuple[Array, ...]:
        terms_key, outputs_key, scale_key = jax.random.split(key, 3)
        terms = _terms(terms_key)
        # The scales of the samples are spread, so that some are clipped and others are not.
        scale = jnp.exp(2 * jax.random.normal(scale_key, (_SAMPLES, 1)))
        rises = []
        for number, (loss, targets, n_outputs) in enumerate(_problems()):
            normal = jax.random.normal(
                jax.random.fold_in(outputs_key, number), (_SAMPLES, n_outputs)
            )
            outputs = scale * normal if number == 0 else 3 * normal
            rises.append(_rise(terms, outputs, targets, loss, rule))
            if number == 0:
                numbers = _operator_numbers(terms, outputs, rule)
        return (*numbers, jnp.max(jnp.stack(rises)))

    return jax.vmap(one_state)(keys)


def worst_of_states(rule: ClippingRule, key: PRNGKeyArray) -> Worst:
    """Worst cases over `N_STATES` kernels of two layers with states, and three losses."""
    asymmetry, form, eigenvalue, rise = _states(rule, jax.random.split(key, N_STATES))
    return Worst(
        float(jnp.max(asymmetry)),
        float(jnp.min(form)),
        float(jnp.min(eigenvalue)),
        float(jnp.max(rise)),
    )


@eqx.filter_jit
def _losses_of_paths(rule: ClippingRule, keys: Key[Array, " n"]) -> Array:
    targets = jnp.zeros((_SAMPLES, 1))

    def one_path(key: PRNGKeyArray) -> Array:
        terms_key, outputs_key = jax.random.split(key)
        terms = _terms(terms_key) + 0.2 * jnp.eye(_SAMPLES)
        flow = _flow(terms, targets, losses.SquaredError(), rule)
        outputs = 3 * jax.random.normal(outputs_key, (_SAMPLES, 1))
        path = recursion(
            flow, outputs, learning_rate=_STEP, steps=_STEPS, record_every=_STEPS // _RECORDS
        )
        return path.loss

    return jax.vmap(one_path)(keys)


def worst_of_paths(rule: ClippingRule, key: PRNGKeyArray) -> Paths:
    """Worst cases over `N_TRAJECTORIES` flows in small steps, with eigenvalues above 0.6."""
    paths = _losses_of_paths(rule, jax.random.split(key, N_TRAJECTORIES))
    relative = np.asarray(paths) / np.asarray(paths)[:, :1]
    return Paths(
        final_loss=float(np.max(relative[:, -1])),
        last_change=float(np.max(np.abs(relative[:, -1] - relative[:, -_RECORDS // 4]))),
        largest_rise=float(np.max(np.diff(relative, axis=1))),
    )


def _circling(params: dict[str, Array], x: Array) -> Array:
    r"""Three samples that take turns: while one rises fast, two fall slowly.

    :math:`f_i = 3 + s(\theta + i/3) + \epsilon \sin(2\pi(\theta + i/3) + p_i)` with the clock
    :math:`\theta`, a weight p of its own for each sample, and a sawtooth s of three harmonics that
    rises for less than a third of its period. All are clipped to the same norm, so the two that
    fall outvote the one that rises: the clock never stops, and the outputs return for ever.
    """
    sample = x[:, 0]
    phase = 2 * jnp.pi * (params["clock"] + sample / 3)
    saw = jnp.sin(phase) + jnp.sin(2 * phase) / 2 + 0.7 * jnp.sin(3 * phase) / 3
    own = jax.nn.one_hot(sample.astype(int), 3) @ params["own"]
    return (3 + saw + 0.3 * jnp.sin(phase + own))[:, None]


class Circling(NamedTuple):
    """The circling network's flow: late extremes of its loss, and the kernel's least eigenvalue.

    ``lowest`` and ``highest`` are taken over the last half of the horizon, which is many rounds.
    """

    lowest: float
    highest: float
    least_eigenvalue: float
    rounds: float


@functools.cache
def circling_network(clip_norm: float = 1.0, horizon: float = 60.0) -> Circling:
    """Follow the circling network under flat clipping; its kernel moves and stays positive."""
    x = jnp.arange(3.0)[:, None]
    params = {"clock": jnp.zeros(()), "own": jnp.zeros(3)}
    rule = clipping.Abadi(clip_norm)
    loss, targets = losses.SquaredError(), jnp.zeros((3, 1))
    flow = WeightFlow(_circling, x, targets, loss, rule, reduction="sum")

    def observe(t: Array, weights: Params, args: None) -> tuple[Array, Array, Array]:
        kernel = ntk.empirical_ntk(_circling, weights, x)[:, :, 0, 0]
        total = jnp.sum(loss(_circling(weights, x), targets))
        return total, decompositions.eigvalsh(kernel)[0], weights["clock"]

    # `solve` keeps no weights, and the kernel is a function of those.
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, weights, args: flow.velocity(weights)),
        diffrax.Tsit5(),
        t0=0.0,
        t1=horizon,
        dt0=None,
        y0=params,
        saveat=diffrax.SaveAt(ts=jnp.linspace(0.0, horizon, 6001), fn=observe),
        stepsize_controller=diffrax.PIDController(rtol=1e-7, atol=1e-9),
        max_steps=100_000,
    )
    total, least, clock = solution.ys
    late = total[3000:]
    return Circling(
        lowest=float(jnp.min(late)),
        highest=float(jnp.max(late)),
        least_eigenvalue=float(jnp.min(least)),
        rounds=float(clock[-1]),
    )
