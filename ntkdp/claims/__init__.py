"""The claims of the theory, each a check that can fail.

A claim has a statement, its assumptions, a source and an experiment that goes through the public
interface alone, predictions and runs, and gives measured numbers next to the expected ones.

Sources: *paper*, Bu, Wang, Dai, Long, "On the Convergence and Calibration of Deep Learning with
Differential Privacy" (TMLR 2023); *derived*, worked out for this project; others by name.
"""

from ntkdp.claims._claim import Claim, Finding, Verdict
from ntkdp.claims._registry import get, names, verify

__all__ = ["Claim", "Finding", "Verdict", "get", "names", "verify"]
