# ruff: noqa: RUF001
"""Sentences and words of the text, told in tokens."""

from __future__ import annotations

import io
import itertools
import pickle
from collections.abc import Iterator

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from lmobj.data import SentencePieceConfig, Tokenizer
from lmobj.data import _segmentation as module
from lmobj.data._cleaning_config import SegmentationConfig
from lmobj.data._segmentation import Segmenter, chinese_words
from lmobj.data._tokenizer import train_tokenizer
from lmobj.errors import UserError

ENGLISH = (
    "Dr. Smith went to Washington. He arrived at 5 p.m. on Jan. 3rd.  “Hello,” he said.\nA new\nline\n\nPara two! é x?"
)
CHINESE = "我来到北京清华大学。你好！“真的吗？”他问。是的，今天天气很好。\n下一行 English here. Next one."
WORDS = "我来到北京清华大学"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Pieces of one character to a few, among them some that cross the ends of Chinese words and sentences."""
    texts = [ENGLISH, CHINESE, "京清 京清 京清 京清 学。你 学。你 学。你 来到 来到"] * 20
    return train_tokenizer(SentencePieceConfig(vocab_size=400), texts)


class Spelled:
    """A tokenizer with the given pieces in its vocabulary, each text its own; ids are places in the list."""

    lossless = True

    def __init__(self, pieces: list[str | bytes]):
        self.pieces = [piece if isinstance(piece, bytes) else piece.encode() for piece in pieces]
        self.tokens = np.arange(len(pieces), dtype=np.int32)
        self.text = b"".join(self.pieces).decode()
        self.piece_bytes = np.array([len(piece) for piece in self.pieces], np.int32)

    def word_starts(self, tokens: np.ndarray, segment_ids: np.ndarray) -> np.ndarray:
        """BERT's rule on the first and last characters of pieces, as `Tokenizer.word_starts` documents it."""

        def bounds(piece: bytes, place: slice) -> bool:
            try:
                character = piece.decode()[place]
            except UnicodeDecodeError:
                return False
            return character.isspace() or character in ".,。，" or "\u4e00" <= character <= "\u9fff"

        starts = [True]
        for before, piece in zip(self.pieces, self.pieces[1:], strict=False):
            starts.append(bounds(before, slice(-1, None)) or bounds(piece, slice(0, 1)))
        return np.array([starts])


def starts(*pieces: str | bytes) -> list[bool]:
    spelled = Spelled(list(pieces))
    segmenter = Segmenter(SegmentationConfig(words="jieba"), spelled)  # type: ignore[arg-type]
    return segmenter.word_starts(spelled.text, spelled.tokens).tolist()


def sentences(tokenizer: Tokenizer, text: str, language: str = "en") -> list[str]:
    segmenter = Segmenter(SegmentationConfig(sentences="sentencex", language=language), tokenizer)
    tokens = tokenizer.encode(text)
    ends = segmenter.sentence_ends(text, tokens)
    assert ends.dtype == np.int32
    assert ends[-1] == len(tokens)
    parts = [tokenizer.decode(part) for part in np.split(tokens, ends[:-1])]
    assert "".join(parts) == text
    return parts


def test_english_sentences_know_abbreviations(tokenizer):
    assert sentences(tokenizer, ENGLISH) == [
        "Dr. Smith went to Washington.",
        " He arrived at 5 p.m. on Jan. 3rd.",
        "  “Hello,” he said.\n",
        "A new\nline\n\n",
        "Para two!",
        " é x?",
    ]


@pytest.mark.parametrize("language", ["zh", "en"])
def test_chinese_sentences_end_at_full_width_marks(language):
    # Spelled by characters: a trained vocabulary may have pieces that span a mark and what follows.
    spelled = Spelled(list(CHINESE))
    segmenter = Segmenter(SegmentationConfig(sentences="sentencex", language=language), spelled)  # type: ignore[arg-type]
    ends = segmenter.sentence_ends(CHINESE, spelled.tokens).tolist()
    assert [CHINESE[start:end] for start, end in zip([0, *ends], ends, strict=False)] == [
        "我来到北京清华大学。",
        "你好！",
        "“真的吗？”",
        "他问。",
        "是的，今天天气很好。\n",
        "下一行 English here.",
        " Next one.",
    ]


def test_newlines_belong_to_the_sentence_before(tokenizer):
    assert sentences(tokenizer, "\n\n Hello. \n\n\n World.\n\n") == ["\n\n Hello. \n\n\n", " World.\n\n"]
    assert sentences(tokenizer, " \n ") == [" \n "]
    assert sentences(tokenizer, "x") == ["x"]
    assert sentences(tokenizer, "x.  ") == ["x.  "]


def test_a_boundary_inside_a_token_moves_to_its_end():
    def ends(*pieces: str) -> list[int]:
        spelled = Spelled(list(pieces))
        segmenter = Segmenter(SegmentationConfig(sentences="sentencex", language="zh"), spelled)  # type: ignore[arg-type]
        return segmenter.sentence_ends(spelled.text, spelled.tokens).tolist()

    assert ends("你", "好", "。", "他", "好", "。") == [3, 6]
    assert ends("你", "好。他", "好", "。") == [2, 4]
    assert ends("你", "好。他好。你", "。") == [2, 3]  # two boundaries in one token are one
    assert ends("你", "好。他好", "。") == [2, 3]
    assert ends("你好。他", "好。") == [1, 2]
    assert ends("你好。他好。") == [1]
    assert ends("Hi there", ".", " He", " is", ".") == [2, 5]


def test_the_empty_document_has_one_end(tokenizer):
    segmenter = Segmenter(SegmentationConfig(sentences="sentencex", words="jieba"), tokenizer)
    nothing = np.zeros(0, np.int32)
    assert segmenter.sentence_ends("", nothing).tolist() == [0]
    assert segmenter.word_starts("", nothing).tolist() == []


def test_the_rules_are_the_tokenizers(tokenizer):
    segmenter = Segmenter(SegmentationConfig(), tokenizer)
    for text in (ENGLISH, CHINESE):
        tokens = tokenizer.encode(text)
        ones = np.ones((1, len(tokens)), np.int32)
        np.testing.assert_array_equal(segmenter.sentence_ends(text, tokens), tokenizer.sentence_ends(tokens))
        np.testing.assert_array_equal(segmenter.word_starts(text, tokens), tokenizer.word_starts(tokens[None], ones)[0])


def test_chinese_words_are_those_of_jieba():
    assert chinese_words(WORDS) == ["我", "来到", "北京", "清华大学"]
    T, F = True, False
    assert starts(*WORDS) == [T, T, F, T, F, T, F, F, F]
    assert starts("我", "来到", "北京", "清华", "大学") == [T, T, T, T, F]
    # a token that spans several words begins one, also where it starts inside another
    assert starts("我来到", "北京清华", "大学") == [T, T, F]
    assert starts("我来", "到北", "京清", "华", "大学") == [T, T, T, F, F]
    # bytes: only the first byte of a word's first character begins it
    spelled = [WORDS.encode()[i : i + 1] for i in range(27)]
    assert np.flatnonzero(starts(*spelled)).tolist() == [0, 3, 9, 15]


def test_other_stretches_keep_the_basic_rule():
    T, F = True, False
    pieces = ["Un", "aware", " of", " ", "北", "京", "，", "O", "K", "清", "华", "大", "学", "x", ",y", "z.", "w"]
    #          word         word  sp   word      mark word      word                  word  (inside)       after mark
    assert starts(*pieces) == [T, F, T, T, T, F, T, T, F, T, F, F, F, T, T, F, T]
    # a piece with a leading space begins a word, whatever follows; a letter before ideographs holds the beginning
    assert starts(" 北", "京", "x", "y北京") == [T, F, T, T]
    assert starts("a", "b-c", "d") == [T, F, F]


@settings(max_examples=80, deadline=None)
@given(st.text("我来到北京清华大学的。，？！”“ abDr.Mr?!\n\u3000\u2028é😀1", max_size=40))
def test_any_text_is_covered(tokenizer, text):
    segmenter = Segmenter(SegmentationConfig(sentences="sentencex", words="jieba", language="zh"), tokenizer)
    tokens = tokenizer.encode(text)
    ends = segmenter.sentence_ends(text, tokens)
    assert (np.diff(ends) > 0).all()
    assert ends[-1] == len(tokens)
    # The words token by token, from the places of jieba's words in the text and BERT's rule.
    basic = Segmenter(SegmentationConfig(), tokenizer).word_starts(text, tokens).tolist()
    expected = []
    start = 0
    spans = list(chinese_spans(text))
    for token, rule in zip(tokens, basic, strict=True):
        end = start + int(tokenizer.piece_bytes[token])
        bounds = {place for span in spans for place in span}
        within = any(begin < start < stop for begin, stop in spans)
        expected.append(bool(bounds & set(range(start, end))) or (rule and not within))
        start = end
    assert segmenter.word_starts(text, tokens).tolist() == expected


def chinese_spans(text: str) -> Iterator[tuple[int, int]]:
    place = 0
    for chinese, stretch in itertools.groupby(text, lambda character: "\u4e00" <= character <= "\u9fff"):
        part = "".join(stretch)
        for word in chinese_words(part) if chinese else [part]:
            if chinese:
                yield place, place + len(word.encode())
            place += len(word.encode())


def test_long_text_is_cut_into_windows_between_sentences(monkeypatch):
    text = CHINESE * 40 + ENGLISH * 40
    whole = list(module._sentences(text[:8000], "zh"))
    monkeypatch.setattr(module, "_WINDOW", 256)
    assert list(module._sentences(text[:8000], "zh")) == whole
    assert "".join(module._sentences("x" * 1000, "zh")) == "x" * 1000


def test_white_space_that_sentencex_trips_over():
    # Its English rules panic on each of these.
    for text in ("B D\u3000.' ", "A\u2028. ", ".AA\xa0B\u2028.B"):
        assert "".join(module._sentences(text, "en")) == text


def test_a_model_that_normalises_is_refused_by_name():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([ENGLISH] * 3), model_writer=model, vocab_size=40, minloglevel=2
    )
    lossy = Tokenizer(model.getvalue())
    with pytest.raises(UserError, match=r"^data\.segment\.sentences is sentencex, .*accepted: rule"):
        Segmenter(SegmentationConfig(sentences="sentencex"), lossy)
    with pytest.raises(UserError, match=r"^data\.segment\.words is jieba, .*accepted: basic"):
        Segmenter(SegmentationConfig(words="jieba"), lossy)
    Segmenter(SegmentationConfig(), lossy)


def test_a_segmenter_can_be_pickled(tokenizer):
    segmenter = Segmenter(SegmentationConfig(sentences="sentencex", words="jieba"), tokenizer)
    tokens = tokenizer.encode(CHINESE)
    copy = pickle.loads(pickle.dumps(segmenter))
    assert copy.sentence_ends(CHINESE, tokens).tolist() == segmenter.sentence_ends(CHINESE, tokens).tolist()
