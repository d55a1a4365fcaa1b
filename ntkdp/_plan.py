"""What each method will take in memory and time, before a run."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp

from ntkdp._backend import memory as _memory
from ntkdp._backend import validate

#: Parameter-sized arrays at the peak of an adaptive solve: stages, states and trial states.
_WEIGHT_STATES, _DISPLACEMENT_STATES = 14, 15
#: The same of a run of DP-SGD, without and with noise, and of a noisy run of the linearised model.
_RUN_STATES, _NOISY_RUN_STATES, _NOISY_DISPLACEMENT_STATES = 3, 7, 7
#: Sets of activations at the peak of a batch of several. If the size of a batch is not told, that
#: of the activations alone is taken: with biases fewer samples pass, of as much memory together.
_SETS, _SETS_IF_TOLD = 2, 3
#: The same of a single batch, without and with noise: the compiler keeps all of it that does not
#: depend on the displacement.
_SINGLE_SETS, _NOISY_SINGLE_SETS = 8, 7
#: Operations over the cube of its rows: of all eigenvalues and vectors of a symmetric matrix on one
#: device, and of a product of two.
_EIGENVECTORS, _PRODUCT = 9, 2
#: Sweeps of the block Jacobi method that finds them on several devices: of kernels, six to eight.
_SWEEPS = 8
#: Matrices alive at its peak, the covariance included: workspace of LAPACK, or parts under way.
_ROOT_COPIES, _ROOT_COPIES_IN_PARTS = 4, 6
#: Operations a pair of samples for the integrals of an infinite-width kernel.
_INTEGRALS = 100


class MethodCost(NamedTuple):
    """What one method takes.

    Attributes
    ----------
    name
        The method.
    memory_bytes
        Peak on a device.
    kernel_operations
        Once, before the first step, all devices together; zero without a kernel.
    step_operations
        Of one velocity or step, all devices together.
    operations
        In all.
    seconds
        Of all, or None without a rate.
    fits
        Whether the peak is within the memory of a device.
    note
        What to know about it.
    """

    name: str
    memory_bytes: int
    kernel_operations: float
    step_operations: float
    operations: float
    seconds: float | None
    fits: bool
    note: str


class Plan(NamedTuple):
    """What each method takes; see :func:`plan`.

    Attributes
    ----------
    methods
        All of them, a :class:`MethodCost` each.
    best
        The one to take, or None if none fits.
    memory_bytes
        Memory of a device that they were held against.
    """

    methods: list[MethodCost]
    best: MethodCost | None
    memory_bytes: int

    def table(self) -> str:
        """The plan in Markdown."""
        rows = [
            "| method | memory a device | operations | time | fits | |",
            "|---|--:|--:|--:|---|---|",
        ]
        for method in self.methods:
            time = "" if method.seconds is None else f"{method.seconds:,.3g} s"
            rows.append(
                f"| {method.name} | {method.memory_bytes / 1e9:,.3g} GB | {method.operations:.2e} "
                f"| {time} | {'yes' if method.fits else 'no'} | {method.note} |"
            )
        return "\n".join(rows)


def plan(
    n_samples: int,
    n_outputs: int,
    n_parameters: int,
    *,
    n_test: int = 0,
    n_inputs: int = 0,
    activations: int | None = None,
    n_groups: int = 1,
    n_devices: int = 1,
    steps: int | None = None,
    evaluations: int = 200,
    dtype: Any = "float32",
    memory: Any = None,
    flops: Any = None,
    noise: bool = False,
    batch_size: int | None = None,
) -> Plan:
    r"""Memory and time of every method, from the size of a problem alone.

    With n samples, m test samples, K outputs, P parameters, R groups, A activations and d inputs a
    sample, and D devices, in numbers on a device:

    - *empirical kernel*: :math:`2R n (n + m) K^2 / D`, the kernels that their caller keeps and as
      matrices in :class:`KernelFlow`, and as many operations a velocity as
      :math:`2R (n + m) n K^2`;
    - *infinite kernel*: :math:`2R n (n + m) / D` and :math:`2R (n + m) n K`;
    - *noise of either*, with :math:`N = n + m` rows, times K for the empirical kernel:
      :math:`4 N^2` more, :math:`6 N^2 / D` on several devices, and :math:`R N^2 / D` if m > 0;
      :math:`11 N^3` operations once, :math:`(98 + 144 / D) N^3` on several devices, and
      :math:`2 N^2` a step and output;
    - *WeightFlow*: :math:`14 P + n (2A - d) / D` and :math:`6 n P`;
    - *LinearisedFlow*: :math:`15 P + n d / D + b (2A - d)` in batches of b samples that take
      64 MiB, or of one, and 3A - 2d for 2A - d if b is told; or
      :math:`15 P + n d / D + n (8A - 7d) / D` if all of a device pass at once, so that more devices
      may take more each; and :math:`10 n P`. A noisy run takes 7 P for 15 P, and 7A - 6d for
      8A - 7d;
    - *DP-SGD*: :math:`3 P + n (3A - d) / D`, 7 P with noise, and :math:`6 n P`.

    Parameters
    ----------
    n_samples, n_outputs, n_parameters : int
        n, K and P.
    n_test : int
        m, test samples that are followed.
    n_inputs : int
        d, numbers of one sample's input.
    activations : int, optional
        A: numbers a sample that enter all layers with parameters, and that leave them. By default
        :math:`2\sqrt P`, the least that dense layers of P weights can have; a convolution has far
        more.
    n_groups : int
        R, terms of layerwise clipping; 1 means flat.
    n_devices : int
        D, over which samples are spread.
    steps : int, optional
        Steps of DP-SGD and of the recursion that predicts it.
    evaluations : int
        Velocities of an adaptive solve, which WeightFlow always is, and the others without
        ``steps``.
    dtype : dtype
        Of the arrays.
    memory : int, optional
        Bytes of each device; by default those free on this one.
    flops : float, optional
        Operations a second that each device sustains; without it there are no seconds.
    noise : bool
        Whether runs are drawn with noise, which WeightFlow cannot. Figures are of one run; hundreds
        share a kernel and its square root, while each takes its own with LinearisedFlow.
    batch_size : int, optional
        b, samples of a device that pass at once: the ``batch_size`` of a LinearisedFlow. By default
        so many as A numbers a sample leave room for. Gradients of biases and convolutions need room
        too: the flow may choose fewer, and take several times less where all would barely pass.

    Returns
    -------
    Plan
        ``best`` is, of the predictions that fit, the cheaper one of the empirical kernel and
        LinearisedFlow, which agree; else the infinite kernel; else WeightFlow, which takes about
        what the training does.

    Raises
    ------
    ValueError, TypeError
        Counts below one, memory or rate not positive, a dtype that is not floating.

    Notes
    -----
    *Derived* from the code and held against what the compiler plans; one rate for all operations is
    coarse: calibrate it for each method.

    Examples
    --------
    >>> import ntkdp
    >>> found = ntkdp.plan(50_000, 10, 1_900_000, n_inputs=784, n_devices=8, memory=80e9)
    >>> [method.name for method in found.methods if not method.fits]
    ['empirical kernel']
    >>> found.best.name
    'LinearisedFlow'
    """
    n, k = validate.count(n_samples=n_samples), validate.count(n_outputs=n_outputs)
    p, r = validate.count(n_parameters=n_parameters), validate.count(n_groups=n_groups)
    d = validate.count(n_devices=n_devices)
    m, inputs = validate.count(0, n_test=n_test), validate.count(0, n_inputs=n_inputs)
    evaluations = validate.count(evaluations=evaluations)
    run_steps = evaluations if steps is None else validate.count(steps=steps)
    itemsize = _itemsize(dtype)
    if not isinstance(noise, bool):
        raise TypeError(f"noise must be True or False, got {noise!r}")
    if memory is None:
        memory = _memory.available_bytes()
    else:
        memory = int(validate.positive_number(memory=memory))
    if flops is not None:
        flops = float(validate.positive_number(flops=flops))
    at_least = activations is None
    if activations is None:
        activations = max(math.ceil(2 * math.sqrt(p)), inputs + k)
    a = validate.count(activations=activations)
    if a < inputs:
        raise ValueError(f"activations must be at least n_inputs, {inputs}, got {a}")
    estimate = "activations taken as the least possible" if at_least else ""

    def method(
        name: str, numbers: float, kernel: float, step: float, repeats: int, *notes: str
    ) -> MethodCost:
        peak = math.ceil(numbers * itemsize)
        total = kernel + repeats * step
        seconds = None if flops is None else total / d / flops
        note = "; ".join(filter(None, notes))
        return MethodCost(name, peak, kernel, step, total, seconds, peak <= memory, note)

    def kernel_method(name: str, width: int, columns: int, kernel: float) -> MethodCost:
        """Of a kernel with ``width`` rows a sample, times ``columns`` columns."""
        step = 2.0 * r * width * width * (n + m) * n * columns
        # The kernels that their caller keeps, and as matrices.
        held = 2.0 * r * width * width * n * (n + m)
        if not noise:
            return method(name, held / d, kernel, step, run_steps)
        rows = float(width * (n + m))
        step += 2.0 * rows * rows * columns
        numbers = held + rows**2 * (_ROOT_COPIES if d == 1 else _ROOT_COPIES_IN_PARTS)
        if m:
            # The kernel of all points with each other is another array.
            numbers += r * rows**2
        return method(name, numbers / d, kernel + _root(d) * rows**3, step, run_steps)

    # Of samples with themselves one device computes half; several have no half in common.
    pairs = n * n / (1 if d > 1 else 2) + n * m
    contracted = pairs * (1 + k * k) * a + 2.0 * (n + m) * (k + 1) * p
    integrals = float(n + m) * n * r * (2 * inputs + _INTEGRALS)
    own = max(1.0, n / d)
    if batch_size is not None:
        batch_size = validate.count(batch_size=batch_size)
    states = _NOISY_DISPLACEMENT_STATES if noise else _DISPLACEMENT_STATES
    batch = _batch_numbers(own, a, inputs, itemsize, batch_size, noise)
    methods = [
        kernel_method("empirical kernel", k, 1, contracted),
        kernel_method("infinite kernel", 1, k, integrals),
        method(
            "WeightFlow",
            _WEIGHT_STATES * p + own * (2 * a - inputs),
            0.0,
            6.0 * n * p,
            evaluations,
            estimate,
            "without noise" if noise else "",
        ),
        method(
            "LinearisedFlow",
            states * p + own * inputs + batch,
            0.0,
            10.0 * n * p,
            run_steps,
            estimate,
            "one run" if noise else "",
        ),
        method(
            "DP-SGD",
            (_NOISY_RUN_STATES if noise else _RUN_STATES) * p + own * (3 * a - inputs),
            0.0,
            6.0 * n * p,
            run_steps,
            "the run itself",
            estimate,
        ),
    ]
    return Plan(methods, _best(methods, noise), memory)


def _root(n_devices: int) -> float:
    """Operations for a symmetric square root, over the cube of its rows, all devices together."""
    if n_devices == 1:
        return _EIGENVECTORS + _PRODUCT
    # In a sweep every two blocks meet: columns, rows and vectors are turned by what diagonalises
    # the rows and columns of both, on each device so many.
    of_sweep = 6 * _PRODUCT + 2 * _EIGENVECTORS / n_devices
    return _SWEEPS * of_sweep + _PRODUCT


def _batch_numbers(
    own: float, a: int, inputs: int, itemsize: int, batch_size: int | None, noise: bool
) -> int:
    """Numbers of the samples that a LinearisedFlow passes at once, of a device that has ``own``."""
    sets = _SETS if batch_size is None else _SETS_IF_TOLD
    if batch_size is None:
        batch_size = _memory.samples_at_once(a * itemsize)
    n_batches = math.ceil(own / batch_size)
    if n_batches == 1:
        sets = _NOISY_SINGLE_SETS if noise else _SINGLE_SETS
    return math.ceil(own / n_batches) * (sets * (a - inputs) + inputs)


def _best(methods: list[MethodCost], noise: bool) -> MethodCost | None:
    empirical, infinite, weights, linearised, _ = methods
    ranks = [[empirical, linearised], [infinite]] + ([] if noise else [[weights]])
    for rank in ranks:
        fitting = [method for method in rank if method.fits]
        if fitting:
            return min(fitting, key=lambda method: method.operations)
    return None


def _itemsize(dtype: Any) -> int:
    try:
        found = jnp.dtype(dtype)
    except TypeError as error:
        raise TypeError(f"dtype must be a floating dtype, got {dtype!r}") from error
    if not jnp.issubdtype(found, jnp.floating):
        raise TypeError(f"dtype must be a floating dtype, got {dtype!r}")
    return int(found.itemsize)
