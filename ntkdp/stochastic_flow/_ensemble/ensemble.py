"""Noisy runs of the linearised model, drawn from its kernel or without one."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp

from ntkdp import optimizers, privacy
from ntkdp._backend import compiled, devices, validate
from ntkdp._backend import progress as _progress
from ntkdp._backend.progress import Listener, begin_part
from ntkdp._backend.schedules import Schedule, largest, multiplier
from ntkdp._backend.types import (
    Array,
    Key,
    KeyLike,
    LearningRate,
    PRNGKeyArray,
    Progress,
    PyTree,
)
from ntkdp._estimators.sharpness_aware import SharpnessAware, ahead
from ntkdp._estimators.zeroth_order import ZerothOrder, check_zeroth_order
from ntkdp._results.setup import batches_in_words, noise_in_words
from ntkdp.batches import Batches
from ntkdp.batches import resolve as resolve_batches
from ntkdp.clipping import Adaptive, moving_norm
from ntkdp.gradient_flow import (
    HeadFlow,
    KernelFlow,
    KernelLike,
    LinearisedFlow,
    LinearModelFlow,
    OptimizerSteps,
    OutputsAtZero,
    Start,
    Walked,
    check_linear_model_flow,
    optimizer_steps,
)
from ntkdp.noise import Noise
from ntkdp.noise import resolve as resolve_noise
from ntkdp.optimizers import OptimizerLike
from ntkdp.stochastic_flow._ensemble.step_noise import (
    Carried,
    StepNoise,
    finding_norms,
    noise_of_step,
)
from ntkdp.stochastic_flow._ensemble.zeroth_order import ZerothOrderSteps, zeroth_order_steps
from ntkdp.stochastic_flow._weight_noise import NoiseMultipliers
from ntkdp.trajectory import (
    Measurement,
    Stepping,
    Trajectory,
    check_noise_moves,
    from_measurements,
)

#: Outputs of the runs of a head that are drawn at once.
_OUTPUT_BYTES = 2**25


def ensemble(
    flow: KernelFlow | LinearisedFlow,
    initial: PyTree,
    *,
    learning_rate: LearningRate,
    steps: int,
    noise_multiplier: NoiseMultipliers = 0.0,
    sample_rate: float = 1.0,
    batches: Batches | None = None,
    noise: Noise | None = None,
    clip_norm: Schedule | None = None,
    adaptive: Adaptive | None = None,
    zeroth_order: ZerothOrder | None = None,
    sharpness_aware: SharpnessAware | None = None,
    noise_kernel: KernelLike | None = None,
    noise_per_group: bool = False,
    optimizer: OptimizerLike | None = None,
    outputs_at_zero: OutputsAtZero | None = None,
    record_every: int = 1,
    outputs: bool = False,
    progress: Progress = False,
    key: KeyLike,
) -> Trajectory:
    r"""Draw noisy runs, from a kernel or without one: the law of DP-SGD on the linearised model.

    Parameters
    ----------
    flow : KernelFlow or LinearisedFlow
        Kernel or linearised model, with targets, loss and clipping, but no preconditioner.
    initial : array, pair or pytree
        As for :func:`ntkdp.recursion`.
    learning_rate : float or optax schedule
        Step size of the reduced loss's gradient.
    steps : int
        At least 1.
    noise_multiplier : float, privacy.Budget, callable or array
        :math:`\sigma`: the noise of the summed gradient has standard deviation :math:`\sigma S` on
        every weight, with S the sensitivity (R flat, :math:`\sqrt{\sum_r R_r^2}` layerwise). A
        budget is spent on all the steps; a schedule has a number for each step.
    sample_rate : float
        q in (0, 1]: 1 for full batches, less for Poisson sampling.
    batches, noise, clip_norm, adaptive, zeroth_order, sharpness_aware
        Other batches, correlated noise, clipping norms that move, steps along random directions,
        and gradients taken a little way up the last noisy one, as for ``dp_sgd.run``. With noise
        and a KernelFlow the last needs ``n_params``, and noise that is independent.
    noise_kernel : array, LayerwiseKernel or FeatureKernel, optional
        The kernel of all points with each other, train before test, ``(n + m, n + m, ...)``: needed
        with noise if the flow has a test kernel, since the same noise moves both. Public samples
        come between the two, and need it too. It must be None with a LinearisedFlow, where the
        noise moves the weights.
    noise_per_group : bool
        For layerwise clipping: the noise of group r is in proportion to its own R_r, as in
        ``dp_sgd.run``.
    optimizer, outputs_at_zero
        As for :func:`ntkdp.recursion`; the noise passes through the optimizer as in a run.
    record_every : int
        Record every so many steps, and the last one.
    outputs : bool
        Record the outputs too.
    progress : bool or callable
        True shows a bar on a terminal; a function is called with the fraction done.
    key : PRNG key
        One key, or an array of S keys for S runs, which get a leading seed axis.

    Returns
    -------
    Trajectory
        Its times are the running sum of the learning rate.

    Raises
    ------
    ValueError, TypeError
        As for ``dp_sgd.run``; if the flow is preconditioned, or the noise kernel does not fit it.

    Notes
    -----
    *Derived* from the step of DP-SGD; exact in law for a model that is linear in its parameters, at
    any step size. A KernelFlow draws hundreds of runs in one batched product, with the full
    covariance. It takes the memory and, once, the time of the eigenvalues of an ``(n K, n K)``
    matrix, or ``(n, n)`` if the kernel means ``(x) I_K``. A FeatureKernel takes neither: runs are
    those of the D K weights of the head, of which a step on a small batch reads the features of its
    samples alone, and Adam may step them too. A LinearisedFlow takes, for each run, the
    memory of its weights and of a batch, and, for each step, a velocity over all samples, also with
    Poisson sampling. With the same key its run is, up to rounding, the run that ``dp_sgd.run``
    makes of the linearised model.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ntkdp
    >>> flow = ntkdp.KernelFlow(jnp.eye(1), jnp.zeros((1, 1)), ntkdp.losses.SquaredError(),
    ...                         ntkdp.clipping.Abadi(10.0), reduction="sum")
    >>> runs = ntkdp.stochastic_flow.ensemble(
    ...     flow, jnp.array([[1.0]]), learning_rate=0.5, steps=3, noise_multiplier=0.1,
    ...     key=jax.random.split(jax.random.key(0), 100))
    >>> runs.loss.shape
    (100, 4)
    """
    check_linear_model_flow(flow)
    stepping = Stepping(learning_rate, steps, record_every)
    drawn, correlated = resolve_batches(batches, sample_rate), resolve_noise(noise)
    sigma = privacy.as_noise_multiplier(
        noise_multiplier,
        stepping.steps,
        batches=drawn,
        noise=correlated,
        n_samples=flow.data.n_samples,
        schedules=True,
    )
    sigma = multiplier(stepping.steps, sigma)
    moving = moving_norm(adaptive, clip_norm, flow.clipping, stepping.steps)
    check_noise_moves(moving, sigma, correlated)
    of_outputs = (noise_kernel, outputs_at_zero, zeroth_order, sharpness_aware)
    state: PyTree = flow.init(initial)
    followed: LinearModelFlow = flow
    if isinstance(flow, KernelFlow) and steps_weights(flow, optimizer, of_outputs):
        followed = head = HeadFlow(flow, state)
        state = head.init()
    walk = optimizer_steps(
        followed, optimizer, stepping.learning_rate, outputs_at_zero, moving, sharpness_aware
    )
    of_sum, sizes = largest(sigma)
    if moving is not None:
        check_noise_of_groups(followed, noise_per_group)
        of_sum = moving.sum_noise_multiplier(of_sum, flow.n_terms)
    order = check_zeroth_order(
        zeroth_order, flow.clipping, correlated, adaptive, clip_norm, flow.public, sharpness_aware
    )
    start: Start = (state, None)
    random: StepNoise | ZerothOrderSteps
    if order is None:
        random = noise_of_step(followed, of_sum, drawn, noise_kernel, noise_per_group, correlated)
        if walk.sharpness_aware is not None:
            random = finding_norms(random, flow, start[0], walk.sharpness_aware)
    else:
        _check_directions(flow, noise_per_group, walk.optimizer)
        random = zeroth_order_steps(flow, order, of_sum, drawn, noise_kernel)
    random = replace(random, sizes=sizes)
    has_noise = isinstance(random, StepNoise) and random.added is not None
    keys = devices.everywhere(flow.mesh, validate.keys(key=key))
    with _progress.listening(progress, "drawing runs") as listener:
        if isinstance(followed, HeadFlow):
            measured = draw_in_groups(walk, random, start, stepping, keys, outputs, listener)
        else:
            _, measured = draw_within_memory(
                walk, random, start, False, stepping, keys, outputs, listener
            )
        share = drawn.share(flow.targets.shape[0])
        setup = walk.setup(stepping, sigma, share, noise_per_group)
        return from_measurements(
            stepping.times,
            measured,
            steps=jnp.asarray(stepping.recorded),
            setup=replace(
                setup,
                batches=batches_in_words(drawn),
                noise=noise_in_words(correlated) if has_noise else "",
                zeroth_order="" if order is None else order.in_words,
            ),
        )


def _check_directions(flow: LinearModelFlow, per_group: bool, optimizer: OptimizerLike) -> None:
    """Raise unless flow and optimizer take steps along random directions."""
    if per_group:
        raise ValueError("noise_per_group must be False with zeroth_order, got True")
    if flow.mesh is not None:
        raise ValueError(f"mesh must be None with zeroth_order, got a flow on {flow.mesh}")
    if getattr(optimizer, "correct_noise", False):
        raise ValueError(
            "optimizer must have correct_noise=False with zeroth_order, whose noise lies along its "
            "directions alone, got Adam(correct_noise=True)"
        )


def check_noise_of_groups(flow: LinearModelFlow, per_group: bool) -> None:
    """Raise unless the noise can follow clipping norms that may move apart."""
    if per_group and isinstance(flow, KernelFlow):
        raise ValueError(
            "noise_per_group must be False with adaptive clipping or a schedule of clip_norm, and "
            "a KernelFlow, whose noise has one covariance for all steps; use a LinearisedFlow"
        )


def steps_weights(
    flow: KernelFlow, optimizer: OptimizerLike | None, of_outputs: tuple[object, ...]
) -> bool:
    """Whether runs of a head are drawn in its weights, and not in the outputs of all points.

    ``of_outputs`` are options that are about outputs if they are given.
    """
    known = optimizers.recognised(optimizers.as_optimizer(optimizer))
    is_known = isinstance(known, optimizers.Optimizer) and not known.decays_weights
    return HeadFlow.follows(flow) and is_known and all(option is None for option in of_outputs)


def draw_in_groups(
    walk: OptimizerSteps,
    noise: StepNoise | ZerothOrderSteps,
    start: Start,
    stepping: Stepping,
    keys: Key[Array, "*seeds"],
    outputs: bool,
    listener: Listener,
) -> Measurement:
    """Runs of a head, so many at a time that their outputs take little memory."""
    assert isinstance(walk.flow, HeadFlow)
    largest = max(1, _OUTPUT_BYTES // compiled.bytes_of(walk.flow.outputs))
    n_groups = -(-keys.size // largest)
    if keys.ndim == 0 or n_groups == 1:
        return draw_within_memory(walk, noise, start, False, stepping, keys, outputs, listener)[1]
    size = -(-keys.size // n_groups)
    # The last group is filled up, so that all groups have one program.
    number = jnp.minimum(jnp.arange(n_groups * size), keys.size - 1).reshape(n_groups, size)
    parts = []
    for group, own in enumerate(number):
        begin_part(listener, group, n_groups)
        _, measured = draw_within_memory(
            walk, noise, start, False, stepping, keys[own], outputs, listener
        )
        parts.append(jax.block_until_ready(measured))
    together: Measurement = jax.tree.map(
        lambda *leaves: jnp.concatenate(leaves)[: keys.size], *parts
    )
    return together


def draw_within_memory(
    walk: OptimizerSteps,
    noise: StepNoise | ZerothOrderSteps,
    start: Start,
    per_seed: bool,
    stepping: Stepping,
    keys: Key[Array, "*seeds"],
    outputs: bool,
    listener: Listener,
) -> tuple[Start, Measurement]:
    """:func:`draw`, if there is memory for it."""
    single = jax.tree.map(lambda leaf: leaf[0], start) if per_seed else start
    walked = jax.eval_shape(walk.start, *single)
    end, measured = compiled.call(
        draw, walk, noise, start, per_seed, stepping, keys, outputs, listener,
        what=f"drawing {keys.size:,} runs of {stepping.steps:,} steps",
        ways_out="draw fewer runs at a time (keys), record fewer steps or without outputs, or use "
        "float32",
        results=stepping.bytes_of_record(walk.measure, walked, outputs),
        work=compiled.bytes_of(walked), n_runs=keys.size,
    )  # fmt: skip
    return end, measured


@eqx.filter_jit
def draw(
    walk: OptimizerSteps,
    noise: StepNoise | ZerothOrderSteps,
    start: Start,
    per_seed: bool,
    stepping: Stepping,
    keys: Key[Array, "*seeds"],
    outputs: bool,
    listener: Listener,
) -> tuple[Start, Measurement]:
    """Where runs end and what was measured, from one start or from one for each seed."""

    n, rule = walk.flow.targets.shape[0], walk.flow.clipping
    batch_size = noise.batches.share(n) * n

    def one_run(key: PRNGKeyArray, start: Start) -> tuple[Start, Measurement]:
        def step(k: Array, state: tuple[Walked, Carried]) -> tuple[Walked, Carried]:
            walked, carried = state
            number = jnp.asarray(stepping.number(k))
            own = jax.random.fold_in(key, number)
            flow = walk.flow_at(walked)
            added = noise.at_clip_norm(walked.clip_norm, rule).at_step(k)
            point = ahead(walked.position, walked.ascent)
            velocity, seen, carried = added.velocity(flow, point, own, number, carried)
            after = walk.step(walked, velocity, added.variance(velocity), seen.gradient_norm)
            return walk.adapt(after, k + 1, seen.norms, seen.drawn, batch_size, own), carried

        walked = walk.start(*start)
        (end, _), measured = stepping.walk_to_end(
            step,
            lambda state: walk.measure(state[0], outputs),
            (walked, noise.start(walk.flow, walked.position)),
            listener,
        )
        return (end.position, end.average), measured

    if keys.ndim == 0:
        return one_run(keys, start)
    return jax.vmap(one_run, in_axes=(0, 0 if per_seed else None))(keys, start)
