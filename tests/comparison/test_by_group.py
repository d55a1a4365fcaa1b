"""Losses and accuracies by subgroup, against means by hand."""

from typing import Any

import numpy as np
import pytest
from helpers import SOFTMAX, SQUARED

from ntkdp import comparison

LABELS = np.array(["b", "a", "b", "b"])
OUTPUTS = np.random.default_rng(0).standard_normal((2, 3, 4, 2))
CLASSES = np.array([0, 1, 1, 0])


def test_means_by_hand() -> None:
    found = comparison.by_group(OUTPUTS, CLASSES, SOFTMAX, LABELS)
    assert isinstance(found, comparison.GroupMetrics)
    assert found.labels.tolist() == ["a", "b"]
    assert found.counts.tolist() == [1, 3]
    logs = OUTPUTS - np.log(np.exp(OUTPUTS).sum(-1, keepdims=True))
    losses = -np.take_along_axis(logs, np.broadcast_to(CLASSES[:, None], (2, 3, 4, 1)), -1)[..., 0]
    right = OUTPUTS.argmax(-1) == CLASSES
    for group, name in enumerate("ab"):
        np.testing.assert_allclose(
            found.loss[..., group], losses[..., name == LABELS].mean(-1), rtol=1e-12
        )
        assert found.accuracy is not None
        np.testing.assert_allclose(
            found.accuracy[..., group], right[..., name == LABELS].mean(-1), rtol=1e-12
        )
    assert comparison.by_group(OUTPUTS[0, 0], OUTPUTS[0, 1], SQUARED, LABELS).accuracy is None


def test_errors_are_of_means_over_seeds_after_the_start() -> None:
    found = comparison.by_group(OUTPUTS, CLASSES, SOFTMAX, LABELS)
    other = found._replace(loss=found.loss[0] * np.array([[3.0], [1.0], [1.5]]))
    expected = np.abs(found.loss.mean(0) / other.loss - 1)[1:].max(axis=0)
    np.testing.assert_allclose(found.errors(other), expected, rtol=1e-12)
    with pytest.raises(ValueError, match="observed must have the subgroups"):
        found.errors(found._replace(labels=np.array(["a", "c"])))
    with pytest.raises(ValueError, match="observed must have the times"):
        found.errors(found._replace(loss=found.loss[:, :2]))


@pytest.mark.parametrize(
    ("labels", "targets", "words"),
    [(["a"], CLASSES, r"labels must have shape \(4,\)"), (LABELS, CLASSES[:2], "targets must")],
)
def test_bad_input(labels: Any, targets: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        comparison.by_group(OUTPUTS, targets, SOFTMAX, labels)
    with pytest.raises(ValueError, match="outputs must have shape"):
        comparison.by_group(OUTPUTS[0, 0, 0], CLASSES, SOFTMAX, LABELS)
