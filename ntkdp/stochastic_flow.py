r"""Prediction of noisy training under a frozen kernel: ensembles of runs.

A step of DP-SGD moves the outputs of a model that is linear in its parameters by

.. math:: f^+ = f - \frac{\eta}{n q} \sum_{i \in batch} \sum_r H_r(\cdot, i)\, C_{ir} a_i
          + \frac{\eta \sigma S}{n q}\, J z, \qquad J z \sim N(0, H),

with the batch drawn by Poisson sampling at rate q, and without the n with ``reduction="sum"``. So
whole runs can be drawn from the kernel alone, hundreds in one batched product, and their law is
that of real runs, clipping included, as far as the kernel stays what it is.
"""

from ntkdp._ensemble import ensemble

__all__ = ["ensemble"]
