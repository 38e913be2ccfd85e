"""`generate` and `fill`: options to settings, and results to lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmobj.data import Tokenizer
from lmobj.errors import UserError
from lmobj.evaluate import BeamConfig, Continuation, DecodingConfig, Filling, SamplingConfig, text_statistics

__all__ = ["print_continuations", "print_fillings", "print_statistics", "settings"]

_STATISTICS = {
    "distinct_1": "distinct tokens / tokens",
    "distinct_2": "distinct pairs / pairs",
    "distinct_3": "distinct triples / triples",
    "repeated_4": "repeated 4-grams / 4-grams",
    "longest_repeat": "longest repeated run of tokens",
}


def settings(beam: Mapping[str, Any], sampling: Mapping[str, Any], common: Mapping[str, Any]) -> DecodingConfig:
    """Beam search where a number of beams is given, else sampling; options that were not given keep their defaults.

    Raises:
      UserError: options of both methods, or a value out of range.
    """
    given = [
        {name: value for name, value in options.items() if value is not None} for options in (beam, sampling, common)
    ]
    if "num_beams" in given[0]:
        if given[1]:
            option = next(iter(given[1]))
            raise UserError(
                f"--{option.replace('_', '-')} is {given[1][option]}, and --beam searches instead of drawing; "
                "accepted: one of the two."
            )
        return BeamConfig(**given[0], **given[2])
    if given[0]:
        raise UserError(f"--length-penalty is {given[0]['length_penalty']}; accepted: together with --beam only.")
    return SamplingConfig(**given[1], **given[2])


def print_continuations(
    prompts: Sequence[str], texts: Sequence[Sequence[Continuation]], tokenizer: Tokenizer, *, logprobs: bool
) -> None:
    """Each text after its prompt, an empty line between texts; with `logprobs` the tokens under it."""
    first = True
    for prompt, samples in zip(prompts, texts, strict=True):
        for sample in samples:
            print(("" if first else "\n") + prompt + sample.text)
            first = False
            if logprobs:
                print(f"\n{'ln p':>8}  token")
                for token, log_prob in zip(sample.tokens, sample.log_probs, strict=True):
                    print(f"{log_prob:8.3f}  {tokenizer.piece(int(token))}")
                print(f"{sum(map(float, sample.log_probs)):8.3f}  together")


def print_statistics(texts: Sequence[Sequence[Continuation]]) -> None:
    """How repetitive each text and how diverse all of them together are."""
    statistics = text_statistics([sample.tokens for samples in texts for sample in samples])
    print()
    for name, label in _STATISTICS.items():
        value = getattr(statistics, name)
        print(f"{label:<32}{value if isinstance(value, int) else format(value, '.3f')}")


def print_fillings(text: str, fillings: Sequence[Filling]) -> None:
    """The text with the likeliest guesses in it, then the guesses for each mask or span with their probabilities."""
    print(text)
    for number, filling in enumerate(fillings, 1):
        print(f"\n{filling.mark or f'mask {number}'}")
        for piece, probability in zip(filling.pieces, filling.probabilities, strict=True):
            print(f"{probability:8.1%}  {piece.strip() or repr(piece)}")
