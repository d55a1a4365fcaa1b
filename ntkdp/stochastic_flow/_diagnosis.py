"""A look at a private run before it is made: noise, stability, and which prediction to trust."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ntkdp import ntk, optimizers, privacy
from ntkdp._backend.types import ApplyFn, Array, ArrayLike, LearningRate, Params, PyTree
from ntkdp._gradients import groups as _groups
from ntkdp.batches import Batches
from ntkdp.batches import resolve as resolve_batches
from ntkdp.clipping import ClippingRule
from ntkdp.datasets import Dataset
from ntkdp.losses import Loss, Reduction, SampleLoss
from ntkdp.models import Model
from ntkdp.noise import Noise
from ntkdp.noise import resolve as resolve_noise
from ntkdp.optimizers import Adam, OptimizerLike
from ntkdp.stochastic_flow._linear_filter import LinearFilter, linear_filter, mixed
from ntkdp.stochastic_flow._relative_noise import relative_weight_noise
from ntkdp.stochastic_flow._response.ensemble import NODES, filtered_part, is_room
from ntkdp.stochastic_flow._response.flow import ResponseFlow
from ntkdp.stochastic_flow._response.noise_free_path import (
    Descent,
    NoiseFreePath,
    follow,
    place_nodes,
    slots,
)
from ntkdp.stochastic_flow._stability import curvatures, largest_stable_rate
from ntkdp.stochastic_flow._weight_noise import NoiseMultiplier, deviations
from ntkdp.trajectory import Stepping, times_of_steps

#: Inputs and targets, of the training set and perhaps of a test set.
Data: TypeAlias = (
    Dataset | tuple[ArrayLike, ArrayLike] | tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike]
)
#: The predictions that may be trusted.
Trusted: TypeAlias = Literal["frozen", "shifted", "response"]

#: Up to these a frozen kernel was within 5% of runs: v(T) over the weights' own variance, and the
#: relative change of the kernel along the run without noise.
_STILL_NOISE, _STILL_KERNEL = 0.01, 0.05
#: From these on the response is outside what it has been tried for.
_STRONG_NOISE, _SMALL_BATCH = 0.5, 4
#: Samples whose kernel is looked at.
_SAMPLES = 24


class Training(NamedTuple):
    """A run as it is asked for, with its arguments checked."""

    flow: ResponseFlow
    model: Model | None
    optimizer: OptimizerLike
    stepping: Stepping
    noise_multiplier: float
    batches: Batches
    noise: Noise
    noise_per_group: bool

    @classmethod
    def of(
        cls,
        flow: ResponseFlow,
        model: Model | ApplyFn,
        optimizer: OptimizerLike | None,
        stepping: Stepping,
        noise_multiplier: NoiseMultiplier,
        batches: Batches,
        noise: Noise,
        noise_per_group: bool,
    ) -> "Training":
        """The training of a flow, from arguments as users give them."""
        batches.check(flow.n_samples)
        sigma = privacy.as_noise_multiplier(
            noise_multiplier,
            stepping.steps,
            batches=batches,
            noise=noise,
            n_samples=flow.n_samples,
        )
        return cls(
            flow,
            model if isinstance(model, Model) else None,
            optimizers.recognised(optimizers.as_optimizer(optimizer)),
            stepping,
            float(np.asarray(sigma)),
            batches,
            noise,
            bool(noise_per_group),
        )

    @property
    def is_random(self) -> bool:
        """Whether two runs differ."""
        return self.noise_multiplier > 0 or self.batches.is_random

    @property
    def sample_rate(self) -> float:
        """The expected share of the samples in a batch."""
        return self.batches.share(self.flow.n_samples)

    @property
    def times(self) -> np.ndarray:
        """Times of all steps."""
        steps = np.arange(self.stepping.steps + 1)
        return np.asarray(times_of_steps(self.stepping.learning_rate, steps), np.float64)

    def deviations(self) -> list[Array]:
        """Standard deviation of the noise of the mean gradient, for each leaf."""
        groups = self.flow.weight_groups()
        stds = deviations(
            self.flow.clipping, self.noise_multiplier, groups.size, self.noise_per_group
        )
        stds = (stds / (self.sample_rate * self.flow.data.divisor)).astype(self.flow.dtype)
        return [stds[group] for group in groups.leaf_to_group]


@final
@dataclass(frozen=True)
class Diagnosis:
    """What is known of a private run before it is made: see :func:`diagnose`.

    Attributes
    ----------
    weight_noise : float or None
        v(T), the variance of the noise on the weights by the end over the weights' own variance,
        the largest over the layers. None if no array of the parameters has a variance of its own.
    learning_rate : float
        The largest of the steps.
    stable_learning_rate : float or None
        The rate up to which steps do not grow, at the largest clipped curvature along the run
        without noise. None for an optimizer of which it is not known.
    kernel_movement : float
        How far the kernel moves along the run without noise, relative to its norm at the start.
    still_groups : tuple of str
        Groups of parameters whose kernel is zero at the start, such as the first factor of a
        low-rank update whose second factor is zero. A frozen kernel never trains them.
    method : "frozen", "shifted" or "response"
        The prediction to trust, which :func:`predict` takes.
    reasons : tuple of str
        Why, in sentences.
    cautions : tuple of str
        Where the run is outside what predictions have been tried for.
    """

    weight_noise: float | None
    learning_rate: float
    stable_learning_rate: float | None
    kernel_movement: float
    still_groups: tuple[str, ...]
    method: Trusted
    reasons: tuple[str, ...]
    cautions: tuple[str, ...]

    def __str__(self) -> str:
        noise = "not known" if self.weight_noise is None else f"{self.weight_noise:.3g}"
        stable = self.stable_learning_rate
        rows = [
            ("noise of the weights v(T), relative to them", noise),
            ("learning rate", f"{self.learning_rate:.3g}"),
            ("largest stable one", "not known" if stable is None else f"{stable:.3g}"),
            ("movement of the kernel without noise", f"{self.kernel_movement:.1%}"),
            ("groups with a kernel of zero", ", ".join(self.still_groups) or "none"),
            ("prediction to trust", self.method),
        ]
        width = max(len(name) for name, _ in rows) + 2
        lines = [f"{name:<{width}}{value}" for name, value in rows]
        return "\n".join([*lines, *self.reasons, *(f"Caution: {one}" for one in self.cautions)])


def diagnose(
    model: Model | ApplyFn,
    params: Params,
    data: Data,
    loss: Loss | SampleLoss,
    clipping: ClippingRule,
    *,
    learning_rate: LearningRate,
    steps: int,
    noise_multiplier: NoiseMultiplier = 0.0,
    sample_rate: float = 1.0,
    batches: Batches | None = None,
    noise: Noise | None = None,
    optimizer: OptimizerLike | None = None,
    groups: PyTree = None,
    noise_per_group: bool = False,
    reduction: Reduction = "mean",
) -> Diagnosis:
    r"""Say before training how noise, steps and features act, and which prediction to trust.

    The network is trained once without noise on full batches, and looked at on the way.

    Parameters
    ----------
    model : Model or callable
        One of :mod:`ntkdp.models`, or ``apply_fn(params, x) -> (n, K)``.
    params : pytree
        The initial parameters.
    data : tuple or Dataset
        ``(x, targets)``, ``(x, targets, test_x, test_targets)``, or one of :mod:`ntkdp.datasets`.
    loss : Loss or callable
        One of :mod:`ntkdp.losses`, or a function of one sample's outputs and target.
    clipping : ClippingRule
        One of :mod:`ntkdp.clipping` that treats each sample by itself.
    learning_rate : float or optax schedule
        Step size of the reduced loss's gradient.
    steps : int
        At least 1.
    noise_multiplier : float or privacy.Budget
        Noise over sensitivity; a budget is spent on all the steps.
    sample_rate : float
        q in (0, 1]: 1 for full batches, less for Poisson sampling.
    batches, noise
        Other batches and correlated noise, as for ``dp_sgd.run``.
    optimizer : optimizers.Optimizer or callable, optional
        As for :func:`response_ensemble`; by default plain steps.
    groups, noise_per_group
        For layerwise clipping, as for ``dp_sgd.run``.
    reduction : {"mean", "sum"}
        Loss and drift are averaged over samples, or summed.

    Returns
    -------
    Diagnosis
        Print it for a table.

    Raises
    ------
    ValueError, TypeError
        As for :func:`response_ensemble`.

    Notes
    -----
    *Derived*. The frozen kernel is trusted for a linear head, and if v(T) is at most 0.01 and the
    kernel moves by at most 5%: noise says nothing about the features that training itself learns.
    Otherwise the response is, if its kernels fit the memory, and if they do not, a frozen kernel
    shifted by the run without noise. The curvature is the largest eigenvalue of
    :math:`\sum_i C_i J_i^\top A_i J_i / n`, A the Hessian of the loss in the outputs, at seven
    times; a quadratic is stable up to 2 over it under plain steps, and up to what the eigenvalues
    of a step say under other optimizers.

    .. warning::
       All of this looks at the data, and none of it is private: see :mod:`ntkdp.advisor`.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ntkdp
    >>> x = jnp.eye(4)
    >>> model = ntkdp.models.mlp([64], 1)
    >>> params = model.init(jax.random.key(0), x)
    >>> seen = ntkdp.diagnose(
    ...     model, params, (x, jnp.ones((4, 1))), ntkdp.losses.SquaredError(),
    ...     ntkdp.clipping.Abadi(1.0), learning_rate=0.5, steps=20, noise_multiplier=2.0)
    >>> seen.method, round(seen.weight_noise, 3)
    ('response', 1.25)
    """
    flow = flow_of(model, params, data, loss, clipping, groups, reduction)
    stepping = Stepping(learning_rate, steps, 1)
    drawn, correlated = resolve_batches(batches, sample_rate), resolve_noise(noise)
    training = Training.of(
        flow, model, optimizer, stepping, noise_multiplier, drawn, correlated, noise_per_group
    )
    return diagnosed(training)


def flow_of(
    model: Model | ApplyFn,
    params: Params,
    data: Data,
    loss: Loss | SampleLoss,
    clipping: ClippingRule,
    groups: PyTree,
    reduction: Reduction,
) -> ResponseFlow:
    """The network and its data, checked."""
    x, targets, test_x, test_targets = _arrays(data)
    apply_fn = model.apply if isinstance(model, Model) else model
    if not callable(apply_fn):
        raise TypeError(
            "model must be one of ntkdp.models or a function apply_fn(params, x), got "
            f"{type(model).__name__}"
        )
    return ResponseFlow(
        apply_fn,
        params,
        x,
        targets,
        loss,
        clipping,
        groups=groups,
        reduction=reduction,
        test_x=test_x,
        test_targets=test_targets,
    )


def _arrays(
    data: Data,
) -> tuple[ArrayLike, ArrayLike, ArrayLike | None, ArrayLike | None]:
    """Training inputs and targets, and those of a test set or None."""
    if isinstance(data, Dataset):
        if not data.x_test.shape[0]:
            return data.x_train, data.y_train, None, None
        return data.x_train, data.y_train, data.x_test, data.y_test
    if isinstance(data, tuple | list) and len(data) == 2:
        return data[0], data[1], None, None
    if isinstance(data, tuple | list) and len(data) == 4:
        return data[0], data[1], data[2], data[3]
    length = f" of length {len(data)}" if isinstance(data, tuple | list) else ""
    raise TypeError(
        "data must be (x, targets), (x, targets, test_x, test_targets) or a Dataset, got "
        f"{type(data).__name__}{length}"
    )


def diagnosed(training: Training, n_runs: int = 100) -> Diagnosis:
    """The diagnosis of a training, of which ``n_runs`` runs are to be predicted."""
    flow, stepping = training.flow, training.stepping
    times = training.times
    filter = linear_filter(
        filtered_part(training.optimizer), stepping.learning_rate, stepping.steps
    )
    places = place_nodes(times, NODES)
    path = _path(training, places)
    noise = _weight_noise(training, filter, path)
    movement = _movement(flow, path.params)
    still = _still_groups(flow)
    largest = float(np.diff(times).max())
    curvature = float(jnp.max(curvatures(flow, path.params, path.metric)))
    stable = largest_stable_rate(training.optimizer, curvature)
    carried = len(training.noise.recursion(stepping.steps).enters)
    fits = is_room(flow, n_runs, len(places), stepping, carried)
    method, reasons = _trusted(training, noise, movement, still, fits)
    cautions = _cautions(training, noise, largest, stable)
    return Diagnosis(noise, largest, stable, movement, still, method, reasons, cautions)


def _path(training: Training, places: np.ndarray) -> NoiseFreePath:
    """The run without noise."""
    variances = [std**2 for std in training.deviations()]
    stepping = training.stepping
    descent = Descent(training.flow, training.optimizer, stepping.learning_rate, variances, True)
    return follow(descent, None, jnp.asarray(slots(places, stepping.steps)), len(places))


def _weight_noise(training: Training, filter: LinearFilter, path: NoiseFreePath) -> float | None:
    """v(T), relative to the weights' own variance."""
    if training.noise_multiplier == 0:
        return 0.0
    flow = training.flow
    of_noise = mixed(filter, training.noise.recursion(filter.steps))
    gathered = float(of_noise.added_covariance(0, filter.steps)[0, 0])
    squares = [1.0] * len(training.deviations())
    if path.metric is not None:
        squares = [float(jnp.mean(leaf**2)) for leaf in jax.tree.leaves(path.metric)]
    layers = _groups.resolve(flow.params)
    variances = np.zeros(layers.size)
    for std, square, layer in zip(
        training.deviations(), squares, layers.leaf_to_group, strict=True
    ):
        variances[layer] = max(variances[layer], gathered * float(std) ** 2 * square)
    try:
        return float(relative_weight_noise(variances, training.model, flow.params, flow.x))
    except ValueError:
        return None


@eqx.filter_jit
def _kernels(flow: ResponseFlow, params: Params, x: Array, layers: _groups.Groups) -> Array:
    """Kernels by group at parameters with a leading axis."""

    def at(params: Params) -> Array:
        return ntk.between_parameters(flow.apply_fn, params, params, x, x, layers)

    result: Array = lax.map(at, params)
    return result


def _looked_at(flow: ResponseFlow) -> Array:
    """Samples evenly over the training set."""
    chosen = np.unique(np.linspace(0, flow.n_samples - 1, min(_SAMPLES, flow.n_samples)).round())
    return flow.x[chosen.astype(int)]


def _movement(flow: ResponseFlow, params: Params) -> float:
    """How far the kernel moves, relative to its start."""
    whole = _groups.resolve(flow.params, lambda path: "all")
    kernels = _kernels(flow, params, _looked_at(flow), whole)
    size = float(jnp.linalg.norm(kernels[0].ravel()))
    moved = jax.vmap(lambda kernel: jnp.linalg.norm((kernel - kernels[0]).ravel()))(kernels)
    return float(jnp.max(moved)) / size if size > 0 else float("inf")


def _still_groups(flow: ResponseFlow) -> tuple[str, ...]:
    """Groups whose kernel is zero at the start."""
    layers = _groups.resolve(flow.params, flow.groups)
    start = jax.tree.map(lambda leaf: leaf[None], flow.params)
    largest = jnp.max(jnp.abs(_kernels(flow, start, _looked_at(flow), layers)[0]), (1, 2, 3, 4))
    return tuple(
        name for name, size in zip(layers.names, largest.tolist(), strict=True) if size == 0
    )


def _trusted(
    training: Training,
    noise: float | None,
    movement: float,
    still: tuple[str, ...],
    fits: bool,
) -> tuple[Trusted, tuple[str, ...]]:
    """The prediction to trust, and why."""
    if training.noise_multiplier == 0 and training.batches.takes_all:
        reason = "Without noise and sampling there is one run, which the response is exactly."
        return "response", (reason,)
    if training.model is not None and training.model.features is not None:
        return "frozen", (
            "The model is linear in its weights, whose kernel neither training nor noise moves: a "
            "frozen kernel is exact.",
        )
    reasons = []
    if still:
        reasons.append(f"A frozen kernel never trains {', '.join(still)}.")
    if movement > _STILL_KERNEL:
        reasons.append(
            f"Training moves the kernel by {movement:.0%}, which a frozen kernel leaves out."
        )
    if noise is None or noise > _STILL_NOISE:
        size = "The noise of the weights has no scale" if noise is None else f"v(T) is {noise:.2g}"
        reasons.append(f"{size}, so noise may move the kernel too.")
    if not reasons:
        return "frozen", (
            f"The kernel moves by {movement:.1%} and v(T) is {noise:.2g}: a frozen kernel will do.",
        )
    if fits:
        return "response", tuple(reasons)
    reasons.append(
        "The kernels of the response do not fit the memory, so a frozen kernel is shifted by the "
        "run without noise."
    )
    return "shifted", tuple(reasons)


def _cautions(
    training: Training, noise: float | None, largest: float, stable: float | None
) -> tuple[str, ...]:
    """Where predictions have not been tried."""
    cautions = []
    if stable is not None and largest > stable:
        cautions.append(
            f"the learning rate {largest:.3g} is above the largest stable one, {stable:.3g}: at "
            "the edge of stability small differences grow, and runs differ from predictions."
        )
    if training.model is not None and training.model.features is not None:
        return tuple(cautions)  # what follows is about what moves the kernel, and about responses
    if noise is not None and noise > _STRONG_NOISE:
        cautions.append(
            f"v(T) is {noise:.2g}: noise of the size of the weights themselves makes each run a "
            "network of its own; use more draws."
        )
    batch = training.sample_rate * training.flow.n_samples
    samples = not training.batches.takes_all
    if samples and batch < _SMALL_BATCH:
        cautions.append(
            f"a batch has {batch:.1f} samples on average: sampling is then no small perturbation."
        )
    if isinstance(training.optimizer, Adam) and samples:
        cautions.append("the second moment of Adam is predicted without the variance of sampling.")
    return tuple(cautions)
