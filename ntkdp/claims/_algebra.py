"""Claims C1-C5: kernels, factors and their quadratic forms."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import brentq

from ntkdp import certificates, clipping, dp_sgd, ntk, spectrum
from ntkdp._backend import compiled, decompositions
from ntkdp._backend.types import Array, ScalarLike
from ntkdp.claims import _instances
from ntkdp.claims._claim import Finding, at_least, at_most, claim, equal


@claim(
    "C1",
    statement="The squared norm of a per-sample gradient is |g_i|^2 = a_i' H_ii a_i, and the same "
    "holds group by group.",
    assumptions="any differentiable network and loss; H the empirical kernel, with full outputs",
    source="derived",
)
def norms_are_on_the_diagonal_of_the_kernel() -> list[Finding]:
    findings = []
    for name, (apply, params, x, targets, loss) in _instances.networks().items():
        a = loss.output_gradient(apply(params, x), targets)
        whole = ntk.empirical_ntk(apply, params, x)
        # The finest groups: one for each leaf.
        terms = ntk.layerwise_ntk(apply, params, x, groups=_by_leaf).values
        group_squares = jnp.einsum("ik,riikl,il->ri", a, terms, a)
        squares = jnp.einsum("ik,iikl,il->i", a, whole, a)

        rule = _instances.unclipped("layerwise")
        options: dict[str, Any] = {"groups": _by_leaf, "learning_rate": 1.0, "gradients": "vmap"}
        algorithm = dp_sgd.build(apply, x, targets, loss, rule, **options)
        step = algorithm.compile()
        plain = step(jax.random.key(0), algorithm.init(params))[1].norms
        factored = ntk.per_sample_gradient_norms(apply, params, x, a, groups=_by_leaf)
        for way, norms in (("plain", plain), ("factored", factored)):
            findings += [
                at_most(
                    f"{name}, {way}, by group: largest relative difference",
                    jnp.max(jnp.abs(norms**2 / group_squares - 1)),
                    1e-12,
                ),
                at_most(
                    f"{name}, {way}, in all: largest relative difference",
                    jnp.max(jnp.abs(jnp.sum(norms**2, axis=0) / squares - 1)),
                    1e-12,
                ),
            ]
    return findings


def _by_leaf(path: str) -> str:
    return path


def _factors(kernel: Array, rule: clipping.ClippingRule, a: Array) -> Array:
    """Flat factors ``(n,)`` at output gradients ``(n, K)``, for a kernel ``(n, n, K, K)``."""
    norms = jnp.sqrt(jnp.einsum("ik,iikl,il->i", a, kernel, a))
    return rule.factors(norms, jnp.sqrt(jnp.einsum("ik,ijkl,jl->", a, kernel, a)))


def _correlated(rho: ScalarLike, ratio: ScalarLike) -> tuple[Array, Array]:
    """Two samples with kernel [[1, rho], [rho, 1]], the second clipped ``ratio`` times as hard."""
    kernel = jnp.array([[1.0, rho], [rho, 1.0]])[:, :, None, None]
    return kernel, _factors(kernel, clipping.Abadi(1.0), jnp.array([[1.0], [ratio]]))


@claim(
    "C2",
    statement="The eigenvalues of HC are those of C^(1/2) H C^(1/2): real and positive.",
    assumptions="flat clipping, every factor positive, H > 0",
    source="paper",
)
def eigenvalues_of_the_clipped_kernel_are_positive() -> list[Finding]:
    small, large = spectrum.eigenvalues(*_correlated(0.9, 100.0))
    findings = [
        equal("smaller eigenvalue of HC", small, 0.0019, within=5e-5),
        equal("larger eigenvalue of HC", large, 1.0081, within=5e-5),
    ]
    terms, a = _instances.random_terms(jax.random.key(20), 200, 4, n_outputs=2)
    rules = _instances.rules(1.0)

    @jax.jit
    @jax.vmap
    def compare_rules(kernel: Array, a: Array) -> list[tuple[Array, Array, Array]]:
        comparisons = []
        for rule in rules.values():
            factors = _factors(kernel, rule, a)
            clipped = spectrum.clipped_operator(kernel, factors)
            flow = _instances.squared_flow(kernel, jnp.zeros_like(a), rule)
            drift, predicted = flow.velocity(flow.init(a))[0].reshape(-1), -clipped @ a.reshape(-1)
            gap = jnp.linalg.norm(drift - predicted) / jnp.linalg.norm(predicted)
            comparisons.append((clipped, spectrum.eigenvalues(kernel, factors), gap))
        return comparisons

    for name, (clipped, symmetric, gap) in zip(rules, compare_rules(terms[:, 0], a), strict=True):
        general = np.linalg.eigvals(clipped)
        general = np.take_along_axis(general, np.argsort(general.real, axis=1), 1)
        apart = np.max(np.abs(general - symmetric) / symmetric[:, -1:])
        smallest = np.min(symmetric[:, 0] / symmetric[:, -1])
        findings += [
            at_most(f"{name}: the drift against -HCa, relative difference", jnp.max(gap), 1e-12),
            at_most(f"{name}: largest relative difference of spectra", apart, 1e-9),
            at_least(f"{name}: smallest eigenvalue over the largest", smallest, 1e-10),
        ]
    return findings


@claim(
    "C3",
    statement="The quadratic form of HC may be indefinite though all its eigenvalues are positive.",
    assumptions="flat clipping; H = [[1, 0.9], [0.9, 1]], factors 1 and 0.01",
    source="paper",
)
def the_clipped_kernel_is_no_positive_form() -> list[Finding]:
    pair = _correlated(0.9, 100.0)
    small, large = 2 * spectrum.symmetric_eigenvalues(*pair)
    clipped = np.asarray(spectrum.clipped_operator(*pair))
    down = np.linalg.eigh(clipped + clipped.T)[1][:, 0]
    return [
        equal("smaller eigenvalue of HC + CH", small, -0.334, within=5e-4),
        equal("larger eigenvalue of HC + CH", large, 2.354, within=5e-4),
        at_least("smallest eigenvalue of HC", np.min(np.linalg.eigvals(clipped)), 1e-3),
        at_most("b' HC b along its worst direction", down @ clipped @ down, -0.16),
    ]


@claim(
    "C4",
    statement="For two samples HC + CH > 0 if and only if |rho| < 2 sqrt(c1 c2)/(c1 + c2). For any "
    "number of samples it is enough that (kC - 1)/(kC + 1) < 2 sqrt(kH)/(kH + 1), where "
    "kC and kH are condition numbers. So there is a clipping norm above which the loss "
    "decays.",
    assumptions="flat clipping, H > 0; with several outputs kH is that of the whole kernel",
    source="derived",
)
def close_factors_keep_the_form_positive() -> list[Finding]:
    def smallest_of(rho: ScalarLike, ratio: ScalarLike) -> Array:
        return spectrum.symmetric_eigenvalues(*_correlated(rho, ratio))[0]

    smallest = jax.jit(smallest_of)
    critical = brentq(lambda ratio: float(smallest(0.9, ratio)), 1.1, 50.0)
    kernel, _ = _correlated(0.9, 1.0)
    safe = certificates.safe_clip_norm(kernel, jnp.array([[1.0], [10.0]]))
    keys = jax.random.split(jax.random.key(40), 3)
    rho = jax.random.uniform(keys[0], (500,), minval=-1.0)
    ratio = 10 ** jax.random.uniform(keys[1], (500,), maxval=2.0)
    positive = jax.jit(jax.vmap(smallest_of))(rho, ratio) > 0
    predicted = jnp.abs(rho) < 2 * jnp.sqrt(ratio) / (1 + ratio)
    findings = [
        equal("ratio of factors at which rho = 0.9 fails", critical, 2.5454, within=5e-5),
        equal("safe R for norms 1 and 10, rho = 0.9", safe, 10 / 2.5454, within=1e-4),
        equal("contradictions in 500 pairs", jnp.sum(positive != predicted), 0, within=0),
        at_least("pairs of 500 that fail", jnp.sum(~predicted), 100),
    ]

    terms, a = _instances.random_terms(jax.random.key(41), 300, 3, n_outputs=2)
    above = 1e-6 + jax.random.exponential(keys[2], (300,)) * (jnp.arange(300) % 2)

    @jax.jit
    @jax.vmap
    def measure(kernel: Array, a: Array, above: Array) -> tuple[Array, Array, Array, list[Array]]:
        # Factors as far apart as the condition allows; R beyond it is safe as well.
        values = decompositions.eigvalsh(spectrum.clipped_operator(kernel))
        root = jnp.sqrt(values[-1] / values[0])
        allowed = ((root + 1) / (root - 1)) ** 2
        norms = jnp.sqrt(jnp.einsum("ik,iikl,il->i", a, kernel, a))
        sufficient = jnp.max(norms) / allowed
        rule = clipping.Abadi((1 + above) * sufficient)
        form = spectrum.symmetric_eigenvalues(kernel, _factors(kernel, rule, a))
        flow = _instances.squared_flow(kernel, jnp.zeros_like(a), rule)
        plain = _instances.squared_flow(kernel, jnp.zeros_like(a), _instances.unclipped())
        relative = _instances.loss_rate(flow, a) / -_instances.loss_rate(plain, a)

        exact = certificates.safe_clip_norm(kernel, a)
        # Zero where every norm is safe.
        edge = jnp.where(exact > 0, exact, jnp.max(norms))
        around = [
            spectrum.symmetric_eigenvalues(kernel, _factors(kernel, clipping.Abadi(R), a))[0]
            for R in (0.999 * edge, 1.001 * edge)
        ]
        return form[0] / form[-1], relative, exact / sufficient, around

    forms, rates, exact, (below, beyond) = measure(terms[:, 0], a, above)
    exists = exact > 0
    rising = _instances.rising()
    residual = rising.outputs - rising.targets
    bound = certificates.safe_clip_norm_bound(rising.kernel, residual)
    at_bound, under = (
        _instances.loss_rate(rising.flow(clipping.Abadi(R)), rising.outputs)
        for R in (bound, 0.65 * bound)
    )
    return [
        *findings,
        at_least("least eigenvalue of the form under the condition", jnp.min(forms), 0.0),
        at_most("largest dL/dt there, over descent's", jnp.max(rates), -1e-6),
        at_most("largest safe R over what the condition gives", jnp.max(exact), 1.0, slack=1e-9),
        at_least("instances of 300 with a safe R above 0", jnp.sum(exists), 100),
        at_most(
            "form just below the safe R, at its largest",
            jnp.max(jnp.where(exists, below, -1.0)),
            0.0,
        ),
        at_least(
            "form just above the safe R, at its least", jnp.min(jnp.where(exists, beyond, 1.0)), 0.0
        ),
        at_most("dL/dt of C7 at the R that the condition gives", at_bound, 0.0),
        at_least("dL/dt of C7 at 0.65 of it", under, 0.1),
    ]


@claim(
    "C5",
    statement="Two samples cannot make the loss rise: <g1 + g2, P(g1) + P(g2)> >= 0 for clipped "
    "gradients P(g). Three can under every such rule, and two under the 0/1 rule.",
    assumptions="rules whose clipped norm s w(s) does not decrease in s (abadi, AUTO, PSAC), flat "
    "or layerwise",
    source="derived",
)
def two_samples_cannot_make_the_loss_rise() -> list[Finding]:
    rules = {
        "abadi": clipping.Abadi(1.0),
        "AUTO-V": clipping.Automatic(1.0, gamma=0.0),
        "AUTO-S": clipping.Automatic(1.0),
        "PSAC": clipping.PSAC(1.0),
    }
    pairs = jnp.stack([_smallest_alignments(rules, n=2, dimension=d) for d in (1, 2, 30)])
    triples = jnp.stack([_smallest_alignments(rules, n=3, dimension=d) for d in (1, 3)])
    findings = [
        at_least(f"{name}: smallest alignment of two", smallest, -1e-12)
        for name, smallest in zip(rules, jnp.min(pairs, axis=0), strict=True)
    ]
    findings += [
        at_most(f"{name}: smallest alignment of three", smallest, -0.1)
        for name, smallest in zip(rules, jnp.min(triples, axis=0), strict=True)
    ]

    # In function space, by layer, with several outputs: the flow's own norms and drift.
    terms, a = _instances.random_terms(jax.random.key(50), 500, 2, n_outputs=2, n_groups=3)
    for scope in _instances.SCOPES:

        @jax.jit
        @jax.vmap
        def rate(terms: Array, a: Array, scope: clipping.Scope = scope) -> Array:
            rule = clipping.Abadi(1.0, scope=scope)
            kernel = _instances.layers(terms)
            flow = _instances.squared_flow(kernel, jnp.zeros_like(a), rule)
            return _instances.loss_rate(flow, a)

        findings.append(at_most(f"{scope}: largest dL/dt of two", jnp.max(rate(terms, a)), 0.0))

    # Gradients 1 and -3, the second one dropped.
    kernel = jnp.array([[1.0, -3.0], [-3.0, 9.0]])
    flow = _instances.squared_flow(kernel, jnp.zeros((2, 1)), clipping.Global(2.0))
    dropped = _instances.loss_rate(flow, jnp.ones((2, 1)))
    return [*findings, equal("0/1 rule: dL/dt of two", dropped, 2.0, within=1e-12)]


@compiled.jit(static_argnames=("n", "dimension"))
def _smallest_alignments(
    rules: dict[str, clipping.ClippingRule], *, n: int, dimension: int
) -> Array:
    """For each rule, the smallest <sum g_i, sum P(g_i)> over |sum g_i| sum |P(g_i)|.

    Over random sets of n gradients; their norms lie on both sides of R, and in every other set the
    last gradient is close to minus the sum of the others.
    """
    keys = jax.random.split(jax.random.key(51), 3)
    count = 2000
    gradients = jax.random.normal(keys[0], (count, n, dimension))
    gradients *= 10 ** jax.random.uniform(keys[1], (count, n, 1), minval=-1.5, maxval=1.5)
    away = 10 ** jax.random.uniform(keys[2], (count, 1), minval=-2.0)
    against = away * gradients[:, -1] - jnp.sum(gradients[:, :-1], axis=1)
    gradients = gradients.at[::2, -1].set(against[::2])
    total, norms = jnp.sum(gradients, axis=1), jnp.linalg.norm(gradients, axis=-1)

    def smallest(rule: clipping.ClippingRule) -> Array:
        factors = jax.vmap(rule.factors)(norms)
        clipped = jnp.sum(factors[..., None] * gradients, axis=1)
        lengths = jnp.linalg.norm(total, axis=-1) * jnp.sum(factors * norms, axis=-1)
        return jnp.min(jnp.sum(total * clipped, axis=-1) / lengths)

    return jnp.stack([smallest(rule) for rule in rules.values()])
