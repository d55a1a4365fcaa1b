"""Norms of per-sample gradients, and how each parameter of a network is used."""

import equinox as eqx
import jax

from ntkdp._backend import validate
from ntkdp._backend.types import ApplyFn, Array, Float, Params, Real
from ntkdp._gradients import clipped_sum, per_sample
from ntkdp._gradients import groups as _groups
from ntkdp._gradients.check_model import check_inputs, check_model


def gradient_structure(
    apply_fn: ApplyFn, params: Params, x: Real[Array, "n ..."]
) -> dict[str, str]:
    r"""How the gradient of each parameter is computed, which tells why it is fast or slow.

    If a parameter meets data in a *product*, a *convolution* or a *lookup* of rows, its gradient is
    not formed but kept as the input there and the cotangent of the output. Several such uses add up
    if they lie in the parameter alike, or apart. *Element by element* is a bias or a scale, whose
    gradient is as small as its cotangent. For any other use the description is *per-sample
    Jacobian*, with the reason: that parameter, and only it, takes n K times its size in memory for
    a block of n samples.

    Parameters
    ----------
    apply_fn, params, x
        As for :func:`empirical_ntk`.

    Returns
    -------
    dict
        A description of each parameter by its key path.

    Raises
    ------
    ValueError
        As for :func:`empirical_ntk`.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> apply = lambda p, x: jnp.sort(x @ p["w"] + p["b"]) * jnp.sort(p["s"])
    >>> params = {"b": jnp.ones(2), "s": jnp.ones(2), "w": jnp.ones((3, 2))}
    >>> for name, how in ntkdp.ntk.gradient_structure(apply, params, jnp.ones((1, 3))).items():
    ...     print(name, "-", how)
    b - element by element
    s - per-sample Jacobian: used in `sort`
    w - product
    """
    x = check_inputs(apply_fn, params, x)
    structure = per_sample.trace(apply_fn, params, x)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]
    return dict(zip(names, structure.descriptions, strict=True))


def per_sample_gradient_norms(
    apply_fn: ApplyFn,
    params: Params,
    x: Real[Array, "n ..."],
    output_gradient: Float[Array, "n K"],
    *,
    groups: _groups.GroupSpec = None,
) -> Float[Array, "*groups n"]:
    r"""Norms of the per-sample gradients :math:`g_i = J_i^\top a_i`, without forming them.

    Parameters
    ----------
    apply_fn, params, x
        As for :func:`empirical_ntk`.
    output_gradient : array
        :math:`a_i`, shape ``(n, K)``: the gradient of each sample's own loss in its outputs, never
        divided by n.
    groups : pytree prefix of labels, or callable from key path to label, optional
        With it, one norm for each group; without it, one over all parameters.

    Returns
    -------
    array
        ``(n,)``, or ``(R, n)`` with ``groups``.

    Raises
    ------
    ValueError
        As for :func:`empirical_ntk`; also if the output gradient is not ``(n, K)``.

    Notes
    -----
    If a layer is a product, the norm is the product of the norms of its input and of its output's
    cotangent (Goodfellow 2015); :math:`\|g_i\|^2 = a_i^\top H_{ii} a_i`.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> x, a = jnp.array([[3.0, 4.0]]), jnp.array([[2.0]])
    >>> ntkdp.per_sample_gradient_norms(lambda w, x: x @ w, jnp.ones((2, 1)), x, a).tolist()
    [10.0]
    """
    x, outputs = check_model(apply_fn, params, x)
    output_gradient = validate.array(output_gradient=output_gradient)
    expected = outputs.shape
    if output_gradient.shape != expected:
        raise ValueError(
            f"output_gradient must have the shape of the outputs, {expected}, "
            f"got {output_gradient.shape}"
        )
    output_gradient = validate.finite(output_gradient=output_gradient)
    if groups is None:
        resolved = _groups.Groups(("all",), (0,) * len(jax.tree.leaves(params)))
    else:
        resolved = _groups.resolve(params, groups)
    norms = _norms(apply_fn, params, x, output_gradient, resolved)
    return norms[0] if groups is None else norms


@eqx.filter_jit
def _norms(
    apply_fn: ApplyFn, params: Params, x: Array, output_gradient: Array, groups: _groups.Groups
) -> Array:
    _, factors = clipped_sum.gradients(apply_fn, params, x, lambda f, a: a, output_gradient)
    return per_sample.grouped_norms(factors, groups.leaf_to_group, groups.size, x.shape[0])
