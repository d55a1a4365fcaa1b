"""What a sweep advises, in sentences."""

from ntkdp.sweep._report import metrics
from ntkdp.sweep._run import Results

#: What advice costs, which no epsilon counts.
WARNING = (
    "The prediction looks at the data, and no epsilon here counts that: predict from public data "
    "that are like the private ones, or pay for looking (see ntkdp.advisor)."
)


def advice_in_words(results: Results) -> list[str]:
    """A sentence or two for each map: where to train, what to expect, and what it costs to look.

    Parameters
    ----------
    results : Results
        From :func:`run`, observed or predicted alone.

    Returns
    -------
    list of str
        One for each map, by the objective of the configuration, then a warning.

    Examples
    --------
    >>> import ntkdp
    >>> ntkdp.enable_x64()
    >>> config = ntkdp.sweep.config(
    ...     data={"n_train": 16, "n_test": 8}, model={"widths": []}, training={"steps": 4},
    ...     grid={"learning_rates": [0.1, 1.0], "clip_norms": [0.1, 1.0], "epsilons": [],
    ...           "noise_multipliers": [0.0]}, observe=False)
    >>> words = ntkdp.sweep.advice_in_words(ntkdp.sweep.run(config))
    >>> words[0].startswith("flat abadi, no noise: train at learning rate ")
    True
    """
    objective = f"test_{results.config.objective}"
    words = []
    for plane, entry in zip(results.planes, metrics(results)["planes"], strict=True):
        advised = entry["advice"].get(objective) or entry["advice"]["test_loss"]
        if "message" in advised:
            words.append(f"{plane.label}: {advised['message']}.")
            continue
        predicted = advised["predicted"]
        expected = [f"a test loss of {predicted['test_loss']:.3g}"]
        if predicted["test_accuracy"] is not None:
            expected.insert(0, f"a test accuracy of {predicted['test_accuracy']:.1%}")
        sentence = (
            f"{plane.label}: train at learning rate {advised['learning_rate']:g} with clipping "
            f"norm {advised['clip_norm']:g} for {results.config.training.steps} steps, and expect "
            f"{' and '.join(expected)}."
        )
        if advised["at_the_edge"]:
            ends = " and the ".join(advised["at_the_edge"])
            sentence += f" The cell has the {ends} of the grid: there may be a better one beyond."
        words.append(sentence)
    return [*words, WARNING]
