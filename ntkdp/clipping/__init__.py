r"""Per-sample clipping: rules that map gradient norms to factors.

The **rule** is the factor :math:`C = w(s)` as a function of a norm :math:`s`; the **scope** says
which norm: with ``"flat"`` one over all parameters, with ``"layerwise"`` one for each parameter
group (a layer, or a group that the user names). A rule never sees a gradient, so one object serves
the kernel flow and the discrete run.

===============  ==============================  ===========  ====================================
rule             factor w(s)                     sensitivity  source
===============  ==============================  ===========  ====================================
`NoClipping`     1                               unbounded
`Abadi`          min(1, R/s)                     R            Abadi et al. 2016
`Global`         1[s <= R]; (R/Z) 1[s <= Z]      R            Bu et al. 2023 (v3)
`Automatic`      R/(s + gamma)                   R            Bu et al. 2206.07136
`PSAC`           R / (s + r/(s + r))             R            2212.00328
`Batch`          min(1, R/||sum_i g_i||), one    unbounded    Bu et al. 2023, Table 1
`Custom`         any w with s w(s) <= R          R
===============  ==============================  ===========  ====================================

Layerwise, the sensitivity is :math:`\sqrt{\sum_r R_r^2}`.

Edge cases are treated alike by every rule. A norm of **zero** gives the limit of w at zero (1 for
`NoClipping`, `Abadi` and `Batch`, R/Z or 1 for `Global`, R/gamma for `Automatic`, or 0 if gamma is
0, R for `PSAC`). An **infinite** norm gives 0, except for `NoClipping`. A **NaN** norm gives NaN,
so that trouble is seen. (:mod:`ntkdp.dp_sgd` drops samples whose gradient norm is not finite.)
A factor beyond the range of the norms' dtype becomes the largest number of that dtype.

With `Adaptive` the clipping norm of a rule moves during a run. Where ``clip_norm`` is taken, it is
set for each step beforehand. Either way the rule moves with it, :math:`w(s R_0/R)`.
"""

from ntkdp.clipping._adaptive import Adaptive
from ntkdp.clipping._adaptive import check_adaptive as check_adaptive
from ntkdp.clipping._moving import MovingNorm as MovingNorm
from ntkdp.clipping._names import class_of, from_name, name_of, names
from ntkdp.clipping._rescaled import rescaled as rescaled
from ntkdp.clipping._rule import SCOPES, ClippingRule, clip_fraction, norms_from_squares
from ntkdp.clipping._rule import Scope as Scope
from ntkdp.clipping._rules import PSAC, Abadi, Automatic, Batch, Custom, Global, NoClipping
from ntkdp.clipping._scheduled import Scheduled as Scheduled
from ntkdp.clipping._scheduled import moving_norm as moving_norm

__all__ = [
    "PSAC",
    "SCOPES",
    "Abadi",
    "Adaptive",
    "Automatic",
    "Batch",
    "ClippingRule",
    "Custom",
    "Global",
    "NoClipping",
    "class_of",
    "clip_fraction",
    "from_name",
    "name_of",
    "names",
    "norms_from_squares",
]
