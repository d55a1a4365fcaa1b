"""What each method will take in memory and time, before a run."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp

from ntkdp import _memory, _validate

#: Parameter-sized arrays at the peak of an adaptive solve: stages, states and trial states.
_WEIGHT_STATES, _DISPLACEMENT_STATES = 14, 15
#: The same of a run of DP-SGD, without and with noise, and of a noisy run of the linearised model.
_RUN_STATES, _NOISY_RUN_STATES, _NOISY_DISPLACEMENT_STATES = 3, 7, 8
#: Sets of activations at the peak of a batch of several. If the size of a batch is not told, that
#: of the activations alone is taken: with biases fewer samples pass, of as much memory together.
_SETS, _SETS_IF_TOLD = 2, 3
#: The same of a single batch, without and with noise: the compiler keeps all of it that does not
#: depend on the displacement.
_SINGLE_SETS, _NOISY_SINGLE_SETS = 8, 7
#: Operations for the symmetric square root of a matrix, over the cube of its rows: 9 for the
#: eigenvalues and vectors, 2 for their product.
_SQUARE_ROOT = 11
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
        Once, before the first step, all devices and the host together; zero without a kernel.
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

    - *empirical kernel*: :math:`c\,R (nK)^2 / D`, where c counts the copies alive while
      :class:`KernelFlow` is made from a kernel that its caller keeps: 4, or 3 with groups, and
      more with test samples; and as many operations a velocity as :math:`2R (n + m) n K^2`;
    - *infinite kernel*: :math:`c\,R n^2 / D` and :math:`2R (n + m) n K`;
    - *noise of either*, with :math:`N = n + m` rows, times K for the empirical kernel:
      :math:`(2R n N + 5 N^2) / D`, and :math:`R N^2 / D` more if m > 0, if that is more than the
      above (7 copies for R = 1 and m = 0); :math:`11 N^3` operations once, by the host alone if
      there are several devices, and :math:`2 N^2` a step and output;
    - *WeightFlow*: :math:`14 P + n (2A - d) / D` and :math:`6 n P`;
    - *LinearisedFlow*: :math:`15 P + n d / D + b (2A - d)` in batches of b samples that take
      64 MiB, or of one, and 3A - 2d for 2A - d if b is told; or
      :math:`15 P + n d / D + n (8A - 7d) / D` if all of a device pass at once, so that more devices
      may take more each; and :math:`10 n P`. A noisy run takes 8 P for 15 P, and 7A - 6d for
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
    n, k = _validate.count(n_samples=n_samples), _validate.count(n_outputs=n_outputs)
    p, r = _validate.count(n_parameters=n_parameters), _validate.count(n_groups=n_groups)
    d = _validate.count(n_devices=n_devices)
    m, inputs = _validate.count(0, n_test=n_test), _validate.count(0, n_inputs=n_inputs)
    evaluations = _validate.count(evaluations=evaluations)
    run_steps = evaluations if steps is None else _validate.count(steps=steps)
    itemsize = _itemsize(dtype)
    if not isinstance(noise, bool):
        raise TypeError(f"noise must be True or False, got {noise!r}")
    if memory is None:
        memory = _memory.available_bytes()
    else:
        memory = int(_validate.scalar(memory=_validate.positive(memory=memory)))
    if flops is not None:
        flops = float(_validate.scalar(flops=_validate.positive(flops=flops)))
    at_least = activations is None
    if activations is None:
        activations = max(math.ceil(2 * math.sqrt(p)), inputs + k)
    a = _validate.count(activations=activations)
    if a < inputs:
        raise ValueError(f"activations must be at least n_inputs, {inputs}, got {a}")
    estimate = "activations taken as the least possible" if at_least else ""

    def method(
        name: str,
        numbers: float,
        kernel: float,
        step: float,
        repeats: int,
        *notes: str,
        by_host: float = 0.0,
    ) -> MethodCost:
        peak = math.ceil(numbers * itemsize)
        total = kernel + repeats * step
        seconds = None if flops is None else ((total - by_host) / d + by_host) / flops
        note = "; ".join(filter(None, notes))
        return MethodCost(name, peak, kernel, step, total, seconds, peak <= memory, note)

    def kernel_method(name: str, width: int, columns: int, kernel: float) -> MethodCost:
        """Of a kernel with ``width`` rows a sample, times ``columns`` columns."""
        step = 2.0 * r * width * width * (n + m) * n * columns
        numbers = _kernel_copies(r, m / n) * r * (width * n) ** 2 / d
        rows = width * (n + m)
        if not noise:
            return method(name, numbers, kernel, step, run_steps)
        root = _SQUARE_ROOT * float(rows) ** 3
        step += 2.0 * rows * rows * columns
        numbers = max(numbers, _noise_numbers(r, width, n, m) / d)
        # There are no eigenvectors of a matrix in parts: the host finds those of a mesh.
        note = "eigenvectors by the host alone, at the rate of a device" if d > 1 else ""
        return method(name, numbers, kernel + root, step, run_steps, note, by_host=root)

    # Of samples with themselves one device computes half; several have no half in common.
    pairs = n * n / (1 if d > 1 else 2) + n * m
    contracted = pairs * (1 + k * k) * a + 2.0 * (n + m) * (k + 1) * p
    integrals = float(n + m) * n * r * (2 * inputs + _INTEGRALS)
    own = max(1.0, n / d)
    sets = _SETS if batch_size is None else _SETS_IF_TOLD
    if batch_size is None:
        batch_size = _memory.samples_at_once(a * itemsize)
    n_batches = math.ceil(own / _validate.count(batch_size=batch_size))
    if n_batches == 1:
        sets = _NOISY_SINGLE_SETS if noise else _SINGLE_SETS
    batch = math.ceil(own / n_batches) * (sets * (a - inputs) + inputs)
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
            (_NOISY_DISPLACEMENT_STATES if noise else _DISPLACEMENT_STATES) * p
            + own * inputs
            + batch,
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


def _kernel_copies(n_groups: int, test_share: float) -> float:
    """Copies of the kernel alive at the peak, the caller's own included.

    A flow is made from the kernel as terms (a copy unless there are groups), transposed and as a
    matrix; then the same from the test kernel, while terms and matrix of the first are held.
    """
    terms = 1 if n_groups == 1 else 0
    return max(3 + terms + test_share, 2 + terms + (3 + terms) * test_share)


def _noise_numbers(n_groups: int, width: int, n: int, m: int) -> float:
    """Numbers alive while the square root of the noise's covariance is found.

    The kernel and its matrix, with those of the test points; the terms over all points, which are
    another array if there are test points; then covariance, vectors and workspace.
    """
    followed = float(width * (n + m)) ** 2
    held = 2.0 * n_groups * width**2 * n * (n + m)
    given = n_groups * followed if m else 0.0
    return held + given + 5 * followed


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
