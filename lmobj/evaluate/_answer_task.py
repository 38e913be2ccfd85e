"""A task told in a prompt, whose answers are ranked by how probable a model finds them.

# sentiment.yaml
source: {name: tsv, files: [dev.tsv], columns: [sentence, label], text: sentence, label: label}
template: "{text} It was {answer}."
answers: {"0": terrible, "1": great}
shots: 4
shots_source: {name: tsv, files: [train.tsv], columns: [sentence, label], text: sentence, label: label}
normalise: prior
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from lmobj.data import ChoiceFiles, JsonLines, ParquetFiles, SeparatedValues, TfdsSource
from lmobj.errors import UserError
from lmobj.evaluate._likelihood import Normalisation
from lmobj.evaluate._prompt_template import PromptTemplate

__all__ = ["AnswerSource", "AnswerTask"]

_MOST_SHOTS = 10_000


AnswerSource = JsonLines | ParquetFiles | SeparatedValues | TfdsSource | ChoiceFiles


@dataclass(frozen=True, kw_only=True)
class AnswerTask:
    """What to ask, how, and what may be answered."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    name: str = "task"
    """Name of the task and of its files in the run folder; in a file, the file's own name unless given."""
    source: AnswerSource
    """The examples to answer, told apart by `name`: records as in `data.source`, each with a label; or questions with
    choices of their own (`choices`)."""
    template: str
    """An example in words, with {text}, perhaps {pair}, and {answer} after them: "{text} It was {answer}."."""
    answers: dict[str, str] = field(default_factory=dict)
    """Each class as the source names it, and the words that stand for it; of `choices` none."""
    instruction: str = ""
    """Stands before all; empty: none."""
    separator: str = "\n"
    """Stands between instruction, examples and question."""
    shots: int = 0
    """Answered examples before each question, drawn anew for each; those that do not fit are left out."""
    shots_source: AnswerSource | None = None
    """Where they are drawn from: a source of the same kind, with other files."""
    seed: int = 0
    """Seed of the draws of examples, and of questions where there is a `limit`."""
    normalise: Normalisation = "sum"
    """What an answer is ranked by: its log-likelihood (`sum`), that by its tokens or its bytes, or less that without
    the input (`prior`)."""
    limit: int | None = None
    """Most questions to answer, drawn at random; null: all."""
    samples: int | None = None
    """Of a model of masked diffusion, which bounds likelihoods: noised copies of each answer, at least 2; null: 128."""

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or "\\" in self.name or self.name in (".", ".."):
            raise UserError(f"name is {self.name!r}; accepted: text that can name a file, without slashes.")
        if not 0 <= self.shots <= _MOST_SHOTS:
            raise UserError(f"shots is {self.shots}; accepted: 0 to {_MOST_SHOTS}.")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit is {self.limit}; accepted: at least 1, or null for all.")
        if self.samples is not None and self.samples < 2:
            raise UserError(f"samples is {self.samples}; accepted: at least 2, or null for 128.")
        if not self.separator:
            raise UserError('separator is ""; accepted: a text that stands between examples, such as a line break.')
        prompt = self.prompt
        self._check_source("source", self.source, prompt)
        if self.shots_source is not None:
            self._check_source("shots_source", self.shots_source, prompt)
        if (self.shots > 0) != (self.shots_source is not None):
            given = "null" if self.shots_source is None else self.shots_source.name
            raise UserError(
                f"shots is {self.shots} and shots_source is {given}; accepted: a source of examples for more than 0 "
                "shots, and none for 0. Examples are not taken from among the questions."
            )
        if self.normalise == "prior" and not self.shots and not prompt.prompt((), "", "").strip():
            raise UserError(
                f"normalise is prior and template is {self.template!r}, which without its input leaves nothing that an "
                "answer could follow; accepted: a template with words of its own before {answer}, or an instruction."
            )
        if self.has_own_choices and self.answers:
            raise UserError("answers are given, and the questions of choices files have their own; accepted: none.")
        if not self.has_own_choices and len(self.answers) < 2:
            raise UserError(
                f"answers has {len(self.answers)} classes; accepted: at least 2, each with its words, such as "
                "{negative: terrible, positive: great}."
            )
        words = list(self.answers.values())
        if len(set(words)) < len(words) or not all(word.strip() for word in words):
            raise UserError(f"answers has the words {words}; accepted: words for each class, no two alike.")

    @property
    def prompt(self) -> PromptTemplate:
        """How prompts are made."""
        return PromptTemplate(self.template, self.separator, self.instruction)

    @property
    def has_own_choices(self) -> bool:
        """Whether each question brings the answers to choose from."""
        return isinstance(self.source, ChoiceFiles)

    def _check_source(self, key: str, source: AnswerSource, prompt: PromptTemplate) -> None:
        if isinstance(source, ChoiceFiles) != self.has_own_choices:
            raise UserError(f"{key}.name is {source.name!r}, and source.name {self.source.name!r}; accepted: both "
                            "choices, or neither.")  # fmt: skip
        pair = None
        if not isinstance(source, ChoiceFiles):
            pair = source.pair
            if source.label is None:
                raise UserError(f"{key}.label is null; accepted: the column of the classes, to judge answers by.")
            if source.label_kind != "class":
                raise UserError(f"{key}.label_kind is {source.label_kind!r}; accepted: class.")
        if (pair is not None) != prompt.has_pair:
            shown = "null" if pair is None else repr(pair)
            raise UserError(
                f"{key}.pair is {shown} and template is {self.template!r}; accepted: a column of second texts where "
                "the template has {pair}, and none where it has not."
            )
