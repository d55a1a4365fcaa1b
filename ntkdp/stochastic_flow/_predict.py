"""One call from a network and its training to predicted private runs."""

from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax

from ntkdp import ntk
from ntkdp._backend import validate
from ntkdp._backend.types import ApplyFn, Array, KeyLike, LearningRate, Params, Progress, PyTree
from ntkdp.batches import Batches
from ntkdp.batches import resolve as resolve_batches
from ntkdp.clipping import ClippingRule
from ntkdp.gradient_flow import KernelFlow, LinearisedFlow, recursion
from ntkdp.losses import Loss, Reduction, SampleLoss
from ntkdp.models import Model
from ntkdp.noise import Noise
from ntkdp.noise import resolve as resolve_noise
from ntkdp.ntk import FeatureKernel, LayerwiseKernel
from ntkdp.optimizers import Optimizer, OptimizerLike
from ntkdp.stochastic_flow._diagnosis import Data, Training, diagnosed, flow_of
from ntkdp.stochastic_flow._ensemble.ensemble import ensemble
from ntkdp.stochastic_flow._response.ensemble import DRAWS, response_ensemble
from ntkdp.stochastic_flow._response.flow import ResponseFlow
from ntkdp.stochastic_flow._shift import shifted
from ntkdp.stochastic_flow._two_time.ensemble import two_time_ensemble
from ntkdp.stochastic_flow._two_time.flow import TwoTimeFlow
from ntkdp.stochastic_flow._weight_noise import NoiseMultiplier
from ntkdp.trajectory import Stepping, Trajectory

#: How runs are predicted.
Method: TypeAlias = Literal["auto", "frozen", "shifted", "two_time", "noise_path", "response"]


def predict(
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
    method: Method = "auto",
    n_runs: int = 100,
    nodes: int | None = None,
    draws: int = DRAWS,
    record_every: int = 1,
    outputs: bool = False,
    progress: Progress = False,
    key: KeyLike,
) -> Trajectory:
    r"""Predict private runs of a network, by the method that may be trusted.

    Parameters
    ----------
    model, params, data, loss, clipping
        As for :func:`diagnose`.
    learning_rate, steps, noise_multiplier, sample_rate, batches, noise, optimizer
        As for :func:`diagnose`.
    groups, noise_per_group, reduction
        As for :func:`diagnose`.
    method : str
        ``"auto"`` takes the one that :func:`diagnose` trusts. ``"frozen"`` freezes the kernel at
        the start (:func:`ensemble`), without forming it if it does not fit the memory.
        ``"shifted"`` moves that by a run without noise (:func:`shifted`). ``"two_time"`` takes
        kernels between times at infinite width (:func:`two_time_ensemble`), for a model of
        :mod:`ntkdp.models`. ``"response"`` and ``"noise_path"`` are :func:`response_ensemble` about
        the run without noise, and about the start.
    n_runs : int
        Number of runs that are drawn, if ``key`` is one key.
    nodes, draws : int, optional
        Times at which the response takes kernels, and draws of the noise that these are made from,
        as for :func:`response_ensemble`.
    record_every : int
        Record every so many steps, and the last one.
    outputs : bool
        Record the outputs too.
    progress : bool or callable
        True shows a bar on a terminal; a function is called with the fraction done.
    key : PRNG key
        One key, or an array of keys with one for each run.

    Returns
    -------
    Trajectory
        Runs along a leading seed axis, of which :func:`ntkdp.trajectory.band` makes a band and
        :func:`ntkdp.plotting.loss_curves` a picture; one run if nothing is random.
        ``Trajectory.method`` says how it was predicted, and why.

    Raises
    ------
    ValueError, TypeError, MemoryError
        As for :func:`diagnose` and for the method.

    Notes
    -----
    *Derived*; each method says what it leaves out. With ``"auto"``, a run without noise is made
    once more than the method itself needs, to choose it.

    .. warning::
       The prediction looks at the data, and nothing here is private: see :mod:`ntkdp.advisor`.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ntkdp
    >>> x = jnp.eye(4)
    >>> model = ntkdp.models.mlp([64], 1)
    >>> params = model.init(jax.random.key(0), x)
    >>> runs = ntkdp.predict(
    ...     model, params, (x, jnp.ones((4, 1))), ntkdp.losses.SquaredError(),
    ...     ntkdp.clipping.Abadi(1.0), learning_rate=0.5, steps=20, noise_multiplier=0.1,
    ...     n_runs=30, key=jax.random.key(1))
    >>> runs.loss.shape, runs.method.partition(".")[0]
    ((30, 21), 'Response of the network to noise')
    """
    validate.choice(get_args(Method), method=method)
    flow = flow_of(model, params, data, loss, clipping, groups, reduction)
    stepping = Stepping(learning_rate, steps, record_every)
    drawn, correlated = resolve_batches(batches, sample_rate), resolve_noise(noise)
    training = Training.of(
        flow, model, optimizer, stepping, noise_multiplier, drawn, correlated, noise_per_group
    )
    keys = validate.keys(key=key)
    if training.is_random and keys.ndim == 0:
        keys = jax.random.split(keys, validate.count(n_runs=n_runs))
    elif not training.is_random:
        keys = keys.ravel()[0]
    reasons: tuple[str, ...] = ()
    if method == "auto":
        diagnosis = diagnosed(training, keys.size)
        method, reasons = diagnosis.method, diagnosis.reasons
        reasons += tuple(f"Caution: {one}" for one in diagnosis.cautions)
    of_response = {"nodes": nodes, "draws": draws}
    predicted = _drawn(training, method, keys, outputs, progress, of_response)
    words = " ".join([f"{_IN_WORDS[method]}.", *reasons])
    return replace(
        predicted, setup=tuple(replace(setup, method=words) for setup in predicted.setup)
    )


_IN_WORDS = {
    "frozen": "Kernel frozen at the start",
    "shifted": "Kernel frozen at the start, shifted by the run without noise",
    "two_time": "Kernels between times at infinite width",
    "noise_path": "Response of the network to gradients about the noise alone",
    "response": "Response of the network to noise",
}


def _drawn(
    training: Training,
    method: str,
    keys: Array,
    outputs: bool,
    progress: Progress,
    of_response: dict[str, Any],
) -> Trajectory:
    """Runs by a method."""
    asked: dict[str, Any] = {
        "noise_multiplier": training.noise_multiplier,
        "batches": training.batches,
        "noise": training.noise,
        "noise_per_group": training.noise_per_group,
        "key": keys,
        "progress": progress,
        **_steps(training),
    }
    if method in ("response", "noise_path"):
        about: Literal["path", "start"] = "path" if method == "response" else "start"
        return response_ensemble(
            training.flow, about=about, outputs=outputs, **of_response, **asked
        )
    if method == "two_time":
        return _two_time(training, outputs, asked)
    frozen = _frozen(training)
    if method == "frozen":
        return frozen.draw(outputs, asked)
    runs = frozen.draw(True, asked)
    one = keys.ravel()[0]
    real = response_ensemble(training.flow, outputs=True, key=one, **_steps(training))
    moved = shifted(runs, frozen.flow, predicted=frozen.path(_steps(training)), observed=real)
    return moved if outputs else replace(moved, outputs=None, test_outputs=None)


def _steps(training: Training) -> dict[str, Any]:
    stepping = training.stepping
    return {
        "learning_rate": stepping.learning_rate,
        "steps": stepping.steps,
        "record_every": stepping.record_every,
        "optimizer": training.optimizer,
    }


class _Frozen(NamedTuple):
    """A model that is linear in its parameters, by its kernel or without it."""

    flow: KernelFlow | LinearisedFlow
    initial: PyTree
    noise_kernel: Array | LayerwiseKernel | FeatureKernel | None
    at_zero: PyTree

    def draw(self, outputs: bool, asked: dict[str, Any]) -> Trajectory:
        """Noisy runs."""
        return ensemble(
            self.flow,
            self.initial,
            noise_kernel=self.noise_kernel,
            outputs_at_zero=self.at_zero,
            outputs=outputs,
            **asked,
        )

    def path(self, steps: dict[str, Any]) -> Trajectory:
        """The run without noise on full batches, with its outputs."""
        return recursion(
            self.flow, self.initial, outputs_at_zero=self.at_zero, outputs=True, **steps
        )


def _frozen(training: Training) -> _Frozen:
    """By the kernel if the optimizer is linear and the kernel fits the memory."""
    if isinstance(training.optimizer, Optimizer) and training.optimizer.is_linear:
        try:
            return _with_kernel(training, training.optimizer)
        except MemoryError:
            pass
    flow = training.flow
    linearised = LinearisedFlow(
        flow.apply_fn,
        flow.params,
        flow.x,
        flow.targets,
        flow.loss,
        flow.clipping,
        groups=flow.groups,
        reduction=flow.reduction,
        test_x=flow.test_x,
        test_targets=flow.test_targets,
    )
    return _Frozen(linearised, flow.params, None, None)


def _with_kernel(training: Training, optimizer: Optimizer) -> _Frozen:
    flow, n = training.flow, training.flow.n_samples
    kernel = _kernel(flow, training.model)

    def rows(chosen: slice) -> Array | LayerwiseKernel | FeatureKernel:
        if isinstance(kernel, FeatureKernel):
            return FeatureKernel(kernel.rows[chosen], kernel.rows[:n])
        if isinstance(kernel, LayerwiseKernel):
            return LayerwiseKernel(kernel.names, kernel.values[:, chosen, :n])
        return kernel[chosen, :n]

    has_test = flow.test_x is not None
    kernel_flow = KernelFlow(
        rows(slice(n)),
        flow.targets,
        flow.loss,
        flow.clipping,
        reduction=flow.reduction,
        test_kernel=rows(slice(n, None)) if has_test else None,
        test_targets=flow.test_targets,
    )

    def parted(outputs: Array) -> PyTree:
        return (outputs[:n], outputs[n:]) if has_test else outputs

    at_zero = None
    if optimizer.decays_weights:
        outputs, moved = jax.jvp(
            lambda w: flow.outputs(w, flow.points), (flow.params,), (flow.params,)
        )
        at_zero = parted(outputs - moved)
    # The features of a head say how noise moves test points too.
    factored = isinstance(kernel, FeatureKernel)
    noisy = has_test and training.noise_multiplier > 0 and not factored
    initial = parted(flow.outputs(flow.params, flow.points))
    return _Frozen(kernel_flow, initial, kernel if noisy else None, at_zero)


def _kernel(flow: ResponseFlow, model: Model | None) -> Array | LayerwiseKernel | FeatureKernel:
    """The kernel of all points with each other, by group if groups are clipped apart."""
    if model is not None and model.features is not None and flow.groups is None:
        return ntk.linear_ntk(model, flow.points)
    if flow.clipping.scope == "flat":
        return ntk.empirical_ntk(flow.apply_fn, flow.params, flow.points)
    return ntk.layerwise_ntk(flow.apply_fn, flow.params, flow.points, groups=flow.groups)


def _two_time(training: Training, outputs: bool, asked: dict[str, Any]) -> Trajectory:
    flow, model = training.flow, training.model
    if model is None:
        raise ValueError(
            "method must not be 'two_time' without a model of ntkdp.models, whose layers have "
            "kernels between times, got a function; take 'response'"
        )
    if flow.groups is not None:
        raise ValueError(
            "groups must be None with method='two_time', which knows the layers, got "
            f"{flow.groups!r}; take 'response'"
        )
    infinite = TwoTimeFlow(
        model,
        flow.x,
        flow.targets,
        flow.loss,
        flow.clipping,
        reduction=flow.reduction,
        test_x=flow.test_x,
        test_targets=flow.test_targets,
    )
    start = flow.outputs(flow.params, flow.points)
    initial: Any = start
    if flow.test_x is not None:
        initial = (start[: flow.n_samples], start[flow.n_samples :])
    return two_time_ensemble(infinite, initial, outputs=outputs, **asked)
