"""The command ``ntkdp privacy``: epsilon of a noise multiplier, or the noise for an epsilon."""

import math
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from ntkdp._results.plain_json import as_text
from ntkdp.cli._terminal import fail

if TYPE_CHECKING:
    from ntkdp.batches import Batches
    from ntkdp.privacy import PrivacyReport


class Sampling(StrEnum):
    """How batches are drawn."""

    poisson = "poisson"
    fixed_size = "fixed_size"


class Accountant(StrEnum):
    """Methods of accounting that give a guarantee."""

    pld = "pld"
    rdp = "rdp"


def privacy(
    noise_multiplier: Annotated[
        float | None,
        typer.Option(
            "--noise-multiplier", "--sigma", help="Gives its epsilon.", show_default=False
        ),
    ] = None,
    epsilon: Annotated[
        float | None,
        typer.Option(help="Budget; gives the noise multiplier that keeps it.", show_default=False),
    ] = None,
    mu: Annotated[
        float | None,
        typer.Option(
            help="Budget of Gaussian privacy; gives the noise multiplier that spends it: exactly "
            "with full batches, otherwise by the central limit theorem, which is no guarantee.",
            show_default=False,
        ),
    ] = None,
    n: Annotated[int | None, typer.Option(help="Training samples.", show_default=False)] = None,
    batch: Annotated[
        int | None,
        typer.Option(help="Batch size, expected or fixed; needs --n.", show_default=False),
    ] = None,
    sample_rate: Annotated[
        float | None,
        typer.Option(help="In place of --batch; 1 for full batches.", show_default=False),
    ] = None,
    sampling: Annotated[
        Sampling,
        typer.Option(
            help="poisson: each sample is drawn on its own, and neighbours differ by adding or "
            "removing one; fixed_size: neighbours differ by replacing one."
        ),
    ] = Sampling.poisson,
    steps: Annotated[int | None, typer.Option(help="Steps of DP-SGD.", show_default=False)] = None,
    epochs: Annotated[
        float | None, typer.Option(help="In place of --steps, rounded up.", show_default=False)
    ] = None,
    delta: Annotated[
        float | None,
        typer.Option(
            help="In (0, 1); by default the smaller of 1e-5 and 1/(10 n).", show_default=False
        ),
    ] = None,
    accountant: Annotated[
        Accountant, typer.Option(help="The method that keeps the budget of --epsilon.")
    ] = Accountant.pld,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON in place of a table.")
    ] = False,
) -> None:
    """Epsilon of DP-SGD by PLD, RDP and the central limit theorem, which is no guarantee.

    Neighbours differ by one sample: added or removed with full batches and Poisson sampling,
    replaced with batches of a fixed size. Epsilon does not depend on the clipping norm, the rule or
    the groups.
    """
    from ntkdp import privacy as accounting
    from ntkdp.batches import resolve

    try:
        rate = _rate(n, batch, sample_rate)
        made = _fixed(batch) if sampling is Sampling.fixed_size else resolve(None, rate)
        count = _steps(steps, epochs, rate)
        chosen = _default_delta(n) if delta is None else delta
        spent = {"--noise-multiplier": noise_multiplier, "--epsilon": epsilon, "--mu": mu}
        if sum(value is not None for value in spent.values()) != 1:
            raise ValueError(f"give one of {', '.join(spent)}")
        if noise_multiplier is None:
            promised = None if epsilon is None else chosen
            budget = accounting.Budget(epsilon, promised, mu=mu, accountant=accountant.value)
            noise_multiplier = budget.noise_multiplier(count, batches=made, n_samples=n)
        report = accounting.report(noise_multiplier, rate, count, chosen, sampling=sampling.value)
    except (ValueError, TypeError, MemoryError) as error:
        fail(error)
    note = "the default, the smaller of 1e-5 and 1/(10 n)" if delta is None else "as asked"
    if as_json:
        print(as_text(report.as_dict() | {"delta_note": note}))
        return
    _print_table(report)
    if delta is None:
        print(f"delta = {chosen:.4g} is {note}: --delta sets another")


def _default_delta(n: int | None) -> float:
    """Below 1/n, which lets whole samples be released, and no larger than is usual."""
    if n is None:
        raise ValueError("give --delta, or --n for the smaller of 1e-5 and 1/(10 n)")
    return min(1e-5, 1 / (10 * n))


def _rate(n: int | None, batch: int | None, sample_rate: float | None) -> float:
    for name, value in (("--n", n), ("--batch", batch)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if (batch is None) == (sample_rate is None):
        raise ValueError("give either --batch, with --n, or --sample-rate")
    if sample_rate is not None:
        if not 0 < sample_rate <= 1:
            raise ValueError(f"--sample-rate must be in (0, 1], got {sample_rate}")
        return sample_rate
    if n is None or batch is None:
        raise ValueError("--batch needs --n, the number of training samples")
    if batch > n:
        raise ValueError(f"--batch must not exceed --n = {n}, got {batch}")
    return batch / n


def _fixed(batch: int | None) -> "Batches":
    from ntkdp.batches import FixedSize

    if batch is None:
        raise ValueError("--sampling fixed_size needs --batch, with --n")
    return FixedSize(batch)


def _steps(steps: int | None, epochs: float | None, rate: float) -> int:
    if (steps is None) == (epochs is None):
        raise ValueError("give either --steps or --epochs")
    if steps is not None:
        return steps
    if epochs is None or not 0 < epochs < math.inf:
        raise ValueError(f"--epochs must be positive and finite, got {epochs}")
    count = epochs / rate
    if count == math.inf:
        raise ValueError(f"--epochs is too large for a sampling rate of {rate}, got {epochs}")
    # Rounding errors must not add a step to a whole number of them.
    return max(1, math.ceil(count * (1 - 1e-12)))


def _print_table(report: "PrivacyReport") -> None:
    from rich.table import Table

    from ntkdp._results.console import add_row, literal, open_console

    console = open_console()
    table = Table(title=literal(report.setting, "table.title"), title_justify="left")
    table.add_column("method")
    table.add_column("epsilon", justify="right")
    table.add_column("worth")
    for method, epsilon, worth in report.rows():
        add_row(table, method, f"{epsilon:.4g}", worth)
    console.print(table)
