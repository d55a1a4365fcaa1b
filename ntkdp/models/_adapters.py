"""Models from equinox modules, flax modules and plain functions."""

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

import equinox as eqx
import jax

from ntkdp._backend.types import ApplyFn, Array, Params, PRNGKeyArray, PyTree
from ntkdp.models._model import InitFn, Model, checked_model

if TYPE_CHECKING:
    import flax.linen

_Module = TypeVar("_Module")


def from_function(init: InitFn, apply: ApplyFn) -> Model:
    """A model of plain functions.

    They are ``init(key, x) -> params`` and ``apply(params, x)``, which returns ``(n, K)`` or
    ``(n,)`` and must treat the samples of a batch one by one.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> def init(key, x):
    ...     return jax.random.normal(key, x.shape[1:])
    >>> model = from_function(init, lambda w, x: x @ w)
    >>> x = jnp.ones((5, 3))
    >>> model.apply(model.init(jax.random.key(0), x), x).shape
    (5, 1)
    """
    return checked_model(init, apply)


def from_equinox(module: eqx.Module | Callable[[PRNGKeyArray], eqx.Module]) -> Model:
    """A model from an equinox module that acts on a single sample.

    Parameters
    ----------
    module
        A function from a key to a new module, or a module. Given a module, ``init`` returns **the
        module's own arrays, whatever the key**: give a function for random initial weights.

    Returns
    -------
    Model
        ``apply`` maps the module over the batch; its params are the module's floating-point arrays,
        ``eqx.filter(module, eqx.is_inexact_array)``. What else the module holds is constant.

    Raises
    ------
    TypeError
        If ``module`` is, or makes, no equinox module.
    ValueError
        If the module keeps state between calls, as batch normalisation does, which couples the
        samples of a batch, and spectral normalisation; or if it has dropout in training mode.

    Examples
    --------
    >>> import equinox as eqx, jax, jax.numpy as jnp
    >>> model = from_equinox(lambda key: eqx.nn.MLP(4, 2, width_size=8, depth=1, key=key))
    >>> x = jnp.ones((5, 4))
    >>> model.apply(model.init(jax.random.key(0), x), x).shape
    (5, 2)
    """
    build = _builder(module, eqx.Module, "an equinox")
    template = build(jax.random.key(0))
    _refuse_coupled_equinox(template)
    constant = eqx.filter(template, eqx.is_inexact_array, inverse=True)

    def init(key: PRNGKeyArray, x: Array) -> Params:
        return eqx.filter(build(key), eqx.is_inexact_array)

    def apply(params: Params, x: Array) -> Array:
        network: Callable[[Array], Array] = jax.vmap(eqx.combine(params, constant))
        return network(x)

    return checked_model(init, apply)


def from_flax(
    module: "flax.linen.Module | Callable[..., object]",
    *,
    state: Mapping[str, PyTree] | None = None,
    **call_arguments: Any,
) -> Model:
    """A model from a flax network.

    Parameters
    ----------
    module
        A `flax.linen` module; or a function from a key to a `flax.nnx` module; or a `flax.nnx`
        module, for which ``init`` returns **the module's own arrays, whatever the key**: give a
        function for random initial weights, ``lambda key: Net(rngs=nnx.Rngs(key))``.
    state
        For linen modules only: the collections other than ``"params"`` that the module reads, such
        as ``{"batch_stats": ...}``. They are constant. (An nnx module holds its own.)
    **call_arguments
        Arguments that the module is called with on each batch, such as ``train=False``.

    Returns
    -------
    Model
        Its params are a nested dictionary of the ``"params"`` collection, or of the `nnx.Param`.

    Raises
    ------
    TypeError
        If ``module`` is, or makes, no flax module.
    ValueError
        On ``init`` and ``apply``, if the module changes its state or draws random numbers while it
        runs. Batch normalisation in training mode does so: it couples the samples of a batch, so
        that no per-sample gradient exists. Also if it reads collections that ``state`` lacks.
    ImportError
        If flax is not installed.

    Examples
    --------
    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> model = from_flax(nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)]))
    >>> x = jnp.ones((5, 4))
    >>> model.apply(model.init(jax.random.key(0), x), x).shape
    (5, 2)
    """
    try:
        from flax import linen
    except ImportError as error:
        raise ImportError('from_flax needs flax: pip install "ntkdp[flax]"') from error
    if isinstance(module, type) and issubclass(module, linen.Module):
        raise TypeError(
            f"module must be a flax module, got the class {module.__name__}: make an instance, "
            f"{module.__name__}(...)"
        )
    if isinstance(module, linen.Module):
        return _from_linen(module, state or {}, call_arguments)
    if state is not None:
        raise ValueError(f"state is for linen modules, got {state!r} with {module!r}")
    return _from_nnx(module, call_arguments)


_COUPLED = (
    "Batch normalisation in training mode couples the samples of a batch, so that no per-sample "
    "gradient exists"
)


def _builder(
    module: object, kind: type[_Module], article: str
) -> Callable[[PRNGKeyArray], _Module]:
    """A function from a key to the module, whether ``module`` is one or makes one."""

    if isinstance(module, type) and issubclass(module, kind) and not _takes_a_key(module):
        raise TypeError(
            f"module must be {article} module or a function from a key to one, got the class "
            f"{module.__name__}: make an instance, or a function, "
            f"lambda key: {module.__name__}(...)"
        )

    def build(key: PRNGKeyArray) -> _Module:
        made = module if isinstance(module, kind) or not callable(module) else module(key)
        if not isinstance(made, kind):
            raise TypeError(
                f"module must be {article} module or a function from a key to one, got {module!r}"
            )
        return made

    return build


def _takes_a_key(kind: type) -> bool:
    """Whether a class makes an instance from a key, and nothing else, under that name."""
    required = [
        name
        for name, parameter in inspect.signature(kind).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind in {parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD}
    ]
    return required == ["key"]


def _refuse_coupled_equinox(module: eqx.Module) -> None:
    def is_special(node: object) -> bool:
        return isinstance(node, eqx.nn.StateIndex | eqx.nn.Dropout)

    for node in jax.tree.leaves(module, is_leaf=is_special):
        if isinstance(node, eqx.nn.StateIndex):
            raise ValueError(
                "module must not keep state between calls, got one with an equinox.nn.StateIndex. "
                f"{_COUPLED}: use equinox.nn.LayerNorm or GroupNorm instead"
            )
        if isinstance(node, eqx.nn.Dropout) and not node.inference and node.p > 0:
            raise ValueError(
                f"module must be deterministic, got {node!r} in training mode: use "
                "equinox.nn.inference_mode(module)"
            )


def _from_linen(
    module: "flax.linen.Module", state: Mapping[str, PyTree], call_arguments: dict[str, Any]
) -> Model:
    from flax import errors

    def init(key: PRNGKeyArray, x: Array) -> Params:
        variables = module.init(key, x, **call_arguments)
        missing = sorted(set(variables) - {"params"} - set(state))
        if missing:
            raise ValueError(
                f"module reads collections {missing} besides its parameters: pass them as "
                f"constants, from_flax(module, state={{{missing[0]!r}: ...}}). {_COUPLED}"
            )
        if "params" not in variables:
            raise ValueError(f"module must have parameters, got none in {module!r}")
        return variables["params"]

    def apply(params: Params, x: Array) -> Array:
        try:
            outputs = module.apply({**state, "params": params}, x, **call_arguments)
        except errors.ModifyScopeVariableError as error:
            raise ValueError(
                f"module changes its state while it runs ({error}). {_COUPLED}: set "
                "use_running_average=True, by a call argument of from_flax if the module takes one"
            ) from error
        except errors.InvalidRngError as error:
            raise ValueError(
                f"module draws random numbers while it runs ({error}): set deterministic=True, by "
                "a call argument of from_flax if the module takes one"
            ) from error
        # A pair only with `mutable`, and `checked_model` refuses it.
        return cast(Array, outputs)

    return checked_model(init, apply)


def _from_nnx(module: object, call_arguments: dict[str, Any]) -> Model:
    from flax import nnx

    build = _builder(module, nnx.Module, "a flax")
    template = build(jax.random.key(0))
    graph, template_params = nnx.graphdef(template), nnx.state(template, nnx.Param)
    constant = nnx.state(template, nnx.Not(nnx.Param))
    before = jax.tree.leaves(constant)

    def init(key: PRNGKeyArray, x: Array) -> Params:
        return nnx.to_pure_dict(nnx.state(build(key), nnx.Param))

    def apply(params: Params, x: Array) -> Array:
        variables = jax.tree.map(lambda leaf: leaf, template_params)
        nnx.replace_by_pure_dict(variables, params)
        # Without the copy the network would change the variables of `constant` in place.
        network = nnx.merge(graph, variables, constant, copy=True)
        outputs: Array = network(x, **call_arguments)
        after = jax.tree_util.tree_leaves_with_path(nnx.state(network, nnx.Not(nnx.Param)))
        changed = [
            jax.tree_util.keystr(path[:-1], simple=True, separator="/")
            for (path, new), old in zip(after, before, strict=True)
            if new is not old
        ]
        if changed:
            raise ValueError(
                f"module changes its state while it runs: {', '.join(changed)}. {_COUPLED}, and "
                "dropout is random: call module.eval() first"
            )
        return outputs

    return checked_model(init, apply)
