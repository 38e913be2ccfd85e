"""The tokenizer loses nothing, and its tables say what pieces are."""

from __future__ import annotations

import io

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from lmobj.data import DataConfig, SentencePieceConfig, Tokenizer, load_tokenizer
from lmobj.data import _tokenizer as module
from lmobj.data._tokenizer import train_tokenizer
from lmobj.errors import UserError
from lmobj.train.plan import planned_vocabulary

AWKWARD = [
    "",
    " ",
    "\n",
    "  two  spaces  \n\n\n    indented\n",
    "\u2581",
    "a\u2581b \u2581\u2581 c",
    "tab\tand\x00nul\x01\r\n",
    "\ufeff\ufffd \ufb01 e\u0301 \u3000 \u2028",
    "日本語。中国！ 😀",  # noqa: RUF001
    "<s> </s> <pad> [MASK] <0x41> <unk> \u2047 \u2585",
    "x" * 5000 + "\n" + "y " * 3000,
]


def trained(kind: str, documents: list[str]) -> Tokenizer:
    return train_tokenizer(SentencePieceConfig(vocab_size=400, model=kind), documents)


@pytest.fixture(scope="module")
def unigram(documents: list[str]) -> Tokenizer:
    return trained("unigram", documents)


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def tokenizer(request: pytest.FixtureRequest, documents: list[str]) -> Tokenizer:
    return trained(request.param, documents)


def check_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.piece_bytes[ids].sum() == len(text.encode())


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_comes_back(tokenizer, text):
    check_round_trip(tokenizer, text)


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=60) | st.text(" \n\t.\u2581ab日", max_size=60))
def test_any_text_comes_back(unigram, text):
    check_round_trip(unigram, text)


def test_special_pieces_have_fixed_ids(tokenizer):
    vocab = tokenizer.vocabulary
    names = ["<pad>", "<unk>", "<s>", "</s>", "[CLS]", "[SEP]", "[MASK]", "\n", "<0x00>"]
    assert [tokenizer.piece(index) for index in range(9)] == names
    assert (vocab.pad, vocab.unk, vocab.bos, vocab.eos, vocab.cls, vocab.sep, vocab.mask) == (0, 1, 2, 3, 4, 5, 6)
    assert vocab.size == 400
    assert tokenizer.lossless
    assert tokenizer.piece_bytes[:9].tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 1]


def test_special_pieces_are_text_unless_asked_for(tokenizer):
    assert not set(tokenizer.encode("a [MASK] b").tolist()) & {4, 5, 6}
    assert tokenizer.decode(tokenizer.encode("a [MASK] b")) == "a [MASK] b"
    expected = [4, *tokenizer.encode("a "), 6, *tokenizer.encode(" b"), 6, 5]
    assert tokenizer.encode("[CLS]a [MASK] b[MASK][SEP]", special=True).tolist() == expected


def test_batches_change_nothing(tokenizer, documents):
    texts = [*documents[:20], *AWKWARD]
    one = [tokenizer.encode(text).tolist() for text in texts]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == one


def test_cutting_long_text_for_encoding_changes_nothing(unigram, documents, monkeypatch):
    text = "\n".join(documents)
    whole = "".join(documents[:40])
    cut = unigram.encode(whole).tolist()
    assert len(module._chunks(text)) > 2
    assert "".join(module._chunks(text)) == text
    monkeypatch.setattr(module, "_CHUNK", 10**9)
    assert unigram.encode(whole).tolist() == cut


def test_indentation_is_learned_as_pieces(tokenizer):
    assert len(tokenizer.encode("        ")) < 8


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_the_model_is_the_same_every_time_and_survives_a_file(documents, kind, tmp_path):
    tokenizer = trained(kind, documents)
    assert trained(kind, documents).fingerprint == tokenizer.fingerprint
    assert trained(kind, documents[1:]).fingerprint != tokenizer.fingerprint
    tokenizer.save(tmp_path / "a.model")
    loaded = Tokenizer.load(tmp_path / "a.model")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode(documents[0]).tolist() == tokenizer.encode(documents[0]).tolist()


def test_long_lines_are_cut_not_dropped(monkeypatch):
    monkeypatch.setattr(module, "_LONGEST_LINE", 10)
    assert list(module.training_lines(["one two three four\n\nx" + "y" * 12])) == [
        "one two",
        " three",
        " four",
        "x" + "y" * 9,
        "y" * 3,
    ]


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_vocabulary_beyond_the_corpus_names_the_largest_that_works(kind):
    texts = ["hello world, hello there"]
    with pytest.raises(UserError, match=r"vocab_size is 5000, but .* at most \d+") as error:
        train_tokenizer(SentencePieceConfig(vocab_size=5000, model=kind), texts)
    largest = int(str(error.value).split("up to ")[1].split(",")[0])
    assert train_tokenizer(SentencePieceConfig(vocab_size=largest, model=kind), texts).vocabulary.size == largest
    with pytest.raises(UserError, match="at most"):
        train_tokenizer(SentencePieceConfig(vocab_size=largest + 1, model=kind), texts)


def test_a_vocabulary_too_small_for_its_bytes_names_the_smallest(documents):
    with pytest.raises(UserError, match=r"vocab_size is 100, but .* alone need \d+"):
        train_tokenizer(SentencePieceConfig(vocab_size=100), documents)


def test_words_begin_where_berts_tokenizer_would_cut(unigram):
    # What must begin a word: everything after a space, a newline, a mark or a special token, each mark, each
    # ideograph, and the first token of a segment. Compared with a scan of characters.
    text = "koriten (lo-mu), ed.\n  shaver日本 x1_y"
    ids = unigram.encode(text)
    inner = next(index for index in range(1, len(ids)) if unigram.decode(ids[:index]) in "koriten")
    rows = np.concatenate([[4], ids, ids[inner : inner + 1], [5], ids[inner:]])[None].astype(np.int32)
    segments = np.array([[1] * (len(ids) + 1) + [2] * 2 + [2] * (len(ids) - inner)], np.int32)
    starts = unigram.word_starts(rows, segments)[0]

    def bounds(character: str) -> bool:
        return character.isspace() or character in "(-),.日本_"

    expected = [True]  # [CLS]
    before = ""
    for index in ids:
        piece = unigram.decode([index])
        if "\ufffd" in piece:  # part of a character: none of those in the text bounds a word
            raise AssertionError("choose a text whose characters have pieces")
        expected.append(before == "" or bounds(before) or bounds(piece[0]))
        before = piece[-1]
    assert not expected[1 + inner]
    expected.append(True)  # the same piece, first of the second segment
    expected += [True, True]  # [SEP], and that piece after it
    assert starts[: len(expected)].tolist() == expected


def test_words_of_letters_are_told_from_other_pieces(unigram):
    # is_word against Python's own str.isalpha on the decoded pieces, without the spaces before them.
    vocab = unigram.vocabulary
    decoded = [unigram.decode([index]).lstrip(" ") for index in range(vocab.size)]
    expected = [index > 7 and "\ufffd" not in text and text.isalpha() for index, text in enumerate(decoded)]
    assert unigram.is_word.tolist() == expected
    assert 0 < sum(expected) < vocab.size


def test_bytes_of_one_character_stay_in_one_word(unigram):
    ids = unigram.encode("a😀b")
    starts = unigram.word_starts(ids[None], np.ones((1, len(ids)), np.int32))[0]
    assert len(ids) >= 6
    assert starts.tolist() == [True] + [False] * (len(ids) - 1)


def test_sentences_end_at_newlines_and_terminators(unigram):
    text = "Ba ko. Ri ten! lo?\n\n  mu v1.2 sha\ning。ed！！日本? é"  # noqa: RUF001
    ends = unigram.sentence_ends(unigram.encode(text))
    parts = [unigram.decode(part) for part in np.split(unigram.encode(text), ends[:-1])]
    assert parts == ["Ba ko.", " Ri ten!", " lo?\n\n", "  mu v1.2 sha\n", "ing。", "ed！！", "日本?", " é"]  # noqa: RUF001
    assert ends[-1] == len(unigram.encode(text))


def test_a_foreign_model_is_read_with_its_own_special_pieces(tmp_path, documents):
    model = io.BytesIO()
    lines = [line for text in documents for line in text.split("\n")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=120,
        minloglevel=2,
        user_defined_symbols=["<mask>"],
    )
    (tmp_path / "foreign.model").write_bytes(model.getvalue())
    tokenizer = Tokenizer.load(tmp_path / "foreign.model")
    vocab = tokenizer.vocabulary
    # SentencePiece's defaults: <unk> 0, <s> 1, </s> 2, no padding piece; then the user's symbols.
    assert (vocab.pad, vocab.unk, vocab.bos, vocab.eos, vocab.mask) == (0, 0, 1, 2, 3)
    assert vocab.cls is None
    assert vocab.sep is None
    assert not tokenizer.lossless
    assert tokenizer.encode("ba  ko").tolist() == tokenizer._processor.encode("ba  ko")


def test_sentinels_and_marks_come_after_the_pieces_of_the_model(unigram, documents):
    settings = SentencePieceConfig(vocab_size=400, model="unigram", sentinels=3, infilling_marks=True)
    extended = train_tokenizer(settings, documents)
    assert unigram.size == 400
    assert extended.size == 406
    model = sentencepiece.SentencePieceProcessor(model_proto=extended._model)
    pieces = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<extra_id_2>", "<extra_id_1>", "<extra_id_0>"]
    assert [model.id_to_piece(i) for i in range(400, 406)] == pieces
    assert all(model.is_control(i) for i in range(400, 406))
    assert model.get_score(405) == 0
    vocab = extended.vocabulary
    assert vocab.sentinels == (405, 404, 403)
    assert (vocab.fim_prefix, vocab.fim_suffix, vocab.fim_middle, vocab.nlu) == (400, 401, 402, None)
    assert set(range(400, 406)) <= set(vocab.control_ids) <= set(vocab.special_ids)
    assert not extended.piece_bytes[400:].any()
    assert not extended.is_word[400:].any()
    for text in ("a <extra_id_0> b", "<fim_middle>", documents[0]):
        assert extended.encode(text).tolist() == unigram.encode(text).tolist()
        assert extended.decode(extended.encode(text)) == text
    assert extended.encode("<extra_id_1>", special=True).tolist() == [404]
    assert extended.decode([405]) == ""
    assert planned_vocabulary(settings) == vocab


def test_a_model_gets_what_it_has_not(unigram, tmp_path):
    pieces = SentencePieceConfig(sentinels=2, denoiser_marks=True).control_pieces
    assert pieces == ("[NLU]", "[S2S]", "[NLG]", "<extra_id_1>", "<extra_id_0>")
    extended = unigram.extended(pieces)
    assert extended.extended(pieces) is extended
    assert unigram.extended(()) is unigram
    assert extended.extended(("[NLU]", "<fim_prefix>")).vocabulary.fim_prefix == 405
    with pytest.raises(UserError, match=r"data.tokenizer.sentinels is 3, and the model has 2 of its own"):
        extended.extended(SentencePieceConfig(sentinels=3).control_pieces)
    extended.save(tmp_path / "extended.model")
    settings = SentencePieceConfig(path=str(tmp_path / "extended.model"), infilling_marks=True)
    loaded = load_tokenizer(DataConfig(tokenizer=settings))
    assert loaded.vocabulary.sentinels == (404, 403)
    assert loaded.vocabulary.fim_middle == 407
    assert planned_vocabulary(settings) == loaded.vocabulary


def test_sentinels_that_do_not_descend_are_none(unigram):
    ascending = unigram.extended(("<extra_id_0>", "<extra_id_1>"))
    assert ascending.vocabulary.sentinels == (400,)
    assert unigram.vocabulary.sentinels == ()


def test_what_a_vocabulary_lacks_is_named(unigram):
    with pytest.raises(UserError, match=r"x needs \[NLU\] and \[NLG\], and the .* no \[NLU\] and no \[NLG\]; set data"):
        unigram.vocabulary.require("x", "nlu", "nlg")
    with pytest.raises(UserError, match=r"no <fim_middle>; set data.tokenizer.infilling_marks to true"):
        unigram.vocabulary.require("x", "fim_middle")
    with pytest.raises(UserError, match=r"up to 5 spans .* has 0; set data.tokenizer.sentinels to 5 or more"):
        unigram.vocabulary.require_sentinels("x", 5)


def test_what_is_no_model_is_named(tmp_path):
    (tmp_path / "text.model").write_text("no model")
    with pytest.raises(UserError, match=r"data\.tokenizer\.path.*text\.model is not a SentencePiece model"):
        Tokenizer.load(tmp_path / "text.model")
    with pytest.raises(UserError, match=r"data\.tokenizer\.path.*missing\.model cannot be read"):
        Tokenizer.load(tmp_path / "missing.model")


def test_spaces_survive_a_model_trained_on_text_without_any():
    texts = [f"第{number}句：我们学习语言。" for number in range(60)]  # noqa: RUF001
    tokenizer = train_tokenizer(SentencePieceConfig(vocab_size=300), texts)
    assert tokenizer.lossless
    assert tokenizer.decode(tokenizer.encode(" 学  习 ")) == " 学  习 "
