"""The problem of an experiment: data, network and rules from a configuration."""

import importlib
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ntkdp import clipping, datasets, losses, models
from ntkdp._backend.config_files import ConfigError, check_as
from ntkdp._backend.types import Array, Params
from ntkdp.clipping import ClippingRule
from ntkdp.experiment._config import Config
from ntkdp.experiment._problem_config import ModelConfig, ProblemConfig
from ntkdp.losses import Loss
from ntkdp.models import Model
from ntkdp.trajectory import PublicRows

#: A model of one's own: itself, a function of the number of outputs that makes it, or its name.
ModelLike: TypeAlias = Model | Callable[[int], Model] | str
Kind = TypeVar("Kind", bound=ProblemConfig)


class Problem(NamedTuple):
    """Model, data and loss, and the network's outputs at the start.

    If some of the training samples are public, they are not among ``x``. ``groups`` and
    ``test_groups`` are the labels of subgroups, if results are shown by them.

    Made by :func:`ntkdp.experiment.problem_of`.
    """

    model: Model
    params: Params
    x: Array
    targets: Array
    test_x: Array
    test_targets: Array
    loss: Loss
    outputs: Array
    test_outputs: Array
    public: PublicRows | None = None
    public_outputs: Array | None = None
    groups: np.ndarray | None = None
    test_groups: np.ndarray | None = None

    @property
    def n_public(self) -> int:
        """Number of public samples."""
        return 0 if self.public is None else self.public.n_samples

    @property
    def private_share(self) -> float:
        """Share of the private gradient in a step, and of its noise."""
        return 1.0 if self.public is None else float(self.public.private_share)

    @property
    def n_params(self) -> int:
        """Number of weights."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    @property
    def start(self) -> tuple[Array, ...]:
        """Outputs of training, public (if there are any) and test samples."""
        public = () if self.public_outputs is None else (self.public_outputs,)
        return (self.outputs, *public, self.test_outputs)


def rules_of(config: Config) -> list[ClippingRule]:
    """The clipping rules of ``config``, checked.

    Raises
    ------
    ConfigError
        If a rule is unknown, or a parameter is wrong or does not belong to its rule.

    Examples
    --------
    >>> import ntkdp
    >>> config = ntkdp.experiment.config(clipping=[{"rule": "psac", "clip_norm": 0.5}])
    >>> [type(rule).__name__ for rule in ntkdp.experiment.rules_of(config)]
    ['PSAC']
    """
    rules = []
    for number, case in enumerate(config.clipping):
        options: dict[str, Any] = {"scope": case.scope}
        options |= {
            name: getattr(case, name)
            for name in ("gamma", "r", "Z")
            if getattr(case, name) is not None
        }
        if case.rule != "none":
            options["R"] = case.clip_norm
        elif not np.all(np.isfinite(case.clip_norm)):
            raise ConfigError(
                f"field 'clipping.{number}': R must be positive and finite, got {case.clip_norm}"
            )
        try:
            rule = clipping.from_name(case.rule, **options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"field 'clipping.{number}': {error}") from error
        if config.training.noisy and not rule.bounds_each_sample:
            given = config.training.noise_multiplier or "a budget"
            raise ConfigError(
                f"field 'training.noise_multiplier': must be 0 with rule {case.rule!r}, whose "
                f"sensitivity is unbounded, got {given}"
            )
        rules.append(rule)
    return rules


def problem_of(config: ProblemConfig, model: ModelLike | None = None) -> Problem:
    """Load the data of ``config``, make the network and initialise it.

    Parameters
    ----------
    config : Config
        Of an experiment, or that of a sweep.
    model : Model, callable or str, optional
        The network in place of ``config.model``, as for :func:`ntkdp.experiment.run`.

    Returns
    -------
    Problem

    Raises
    ------
    ConfigError
        If the data or the model cannot be made, or the loss does not fit the targets.

    Examples
    --------
    >>> import ntkdp
    >>> config = ntkdp.experiment.config(data={"n_train": 8, "n_test": 4}, model={"widths": [16]})
    >>> ntkdp.experiment.problem_of(config).outputs.shape
    (8, 10)
    """
    given = model
    if given is not None and config.model.kind != "given":
        config = with_model(config, given)
    if config.dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise ConfigError(
            "field 'dtype': float64 needs JAX's 64-bit mode, call ntkdp.enable_x64() first"
        )
    data_config = config.data
    column = data_config.groups
    try:
        data = datasets.load(
            data_config.name,
            n_train=data_config.n_train,
            n_test=data_config.n_test,
            standardise=data_config.standardise,
            seed=config.seed,
            **({"flat": False} if _wants_images(config) else {}),
            **({} if column in (None, "class") else {"groups": column}),
            **data_config.options,
        )
    except (OSError, TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"field 'data': {error}") from error
    groups, test_groups = _groups_of(data, column)
    options = {"delta": config.huber_delta} if config.loss == "huber" else {}
    loss = losses.from_name(config.loss, **options)
    # One output tells two classes apart for the logistic loss.
    n_outputs = 1 if config.loss == "logistic" else data.n_outputs
    # Numbers of tokens are looked up, by a network that must be one's own.
    tokens = config.model.is_own and jnp.issubdtype(data.x_train.dtype, jnp.integer)
    x, test_x = (
        jnp.asarray(part, None if tokens else config.dtype) for part in (data.x_train, data.x_test)
    )
    try:
        model = _model_of(config, n_outputs, given)
        params = model.init(jax.random.key(config.seed), x)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"field 'model': {config.model.kind} for samples of shape {x.shape[1:]}: {error}"
        ) from error
    params = jax.tree.map(lambda leaf: leaf.astype(config.dtype), params)
    targets, test_targets = (
        _as_targets(part, data.task, config, data.n_outputs) for part in (data.y_train, data.y_test)
    )
    try:
        targets = loss.check(targets, x.shape[0], n_outputs)
        test_targets = loss.check(test_targets, test_x.shape[0], n_outputs, "test targets")
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"field 'loss': {config.loss} does not fit the {data.task} data {data.name!r}: {error}"
        ) from error
    outputs = model.apply(params, x)
    if outputs.shape[1] != n_outputs:
        raise ConfigError(
            f"field 'model': must have {n_outputs} outputs for the {data.task} data {data.name!r} "
            f"with the loss {config.loss}, got {outputs.shape[1]}"
        )
    public = public_outputs = None
    n_public = config.public.rows
    if n_public >= len(x):
        raise ConfigError(
            f"field 'training.public.rows': must leave a private sample of the {len(x)} of "
            f"data.n_train, got {n_public}"
        )
    if n_public:
        public = PublicRows(x[:n_public], targets[:n_public], weight=config.public.weight)
        public_outputs = outputs[:n_public]
    return Problem(
        model=model,
        params=params,
        x=x[n_public:],
        targets=targets[n_public:],
        test_x=test_x,
        test_targets=test_targets,
        loss=loss,
        outputs=outputs[n_public:],
        test_outputs=model.apply(params, test_x),
        public=public,
        public_outputs=public_outputs,
        groups=None if groups is None else groups[n_public:],
        test_groups=test_groups,
    )


def _groups_of(
    data: datasets.Dataset, column: str | None
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Labels of the subgroups of training and test samples: classes, or what the source says."""
    if column != "class":
        return data.groups_train, data.groups_test
    if data.class_names is None:
        raise ConfigError(
            f"field 'data.groups': must not be 'class' with the {data.task} data {data.name!r}, "
            "which have none; name a column of the file"
        )
    names = np.asarray(data.class_names)
    return names[np.asarray(data.y_train)], names[np.asarray(data.y_test)]


def require_infinite_width(problem: Problem, field: str) -> None:
    """Raise unless the model has kernels of infinite width, which ``field`` asks for."""
    if problem.model.kernel_fn is None:
        raise ConfigError(
            f"field {field!r}: must not ask for 'infinite' with a model of your own that has "
            "no kernel_fn; use the network's own kernel"
        )


def _wants_images(config: ProblemConfig) -> bool:
    return config.model.kind == "cnn" and config.data.name in ("digits", "mnist5k")


def _as_targets(targets: Array, task: str, config: ProblemConfig, n_classes: int) -> Array:
    if task == "classification" and config.loss in ("squared_error", "huber"):
        return jax.nn.one_hot(targets, n_classes, dtype=config.dtype)
    if jnp.issubdtype(targets.dtype, jnp.floating) or config.loss == "logistic":
        return targets.astype(config.dtype)
    return targets


def with_model(config: Kind, model: ModelLike) -> Kind:
    """The configuration with a model of one's own in place of its section of the network."""
    if config.model != ModelConfig():
        raise ConfigError(
            "field 'model': must be left out where the argument model is given, got kind = "
            f"{config.model.kind!r}"
        )
    section = model if isinstance(model, str) else {"kind": "given"}
    return check_as(type(config), config.model_dump(exclude_unset=True) | {"model": section})


def _imported(function: str) -> object:
    """What 'module:name' names."""
    module, _, name = function.partition(":")
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"field 'model.function': {function!r} cannot be imported: {error}; modules are looked "
            f"for in {folder} and among those installed"
        ) from error
    finally:
        sys.path.remove(folder)


def _made_by(make: object, n_outputs: int, who: str) -> Model:
    """The model that a function makes for so many outputs, or one that is made already."""
    model = make
    if not isinstance(model, Model):
        if not callable(make):
            raise ConfigError(
                f"{who} must be a function of the number of outputs that returns an "
                f"ntkdp.models.Model, or such a model, got {make!r} of type {type(make).__name__}"
            )
        model = make(n_outputs)
    if not isinstance(model, Model):
        raise ConfigError(
            f"{who} must return an ntkdp.models.Model, got {type(model).__name__}; "
            "ntkdp.models.Model(init, apply) makes one of functions, and from_flax and "
            "from_equinox of modules"
        )
    return model


def _model_of(config: ProblemConfig, n_outputs: int, given: ModelLike | None) -> Model:
    settings = config.model
    if settings.function is not None:
        made = _imported(settings.function)
        return _made_by(made, n_outputs, f"field 'model.function': {settings.function!r}")
    if settings.kind == "given":
        if given is None:
            raise ConfigError(
                "field 'model.kind': 'given' stands for the argument model of "
                "ntkdp.experiment.run, which is missing"
            )
        return _made_by(given, n_outputs, "model")
    build = models.mlp
    if settings.kind == "cnn":
        build = partial(models.cnn, pooling=settings.pooling)
    return build(
        settings.widths,
        n_outputs,
        activation=settings.activation,
        layer_norm=settings.layer_norm,
        residual=settings.residual,
        W_std=settings.W_std,
        b_std=settings.b_std,
        output_W_std=settings.output_W_std,
        parameterization=settings.parameterization,
    )
