"""Model FLOPs: what a training step has to compute, however it is computed.

They are the operations of matrix products, a multiplication and an addition being two, forwards once and backwards
twice:

    model FLOPs of a step = 3 x sum over rows of the forward pass's
    forward pass of a decoder = L x (2 N + 4 layers x width x L / 2) + 2 P x width x vocabulary

for rows of L tokens of which P are predicted, and N weights of the layers. This is (6 N + 12 layers x width x L) tokens
of Chowdhery et al. 2022, "PaLM", appendix B, which sets the speed of training against the device's peak: model FLOPs
utilisation (MFU). What deviates from it:

- attention counts by the keys that a token may see, so that a causal mask halves it; documents packed into a row count
  as one;
- tables that are looked up are no products, and the vocabulary head counts where it runs, for masked LM on the masked
  positions;
- every family and objective says what it runs (`CountsProducts`, `Objective.use`): both of ELECTRA's models, XLNet's
  second stream and memory, an encoder and a decoder each on its own row, the experts that work on a token, shared
  layers once for each layer.

As there, recomputation counts for nothing, and so do elementwise operations. Heads that objectives put on a model's
hidden states are left out, which are small, but for those that are blocks like the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping

from lmobj.models import CountsProducts
from lmobj.train.assemble import Design

__all__ = ["FORMULA", "model_flops"]

FORMULA = (
    "MFU = model FLOPs of a step / (seconds x devices x peak FLOP/s in 16 bits); model FLOPs = 6 x weights in matrix "
    "products x the positions that meet them + 12 x layers x width x tokens x length in attention, halved where masks "
    "are causal; recomputation counts for nothing"
)
"""For a person who reads figures."""


def model_flops(design: Design) -> float:
    """Model FLOPs of one training step over all devices, as the module's docstring has them.

    A model whose settings do not say what its products take counts by 6 x trainable parameters x tokens, without
    attention.
    """
    model, length = design.builder, design.config.data.length
    if not isinstance(model, CountsProducts):
        return 6.0 * design.parameter_count * design.tokens_per_step
    use = design.objective.use(length)
    uses = use if isinstance(use, Mapping) else {"": use}
    forwards = sum(design.batch_sizes[name] * model.forward_flops(design.vocab.size, one) for name, one in uses.items())
    return 3.0 * forwards * design.objective.updates
