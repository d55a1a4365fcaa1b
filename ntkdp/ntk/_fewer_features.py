"""Fewer features with nearly the same kernel."""

import jax
import jax.numpy as jnp

from ntkdp._backend import compiled, decompositions, validate
from ntkdp._backend.types import Array, ArrayLike, Float, KeyLike

#: Share of the new features that stand for the directions that are left out.
_SKETCHED = 0.25


def fewer_features(
    features: ArrayLike, *others: ArrayLike, n_features: int, key: KeyLike
) -> tuple[Float[Array, "n n_features"], ...]:
    r"""Fewer features with nearly the same kernel, for predictions that cost less.

    Three quarters of the new features are the coordinates in the leading eigenvectors of
    :math:`\phi^\top \phi`. The others are random projections of what is left of each point, scaled
    to the length that it has, so that every point keeps its :math:`\|\phi(x)\|`.

    Parameters
    ----------
    features : array
        ``(n, D)``, those of the training samples, which choose the eigenvectors.
    *others : array
        ``(m, D)``, those of test points, which are mapped alike.
    n_features : int
        Features that are left; with D or more, all stay as they are.
    key : PRNG key
        Of the projections.

    Returns
    -------
    tuple of arrays
        ``(n, n_features)`` and ``(m, n_features)`` for each of the others.

    Raises
    ------
    ValueError, TypeError
        If features are not matrices with the same D.

    Notes
    -----
    *Derived*. Norms of gradients and the size of the noise at each point stay exact, and so does
    all that happens in the leading eigenvectors; between points, what is left has random errors of
    a share :math:`\sqrt{1/s}` with s projections, whose mean is zero. How much that matters
    depends on the spectrum: compare with all features on fewer runs.

    Examples
    --------
    >>> import jax, ntkdp
    >>> x = jax.random.normal(jax.random.key(0), (50, 20))
    >>> train, test = ntkdp.ntk.fewer_features(x[:40], x[40:], n_features=8, key=jax.random.key(1))
    >>> train.shape, test.shape
    ((40, 8), (10, 8))
    """
    arrays = [validate.array(features=features), *(validate.array(others=o) for o in others)]
    if any(part.ndim != 2 or part.shape[1] != arrays[0].shape[-1] for part in arrays):
        raise ValueError(
            "features and others must have shapes (n, D) and (m, D), got "
            f"{', '.join(str(part.shape) for part in arrays)}"
        )
    if validate.count(n_features=n_features) >= arrays[0].shape[1]:
        return tuple(arrays)
    n_sketched = round(_SKETCHED * n_features)
    _, vectors = decompositions.eigh(arrays[0].T @ arrays[0])
    rest, leading = jnp.split(vectors, [vectors.shape[1] - (n_features - n_sketched)], axis=1)
    shape = (rest.shape[1], n_sketched)
    random = jax.random.normal(validate.key(key=key), shape, vectors.dtype)
    return tuple(_mapped(part, leading, rest, random) for part in arrays)


@compiled.jit()
def _mapped(features: Array, leading: Array, rest: Array, random: Array) -> Array:
    left = features @ rest
    sketch = left @ random
    length, of_sketch = (jnp.linalg.norm(part, axis=1, keepdims=True) for part in (left, sketch))
    scale = jnp.where(of_sketch > 0, length / jnp.where(of_sketch > 0, of_sketch, 1.0), 0.0)
    return jnp.concatenate([features @ leading, scale * sketch], axis=1)
