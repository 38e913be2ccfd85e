"""Prompts that ask for one of several answers: examples of a task, then a text, in words of one's own.

a gripping film . It was great.
dull from the start . It was bad.
i laughed twice . It was
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lmobj.errors import UserError

__all__ = ["AnsweredText", "PromptTemplate"]

_FIELD = re.compile(r"(\{text\}|\{pair\}|\{answer\})")


class AnsweredText(NamedTuple):
    """One example of a task: a text, perhaps a second one, and the words of its answer."""

    text: str
    pair: str | None
    answer: str


@dataclass(frozen=True)
class PromptTemplate:
    """How instruction, examples and query become a prompt: [instruction] shot ... shot query, a separator between them.

    template: a shot, with {text} once, perhaps {pair} once, and {answer} once after both; nothing else in it is
      special. The query is the template up to {answer}, without spaces at its end, since word pieces carry the space
      before them.
    separator: stands between the parts.
    instruction: stands before all; empty: none.
    """

    template: str
    separator: str = "\n"
    instruction: str = ""

    def __post_init__(self) -> None:
        found = _FIELD.findall(self.template)
        if sorted(found) not in (["{answer}", "{text}"], ["{answer}", "{pair}", "{text}"]) or found[-1] != "{answer}":
            raise UserError(
                f"template is {self.template!r}; accepted: a text with {{text}} once, {{pair}} at most once, and "
                "{answer} once after them."
            )

    @property
    def has_pair(self) -> bool:
        """Whether a second text has a place in it."""
        return "{pair}" in _FIELD.findall(self.template)

    def prompt(self, shots: Sequence[AnsweredText], text: str, pair: str | None = None) -> str:
        """What an answer follows."""
        told = [self._before(shot.text, shot.pair) + shot.answer + self._after for shot in shots]
        query = self._before(text, pair).rstrip(" ")
        return self.separator.join([*([self.instruction] if self.instruction else []), *told, query])

    def completion(self, answer: str) -> str:
        """An answer as it follows the prompt: the spaces before it, and the rest of the template after it.

        What comes after it is part of it, so that no answer wins by being the beginning of another.
        """
        before = self.template.partition("{answer}")[0]
        return before[len(before.rstrip(" ")) :] + answer + self._after

    def _before(self, text: str, pair: str | None) -> str:
        values = {"{text}": text, "{pair}": pair or ""}
        return "".join(values.get(part, part) for part in _FIELD.split(self.template.partition("{answer}")[0]))

    @property
    def _after(self) -> str:
        return self.template.partition("{answer}")[2]
