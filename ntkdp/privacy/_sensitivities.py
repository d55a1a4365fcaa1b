r"""What each sample has added to a run, kept in memory that does not grow with the steps.

A sample's sensitivity in a step is the norm of its clipped gradient over the sensitivity S of the
rule, :math:`s_{ik} = C_{ik} \|g_{ik}\| / S \le 1`. Full batches ask for the sum of squares alone.
With sampling, steps are counted by levels of s, each rounded up to the next level.
"""

from typing import final

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from ntkdp._backend.types import Array

#: How far apart the levels are, so at most how much a sensitivity is rounded up.
_RATIO = 2.0 ** (1 / 8)
#: Levels of sensitivity: the last is 1, and what is below the first counts as the first.
LEVELS = _RATIO ** np.arange(-63, 1)


@final
class Sensitivities(eqx.Module):
    r"""What samples have added to steps so far, in units of the sensitivity S; a pytree.

    Made by ``dp_sgd.run`` with ``individual=True``; :func:`individual` takes it.

    Parameters
    ----------
    squares : array
        ``(n,)``, the sum of :math:`(C_{ik} \|g_{ik}\| / S)^2` over the steps k.
    counts : array
        ``(n, 64)``, the number of steps by level of :math:`C_{ik} \|g_{ik}\| / S`, rounded up to
        levels a factor of :math:`2^{1/8}` apart, the last of which is 1. Steps in which a sample
        adds nothing are in none.
    clipped : array
        ``(n,)``, the number of steps in which the sample was clipped, or the share of its groups.
    steps : array
        The number of steps.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> record = ntkdp.privacy.Sensitivities.start(2, float)
    >>> record = record.after(jnp.array([1.0, 0.0]), jnp.array([True, False]))
    >>> record = record.after(jnp.array([1.0, 0.5]), jnp.array([True, False]))
    >>> record.squares.tolist(), record.counts.sum(axis=1).tolist()
    ([2.0, 0.25], [2, 1])
    """

    squares: Array
    counts: Array
    clipped: Array
    steps: Array

    @classmethod
    def start(cls, n_samples: int, dtype: np.dtype | type) -> "Sensitivities":
        """Nothing yet, for so many samples."""
        counts = jnp.zeros((n_samples, len(LEVELS)), jnp.int32)
        zeros = jnp.zeros(n_samples, dtype)
        return cls(zeros, counts, zeros, jnp.zeros((), jnp.int32))

    def after(self, sensitivities: Array, clipped: Array) -> "Sensitivities":
        """With one step more: what samples add to it ``(n,)``, and which of them are clipped."""
        s = jnp.minimum(sensitivities, 1.0)
        levels = jnp.asarray(LEVELS, s.dtype)
        # Rounding must not put a sensitivity below itself.
        place = jnp.searchsorted(levels, s * (1 + 4 * jnp.finfo(s.dtype).eps))
        place = jnp.minimum(place, len(LEVELS) - 1)
        counts = self.counts.at[jnp.arange(len(s)), place].add((s > 0).astype(jnp.int32))
        return Sensitivities(
            self.squares + (s * s).astype(self.squares.dtype),
            counts,
            self.clipped + clipped.astype(self.clipped.dtype),
            self.steps + 1,
        )
