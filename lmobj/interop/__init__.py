"""Hugging Face safetensors <-> lmobj parameters, both ways, one file per family, and one for PEFT's adapters.
PyTorch is not needed."""

from __future__ import annotations

from lmobj.interop import albert, bart, bert, electra, gpt2, peft, roberta, t5, xlnet
from lmobj.interop._files import Checkpoint

__all__ = ["Checkpoint", "albert", "bart", "bert", "electra", "gpt2", "peft", "roberta", "t5", "xlnet"]
