"""Ensembles over phases of training."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeAlias

import jax.numpy as jnp

from ntkdp._backend import progress as _progress
from ntkdp._backend import validate
from ntkdp._backend.schedules import largest
from ntkdp._backend.types import Array, ArrayLike, KeyLike, Progress, PyTree
from ntkdp.batches import resolve
from ntkdp.gradient_flow import (
    KernelLike,
    OutputsAtZero,
    Start,
    flows_of_phases,
    one_a_phase,
    walks_of_phases,
)
from ntkdp.losses import Loss, Reduction
from ntkdp.noise import Independent
from ntkdp.optimizers import OptimizerLike
from ntkdp.stochastic_flow._ensemble.ensemble import check_noise_of_groups, draw_within_memory
from ntkdp.stochastic_flow._ensemble.step_noise import noise_of_step
from ntkdp.trajectory import Phase, Trajectory, check_phases, from_measurements, joined, steppings

#: One kernel for all phases, or one for each.
_Kernels: TypeAlias = KernelLike | Sequence[KernelLike]


def ensemble_phases(
    kernel: _Kernels,
    targets: ArrayLike,
    loss: Loss | Callable[..., Array],
    phases: Iterable[Phase],
    initial: PyTree,
    *,
    sample_rate: float = 1.0,
    reduction: Reduction = "mean",
    test_kernel: _Kernels | None = None,
    test_targets: ArrayLike | None = None,
    noise_kernel: _Kernels | None = None,
    noise_per_group: bool = False,
    optimizer: OptimizerLike | None = None,
    outputs_at_zero: OutputsAtZero | None = None,
    record_every: int = 1,
    outputs: bool = False,
    progress: Progress = False,
    key: KeyLike,
) -> Trajectory:
    r"""Draw noisy runs in phases: the law of DP-SGD on a model that is linear in each phase.

    In a phase that trains the groups A the kernel is :math:`H_A = \sum_{r \in A} H_r`, for the
    drift, for the norms and for the covariance of the noise.

    Parameters
    ----------
    kernel, test_kernel, noise_kernel : LayerwiseKernel or array, or a list of them
        As for :class:`ntkdp.KernelFlow` and :func:`ensemble`: one for all phases, or one for each,
        taken where the phase begins. A phase that freezes groups needs a LayerwiseKernel.
    targets, loss, reduction, test_targets
        As for :class:`ntkdp.KernelFlow`.
    phases : sequence of Phase
        Clipping rule, learning rate, noise, steps and trainable groups of each phase.
    initial : array or pair
        Outputs ``(n, K)``, or a (train, test) pair with a test kernel.
    record_every : int
        Record every so many steps of each phase, and its first and last state.
    optimizer, outputs_at_zero
        As for :func:`ensemble`. The optimizer's state starts anew with each phase, while an average
        of the weights goes on. Weight decay needs phases that train all groups under one kernel.
    sample_rate, noise_per_group, outputs, progress, key
        As for :func:`ensemble`. Every run continues from its own state at the end of a phase.

    Returns
    -------
    Trajectory
        All phases in one, with times and steps added up. The state between two phases is recorded
        once, with the clip fraction that the later phase begins with.

    Raises
    ------
    ValueError, TypeError
        As for :func:`ensemble`; if there are no phases, if the kernel lacks a group, or if a list
        of kernels does not have one for each phase.

    Notes
    -----
    *Derived*. Exact in law for a model that is linear in its parameters, with one kernel
    throughout; in linear probing any network is such a model. A single phase gives
    :func:`ensemble`, draw by draw.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ntkdp
    >>> kernel = ntkdp.LayerwiseKernel(("body", "head"), jnp.ones((2, 1, 1)))
    >>> rule = ntkdp.clipping.Abadi(1.0)
    >>> phases = [ntkdp.Phase(2, rule, 0.5, noise_multiplier=0.1, trainable=["head"]),
    ...           ntkdp.Phase(3, rule, 0.5, noise_multiplier=0.1)]
    >>> runs = ntkdp.stochastic_flow.ensemble_phases(
    ...     kernel, jnp.zeros((1, 1)), ntkdp.losses.SquaredError(), phases, jnp.array([[3.0]]),
    ...     key=jax.random.split(jax.random.key(0), 50))
    >>> runs.loss.shape, runs.times.tolist()
    ((50, 6), [0.0, 0.5, 1.0, 1.5, 2.0, 2.5])
    """
    phases = check_phases(phases)
    flows = flows_of_phases(kernel, targets, loss, phases, reduction, test_kernel, test_targets)
    noise_kernels = one_a_phase(noise_kernel, phases, "noise_kernel")
    keys = validate.keys(key=key)
    drawn = resolve(None, sample_rate)
    steps_of = steppings(phases, record_every)
    walks = walks_of_phases(flows, phases, steps_of, kernel, optimizer, outputs_at_zero)
    start: Start = (flows[0].init(initial), None)
    paths: list[Trajectory] = []
    with _progress.listening(progress, "drawing runs") as listener:
        for phase, walk, stepping, phase_noise_kernel in zip(
            phases, walks, steps_of, noise_kernels, strict=True
        ):
            flow = walk.flow
            sigma, _, _ = phase.mechanism(sample_rate)
            of_sum, sizes = largest(sigma)
            if walk.moving is not None:
                check_noise_of_groups(flow, noise_per_group)
                of_sum = walk.moving.sum_noise_multiplier(of_sum, flow.n_terms)
            noise = noise_of_step(
                flow, of_sum, drawn, phase_noise_kernel, noise_per_group, Independent()
            )
            noise = replace(noise, sizes=sizes)
            per_seed = bool(paths) and keys.ndim > 0
            start, measured = draw_within_memory(
                walk, noise, start, per_seed, stepping, keys, outputs, listener
            )
            steps = jnp.asarray(stepping.recorded)
            setup = walk.setup(stepping, sigma, sample_rate, noise_per_group)
            paths.append(from_measurements(stepping.times, measured, steps=steps, setup=setup))
        return joined(paths, (phase.clipping for phase in phases))
