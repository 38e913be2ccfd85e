"""SentencePiece as a lossless tokenizer: what is encoded decodes to the same text, byte for byte.

Models trained here use no normalisation, no dummy prefix and keep every space; characters without a piece are spelled
in bytes, a newline is a piece of its own, and runs of spaces may be pieces. The special pieces have fixed ids:

    <pad> 0   <unk> 1   <s> 2   </s> 3   [CLS] 4   [SEP] 5   [MASK] 6   newline 7   bytes 8..263

Sentinels, and marks of denoisers and of infilling, where a config asks for some, come after all other pieces.

Source: Kudo and Richardson, "SentencePiece", EMNLP 2018; Kudo, "Subword Regularization", ACL 2018 (unigram); Sennrich
et al., "Neural Machine Translation of Rare Words with Subword Units", ACL 2016 (BPE).
"""

from __future__ import annotations

import hashlib
import io
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from lmobj._pieces import SPELLINGS, sentinel
from lmobj.data._config import SentencePieceConfig
from lmobj.errors import UserError

if TYPE_CHECKING:
    from lmobj.batch import Vocabulary

__all__ = ["Tokenizer", "train_tokenizer", "training_lines"]

_SPACE = "▁"
"""How SentencePiece writes a space in a piece (U+2581). The character itself is spelled in bytes."""
_SENTINELS = sentinel(0)[:-2]
"""What all of them begin with."""
_PROBE = " a  b\n\ufb01\t\u00e9 "
"""Comes back unchanged only from a model that neither normalises nor adds or drops spaces."""
_TRAINING_THREADS = 16
"""Fixed: unigram training adds floats per thread, so another number would be another model."""
_LONGEST_LINE = 4096
"""Characters of a training sentence; a longer line is cut."""
_CHUNK = 1024
"""Characters after which a text is cut for encoding, at the next newline. Newlines are pieces of their own, so the cut
changes nothing; but the unigram model adds up float32 scores, which run out of precision in a text of megabytes."""
_TERMINATORS = ".!?"
_WIDE_TERMINATORS = "。！？"  # noqa: RUF001
_NEWLINE, _OPENS_SPACE, _TERMINATED, _WIDE_TERMINATED = 1, 2, 4, 8
"""Kinds of pieces: of newlines alone; beginning with whitespace; ending in one of the terminators, or the wide ones."""


class Tokenizer:
    """Text to token ids and back, by a SentencePiece model."""

    def __init__(self, model: bytes):
        self._model = model
        if not model:  # which SentencePiece takes for no model yet
            raise ValueError("an empty model")
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._byte_ids = self._find_bytes()

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Loads a `.model` file. Raises UserError if it is missing or no SentencePiece model."""
        try:
            model = Path(path).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: no name that a file can have
            raise UserError(f"data.tokenizer.path: {path} cannot be read ({error}).") from error
        try:
            return cls(model)
        except (RuntimeError, IndexError, ValueError) as error:
            raise UserError(
                f"data.tokenizer.path: {path} is not a SentencePiece model; accepted: a .model file as SentencePiece "
                "writes it."
            ) from error

    def extended(self, pieces: Sequence[str]) -> Tokenizer:
        """This tokenizer with control pieces after its own, those that it has left out. No text is encoded otherwise.

        Raises:
          UserError: it has sentinels already, and `pieces` has others: all must have descending ids.
        """
        own, asked = len(self._special["sentinels"]), sum(piece.startswith(_SENTINELS) for piece in pieces)
        if own and asked not in (0, own):
            raise UserError(
                f"data.tokenizer.sentinels is {asked}, and the model has {own} of its own; accepted: {own}, or 0 for "
                "those."
            )
        new = [piece for piece in pieces if self._piece_id(piece) is None]
        return Tokenizer(self._model + b"".join(map(_control_piece, new))) if new else self

    def save(self, path: str | Path) -> None:
        """Writes the model as a `.model` file that SentencePiece itself can load."""
        Path(path).write_bytes(self._model)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the model."""
        return hashlib.blake2b(self._model, digest_size=16).hexdigest()

    @property
    def size(self) -> int:
        """Pieces of the model."""
        return self._processor.get_piece_size()

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Size and special ids. Where a loaded model has no padding piece, `pad` is its unknown piece, which every
        model has: padding is told by segment 0, not by the id."""
        from lmobj.batch import Vocabulary  # with it comes jax, which the processes that tokenise do without

        return Vocabulary(size=self.size, **self._special)

    @cached_property
    def _special(self) -> dict[str, Any]:
        """The special ids as `Vocabulary` names them."""
        sp = self._processor
        return {
            "pad": sp.pad_id() if sp.pad_id() >= 0 else sp.unk_id(),
            "unk": sp.unk_id(),
            "bos": sp.bos_id() if sp.bos_id() >= 0 else None,
            "eos": sp.eos_id() if sp.eos_id() >= 0 else None,
            "sentinels": self._sentinels,
            **{name: self._piece_id(*spellings) for name, spellings in SPELLINGS.items()},
        }

    @property
    def _sentinels(self) -> tuple[int, ...]:
        """Ids of <extra_id_0>, <extra_id_1>, ... as far as they descend one by one."""
        found: list[int] = []
        while (index := self._piece_id(sentinel(len(found)))) is not None and index == (found or [index + 1])[-1] - 1:
            found.append(index)
        return tuple(found)

    @cached_property
    def lossless(self) -> bool:
        """Whether decode(encode(text)) == text for every text. True of models trained here."""
        sp = self._processor
        return (
            self._byte_ids is not None and sp.decode(sp.encode(_PROBE)) == _PROBE and sp.encode("a") != sp.encode(" a")
        )

    def encode(self, text: str, *, special: bool = False) -> NDArray[np.int32]:
        """Token ids of `text`, [N] int32. With `special`, special pieces written in the text ("[MASK]") become their
        ids; otherwise they are text like any other."""
        if not special:
            return self.encode_batch([text])[0]
        pieces = {self.piece(i): i for i in self.vocabulary.special_ids}
        pattern = "(" + "|".join(re.escape(piece) for piece in pieces) + ")"
        parts = re.split(pattern, text)
        ids = [
            np.array([pieces[part]], np.int32) if index % 2 else self.encode(part) for index, part in enumerate(parts)
        ]
        return np.concatenate(ids)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Token ids of each text, faster than one by one."""
        chunks = [_chunks(text) if self.lossless else [text] for text in texts]
        together = list(itertools.chain.from_iterable(chunks))
        encoded = iter(self._processor.encode(together, num_threads=1, return_type="numpy"))
        ids = []
        for text, parts in zip(texts, chunks, strict=True):
            own = list(itertools.islice(encoded, len(parts)))
            marked = self.lossless and _SPACE in text
            ids.append(self._encode_with_marker(parts) if marked else np.concatenate(own))
        return ids

    def decode(self, ids: Iterable[int] | NDArray[np.integer]) -> str:
        """The text of token ids. Special tokens are nothing; bytes that form no character become U+FFFD."""
        return self._processor.decode(np.asarray(ids, np.int64).reshape(-1).tolist())

    def piece(self, index: int) -> str:
        """The piece with this id as SentencePiece writes it (a space is U+2581)."""
        return self._processor.id_to_piece(int(index))

    @cached_property
    def piece_bytes(self) -> NDArray[np.int32]:
        """[V] int32: UTF-8 bytes that each piece stands for; 0 for special pieces."""
        return np.array([len(text) if text is not None else 0 for text in self._surface], np.int32)

    def word_starts(self, tokens: NDArray[np.int32], segment_ids: NDArray[np.int32]) -> NDArray[np.bool_]:
        """[B, L] bool: the token begins a word, for rows of tokens [B, L] with their segments [B, L].

        Words are those of BERT's basic tokenizer: whitespace, punctuation marks and CJK characters bound them, and
        each mark and character is a word of its own. A token begins a word if it begins with such a character, comes
        after one or after a special token, or is the first of its segment (at a row's start the rest of a cut word
        counts as a word). A run of whitespace belongs to the word after it when they share a piece. A character
        spelled in bytes is a letter, unless it is ASCII.
        """
        opens, closes = self._word_tables
        starts = opens[tokens]
        starts[:, 0] = True
        starts[:, 1:] |= closes[tokens[:, :-1]] | (segment_ids[:, 1:] != segment_ids[:, :-1])
        return starts

    @cached_property
    def is_word(self) -> NDArray[np.bool_]:
        """[V] bool: the piece, but for spaces before it, is letters alone, and so may be a whole word."""
        return np.array([text is not None and _is_letters(text) for text in self._surface])

    def sentence_ends(self, tokens: NDArray[np.int32]) -> NDArray[np.int32]:
        """[S] int32: the offset after each sentence of a document [N]; the last one is N.

        A sentence ends after a newline (or a run of them), after a token that ends in . ! ? when whitespace follows,
        and after a token that ends in a full-width 。！？ (which must have a piece: its bytes do not count). Newlines
        belong to the sentence before them.
        """
        kinds = self._sentence_kinds[tokens]
        ends = np.flatnonzero(_ENDS_SENTENCE[kinds[:-1] << 4 | kinds[1:]])
        found = np.empty(len(ends) + 1, np.int32)
        found[:-1], found[-1] = ends + 1, len(tokens)
        return found

    def _piece_id(self, *names: str) -> int | None:
        """Id of the first of these pieces that the model has; unknown pieces would come back as <unk>."""
        sp = self._processor
        return next((i for name in names if sp.id_to_piece(i := sp.piece_to_id(name)) == name), None)

    def _find_bytes(self) -> NDArray[np.int32] | None:
        ids = [self._piece_id(f"<0x{byte:02X}>") for byte in range(256)]
        return None if None in ids else np.array(ids, np.int32)

    def _encode_with_marker(self, chunks: list[str]) -> NDArray[np.int32]:
        """SentencePiece would read U+2581 as a space, so that character goes around it, in bytes."""
        assert self._byte_ids is not None
        marker = self._byte_ids[list(_SPACE.encode())].tolist()
        ids: list[int] = []
        for chunk in chunks:
            first, *others = chunk.split(_SPACE)
            ids += self._processor.encode(first)
            for part in others:
                ids += marker + self._processor.encode(part)
        return np.array(ids, np.int32)

    @cached_property
    def _surface(self) -> list[bytes | None]:
        """The UTF-8 bytes of each piece; None for special pieces."""
        sp = self._processor
        special = {*self._special.values(), *self._special["sentinels"]}
        surface: list[bytes | None] = []
        for index in range(sp.get_piece_size()):
            piece = sp.id_to_piece(index)
            if sp.is_byte(index):
                surface.append(bytes([int(piece[3:5], 16)]))
            elif sp.is_control(index) or sp.is_unknown(index) or sp.is_unused(index) or index in special:
                surface.append(None)
            else:
                surface.append(piece.replace(_SPACE, " ").encode())
        return surface

    @cached_property
    def _edges(self) -> list[tuple[str, str] | None]:
        """First and last character of each piece; "" inside a character (a byte above 127), None for special pieces."""
        edges: list[tuple[str, str] | None] = []
        for text in self._surface:
            if text is None:
                edges.append(None)
            elif len(text) <= 1 and not text.isascii():
                edges.append(("", ""))
            else:
                characters = text.decode()
                edges.append((characters[:1], characters[-1:]))
        return edges

    @cached_property
    def _word_tables(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """[V] bool each: the piece begins with a character that opens a word; ends with one that closes it."""
        opens = [edge is None or _bounds_word(edge[0]) for edge in self._edges]
        closes = [edge is None or _bounds_word(edge[1]) for edge in self._edges]
        return np.array(opens), np.array(closes)

    @cached_property
    def _sentence_kinds(self) -> NDArray[np.uint8]:
        """[V]: what a piece has to do with the ends of sentences, as bits of `_NEWLINE`, `_OPENS_SPACE`, ..."""
        kinds = []
        for text, edge in zip(self._surface, self._edges, strict=True):
            first, last = edge or ("", "")
            kinds.append(
                _NEWLINE * (text is not None and text != b"" and not text.strip(b"\n"))
                | _OPENS_SPACE * first.isspace()
                | _TERMINATED * (last != "" and last in _TERMINATORS)
                | _WIDE_TERMINATED * (last != "" and last in _WIDE_TERMINATORS)
            )
        return np.array(kinds, np.uint8)


def _control_piece(piece: str) -> bytes:
    """A piece as SentencePiece's model file has it, at the end of which any may stand: field 1 of ModelProto, in which
    1 is its text, 2 its score (a float of 0), and 3 its type (3: control)."""
    text = piece.encode()
    message = b"\x0a" + bytes([len(text)]) + text + b"\x15" + bytes(4) + b"\x18\x03"
    return b"\x0a" + bytes([len(message)]) + message


def _ends_sentence(before: int, after: int) -> bool:
    """Whether a sentence ends between two tokens of these kinds; see `Tokenizer.sentence_ends`."""
    if after & _NEWLINE:
        return False
    spaced = before & _TERMINATED and after & _OPENS_SPACE
    wide = before & _WIDE_TERMINATED and not after & _WIDE_TERMINATED
    return bool(before & _NEWLINE or spaced or wide)


_ENDS_SENTENCE = np.array([_ends_sentence(pair >> 4, pair & 15) for pair in range(256)])
"""`_ends_sentence` by (before << 4 | after)."""


def train_tokenizer(config: SentencePieceConfig, texts: Iterable[str]) -> Tokenizer:
    """Trains a model on all lines of `texts`.

    The same texts and settings give the same model on any number of cores.

    Raises UserError if the corpus does not support `vocab_size` pieces, or they are too few to hold the special
    pieces, the bytes and the characters.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=training_lines(texts),
            model_writer=model,
            vocab_size=config.trained_size,
            model_type=config.model,
            character_coverage=config.character_coverage,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            required_chars=_SPACE,
            user_defined_symbols=["\n"],
            control_symbols=["[CLS]", "[SEP]", "[MASK]"],
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            max_sentence_length=_LONGEST_LINE * 4,
            num_threads=_TRAINING_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(config, str(error)) from error
    return Tokenizer(model.getvalue()).extended(config.control_pieces)


def _training_error(config: SentencePieceConfig, message: str) -> Exception:
    """SentencePiece's complaint about the size of the vocabulary, as a UserError; any other as it is."""
    size = config.trained_size
    if found := re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", message):
        return UserError(
            f"data.tokenizer.vocab_size is {size}, but the training split supports at most {found[1]} {config.model} "
            f"pieces; accepted: a vocab_size up to {found[1]}, or more text."
        )
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"data.tokenizer.vocab_size is {size}, but the special pieces, the 256 bytes and the characters of the "
            f"corpus alone need {found[1]}; accepted: a vocab_size of {found[1]} or more."
        )
    return RuntimeError(message)


def _chunks(text: str) -> list[str]:
    """The text in chunks of at least `_CHUNK` characters, each but the last ending after a newline."""
    chunks = []
    start = 0
    while (end := text.find("\n", start + _CHUNK) + 1) > 0:
        chunks.append(text[start:end])
        start = end
    return [*chunks, text[start:]]


def training_lines(texts: Iterable[str]) -> Iterator[str]:
    """The lines of the documents. Newlines are pieces by decree, so training need not see them."""
    for text in texts:
        for line in text.split("\n"):
            start = 0
            while len(line) - start > _LONGEST_LINE:
                space = line.rfind(" ", start + 1, start + _LONGEST_LINE)
                end = space if space > 0 else start + _LONGEST_LINE
                yield line[start:end]
                start = end
            if line:
                yield line[start:]


def _bounds_word(character: str) -> bool:
    """Whether BERT's basic tokenizer separates this character from its neighbours."""
    if not character:
        return False
    return character.isspace() or _is_punctuation(character) or _is_cjk(ord(character))


def _is_letters(surface: bytes) -> bool:
    try:
        return surface.decode().lstrip(" ").isalpha()
    except UnicodeDecodeError:  # one byte of a longer character
        return False


def _is_punctuation(character: str) -> bool:
    """ASCII that is neither letter, digit, space nor control, or Unicode category P."""
    ascii_mark = "!" <= character <= "~" and not character.isalnum()
    return ascii_mark or unicodedata.category(character).startswith("P")


def _is_cjk(code: int) -> bool:
    """The Unicode blocks of CJK ideographs that BERT splits on."""
    return (
        0x4E00 <= code <= 0x9FFF
        or 0x3400 <= code <= 0x4DBF
        or 0x20000 <= code <= 0x2CEAF
        or 0xF900 <= code <= 0xFAFF
        or 0x2F800 <= code <= 0x2FA1F
    )
