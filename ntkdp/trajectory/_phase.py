"""A phase of training: which groups train, with what rule, learning rate and noise, how long."""

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace

import equinox as eqx
import jax.numpy as jnp

from ntkdp import privacy
from ntkdp._backend import validate
from ntkdp._backend.schedules import Schedule, is_schedule, multiplier
from ntkdp._backend.types import LearningRate, ScalarLike
from ntkdp.clipping import Adaptive, ClippingRule, MovingNorm, moving_norm
from ntkdp.noise import Independent
from ntkdp.trajectory._moving_noise import check_noise_moves
from ntkdp.trajectory._stepping import Stepping, check_learning_rate
from ntkdp.trajectory._training_set import check_clipping
from ntkdp.trajectory._trajectory import Trajectory


def as_trainable(names: object) -> tuple[str, ...] | None:
    """Names of groups as a tuple, or None for all of them."""
    if names is None:
        return None
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(
            f"trainable must be a sequence of names of groups, such as ('4',), got {names!r}"
        )
    groups: tuple[str, ...] = tuple(names)
    if not groups or not all(isinstance(name, str) for name in groups):
        raise ValueError(
            "trainable must hold at least one group, each by its name, or be None for all of them, "
            f"got {groups!r}"
        )
    return groups


class Phase(eqx.Module):
    r"""A number of steps with one clipping rule, learning rate and noise, of some groups or all.

    Linear probing then fine-tuning (LP-FT) is two phases, the first of which trains the head alone;
    a late switch of the clipping norm is two phases with different R. Groups that are frozen have
    no part in the norms, the noise or the sensitivity: the phase is DP-SGD on the others alone.

    Parameters
    ----------
    steps : int
        At least 1.
    clipping : ClippingRule
        One of :mod:`ntkdp.clipping`. Several R stand for the groups that train in this phase, in
        the order of the model's groups.
    learning_rate : float or optax schedule
        Step size of the reduced loss's gradient; a schedule maps the step number *within the phase*
        to it.
    noise_multiplier : float, privacy.Budget, callable or array
        :math:`\sigma`, in units of the sensitivity of this phase, one number or one for each step
        within the phase. A budget is spent on the steps of this phase alone; phases on the same
        data compose, see :func:`ntkdp.privacy.composed_epsilon`.
    trainable : sequence of str, optional
        Names of the groups that train, as in ``LayerwiseKernel.names``; by default all.
    clip_norm : callable or array, optional
        Clipping norm of each step within the phase, as for ``dp_sgd.run``.
    adaptive : clipping.Adaptive, optional
        How the clipping norm moves in this phase, from that of its rule.

    Raises
    ------
    ValueError, TypeError
        If there are no steps, the learning rate is not positive, sigma is negative, or there is no
        group to train. A rule of unbounded sensitivity is refused its noise where the phase is run
        or predicted.

    Notes
    -----
    Linear probing against fine-tuning under differential privacy: arXiv 2402.18905. Late switch of
    R: Bu et al. (2023), experiment on SNLI.

    Examples
    --------
    >>> import ntkdp
    >>> rule = ntkdp.clipping.Abadi(1.0)
    >>> probing = ntkdp.Phase(50, rule, learning_rate=2.0, noise_multiplier=20.0, trainable=("4",))
    >>> tuning = ntkdp.Phase(50, rule, learning_rate=0.5, noise_multiplier=20.0)
    >>> mechanisms = [phase.mechanism() for phase in (probing, tuning)]
    >>> round(ntkdp.privacy.composed_epsilon(mechanisms, 1e-5), 3)
    1.993
    """

    steps: int = eqx.field(static=True)
    clipping: ClippingRule
    learning_rate: LearningRate
    noise_multiplier: ScalarLike | Schedule | privacy.Budget
    trainable: tuple[str, ...] | None = eqx.field(static=True)
    clip_norm: Schedule | None
    adaptive: Adaptive | None

    def __init__(
        self,
        steps: int,
        clipping: ClippingRule,
        learning_rate: LearningRate,
        noise_multiplier: ScalarLike | Schedule | privacy.Budget = 0.0,
        trainable: Iterable[str] | None = None,
        clip_norm: Schedule | None = None,
        adaptive: Adaptive | None = None,
    ) -> None:
        self.steps = validate.count(steps=steps)
        self.clipping = check_clipping(clipping)
        self.learning_rate = check_learning_rate(learning_rate, self.steps)
        self.noise_multiplier = noise_multiplier
        if not isinstance(noise_multiplier, privacy.Budget):
            sigma = multiplier(self.steps, noise_multiplier)
            if not is_schedule(sigma):
                sigma = validate.scalar(
                    noise_multiplier=validate.non_negative(noise_multiplier=sigma)
                )
            self.noise_multiplier = sigma
        self.trainable = as_trainable(trainable)
        self.clip_norm, self.adaptive = clip_norm, adaptive
        check_noise_moves(self.moving, self.noise_multiplier, Independent())

    @property
    def moving(self) -> MovingNorm | None:
        """How the clipping norm moves, or None if it does not."""
        return moving_norm(self.adaptive, self.clip_norm, self.clipping, self.steps)

    def mechanism(self, sample_rate: float = 1.0) -> tuple[ScalarLike | Schedule, float, int]:
        """Noise multiplier, sampling rate and steps, for the accounting of privacy."""
        sigma = privacy.as_noise_multiplier(
            self.noise_multiplier, self.steps, sample_rate, schedules=True
        )
        return sigma, sample_rate, self.steps


def check_phases(phases: object) -> tuple[Phase, ...]:
    """A sequence of at least one phase, as a tuple."""
    if isinstance(phases, Phase) or not isinstance(phases, Iterable):
        raise TypeError(f"phases must be a sequence of Phase, got {type(phases).__name__}")
    checked: tuple[Phase, ...] = tuple(phases)
    if not checked:
        raise ValueError("phases must hold at least one Phase, got none")
    for phase in checked:
        if not isinstance(phase, Phase):
            raise TypeError(f"phases must be a sequence of Phase, got one {type(phase).__name__}")
    return checked


def joined(paths: Sequence[Trajectory], rules: Iterable[ClippingRule]) -> Trajectory:
    """The trajectories of all phases as one; if a clipping norm moves, that of all is recorded."""
    sizes = {path.clip_norm.shape[-1] for path in paths if path.clip_norm is not None}
    if sizes:
        n_groups, *others = sorted(sizes)
        if others:
            raise ValueError(
                "phases whose clipping norms move must have one number of groups, got "
                f"{sorted(sizes)}"
            )
        paths = [
            _with_clip_norm(path, rule, n_groups) for path, rule in zip(paths, rules, strict=True)
        ]
    return functools.reduce(Trajectory.then, paths)


def _with_clip_norm(path: Trajectory, rule: ClippingRule, n_groups: int) -> Trajectory:
    if path.clip_norm is not None:
        return path
    norms = rule.group_norms(n_groups) if rule.bounds_each_sample else jnp.inf
    constant = jnp.broadcast_to(jnp.asarray(norms, path.loss.dtype), (*path.loss.shape, n_groups))
    return replace(path, clip_norm=constant)


def steppings(phases: tuple[Phase, ...], record_every: int) -> list[Stepping]:
    """Steps of each phase, numbered through the whole."""
    ends = list(itertools.accumulate(phase.steps for phase in phases))
    return [
        Stepping(phase.learning_rate, phase.steps, record_every, end - phase.steps, ends[-1])
        for phase, end in zip(phases, ends, strict=True)
    ]
