"""The flow of the outputs under a frozen kernel."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ntkdp import clipping as _clipping
from ntkdp._backend import devices, validate
from ntkdp._backend import norms as _norms
from ntkdp._backend.types import (
    Array,
    ArrayLike,
    Float,
    PyTree,
    ScalarLike,
    common_dtype,
)
from ntkdp._results.setup import Setup
from ntkdp.clipping import ClippingRule
from ntkdp.gradient_flow._flow import LinearModelFlow, setup_of
from ntkdp.gradient_flow._kernel_matrix import KernelMatrix, kernel_matrix
from ntkdp.gradient_flow._kernel_terms import (
    KernelLike,
    check_like,
    checked_terms,
    diagonal,
    require_room,
    shape_of,
    total_of,
    with_public,
)
from ntkdp.losses import Loss, Reduction, SampleLoss
from ntkdp.trajectory import Measurement, PublicRows, TrainingSet, check_public


class KernelFlow(LinearModelFlow):
    r"""Flow of the outputs under a frozen kernel, :math:`\dot f = -\tfrac1n \sum_r H_r C_r a`.

    Exact for a model that is linear in its parameters, for a network the limit of infinite width.
    Test outputs are carried along: :math:`\dot f_* = -\tfrac1n \sum_r H_r(*, \text{train}) C_r a`.

    Parameters
    ----------
    kernel : array, LayerwiseKernel or FeatureKernel
        ``(n, n, K, K)``, ``(n, n)`` meaning ``(x) I_K``, or a LayerwiseKernel of either. That of a
        linear head may be a FeatureKernel, as :func:`ntkdp.linear_ntk` returns it, and then all
        others are; it is not written out.
    targets : array
        As the loss wants them.
    loss : Loss or callable
        One of :mod:`ntkdp.losses`, or a function of one sample's outputs and target.
    clipping : ClippingRule
        One of :mod:`ntkdp.clipping`; ``scope="layerwise"`` needs a LayerwiseKernel.
    reduction : {"mean", "sum"}
        Loss and drift are averaged over samples, or summed (the paper's form).
    test_kernel : array, LayerwiseKernel or FeatureKernel, optional
        Test points against training points, ``(m, n, ...)``, of the kernel that drives the outputs.
    test_targets : array, optional
        Needed for a test loss.
    public : PublicRows, optional
        Public samples, as for ``dp_sgd.run``. States then have three parts, in this order: outputs
        of the training samples, of the public ones, and of test points if there are any.
    public_kernel : array, LayerwiseKernel or FeatureKernel, optional
        All points, in this order, against public samples, ``(n + p + m, p, ...)``, of the kernel
        that drives the outputs.
    preconditioned_kernel : array, LayerwiseKernel or FeatureKernel, optional
        :math:`J M^{-1} J^\top` drives the outputs (DP-Adam with a frozen preconditioner); the norms
        always come from ``kernel``.
    mesh : jax.sharding.Mesh, optional
        Devices that share the rows of all kernels; n and m must divide over them.

    Raises
    ------
    ValueError
        If shapes do not fit, numbers are NaN or infinite, layerwise clipping meets a kernel without
        layer terms or has too few R, the numbers of samples do not divide over the mesh, or public
        samples come without their kernel or with a mesh.

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
    operator: KernelMatrix
    drive: KernelMatrix
    test_drive: KernelMatrix | None
    public_drive: KernelMatrix | None
    data: TrainingSet
    public: PublicRows | None
    n_outputs: int | None = eqx.field(static=True)
    preconditioned: bool = eqx.field(static=True)
    mesh: Mesh | None = eqx.field(static=True)

    def __init__(
        self,
        kernel: KernelLike,
        targets: ArrayLike,
        loss: Loss | SampleLoss,
        clipping: ClippingRule,
        *,
        reduction: Reduction = "mean",
        test_kernel: KernelLike | None = None,
        test_targets: ArrayLike | None = None,
        public: PublicRows | None = None,
        public_kernel: KernelLike | None = None,
        preconditioned_kernel: KernelLike | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        self.mesh = mesh = devices.as_mesh(mesh)
        data = TrainingSet(targets, loss, clipping, reduction, test_targets)
        terms = checked_terms(kernel, clipping, "kernel", mesh)
        layered = clipping.scope == "layerwise"
        n_groups, n, columns, *blocks = shape_of(terms, layered)
        if n != columns:
            raise ValueError(f"kernel must be square in the samples, got {n} by {columns}")
        clipping.check_groups(n_groups)
        self.n_outputs = blocks[0] if blocks else data.loss.n_outputs(data.targets)
        require_room(layered, mesh, kernel, preconditioned_kernel, test_kernel, public_kernel)
        self.diagonal = diagonal(terms, layered, mesh)
        self.operator = self.drive = kernel_matrix(terms, layered, mesh)
        self.preconditioned = preconditioned_kernel is not None
        if preconditioned_kernel is not None:
            check_like(kernel, preconditioned_kernel, "preconditioned_kernel")
            driving = checked_terms(preconditioned_kernel, clipping, "preconditioned_kernel", mesh)
            if shape_of(driving, layered) != shape_of(terms, layered):
                raise ValueError(
                    "preconditioned_kernel must have the shape of kernel, "
                    f"{(n, columns, *blocks)}, got {shape_of(driving, layered)[1:]}"
                )
            self.drive = kernel_matrix(driving, layered, mesh)
        self.test_drive = self.public_drive = n_test = test_terms = None
        if test_kernel is not None:
            check_like(kernel, test_kernel, "test_kernel")
            test_terms = checked_terms(test_kernel, clipping, "test_kernel", mesh)
            test_groups, n_test, *rest = shape_of(test_terms, layered)
            if (test_groups, *rest) != (n_groups, columns, *blocks):
                raise ValueError(
                    "test_kernel must have shape (m, n, ...) with n and the rest as in kernel, "
                    f"{(n_groups, n, columns, *blocks)}, got {(test_groups, n_test, *rest)}"
                )
        self.public = check_public(public)
        _check_public_kernel(self.public, public_kernel, mesh)
        if self.public is not None and public_kernel is not None:
            check_like(kernel, public_kernel, "public_kernel")
            self.public = self.public.fit(data.loss, self.n_outputs)
            p = self.public.n_samples
            from_public = checked_terms(public_kernel, clipping, "public_kernel", mesh)
            expected = (n_groups, n + p + (n_test or 0), p, *blocks)
            if shape_of(from_public, layered) != expected:
                raise ValueError(
                    "public_kernel must have shape (n + p + m, p, ...), train, public and test "
                    f"points against public ones, {expected[1:]} in {n_groups} terms, got "
                    f"{shape_of(from_public, layered)}"
                )
            # Public samples move as test points do, before which they come.
            test_terms = with_public(from_public, test_terms, n, layered)
            self.public_drive = kernel_matrix(total_of(from_public, layered), False, mesh)
        if test_terms is not None:
            self.test_drive = kernel_matrix(test_terms, layered, mesh)
        data = data.fit(n, n_test, self.n_outputs, test_from="a test_kernel")
        self.data = data.place(mesh, spread=False)

    def setup(self) -> Setup:
        """The training that it predicts, for comparisons."""
        optimizer = "preconditioned" if self.preconditioned else "sgd"
        return setup_of(self.clipping, self.loss, self.reduction, optimizer, self.public)

    def init(self, initial: PyTree) -> tuple[Array, Array | None]:
        """The state at initial outputs ``(n, K)``, or a (train, test) pair with a test kernel.

        With public samples, a (train, public) or (train, public, test) tuple.
        """
        return self.checked_outputs(initial, "initial")

    def checked_outputs(self, given: PyTree, name: str) -> tuple[Array, Array | None]:
        """Outputs of an argument, ``(n, K)``, a pair or three parts, as a state."""
        if self.public is not None:
            given = self._public_with_test(given, name)
        pair = isinstance(given, tuple | list)
        if pair != (self.test_drive is not None):
            raise ValueError(
                f"{name} must be a (train, test) pair of outputs with a test_kernel and one array "
                f"(n, K) without, got {'a pair' if pair else 'one array'}"
            )
        train, test = given if pair else (given, None)
        n, n_outputs = self.targets.shape[0], self.n_outputs
        train = _check_outputs(train, n, n_outputs, name if test is None else f"{name}[0]")
        train = train.astype(common_dtype(train, self.drive.dtype))
        if n_outputs is None:
            self.data.check_outputs(train.shape[1])
        if test is not None:
            assert self.test_drive is not None
            m = self.test_drive.n_points
            test = _check_outputs(test, m, train.shape[1], f"{name}[1]").astype(train.dtype)
        placed: tuple[Array, Array | None] = devices.everywhere(self.mesh, (train, test))
        return placed

    def _public_with_test(self, given: PyTree, name: str) -> tuple[ArrayLike, Array]:
        """A (train, test) pair of outputs, in which public samples come before test points."""
        assert self.public is not None
        assert self.test_drive is not None
        p = self.public.n_samples
        has_test = self.test_drive.n_points > p
        parts = "(train, public, test)" if has_test else "(train, public)"
        if not isinstance(given, tuple | list) or len(given) != 2 + has_test:
            found = f"{len(given)} parts" if isinstance(given, tuple | list) else "one array"
            raise ValueError(f"{name} must be a {parts} tuple of outputs, got {found}")
        train, public, *test = given
        public = _check_outputs(public, p, self.n_outputs, f"{name}[1]")
        tests = [
            _check_outputs(f, self.test_drive.n_points - p, public.shape[1], f"{name}[2]")
            for f in test
        ]
        return train, jnp.concatenate([public, *(f.astype(public.dtype) for f in tests)])

    def _factors(self, a: Float[Array, "n K"]) -> Array:
        """Clipping factors ``(n,)`` or ``(R, n)`` for output gradients."""
        norms = _norms.through_kernel(self.diagonal, a)
        total = self.operator.norms_of_sum(a) if self.clipping.needs_total_norm else None
        factors = self.clipping.by_group(norms, total)
        return factors[0] if self.clipping.scope == "flat" else factors

    def sensitivities(
        self, outputs: Float[Array, "*states n K"], *, noise_per_group: bool = False
    ) -> Float[Array, "*states n"]:
        r"""What each sample adds to a step, over the sensitivity S: :math:`C_i \|g_i\| / S`.

        From recorded outputs, with any leading axes, it predicts what a run costs each sample:
        :func:`ntkdp.privacy.individual`. With ``noise_per_group`` noise is that of ``dp_sgd.run``.

        Examples
        --------
        >>> import jax.numpy as jnp, ntkdp
        >>> flow = ntkdp.KernelFlow(jnp.eye(2), jnp.zeros((2, 1)), ntkdp.losses.SquaredError(),
        ...                         ntkdp.clipping.Abadi(2.0))
        >>> flow.sensitivities(jnp.array([[[5.0], [1.0]]])).tolist()
        [[1.0, 0.5]]
        """
        states = jnp.reshape(outputs, (-1, *outputs.shape[-2:]))

        def of_state(train: Array) -> Array:
            norms = _norms.through_kernel(
                self.diagonal, self.loss.output_gradient(train, self.targets)
            )
            return self.clipping.shares(norms, noise_per_group)

        found: Array = jax.lax.map(of_state, states)
        return found.reshape(outputs.shape[:-1])

    def clipped(self, outputs: Float[Array, "*states n K"]) -> Float[Array, "*states n"]:
        """Whether each sample is clipped at these outputs; layerwise, the share of its groups.

        Examples
        --------
        >>> import jax.numpy as jnp, ntkdp
        >>> flow = ntkdp.KernelFlow(jnp.eye(2), jnp.zeros((2, 1)), ntkdp.losses.SquaredError(),
        ...                         ntkdp.clipping.Abadi(2.0))
        >>> flow.clipped(jnp.array([[5.0], [1.0]])).tolist()
        [1.0, 0.0]
        """
        states = jnp.reshape(outputs, (-1, *outputs.shape[-2:]))

        def of_state(train: Array) -> Array:
            factors = self._factors(self.loss.output_gradient(train, self.targets))
            return jnp.mean(jnp.atleast_2d(factors) < 1, axis=0, dtype=outputs.dtype)

        found: Array = jax.lax.map(of_state, states)
        return found.reshape(outputs.shape[:-1])

    def through(self, kernel: KernelMatrix, weighted: Float[Array, "R n K"]) -> Float[Array, "m K"]:
        """The change of the outputs that clipped gradients of the training samples cause."""
        return devices.everywhere(self.mesh, kernel.push(weighted))

    def clipped_gradients(
        self, train: Float[Array, "n K"], weights: Float[Array, " n"] | None = None
    ) -> Float[Array, "R n K"]:
        """Clipped output gradients by term of the kernel, over n with the mean loss."""
        a = self.loss.output_gradient(train, self.targets)
        if weights is not None:
            # Samples that are not drawn have no part in the norm of the sum either.
            a = jnp.where(weights[:, None] > 0, a, 0.0)
        factors = self._factors(a)
        factors = factors[None] if factors.ndim == 1 else factors
        weighted = factors[:, :, None] * a[None]
        if weights is not None:
            weighted = weighted * weights[None, :, None]
        return weighted / self.data.divisor

    def velocity(
        self, state: tuple[Array, Array | None], weights: Float[Array, " n"] | None = None
    ) -> tuple[Array, Array | None]:
        """Time derivative of train and test outputs; for a batch if samples have ``weights``."""
        train, test = state
        weighted = self.clipped_gradients(train, weights)
        d_train = -self.through(self.drive, weighted)
        d_test = None
        if test is not None and self.test_drive is not None:
            d_test = -self.through(self.test_drive, weighted)
        if self.public is None or test is None or d_test is None:
            return d_train, d_test
        of_public = self._public_velocity(self.public, test)
        mixed: tuple[Array, Array] = self.public.mixed((d_train, d_test), of_public)
        return mixed

    def _public_velocity(self, public: PublicRows, test: Array) -> tuple[Array, Array]:
        """How public samples, the first among the test points, move all points."""
        assert self.public_drive is not None
        outputs = test[: public.n_samples]
        a = public.output_gradient(self.loss, outputs, self.reduction)
        moved = -self.through(self.public_drive, a[None])
        n = self.targets.shape[0]
        return moved[:n], moved[n:]

    def velocity_and_norms(
        self, state: tuple[Array, Array | None], weights: Float[Array, " n"] | None = None
    ) -> tuple[tuple[Array, Array | None], Float[Array, "R n"]]:
        """The same, and the norms of all samples' gradients by group (flat: R = 1)."""
        a = self.loss.output_gradient(state[0], self.targets)
        return self.velocity(state, weights), _norms.through_kernel(self.diagonal, a)

    def gradient_norm(
        self,
        state: tuple[Array, Array | None],
        weights: Float[Array, " n"] | None,
        drift: tuple[Array, Array | None],
        noise: tuple[Array, Array | None] | None = None,
        noise_square: ScalarLike = 0.0,
    ) -> Float[Array, ""]:
        """Norm of the gradient with its noise over the weights, for flat clipping."""
        # The gradient is J'b with b known, and its products with itself and with noise are those
        # of b with what both do to the outputs. Velocities are against gradients.
        twice = drift if noise is None else jax.tree.map(lambda d, e: d + 2 * e, drift, noise)
        train, test = state
        along = jnp.sum(self.clipped_gradients(train, weights)[0] * twice[0])
        if self.public is not None and test is not None and twice[1] is not None:
            p = self.public.n_samples
            b = self.public.output_gradient(self.loss, test[:p], self.reduction)
            along = self.public.mixed(along, jnp.sum(b * twice[1][:p]))
        return _norms.from_squares(jnp.asarray(noise_square, along.dtype) - along)

    def losses_along(
        self, state: tuple[Array, Array | None], direction: tuple[Array, Array | None]
    ) -> Callable[[Array], Array]:
        """Losses of the training samples ``(n,)`` as a function of the way along a direction."""
        return lambda way: self.loss(state[0] + way * direction[0], self.targets)

    @property
    def n_terms(self) -> int:
        """Groups that clipping tells apart, each with a term of the kernel: 1 flat, R layerwise."""
        return self.diagonal.shape[0]

    def terms(self) -> Array:
        """Terms of the kernel, ``(R, n, n, K, K)`` or ``(R, n, n)``; with flat scope, one.

        Those of features are written out.
        """
        return self.operator.terms()

    def measure(self, state: tuple[Array, Array | None], outputs: bool) -> Measurement:
        """Losses, accuracies and clip fraction at a state."""
        train, test = state
        if self.public is not None and test is not None:
            p = self.public.n_samples
            test = test[p:] if test.shape[0] > p else None
        factors = self._factors(self.loss.output_gradient(train, self.targets))
        return self.data.measure(train, test, _clipping.clip_fraction(factors), outputs)


def check_kernel_flow(flow: object) -> KernelFlow:
    """``flow`` if it is a KernelFlow without public samples."""
    if not isinstance(flow, KernelFlow):
        raise TypeError(f"flow must be a KernelFlow, got {type(flow).__name__}")
    if flow.public is not None:
        raise ValueError(
            f"flow must have no public samples here, got {flow.public.in_words}; "
            "stochastic_flow.ensemble, recursion and solve take them"
        )
    return flow


def _check_outputs(outputs: ArrayLike, n: int, n_outputs: int | None, name: str) -> Array:
    outputs = validate.array(**{name: outputs})
    if outputs.ndim != 2 or outputs.shape[0] != n or n_outputs not in (None, outputs.shape[1]):
        columns = "K" if n_outputs is None else n_outputs
        raise ValueError(f"{name} must have shape ({n}, {columns}), got {outputs.shape}")
    if not jnp.issubdtype(outputs.dtype, jnp.floating):
        outputs = outputs.astype(jnp.result_type(float))
    finite: Array = validate.finite(**{name: outputs})
    return finite


def _check_public_kernel(public: object, public_kernel: object, mesh: Mesh | None) -> None:
    """Raise unless public samples come with their kernel, and on one device."""
    if (public is None) != (public_kernel is None):
        given, missing = ("public_kernel", "public") if public is None else ("public", "its kernel")
        raise ValueError(
            f"public and public_kernel must be given together, got {given} without {missing}; "
            "public_kernel is the kernel of train, public and test points against public ones"
        )
    if public is not None and mesh is not None:
        raise ValueError(
            "mesh must be None with public samples of a KernelFlow; a LinearisedFlow takes both"
        )
