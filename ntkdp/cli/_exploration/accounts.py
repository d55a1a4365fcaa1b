"""Noise multipliers of the budgets that sliders stand at, each found once and quickly.

With sampling, a guess is tried out by the accountant: a noise multiplier is taken if what it spends
is the budget or a little less, never more. The guess is that of the central limit theorem, times
the ratio by which the last one was off. Even so a sampled budget takes as long as a prediction, so
that those next to a place are looked for while the sliders rest.
"""

import math
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

from ntkdp import privacy

#: What is spent of a budget, at least, and where a guess aims.
_LEAST, _AIM = 0.97, 0.988
_TRIALS = 8
#: Epsilon falls about like this power of the noise multiplier, and at least and at most like these.
_POWER, _LEAST_POWER, _MOST_POWER = 1.3, 0.3, 20.0
#: The longest step of the logarithm of a guess.
_LONGEST = 1.0
#: In place of an epsilon of zero.
_TINY = 1e-12


class Spending(NamedTuple):
    """What a budget is spent on."""

    epsilon: float
    steps: int
    sample_rate: float


class Accounts:
    """The noise that a budget buys, with full batches or Poisson sampling."""

    def __init__(self, delta: float) -> None:
        self.delta = delta
        self._found: dict[Spending, float] = {}
        self._looked_at: set[Spending] = set()
        self._ratio = 1.05

    def noise_multiplier(self, spending: Spending) -> float:
        """A sigma that spends a budget on so many steps, or hardly less than that."""
        if spending not in self._found:
            budget = privacy.Budget(spending.epsilon, self.delta)
            if spending.sample_rate == 1:
                self._found[spending] = budget.noise_multiplier(spending.steps)
            else:
                self._found[spending] = self._tried(budget, spending)
        return self._found[spending]

    def next_of(self, near: Iterable[Spending]) -> Spending | None:
        """The first of these that was not looked at, if any."""
        return next((one for one in near if one not in self._looked_at), None)

    def look_at(self, spending: Spending) -> None:
        """Find a noise multiplier before it is asked for, if there is one."""
        self._looked_at.add(spending)
        with suppress(ValueError):
            self.noise_multiplier(spending)

    def _tried(self, budget: privacy.Budget, spending: Spending) -> float:
        epsilon, steps, sample_rate = spending
        of_limit = privacy.Budget(mu=budget.mu).noise_multiplier(steps, sample_rate)
        guess, power = of_limit * self._ratio, _POWER
        before: tuple[float, float] | None = None
        for _ in range(_TRIALS):
            spent = privacy.epsilon(guess, sample_rate, steps, self.delta)
            if _LEAST * epsilon <= spent <= epsilon:
                self._ratio = guess / of_limit
                return guess
            here = math.log(guess), math.log(max(spent, _TINY) / (_AIM * epsilon))
            if before is not None and here[0] != before[0]:
                slope = (here[1] - before[1]) / (here[0] - before[0])
                power = min(max(-slope, _LEAST_POWER), _MOST_POWER)
            guess *= math.exp(min(max(here[1] / power, -_LONGEST), _LONGEST))
            before = here
        return budget.noise_multiplier(steps, sample_rate)
