"""What a reader asks first: what was run, which prediction to trust, and what to beware of."""

import math

import jax.numpy as jnp

from ntkdp import privacy
from ntkdp._results import setup as setups
from ntkdp.batches import Full, Poisson
from ntkdp.experiment._config import Config
from ntkdp.experiment._of_outputs.by_group import delta_of
from ntkdp.experiment._predictions import LABELS
from ntkdp.experiment._run import Case, Prediction, Results

#: Errors, as shares of the fall of the loss: one that nobody would trust, and one that is as good
#: as the best.
_TOO_LARGE, _NEGLIGIBLE = 0.1, 0.01
#: Below this a number of runs in the band is no chance.
_UNLIKELY = 0.01
_REASONS = {
    "exact": "it follows the weights of the network itself",
    "frozen": "the kernel at the start is enough here",
    "infinite": "this network is near its infinite width",
    "recursion": "it takes the steps of the run, and the kernel at the start is enough here",
    "response": "it follows the network itself, and how it responds to the noise",
}
_NEEDS_STILL_KERNEL = (
    " A frozen kernel needs a small v(T), and features that training does not move: see "
    "ntkdp.diagnose."
)


def facts(results: Results) -> list[tuple[str, str]]:
    """What was run, as names and values."""
    config, training = results.config, results.config.training
    steps = [case.clipping.steps or training.steps for case in results.cases]
    found = []
    if training.noisy:
        delta = delta_of(training.delta, config.data.n_train - config.public.rows)
        found.append(("epsilon", f"{_range(_epsilons(results, delta))} at delta = {delta:.3g}"))
        found.append(("sigma", _range([case.noise_multiplier for case in results.cases])))
        found.append(("noise", training.noise.kind.replace("_", " ")))
    else:
        found.append(("privacy", "none: the runs add no noise"))
    found.append(("batches", _batches(config)))
    found.append(("steps", _range(steps)))
    found.append(("learning rate", _range([case.learning_rate for case in results.cases])))
    found.append(("optimizer", _optimizer(config)))
    n_runs = results.cases[0].run.loss.size // results.cases[0].run.times.size
    runs = f"{n_runs} {'recorded' if are_recorded(results) else 'trained'}"
    if training.is_random:
        runs += f", {training.n_predicted} predicted"
    found.append(("runs", runs))
    found.append(("seed", str(config.seed)))
    return found


def _optimizer(config: Config) -> str:
    training = config.training
    words = ["Adam" if training.optimizer == "adam" else "SGD"]
    if training.momentum:
        kind = "Nesterov momentum" if training.nesterov else "momentum"
        words.append(f"{kind} {training.momentum:g}")
    if training.weight_decay:
        words.append(f"weight decay {training.weight_decay:g}")
    if training.average is not None:
        words.append(f"average {training.average:g}")
    if training.correct_noise:
        words.append("noise corrected")
    return ", ".join(words)


def _batches(config: Config) -> str:
    batches = config.training.as_batches
    if isinstance(batches, Full):
        return "full"
    if isinstance(batches, Poisson):
        return f"Poisson sampling, q = {config.training.sample_rate:g}"
    return setups.batches_in_words(batches)


def _epsilons(results: Results, delta: float) -> list[float]:
    """Epsilon of each case: that of the budget, or what its noise spends."""
    training = results.config.training
    if training.epsilon is not None:
        return [training.epsilon]
    n_private = results.config.data.n_train - results.config.public.rows
    found = []
    for case in results.cases:
        steps = case.clipping.steps or training.steps
        # Noise that is optimal under a kernel is scaled to cost as much as independent noise.
        is_scaled = training.noise.kind == "kernel_optimal"
        noise = None if is_scaled else training.as_noise(steps)
        found.append(
            privacy.spent(
                case.noise_multiplier, steps, delta,
                batches=training.as_batches, noise=noise, n_samples=n_private,
            )
        )  # fmt: skip
    return found


def _range(values: list[float] | list[int]) -> str:
    """One number, or the smallest and the largest."""
    ends = [f"{value:.4g}" if math.isfinite(value) else "not known" for value in sorted(values)]
    return ends[0] if ends[0] == ends[-1] else f"{ends[0]} to {ends[-1]}"


def verdict(results: Results) -> list[str]:
    """Sentences that say of each case which prediction to trust, and why."""
    return [_verdict_of(case) for case in results.cases]


def _verdict_of(case: Case) -> str:
    errors = {name: _error(prediction) for name, prediction in case.predictions.items()}
    # One that leaves the noise out may be near the mean, but has no band.
    whole = [name for name in errors if not case.predictions[name].comparison.neglected]
    best = min(whole or errors, key=lambda name: errors[name])
    if not errors[best] <= _TOO_LARGE:
        return (
            f"{case.title}: trust no prediction. The best, {_named(best)}, is off by "
            f"{_percent(errors[best])} of the most that the loss moves. ntkdp.diagnose says what "
            "moves the kernel."
        )
    chosen = case.predictions[best]
    words = [
        f"{case.title}: trust {_named(best)}, because {_REASONS[best]}.",
        f"Its loss is off by at most {_percent(errors[best])} of the most that the loss moves"
        f"{_in_band(chosen)}{_accuracy(case, chosen)}.",
    ]
    others = {
        name: error
        for name, error in errors.items()
        if name != best and error > max(3 * errors[best], _NEGLIGIBLE)
    }
    if others:
        far = _listed([f"{_named(name)} by {_percent(error)}" for name, error in others.items()])
        words.append(f"Further off: {far}.")
    return " ".join(words)


def _error(prediction: Prediction) -> float:
    """The error as a share of the fall of the loss; infinite if it is not known."""
    error = prediction.comparison.error_of_fall
    return error if error is not None and math.isfinite(error) else math.inf


def _named(name: str) -> str:
    label = LABELS[name]
    return label if name == "infinite" else f"the {label}"


def _in_band(prediction: Prediction) -> str:
    """How many of the runs end in the predicted band."""
    covered = prediction.comparison.band_coverage
    if covered is None:
        return ""
    count = round(float(covered.share[-1]) * covered.n_runs)
    words = f", and {count} of {covered.n_runs} runs end in its {covered.level:.0%} band"
    p_value = float(covered.p_value[-1])
    if p_value < _UNLIKELY:
        words += f", which is no chance (p = {p_value:.2g})"
    return words


def _accuracy(case: Case, prediction: Prediction) -> str:
    """The accuracies at the end, of test samples if there are any."""
    for name, samples in (("test_accuracy", "test "), ("accuracy", "")):
        ours, theirs = getattr(prediction.trajectory, name), getattr(case.run, name)
        if ours is not None and theirs is not None:
            predicted, observed = (float(jnp.mean(part[..., -1])) for part in (ours, theirs))
            return f"; {samples}accuracy {predicted:.1%} predicted, {observed:.1%} observed"
    return ""


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _percent(share: float) -> str:
    return f"{share:.1%}" if math.isfinite(share) else "more than can be said"


def warnings(results: Results) -> list[str]:
    """What went wrong, and what a reader must know to read the numbers."""
    found = []
    if are_recorded(results):
        found.append(
            "The runs were recorded elsewhere. Their learning rate and steps are those of the "
            "configuration; a log does not say what else they were made with."
        )
    for case in results.cases:
        if not case.run.successful:
            found.append(f"{case.clipping.label}, run: {case.run.message}")
        for name, prediction in case.predictions.items():
            if not prediction.trajectory.successful:
                message = prediction.trajectory.message
                found.append(f"{case.clipping.label}, {LABELS[name]}: {message}")
    if results.config.training.noisy:
        moved = ", ".join(
            f"{'unknown' if case.weight_noise is None else format(case.weight_noise, '.3g')} "
            f"({case.clipping.label})"
            for case in results.cases
        )
        found.append(
            "What is promised of privacy is for data sets that differ in one sample: "
            f"{neighbours(results)}."
        )
        found.append(
            f"Noise adds v(T) times the weights' own variance by the end: {moved}."
            + ("" if results.config.model.is_linear else _NEEDS_STILL_KERNEL)
        )
    if any(
        prediction.trajectory.test_loss is None
        for case in results.cases
        for prediction in case.predictions.values()
    ):
        found.append(
            "The noisy kernel recursion leaves out the test points, whose noise would be drawn "
            "with that of the training points: too many outputs."
        )
    for neglected in ("noise", "sampling"):
        without = {
            LABELS[name]: None
            for case in results.cases
            for name, prediction in case.predictions.items()
            if neglected in prediction.comparison.neglected
        }
        if without:
            found.append(f"Without the {neglected}: {', '.join(without)}.")
    return found


def are_recorded(results: Results) -> bool:
    """Whether the runs were recorded elsewhere, and not trained here."""
    return all(case.run_seconds is None for case in results.cases)


def neighbours(results: Results) -> str | None:
    """What neighbouring data sets differ in; None without noise, which promises nothing."""
    training = results.config.training
    return privacy.neighbours(training.as_batches) if training.noisy else None
