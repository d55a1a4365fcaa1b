"""Pictures of what privacy costs, looked at as numbers."""

from typing import Any

import numpy as np
import pytest

from ntkdp import plotting, privacy

DELTA = 1e-5
S = np.array([[1.0, 0.2, 0.4, 0.4]])


def test_histograms_have_every_sample_and_the_promise() -> None:
    costs = privacy.individual(S, noise_multiplier=1.0)
    epsilon, promised = costs.epsilon(DELTA), privacy.epsilon(1.0, 1.0, 1, DELTA)
    ax = plotting.individual_epsilon(costs, DELTA, ["a", "b", "b", "b"], bars=10)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["a (1)", "b (3)"]
    for row, own, patch in zip((1, 0), (epsilon[:1], epsilon[1:]), ax.patches, strict=True):
        values, edges, _ = patch.get_data()  # type: ignore[attr-defined]
        counts, _ = np.histogram(own, edges)
        np.testing.assert_allclose((values - row) / 0.82, counts / counts.max(), atol=1e-12)
        assert counts.sum() == len(own)
    means = np.array([line.get_xdata() for line in ax.lines if line.get_marker() == "o"])[:, 0]
    np.testing.assert_allclose(means, [epsilon[0], epsilon[1:].mean()])
    assert ax.lines[-1].get_xdata()[0] == pytest.approx(promised)  # type: ignore[index]
    one = plotting.individual_epsilon(costs, DELTA)
    assert one.get_yticklabels()[0].get_text() == "all samples (4)"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"labels": [0, 1]}, r"labels must have shape \(4,\)"),
        ({"names": ["a", "b"]}, "names must have one for each of the 1 subgroups"),
        ({"bars": 0}, "bars must be"),
    ],
)
def test_bad_input(more: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plotting.individual_epsilon(privacy.individual(S, noise_multiplier=1.0), DELTA, **more)
