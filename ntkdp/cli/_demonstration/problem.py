"""The network and the data that the demonstration trains on."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

import ntkdp
from ntkdp import clipping, datasets, losses, models, privacy
from ntkdp._backend.types import Array, Params
from ntkdp.models import Model

N_TRAIN, N_TEST, WIDTH, STEPS = 512, 400, 768, 60
#: The budget of the private runs. delta is far below 1 / N_TRAIN.
BUDGET = privacy.Budget(3.0, 1e-5)
LOSS = losses.SoftmaxCrossEntropy()
RULE = clipping.Abadi(1.0)
#: Runs that are observed, and runs that are drawn to predict them.
OBSERVED, DRAWN = 20, 200


class Problem(NamedTuple):
    """Handwritten digits, a network with one hidden layer, and its infinite-width kernel.

    ``kernel`` is that of all points, training before test.
    """

    model: Model
    params: Params
    x: Array
    y: Array
    test_x: Array
    test_y: Array
    kernel: Array

    @property
    def outputs(self) -> tuple[Array, Array]:
        """Those of the network at the start, on training and test points."""
        return self.model.apply(self.params, self.x), self.model.apply(self.params, self.test_x)

    def flow(self) -> ntkdp.KernelFlow:
        """The flow under the frozen kernel."""
        return ntkdp.KernelFlow(
            self.kernel[:N_TRAIN, :N_TRAIN],
            self.y,
            LOSS,
            RULE,
            test_kernel=self.kernel[N_TRAIN:, :N_TRAIN],
            test_targets=self.test_y,
        )


def make() -> Problem:
    """Load the data, make the network, and compute its kernel."""
    data = datasets.digits(n_train=N_TRAIN, n_test=N_TEST, standardise="unit")
    x, test_x = (jnp.asarray(part, jnp.float32) for part in (data.x_train, data.x_test))
    model = models.mlp([WIDTH], data.n_outputs)
    params = model.init(jax.random.key(0), x)
    kernel = ntkdp.infinite_ntk(model, jnp.concatenate([x, test_x]))
    return Problem(model, params, x, data.y_train, test_x, data.y_test, kernel)
