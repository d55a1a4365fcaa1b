r"""Clipped, noised SGD on high-dimensional least squares: a deterministic equation for the risk.

Streaming data: :math:`x \sim N(0, \Lambda)`, :math:`y = \langle w_*, x \rangle + \zeta \epsilon`;
each sample is used once. One step, with :math:`\Delta = w - w_*`,
:math:`g = (\langle \Delta, x \rangle - \zeta \epsilon)\, x` and n the number of samples of a pass:

.. math:: \Delta^+ = \Delta - \frac{\eta}{n} \big(\min(1, R/\|g\|)\, g + s z\big), \quad
    z \sim N(0, I), \quad s = \sigma R.

The batch is one sample, the step size :math:`\eta / n`, s the standard deviation of the noise per
coordinate and step, and time :math:`t = k / n` after k steps: 1 is one pass.

In high dimension :math:`\|x\|` is close to :math:`\sqrt{\operatorname{tr} \Lambda}`, so that the
residual is clipped at :math:`c = R / \sqrt{\operatorname{tr} \Lambda}`, and the risk is no longer
random. With modes :math:`\rho_j = \langle \Delta, v_j \rangle^2`, risk
:math:`r = \sum_j \lambda_j \rho_j` and :math:`v = r + \zeta^2`, the variance of the residual:

.. math::
    \dot \rho_j = -2 \eta \mu \lambda_j \rho_j + \frac{\eta^2}{n} (\lambda_j e_2 + s^2), \quad
    \mu = \operatorname{erf}\frac{c}{\sqrt{2 v}}, \quad
    e_2 = v \Big[\mu - \frac{2 c}{\sqrt v} \phi\Big(\frac{c}{\sqrt v}\Big)\Big] + c^2 (1 - \mu).

Here :math:`1 - \mu` is the share of clipped samples and :math:`e_2` the mean square of the clipped
residual. The excess risk is r, twice the excess of the loss 1/2 (residual)^2.

Marshall et al., *To Clip or not to Clip*, 2406.11733 (the equation of clipped SGD) and Bombari et
al., 2505.16329 (private linear regression); the form with the noise in it is *derived* from the
step above.
"""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import erf, erfc
from jax.scipy.stats import norm

from ntkdp import clipping
from ntkdp._backend import validate
from ntkdp._backend.types import (
    Array,
    ArrayLike,
    Float,
    Key,
    PRNGKeyArray,
    ScalarLike,
    as_constant,
    is_traced,
)
from ntkdp.trajectory import Outcome, message, recorded_steps, succeeded

_MAX_STEPS = 100_000

_ADVICE = {
    Outcome.SOLVER_FAILED: (
        "the solver gave up before the last time: the risk blows up, or changes too fast; lower "
        "the learning rate, shorten the horizon, or loosen rtol and atol"
    ),
    Outcome.NON_FINITE: (
        "the risk became infinite or NaN: it diverges (lower the learning rate or the clipping "
        "norm) or an input overflows (rescale it)"
    ),
}


def _modes(name: str) -> Any:
    return eqx.field(converter=lambda value: as_constant(validate.non_negative(**{name: value})))


def _number(check: Callable[..., Any], name: str, **options: Any) -> Any:
    def convert(value: ScalarLike) -> ScalarLike:
        constant: ScalarLike = as_constant(validate.scalar(**{name: check(**{name: value})}))
        return constant

    return eqx.field(converter=convert, **options)


class HighDimensionalSGD(eqx.Module):
    r"""Clipped, noised streaming SGD on least squares with Gaussian data.

    Parameters
    ----------
    eigenvalues : array
        :math:`\lambda_j`, shape ``(d,)``, of the covariance of the data; at least 0, not all 0.
    initial : array
        :math:`\rho_j(0)`, shape ``(d,)``: squared initial error along each eigenvector.
    clip_norm : float
        R, in units of a per-sample gradient's norm; it clips the residual at
        :math:`c = R / \sqrt{\sum_j \lambda_j}`, see ``residual_threshold``.
    learning_rate : float
        :math:`\eta`; one step has size :math:`\eta / n`.
    n_samples : float
        n, samples, and so steps, per unit of time.
    noise_multiplier : float
        :math:`\sigma`: the noise of a step has standard deviation :math:`s = \sigma R` on every
        coordinate, see ``noise_std``.
    label_noise : float
        :math:`\zeta`, standard deviation of the labels about the linear model.

    Raises
    ------
    ValueError, TypeError
        If a number is out of its range, or shapes do not fit.

    Notes
    -----
    Marshall et al., 2406.11733; Bombari et al., 2505.16329; with the noise, *derived*.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> R = 0.5 * 200**0.5
    >>> problem = ntkdp.high_dimensional_sgd.HighDimensionalSGD(
    ...     eigenvalues=jnp.ones(200), initial=jnp.full(200, 1 / 200), clip_norm=R,
    ...     learning_rate=3.0, n_samples=2000, noise_multiplier=0.2**0.5 / R, label_noise=0.3)
    >>> path = ntkdp.high_dimensional_sgd.solve(problem, [0.0, 0.25, 1.0])
    >>> [round(r, 3) for r in path.risk.tolist()]
    [1.0, 0.606, 0.111]
    """

    eigenvalues: Array | np.ndarray = _modes("eigenvalues")
    initial: Array | np.ndarray = _modes("initial")
    clip_norm: ScalarLike = _number(validate.positive, "clip_norm")
    learning_rate: ScalarLike = _number(validate.positive, "learning_rate")
    n_samples: ScalarLike = _number(validate.positive, "n_samples")
    noise_multiplier: ScalarLike = _number(validate.non_negative, "noise_multiplier", default=0.0)
    label_noise: ScalarLike = _number(validate.non_negative, "label_noise", default=0.0)

    def __check_init__(self) -> None:
        shape = np.shape(self.eigenvalues)
        if len(shape) != 1 or 0 in shape:
            raise ValueError(f"eigenvalues must have shape (d,), not empty, got {shape}")
        if np.shape(self.initial) != shape:
            raise ValueError(
                f"initial must have one entry an eigenvalue, {shape}, got {np.shape(self.initial)}"
            )
        if not is_traced(self.eigenvalues):
            validate.positive(**{"the sum of eigenvalues": float(np.sum(self.eigenvalues))})

    @property
    def residual_threshold(self) -> Array:
        r""":math:`c = R / \sqrt{\sum_j \lambda_j}`, where the residual is clipped."""
        return jnp.divide(self.clip_norm, jnp.sqrt(jnp.sum(self.eigenvalues)))

    @property
    def noise_std(self) -> ScalarLike:
        r""":math:`s = \sigma R`, per coordinate and step, of the noise of a clipped gradient."""
        return self.noise_multiplier * self.clip_norm

    def risk(self, modes: Float[Array, "*axes d"]) -> Float[Array, "*axes"]:
        r"""Excess risk :math:`\sum_j \lambda_j \rho_j`."""
        return modes @ jnp.asarray(self.eigenvalues, modes.dtype)

    def clip_fraction(self, modes: Float[Array, "*axes d"]) -> Float[Array, "*axes"]:
        r"""Share of clipped samples, :math:`1 - \mu`."""
        variance = self.risk(modes) + self.label_noise**2
        return 1 - _clipped_residual(variance, self.residual_threshold)[0]

    def velocity(self, modes: Float[Array, " d"]) -> Float[Array, " d"]:
        r"""Time derivative of the modes :math:`\rho_j`, shape ``(d,)``."""
        variance = self.risk(modes) + self.label_noise**2
        kept, square = _clipped_residual(variance, self.residual_threshold)
        descent = -2 * self.learning_rate * kept * self.eigenvalues * modes
        noise = self.eigenvalues * square + self.noise_std**2
        return jnp.add(descent, self.learning_rate**2 / self.n_samples * noise)


def _clipped_residual(variance: Array, threshold: Array) -> tuple[Array, Array]:
    """P(|a| <= c) and E min(|a|, c)^2 of a Gaussian residual a."""
    # A residual of no variance is never clipped.
    ratio = threshold / jnp.sqrt(jnp.maximum(variance, jnp.finfo(variance.dtype).tiny))
    kept, clipped = erf(ratio / jnp.sqrt(2.0)), erfc(ratio / jnp.sqrt(2.0))
    inside = variance * (kept - 2 * ratio * norm.pdf(ratio))
    # Bracketed so that the square of a threshold that clips nothing does not overflow.
    return kept, inside + threshold * (threshold * clipped)


class Path(eqx.Module):
    """Modes and risk over time, of the equation or of simulations; a pytree.

    Made by :func:`solve` and :func:`simulate`.

    Parameters
    ----------
    times : array
        ``(T,)``, in passes over n samples.
    modes : array
        ``(T, d)``, or ``(S, T, d)`` for simulations with S keys.
    risk : array
        ``(T,)`` or ``(S, T)``, the excess risk.
    outcome : int array
        An `ntkdp.trajectory.Outcome`; see ``successful`` and ``message``.
    """

    times: Array
    modes: Array
    risk: Array
    outcome: Array

    @property
    def successful(self) -> bool:
        """Whether every number is valid."""
        return succeeded(self.outcome)

    @property
    def message(self) -> str:
        """What went wrong and what to do about it, or ``"success"``."""
        return message(self.outcome, _ADVICE)


def _path(problem: HighDimensionalSGD, times: Array, modes: Array, outcome: Array | int) -> Path:
    risk = problem.risk(modes)
    finite = jnp.all(jnp.isfinite(risk), axis=-1)
    outcome = jnp.where((outcome == Outcome.SUCCESS) & ~finite, Outcome.NON_FINITE, outcome)
    return Path(times, modes, risk, outcome)


def solve(
    problem: HighDimensionalSGD,
    times: ArrayLike,
    *,
    start: ScalarLike = 0.0,
    rtol: float = 1e-8,
    atol: float = 1e-10,
) -> Path:
    """Integrate the equation of the modes.

    Parameters
    ----------
    problem : HighDimensionalSGD
        Data, step size, clipping and noise.
    times : array
        Increasing, none before ``start``. In passes over n samples: t = k/n after k steps.
    start : float
        Time of the problem's initial modes, 0 as in a run; it need not be among ``times``.
    rtol, atol : float
        Tolerances of the adaptive step, relative and in units of a mode.

    Returns
    -------
    Path
        Times, modes ``(T, d)`` and risk ``(T,)``; ``successful`` and ``message`` say what went
        wrong, if anything did; times that were not reached are NaN then.

    Raises
    ------
    ValueError, TypeError
        If times do not increase or begin before the start, or tolerances are not positive.

    Notes
    -----
    By diffrax (Tsit5). The error against one run, and against the mean of many, vanishes as the
    intrinsic dimension (sum over maximum of the eigenvalues) grows.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> problem = ntkdp.high_dimensional_sgd.HighDimensionalSGD(
    ...     jnp.ones(100), jnp.full(100, 0.01), clip_norm=1e3, learning_rate=1.0, n_samples=1e6)
    >>> path = ntkdp.high_dimensional_sgd.solve(problem, [0.0, 1.0])
    >>> round(path.risk[-1].item(), 3), round(float(jnp.exp(-2.0)), 3)
    (0.135, 0.135)
    """
    _check(problem)
    start, times = validate.times_from(start, times)
    rtol = as_constant(validate.positive(rtol=rtol))
    atol = as_constant(validate.positive(atol=atol))
    return _solve(problem, start, times, rtol, atol)


@eqx.filter_jit
def _solve(
    problem: HighDimensionalSGD, start: Array, times: Array, rtol: ScalarLike, atol: ScalarLike
) -> Path:
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, modes, args: problem.velocity(modes).astype(modes.dtype)),
        diffrax.Tsit5(),
        t0=start,
        t1=times[-1],
        dt0=None,
        y0=jnp.asarray(problem.initial, times.dtype),
        saveat=diffrax.SaveAt(ts=times),
        stepsize_controller=diffrax.PIDController(rtol=jnp.asarray(rtol), atol=jnp.asarray(atol)),
        max_steps=_MAX_STEPS,
        throw=False,
    )
    solved = solution.result == diffrax.RESULTS.successful
    outcome = jnp.where(solved, int(Outcome.SUCCESS), int(Outcome.SOLVER_FAILED))
    # Times that were not reached are filled with infinity by the solver.
    modes = jnp.where(jnp.isinf(solution.ys), jnp.nan, solution.ys)
    return _path(problem, times, modes, outcome)


def risk_by_clip_norm(
    problem: HighDimensionalSGD, clip_norms: ArrayLike, time: ScalarLike = 1.0
) -> Array:
    r"""Excess risk at a time, as a function of the clipping norm at a fixed noise multiplier.

    Noise grows in proportion to R, while descent saturates. So the risk is least in between, often
    at an R that clips most samples ("aggressive clipping").

    Parameters
    ----------
    problem : HighDimensionalSGD
        Its own clipping norm is not used.
    clip_norms : array
        R, shape ``(m,)``, positive.
    time : float
        In passes over n samples.

    Returns
    -------
    array
        Risk of each R, shape ``(m,)``; NaN where the solver did not get there.

    Raises
    ------
    ValueError, TypeError
        If a clipping norm or the time is not positive.

    Notes
    -----
    Bombari et al., 2505.16329, for private linear regression; here by the equation of the modes.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> problem = ntkdp.high_dimensional_sgd.HighDimensionalSGD(
    ...     jnp.ones(100), jnp.full(100, 0.01), clip_norm=1.0, learning_rate=3.0, n_samples=1e5,
    ...     noise_multiplier=1.0, label_noise=0.3)
    >>> clip_norms = jnp.logspace(-1, 2, 7)
    >>> risk = ntkdp.high_dimensional_sgd.risk_by_clip_norm(problem, clip_norms)
    >>> int(jnp.argmin(risk))
    4
    """
    _check(problem)
    clip_norms = jnp.asarray(validate.positive(clip_norms=clip_norms), jnp.result_type(float))
    if clip_norms.ndim != 1:
        raise ValueError(f"clip_norms must have shape (m,), got {clip_norms.shape}")
    time = validate.scalar(time=validate.positive(time=time))
    times = jnp.stack([jnp.zeros(()), jnp.asarray(time, clip_norms.dtype)])

    def final(clip_norm: Array) -> Array:
        clipped = eqx.tree_at(lambda p: p.clip_norm, problem, clip_norm)
        return solve(clipped, times).risk[-1]

    return jax.vmap(final)(clip_norms)


def simulate(
    problem: HighDimensionalSGD, *, steps: int, record_every: int = 1, key: Key[Array, "*seeds"]
) -> Path:
    """Run the SGD that the equation describes, with fresh Gaussian samples.

    Every gradient is clipped by its own norm; no number is assumed to be large.

    Parameters
    ----------
    problem : HighDimensionalSGD
        Data, step size, clipping and noise.
    steps : int
        At least 1. Each takes one sample, and ``n_samples`` steps are a unit of time.
    record_every : int
        Record every ``record_every`` steps, and the last.
    key : PRNG key
        One, or an array of S keys: repeated runs in parallel, a leading axis.

    Returns
    -------
    Path
        Times k/n, modes and risk, of each run.

    Raises
    ------
    ValueError, TypeError
        If there are no steps, or ``key`` is not a JAX PRNG key.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ntkdp
    >>> problem = ntkdp.high_dimensional_sgd.HighDimensionalSGD(
    ...     jnp.ones(50), jnp.full(50, 0.02), clip_norm=3.0, learning_rate=2.0, n_samples=500)
    >>> key = jax.random.split(jax.random.key(0), 8)
    >>> runs = ntkdp.high_dimensional_sgd.simulate(problem, steps=500, record_every=250, key=key)
    >>> runs.times.tolist(), runs.risk.shape
    ([0.0, 0.5, 1.0], (8, 3))
    """
    _check(problem)
    steps = validate.count(steps=steps)
    record_every = validate.count(record_every=record_every)
    key = jnp.asarray(key)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.ndim > 1:
        raise TypeError(f"key must be one JAX PRNG key, or an array (S,) of them, got {key!r}")
    return _simulate(problem, key, steps, record_every)


@eqx.filter_jit
def _simulate(
    problem: HighDimensionalSGD, keys: Key[Array, "*seeds"], steps: int, record_every: int
) -> Path:
    dtype = jnp.result_type(float)
    spread = jnp.sqrt(jnp.asarray(problem.eigenvalues, dtype))
    rule = clipping.Abadi(problem.clip_norm)
    size = jnp.asarray(problem.learning_rate / problem.n_samples, dtype)
    recorded = recorded_steps(steps, record_every)

    def run(key: PRNGKeyArray) -> Array:
        def step(k: Array, error: Array) -> Array:
            # In the basis of the eigenvectors: sample, noise and label in one draw.
            draw = jax.random.normal(jax.random.fold_in(key, k), (2 * error.size + 1,), dtype)
            x, z = spread * draw[: error.size], draw[error.size : -1]
            gradient = (error @ x - problem.label_noise * draw[-1]) * x
            factor = rule.factors(jnp.linalg.norm(gradient)[None])[0]
            return error - size * (factor * gradient + problem.noise_std * z).astype(dtype)

        def record(error: Array, span: tuple[Array, Array]) -> tuple[Array, Array]:
            error = lax.fori_loop(*span, step, error)
            return error, error**2

        start = jnp.sqrt(jnp.asarray(problem.initial, dtype))
        spans = (jnp.asarray(recorded[:-1]), jnp.asarray(recorded[1:]))
        _, modes = lax.scan(record, start, spans)
        return jnp.concatenate([(start**2)[None], modes])

    modes = run(keys) if keys.ndim == 0 else jax.vmap(run)(keys)
    times = jnp.asarray(recorded, dtype) / problem.n_samples
    return _path(problem, times, modes, Outcome.SUCCESS)


def _check(problem: object) -> None:
    if not isinstance(problem, HighDimensionalSGD):
        raise TypeError(f"problem must be a HighDimensionalSGD, got {type(problem).__name__}")
