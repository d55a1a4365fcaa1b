"""What one private step does to the loss: descent, curvature, sampling noise and privacy noise."""

from typing import NamedTuple, final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ntkdp._backend import validate
from ntkdp._backend.subgroups import Labels, subgroups
from ntkdp._backend.types import Array, ArrayLike, ScalarLike
from ntkdp.batches import Batches, FixedSize, Full, Poisson
from ntkdp.batches import resolve as resolve_batches
from ntkdp.gradient_flow import KernelFlow, KernelLike, KernelMatrix, check_kernel_flow
from ntkdp.losses import Reduction
from ntkdp.stochastic_flow import Sampling, noise_variances


@final
class StepTerms(eqx.Module):
    r"""Parts of the expected change of the loss in one step; a pytree.

    .. math:: E\, L^+ - L = -\eta\, \text{descent}
        + \frac{\eta^2}{2} (\text{curvature} + \text{sampling} + \text{privacy})

    Each part is an array whose last axis are the samples, each with its own loss. :meth:`total`
    and :meth:`by_group` gather them.

    Made by :func:`decompose`, with an example.
    """

    descent: Array
    curvature: Array
    sampling: Array
    privacy: Array
    reduction: Reduction = eqx.field(static=True)

    def total(self) -> "StepTerms":
        """Parts for all samples: the mean, or the sum if the flow sums its losses."""
        gather = jnp.mean if self.reduction == "mean" else jnp.sum
        gathered: StepTerms = jax.tree.map(lambda part: gather(part, axis=-1), self)
        return gathered

    def by_group(self, labels: Labels) -> "StepTerms":
        """Parts for the mean loss of each subgroup.

        ``labels`` ``(n,)`` says which group a sample is in; the last axis of the result are the
        groups in the order of their sorted labels.
        """
        groups = subgroups(labels, self.descent.shape[-1])
        grouped: StepTerms = jax.tree.map(groups.means, self)
        return grouped

    def change(self, learning_rate: ScalarLike) -> Array:
        """Expected change of the loss in a step with this learning rate."""
        rate = jnp.asarray(learning_rate)
        return -rate * self.descent + rate**2 / 2 * self._spread()

    def best_learning_rate(self) -> Array:
        """The learning rate of the largest expected decrease; zero if every step adds to the loss.

        It is infinite if nothing stands against the descent.
        """
        descent = jnp.maximum(self.descent, 0.0)
        spread = self._spread()
        unopposed = jnp.where(descent > 0, jnp.inf, 0.0)
        return jnp.where(spread > 0, descent / jnp.where(spread > 0, spread, 1.0), unopposed)

    def best_change(self) -> Array:
        """Expected change of the loss in a step with the best learning rate, zero or negative."""
        descent = jnp.maximum(self.descent, 0.0)
        return -descent * self.best_learning_rate() / 2

    def _spread(self) -> Array:
        return self.curvature + self.sampling + self.privacy


class Decomposition(NamedTuple):
    """Parts of one step for training samples, and for test samples if there are any; a pytree.

    Made by :func:`decompose`, with an example.
    """

    train: StepTerms
    test: StepTerms | None


def decompose(
    flow: KernelFlow,
    outputs: ArrayLike | tuple[ArrayLike, ArrayLike],
    *,
    noise_multiplier: ScalarLike = 0.0,
    sample_rate: float = 1.0,
    batches: Batches | None = None,
    noise_kernel: KernelLike | None = None,
    noise_per_group: bool = False,
) -> Decomposition:
    r"""Split what the next private step is expected to do to the loss into four parts.

    With velocities :math:`v_{ji} = \sum_r H_r(j, i) C_{ir} a_i / n` of the outputs of sample j that
    sample i causes, :math:`u_j = \sum_i v_{ji}`, and the second derivative :math:`M_j` of the loss
    of sample j in its outputs, the parts of the loss of sample j are

    .. math::
        \text{descent} = a_j^\top u_j, \qquad \text{curvature} = u_j^\top M_j u_j, \\
        \text{sampling} = \frac{1-q}{q} \sum_i v_{ji}^\top M_j v_{ji}, \qquad
        \text{privacy} = \Big(\frac{\sigma S}{q n}\Big)^2 \operatorname{tr}(M_j H_{jj}),

    without the n if losses are summed.

    Parameters
    ----------
    flow : KernelFlow
        Kernel, targets, loss and clipping; with a test kernel, test samples are followed too.
    outputs : array or pair
        Outputs ``(n, K)`` before the step, or a (train, test) pair if the flow has a test kernel.
        With a leading axis T, as in ``Trajectory.outputs``, the parts have it too.
    noise_multiplier : float
        :math:`\sigma`, the noise of the summed gradient over the sensitivity S.
    sample_rate : float
        The sampling rate q in (0, 1].
    batches : batches.Batches, optional
        Full ones, Poisson sampling or batches of a fixed size, in place of a sampling rate.
    noise_kernel, noise_per_group
        As for :func:`ntkdp.stochastic_flow.ensemble`.

    Returns
    -------
    Decomposition
        With parts ``(n,)`` and ``(m,)``, one for each sample.

    Raises
    ------
    TypeError, ValueError
        As for :func:`ntkdp.stochastic_flow.ensemble`. Also if batches are cyclic or shuffled, since
        their next batch depends on those before, or if the kernel is shared among devices.

    Notes
    -----
    Exact for the squared loss under a frozen kernel. Other losses are expanded to second order in
    the change of the outputs, so that the error is of third order in it. For a network, whose
    kernel moves during the step, it is the Gauss-Newton part. For one output without groups it is
    the decomposition of Bu, Zhang, Dai and Wang 2402.18752 in kernel form, *derived* (claim C43).
    With batches of a fixed size the sum for sampling is over :math:`v_{ji} - u_j/n`, times
    :math:`n/(n-1)`.

    The parts say what limits training. If curvature is the largest, the learning rate is limited by
    stability. If sampling is, larger batches help. If privacy is, more samples or a larger budget
    help; larger batches hardly do, since the same budget asks for more noise in them.

    .. warning::
       It looks at the data, and nothing here is private: see :mod:`ntkdp.advisor`.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> flow = ntkdp.KernelFlow(2.0 * jnp.eye(2), jnp.zeros((2, 1)), ntkdp.losses.SquaredError(),
    ...                         ntkdp.clipping.Abadi(10.0))
    >>> parts = ntkdp.advisor.decompose(
    ...     flow, jnp.array([[3.0], [1.0]]), noise_multiplier=0.1, sample_rate=0.5).train.total()
    >>> round(parts.best_learning_rate().item(), 3), round(parts.best_change().item(), 3)
    (0.417, -1.042)
    """
    flow = check_kernel_flow(flow)
    drawn = resolve_batches(batches, sample_rate)
    n = flow.targets.shape[0]
    drawn.check(n)
    if not isinstance(drawn, Full | Poisson | FixedSize):
        raise ValueError(
            f"batches must be full, Poisson or of a fixed size, got {drawn!r}, whose next batch "
            "depends on those before; take FixedSize of the same size for the first step"
        )
    if flow.mesh is not None:
        raise ValueError("flow must have its kernel on one device, got one on a mesh")
    noisy = bool(np.asarray(validate.non_negative(noise_multiplier=noise_multiplier)) > 0)
    variances = None
    if noisy:
        variances = noise_variances(flow, noise_multiplier, noise_kernel, noise_per_group)
    pair = outputs if isinstance(outputs, tuple) else (outputs,)
    arrays = tuple(validate.array(outputs=part) for part in pair)
    along = arrays[0].ndim == 3 and all(len(part) == len(arrays[0]) for part in arrays)
    state = arrays if not along else tuple(part[0] for part in arrays)
    checked = flow.init(state if len(state) > 1 else state[0])
    if not along:
        return _decomposed(flow, checked, drawn, variances)
    train = arrays[0].astype(checked[0].dtype).reshape(-1, *checked[0].shape)
    test = None if checked[1] is None else arrays[1].astype(train.dtype)
    return _along(flow, (train, test), drawn, variances)


@eqx.filter_jit
def _along(
    flow: KernelFlow, states: tuple[Array, Array | None], drawn: Batches, variances: Array | None
) -> Decomposition:
    found: Decomposition = jax.lax.map(
        lambda state: _decomposed(flow, state, drawn, variances), states
    )
    return found


@eqx.filter_jit
def _decomposed(
    flow: KernelFlow, state: tuple[Array, Array | None], drawn: Batches, variances: Array | None
) -> Decomposition:
    train, test = state
    n = train.shape[0]
    clipped = flow.clipped_gradients(train)
    alone, together = Sampling.of(drawn, n)
    own, others = (None, None) if variances is None else (variances[:n], variances[n:])

    def of(outputs: Array, targets: Array, kernel: KernelMatrix, added: Array | None) -> StepTerms:
        slope = flow.loss.output_gradient(outputs, targets)
        bend = flow.loss.output_hessian(outputs, targets)
        privacy = jnp.zeros(len(outputs), outputs.dtype)
        if added is not None:
            through = "nkk,n->n" if added.ndim == 1 else "nkl,nlk->n"
            privacy = jnp.einsum(through, bend, added) / (drawn.share(n) * flow.data.divisor) ** 2

        u = kernel.push(clipped)
        curvature = jnp.einsum("jk,jkl,jl->j", u, bend, u)
        spread = kernel.spreads(clipped, bend)
        sampling = alone * spread - together * curvature
        descent = jnp.sum(slope * u, axis=1)
        return StepTerms(descent, curvature, sampling, privacy, flow.reduction)

    of_test = None
    if test is not None and flow.test_drive is not None and flow.test_targets is not None:
        of_test = of(test, flow.test_targets, flow.test_drive, others)
    return Decomposition(of(train, flow.targets, flow.drive, own), of_test)
