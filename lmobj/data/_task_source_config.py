"""Settings of where the examples of tasks come from that are more than texts with a label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from lmobj.batch import Layout
from lmobj.data._source_config import check_choice, check_files
from lmobj.errors import UserError

__all__ = [
    "TASK_SOURCES",
    "Answers",
    "ChoiceFiles",
    "ConllFiles",
    "RelationFiles",
    "RetrievalFiles",
    "SquadFiles",
    "TagScheme",
    "TaggedSubwords",
    "TaskSource",
]

TagScheme = Literal["bio", "iob1", "bioes", "bmes"]
"""How tags write entities: see `lmobj.tasks.decode_tags`."""

TaggedSubwords = Literal["first", "all"]
"""Which subwords of a word have a tag."""

Answers = Literal["english", "chinese"]
"""How answers are normalised before they are compared."""


@dataclass(frozen=True)
class ConllFiles:
    """Sentences of words, or characters, that have tags."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    layout: ClassVar[Layout] = "tagged"
    holds: ClassVar[str] = "sentences of tagged words"

    name: Literal["conll"] = "conll"
    """Selects this source."""
    files: tuple[str, ...] = ()
    """Paths, glob patterns (`**` crosses folders) or fsspec URLs; each must match at least one file."""
    lines: Literal["words", "sentences"] = "words"
    """What stands on a line: `words`: a word and its tag, in columns, with blank lines between sentences; `sentences`:
    all words with spaces between, a tab, and their tags with spaces between."""
    word_column: int = 0
    """Of lines of words: the word's column, counted from 0, or from the end below 0."""
    tag_column: int = -1
    """Of lines of words: the tag's column, counted likewise."""
    separator: str | None = None
    """Of lines of words: what is between columns; absent: any number of spaces and tabs."""
    comment: str | None = None
    """Of lines of words: those that begin so between sentences are none of them; absent: there are no comments."""
    scheme: TagScheme = "bio"
    """How the tags write entities: IOB2, IOB1 (B- only between neighbours), BIOES or BMES."""
    space: str = " "
    """What stands between words in text; empty for Chinese characters."""
    subwords: TaggedSubwords = "first"
    """Which of a word's subwords are tagged: the first (BERT), or all."""
    errors: Literal["strict", "skip"] = "strict"
    """Sentences whose tags are not what the scheme writes: `strict` stops and names the first, `skip` leaves them out
    and counts them."""

    def __post_init__(self) -> None:
        check_files(self.files)
        check_choice("data.source.lines", self.lines, ("words", "sentences"))
        check_choice("data.source.scheme", self.scheme, ("bio", "iob1", "bioes", "bmes"))
        check_choice("data.source.subwords", self.subwords, ("first", "all"))
        check_choice("data.source.errors", self.errors, ("strict", "skip"))
        if self.word_column == self.tag_column:
            raise UserError(
                f"data.source.word_column and tag_column are both {self.tag_column}; accepted: two columns."
            )


@dataclass(frozen=True)
class SquadFiles:
    """Questions with answers cut out of a context, in the JSON of SQuAD 1.1 and 2.0, XQuAD, MLQA and CMRC 2018."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    layout: ClassVar[Layout] = "questions"
    holds: ClassVar[str] = "questions with answers in their contexts"

    name: Literal["squad"] = "squad"
    """Selects this source."""
    files: tuple[str, ...] = ()
    """Paths, glob patterns (`**` crosses folders) or fsspec URLs; each must match at least one file."""
    stride: int = 128
    """Tokens of the context from one window to the next, where it does not fit into `data.length`; at least 1."""
    max_question: int = 64
    """Most tokens of a question; at least 1."""
    max_answer: int = 30
    """Most tokens of an answer that is looked for; at least 1."""
    null_threshold: float | None = None
    """Questions stay unanswered where the score of no answer is more than this above the best span's (SQuAD 2.0);
    absent: all are answered."""
    normalise: Answers = "english"
    """How answers are compared: `english` as SQuAD does, without case, punctuation and articles; `chinese` character
    by character."""
    errors: Literal["strict", "skip"] = "strict"
    """Answers that do not stand where they are said to: `strict` stops and names the first, `skip` drops them, and
    questions that have no other, and counts these."""

    def __post_init__(self) -> None:
        check_files(self.files)
        for key in ("stride", "max_question", "max_answer"):
            if getattr(self, key) < 1:
                raise UserError(f"data.source.{key} is {getattr(self, key)}; accepted: 1 or more tokens.")
        check_choice("data.source.normalise", self.normalise, ("english", "chinese"))
        check_choice("data.source.errors", self.errors, ("strict", "skip"))
        if self.null_threshold is not None and self.null_threshold != self.null_threshold:
            raise UserError(f"data.source.null_threshold is {self.null_threshold}; accepted: a number, or null.")


@dataclass(frozen=True)
class ChoiceFiles:
    """Contexts with choices of which one is right, in JSON Lines: {context, choices, label}, as SWAG and RACE have it.

    The label is the place of the right choice, counted from 0.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    layout: ClassVar[Layout] = "choices"
    holds: ClassVar[str] = "contexts with choices"

    name: Literal["choices"] = "choices"
    """Selects this source."""
    files: tuple[str, ...] = ()
    """Paths, glob patterns (`**` crosses folders) or fsspec URLs; each must match at least one file."""
    context: str = "context"
    """Key of the text that all choices go on."""
    choices: str = "choices"
    """Key of the list of choices, two or more."""
    label: str = "label"
    """Key of the place of the right choice."""

    def __post_init__(self) -> None:
        check_files(self.files)


@dataclass(frozen=True)
class RelationFiles:
    """Texts with two entities and the relation between them, in JSON Lines: {text, head, tail, label}.

    Head and tail are [start, end] in characters from 0, the end being the one after the last; the label is a name.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    layout: ClassVar[Layout] = "relations"
    holds: ClassVar[str] = "relations between two entities of a text"

    name: Literal["relations"] = "relations"
    """Selects this source."""
    files: tuple[str, ...] = ()
    """Paths, glob patterns (`**` crosses folders) or fsspec URLs; each must match at least one file."""
    no_relation: str | None = None
    """The label that says that there is no relation, which micro and macro F1 leave out (TACRED, SemEval); absent:
    there is none."""
    head_markers: tuple[str, str] = ("[E1]", "[/E1]")
    """What is put before and after the head."""
    tail_markers: tuple[str, str] = ("[E2]", "[/E2]")
    """What is put before and after the tail."""

    def __post_init__(self) -> None:
        check_files(self.files)
        for key in ("head_markers", "tail_markers"):
            if not getattr(self, key)[0].strip():
                raise UserError(
                    f"data.source.{key} is {list(getattr(self, key))}; accepted: an opening that is no blank."
                )


@dataclass(frozen=True)
class RetrievalFiles:
    """Queries, each with a text that belongs to it and perhaps some that do not (hard negatives).

    A query with several texts stands in as many rows. Splits by share keep all rows of a text together, so that texts
    that are held out are in no row of training but as hard negatives; in evaluation the texts of a split are searched,
    its hard negatives included.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    layout: ClassVar[Layout] = "texts"
    holds: ClassVar[str] = "queries and texts that belong to them"

    name: Literal["retrieval"] = "retrieval"
    """Selects this source."""
    files: tuple[str, ...] = ()
    """Paths, glob patterns (`**` crosses folders) or fsspec URLs; each must match at least one file."""
    lines: Literal["jsonl", "tsv"] = "jsonl"
    """What stands on a line: a JSON object, or cells with a separator between."""
    columns: tuple[str, ...] | None = None
    """Of tsv: names of the columns, of files that do not have them in their first line; absent: they are there."""
    separator: str = "\t"
    """Of tsv: the character between two cells."""
    query: str = "query"
    """Column that holds the query."""
    positive: str = "positive"
    """Column that holds the text that belongs to it."""
    negatives: str = "negatives"
    """Column that holds texts that do not belong to it: in JSON one or a list, in a cell one. Rows may lack it; of each
    the first so many are read that the objective asks for."""
    max_query: int = 32
    """Most tokens of a query, without special ones; at least 1. The other texts have equal shares of the rest of
    `data.length`."""
    errors: Literal["strict", "skip"] = "strict"
    """Rows without query and text: `strict` stops and names the first, `skip` leaves them out and counts them."""

    def __post_init__(self) -> None:
        check_files(self.files)
        check_choice("data.source.lines", self.lines, ("jsonl", "tsv"))
        check_choice("data.source.errors", self.errors, ("strict", "skip"))
        if self.max_query < 1:
            raise UserError(f"data.source.max_query is {self.max_query}; accepted: 1 or more tokens.")
        names = (self.query, self.positive, self.negatives)
        if len(set(names)) < len(names):
            raise UserError(
                f"data.source.query, positive and negatives are {', '.join(map(repr, names))}; accepted: three columns."
            )
        if len(self.separator) != 1 or self.separator in "\r\n":
            raise UserError(f"data.source.separator is {self.separator!r}; accepted: one character, a tab say.")
        if self.columns is not None:
            if self.lines != "tsv":
                raise UserError(
                    f"data.source.columns is {list(self.columns)}, and data.source.lines is 'jsonl', whose objects "
                    "name their own; accepted: data.source.lines=tsv, or no columns."
                )
            missing = [name for name in names[:2] if name not in self.columns]
            if missing or len(set(self.columns)) < len(self.columns):
                raise UserError(
                    f"data.source.columns is {list(self.columns)}; accepted: names, each once, {self.query!r} and "
                    f"{self.positive!r} among them."
                )


TaskSource = ConllFiles | SquadFiles | ChoiceFiles | RelationFiles | RetrievalFiles

TASK_SOURCES: dict[Layout, type[TaskSource]] = {kind.layout: kind for kind in get_args(TaskSource)}
"""Each by the rows that it has."""
