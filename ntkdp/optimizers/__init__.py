r"""Optimizers that runs and predictions take alike: from a clipped, noisy gradient to a step.

An optimizer is a function of the learning rate that returns an optax transformation, as
``optax.adam`` is. `SGD` and `Adam` are made of optax's parts; what they add is that predictions can
tell what they do:

- A **linear** optimizer moves the weights by a linear function of gradients and weights: `SGD` with
  momentum, Nesterov momentum, weight decay and averages. It commutes with every linear map, the
  Jacobian of a linear model among them, so the *same* transformation acts on the outputs: minus
  their velocity, noise included, takes the place of the gradient and :math:`J w` that of the
  weights. That is why a frozen kernel predicts it.
- `Adam` divides by a second moment of each weight, which outputs do not tell.

``average`` is the decay d of an exponential moving average of the weights at which a run is
measured, while its gradients are taken at the weights themselves:
:math:`\bar w_0 = w_0,\ \bar w_{k+1} = d\,\bar w_k + (1 - d)\,w_{k+1}`. It starts at the initial
weights and is not debiased, as ``optax.incremental_update``, ``flax.nnx.EMA`` and PyTorch's
``get_ema_avg_fn`` have it. It is part of what is released, and costs no privacy.
"""

from ntkdp.optimizers._adam import Adam
from ntkdp.optimizers._known import as_linear as as_linear
from ntkdp.optimizers._known import as_optimizer as as_optimizer
from ntkdp.optimizers._known import recognised as recognised
from ntkdp.optimizers._optimizer import Optimizer
from ntkdp.optimizers._optimizer import OptimizerLike as OptimizerLike
from ntkdp.optimizers._optimizer import average_of as average_of
from ntkdp.optimizers._optimizer import next_average as next_average
from ntkdp.optimizers._optimizer import start_average as start_average
from ntkdp.optimizers._optimizer import updated as updated
from ntkdp.optimizers._sgd import SGD
from ntkdp.optimizers._transition import Transition as Transition
from ntkdp.optimizers._transition import size_of_state as size_of_state
from ntkdp.optimizers._transition import start_state as start_state
from ntkdp.optimizers._transition import transition as transition

__all__ = ["SGD", "Adam", "Optimizer"]
