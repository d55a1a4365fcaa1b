r"""Predictions: clipped gradient flow in weight space and in function space.

Weight space, exact: :math:`\dot w = -\tfrac1n \sum_i C_i g_i`. Function space with a frozen kernel:
:math:`\dot f = -\tfrac1n \sum_r H_r C_r a`, closed in the outputs because
:math:`\|g_{ir}\|^2 = a_i^\top H_{r,ii} a_i`. With ``reduction="sum"`` the factor 1/n is absent.
Time is the running sum of the learning rate, t = learning_rate * step. Noise of mean zero does not
enter these flows.
"""

from abc import abstractmethod
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp

from ntkdp import _groups, _validate, clipping, losses
from ntkdp import _per_sample_gradients as per_sample
from ntkdp._check_model import check_inputs, check_preconditioner
from ntkdp._types import ApplyFn, Array, Float, Params, PyTree
from ntkdp.clipping import ClippingRule
from ntkdp.losses import Loss
from ntkdp.ntk import LayerwiseKernel, grouped_squared_norms
from ntkdp.trajectory import Measurement

Reduction = Literal["mean", "sum"]


class Flow(eqx.Module):
    """An autonomous ordinary differential equation with something to measure along it.

    Subclasses are final. :func:`ntkdp.solve` integrates any of them.
    """

    @abstractmethod
    def init(self, initial: PyTree) -> PyTree:
        """The state that ``initial`` describes, checked."""

    @abstractmethod
    def velocity(self, state: PyTree) -> PyTree:
        """Time derivative of the state."""

    @abstractmethod
    def measure(self, state: PyTree, outputs: bool) -> Measurement:
        """Losses, accuracies and clip fraction at a state, and outputs on request."""


class KernelFlow(Flow):
    r"""Flow of the outputs under a frozen kernel, :math:`\dot f = -\tfrac1n \sum_r H_r C_r a`.

    Exact for a model that is linear in its parameters, for a network the limit of infinite width.
    Test outputs are carried along: :math:`\dot f_* = -\tfrac1n \sum_r H_r(*, \text{train}) C_r a`.

    Parameters
    ----------
    kernel : array or LayerwiseKernel
        ``(n, n, K, K)``, ``(n, n)`` meaning ``(x) I_K``, or a LayerwiseKernel of either.
    targets : array
        As the loss wants them.
    loss : Loss or callable
        One of :mod:`ntkdp.losses`, or a function of one sample's outputs and target.
    clipping : ClippingRule
        One of :mod:`ntkdp.clipping`; ``scope="layerwise"`` needs a LayerwiseKernel.
    reduction : {"mean", "sum"}
        Loss and drift are averaged over samples, or summed (the paper's form).
    test_kernel : array or LayerwiseKernel, optional
        Test points against training points, ``(m, n, ...)``, of the kernel that drives the outputs.
    test_targets : array, optional
        Needed for a test loss.
    preconditioned_kernel : array or LayerwiseKernel, optional
        :math:`J M^{-1} J^\top` drives the outputs (DP-Adam with a frozen preconditioner); the norms
        always come from ``kernel``.

    Raises
    ------
    ValueError
        Shapes that do not fit, NaN or infinities, layerwise clipping of a kernel without layer
        terms, one R too few.

    Notes
    -----
    Bu et al. (2023); that the frozen kernel closes the clipped system is *derived* (from
    :math:`\|g_i\|^2 = a_i^\top H_{ii} a_i`). The preconditioned form is *derived*.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> flow = ntkdp.KernelFlow(jnp.eye(1) * 4.0, jnp.zeros((1, 1)), ntkdp.losses.SquaredError(),
    ...                         ntkdp.clipping.Abadi(1.0), reduction="sum")
    >>> flow.velocity(flow.init(jnp.array([[5.0]])))[0].tolist()
    [[-2.0]]
    """

    diagonal: Array
    operator: Array
    drive: Array
    test_drive: Array | None
    targets: Array
    test_targets: Array | None
    loss: Loss
    clipping: ClippingRule
    reduction: Reduction = eqx.field(static=True)
    n_outputs: int | None = eqx.field(static=True)

    def __init__(
        self,
        kernel: Array | LayerwiseKernel,
        targets: Any,
        loss: Any,
        clipping: ClippingRule,
        *,
        reduction: Reduction = "mean",
        test_kernel: Array | LayerwiseKernel | None = None,
        test_targets: Any = None,
        preconditioned_kernel: Array | LayerwiseKernel | None = None,
    ) -> None:
        self.loss = losses.as_loss(loss)
        self.clipping = _check_clipping(clipping)
        self.reduction = _validate.choice(("mean", "sum"), reduction=reduction)
        terms = _terms(kernel, clipping, "kernel")
        n_groups, n, columns = terms.shape[:3]
        if n != columns:
            raise ValueError(f"kernel must be square in the samples, got {n} by {columns}")
        clipping.check_groups(n_groups)
        targets = jnp.asarray(targets)
        n_outputs = terms.shape[3] if terms.ndim == 5 else self.loss.n_outputs(targets)
        self.n_outputs = n_outputs
        self.targets = _check_targets(self.loss, targets, n, n_outputs, "targets")
        self.diagonal = jnp.moveaxis(jnp.diagonal(terms, axis1=1, axis2=2), -1, 1)
        self.operator = self.drive = _as_operator(terms)
        if preconditioned_kernel is not None:
            driving = _terms(preconditioned_kernel, clipping, "preconditioned_kernel")
            if driving.shape != terms.shape:
                raise ValueError(
                    f"preconditioned_kernel must have the shape of kernel, {terms.shape[1:]}, "
                    f"got {driving.shape[1:]}"
                )
            self.drive = _as_operator(driving)
        self.test_drive = self.test_targets = None
        if test_kernel is None and test_targets is not None:
            raise ValueError("test_targets need a test_kernel, got test_kernel=None")
        if test_kernel is not None:
            test_terms = _terms(test_kernel, clipping, "test_kernel")
            if test_terms.shape[:1] + test_terms.shape[2:] != terms.shape[:1] + terms.shape[2:]:
                raise ValueError(
                    "test_kernel must have shape (m, n, ...) with n and the rest as in kernel, "
                    f"{terms.shape}, got {test_terms.shape}"
                )
            self.test_drive = _as_operator(test_terms)
            if test_targets is not None:
                self.test_targets = _check_targets(
                    self.loss,
                    jnp.asarray(test_targets),
                    test_terms.shape[1],
                    n_outputs,
                    "test_targets",
                )

    def init(self, initial: Any) -> tuple[Array, Array | None]:
        """State of initial outputs ``(n, K)``, or of a (train, test) pair with a test kernel."""
        pair = isinstance(initial, tuple | list)
        if pair != (self.test_drive is not None):
            raise ValueError(
                "initial must be a (train, test) pair of outputs with a test_kernel and one array "
                f"(n, K) without, got {'a pair' if pair else 'one array'}"
            )
        train, test = initial if pair else (initial, None)
        n, n_outputs = self.targets.shape[0], self.n_outputs
        train = _check_outputs(train, n, n_outputs, "initial" if test is None else "initial[0]")
        if n_outputs is None:
            self.loss.check(self.targets, n, train.shape[1])
            if self.test_targets is not None:
                m = self.test_targets.shape[0]
                self.loss.check(self.test_targets, m, train.shape[1], "test_targets")
        if test is not None:
            assert self.test_drive is not None
            per_row = 1 if self.diagonal.ndim == 2 else train.shape[1]
            m = self.test_drive.shape[0] // per_row
            test = _check_outputs(test, m, train.shape[1], "initial[1]").astype(train.dtype)
        return train, test

    def _factors(self, a: Float[Array, "n K"]) -> Array:
        """Clipping factors ``(n,)`` or ``(R, n)`` for output gradients."""
        if self.diagonal.ndim == 2:
            squares = self.diagonal * jnp.sum(a**2, axis=1)[None]
        else:
            squares = jnp.einsum("nk,rnkl,nl->rn", a, self.diagonal, a)
        norms = clipping.norms_from_squares(squares)
        total = None
        if self.clipping.needs_total_norm:
            split = self.operator.reshape(self.operator.shape[0], len(norms), -1)
            vector = a if self.diagonal.ndim == 2 else a.reshape(-1, 1)
            images = jnp.einsum("arb,bk->rak", split, vector)
            total = clipping.norms_from_squares(jnp.einsum("rak,ak->r", images, vector))
        if self.clipping.scope == "flat":
            return self.clipping.factors(norms[0], None if total is None else total[0])
        return self.clipping.factors(norms, total)

    def _apply(self, operator: Array, weighted: Float[Array, "R n K"]) -> Array:
        if self.diagonal.ndim == 2:
            return operator @ weighted.reshape(-1, weighted.shape[-1])
        return (operator @ weighted.reshape(-1)).reshape(-1, weighted.shape[-1])

    def velocity(self, state: tuple[Array, Array | None]) -> tuple[Array, Array | None]:
        """Time derivative of the outputs, train and test."""
        train, test = state
        a = self.loss.output_gradient(train, self.targets)
        factors = self._factors(a)
        factors = factors[None] if factors.ndim == 1 else factors
        weighted = factors[:, :, None] * a[None]
        if self.reduction == "mean":
            weighted = weighted / train.shape[0]
        d_train = -self._apply(self.drive, weighted)
        d_test = None
        if test is not None and self.test_drive is not None:
            d_test = -self._apply(self.test_drive, weighted)
        return d_train, d_test

    def measure(self, state: tuple[Array, Array | None], outputs: bool) -> Measurement:
        """Losses, accuracies and clip fraction at a state."""
        train, test = state
        factors = self._factors(self.loss.output_gradient(train, self.targets))
        return _measurement(
            self.loss,
            self.reduction,
            factors,
            (train, self.targets),
            None if test is None else (test, self.test_targets),
            outputs,
        )


class WeightFlow(Flow):
    r"""Exact clipped gradient flow in weight space, :math:`\dot w = -\tfrac1n \sum_i C_i g_i`.

    With a preconditioner M (its diagonal), :math:`\dot w = -\tfrac1n M^{-1} \sum_i C_i g_i`.

    Parameters
    ----------
    apply_fn : callable
        ``apply_fn(params, x) -> (n, K)``.
    x, targets : array
        Training inputs ``(n, ...)`` and targets as the loss wants them.
    loss, clipping, reduction
        As for :class:`KernelFlow`.
    groups : pytree prefix of labels, or callable from key path to label, optional
        Groups of layerwise clipping; by default the layers.
    test_x, test_targets : array, optional
        Measured along the way.
    preconditioner : pytree, optional
        Diagonal of M in the shape of the parameters, positive.

    Raises
    ------
    ValueError
        As for :class:`KernelFlow`; a model that couples the samples of a batch.

    Notes
    -----
    Bu et al. (2023).

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> flow = ntkdp.WeightFlow(lambda w, x: x @ w, jnp.ones((1, 1)), jnp.zeros((1, 1)),
    ...                         ntkdp.losses.SquaredError(), ntkdp.clipping.Abadi(1.0))
    >>> flow.velocity(flow.init(jnp.array([[3.0]]))).tolist()
    [[-1.0]]
    """

    apply_fn: ApplyFn
    x: Array
    targets: Array
    loss: Loss
    clipping: ClippingRule
    groups: Any
    reduction: Reduction = eqx.field(static=True)
    test_x: Array | None
    test_targets: Array | None
    preconditioner: Params | None

    def __init__(
        self,
        apply_fn: ApplyFn,
        x: Any,
        targets: Any,
        loss: Any,
        clipping: ClippingRule,
        *,
        groups: Any = None,
        reduction: Reduction = "mean",
        test_x: Any = None,
        test_targets: Any = None,
        preconditioner: Params | None = None,
    ) -> None:
        self.apply_fn = apply_fn
        self.x = jnp.asarray(x)
        self.loss = losses.as_loss(loss)
        self.targets = _check_targets(self.loss, targets, self.x.shape[0], None, "targets")
        self.clipping = _check_clipping(clipping)
        self.groups = groups
        self.reduction = _validate.choice(("mean", "sum"), reduction=reduction)
        self.preconditioner = preconditioner
        self.test_x = self.test_targets = None
        if test_x is None and test_targets is not None:
            raise ValueError("test_targets need test_x, got test_x=None")
        if test_x is not None:
            self.test_x = jnp.asarray(test_x)
            if test_targets is not None:
                m = self.test_x.shape[0]
                self.test_targets = _check_targets(self.loss, test_targets, m, None, "test_targets")

    def init(self, initial: Params) -> Params:
        """State of initial parameters."""
        params = jax.tree.map(jnp.asarray, initial)
        self.clipping.check_groups(self._resolve(params).size)
        x = check_inputs(self.apply_fn, params, self.x)
        n_outputs = jax.eval_shape(self.apply_fn, params, x).shape[1]
        self.loss.check(self.targets, x.shape[0], n_outputs)
        if self.test_x is not None:
            test_x = check_inputs(self.apply_fn, params, self.test_x, "test_x")
            if self.test_targets is not None:
                self.loss.check(self.test_targets, test_x.shape[0], n_outputs, "test_targets")
        if self.preconditioner is not None:
            check_preconditioner(params, self.preconditioner)
        return params

    def _resolve(self, params: Params) -> _groups.Groups:
        if self.clipping.scope == "flat":
            return _groups.resolve(params, lambda path: "all")
        return _groups.resolve(params, self.groups)

    def _clip(self, params: Params) -> tuple[Array, list[per_sample.Factor], Array]:
        """Outputs, per-sample gradients in factored form, and factors ``(R, n)`` (flat: R = 1)."""
        n = self.x.shape[0]
        groups = self._resolve(params)
        structure = per_sample.trace(self.apply_fn, params, self.x)
        outputs, gradients = per_sample.factored(
            structure,
            params,
            self.x,
            lambda f, y: self.loss.output_gradient(f[None], y[None]),
            self.targets,
        )
        squares = grouped_squared_norms(gradients, groups, n)
        norms = clipping.norms_from_squares(squares)
        total = None
        if self.clipping.needs_total_norm:
            summed = self._weighted_sum(params, gradients, jnp.ones_like(norms), groups)
            of_leaves = jnp.stack([jnp.sum(leaf**2) for leaf in jax.tree.leaves(summed)])
            leaf_to_group = jnp.asarray(groups.leaf_to_group)
            total = clipping.norms_from_squares(
                jax.ops.segment_sum(of_leaves, leaf_to_group, groups.size)
            )
        if self.clipping.scope == "flat":
            factors = self.clipping.factors(norms[0], None if total is None else total[0])[None]
        else:
            factors = self.clipping.factors(norms, total)
        return outputs, gradients, factors

    def _weighted_sum(
        self,
        params: Params,
        gradients: list[per_sample.Factor],
        factors: Array,
        groups: _groups.Groups,
    ) -> Params:
        leaves, treedef = jax.tree.flatten(params)
        return jax.tree.unflatten(
            treedef,
            [
                per_sample.weighted_sum(gradient, factors[group], leaf)
                for gradient, group, leaf in zip(
                    gradients, groups.leaf_to_group, leaves, strict=True
                )
            ],
        )

    def velocity(self, state: Params) -> Params:
        """Time derivative of the parameters."""
        _, gradients, factors = self._clip(state)
        clipped = self._weighted_sum(state, gradients, factors, self._resolve(state))
        scale = -1.0 / self.x.shape[0] if self.reduction == "mean" else -1.0
        if self.preconditioner is None:
            return jax.tree.map(lambda g: scale * g, clipped)
        return jax.tree.map(lambda g, m: scale * g / m, clipped, self.preconditioner)

    def measure(self, state: Params, outputs: bool) -> Measurement:
        """Losses, accuracies and clip fraction at parameters."""
        train, _, factors = self._clip(state)
        test = None if self.test_x is None else self.apply_fn(state, self.test_x)
        return _measurement(
            self.loss,
            self.reduction,
            factors,
            (train, self.targets),
            None if test is None else (test, self.test_targets),
            outputs,
        )


class HeavyBallFlow(Flow):
    r"""A flow with inertia: :math:`\ddot w + \alpha \dot w = -G(w)` for :math:`\dot w = -G(w)`.

    The limit of gradient descent with momentum beta (``v <- beta v + G``, ``w <- w - eta v``) for
    :math:`\alpha = (1 - \beta)/\sqrt{\eta}`, at rest at the start. Its time is
    :math:`t = \sqrt{\eta}\,k` after k steps, not :math:`\eta k`: bring a run's times to it with
    ``run.rescale_time(learning_rate ** -0.5)``.

    Parameters
    ----------
    flow : KernelFlow or WeightFlow
        What is given inertia; its ``initial`` is taken.
    friction : float
        :math:`\alpha`, at least 0, per unit of this flow's time.

    Raises
    ------
    ValueError
        Friction below 0 or not finite.

    Notes
    -----
    *Derived* (time step :math:`\sqrt{\eta}`).

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> flow = ntkdp.KernelFlow(jnp.eye(1), jnp.zeros((1, 1)), ntkdp.losses.SquaredError(),
    ...                         ntkdp.clipping.NoClipping())
    >>> ball = ntkdp.HeavyBallFlow(flow, friction=0.0)
    >>> path = ntkdp.solve(ball, jnp.array([[1.0]]), jnp.array([0.0, jnp.pi]), outputs=True)
    >>> round(path.outputs[-1, 0, 0].item(), 4)
    -1.0
    """

    flow: Flow
    friction: Any

    def __check_init__(self) -> None:
        if not isinstance(self.flow, Flow) or isinstance(self.flow, HeavyBallFlow):
            raise TypeError(f"flow must be a KernelFlow or a WeightFlow, got {self.flow!r}")
        _validate.non_negative(friction=self.friction)

    def init(self, initial: PyTree) -> tuple[PyTree, PyTree]:
        """State of the flow's initial state, at rest."""
        position = self.flow.init(initial)
        return position, jax.tree.map(jnp.zeros_like, position)

    def velocity(self, state: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        """Time derivative of position and momentum."""
        position, momentum = state
        force = self.flow.velocity(position)
        return momentum, jax.tree.map(lambda g, v: g - self.friction * v, force, momentum)

    def measure(self, state: tuple[PyTree, PyTree], outputs: bool) -> Measurement:
        """What the flow measures at the position."""
        return self.flow.measure(state[0], outputs)


def _check_clipping(rule: Any) -> ClippingRule:
    if not isinstance(rule, ClippingRule):
        raise TypeError(f"clipping must be a rule of ntkdp.clipping, e.g. Abadi(1.0), got {rule!r}")
    return rule


def _check_targets(loss: Loss, targets: Any, n: int, n_outputs: int | None, name: str) -> Array:
    targets = jnp.asarray(targets)
    if n == 0 or targets.ndim == 0 or targets.shape[0] != n:
        raise ValueError(f"{name} must have one row a sample, {n} >= 1, got shape {targets.shape}")
    known = loss.n_outputs(targets) if n_outputs is None else n_outputs
    return targets if known is None else loss.check(targets, n, known, name)


def _check_outputs(outputs: Any, n: int, n_outputs: int | None, name: str) -> Array:
    outputs = jnp.asarray(outputs)
    if outputs.ndim != 2 or outputs.shape[0] != n or n_outputs not in (None, outputs.shape[1]):
        columns = "K" if n_outputs is None else n_outputs
        raise ValueError(f"{name} must have shape ({n}, {columns}), got {outputs.shape}")
    if not jnp.issubdtype(outputs.dtype, jnp.floating):
        outputs = outputs.astype(jnp.result_type(float))
    return _validate.finite(**{name: outputs})


def _terms(kernel: Any, rule: ClippingRule, name: str) -> Array:
    """Terms ``(R, m, n, K, K)`` or ``(R, m, n)`` as the scope needs them: flat, their sum."""
    if isinstance(kernel, LayerwiseKernel):
        values = kernel.values if rule.scope == "layerwise" else kernel.total[None]
    elif rule.scope == "layerwise":
        raise ValueError(
            f"{name} must be a LayerwiseKernel with scope='layerwise', got an array without layer "
            "terms; use layerwise_ntk or layerwise_infinite_ntk"
        )
    else:
        values = jnp.asarray(kernel)[None]
    if values.ndim not in (3, 5) or 0 in values.shape:
        raise ValueError(
            f"{name} must have shape (m, n, K, K), or (m, n) meaning (x) I_K, not empty, "
            f"got {values.shape[1:]}"
        )
    if values.ndim == 5 and values.shape[3] != values.shape[4]:
        raise ValueError(f"{name} must have square K x K blocks, got {values.shape[3:]}")
    if not jnp.issubdtype(values.dtype, jnp.floating):
        values = values.astype(jnp.result_type(float))
    return _validate.finite(**{name: values})


def _as_operator(terms: Array) -> Array:
    """Terms as one matrix, ``(m K, R n K)`` or ``(m, R n)``, for a single product a step."""
    if terms.ndim == 3:
        return jnp.moveaxis(terms, 0, 1).reshape(terms.shape[1], -1)
    rows = terms.shape[1] * terms.shape[3]
    return jnp.transpose(terms, (1, 3, 0, 2, 4)).reshape(rows, -1)


def _measurement(
    loss: Loss,
    reduction: Reduction,
    factors: Array,
    train: tuple[Array, Array],
    test: tuple[Array, Array | None] | None,
    outputs: bool,
) -> Measurement:
    reduced, accuracy = losses.mean_or_sum(loss, *train, reduction)
    test_loss = test_accuracy = None
    if test is not None and test[1] is not None:
        test_loss, test_accuracy = losses.mean_or_sum(loss, test[0], test[1], reduction)
    return Measurement(
        loss=reduced,
        clip_fraction=clipping.clip_fraction(factors),
        accuracy=accuracy,
        outputs=train[0] if outputs else None,
        test_loss=test_loss,
        test_accuracy=test_accuracy,
        test_outputs=test[0] if test is not None and outputs else None,
    )
