"""Claims C15-C18: batch clipping, large norms, the global rule."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.linalg import expm

from ntkdp import clipping, gradient_flow, losses
from ntkdp._backend import decompositions
from ntkdp._backend.types import Array, Params
from ntkdp.claims import _instances
from ntkdp.claims._claim import Finding, at_least, at_most, claim, equal


@claim(
    "C15",
    statement="Under batch clipping the loss never rises. If it is flat, the outputs follow the "
    "path of unclipped descent in another time.",
    assumptions="frozen kernel, flat or layerwise; squared loss (sum)",
    source="paper",
)
def batch_clipping_is_monotone() -> list[Finding]:
    rising = _instances.rising()
    times = np.linspace(0.0, 40.0, 1001)
    path = _instances.solved(rising.flow(clipping.Batch(0.1)), rising.outputs, times)
    # Each mode of descent is a power of another, whatever the time: compare along the path.
    values, vectors = np.linalg.eigh(np.ones((3, 3)) + 0.1 * np.eye(3))
    start = vectors.T @ np.array([3.0, -1.0, -1.0])
    modes = (np.asarray(_instances.outputs_of(path)) - np.array([-3.0, 1.0, 1.0])) @ vectors
    elapsed = -np.log(modes[:, 0] / start[0]) / values[0]
    off = np.max(np.abs(modes - start * np.exp(-np.outer(elapsed, values))))
    findings = [
        at_most("distance from the path of descent", off, 1e-6),
        at_most("share of time that descent takes", elapsed[-1] / times[-1], 0.9),
        at_most("largest increase of L", jnp.max(jnp.diff(path.loss)), -1e-6),
        equal("clip fraction at the start", path.clip_fraction[0], 1.0, within=0.0),
    ]

    terms, a = _instances.random_terms(jax.random.key(150), 500, 4, n_outputs=2, n_groups=3)

    @jax.jit
    @jax.vmap
    def compare_rates(terms: Array, a: Array) -> list[Array]:
        """dL/dt over its closed form, for both scopes."""
        kernel, rates = _instances.layers(terms), []
        for scope in _instances.SCOPES:
            parts = terms if scope == "layerwise" else jnp.sum(terms, axis=0)[None]
            squares = jnp.einsum("ik,rijkl,jl->r", a, parts, a)
            rule = clipping.Batch(0.5, scope=scope)
            flow = _instances.squared_flow(kernel, jnp.zeros_like(a), rule)
            # -sum_r c_r |G_r|^2 with c_r |G_r| = min(|G_r|, R).
            expected = -jnp.sum(jnp.minimum(squares, 0.5 * jnp.sqrt(squares)))
            rates.append(_instances.loss_rate(flow, a) / expected)
        return rates

    for scope, ratio in zip(_instances.SCOPES, compare_rates(terms, a), strict=True):
        findings.append(
            at_most(
                f"{scope}: dL/dt against -sum_r c_r |G_r|^2, largest relative difference",
                jnp.max(jnp.abs(ratio - 1)),
                1e-10,
            )
        )
    for name in ("tanh", "ReLU"):
        problem = _instances.networks()[name]
        gradient = jax.jit(jax.grad(_total_loss(problem)))(problem.params)
        velocity = eqx.filter_jit(problem.flow(clipping.Batch(0.1)).velocity)(problem.params)
        length = optax.tree.norm(gradient)
        expected = jax.tree.map(lambda g, by=0.1 / length: -by * g, gradient)
        findings += [
            at_least(f"{name}: norm of the gradient over R", length / 0.1, 2.0),
            at_most(
                f"{name}: the weights' velocity against -R G/|G|",
                _instances.largest_difference(velocity, expected),
                1e-12,
            ),
        ]
    return findings


def _total_loss(problem: _instances.Problem) -> Callable[[Params], Array]:
    return lambda params: jnp.sum(problem.loss(problem.apply(params, problem.x), problem.targets))


def _descent(problem: _instances.Problem, learning_rate: float, steps: int) -> Array:
    """Outputs of optax's gradient descent on the summed loss, ``(steps + 1, n, K)``."""
    optimizer = optax.sgd(learning_rate)
    gradient = jax.grad(_total_loss(problem))

    def step(
        carry: tuple[Params, optax.OptState], _: None
    ) -> tuple[tuple[Params, optax.OptState], Array]:
        params, state = carry
        updates, state = optimizer.update(gradient(params), state)
        new = optax.apply_updates(params, updates)
        return (new, state), problem.apply(new, problem.x)

    start = (problem.params, optimizer.init(problem.params))
    outputs = jax.jit(lambda start: jax.lax.scan(step, start, length=steps)[1])(start)
    return jnp.concatenate([problem.apply(problem.params, problem.x)[None], outputs])


@claim(
    "C16",
    statement="With R above every gradient norm and no noise, DP-SGD is gradient descent, iterate "
    "by iterate.",
    assumptions="rules with factor 1 below R (abadi, batch, 0/1), full batches, flat or layerwise",
    source="paper",
)
def large_norms_leave_descent_as_it_is() -> list[Finding]:
    cases: list[tuple[str, clipping.ClippingRule, _instances.Gradients]] = [
        ("tanh", clipping.Abadi(1e3), "vmap"),
        ("tanh", clipping.Batch(1e3), "structured"),
        ("ReLU", clipping.Abadi(1e3, scope="layerwise"), "structured"),
        ("ReLU", clipping.Global(1e3), "vmap"),
        ("convolutional", clipping.Abadi(1e3), "structured"),
    ]
    findings, plain = [], {}
    for name, rule, gradients in cases:
        problem = _instances.networks()[name]
        if name not in plain:
            plain[name] = _descent(problem, 0.05, 20)
        run = problem.run(rule, learning_rate=0.05, steps=20, outputs=True, gradients=gradients)
        findings.append(
            at_most(
                f"{name}, {type(rule).__name__}, {gradients}: largest relative difference",
                _instances.largest_difference(run.outputs, plain[name]),
                1e-12,
            )
        )
    moved = _instances.largest_difference(plain["tanh"][-1], plain["tanh"][0])
    return [*findings, at_least("how far the outputs went", moved, 0.1)]


@claim(
    "C17",
    statement="For large R, f - y = exp(-H t)(f(0) - y) and L(t) <= L(0) exp(-2 lambda_min t); "
    "with the mean over n samples the rate is 2 lambda_min/n.",
    assumptions="frozen kernel, squared loss, R above every norm",
    source="paper",
)
def large_norms_give_the_linear_flow() -> list[Finding]:
    rule, times = clipping.Abadi(1e6), np.linspace(0.0, 10.0, 1001)
    rising = _instances.rising()
    path = _instances.solved(rising.flow(rule), rising.outputs, times)
    H, a0 = np.asarray(rising.kernel), np.array([3.0, -1.0, -1.0])
    expected = expm(-H * times[:, None, None]) @ a0
    found = np.asarray(_instances.outputs_of(path)) - np.array([-3.0, 1.0, 1.0])
    bound = path.loss[0] * np.exp(-2 * 0.1 * times)
    findings = [
        at_most("distance from the exponential", np.max(np.abs(found - expected)), 1e-7),
        at_most("largest L over its bound", np.max(path.loss / bound), 1.0, slack=1e-7),
        equal("clip fraction", jnp.max(path.clip_fraction), 0.0, within=0.0),
    ]
    # The bound is attained when only the slowest mode is there.
    slowest = decompositions.eigh(rising.kernel)[1][:, :1]
    zero = jnp.zeros((3, 1))
    rates: list[tuple[losses.Reduction, float]] = [("sum", 0.2), ("mean", 0.2 / 3)]
    for reduction, rate in rates:
        flow = gradient_flow.KernelFlow(
            rising.kernel, zero, losses.SquaredError(), rule, reduction=reduction
        )
        path = _instances.solved(flow, slowest, times)
        measured = -jnp.log(path.loss[-1] / path.loss[0]) / 10
        findings.append(
            equal(f"rate of the slowest mode, {reduction}", measured, rate, within=1e-6)
        )

    # Several outputs, by layer.
    terms, a = _instances.random_terms(jax.random.key(170), 1, 3, n_outputs=2, n_groups=2)
    kernel = _instances.layers(terms[0])
    flow = _instances.squared_flow(
        kernel, jnp.zeros_like(a[0]), clipping.Abadi(1e6, scope="layerwise")
    )
    path = _instances.solved(flow, a[0], times / 10)
    H = np.asarray(kernel.total).transpose(0, 2, 1, 3).reshape(6, 6)
    expected = expm(-H * times[:, None, None] / 10) @ np.ravel(a[0])
    off = np.abs(np.asarray(path.outputs).reshape(-1, 6) - expected).max() / np.abs(expected).max()
    return [*findings, at_most("two outputs by layer: distance, relative", off, 1e-7)]


@claim(
    "C18",
    statement="The global rule with nothing screened is gradient descent at learning rate eta R/Z.",
    assumptions="every norm at most Z, no noise, flat or layerwise",
    source="paper (v3)",
)
def the_global_rule_rescales_the_learning_rate() -> list[Finding]:
    findings = []
    cases: list[tuple[str, clipping.Scope, _instances.Gradients]] = [
        ("tanh", "flat", "vmap"),
        ("tanh", "flat", "structured"),
        ("ReLU", "layerwise", "structured"),
    ]
    for name, scope, gradients in cases:
        problem = _instances.networks()[name]
        rule = clipping.Global(0.5, Z=20.0, scope=scope)
        run = problem.run(rule, learning_rate=2.0, steps=20, outputs=True, gradients=gradients)
        plain = _descent(problem, 2.0 * 0.5 / 20.0, 20)
        findings.append(
            at_most(
                f"{name}, {scope}, {gradients}: largest relative difference",
                _instances.largest_difference(run.outputs, plain),
                1e-12,
            )
        )
    rising = _instances.rising()
    options: dict[str, Any] = {"learning_rate": 8.0, "steps": 20, "outputs": True}
    path = gradient_flow.recursion(
        rising.flow(clipping.Global(0.5, Z=20.0)), rising.outputs, **options
    )
    plain = _descent(rising.model(), 0.2, 20)
    screened = gradient_flow.recursion(
        rising.flow(clipping.Global(0.5, Z=2.0)), rising.outputs, **options
    )
    return [
        *findings,
        at_most(
            "C7's recursion: largest relative difference",
            _instances.largest_difference(path.outputs, plain),
            1e-12,
        ),
        at_least(
            "with a sample screened: difference",
            _instances.largest_difference(screened.outputs, plain),
            0.1,
        ),
    ]
