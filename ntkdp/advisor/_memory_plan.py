"""What each method will take in memory and time, before a run."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from ntkdp._backend import memory as _memory
from ntkdp._backend import validate
from ntkdp._backend.types import ScalarLike

#: Parameter-sized arrays at the peak of an adaptive solve of WeightFlow: stages, states and trials.
_WEIGHT_STATES = 14
#: Parameter-sized arrays at the peak of an adaptive solve of LinearisedFlow.
_DISPLACEMENT_STATES = 15
#: Parameter-sized arrays at the peak of a noisy run of the linearised model.
_NOISY_DISPLACEMENT_STATES = 7
#: Parameter-sized arrays at the peak of a run of DP-SGD without noise.
_RUN_STATES = 3
#: Parameter-sized arrays at the peak of a run of DP-SGD with noise.
_NOISY_RUN_STATES = 7
#: Sets of activations at the peak of one of several batches whose size the flow chooses. It counts
#: the activations alone: where biases need room too, fewer samples pass, in as much memory.
_SETS = 2
#: Sets of activations at the peak of one of several batches whose size is given.
_SETS_IF_GIVEN = 3
#: Sets of activations at the peak of a single batch: the compiler keeps all of it that does not
#: depend on the displacement.
_SINGLE_SETS = 8
#: Sets of activations at the peak of a single batch in a noisy run.
_NOISY_SINGLE_SETS = 7
#: Operations for all eigenvalues and vectors of a symmetric matrix on one device, over the cube of
#: its rows.
_EIGENVECTORS = 9
#: Operations for a product of two matrices, over the cube of their rows.
_PRODUCT = 2
#: Sweeps of the block Jacobi method on several devices; kernels take six to eight.
_SWEEPS = 8
#: Matrices alive at the peak of a square root on one device: the covariance and LAPACK's workspace.
_ROOT_COPIES = 4
#: Matrices alive at the peak of a square root on several devices: the covariance and parts on the
#: way.
_ROOT_COPIES_IN_PARTS = 6
#: Operations for the integrals of an infinite-width kernel, for a pair of samples.
_INTEGRALS = 100


class MethodCost(NamedTuple):
    """The cost of one method.

    Attributes
    ----------
    name
        The method.
    memory_bytes
        Peak memory on a device.
    kernel_operations
        Operations before the first step, on all devices together; zero without a kernel.
    step_operations
        Operations of one velocity or step, on all devices together.
    operations
        Operations in total.
    seconds
        Time in total, or None without a rate.
    fits
        Whether the peak is within the memory of a device.
    note
        A remark on the figures.
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
    """The cost of each method; see :func:`plan`.

    Attributes
    ----------
    methods
        All of them, a :class:`MethodCost` each.
    best
        The method to take, or None if none fits.
    memory_bytes
        Memory of a device, which the peaks were compared with.
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
    dtype: DTypeLike = "float32",
    memory: ScalarLike | None = None,
    flops: ScalarLike | None = None,
    noise: bool = False,
    batch_size: int | None = None,
) -> Plan:
    r"""Memory and time of every method, from the size of a problem alone.

    For n samples, m test samples, K outputs, P parameters, R groups, D devices, and A activations
    and d inputs for each sample, these are the numbers on a device and the operations of a step:

    - *empirical kernel*: :math:`2R n (n + m) K^2 / D`, the kernels that their caller keeps and as
      matrices in :class:`KernelFlow`, and :math:`2R (n + m) n K^2` operations;
    - *infinite kernel*: :math:`2R n (n + m) / D` and :math:`2R (n + m) n K`;
    - *noise of either*, with :math:`N = n + m` rows, times K for the empirical kernel:
      :math:`4 N^2` more, :math:`6 N^2 / D` on several devices, and :math:`R N^2 / D` if m > 0;
      :math:`11 N^3` operations once, :math:`(98 + 144 / D) N^3` on several devices, and
      :math:`2 N^2` a step and output;
    - *WeightFlow*: :math:`14 P + n (2A - d) / D` and :math:`6 n P`;
    - *LinearisedFlow*: :math:`15 P + n d / D + b (2A - d)` in batches of b samples that take
      64 MiB, or of one sample, with 3A - 2d in place of 2A - d if b is given; or
      :math:`15 P + n d / D + n (8A - 7d) / D` if all samples of a device pass at once, so that more
      devices may take more each; and :math:`10 n P`. A noisy run takes 7 P in place of 15 P, and
      7A - 6d in place of 8A - 7d;
    - *DP-SGD*: :math:`3 P + n (3A - d) / D`, 7 P with noise, and :math:`6 n P`.

    Parameters
    ----------
    n_samples, n_outputs, n_parameters : int
        n, K and P.
    n_test : int
        m, test samples that are followed.
    n_inputs : int
        d, numbers in the input of one sample.
    activations : int, optional
        A: numbers of one sample that enter all layers with parameters, and that leave them. By
        default :math:`2\sqrt P`, the least that dense layers of P weights can have; a convolution
        has far more.
    n_groups : int
        R, terms of layerwise clipping; 1 means flat.
    n_devices : int
        D, over which samples are spread.
    steps : int, optional
        Steps of DP-SGD and of the recursion that predicts it.
    evaluations : int
        Velocities of an adaptive solve. WeightFlow always takes one, the others do without
        ``steps``.
    dtype : dtype
        The dtype of the arrays.
    memory : int, optional
        Bytes of each device; by default those free on this one.
    flops : float, optional
        Operations that each device sustains in a second; without it there are no seconds.
    noise : bool
        Whether runs are drawn with noise, which WeightFlow cannot do. The figures are for one run;
        hundreds share a kernel and its square root, while LinearisedFlow takes its memory for each.
    batch_size : int, optional
        b, samples of a device that pass at once: the ``batch_size`` of a LinearisedFlow. By default
        as many as there is room for at A numbers each. Gradients of biases and convolutions need
        room too, so the flow may choose fewer samples, and take several times less memory where all
        of them would barely pass.

    Returns
    -------
    Plan
        ``best`` is the first of these that fits: the cheaper one of the empirical kernel and
        LinearisedFlow, which agree; the infinite kernel; WeightFlow, which costs about as much as
        the training.

    Raises
    ------
    ValueError, TypeError
        If a count is below one, memory or rate is not positive, or the dtype is not floating.

    Notes
    -----
    *Derived* from the code, and tested against the plans of the compiler. One rate for all
    operations is coarse: calibrate it for each method.

    Examples
    --------
    >>> import ntkdp
    >>> plan = ntkdp.plan(50_000, 10, 1_900_000, n_inputs=784, n_devices=8, memory=80e9)
    >>> [method.name for method in plan.methods if not method.fits]
    ['empirical kernel']
    >>> plan.best.name
    'LinearisedFlow'
    """
    if not isinstance(noise, bool):
        raise TypeError(f"noise must be True or False, got {noise!r}")
    n_parameters = validate.count(n_parameters=n_parameters)
    n_outputs = validate.count(n_outputs=n_outputs)
    n_inputs = validate.count(0, n_inputs=n_inputs)
    problem = _Problem(
        n_samples=validate.count(n_samples=n_samples),
        n_test=validate.count(0, n_test=n_test),
        n_outputs=n_outputs,
        n_parameters=n_parameters,
        n_inputs=n_inputs,
        n_groups=validate.count(n_groups=n_groups),
        n_devices=validate.count(n_devices=n_devices),
        activations=_checked_activations(activations, n_parameters, n_inputs, n_outputs),
        is_least=activations is None,
        itemsize=_itemsize(dtype),
        noise=noise,
        batch_size=None if batch_size is None else validate.count(batch_size=batch_size),
    )
    evaluations = validate.count(evaluations=evaluations)
    run_steps = evaluations if steps is None else validate.count(steps=steps)
    if memory is None:
        available = _memory.available_bytes()
    else:
        available = int(validate.positive_number(memory=memory))
    rate = None if flops is None else float(validate.positive_number(flops=flops))
    methods = [
        _empirical_kernel(problem).over(run_steps, problem, available, rate),
        _infinite_kernel(problem).over(run_steps, problem, available, rate),
        _weight_flow(problem).over(evaluations, problem, available, rate),
        _linearised_flow(problem).over(run_steps, problem, available, rate),
        _dp_sgd(problem).over(run_steps, problem, available, rate),
    ]
    return Plan(methods, _best(methods, noise), available)


class _Problem(NamedTuple):
    """The sizes of a problem, as the arguments of :func:`plan` give them."""

    n_samples: int
    n_test: int
    n_outputs: int
    n_parameters: int
    n_inputs: int
    n_groups: int
    n_devices: int
    activations: int
    is_least: bool
    itemsize: int
    noise: bool
    batch_size: int | None

    @property
    def n_points(self) -> int:
        """Samples that a prediction follows, those of the test set included."""
        return self.n_samples + self.n_test

    @property
    def own_samples(self) -> float:
        """Training samples on a device."""
        return max(1.0, self.n_samples / self.n_devices)

    @property
    def estimate(self) -> str:
        """A note if the activations are not given."""
        return "activations taken as the least possible" if self.is_least else ""


class _Cost(NamedTuple):
    """Numbers at the peak on a device, and operations before the first step and in each."""

    name: str
    numbers: float
    kernel_operations: float
    step_operations: float
    notes: tuple[str, ...] = ()

    def over(self, steps: int, problem: _Problem, memory: int, flops: float | None) -> MethodCost:
        """The cost of a number of steps, in bytes and seconds."""
        peak = math.ceil(self.numbers * problem.itemsize)
        total = self.kernel_operations + steps * self.step_operations
        return MethodCost(
            name=self.name,
            memory_bytes=peak,
            kernel_operations=self.kernel_operations,
            step_operations=self.step_operations,
            operations=total,
            seconds=None if flops is None else total / problem.n_devices / flops,
            fits=peak <= memory,
            note="; ".join(filter(None, self.notes)),
        )


def _checked_activations(
    activations: int | None, n_parameters: int, n_inputs: int, n_outputs: int
) -> int:
    """Activations of a sample, by default the least that dense layers can have."""
    if activations is None:
        return max(math.ceil(2 * math.sqrt(n_parameters)), n_inputs + n_outputs)
    number = validate.count(activations=activations)
    if number < n_inputs:
        raise ValueError(f"activations must be at least n_inputs, {n_inputs}, got {number}")
    return number


def _empirical_kernel(problem: _Problem) -> _Cost:
    n, m, k = problem.n_samples, problem.n_test, problem.n_outputs
    # One device computes half of a symmetric kernel; several split its rows and compute all of it.
    pairs = n * n / (1 if problem.n_devices > 1 else 2) + n * m
    gradients = 2.0 * problem.n_points * (k + 1) * problem.n_parameters
    contracted = pairs * (1 + k * k) * problem.activations + gradients
    return _with_kernel("empirical kernel", problem, k, 1, contracted)


def _infinite_kernel(problem: _Problem) -> _Cost:
    pairs = float(problem.n_points) * problem.n_samples
    integrals = pairs * problem.n_groups * (2 * problem.n_inputs + _INTEGRALS)
    return _with_kernel("infinite kernel", problem, 1, problem.n_outputs, integrals)


def _with_kernel(name: str, problem: _Problem, width: int, columns: int, kernel: float) -> _Cost:
    """The cost of a kernel that has ``width`` rows for a sample and acts on ``columns`` columns."""
    pairs = problem.n_points * problem.n_samples
    # The kernels that their caller keeps, and as matrices.
    held = 2.0 * problem.n_groups * width * width * pairs
    step = held * columns
    if not problem.noise:
        return _Cost(name, held / problem.n_devices, kernel, step)
    rows = float(width * problem.n_points)
    step += 2.0 * rows * rows * columns
    copies = _ROOT_COPIES if problem.n_devices == 1 else _ROOT_COPIES_IN_PARTS
    numbers = held + rows**2 * copies
    if problem.n_test:
        # The kernel of all points with each other is another array.
        numbers += problem.n_groups * rows**2
    root = _root(problem.n_devices) * rows**3
    return _Cost(name, numbers / problem.n_devices, kernel + root, step)


def _weight_flow(problem: _Problem) -> _Cost:
    activations = problem.own_samples * (2 * problem.activations - problem.n_inputs)
    return _Cost(
        "WeightFlow",
        _WEIGHT_STATES * problem.n_parameters + activations,
        0.0,
        6.0 * problem.n_samples * problem.n_parameters,
        (problem.estimate, "without noise" if problem.noise else ""),
    )


def _linearised_flow(problem: _Problem) -> _Cost:
    states = _NOISY_DISPLACEMENT_STATES if problem.noise else _DISPLACEMENT_STATES
    inputs = problem.own_samples * problem.n_inputs
    return _Cost(
        "LinearisedFlow",
        states * problem.n_parameters + inputs + _batch_numbers(problem),
        0.0,
        10.0 * problem.n_samples * problem.n_parameters,
        (problem.estimate, "one run" if problem.noise else ""),
    )


def _dp_sgd(problem: _Problem) -> _Cost:
    states = _NOISY_RUN_STATES if problem.noise else _RUN_STATES
    activations = problem.own_samples * (3 * problem.activations - problem.n_inputs)
    return _Cost(
        "DP-SGD",
        states * problem.n_parameters + activations,
        0.0,
        6.0 * problem.n_samples * problem.n_parameters,
        ("the run itself", problem.estimate),
    )


def _root(n_devices: int) -> float:
    """Operations for a symmetric square root, over the cube of its rows, all devices together."""
    if n_devices == 1:
        return _EIGENVECTORS + _PRODUCT
    # In a sweep every two blocks meet. On each device the rotation that diagonalises both turns as
    # many columns, rows and vectors.
    sweep = 6 * _PRODUCT + 2 * _EIGENVECTORS / n_devices
    return _SWEEPS * sweep + _PRODUCT


def _batch_numbers(problem: _Problem) -> int:
    """Numbers of the samples of a device that a LinearisedFlow passes at once."""
    batch_size = problem.batch_size
    sets = _SETS if batch_size is None else _SETS_IF_GIVEN
    if batch_size is None:
        batch_size = _memory.samples_at_once(problem.activations * problem.itemsize)
    n_batches = math.ceil(problem.own_samples / batch_size)
    if n_batches == 1:
        sets = _NOISY_SINGLE_SETS if problem.noise else _SINGLE_SETS
    inputs = problem.n_inputs
    numbers = sets * (problem.activations - inputs) + inputs
    return math.ceil(problem.own_samples / n_batches) * numbers


def _best(methods: list[MethodCost], noise: bool) -> MethodCost | None:
    empirical, infinite, weights, linearised, _ = methods
    ranks = [[empirical, linearised], [infinite]] + ([] if noise else [[weights]])
    for rank in ranks:
        fitting = [method for method in rank if method.fits]
        if fitting:
            return min(fitting, key=lambda method: method.operations)
    return None


def _itemsize(dtype: DTypeLike) -> int:
    try:
        known = jnp.dtype(dtype)
    except TypeError as error:
        raise TypeError(f"dtype must be a floating dtype, got {dtype!r}") from error
    if not jnp.issubdtype(known, jnp.floating):
        raise TypeError(f"dtype must be a floating dtype, got {dtype!r}")
    return known.itemsize
