"""A prediction moved by what a run without noise shows of its error."""

import jax
import jax.numpy as jnp

from ntkdp._backend.types import Array
from ntkdp.trajectory import HasTrainingSet, Measurement, Trajectory, from_measurements


def shifted(
    prediction: Trajectory, flow: HasTrainingSet, *, predicted: Trajectory, observed: Trajectory
) -> Trajectory:
    r"""Move predicted outputs by the difference of two runs without noise, one of them real.

    .. math::
        f_\text{shifted} = f_\text{prediction} + \bar f_\text{observed} - \bar f_\text{predicted}

    The prediction then follows the features that training moves, which a frozen kernel leaves out,
    and keeps its own response to noise. This costs one run without noise.

    Parameters
    ----------
    prediction : Trajectory
        Noisy runs of a prediction that freezes the kernel or takes it at infinite width, such as
        :func:`ensemble` or :func:`two_time_ensemble`, with outputs ``(S, T, n, K)``.
    flow : KernelFlow, LinearisedFlow, TwoTimeFlow or ResponseFlow
        It knows the loss and the targets.
    predicted : Trajectory
        The same prediction without noise on full batches, with outputs ``(T, n, K)``.
    observed : Trajectory
        A run without noise on full batches, with outputs at the same times: ``dp_sgd.run`` with
        ``noise_multiplier=0``, or :func:`response_ensemble` with it, which is exact.

    Returns
    -------
    Trajectory
        With the losses and accuracies of the shifted outputs. The clip fraction is that of the
        prediction.

    Raises
    ------
    ValueError
        If outputs are missing, or times or shapes do not belong together.

    Notes
    -----
    *Derived*, as the first order of both differences: noise and features act on outputs apart. It
    gains nothing where noise itself moves the kernel as far as training does, which is the case if
    v(T) of :func:`weight_noise_variance` is about 1 relative to the weights.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ntkdp
    >>> x, y = jnp.eye(2), jnp.ones((2, 1))
    >>> loss, rule = ntkdp.losses.SquaredError(), ntkdp.clipping.Abadi(1.0)
    >>> apply_fn, w = lambda w, x: x @ w**2, jnp.full((2, 1), 0.5)
    >>> flow = ntkdp.KernelFlow(ntkdp.empirical_ntk(apply_fn, w, x), y, loss, rule)
    >>> step = dict(learning_rate=0.1, steps=5, outputs=True)
    >>> runs = ntkdp.stochastic_flow.ensemble(
    ...     flow, apply_fn(w, x), noise_multiplier=0.1, key=jax.random.split(jax.random.key(0), 3),
    ...     **step)
    >>> moved = ntkdp.stochastic_flow.shifted(
    ...     runs, flow, predicted=ntkdp.recursion(flow, apply_fn(w, x), **step),
    ...     observed=ntkdp.dp_sgd.run(apply_fn, w, x, y, loss, rule, key=jax.random.key(0), **step))
    >>> moved.loss.shape
    (3, 6)
    """
    paths = {"prediction": prediction, "predicted": predicted, "observed": observed}
    _check(paths)
    train = _moved(prediction.outputs, predicted.outputs, observed.outputs)
    test = _moved(prediction.test_outputs, predicted.test_outputs, observed.test_outputs)
    assert train is not None

    def measure(train: Array, test: Array | None, clip_fraction: Array) -> Measurement:
        return flow.data.measure(train, test, clip_fraction, True)

    for _ in range(prediction.loss.ndim):
        measure = jax.vmap(measure)
    return from_measurements(
        prediction.times,
        measure(train, test, prediction.clip_fraction),
        steps=prediction.steps,
        outcome=prediction.outcome,
        start=prediction.start,
        setup=prediction.setup[0] if prediction.setup else None,
    )


def _check(paths: dict[str, Trajectory]) -> None:
    prediction = paths["prediction"]
    for name, path in paths.items():
        if not isinstance(path, Trajectory):
            raise TypeError(f"{name} must be a Trajectory, got {type(path).__name__}")
        if path.outputs is None:
            raise ValueError(f"{name} must have outputs, got none; record it with outputs=True")
        if path.times.shape != prediction.times.shape or not bool(
            jnp.allclose(path.times, prediction.times, rtol=1e-5)
        ):
            raise ValueError(
                f"{name} must be recorded at the times of the prediction, got {path.times.size} "
                f"times up to {float(path.times[-1]):g}, and {prediction.times.size} up to "
                f"{float(prediction.times[-1]):g} of the prediction"
            )
        if name != "prediction" and path.loss.ndim != 1:
            raise ValueError(
                f"{name} must be one run without noise, got {path.loss.shape[0]:,} runs; give the "
                "one, or their mean"
            )
        if path.outputs.shape[-3:] != prediction.outputs.shape[-3:]:  # type: ignore[union-attr]
            raise ValueError(
                f"{name} must have outputs of the same samples, got shape {path.outputs.shape}"
            )


def _moved(outputs: Array | None, predicted: Array | None, observed: Array | None) -> Array | None:
    if outputs is None or predicted is None or observed is None:
        return None
    return outputs + (observed - predicted).astype(outputs.dtype)
