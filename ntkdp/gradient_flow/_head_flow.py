"""The flow of a linear head on features, in its weights."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ntkdp import clipping as _clipping
from ntkdp._backend import norms as _norms
from ntkdp._backend.types import Array, Float, PyTree, ScalarLike
from ntkdp._results.setup import Setup
from ntkdp.gradient_flow._flow import LinearModelFlow
from ntkdp.gradient_flow._kernel_flow import KernelFlow
from ntkdp.gradient_flow._kernel_matrix import Features
from ntkdp.trajectory import Measurement, PublicRows, TrainingSet


class HeadFlow(LinearModelFlow):
    r"""The flow of a `KernelFlow` over features, in the weights: :math:`f = f_0 + \phi W`.

    The state is :math:`W^\top`, ``(K, D)``: how far the weights have moved. A step on a batch needs
    the features of its samples alone, while all outputs are needed to measure.
    """

    # Products with W^T read the features row by row, which is several times as fast as with W.

    rows: Float[Array, "n D"]
    test_rows: Float[Array, "m D"] | None
    outputs: tuple[Array, Array | None]
    diagonal: Float[Array, "1 n"]
    data: TrainingSet
    own_setup: Setup
    public: PublicRows | None
    mesh: Mesh | None = eqx.field(static=True)

    def __init__(self, flow: KernelFlow, outputs: tuple[Array, Array | None]) -> None:
        assert isinstance(flow.drive, Features)
        dtype = outputs[0].dtype
        self.rows = flow.drive.rows.astype(dtype)
        test = flow.test_drive
        self.test_rows = test.rows.astype(dtype) if isinstance(test, Features) else None
        self.outputs = outputs
        self.diagonal = flow.diagonal
        self.data = flow.data
        self.own_setup = flow.setup()
        self.public = self.mesh = None

    @staticmethod
    def follows(flow: object) -> bool:
        """Whether the weights follow all that the flow does."""
        return (
            isinstance(flow, KernelFlow)
            and isinstance(flow.drive, Features)
            and not (flow.preconditioned or flow.public is not None or flow.mesh is not None)
        )

    def setup(self) -> Setup:
        """The training that it predicts, for comparisons."""
        return self.own_setup

    def init(self, initial: None = None) -> Float[Array, "K D"]:
        """The state at the outputs that the flow was made with."""
        return jnp.zeros((self.outputs[0].shape[1], self.rows.shape[1]), self.rows.dtype)

    @property
    def n_terms(self) -> int:
        """One group."""
        return 1

    def velocity(
        self, state: Float[Array, "K D"], weights: Float[Array, " n"] | None = None
    ) -> Float[Array, "K D"]:
        """Time derivative of the weights; for a batch if the samples have ``weights``."""
        return self.velocity_and_norms(state, weights)[0]

    def velocity_and_norms(
        self, state: Float[Array, "K D"], weights: Float[Array, " n"] | None = None
    ) -> tuple[Float[Array, "K D"], Float[Array, "R n"]]:
        """The same, and the norms of all samples' gradients, in one row."""
        return self._of_samples(state, slice(None), weights)

    def velocity_of_batch(
        self, state: Float[Array, "K D"], batch: Array, weights: Float[Array, " places"]
    ) -> tuple[Float[Array, "K D"], Float[Array, "R places"]]:
        """The same for a batch by the numbers of its samples, whose features alone are read.

        Where the weight of a place is zero it holds no sample.
        """
        of_arrays, rest = eqx.partition((self, state, batch, weights), eqx.is_array)

        def of_run(of_arrays: PyTree) -> tuple[Array, Array]:
            flow, *of_batch = eqx.combine(of_arrays, rest)
            velocity, norms = flow._of_samples(*of_batch)
            return velocity, norms

        # Batches of several runs are taken one after the other: together they do not fit the cache.
        velocity, norms = jax.custom_batching.sequential_vmap(of_run)(of_arrays)
        return velocity, norms

    def _of_samples(
        self, state: Array, chosen: Array | slice, weights: Array | None
    ) -> tuple[Array, Array]:
        rows = self.rows[chosen]
        outputs = self.outputs[0][chosen] + rows @ state.T
        a = self.loss.output_gradient(outputs, self.targets[chosen]).astype(state.dtype)
        if weights is not None:
            # Samples that are not drawn have no part in the norm of the sum either.
            a = jnp.where(weights[:, None] > 0, a, 0.0)
        norms = _norms.through_kernel(self.diagonal[:, chosen], a)
        total = _norms.of_all(a.T @ rows)[None] if self.clipping.needs_total_norm else None
        factors = self.clipping.by_group(norms, total)[0]
        if weights is not None:
            factors = factors * weights
        clipped = factors[:, None] * a / self.data.divisor
        return -(clipped.T @ rows).astype(state.dtype), norms

    def gradient_norm(
        self,
        state: Array,
        weights: Float[Array, " n"] | None,
        drift: Array,
        noise: Array | None = None,
        noise_square: ScalarLike = 0.0,
    ) -> Float[Array, ""]:
        """Norm of the gradient with its noise, which the velocity is but for its sign."""
        return _norms.of_all(drift if noise is None else drift + noise)

    def losses_along(self, state: Array, direction: Array) -> Callable[[Array], Array]:
        """Losses of the training samples ``(n,)`` as a function of the way along a direction."""
        outputs = self.outputs[0] + self.rows @ state.T
        change = self.rows @ direction.T
        return lambda way: self.loss(outputs + way * change, self.targets)

    def measure(self, state: Float[Array, "K D"], outputs: bool) -> Measurement:
        """Losses, accuracies and clip fraction at a state."""
        train, test = self.outputs
        train = train + self.rows @ state.T
        if test is not None and self.test_rows is not None:
            test = test + self.test_rows @ state.T
        a = self.loss.output_gradient(train, self.targets)
        norms = _norms.through_kernel(self.diagonal, a)
        total = _norms.of_all(a.T @ self.rows)[None] if self.clipping.needs_total_norm else None
        factors = self.clipping.by_group(norms, total)
        return self.data.measure(train, test, _clipping.clip_fraction(factors), outputs)
