"""Predictions of an experiment: their names, the kernels that each needs, and their computation."""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ntkdp import gradient_flow, ntk, stochastic_flow
from ntkdp._backend.config_files import ConfigError
from ntkdp._backend.types import Array, Params, Progress
from ntkdp._estimators.sharpness_aware import SharpnessAware
from ntkdp._estimators.zeroth_order import ZerothOrder
from ntkdp._gradients import groups
from ntkdp.batches import Batches
from ntkdp.clipping import Adaptive, ClippingRule, check_adaptive
from ntkdp.experiment._batches_and_noise import StrategyFor
from ntkdp.experiment._config import ClippingConfig, Config
from ntkdp.experiment._problem import Problem
from ntkdp.gradient_flow import Flow, HeavyBallFlow, KernelFlow, WeightFlow, recursion, solve
from ntkdp.noise import Correlated, Independent, Noise
from ntkdp.ntk import FeatureKernel, LayerwiseKernel
from ntkdp.trajectory import Trajectory

#: The kernel that a prediction needs, by its name in results, or None.
KERNEL_OF = {
    "exact": None,
    "frozen": "empirical",
    "infinite": "infinite",
    "recursion": "empirical",
    "response": None,
}
#: Names of predictions in tables and pictures.
LABELS = {
    "exact": "exact flow",
    "frozen": "frozen kernel",
    "infinite": "infinite width",
    "recursion": "kernel recursion",
    "response": "response",
}


#: The most outputs, of training and test points together, whose noise is drawn jointly.
_MOST_WITH_TEST = 4000


class Kernel(NamedTuple):
    """A kernel of the training set, of the test set against it, and the seconds that they took.

    ``whole`` is the kernel of all points with each other, if the noise of both sets is drawn, and
    ``public`` that of all points against public samples, if there are any. Points are in the order
    of training, public and test samples.

    Made by :func:`ntkdp.experiment.kernel_of`.
    """

    train: Array | LayerwiseKernel | FeatureKernel
    test: Array | LayerwiseKernel | FeatureKernel
    whole: Array | LayerwiseKernel | FeatureKernel | None
    seconds: float
    public: Array | LayerwiseKernel | FeatureKernel | None = None


class Mechanism(NamedTuple):
    """The parts of a run besides clipping."""

    learning_rate: float
    steps: int
    noise_multiplier: float
    batches: Batches
    noise: Noise | None
    adaptive: Adaptive | None
    sharpness_aware: SharpnessAware | None
    zeroth_order: ZerothOrder | None

    @classmethod
    def of(
        cls,
        config: Config,
        case: ClippingConfig,
        n_params: int,
        strategy_for: StrategyFor | None = None,
    ) -> "Mechanism":
        """The mechanism for one rule, which may have its own learning rate and steps.

        ``strategy_for`` finds noise that is the best under a kernel; until the kernel is known,
        independent noise is in its place.
        """
        training = config.training
        steps = case.steps or training.steps
        try:
            noise = training.as_noise(steps, strategy_for)
            n_private = config.data.n_train - config.public.rows
            sigma = training.sigma(steps, noise, n_private)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"field 'training': {error}") from error
        return cls(
            case.learning_rate_in(training),
            steps,
            sigma,
            training.as_batches,
            noise,
            training.adaptive.make(),
            training.sharpness_aware.make(n_params),
            training.zeroth_order.make(),
        )

    @property
    def parts(self) -> dict[str, Any]:
        """What runs and ensembles take alike, by the names of their arguments."""
        return {
            "noise_multiplier": self.noise_multiplier,
            "batches": self.batches,
            "noise": self.noise,
            "adaptive": self.adaptive,
            "sharpness_aware": self.sharpness_aware,
            "zeroth_order": self.zeroth_order,
        }

    def check_adaptive(self, rule: ClippingRule, n_groups: int) -> None:
        """Raise unless the clipping norm of the rule can move, with noise enough for its count."""
        try:
            adaptive = check_adaptive(self.adaptive, rule)
            if adaptive is not None:
                adaptive.sum_noise_multiplier(self.noise_multiplier, n_groups)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"field 'training.adaptive': {error}") from error


def needed_kernels(config: Config) -> set[str]:
    """Kinds of kernels that the predictions use."""
    kinds = {KERNEL_OF[name] for name in config.predictions if not _moves(config, name)}
    if config.training.noisy and config.training.noise.kind == "kernel_optimal":
        kinds.add("empirical")
    return {kind for kind in kinds if kind is not None}


def _moves(config: Config, name: str) -> bool:
    """Whether the prediction follows a kernel that noise moves, which it computes itself."""
    return name == "infinite" and config.training.noisy and not config.model.is_linear


def noise_free(config: Config) -> list[str]:
    """Names of the predictions of ``config`` that leave out the noise of the runs.

    Examples
    --------
    >>> import ntkdp
    >>> config = ntkdp.experiment.config(
    ...     predictions=["exact", "recursion"], training={"noise_multiplier": 1.0})
    >>> ntkdp.experiment.noise_free(config)
    ['exact']
    """
    if not config.training.noisy:
        return []
    noisy = {"infinite", "recursion", "response"}
    return [name for name in config.predictions if name not in noisy]


def kernel_of(config: Config, problem: Problem, kind: str) -> Kernel:
    """The kernel of a ``problem``, by layer if any rule of ``config`` needs the layers.

    ``kind`` is "empirical" or "infinite".

    Examples
    --------
    >>> import ntkdp
    >>> config = ntkdp.experiment.config(data={"n_train": 8, "n_test": 4}, model={"widths": [16]})
    >>> problem = ntkdp.experiment.problem_of(config)
    >>> ntkdp.experiment.kernel_of(config, problem, "infinite").train.total.shape
    (8, 8)
    """
    return compute_kernel(
        problem,
        kind,
        by_layer=any(case.scope == "layerwise" for case in config.clipping),
        whole=kind == "empirical" and needs_whole_kernel(config, problem),
        batch_size=config.batch_size,
    )


def needs_whole_kernel(config: Config, problem: Problem) -> bool:
    """Whether the noise of training and test outputs is drawn together."""
    n_outputs = sum(outputs.size for outputs in problem.start)
    drawn = config.training.moves_at_random and "recursion" in config.predictions
    # Public samples move with the private ones, whatever it takes.
    return drawn and (n_outputs <= _MOST_WITH_TEST or problem.public is not None)


def compute_kernel(
    problem: Problem, kind: str, *, by_layer: bool, whole: bool, batch_size: int | None
) -> Kernel:
    """A kernel of training and test points, ``whole`` or only the part that drives the outputs.

    That of a linear head without public samples is in features, from which the noise of both is
    drawn anyway.
    """
    start = time.perf_counter()
    model, x, test_x, n = problem.model, problem.x, problem.test_x, len(problem.x)
    if model.features is not None and problem.public is None:
        features, test_features = model.features(x), model.features(test_x)
        factored = FeatureKernel(features), FeatureKernel(test_features, features)
        jax.block_until_ready(factored)
        return Kernel(*factored, None, time.perf_counter() - start)
    n_public = problem.n_public
    points = [x, *([] if problem.public is None else [problem.public.x]), test_x]

    def between(x1: Array, x2: Array | None = None) -> Array | LayerwiseKernel:
        if kind == "infinite":
            return (ntk.layerwise_infinite_ntk if by_layer else ntk.infinite_ntk)(model, x1, x2)
        empirical = ntk.layerwise_ntk if by_layer else ntk.empirical_ntk
        return empirical(model.apply, problem.params, x1, x2, batch_size=batch_size)

    everything = public = None
    if whole:
        everything = between(jnp.concatenate(points))
        own, of_public = slice(n), slice(n, n + n_public)
        train = _part(everything, own, own, by_layer)
        test = _part(everything, slice(n + n_public, None), own, by_layer)
        if n_public:
            public = _part(everything, slice(None), of_public, by_layer)
    else:
        train, test = between(x), between(test_x, x)
        if problem.public is not None:
            public = between(jnp.concatenate(points), problem.public.x)
    jax.block_until_ready((train, test, public))
    return Kernel(train, test, everything, time.perf_counter() - start, public)


def _part(
    kernel: Array | LayerwiseKernel, rows: slice, columns: slice, by_layer: bool
) -> Array | LayerwiseKernel:
    def part(values: Array) -> Array:
        return values[:, rows, columns] if by_layer else values[rows, columns]

    found: Array | LayerwiseKernel = jax.tree.map(part, kernel)
    return found


def predict(
    config: Config,
    problem: Problem,
    kernels: dict[str, Kernel],
    rule: ClippingRule,
    mechanism: Mechanism,
    name: str,
    times: Array,
    outputs: bool,
    progress: Progress,
) -> tuple[Trajectory, float]:
    """A prediction at the recorded times of a run, and the seconds that it took.

    With noise or sampling, a prediction that follows them is an ensemble with a leading seed axis.
    """
    training = config.training
    steps: Any = {
        "learning_rate": mechanism.learning_rate,
        "steps": mechanism.steps,
        "record_every": training.record_every,
        "outputs": outputs,
        "progress": progress,
    }
    optimizer = training.as_optimizer
    key = jax.random.split(jax.random.key(config.seed + 2), training.n_predicted)
    drawn: Any = {
        "noise_multiplier": mechanism.noise_multiplier,
        "batches": mechanism.batches,
        "noise": mechanism.noise,
        "key": key,
    }
    start = time.perf_counter()
    initial: Array | tuple[Array, ...] = problem.start
    if _moves(config, name):
        two_times = stochastic_flow.TwoTimeFlow(
            problem.model,
            problem.x,
            problem.targets,
            problem.loss,
            rule,
            reduction=training.reduction,
            test_x=problem.test_x,
            test_targets=problem.test_targets,
        )
        predicted = stochastic_flow.two_time_ensemble(
            two_times, initial, optimizer=optimizer, **steps, **drawn
        )
        jax.block_until_ready(predicted.loss)
        return predicted, time.perf_counter() - start
    if name == "response":
        network = stochastic_flow.ResponseFlow(
            problem.model.apply,
            problem.params,
            problem.x,
            problem.targets,
            problem.loss,
            rule,
            reduction=training.reduction,
            test_x=problem.test_x,
            test_targets=problem.test_targets,
        )
        predicted = stochastic_flow.response_ensemble(
            network, optimizer=optimizer, **steps, **drawn
        )
        jax.block_until_ready(predicted.loss)
        return predicted, time.perf_counter() - start
    # With noise, a kernel at infinite width comes here if it is that of a linear head.
    if name == "recursion" or (name == "infinite" and training.noisy):
        kernel = kernels["infinite" if name == "infinite" else "empirical"]
        drawn_together = kernel.whole is not None or isinstance(kernel.train, FeatureKernel)
        alone = training.moves_at_random and not drawn_together
        flow = _kernel_flow(config, problem, kernel, rule, test=not alone)
        initial = problem.outputs if alone else initial
        steps |= {"optimizer": optimizer}
        if training.weight_decay > 0:
            at_zero = _outputs_at_zero(problem)
            steps["outputs_at_zero"] = at_zero[0] if alone else at_zero
        if training.is_random or not mechanism.batches.takes_all:
            predicted = stochastic_flow.ensemble(
                flow, initial, noise_kernel=kernel.whole, key=key, **steps, **mechanism.parts
            )
        else:
            steps |= {name: mechanism.parts[name] for name in ("adaptive", "sharpness_aware")}
            predicted = recursion(flow, initial, **steps)
        jax.block_until_ready(predicted.loss)
        return predicted, time.perf_counter() - start
    return _solved(config, problem, kernels, rule, mechanism, name, times, outputs, progress)


def strategy_for(
    config: Config,
    problem: Problem,
    kernels: dict[str, Kernel],
    case: ClippingConfig,
    rule: ClippingRule,
) -> StrategyFor | None:
    """What finds the noise that adds least to the loss under the network's own kernel.

    None without noise, which is not correlated then.
    """
    training = config.training
    if not training.noisy:
        return None

    def found(n_bands: int) -> Noise:
        flow = _kernel_flow(config, problem, kernels["empirical"], rule, test=False)
        at_zero = _outputs_at_zero(problem)[0] if training.weight_decay > 0 else None
        return least_noise(
            flow,
            problem.outputs,
            learning_rate=case.learning_rate_in(training),
            steps=case.steps or training.steps,
            n_bands=n_bands,
            batches=training.as_batches,
            optimizer=training.as_optimizer,
            outputs_at_zero=at_zero,
        )

    return found


def least_noise(
    flow: KernelFlow, initial: Array, *, steps: int, batches: Batches, **options: Any
) -> Correlated:
    """The strategy that adds least to the final loss, scaled to cost what independent noise does.

    The options are those of :func:`ntkdp.stochastic_flow.optimal_noise`.
    """
    best = stochastic_flow.optimal_noise(flow, initial, steps=steps, batches=batches, **options)
    cost = Independent().sensitivity(batches, steps) / best.sensitivity(batches, steps)
    return Correlated(best.strategy * cost)


def _outputs_at_zero(problem: Problem) -> tuple[Array, ...]:
    """Outputs of the linearised network whose weights are all zero, as a problem's start."""
    params = problem.params

    def at_zero(x: Array) -> Array:
        outputs, slope = jax.jvp(lambda w: problem.model.apply(w, x), (params,), (params,))
        found: Array = outputs - slope
        return found

    public = () if problem.public is None else (at_zero(problem.public.x),)
    return (at_zero(problem.x), *public, at_zero(problem.test_x))


def _solved(
    config: Config,
    problem: Problem,
    kernels: dict[str, Kernel],
    rule: ClippingRule,
    mechanism: Mechanism,
    name: str,
    times: Array,
    outputs: bool,
    progress: Progress,
) -> tuple[Trajectory, float]:
    """Solve a flow without noise."""
    kind = KERNEL_OF[name]
    flow: Flow
    initial: Params
    if kind is None:
        initial = problem.params
        flow = WeightFlow(
            problem.model.apply,
            problem.x,
            problem.targets,
            problem.loss,
            rule,
            reduction=config.training.reduction,
            test_x=problem.test_x,
            test_targets=problem.test_targets,
            public=problem.public,
        )
    else:
        initial = problem.start
        flow = _kernel_flow(config, problem, kernels[kind], rule)
    unit = 1.0
    if config.training.momentum > 0:
        # The flow with inertia has its own unit of time, sqrt(learning_rate) a step.
        unit = mechanism.learning_rate**0.5
        flow = HeavyBallFlow(flow, (1 - config.training.momentum) / unit)

    def solved(times: Array, progress: Progress) -> Trajectory:
        path = solve(
            flow,
            initial,
            times,
            rtol=config.rtol,
            atol=config.atol,
            outputs=outputs,
            progress=progress,
        )
        jax.block_until_ready(path.loss)
        return path

    # So short a horizon takes a few steps; it compiles the program that is timed next.
    solved(times / unit * 1e-9, progress)
    start = time.perf_counter()
    predicted = solved(times / unit, progress)
    return predicted.rescale_time(unit), time.perf_counter() - start


def _kernel_flow(
    config: Config, problem: Problem, kernel: Kernel, rule: ClippingRule, *, test: bool = True
) -> KernelFlow:
    return gradient_flow.KernelFlow(
        kernel.train,
        problem.targets,
        problem.loss,
        rule,
        reduction=config.training.reduction,
        test_kernel=kernel.test if test else None,
        test_targets=problem.test_targets if test else None,
        public=problem.public,
        public_kernel=kernel.public,
    )


def weight_noise(
    config: Config, problem: Problem, rule: ClippingRule, mechanism: Mechanism
) -> float | None:
    """v(T), the variance that noise has added to weights by the end, relative to their own.

    None where it is not known: under Adam, if the clipping norm moves, and for weights that start
    without variance.
    """
    if mechanism.noise_multiplier == 0:
        return 0.0
    if config.training.optimizer == "adam" or mechanism.adaptive is not None:
        return None
    n_groups = 1
    if rule.scope == "layerwise":
        n_groups = groups.resolve(problem.params).size
    gathered = stochastic_flow.weight_noise_variance(
        rule,
        problem.x.shape[0],
        learning_rate=mechanism.learning_rate,
        steps=mechanism.steps,
        noise_multiplier=mechanism.noise_multiplier * problem.private_share,
        batches=mechanism.batches,
        noise=mechanism.noise,
        n_groups=n_groups,
        reduction=config.training.reduction,
        optimizer=config.training.as_optimizer,
    )
    try:
        relative = stochastic_flow.relative_weight_noise(
            gathered[-1], problem.model, problem.params, problem.x
        )
    except ValueError:
        return None
    return float(relative)
