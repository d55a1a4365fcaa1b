"""Every cell of Table 1 from computed evidence."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ntkdp import clipping, counterexamples, spectrum
from ntkdp._backend import decompositions, validate
from ntkdp.clipping import ClippingRule, Scope
from ntkdp.counterexamples import Counterexample
from ntkdp.ntk import LayerwiseKernel
from ntkdp.table_one import _evidence as evidence
from ntkdp.table_one._table import COLUMNS, Cell, Row, State, Table

#: Relative error that rounding may leave in a measurement.
_ROUNDING = 1e-10
#: Share of its initial value to which a loss has to fall to count as zero.
_ZERO = 1e-8


def compute(
    key: jax.Array | None = None, progress: Callable[[float], None] = lambda done: None
) -> Table:
    """Rebuild the table, in float64 whatever precision the process uses.

    Parameters
    ----------
    key : PRNG key, optional
        For the random instances and the searches; ``jax.random.key(1)`` by default.
    progress : callable, optional
        Called with the fraction of the work done.

    Returns
    -------
    Table
        ``holds`` says whether the evidence supports every cell. It takes about a minute.

    Notes
    -----
    Bu et al. (2023), Table 1; additions are *derived*.

    Examples
    --------
    >>> import ntkdp
    >>> ntkdp.table_one.COLUMNS[0]
    'symmetric'
    """
    with jax.enable_x64(True):
        key = jax.random.key(1) if key is None else validate.key(key=key)
        makers: tuple[Callable[[], Row], ...] = (
            lambda: _all_hold("none", "H", (clipping.NoClipping(),), key),
            lambda: _all_hold("batch", "c H", (clipping.Batch(1.0),), key),
            lambda: _all_hold(
                "large R, flat and layerwise",
                "H",
                (clipping.Abadi(1e6), clipping.Abadi(1e6, scope="layerwise")),
                key,
            ),
            lambda: _small_flat(key),
            lambda: _small_layerwise(key),
            lambda: _nothing_screened("global, flat", "c H", "flat", key),
            lambda: _nothing_screened("global, layerwise", "sum_r c_r H_r", "layerwise", key),
        )
        rows = []
        for number, make in enumerate(makers):
            progress(number / len(makers))
            rows.append(make())
        progress(1.0)
    return Table(tuple(rows))


def _all_hold(
    name: str, matrix: str, rules: tuple[ClippingRule, ...], key: jax.Array, stated: int = 6
) -> Row:
    """A row of "yes"; for the first ``stated`` columns the paper says so too."""
    states = [evidence.worst_of_states(rule, key) for rule in rules]
    paths = [evidence.worst_of_paths(rule, key) for rule in rules]
    many = f"worst of {evidence.N_STATES * len(rules)} random states"
    ways = f"worst of {evidence.N_TRAJECTORIES * len(rules)} trajectories"
    asymmetry = max(state.asymmetry for state in states)
    form = min(state.quadratic_form for state in states)
    least = min(state.eigenvalue for state in states)
    change = max(path.last_change for path in paths)
    rise = max(state.rise for state in states)
    on_the_way = max(path.largest_rise for path in paths)
    final = max(path.final_loss for path in paths)
    measured = (
        (f"asymmetry over norm, {many}", asymmetry, asymmetry <= _ROUNDING),
        (f"least eigenvalue of the symmetric part over norm, {many}", form, form > 0),
        (f"least real part of an eigenvalue over norm, {many}", least, least > 0),
        (f"change of the loss in the last quarter, {ways}", change, change <= _ZERO),
        (
            f"dL/dt over |a| |df/dt|, {many}, three losses; none of the {ways[9:]} rises",
            rise,
            rise < 0 and on_the_way <= _ROUNDING,
        ),
        (f"final over initial loss, {ways}", final, final <= _ZERO),
    )
    cells = tuple(
        Cell(column, True if number < stated else None, True, *numbers)
        for number, (column, numbers) in enumerate(zip(COLUMNS, measured, strict=True))
    )
    return Row(name, matrix, cells)


def _operator_at(example: Counterexample | State) -> tuple[jax.Array | LayerwiseKernel, jax.Array]:
    """Kernel and factors at a state with squared loss and one output, as spectrum takes them."""
    if isinstance(example, State):
        kernel, a = jnp.asarray(example.kernel), jnp.asarray(example.outputs)
        norms = jnp.sqrt(jnp.diagonal(kernel)) * jnp.abs(a)
        return kernel, clipping.Abadi(example.clip_norm).factors(norms)
    a = (example.outputs_array - jnp.asarray(example.targets))[:, 0]
    terms = example.terms
    norms = jnp.sqrt(jnp.diagonal(terms, axis1=1, axis2=2)) * jnp.abs(a)
    if example.scope == "flat":
        return terms[0], example.clipping.factors(norms[0])
    names = tuple(f"layer {r + 1}" for r in range(terms.shape[0]))
    return LayerwiseKernel(names, terms), example.clipping.factors(norms)


def _asymmetry(example: Counterexample | State) -> float:
    operator = spectrum.clipped_operator(*_operator_at(example))
    return float(jnp.linalg.norm(operator - operator.T) / jnp.linalg.norm(operator))


def _not_symmetric(example: Counterexample | State) -> Cell:
    value = _asymmetry(example)
    return Cell(
        COLUMNS[0],
        paper=False,
        guaranteed=False,
        evidence=f"asymmetry over norm at a state of {len(example.outputs)} samples",
        value=value,
        holds=value > 1e-3,
        example=example,
    )


def _indefinite(example: Counterexample | State) -> Cell:
    value = float(spectrum.symmetric_eigenvalues(*_operator_at(example))[0])
    return Cell(
        COLUMNS[1],
        paper=False,
        guaranteed=False,
        evidence="least eigenvalue of the symmetric part at a state of "
        f"{len(example.outputs)} samples",
        value=value,
        holds=value < -1e-3,
        example=example,
    )


def _small_flat(key: jax.Array) -> Row:
    rule = clipping.Abadi(1.0)
    states = evidence.worst_of_states(clipping.Abadi(0.5), key)
    paths = evidence.worst_of_paths(clipping.Abadi(0.5), key)
    pair = State(((1.0, 0.9), (0.9, 1.0)), (1.0, 100.0), 1.0)
    circling = evidence.circling_network()
    never_settles = circling.highest - circling.lowest > 1 and circling.least_eigenvalue > 1e-4
    rise = counterexamples.find_smallest_rise(rule, key=key)
    many = f"worst of {evidence.N_STATES} random states"
    ways = f"worst of {evidence.N_TRAJECTORIES} trajectories under frozen kernels"
    cells = (
        _not_symmetric(pair),
        _indefinite(pair),
        Cell(
            COLUMNS[2],
            paper=True,
            guaranteed=True,
            evidence=f"least eigenvalue over norm, {many}",
            value=states.eigenvalue,
            holds=states.eigenvalue > 0,
        ),
        Cell(
            COLUMNS[3],
            paper=False,
            guaranteed=False,
            evidence="difference between highest and lowest loss, for ever, of a network of four "
            "weights and three samples that goes around; its kernel moves, with eigenvalues of at "
            f"least {circling.least_eigenvalue:.1g}",
            value=circling.highest - circling.lowest,
            holds=never_settles,
            added="With a frozen kernel and a convex loss it does converge, for any number of "
            f"outputs: the distance in the inverse kernel's norm falls ({ways}: the loss changes "
            f"by {paths.last_change:.1g} of its initial value in the last quarter).",
            added_holds=paths.last_change <= _ZERO,
        ),
        Cell(
            COLUMNS[4],
            paper=False,
            guaranteed=False,
            evidence="dL/dt at a state found by search"
            + ("" if rise is None else f", {len(rise.outputs)} samples"),
            value=math.nan if rise is None else rise.measured["loss_rate"],
            holds=rise is not None and rise.holds() and rise.measured["loss_rate"] > 0,
            added="Two samples cannot make the loss rise under any rule with s w(s) "
            "non-decreasing; three are needed, and three is what the search finds.",
            added_holds=rise is not None and len(rise.outputs) == 3,
            example=rise,
        ),
        Cell(
            COLUMNS[5],
            paper=True,
            guaranteed=True,
            evidence=f"final over initial loss, {ways} (the paper: if it converges)",
            value=paths.final_loss,
            holds=paths.final_loss <= _ZERO,
        ),
    )
    return Row("small R, flat", "H C", cells)


def _small_layerwise(key: jax.Array) -> Row:
    rule = clipping.Abadi(1.0, scope="layerwise")
    divergent = counterexamples.find_divergent(rule, key=key)
    stuck = counterexamples.find_stuck(rule, key=key)
    rise = counterexamples.find_smallest_rise(rule, key=key)
    if divergent is None or stuck is None or rise is None:
        missing = [
            name
            for name, example in (("divergence", divergent), ("stuck", stuck), ("rise", rise))
            if example is None
        ]
        raise RuntimeError(
            f"the search found no example of {', '.join(missing)} with layerwise clipping for this "
            "key; pass another key"
        )
    least = float(jnp.real(spectrum.eigenvalues(*_operator_at(stuck)))[0])
    scale = float(jnp.linalg.norm(stuck.terms))
    cells = (
        _not_symmetric(divergent),
        _indefinite(rise),
        Cell(
            COLUMNS[2],
            paper=False,
            guaranteed=False,
            evidence=f"least real part of an eigenvalue at a state of {len(stuck.outputs)} "
            "samples, where training is stuck",
            value=least,
            holds=least <= 1e-6 * scale,
            example=stuck,
        ),
        Cell(
            COLUMNS[3],
            paper=False,
            guaranteed=False,
            evidence=f"growth of the loss, {len(divergent.outputs)} samples, every layer's kernel "
            "positive definite",
            value=divergent.measured["loss_growth"],
            holds=divergent.holds(),
            added="Frozen kernels are enough for this, unlike with flat clipping.",
            example=divergent,
        ),
        Cell(
            COLUMNS[4],
            paper=False,
            guaranteed=False,
            evidence=f"dL/dt at a state found by search, {len(rise.outputs)} samples",
            value=rise.measured["loss_rate"],
            holds=rise.holds() and rise.measured["loss_rate"] > 0,
            added="Two samples cannot make the loss rise layerwise either.",
            added_holds=len(rise.outputs) == 3,
            example=rise,
        ),
        Cell(
            COLUMNS[5],
            paper=False,
            guaranteed=False,
            evidence=f"loss at which {len(stuck.outputs)} samples stay though the kernel is "
            "positive definite",
            value=stuck.measured["loss"],
            holds=stuck.holds(),
            added="Every layer's kernel is singular here, and must be: if one of them is positive "
            "definite, training stops at zero gradient only.",
            added_holds=all(
                float(decompositions.eigvalsh(term)[0]) < 1e-9 * scale for term in stuck.terms
            ),
            example=stuck,
        ),
    )
    return Row("small R, layerwise", "sum_r H_r C_r", cells)


def _nothing_screened(name: str, matrix: str, scope: Scope, key: jax.Array) -> Row:
    """The global rule while no sample is above its cut; the paper has three of the columns."""
    rule = clipping.Global(R=5e5, Z=1e6, scope=scope)
    row = _all_hold(f"{name}, nothing screened", matrix, (rule,), key, stated=3)
    screened = counterexamples.find_smallest_rise(clipping.Global(1.0, scope=scope), key=key)
    monotone = row.cells[4]
    can_rise = screened is not None and screened.holds()
    changed = Cell(
        monotone.column,
        monotone.paper,
        monotone.guaranteed,
        monotone.evidence,
        monotone.value,
        monotone.holds,
        added="Once samples are screened, the loss can rise with as few as two samples"
        + ("." if screened is None else f": dL/dt = {screened.measured['loss_rate']:.3g}."),
        added_holds=can_rise and screened is not None and len(screened.outputs) == 2,
        example=screened,
    )
    return Row(row.clipping, row.matrix, (*row.cells[:4], changed, row.cells[5]))
