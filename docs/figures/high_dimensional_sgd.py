"""The figure and the tables of docs/high_dimensional_sgd.md: the best clipping norm under noise.

`make figures` runs this file, which draws docs/images/high_dimensional_sgd.png and prints the
tables: about two minutes on two cores.
"""

from pathlib import Path

import equinox as eqx
import jax
import numpy as np

import ntkdp
from ntkdp.high_dimensional_sgd import HighDimensionalSGD, risk_by_clip_norm, simulate, solve

DIMENSION, SAMPLES, RUNS = 200, 2000, 100
#: Of the residual; the clipping norm is this times the square root of the dimension.
THRESHOLDS = np.geomspace(0.03, 10.0, 101)
SIMULATED = np.array([0.05, 0.1, 0.25, 0.45, 0.75, 1.5, 3.0, 6.0])
NOISE_MULTIPLIERS = (0.0, 0.02, 0.06, 0.2)


def problem(threshold: float, noise_multiplier: float, label_noise: float) -> HighDimensionalSGD:
    """Isotropic data, initial risk 1, learning rate 3, a tenth as many dimensions as samples."""
    return HighDimensionalSGD(
        eigenvalues=np.ones(DIMENSION),
        initial=np.full(DIMENSION, 1 / DIMENSION),
        clip_norm=threshold * DIMENSION**0.5,
        learning_rate=3.0,
        n_samples=SAMPLES,
        noise_multiplier=noise_multiplier,
        label_noise=label_noise,
    )


def runs(of: HighDimensionalSGD, record_every: int = SAMPLES) -> np.ndarray:
    """Risk of simulated runs at the recorded steps of one pass, the start left out."""
    keys = jax.random.split(jax.random.key(0), RUNS)
    return np.asarray(simulate(of, steps=SAMPLES, record_every=record_every, key=keys).risk)[:, 1:]


def check_table() -> list[str]:
    """The risk of one setting over time, by the equation and by runs."""
    setting = problem(0.5, (0.2 / (0.25 * DIMENSION)) ** 0.5, 0.3)  # noise of variance 0.2
    times = np.array([0.25, 0.5, 0.75, 1.0])
    predicted = solve(setting, times).risk
    spread = ntkdp.comparison.band(runs(setting, SAMPLES // 4))
    rows = ["| t | equation | simulated |", "|---|---|---|"]
    for t, risk, mean, error in zip(
        times, predicted, spread.mean, spread.standard_error, strict=True
    ):
        rows.append(f"| {t:g} | {risk:.3f} | {mean:.4f} ± {error:.4f} |")
    return rows


def best_row(noise_multiplier: float) -> str:
    """The threshold of least final risk by the equation, that risk, and the share clipped then."""
    setting = problem(1.0, noise_multiplier, 1.0)
    risk = np.asarray(risk_by_clip_norm(setting, THRESHOLDS * DIMENSION**0.5))
    threshold = float(THRESHOLDS[np.argmin(risk)])
    setting = problem(threshold, noise_multiplier, 1.0)
    clipped = setting.clip_fraction(solve(setting, [0.0, 1.0]).modes[-1])
    return f"| {noise_multiplier:g} | {threshold:.2f} | {np.min(risk):.3f} | {clipped:.0%} |"


def best_table() -> list[str]:
    """The best threshold for each noise multiplier."""
    heads = ["| sigma | best c | final risk | clipped at the end |", "|---|---|---|---|"]
    return heads + [best_row(noise_multiplier) for noise_multiplier in NOISE_MULTIPLIERS]


def final_risks(noise_multiplier: float) -> tuple[np.ndarray, np.ndarray]:
    """Final risk at THRESHOLDS by the equation, and of runs at SIMULATED."""
    setting = problem(1.0, noise_multiplier, 1.0)
    predicted = np.asarray(risk_by_clip_norm(setting, THRESHOLDS * DIMENSION**0.5))
    clipped = [eqx.tree_at(lambda p: p.clip_norm, setting, c * DIMENSION**0.5) for c in SIMULATED]
    return predicted, np.concatenate([runs(each) for each in clipped], axis=1)


def risk_table(risks: dict[float, tuple[np.ndarray, np.ndarray]]) -> list[str]:
    """Equation and runs next to each other at the simulated thresholds."""
    heads = [f"sigma = {noise:g} | simulated" for noise in risks]
    rows = [f"| c | {' | '.join(heads)} |", "|---" * (1 + 2 * len(risks)) + "|"]
    predicted = {
        noise: risk_by_clip_norm(problem(1.0, noise, 1.0), SIMULATED * DIMENSION**0.5)
        for noise in risks
    }
    for k, threshold in enumerate(SIMULATED):
        cells = [f"{threshold:g}"]
        for noise, (_, observed) in risks.items():
            spread = ntkdp.comparison.band(observed)
            cells.append(f"{predicted[noise][k]:.3f}")
            cells.append(f"{spread.mean[k]:.3f} ± {spread.standard_error[k]:.3f}")
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def main() -> None:
    """Draw the figure and print the tables."""
    ntkdp.enable_x64()
    risks = {noise: final_risks(noise) for noise in NOISE_MULTIPLIERS}
    ax = ntkdp.plotting.clipping_norm_curve(
        THRESHOLDS,
        {f"σ = {noise:g}": predicted for noise, (predicted, _) in risks.items()},
        {f"σ = {noise:g}": observed for noise, (_, observed) in risks.items()},
        observed_clip_norms=SIMULATED,
        xlabel=r"clipping threshold of the residual $c = R\,/\sqrt{\mathrm{tr}\,\Lambda}$",
        ylabel="excess risk after one pass",
    )
    ax.set_ylim(0.1, 30.0)
    path = Path(__file__).parent.parent / "images" / "high_dimensional_sgd.png"
    ntkdp.plotting.save(ax, path)
    for table in (check_table(), best_table(), risk_table(risks)):
        print("\n".join(table), end="\n\n")


if __name__ == "__main__":
    main()
