"""How tokenizers spell the pieces that stand for no text, by the names that `Vocabulary` has for them."""

from __future__ import annotations

__all__ = ["DENOISER_MARKS", "INFILLING_MARKS", "SPELLINGS", "sentinel"]

SPELLINGS = {
    "cls": ("[CLS]", "<cls>"),
    "sep": ("[SEP]", "<sep>"),
    "mask": ("[MASK]", "<mask>"),
    "nlu": ("[NLU]",),
    "s2s": ("[S2S]",),
    "nlg": ("[NLG]",),
    "fim_prefix": ("<fim_prefix>", "<fim-prefix>", "<|fim_prefix|>"),
    "fim_suffix": ("<fim_suffix>", "<fim-suffix>", "<|fim_suffix|>"),
    "fim_middle": ("<fim_middle>", "<fim-middle>", "<|fim_middle|>"),
}
"""The first is that of the models trained here, the others are met in the wild."""
DENOISER_MARKS = ("nlu", "s2s", "nlg")
"""Which denoiser a row is for (UL2)."""
INFILLING_MARKS = ("fim_prefix", "fim_suffix", "fim_middle")
"""What the parts of a document are whose middle is at its end."""


def sentinel(index: int) -> str:
    """The piece that stands for span `index` of a corrupted row (T5)."""
    return f"<extra_id_{index}>"
