"""Claims C12-C14: layerwise clipping."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntkdp import clipping, gradient_flow, ntk
from ntkdp._backend import decompositions
from ntkdp._backend.types import Array, ArrayLike, PRNGKeyArray, PyTree
from ntkdp.claims import _instances
from ntkdp.claims._claim import Finding, at_least, at_most, claim, equal
from ntkdp.trajectory import Trajectory

_LAYERWISE = clipping.Abadi(1.0, scope="layerwise")


def _path(
    instance: _instances.Instance, rule: clipping.ClippingRule, times: ArrayLike
) -> Trajectory:
    return _instances.solved(instance.flow(rule), instance.outputs, times)


@claim(
    "C12",
    statement="Layerwise clipping may get stuck at a non-zero loss though H > 0; flat clipping "
    "converges there.",
    assumptions="two samples, one weight a layer (so every H_r is singular), R_r = 1, abadi",
    source="derived",
)
def layerwise_clipping_may_get_stuck() -> list[Finding]:
    stuck = _instances.stuck()
    moving = stuck._replace(outputs=jnp.array([[-1.0], [-6.0]]))
    times = np.linspace(0.0, 60.0, 1001)
    at_rest, moved = _path(stuck, _LAYERWISE, times), _path(moving, _LAYERWISE, times)
    end = _instances.outputs_of(moved)[-1]
    findings = [
        equal("L from (5, -3), at its largest", jnp.max(at_rest.loss), 17.0, within=1e-9),
        equal("L from (5, -3), at its smallest", jnp.min(at_rest.loss), 17.0, within=1e-9),
        equal("f_1 in the end from (-1, -6)", end[0], 1.0, within=5e-4),
        equal("f_2 in the end from (-1, -6)", end[1], -3.434, within=5e-4),
        at_most(
            "last movement from (-1, -6)",
            jnp.max(jnp.abs(end - _instances.outputs_of(moved)[-200])),
            1e-5,
        ),
        equal(
            "smallest eigenvalue of H",
            decompositions.eigvalsh(stuck.kernel.total)[0],
            1.0,
            within=1e-12,
        ),
    ]
    for start in (stuck, moving):
        flat = _path(start, clipping.Abadi(1.0), times)
        findings.append(at_most("L of flat clipping in the end", flat.loss[-1], 1e-10))
    for gradients in _instances.GRADIENTS:
        options: dict[str, Any] = {"learning_rate": 0.01, "steps": 2000, "gradients": gradients}
        run = stuck.model().run(_LAYERWISE, **options)
        findings.append(equal(f"L of a run, {gradients}", run.loss[-1], 17.0, within=1e-9))
        run = moving.model().run(_LAYERWISE, **options, outputs=True)
        findings.append(
            equal(
                f"f_2 of a run from (-1, -6), {gradients}",
                _instances.outputs_of(run)[-1, 1],
                -3.434,
                within=0.05,
            )
        )
    return findings


@claim(
    "C13",
    statement="Layerwise clipping may diverge though every H_r > 0. From a start close by it "
    "converges, and with flat clipping or none training converges from both starts.",
    assumptions="three samples, two layers, R_r = 1, abadi, squared loss (sum)",
    source="derived",
)
def layerwise_clipping_may_diverge() -> list[Finding]:
    far = _instances.divergent()
    near = far._replace(outputs=jnp.full((3, 1), 0.5))
    long, short = np.linspace(0.0, 3000.0, 1001), np.linspace(0.0, 200.0, 1001)
    away = _path(far, _LAYERWISE, short)
    flow = far.flow(_LAYERWISE)
    velocity = flow.velocity(flow.init(far.outputs))[0][:, 0]
    findings = [
        equal("L(200)", away.loss[-1], 3387.8, within=0.05),
        equal("L(0)", away.loss[0], 600.0, within=1e-9),
        equal("da_1/dt", velocity[0], 0.064, within=5e-4),
        equal("da_2/dt", velocity[1], 0.24, within=5e-4),
        equal("da_3/dt", velocity[2], 0.064, within=5e-4),
        at_least(
            "smallest eigenvalue of any H_r",
            jnp.min(jax.vmap(decompositions.eigvalsh)(far.kernel.values)),
            1e-4,
        ),
        at_most(
            "L in the end, layerwise from close by", _path(near, _LAYERWISE, long).loss[-1], 1e-8
        ),
    ]
    for name, rule in (("flat", clipping.Abadi(1.0)), ("unclipped", _instances.unclipped())):
        findings += [
            at_most(f"L in the end, {name} from {where}", _path(start, rule, long).loss[-1], 1e-8)
            for where, start in (("far", far), ("close by", near))
        ]
    options: dict[str, Any] = {"learning_rate": 0.05, "steps": 4000, "record_every": 4000}
    steps = gradient_flow.recursion(flow, far.outputs, **options)
    findings.append(equal("L(200) of the recursion", steps.loss[-1], 3387.8, within=0.5))
    for gradients in _instances.GRADIENTS:
        run = far.model().run(_LAYERWISE, gradients=gradients, **options)
        findings.append(equal(f"L(200) of a run, {gradients}", run.loss[-1], 3387.8, within=0.5))
    return findings


@claim(
    "C14",
    statement="|J_r' C_r a|^2 >= lambda_min(H_r) min_i C_ir^2 |a|^2, so if some H_r > 0, every "
    "equilibrium of the weights has a = 0.",
    assumptions="every factor positive (the 0/1 rule is left out), layerwise clipping",
    source="derived",
)
def a_positive_layer_leaves_no_equilibrium() -> list[Finding]:
    rules = _instances.rules(0.3, "layerwise")
    in_network = {name: rules[name] for name in ("abadi", "PSAC")}

    @jax.jit
    @jax.vmap
    def of_network(key: PRNGKeyArray) -> Array:
        keys = jax.random.split(key, 2)
        network = _instances.tanh_network()
        params = {
            name: jax.random.normal(key, leaf.shape)
            for key, (name, leaf) in zip(keys, network.params.items(), strict=True)
        }
        kernel = ntk.layerwise_ntk(network.apply, params, network.x)
        terms = kernel.values[:, :, :, 0, 0]
        return _bound_ratios(network._replace(params=params), terms, in_network.values())

    terms, a = _instances.random_terms(jax.random.key(140), 300, 4, n_groups=3)

    def problem_of(terms: Array, a: Array) -> _instances.Problem:
        return _instances.Instance(
            _instances.layers(terms[..., 0, 0]), jnp.zeros_like(a), a
        ).model()

    @jax.jit
    @jax.vmap
    def of_random_layers(terms: Array, a: Array) -> Array:
        return _bound_ratios(problem_of(terms, a), terms[..., 0, 0], rules.values())

    # Without clipping, along the last eigenvector of the first term, the bound is attained.
    last = decompositions.eigh(terms[0, 0, ..., 0, 0])[1][:, :1]
    none = [_instances.unclipped("layerwise")]
    attained = _bound_ratios(problem_of(terms[0], last), terms[0, ..., 0, 0], none)[0, 0]

    ratios = [
        ("tanh network", in_network, of_network(jax.random.split(jax.random.key(141), 300))),
        ("random layers", rules, of_random_layers(terms, a)),
    ]
    findings = [
        at_least(
            f"{where}, {rule}: smallest ratio to the bound", jnp.min(ratio[:, i]), 1.0, slack=1e-9
        )
        for where, names, ratio in ratios
        for i, rule in enumerate(names)
    ]
    stuck = _instances.stuck()
    velocity = stuck.model().flow(_LAYERWISE).velocity(stuck.model().params)
    return [
        *findings,
        equal("ratio where the bound is attained", attained, 1.0, within=1e-9),
        at_most("speed of C12's weights, no layer positive", _squares(velocity).max(), 1e-24),
    ]


def _squares(tree: PyTree) -> Array:
    """Squared norm of each leaf: in these problems, of each group."""
    return jnp.stack([jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)])


def _bound_ratios(
    problem: _instances.Problem, terms: Array, rules: Iterable[clipping.ClippingRule]
) -> Array:
    """|J_r' C_r a|^2 over its bound, for each rule and group; terms ``(R, n, n)``, one output."""
    a = problem.loss.output_gradient(problem.apply(problem.params, problem.x), problem.targets)
    smallest = decompositions.eigvalsh(terms)[:, 0]
    norms = jnp.sqrt(jnp.diagonal(terms, axis1=1, axis2=2)) * jnp.abs(a[:, 0])
    totals = jnp.sqrt(jnp.einsum("ik,rij,jk->r", a, terms, a))
    ratios = []
    for rule in rules:
        moved = _squares(problem.flow(rule).velocity(problem.params))
        weakest = jnp.min(rule.factors(norms, totals), axis=1)
        ratios.append(moved / (smallest * weakest**2 * jnp.sum(a**2)))
    return jnp.stack(ratios)
