"""Few-shot prompting: a task told by examples in the prompt, with no training (Brown et al. 2020, section 2).

    Translate English to French:
    sea otter => loutre de mer
    cheese =>

The pieces of a prompt are put together here as text; what the model writes is cut where an answer ends.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from lmobj.data import Tokenizer
from lmobj.errors import UserError
from lmobj.evaluate._decoding import DecodingConfig
from lmobj.evaluate._text import Continuation, continue_text
from lmobj.evaluate._unmasking import UnmaskingConfig
from lmobj.models import CachedModel, LanguageModel

__all__ = ["Answers", "FewShot", "Shot", "answer_queries", "choose_shots"]

Example = TypeVar("Example")


class Shot(NamedTuple):
    """One example: what is given and what is to be answered."""

    input: str
    output: str


class Answers(NamedTuple):
    """What a model answers to queries."""

    texts: list[list[Continuation]]
    """For every query the samples or beams, each cut where its answer ends."""
    asked: list[int]
    """Examples that each query was to have."""
    shown: list[int]
    """Those of them that fit into its prompt."""


@dataclass(frozen=True)
class FewShot:
    """How instruction, examples and query become a prompt: [instruction] shot ... shot query, a separator between them.

    template: a shot, with {input} once and {output} once after it; nothing else in it is special. The query is the
      template up to {output}, without spaces at its end, since word pieces carry the space before them.
    separator: stands between the parts.
    instruction: stands before all; empty: none.
    """

    template: str = "{input} => {output}"
    separator: str = "\n"
    instruction: str = ""

    def __post_init__(self) -> None:
        if re.findall(r"\{input\}|\{output\}", self.template) != ["{input}", "{output}"]:
            raise UserError(
                f"the template is {self.template!r}; accepted: a text with {{input}} once and {{output}} once after it."
            )
        if not self.separator:
            raise UserError("the separator is empty; accepted: a text that no answer has in it, such as a line break.")

    @property
    def stop(self) -> str:
        """What ends an answer: the template's text after {output}, or where it has none the separator."""
        return self._parts[2] or self.separator

    def query(self, text: str) -> str:
        """The last part of the prompt, which the answer follows."""
        before, between, _ = self._parts
        return (before + text + between).rstrip(" ")

    def prompt(self, shots: Sequence[Shot], text: str) -> str:
        """The whole prompt.

        Raises:
          UserError: an example's output holds `stop`, so that no answer could look like it.
        """
        before, between, after = self._parts
        for shot in shots:
            if self.stop in shot.output:
                raise UserError(
                    f"the output {shot.output!r} of an example has {self.stop!r} in it, at which an answer ends; "
                    "accepted: another separator or template."
                )
        told = [before + shot.input + between + shot.output + after for shot in shots]
        return self.separator.join([*([self.instruction] if self.instruction else []), *told, self.query(text)])

    def fit(self, shots: Sequence[Shot], text: str, room: int | None, count: Callable[[str], int]) -> tuple[str, int]:
        """The prompt with as many of the shots as fit, those farthest from the query left out first.

        Args:
          shots: the examples, in order.
          text: the query's input.
          room: most tokens of the prompt; None: any number.
          count: tokens of a text.

        Returns:
          The prompt, and the number of shots in it.

        Raises:
          UserError: not even the query by itself fits.
        """

        def fits(left_out: int) -> bool:
            return room is None or count(self.prompt(shots[left_out:], text)) <= room

        left_out = bisect.bisect_left(range(len(shots) + 1), True, key=fits)
        if left_out > len(shots):
            raise UserError(
                f"the query {text!r} takes {count(self.prompt((), text))} tokens without any example, and the model "
                f"has room for {max(room or 0, 0)} beside those it is to write; accepted: shorter texts, or fewer new "
                "tokens."
            )
        return self.prompt(shots[left_out:], text), len(shots) - left_out

    def answer(self, continuation: Continuation, tokenizer: Tokenizer) -> Continuation:
        """What was written up to `stop`, with the tokens up to the one that completes it."""
        text, found, _ = continuation.text.partition(self.stop)
        if not found:
            return continuation

        def holds_stop(count: int) -> bool:
            return self.stop in tokenizer.decode(continuation.tokens[:count])

        end = bisect.bisect_left(range(len(continuation.tokens) + 1), True, key=holds_stop)
        return Continuation(text, continuation.tokens[:end], continuation.log_probs[:end])

    @property
    def _parts(self) -> tuple[str, str, str]:
        """The template's text before, between and after its two fields."""
        before, _, rest = self.template.partition("{input}")
        between, _, after = rest.partition("{output}")
        return before, between, after


def choose_shots(examples: Sequence[Example], shots: int | None, *, seed: int, query: int) -> list[Example]:
    """All examples in order, or `shots` of them drawn without replacement for this query.

    Args:
      examples: to choose from.
      shots: how many, at most as many as there are; None: all.
      seed, query: the draw of each query is its own and does not depend on the number of queries.

    Raises:
      UserError: there are fewer.
    """
    if shots is None:
        return list(examples)
    if not 0 <= shots <= len(examples):
        raise UserError(f"the number of shots is {shots}, and there are {len(examples)} examples; accepted: 0 to that.")
    order = np.random.default_rng([seed % 2**64, query]).permutation(len(examples))
    return [examples[i] for i in order[:shots]]


def answer_queries(
    model: CachedModel | LanguageModel,
    tokenizer: Tokenizer,
    task: FewShot,
    examples: Sequence[Shot],
    queries: Sequence[str],
    settings: DecodingConfig | UnmaskingConfig,
    *,
    shots: int | None = None,
) -> Answers:
    """Answers each query after the examples of its task.

    Args:
      model: as for `continue_text`; its `config.max_length`, if it has one, bounds the prompt and the new tokens
        together.
      tokenizer: the model's.
      task: how prompts are made.
      examples: of the task.
      queries: inputs to answer.
      settings: how to decode; the seed of sampling also draws the examples.
      shots: examples for each query, drawn anew for each; None: all, in order.

    Raises:
      UserError: too few examples, a query that does not fit, or a model that cannot generate.
    """
    context = getattr(getattr(model, "config", None), "max_length", None)
    room = None if context is None else context - settings.max_new_tokens
    if room is not None and not isinstance(settings, UnmaskingConfig):
        room += 1  # the last token is not read again
    seed = getattr(settings, "seed", 0)
    chosen = [choose_shots(examples, shots, seed=seed, query=i) for i in range(len(queries))]

    def count(text: str) -> int:
        return len(tokenizer.encode(text))

    fitted = [task.fit(some, query, room, count) for some, query in zip(chosen, queries, strict=True)]
    written = continue_text(model, tokenizer, [prompt for prompt, _ in fitted], settings)
    texts = [[task.answer(sample, tokenizer) for sample in samples] for samples in written]
    return Answers(texts, [len(some) for some in chosen], [shown for _, shown in fitted])
