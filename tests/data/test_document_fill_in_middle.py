"""Middles of documents moved by characters: cuts by enumeration, texts restored, training documents alone, refusals."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from data_corpus import generated_documents, small_config, write_blocks
from scipy import stats

from lmobj import noise
from lmobj.batch import RowSpec
from lmobj.data import (
    ConllFiles,
    DataConfig,
    Dataset,
    DocumentFillInMiddle,
    HeldOut,
    JsonLines,
    MixtureSource,
    SentencePieceConfig,
    Tokenizer,
    WeightedSource,
    _work,
    prepare,
)
from lmobj.data._fill_in_middle import Rearrangement, open_rearrangement
from lmobj.errors import UserError
from lmobj.objectives import CausalLM, FillInMiddle, MaskedLM
from lmobj.train.infilling import check_infilling, infilling_order
from tests.mutants import Mutant, assert_killed

PRE, SUF, MID = 7, 8, 9


def rearrange(text: str, **settings: Any) -> tuple[str | int, ...]:
    return Rearrangement(DocumentFillInMiddle(**settings), (PRE, SUF, MID))(text)


def parts_of(pieces: tuple[str | int, ...]) -> tuple[str, str, str, str]:
    """(order, prefix, middle, suffix)."""
    if pieces[2] == SUF:
        pre, prefix, suf, suffix, mid, middle = pieces
        order = "psm"
    else:
        pre, suf, suffix, mid, prefix, middle = pieces
        order = "spm"
    assert (pre, suf, mid) == (PRE, SUF, MID)
    assert isinstance(prefix, str)
    assert isinstance(middle, str)
    assert isinstance(suffix, str)
    return order, prefix, middle, suffix


AWKWARD = [
    "a",
    "a👩\u200d👧é e\u0301",  # characters of several code points, and beyond the first plane
    "\n\n  indented\n\tby tabs\r\n\n",
    "▁▁ the mark ▁",
    "日本語。 مرحبا \u0000\ufeff\x7f",
    "<fim_prefix> in the text <fim_middle>",
    "x" * 3000 + "\n" + "y " * 2000,
]


@pytest.mark.parametrize("text", AWKWARD, ids=["one", "emoji", "spaces", "marks", "scripts", "names", "long"])
def test_parts_are_the_text(text: str) -> None:
    seen = set()
    for seed in range(40):
        pieces = rearrange(text, fim_rate=0.9, seed=seed)
        if pieces == (text,):
            continue
        order, prefix, middle, suffix = parts_of(pieces)
        assert prefix + middle + suffix == text
        seen.add(order)
    assert seen == {"psm", "spm"}


def test_cuts_and_orders_have_their_probabilities() -> None:
    """Of texts of 3 characters: left alone with 1/4, else cut at a pair of U{0 .. 3}, in order SPM with 1/3."""
    letters = "abcdefghijklmnopqrstuvwxyzäöü"
    found: Counter[Any] = Counter()
    for text in map("".join, itertools.product(letters, repeat=3)):
        pieces = rearrange(text, fim_rate=0.75, spm_rate=1 / 3)
        if len(pieces) == 1:
            found["left alone"] += 1
        else:
            order, prefix, middle, _ = parts_of(pieces)
            found[order, len(prefix), len(prefix + middle)] += 1
    expected: Counter[Any] = Counter({"left alone": 0.25})
    for cuts in itertools.product(range(4), repeat=2):
        low, high = sorted(cuts)
        expected["psm", low, high] += 0.75 * 2 / 3 / 16
        expected["spm", low, high] += 0.75 * 1 / 3 / 16
    assert set(found) == set(expected)
    total = len(letters) ** 3
    assert stats.chisquare([found[x] for x in expected], [total * p for p in expected.values()]).pvalue > 1e-3


def test_the_text_and_the_seed_decide() -> None:
    text = "the quick brown fox"
    assert rearrange(text, fim_rate=1.0) == rearrange(text, fim_rate=1.0)
    assert rearrange(text, fim_rate=0.0) == (text,)
    assert len({rearrange(text, fim_rate=1.0, seed=seed) for seed in range(20)}) > 15
    # Other rates change what they are of and nothing else.
    assert rearrange(text, fim_rate=0.99) in ((text,), rearrange(text, fim_rate=1.0))
    orders = [parts_of(rearrange(text, fim_rate=1.0, spm_rate=rate)) for rate in (0.0, 1.0)]
    assert [order for order, *_ in orders] == ["psm", "spm"]
    assert orders[0][1:] == orders[1][1:]


# --- prepared data ---

MOVED = DocumentFillInMiddle(fim_rate=0.6)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("moved")
    file = write_blocks(folder / "corpus.txt", [*generated_documents(150), *(x.strip() for x in AWKWARD[1:3])])
    tokenizer = SentencePieceConfig(vocab_size=400, infilling_marks=True)
    return small_config(folder, file, tokenizer=tokenizer, fill_in_middle=MOVED)


def documents(dataset: Dataset, split: str) -> list[list[int]]:
    return [document.tolist() for document in dataset.documents(split)]


def restored(tokenizer: Tokenizer, document: list[int]) -> str:
    vocab = tokenizer.vocabulary
    assert vocab.fim_prefix is not None
    assert vocab.fim_suffix is not None
    assert vocab.fim_middle is not None
    marks = {"prefix_id": vocab.fim_prefix, "suffix_id": vocab.fim_suffix, "middle_id": vocab.fim_middle}
    return tokenizer.decode(noise.join_middle(document, **marks))


def check_prepared(config: DataConfig) -> None:
    plain, moved = (prepare(dataclasses.replace(config, fill_in_middle=x), quiet=True) for x in (None, MOVED))
    tokenizer = moved.tokenizer
    assert tokenizer.fingerprint == plain.tokenizer.fingerprint
    assert moved.fingerprint != plain.fingerprint
    for split in ("validation", "test"):
        assert documents(moved, split) == documents(plain, split)
        assert documents(moved, split)
    rearrangement = open_rearrangement(MOVED, tokenizer)
    count = 0
    for before, after in zip(documents(plain, "train"), documents(moved, "train"), strict=True):
        text = tokenizer.decode(before)
        assert restored(tokenizer, after) == text
        pieces = rearrangement(text)
        parts = [tokenizer.encode(piece).tolist() if isinstance(piece, str) else [piece] for piece in pieces]
        assert after == list(itertools.chain(*parts)), "each part by itself"
        count += after != before
    assert 0.4 < count / len(documents(plain, "train")) < 0.8
    assert moved.summary()["splits"]["train"]["bytes"] == plain.summary()["splits"]["train"]["bytes"]


def test_training_documents_alone_are_rearranged(config: DataConfig) -> None:
    check_prepared(config)


def test_marks_have_no_bytes_and_rows_are_packed(config: DataConfig) -> None:
    dataset = prepare(config, quiet=True)
    spec = RowSpec("packed", 32, suffix=(3,), fields=("token_bytes",))
    batch = next(iter(dataset.batches(spec, seed=0, batch_size=16)))
    marks = np.isin(batch["tokens"], [dataset.vocab.fim_prefix, dataset.vocab.fim_suffix, dataset.vocab.fim_middle])
    assert marks.any()
    assert not batch["token_bytes"][marks].any()


def test_the_workers_do_not_decide_and_the_settings_do(config: DataConfig, tmp_path: pathlib.Path) -> None:
    first = prepare(config, quiet=True)
    other = prepare(dataclasses.replace(config, workers=2, cache=str(tmp_path)), quiet=True)
    assert other.fingerprint == first.fingerprint
    assert documents(other, "train") == documents(first, "train")
    seen = {first.fingerprint}
    for changes in ({"fim_rate": 0.5}, {"spm_rate": 0.25}, {"seed": 1}):
        again = dataclasses.replace(config, fill_in_middle=dataclasses.replace(MOVED, **changes))
        seen.add(prepare(again, quiet=True).fingerprint)
    assert len(seen) == 4


def test_documents_held_out_in_files_stay_as_they_are(config: DataConfig, tmp_path: pathlib.Path) -> None:
    file = write_blocks(tmp_path / "held_out.txt", generated_documents(20, seed=9))
    held_out = HeldOut(files=(str(file),))
    check_prepared(dataclasses.replace(config, validation=held_out, test=held_out))


# --- refusals ---


def test_settings_that_are_refused() -> None:
    for settings, message in (
        ({"fim_rate": 1.5}, r"data\.fill_in_middle\.fim_rate is 1\.5; accepted: a probability"),
        ({"spm_rate": -0.5}, r"spm_rate is -0\.5"),
        ({"fim_rate": float("nan")}, "fim_rate is nan"),
    ):
        with pytest.raises(UserError, match=message):
            DocumentFillInMiddle(**settings)  # type: ignore[arg-type]


def test_documents_that_are_no_single_texts() -> None:
    pairs = JsonLines(files=("x.jsonl",), pair="answer")
    with pytest.raises(UserError, match=r"data\.source\.pair is 'answer', which makes each document two"):
        DataConfig(source=pairs, fill_in_middle=MOVED)
    mixture = MixtureSource(sources={"qa": WeightedSource(source=pairs)})
    with pytest.raises(UserError, match=r"data\.source\.sources\.qa\.source\.pair is 'answer'"):
        DataConfig(source=mixture, fill_in_middle=MOVED)
    with pytest.raises(UserError, match=r"data\.source\.name is 'conll', which has .*; accepted: a source of texts"):
        DataConfig(source=ConllFiles(files=("x.txt",)), fill_in_middle=MOVED)


def test_tokenizers_that_cannot_be(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    without = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, infilling_marks=False))
    with pytest.raises(UserError, match=r"data\.fill_in_middle needs <fim_prefix>.* data\.tokenizer\.infilling_marks"):
        prepare(without, quiet=True)
    tokenizer = prepare(config, quiet=True).tokenizer
    monkeypatch.setitem(tokenizer.__dict__, "lossless", False)
    with pytest.raises(UserError, match=r"the model of data\.tokenizer\.path normalises text"):
        open_rearrangement(MOVED, tokenizer)


def test_objectives_that_cannot_be(config: DataConfig) -> None:
    vocab = prepare(config, quiet=True).vocab
    plain = dataclasses.replace(config, fill_in_middle=None)
    for objective, message in (
        (FillInMiddle(), r"objective\.name is fill_in_middle, and both move the middle"),
        (MaskedLM(), r"which objective\.name=masked_lm does not; accepted: causal_lm"),
    ):
        rows = objective.rows(vocab, 64)
        with pytest.raises(UserError, match=message):
            check_infilling(objective, rows, config)
        check_infilling(objective, rows, plain)
    check_infilling(CausalLM(), CausalLM().rows(vocab, 64), config)


def test_the_order_in_which_a_model_is_asked(config: DataConfig) -> None:
    """PSM, unless it never saw it; a model that saw neither is not asked."""
    plain = dataclasses.replace(config, fill_in_middle=None)
    assert infilling_order(CausalLM(), plain) is None
    assert infilling_order(CausalLM(), config) == infilling_order(FillInMiddle(), plain) == "psm"
    assert infilling_order(FillInMiddle(spm_rate=1.0), plain) == "spm"
    assert infilling_order(FillInMiddle(fim_rate=0.0), plain) is None


def _everywhere(written: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, split, document: written(self, "train", document)


def _shorter(tokens: Callable[..., Any]) -> Callable[..., Any]:
    return lambda text, encoded: tokens(text, encoded)[: None if len(text) == 1 else -1]


def _swapped(call: Callable[..., Any]) -> Callable[..., Any]:
    def moved(self: Any, text: str) -> Any:
        pieces = call(self, text)
        return pieces if len(pieces) == 1 else (*pieces[:-1], pieces[-1][::-1])

    return moved


@pytest.mark.parametrize(
    "mutant",
    [
        Mutant("held-out documents too", _work.WriteShards, "_written", _everywhere),
        Mutant("the last token of those that are moved is lost", _work, "_tokens", _shorter),
        Mutant("the middle is turned round", Rearrangement, "__call__", _swapped),
    ],
    ids=str,
)
def test_mutants_are_noticed(
    monkeypatch: pytest.MonkeyPatch, mutant: Mutant, config: DataConfig, tmp_path: pathlib.Path
) -> None:
    fresh = dataclasses.replace(config, cache=str(tmp_path))
    assert_killed(monkeypatch, mutant, [lambda: check_prepared(fresh)])
