"""What a causal model writes under several ways to decode, side by side, and beside text that people wrote.

Greedy texts repeat themselves and are too probable, freely drawn ones wander off; what one compares with is not the
best value of a figure but that of real text (Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration").
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmobj.data import Tokenizer
from lmobj.errors import UserError
from lmobj.evaluate._beam_search import BeamConfig
from lmobj.evaluate._cached import check_counts
from lmobj.evaluate._decoding import DecodingConfig
from lmobj.evaluate._likelihood import ScoredText
from lmobj.evaluate._sampling import SamplingConfig
from lmobj.evaluate._text import Continuation, continue_text
from lmobj.evaluate._text_statistics import distinct_share, repeated_share, self_bleu
from lmobj.models import CachedModel

__all__ = ["GenerationConfig", "TextFigures", "compare_decodings", "passages", "text_figures"]

_MOST_NATS = 700.0
"""exp of more is no number."""


def _decodings() -> dict[str, DecodingConfig]:
    return {
        "greedy": SamplingConfig(temperature=0.0),
        "beam 4": BeamConfig(num_beams=4),
        "top-p 0.9": SamplingConfig(top_p=0.9),
        "temperature 1": SamplingConfig(),
    }


@dataclass(frozen=True)
class GenerationConfig:
    """Texts to write once the model is trained, and how to decode them."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    prompts: tuple[str, ...] = ()
    """Texts to continue; empty: those of `sample`."""
    samples: int = 4
    """Texts per prompt, at least 1; of decodings without chance (greedy, beams) one."""
    max_tokens: int = 64
    """Most tokens of a text, at least 1."""
    decodings: dict[str, DecodingConfig] = field(default_factory=_decodings)
    """Ways to decode by a name of your choice; `max_new_tokens` and `num_samples` are those of this section."""

    def __post_init__(self) -> None:
        for name in ("samples", "max_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"generation.{name} is {getattr(self, name)}; accepted: at least 1.")
        check_counts(self, "samples", "max_tokens")
        if not self.decodings:
            raise UserError(
                "generation.decodings is empty; accepted: named ways to decode, such as {greedy: {name: sampling, "
                "temperature: 0.0}}."
            )
        for name, decoding in self.decodings.items():
            for key, ours in (("max_new_tokens", "max_tokens"), ("num_samples", "samples")):
                if getattr(decoding, key) != getattr(type(decoding)(), key):
                    raise UserError(
                        f"generation.decodings.{name}.{key} is {getattr(decoding, key)}; accepted: generation.{ours}, "
                        "which is that of all, so that they can be compared."
                    )

    def settings(self, name: str) -> DecodingConfig:
        """How the texts under this name are decoded."""
        decoding = self.decodings[name]
        chance = isinstance(decoding, SamplingConfig) and decoding.temperature > 0
        return dataclasses.replace(decoding, max_new_tokens=self.max_tokens, num_samples=self.samples if chance else 1)


class TextFigures(NamedTuple):
    """Figures of texts, over their tokens with the one that ends each. Shares are in [0, 1]."""

    perplexity: float
    """exp of the mean -ln p of the tokens under the model itself, whatever the decoding made of its probabilities."""
    distinct_1: float
    """Distinct tokens over all tokens; see `distinct_share`."""
    distinct_2: float
    """The same for pairs of neighbours."""
    distinct_3: float
    """The same for triples."""
    repeated_4: float
    """Share of 4-grams of a text that were in it before; see `repeated_share`."""
    self_bleu: float | None
    """How alike the texts are; see `self_bleu`. None where there is but one prompt."""
    tokens: float
    """Mean tokens of a text."""


def text_figures(sets: Sequence[Sequence[ArrayLike]], log_probs: Iterable[ArrayLike]) -> TextFigures:
    """Figures of texts in sets, each with one text for each prompt.

    Distinct shares and self-BLEU depend on how many texts are looked at together, and some decodings write one text for
    a prompt where others write many. So both are of a set, which has as many for all, and averaged over the sets.

    Args:
      sets: texts as one-dimensional arrays of token ids, at least one, none empty.
      log_probs: ln p of the tokens of each text, in any order, in nats.
    """
    texts = [text for one in sets for text in one]
    nats = np.concatenate([np.asarray(values, np.float64) for values in log_probs])
    distinct = [float(np.mean([distinct_share(one, n) for one in sets])) for n in (1, 2, 3)]
    return TextFigures(
        perplexity=math.exp(min(-float(nats.mean()), _MOST_NATS)),
        distinct_1=distinct[0],
        distinct_2=distinct[1],
        distinct_3=distinct[2],
        repeated_4=repeated_share(texts, 4),
        self_bleu=float(np.mean([self_bleu(one) for one in sets])) if len(sets[0]) > 1 else None,
        tokens=float(np.mean([len(np.asarray(text)) for text in texts])),
    )


def compare_decodings(
    model: CachedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    config: GenerationConfig,
    *,
    suffix: tuple[int, ...] = (),
) -> dict[str, tuple[list[list[Continuation]], TextFigures]]:
    """What each of `config.decodings` writes after the prompts, [prompt][sample], and its figures.

    Args:
      model, tokenizer, suffix: as for `continue_text`.
      prompts: at least one; those of `config` are not read here.
      config: how to decode.

    Raises:
      UserError: as for `continue_text`.
    """
    found = {}
    for name in config.decodings:
        written = continue_text(model, tokenizer, prompts, config.settings(name), suffix=suffix)
        sets = [[one.tokens for one in texts] for texts in zip(*written, strict=True)]
        found[name] = (written, text_figures(sets, (one.log_probs for texts in written for one in texts)))
    return found


def passages(
    documents: Iterable[NDArray[np.integer]], count: int, *, read: int, length: int, seed: int = 0
) -> list[ScoredText]:
    """Passages of documents to set beside generated texts: `read` tokens, and up to `length` that follow them.

    They do not overlap. Fewer than `length` tokens follow only where a document ends before it has as many, as a text
    that is generated may end.

    Args:
      documents: token ids, with what ends each.
      count: of passages, at most; they are drawn at random.
      read, length: tokens, at least 1.
      seed: of the draw.
    """
    every = list(_windows(documents, read, length))
    drawn = np.random.default_rng(seed).permutation(len(every))[:count]
    return [ScoredText(every[i].astype(np.int32), read) for i in sorted(drawn)]


def _windows(documents: Iterable[NDArray[np.integer]], read: int, length: int) -> Iterator[NDArray[np.integer]]:
    for document in documents:
        if read < len(document) < read + length:
            yield document
        for start in range(0, len(document) - read - length + 1, read + length):
            yield document[start : start + read + length]
