"""The classes that flows belong to: a velocity, and something to measure along the way."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace

import equinox as eqx
from jax.sharding import Mesh

from ntkdp._backend.schedules import Schedule
from ntkdp._backend.types import Array, Float, PyTree, ScalarLike
from ntkdp._results.setup import Setup, described, noise_of, number, optimizer_of, rates
from ntkdp.clipping import ClippingRule
from ntkdp.losses import Loss, Reduction
from ntkdp.optimizers import OptimizerLike
from ntkdp.trajectory import HasTrainingSet, Measurement, PublicRows, Stepping


class Flow(eqx.Module):
    """An autonomous ordinary differential equation with something to measure along it.

    Subclasses are final. :func:`ntkdp.solve` integrates any of them, with an example.
    """

    @abstractmethod
    def init(self, initial: PyTree) -> PyTree:
        """The state that ``initial`` describes, checked."""

    @abstractmethod
    def velocity(self, state: PyTree) -> PyTree:
        """Time derivative of the state."""

    @abstractmethod
    def measure(self, state: PyTree, outputs: bool) -> Measurement:
        """Losses, accuracies and clip fraction at a state, and outputs on request."""

    def setup(self) -> Setup | None:
        """The training that it predicts, for comparisons; None if that is not known."""
        return None


class TrainingFlow(HasTrainingSet, Flow):
    """The flow of a model that is trained on a `TrainingSet`."""

    mesh: eqx.AbstractVar[Mesh | None]

    @abstractmethod
    def velocity_and_norms(self, state: PyTree) -> tuple[PyTree, Float[Array, "R n"]]:
        """Time derivative of the state, and the norms of the gradients by group (flat: R = 1)."""

    @abstractmethod
    def setup(self) -> Setup:
        """The training that it predicts, for comparisons."""


class LinearModelFlow(TrainingFlow):
    """The flow of a model that is linear in its parameters, which also takes steps and noise."""

    public: eqx.AbstractVar[PublicRows | None]

    @abstractmethod
    def velocity(self, state: PyTree, weights: Float[Array, " n"] | None = None) -> PyTree:
        """Time derivative of the state, for a batch if the samples have ``weights``."""

    @abstractmethod
    def velocity_and_norms(
        self, state: PyTree, weights: Float[Array, " n"] | None = None
    ) -> tuple[PyTree, Float[Array, "R n"]]:
        """The same, and the norms of all samples' gradients by group (flat: R = 1)."""

    @abstractmethod
    def gradient_norm(
        self,
        state: PyTree,
        weights: Float[Array, " n"] | None,
        drift: PyTree,
        noise: PyTree | None = None,
        noise_square: ScalarLike = 0.0,
    ) -> Float[Array, ""]:
        """Norm, over all weights of the model, of the gradient with its noise at a state.

        Its velocity is ``drift + noise``, and ``noise_square`` the squared norm of the noise in the
        weights, where the state does not show it.
        """

    @abstractmethod
    def losses_along(self, state: PyTree, direction: PyTree) -> Callable[[Array], Array]:
        """Losses of the training samples ``(n,)`` as a function of the way along a direction."""

    @property
    @abstractmethod
    def n_terms(self) -> int:
        """Groups that clipping tells apart: 1 flat, R layerwise."""


class WrappedFlow(Flow):
    """A flow around another flow, which must not be wrapped itself."""

    flow: eqx.AbstractVar[Flow]


def check_linear_model_flow(flow: object, way_out: str = "") -> LinearModelFlow:
    """``flow`` if it takes steps and noise."""
    if not isinstance(flow, LinearModelFlow):
        raise TypeError(
            f"flow must be a KernelFlow or a LinearisedFlow, got {type(flow).__name__}{way_out}"
        )
    return flow


def setup_of(
    rule: ClippingRule,
    loss: Loss,
    reduction: Reduction,
    optimizer: str = "sgd",
    public: PublicRows | None = None,
) -> Setup:
    """The training that a flow predicts: without steps, noise and sampling."""
    return Setup(
        clipping=described(rule),
        loss=described(loss),
        reduction=reduction,
        optimizer=optimizer,
        neglects=("noise", "sampling"),
        public="" if public is None else public.in_words,
    )


def with_steps(
    setup: Setup,
    stepping: Stepping,
    noise_multiplier: ScalarLike | Schedule | None = None,
    sample_rate: ScalarLike | None = None,
    noise_per_group: bool = False,
    optimizer: OptimizerLike | None = None,
) -> Setup:
    """``setup`` with the steps of a run, and with optimizer, noise and the like if given."""
    has_noise = noise_multiplier is not None
    if optimizer is not None and setup.optimizer != "preconditioned":
        kind, options = optimizer_of(optimizer)
        setup = replace(setup, optimizer=kind, optimizer_options=options)
    return replace(
        setup,
        learning_rate=rates(stepping.learning_rate, stepping.steps),
        steps=stepping.steps,
        **noise_of(noise_multiplier),
        sample_rate=number(sample_rate),
        noise_per_group=bool(noise_per_group),
        neglects=() if has_noise else setup.neglects,
    )
