"""`generate` and `fill`: options to settings, and results to lines."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lmobj.data import Tokenizer
from lmobj.errors import UserError
from lmobj.evaluate import (
    BeamConfig,
    Continuation,
    DecodingConfig,
    Filling,
    Infilling,
    SamplingConfig,
    UnmaskingConfig,
    text_statistics,
)
from lmobj.objectives import MaskedDiffusion

__all__ = ["print_continuations", "print_fillings", "print_infilling", "print_statistics", "settings"]

_STATISTICS = {
    "distinct_1": "distinct tokens / tokens",
    "distinct_2": "distinct pairs / pairs",
    "distinct_3": "distinct triples / triples",
    "repeated_4": "repeated 4-grams / 4-grams",
    "longest_repeat": "longest repeated run of tokens",
}
_METHODS = {
    SamplingConfig: "drawing without --beam",
    BeamConfig: "a search with --beam",
    UnmaskingConfig: "unmasking by a run of masked_diffusion",
}
"""How messages speak of them."""
_FLAGS = {"max_new_tokens": "tokens", "num_samples": "samples", "num_beams": "beam", "block_length": "block"}
"""Options that have other names than the settings."""


def settings(objective: Any, options: Mapping[str, Any]) -> DecodingConfig | UnmaskingConfig:
    """Unmasking for a run of masked diffusion; else beam search where a number of beams is given, else sampling.

    Args:
      objective: of the run, as its config has it.
      options: settings by name; those that were not given are None, and keep their defaults.

    Raises:
      UserError: an option of another method, or a value out of range.
    """
    given = {name: value for name, value in options.items() if value is not None}
    fields = {method: {field.name for field in dataclasses.fields(method)} for method in _METHODS}
    method: type[Any] = BeamConfig if "num_beams" in given else SamplingConfig
    if isinstance(objective, MaskedDiffusion):
        method = UnmaskingConfig
    for name, value in given.items():
        if name not in fields[method]:
            accepted = " or ".join(_METHODS[one] for one in _METHODS if name in fields[one])
            raise UserError(
                f"--{_FLAGS.get(name, name).replace('_', '-')} is {value}, which is no setting of {_METHODS[method]}; "
                f"accepted: {accepted}."
            )
    chosen: DecodingConfig | UnmaskingConfig = method(**given)
    return chosen


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


def print_infilling(found: Infilling) -> None:
    """The text with its middle filled in, then the middle alone with its log-probability in nats."""
    print(found.text)
    print("\nmiddle" if found.ended else f"\nmiddle, cut after {len(found.log_probs)} tokens")
    print(f"{sum(map(float, found.log_probs)):8.3f}  {found.middle!r}")
