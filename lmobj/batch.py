"""What flows from the data to an objective: the vocabulary's special ids, the rows it asks for, batches and row keys.

A batch is a dict of arrays with standard names, rows first:

    tokens        [B, L] int32   token ids
    segment_ids   [B, L] int32   0 = padding; 1, 2, ... = the documents packed into a row
    positions     [B, L] int32   position inside the segment, from 0
    row_ids       [B, 2] int32   (source id, example id): the address of a row's randomness
    token_types   [B, L] int32   pairs, examples, questions, choices and stream_pairs: 0 for text A, 1 for text B
                                 (stream_pairs: 2 for CLS)
    pair_labels   [B]    int32   pairs and stream_pairs: 0 = B follows A, 1 = it does not (`RowSpec.pairing`)
    backward      [B]    bool    bidirectional streams only: the row reads its text from the end
    word_starts   [B, L] bool    on request: the token begins a word of the text, in whichever direction it is read
    sentence_ends [B, L] bool    on request: the token is the last of a sentence of the text, in whichever direction it
                                 is read; special tokens are in none
    token_bytes   [B, L] int32   on request: UTF-8 bytes that the token stands for (0 for special tokens)

and on request, where examples have them:

    labels        [B]    int32   class of the example, or the place of the right choice from 0
    scores        [B]    float32 number that labels the example
    label_sets    [B, C] float32 1 for each class that the example belongs to, else 0
    tags          [B, L] int32   class of the token, NO_TAG where it has none
    spans         [B, 2] int32   positions of two tokens: the first and last of an answer, or those that open the marked
                                 entities, head and tail
    text_ids      [B, T] int32   which text each segment of the row is: equal texts of a split have equal ids
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
from jaxtyping import Array, Int, Key, UInt32

from lmobj._pieces import DENOISER_MARKS, INFILLING_MARKS, SPELLINGS
from lmobj.errors import UserError

__all__ = [
    "LABEL_FIELDS",
    "NO_TAG",
    "Batch",
    "Layout",
    "Pairing",
    "RowArray",
    "RowSpec",
    "Vocabulary",
    "dropout_seeds",
    "row_arrays",
    "row_keys",
]

Batch = dict[str, Array]
LABEL_FIELDS = ("labels", "scores", "label_sets")
"""Fields of a RowSpec that are stored with documents, one per row."""
NO_TAG = -1
"""In `tags`: a token that has none."""
Layout = Literal[
    "packed",
    "pairs",
    "stream",
    "single",
    "examples",
    "stream_pairs",
    "tagged",
    "questions",
    "choices",
    "relations",
    "texts",
]
Pairing = Literal["next_sentence", "sentence_order"]
_SPELLED = {"bos": "<s>", "eos": "</s>", **{name: spellings[0] for name, spellings in SPELLINGS.items()}}
"""Special tokens as messages write them."""


@dataclass(frozen=True)
class Vocabulary:
    """Size of the vocabulary and the ids of its special tokens (None where the vocabulary has none)."""

    size: int
    pad: int = 0
    unk: int | None = None
    bos: int | None = None
    eos: int | None = None
    cls: int | None = None
    sep: int | None = None
    mask: int | None = None
    sentinels: tuple[int, ...] = ()
    """<extra_id_0>, <extra_id_1>, ..., of which each has the id below that of the one before."""
    nlu: int | None = None
    s2s: int | None = None
    nlg: int | None = None
    """[NLU], [S2S] and [NLG], one of which opens a row for a mixture of denoisers."""
    fim_prefix: int | None = None
    fim_suffix: int | None = None
    fim_middle: int | None = None
    """What the parts of a document begin with whose middle is to be filled in."""

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Every special id that this vocabulary has, ascending."""
        return self._given(self.pad, self.unk, *self.control_ids)

    @property
    def control_ids(self) -> tuple[int, ...]:
        """Ids of tokens that stand for no text, ascending: corruption leaves them alone. An unknown word is text, and
        padding is told by segment 0, since a vocabulary without it has its id from the unknown word."""
        marks = (getattr(self, name) for name in SPELLINGS)
        return self._given(self.bos, self.eos, *marks, *self.sentinels)

    def require(self, who: str, *names: str) -> tuple[int, ...]:
        """Ids of special tokens that `who` cannot do without, by their names here. Raises UserError naming those that
        are missing."""
        missing = [f"no {_SPELLED[name]}" for name in names if getattr(self, name) is None]
        if missing:
            remedy = f"set a tokenizer with {'it' if len(names) == 1 else 'both' if len(names) == 2 else 'them'}"
            for key, marks in (("denoiser_marks", DENOISER_MARKS), ("infilling_marks", INFILLING_MARKS)):
                remedy = f"set data.tokenizer.{key} to true" if {*names} <= {*marks} else remedy
            raise UserError(
                f"{who} needs {' and '.join(_SPELLED[name] for name in names)}, and the vocabulary has "
                f"{' and '.join(missing)}; {remedy}."
            )
        return tuple(getattr(self, name) for name in names)

    def require_sentinels(self, who: str, count: int) -> int:
        """The first of the `count` sentinels that `who` cannot do without. Raises UserError if there are fewer."""
        if len(self.sentinels) < count:
            raise UserError(
                f"{who} marks up to {count} spans of a row by sentinels, and the vocabulary has {len(self.sentinels)}; "
                f"set data.tokenizer.sentinels to {count} or more."
            )
        return self.sentinels[0]

    @staticmethod
    def _given(*ids: int | None) -> tuple[int, ...]:
        return tuple(sorted({i for i in ids if i is not None}))


@dataclass(frozen=True)
class RowSpec:
    """The rows an objective reads. The data pipeline turns this into a row plan; nothing else passes between them.

    layout: `packed`: documents end to end, cut at row ends, segments told apart; `single`: one piece of one
      document per row, padded; `pairs`: two runs of sentences per row; `stream`: row b of successive batches
      continues the same text, so that a carried memory stays with its text; `examples`: one document per row, one
      text or a pair of texts, cut to fit; `stream_pairs`: a stream whose rows are `reuse` tokens of the text, then two
      stretches A and B of what follows, of which the next row's `reuse` tokens are the first (XLNet); `tagged`: one
      sentence of tagged words per row, cut to fit; `questions`: a question and a window of its context per row;
      `choices`: a context before each of at most `classes` choices per row, as segments 1, 2, ...; `relations`: a text
      with two marked entities per row, cut to a window that holds both; `texts`: a query, a text that belongs to it
      and perhaps some that do not, each a segment of its own.
    length: raw tokens in a row, special tokens included.
    prefix, suffix: special ids put before and after each document (`packed`, `stream`) or each piece (`single`).
      For `texts` they stand around each. For `pairs`, `examples` and `questions` the prefix opens the row and the
      suffix closes both A and B, and so for `choices` of each segment; for `stream_pairs` the suffix is (SEP, CLS), of
      which SEP closes A and both close B.
    fields: further arrays wanted: `word_starts`, `sentence_ends`, `token_bytes`, and where examples have them `labels`,
      `scores`, `label_sets`, `tags`, `spans`, `text_ids`.
    pairing: of `pairs`; what label 1 means: `next_sentence`: B is from another document (BERT); `sentence_order`: A
      and B are swapped (ALBERT).
    short_rate: of `pairs`; share of rows that are made shorter than `length`, by a length drawn evenly (BERT: 0.1).
    reuse: of `stream_pairs`; tokens of the text by which each row goes on, at least 1.
    bidirectional: of `stream` and `stream_pairs`; the second half of a source's streams reads its text backwards.
    source: name of the source that the rows come from, where the data is a mixture of some; None: from all of them.
    two_texts: of `examples`; every document must be a pair of texts.
    second_length: of `two_texts`; most tokens of B with its suffix, where A has the rest of `length` and each is cut by
      itself. 0: they share the room, and the longer is cut first.
    classes: of `label_sets` and `choices`; how many there are to tell apart, C.
    texts: of `texts`; how many a row has room for, the query included.
    """

    layout: Layout
    length: int
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    fields: tuple[str, ...] = ()
    pairing: Pairing = "next_sentence"
    short_rate: float = 0.0
    reuse: int = 0
    bidirectional: bool = False
    two_texts: bool = False
    second_length: int = 0
    texts: int = 0
    source: str | None = None
    classes: int = 0


class RowArray(NamedTuple):
    """An array of a batch: its dtype, and the shape of a row."""

    dtype: str
    shape: tuple[int, ...]


def row_arrays(spec: RowSpec) -> dict[str, RowArray]:
    """Every array of a batch of such rows, by name."""
    token = (spec.length,)
    arrays = dict.fromkeys(("tokens", "segment_ids", "positions"), RowArray("int32", token))
    arrays["row_ids"] = RowArray("int32", (2,))
    if spec.layout in _TYPED_LAYOUTS:
        arrays["token_types"] = RowArray("int32", token)
    if spec.layout in ("pairs", "stream_pairs"):
        arrays["pair_labels"] = RowArray("int32", ())
    if spec.bidirectional:
        arrays["backward"] = RowArray("bool", ())
    asked = {
        "word_starts": RowArray("bool", token),
        "sentence_ends": RowArray("bool", token),
        "token_bytes": RowArray("int32", token),
        "tags": RowArray("int32", token),
        "spans": RowArray("int32", (2,)),
        "labels": RowArray("int32", ()),
        "scores": RowArray("float32", ()),
        "label_sets": RowArray("float32", (spec.classes,)),
        "text_ids": RowArray("int32", (spec.texts,)),
    }
    return arrays | {name: asked[name] for name in spec.fields}


_TYPED_LAYOUTS = ("pairs", "examples", "stream_pairs", "questions", "choices")
"""Rows of two texts, or with room for two."""


def row_keys(key: Key[Array, ""], row_ids: Int[Array, "B 2"], step: Int[Array, ""] | int) -> Key[Array, " B"]:
    """One threefry key per row, addressed by (run key, source id, step, example id).

    A row's randomness then depends on nothing else: not on the batch it is in, its neighbours, padding, the
    mesh, the number of hosts, or whether the run was resumed. `key` must be a threefry key: other kinds draw
    differently under vmap.
    """
    if str(jax.random.key_impl(key)) != "threefry2x32":
        raise ValueError(f"row_keys: the key is of kind {jax.random.key_impl(key)}; rows need a threefry2x32 key.")

    def key_of(row_id: Int[Array, 2]) -> Key[Array, ""]:
        source, example = row_id[0], row_id[1]
        return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, source), step), example)

    return jax.vmap(key_of)(row_ids)


def dropout_seeds(keys: Key[Array, " B"]) -> UInt32[Array, " B"]:
    """The 32-bit seed per row that `noise.dropout` hashes: the first word of a key folded into its own domain."""
    return jax.vmap(lambda key: jax.random.bits(jax.random.fold_in(key, 0x0D07), dtype="uint32"))(keys)
