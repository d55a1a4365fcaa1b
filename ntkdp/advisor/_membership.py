"""How well an attacker can tell, from the trained network, whether a sample was trained on."""

import jax
import jax.numpy as jnp
import numpy as np

from ntkdp import privacy
from ntkdp._backend import validate
from ntkdp._backend.types import Array, ArrayLike, KeyLike, LearningRate, Progress, ScalarLike
from ntkdp.batches import Batches
from ntkdp.gradient_flow import KernelFlow, check_kernel_flow
from ntkdp.noise import Noise
from ntkdp.ntk import LayerwiseKernel
from ntkdp.optimizers import OptimizerLike
from ntkdp.stochastic_flow import ensemble


def membership_advantage(
    flow: KernelFlow,
    initial: ArrayLike,
    sample: int,
    *,
    learning_rate: LearningRate,
    steps: int,
    noise_multiplier: ScalarLike | privacy.Budget = 0.0,
    sample_rate: float = 1.0,
    batches: Batches | None = None,
    noise: Noise | None = None,
    noise_per_group: bool = False,
    optimizer: OptimizerLike | None = None,
    progress: Progress = False,
    key: KeyLike,
) -> privacy.Advantage:
    r"""Predict what an attack on a sample would find: two ensembles, with it and without it.

    The attacker sees the loss of the sample under the trained network and takes it for a member
    if that is below a threshold. Training with the sample and without it is predicted by
    :func:`ntkdp.stochastic_flow.ensemble`, without any run.

    Parameters
    ----------
    flow : KernelFlow
        Kernel, targets, loss and clipping of all samples, the one in question among them.
    initial : array
        Outputs ``(n, K)`` of the training samples at the start.
    sample : int
        Index of the sample.
    learning_rate, steps, noise_multiplier, sample_rate, batches, noise, noise_per_group, \
    optimizer, progress
        As for :func:`ntkdp.stochastic_flow.ensemble`.
    key : PRNG key
        An array of S keys, at least 4, for S predicted runs of each kind.

    Returns
    -------
    privacy.Advantage
        The advantage of the best threshold, TPR - FPR, with its standard error, and the area under
        the curve of both rates.

    Raises
    ------
    TypeError, ValueError
        As for :func:`ntkdp.stochastic_flow.ensemble`; if there is no such sample, or it is the only
        one.

    Notes
    -----
    The attack by the loss is that of Yeom et al. 1709.01604. Other attacks may find more, but none
    more than ``privacy.delta(..., epsilon=0)`` promises. With ``reduction="mean"`` training
    without the sample divides by n - 1. The prediction is *derived*: exact in law for a model that
    is linear in its parameters.

    .. warning::
       It looks at the data, and nothing here is private: see :mod:`ntkdp.advisor`.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ntkdp
    >>> flow = ntkdp.KernelFlow(jnp.eye(2), jnp.array([[0.0], [9.0]]), ntkdp.losses.SquaredError(),
    ...                         ntkdp.clipping.Abadi(1.0), reduction="sum")
    >>> found = ntkdp.advisor.membership_advantage(
    ...     flow, jnp.zeros((2, 1)), 1, learning_rate=0.1, steps=4, noise_multiplier=2.0,
    ...     key=jax.random.split(jax.random.key(0), 2000))
    >>> 0.25 < found.advantage < 0.45  # 0.38 in the limit of many runs
    True
    """
    flow = check_kernel_flow(flow)
    keys = jnp.atleast_1d(validate.keys(key=key))
    n = flow.targets.shape[0]
    index = validate.count(0, sample=sample)
    if index >= n or n < 2:
        raise ValueError(f"sample must be one of several, below {n}, got {sample}")
    steps = validate.count(steps=steps)
    everyone = np.arange(n)
    rest = everyone[everyone != index]
    order = np.append(rest, index)

    def losses_of(trained: np.ndarray, keys: Array) -> np.ndarray:
        """Final losses of the sample, after training on some."""
        followed = order[len(trained) :]
        part = KernelFlow(
            _kernel(flow, trained, trained),
            flow.targets[trained],
            flow.loss,
            flow.clipping,
            reduction=flow.reduction,
            test_kernel=_kernel(flow, followed, trained) if followed.size else None,
        )
        start = jnp.asarray(initial)
        path = ensemble(
            part,
            (start[trained], start[followed]) if followed.size else start[trained],
            learning_rate=learning_rate,
            steps=steps,
            noise_multiplier=noise_multiplier,
            sample_rate=sample_rate,
            batches=batches,
            noise=noise,
            noise_kernel=_kernel(flow, order, order) if followed.size else None,
            noise_per_group=noise_per_group,
            optimizer=optimizer,
            record_every=steps,
            outputs=True,
            progress=progress,
            key=keys,
        )
        outputs = path.test_outputs if followed.size else path.outputs
        assert outputs is not None
        last = outputs[:, -1, -1:]
        target = flow.targets[index : index + 1]
        return np.asarray(jax.vmap(lambda f: flow.loss(f, target))(last))[:, 0]

    # Other numbers for other data sets, as two attackers' runs would have.
    with_it, without_it = (jax.vmap(jax.random.fold_in, (0, None))(keys, k) for k in (0, 1))
    return privacy.advantage(-losses_of(order, with_it), -losses_of(rest, without_it))


def _kernel(flow: KernelFlow, rows: np.ndarray, columns: np.ndarray) -> Array | LayerwiseKernel:
    """The kernel of some training points against others."""
    terms = flow.terms()[:, rows][:, :, columns]
    if flow.clipping.scope == "flat":
        return terms[0]
    return LayerwiseKernel(tuple(str(group) for group in range(len(terms))), terms)
