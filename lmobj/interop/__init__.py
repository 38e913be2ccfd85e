"""Hugging Face safetensors <-> lmobj parameters, both ways, one file per family. PyTorch is not needed."""

from __future__ import annotations

from lmobj.interop import bert, gpt2
from lmobj.interop._files import Checkpoint

__all__ = ["Checkpoint", "bert", "gpt2"]
