"""The auxiliary loss over experts (GShard 2006.16668, Switch 2101.03961), and what published constants mean here.

Ours is ``coef * E * sum_e f_e P_e`` per layer, with shares ``f`` that sum to one: ``coef`` under perfect balance.
Others print other factors. Ours gives their loss when ``coef`` is their constant times

* 1 for Switch (``E sum f P``, first choice), DeepSeekMoE, V2 and V3 (``f`` carries E / A), MegaBlocks, Megatron, Tutel;
* 1 / E^2 for GShard's ``(1/E) sum_e (c_e / S) m_e``, first choice. Lingvo and Mesh-TensorFlow multiply that by E^2:
  their 0.01 is our 0.01;
* A / E^2 for MiniMax-01's ``(1/E) sum_e f_e m_e``, whose f are fractions of tokens and sum to A;
* A for transformers' ``E sum f P`` over the A slots; divided by the number of layers, which it pools into one loss.

The tests compare each with its formula.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from sextant.axes.routing.balance.share import ShareLoss, marks_TE
from sextant.axes.routing.base import Routing, best


class Auxiliary(ShareLoss):
    """Balance loss over experts.

    ``counts`` says what f counts: the copies ``chosen``; the ``first`` choice alone (GShard, Switch); or the A best of
    the probabilities, whatever bias and groups made of them (``unbiased``, DeepSeek-V3 equation 18).
    """

    kind: Literal["auxiliary"] = "auxiliary"
    counts: Literal["chosen", "first", "unbiased"] = "chosen"

    def sent_TE(self, routing: Routing) -> Tensor:
        experts_TA, sent_TA = routing.experts_TA, routing.sent_TA
        if self.counts == "first":
            experts_TA, sent_TA = experts_TA[:, :1], None if sent_TA is None else sent_TA[:, :1]
        if self.counts == "unbiased":
            experts_TA, sent_TA = best(routing.probs_TE, experts_TA.shape[1]), None
        return marks_TE(experts_TA, sent_TA, routing.probs_TE.shape[1])
