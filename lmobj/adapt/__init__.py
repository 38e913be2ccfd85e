"""Parameter-efficient fine-tuning: model -> model, one file per method.

model = adapt.apply(model, adapt.LoRA(rank=8), nnx.Rngs(params=key))
graph, params = nnx.split(model)
trained, frozen = adapt.split(nnx.to_pure_dict(params), adapt.trainable(model))
...                                                   gradient, optimizer and checkpoint of `trained` alone
model = nnx.merge(graph, adapt.join(trained, frozen))
model = adapt.merge(model)                            the original classes, adapters folded in
"""

from __future__ import annotations

from lmobj.adapt._adalora import AdaLoRA, Allocation, allocate, init_allocation, orthogonality, rank_budget
from lmobj.adapt._apply import Adapter, apply, merge
from lmobj.adapt._bitfit import BitFit
from lmobj.adapt._bottleneck import Houlsby, Pfeiffer
from lmobj.adapt._dora import DoRA
from lmobj.adapt._freeze import Freeze
from lmobj.adapt._ia3 import IA3
from lmobj.adapt._lora import LoRA
from lmobj.adapt._marks import join, split, trainable
from lmobj.adapt._prefix import Prefix
from lmobj.adapt._prompt import Prompt

AdapterConfig = AdaLoRA | BitFit | DoRA | Freeze | Houlsby | IA3 | LoRA | Pfeiffer | Prefix | Prompt
"""Every method's settings, told apart by `name`."""

__all__ = [
    "IA3",
    "AdaLoRA",
    "Adapter",
    "AdapterConfig",
    "Allocation",
    "BitFit",
    "DoRA",
    "Freeze",
    "Houlsby",
    "LoRA",
    "Pfeiffer",
    "Prefix",
    "Prompt",
    "allocate",
    "apply",
    "init_allocation",
    "join",
    "merge",
    "orthogonality",
    "rank_budget",
    "split",
    "trainable",
]
