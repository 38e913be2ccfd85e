"""Data sets of examples in memory: what rows hold, splits and order, fingerprints, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmobj.batch import NO_TAG, RowSpec, row_arrays
from lmobj.cli._main import main
from lmobj.data import (
    CleaningConfig,
    ConllFiles,
    DataConfig,
    HeldOut,
    SegmentationConfig,
    SentencePieceConfig,
    SquadFiles,
    TextFiles,
)
from lmobj.data._tokenizer import train_tokenizer
from lmobj.errors import UserError
from lmobj.tasks import ExampleDataset, QuestionReference, TagReference, prepare_any

TAGGED = RowSpec("tagged", 16, (4,), (5,), ("tags",))
QUESTIONS = RowSpec("questions", 24, (4,), (5,), ("spans",))
ENGLISH = [
    "Ada/B-PER Lovelace/I-PER met/O Charles/B-PER Babbage/I-PER",
    "London/B-LOC is/O rainy/O",
    "antidisestablishmentarianism/O bores/O Ada/B-PER",
]
CHINESE = ["阿/B-PER 达/I-PER 在/O 伦/B-LOC 敦/I-LOC", "雨/O"]
CONTEXTS = {
    "english": "Ada Lovelace wrote the first program in London, and Charles Babbage built no engine for it.",
    "chinese": "阿达在伦敦写了第一个程序，巴贝奇没有造出机器。",  # noqa: RUF001
}


_TOKENIZER: dict[str, SentencePieceConfig] = {}


@pytest.fixture(scope="module", autouse=True)
def _tokenizer(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One for all, which spells what is not in these texts in bytes."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    texts = [*(sentence.replace("/", " ") for sentence in ENGLISH), *CONTEXTS.values()]
    train_tokenizer(SentencePieceConfig(vocab_size=360), texts).save(path)
    _TOKENIZER["loaded"] = SentencePieceConfig(path=str(path))


def conll(path: Path, sentences: Sequence[str]) -> tuple[str, ...]:
    """A file of sentences, each written as word/tag word/tag."""
    blocks = ["\n".join(pair.replace("/", "\t") for pair in sentence.split()) for sentence in sentences]
    path.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
    return (str(path),)


def asked(question: str, answer: str | None, context: str, **more: Any) -> dict[str, Any]:
    """A question of the format's, whose answer is looked for in the context."""
    answers = [] if answer is None else [{"text": answer, "answer_start": context.index(answer)}]
    return {"id": question, "question": question, "answers": answers, "is_impossible": answer is None, **more}


def squad(path: Path, articles: dict[str, list[tuple[str, list[dict[str, Any]]]]]) -> tuple[str, ...]:
    """A file of articles: title -> (context, questions) of each paragraph."""
    data = [
        {"title": title, "paragraphs": [{"context": context, "qas": qas} for context, qas in paragraphs]}
        for title, paragraphs in articles.items()
    ]
    path.write_text(json.dumps({"data": data}), encoding="utf-8")
    return (str(path),)


def config(source: Any, **settings: Any) -> DataConfig:
    given = {"tokenizer": _TOKENIZER["loaded"], "validation": 0.0, "test": 0.0, **settings}
    return DataConfig(source=source, **given)


def read(source: Any, **settings: Any) -> ExampleDataset[Any]:
    dataset = prepare_any(config(source, **settings), quiet=True)
    assert isinstance(dataset, ExampleDataset)
    return dataset


def tagged(tmp_path: Path, sentences: Sequence[str] = ENGLISH, **settings: Any) -> ExampleDataset[Any]:
    options = {name: settings.pop(name) for name in ("space", "subwords", "errors", "scheme") if name in settings}
    return read(ConllFiles(files=conll(tmp_path / "train.conll", sentences), **options), **settings)


def in_order(dataset: ExampleDataset[Any], spec: RowSpec) -> tuple[dict[str, Any], Any]:
    """All rows of training in the order of its examples, and the reference."""
    built = dataset._built(spec, "train")
    return built.arrays, built.reference


# --- rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subwords", ["first", "all"])
@pytest.mark.parametrize(("sentences", "space"), [(ENGLISH, " "), (CHINESE, "")], ids=["english", "chinese"])
def test_rows_of_tagged_words(tmp_path: Path, sentences: list[str], space: str, subwords: Any) -> None:
    spec = dataclasses.replace(TAGGED, length=48)
    dataset = tagged(tmp_path, sentences, space=space, subwords=subwords)
    arrays, reference = in_order(dataset, spec)
    assert isinstance(reference, TagReference)
    names = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
    assert dataset.classes == names
    split_words = 0
    for row, sentence in enumerate(sentences):
        pairs = [pair.split("/") for pair in sentence.split()]
        there = arrays["segment_ids"][row] > 0
        tokens, tags = arrays["tokens"][row][there], arrays["tags"][row][there]
        assert (tokens[0], tokens[-1]) == (4, 5)
        np.testing.assert_array_equal(arrays["positions"][row][there], np.arange(len(tokens)))
        assert dataset.tokenizer.decode(tokens[1:-1]) == space.join(word for word, _ in pairs)
        words = reference.word_ids[row]
        assert (arrays["tags"][row][words < 0] == NO_TAG).all()
        for number, (word, tag) in enumerate(pairs):
            places = np.flatnonzero(words == number)
            assert dataset.tokenizer.decode(arrays["tokens"][row][places]).strip() == word
            assert names[arrays["tags"][row][places[0]]] == tag
            rest = [NO_TAG if subwords == "first" else names.index(tag.replace("B-", "I-"))] * (len(places) - 1)
            assert arrays["tags"][row][places[1:]].tolist() == rest
            split_words += len(places) > 1
        assert (tags != NO_TAG).sum() == (len(pairs) if subwords == "first" else len(tokens) - 2)
        assert (arrays["tokens"][row][~there] == 0).all()
    assert split_words > 0, "some words have several subwords"
    given = [sentence.split() for sentence in sentences]
    assert reference.word_tags(arrays["tags"]) == [[pair.split("/")[1] for pair in pairs] for pairs in given]


@pytest.mark.parametrize("language", ["english", "chinese"])
def test_rows_of_questions(tmp_path: Path, language: str) -> None:
    context = CONTEXTS[language]
    texts = ["Charles Babbage", "London"] if language == "english" else ["巴贝奇", "伦敦"]
    qas = [asked(f"q {text}", text, context) for text in texts] + [asked("nothing", None, context)]
    source = SquadFiles(files=squad(tmp_path / "train.json", {"": [(context, qas)]}), stride=6, max_question=4)
    dataset = read(source)
    arrays, reference = in_order(dataset, QUESTIONS)
    assert isinstance(reference, QuestionReference)
    assert [one.question.question for one in reference.asked] == ["q " + text for text in texts] + ["nothing"]
    row, held = 0, 0
    for one in reference.asked:
        covered = np.zeros(len(one.offsets), bool)
        for window in range(len(one.windows.tokens)):
            tokens, types = arrays["tokens"][row], arrays["token_types"][row]
            first = np.flatnonzero(tokens == 5)[0]
            assert one.question.question.startswith(dataset.tokenizer.decode(tokens[1:first]))
            assert (types[: first + 1] == 0).all()
            index = one.windows.context_index[window]
            start, end = arrays["spans"][row]
            if end:
                held += 1
                begin, stop = one.offsets[index[start]][0], one.offsets[index[end]][1]
                assert context[begin:stop].strip(" ,.，。") == one.question.answers[0].text  # noqa: RUF001
                assert dataset.tokenizer.decode(tokens[start : end + 1]) == context[begin:stop]
            covered[index[index >= 0]] = True
            row += 1
        assert covered.all()
        assert one.question.answers or not arrays["spans"][row - len(one.windows.tokens) : row].any()
    assert row == len(arrays["tokens"]) > len(qas), "contexts have several windows"
    assert held >= 2


def test_batches_have_the_arrays_that_the_rows_promise(tmp_path: Path) -> None:
    dataset = tagged(tmp_path)
    (batch,) = dataset.batches(TAGGED, batch_size=2, steps=1)
    assert {name: (x.dtype.name, x.shape[1:]) for name, x in batch.items()} == dict(row_arrays(TAGGED))
    context = CONTEXTS["english"]
    source = SquadFiles(files=squad(tmp_path / "s.json", {"": [(context, [asked("q", "Ada", context)])]}))
    (batch,) = read(source).batches(QUESTIONS, batch_size=2, steps=1)
    assert {name: (x.dtype.name, x.shape[1:]) for name, x in batch.items()} == dict(row_arrays(QUESTIONS))


# --- what does not fit --------------------------------------------------------------------------------------------


def test_sentences_are_cut_and_the_person_is_told(tmp_path: Path) -> None:
    dataset = tagged(tmp_path, ["one/O two/O three/O", "aa/B-X bb/O " * 20])
    spec = dataclasses.replace(TAGGED, length=30)
    arrays, reference = in_order(dataset, spec)
    assert arrays["tokens"][1, -1] == 5, "a cut sentence ends with [SEP] all the same"
    kept = reference.word_ids[1].max() + 1
    (note,) = dataset.notes(spec, "train")
    assert note == (
        "train: sentences that are longer than a row (data.length is 30): 1 of 2; words at their ends that are not "
        f"read and count as O: {40 - kept}."
    )
    assert reference.word_tags(arrays["tags"])[1] == ["B-X", "O"] * (kept // 2) + ["B-X"] * (kept % 2) + ["O"] * (
        40 - kept
    )
    assert dataset.notes(dataclasses.replace(spec, length=200), "train") == ()


def test_what_is_lost_of_questions_is_told(tmp_path: Path) -> None:
    context = CONTEXTS["english"]
    qas = [asked("which city is it that she wrote in?", "London", context), asked("where?", context, context)]
    files = squad(tmp_path / "train.json", {"": [(context, qas)]})
    dataset = read(SquadFiles(files=files, stride=4, max_question=7))
    assert dataset.notes(QUESTIONS, "train") == (
        "train: questions that are cut after 7 tokens (data.source.max_question): 1 of 2.",
        "train: questions whose answer no window holds whole (data.length is 24), so that their rows say that there is "
        "none: 1 of 2.",
    )
    roomy = dataclasses.replace(QUESTIONS, length=200)
    assert read(SquadFiles(files=files)).notes(roomy, "train") == ()


# --- order and splits ---------------------------------------------------------------------------------------------

NUMBERED = [f"word{i}/O x/B-X" for i in range(11)]


def numbers(dataset: ExampleDataset[Any], seed: int, epoch: int) -> list[int]:
    """Which sentence each row of an epoch holds."""
    rows = dataset.rows(TAGGED, seed=seed, batch_size=3)
    every, _ = in_order(dataset, TAGGED)
    read = [rows.row(11 * epoch + i)["tokens"][0] for i in range(11)]
    return [int(np.flatnonzero((every["tokens"] == row).all(1))[0]) for row in read]


def test_training_rows_come_in_another_order_in_each_epoch(tmp_path: Path) -> None:
    dataset = tagged(tmp_path, NUMBERED)
    orders = [numbers(dataset, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(11)) for order in orders)
    assert len({tuple(order) for order in [*orders, range(11)]}) == 5, "all of them differ"
    assert numbers(tagged(tmp_path, NUMBERED), 1, 1) == orders[3], "and are the same for the next process"
    first = list(dataset.batches(TAGGED, seed=1, batch_size=3, steps=6))
    later = list(dataset.batches(TAGGED, seed=1, batch_size=3, start=4, steps=2))
    for a, b in zip(first[4:], later, strict=True):
        assert all((a[name] == b[name]).all() for name in a)
    ids = np.concatenate([batch["row_ids"] for batch in first])
    np.testing.assert_array_equal(ids, np.stack([np.zeros(18), np.arange(18)], axis=1))
    (local,) = dataset.batches(TAGGED, seed=1, batch_size=3, steps=1, local=[2, 0])
    np.testing.assert_array_equal(local["tokens"], first[0]["tokens"][[2, 0]])


def test_held_out_rows_come_once_in_order_and_empty_ones_fill_the_last_batch(tmp_path: Path) -> None:
    held_out = HeldOut(files=conll(tmp_path / "dev.conll", ENGLISH))
    dataset = tagged(tmp_path, validation=held_out)
    batches = list(dataset.batches(TAGGED, split="validation", batch_size=2))
    assert len(batches) == 2
    expected, _ = in_order(dataset, TAGGED)  # the same sentences
    for name in ("tokens", "tags", "segment_ids", "positions"):
        np.testing.assert_array_equal(np.concatenate([batch[name] for batch in batches])[:3], expected[name])
    empty = {name: batches[1][name][1] for name in ("tokens", "segment_ids", "tags")}
    assert (empty["tokens"].max(), empty["segment_ids"].max(), empty["tags"].max()) == (0, 0, NO_TAG)
    rows = dataset.rows(TAGGED, split="validation", batch_size=2)
    assert rows.steps_per_epoch == 2


def test_shares_keep_articles_together(tmp_path: Path) -> None:
    def paragraph(title: str, number: int) -> tuple[str, list[dict[str, Any]]]:
        context = f"{title} has the number {number} in it."
        return context, [asked(f"{title} {number} {i}", str(number), context) for i in range(2)]

    articles = {f"T{i}": [paragraph(f"T{i}", number) for number in range(3)] for i in range(30)}
    files = squad(tmp_path / "train.json", articles)
    dataset = read(SquadFiles(files=files), validation=0.3, test=0.2)
    titles = {split: {question.title for question in found} for split, found in dataset.splits.items()}
    assert all(len(found) == 6 * len(titles[split]) for split, found in dataset.splits.items())
    assert sum(map(len, titles.values())) == 30
    assert all(len(found) >= 2 for found in titles.values())
    untitled = {"": [paragraph(f"T{i}", 0) for i in range(30)]}
    dataset = read(SquadFiles(files=squad(tmp_path / "train.json", untitled)), validation=0.3)
    contexts = {split: {question.context for question in found} for split, found in dataset.splits.items()}
    assert sum(map(len, contexts.values())) == 30, "without titles, paragraphs stay together"
    assert contexts["validation"]


def test_each_split_is_its_own_file(tmp_path: Path) -> None:
    held_out = {
        "validation": HeldOut(files=conll(tmp_path / "dev.conll", ["Ada/B-PER is/O"])),
        "test": HeldOut(files=conll(tmp_path / "test.conll", ["is/O", "London/B-LOC rainy/O"])),
    }
    dataset = tagged(tmp_path, **held_out)
    assert {split: len(found) for split, found in dataset.splits.items()} == {"train": 3, "validation": 1, "test": 2}
    (batch,) = dataset.batches(TAGGED, split="validation", batch_size=1)
    assert batch["tags"].max() == dataset.classes.index("B-PER"), "ids are those of the training tags"
    counts = dataset.summary()["splits"]
    assert counts["validation"] == {
        "documents": 1,
        "tokens": sum(len(text) for text in dataset.documents("validation")),
        "bytes": len("Ada is"),
    }
    assert counts["test"]["documents"] == 2


def test_contexts_of_several_questions_count_once(tmp_path: Path) -> None:
    context = CONTEXTS["english"]
    qas = [asked("a", "Ada", context), asked("b", "London", context)]
    dataset = read(SquadFiles(files=squad(tmp_path / "train.json", {"": [(context, qas)]})))
    assert dataset.summary()["splits"]["train"]["bytes"] == len(context) + 2


# --- fingerprints -------------------------------------------------------------------------------------------------


def test_equal_fingerprints_are_equal_batches(tmp_path: Path) -> None:
    here = tagged(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    elsewhere = tagged(tmp_path / "elsewhere")
    assert here.fingerprint == elsewhere.fingerprint, "a path is nothing of the data"
    moved = conll(tmp_path / "dev.conll", ENGLISH[:1])
    trained = SentencePieceConfig(vocab_size=300)
    others = [
        here,
        tagged(tmp_path, [*ENGLISH, "one/O more/O"]),
        tagged(tmp_path, subwords="all"),
        tagged(tmp_path, test=0.2),
        tagged(tmp_path, validation=HeldOut(files=moved)),
        tagged(tmp_path, test=HeldOut(files=moved)),
        tagged(tmp_path, tokenizer=trained),
    ]
    assert len({dataset.fingerprint for dataset in others}) == len(others)


# --- what is left out and what is refused -------------------------------------------------------------------------


def test_what_is_skipped_is_counted(tmp_path: Path) -> None:
    dataset = tagged(tmp_path, [*ENGLISH, "Ada/I-PER", "x/O y/I-LOC"], errors="skip")
    assert dataset.summary()["skipped"] == 2
    assert len(dataset.splits["train"]) == 3
    context = CONTEXTS["english"]
    off = {"id": "off", "question": "who?", "answers": [{"text": "Ada", "answer_start": 3}]}
    one_off = {**off, "answers": [*off["answers"], {"text": "Ada", "answer_start": 0}]}
    files = squad(tmp_path / "s.json", {"": [(context, [off, one_off]), ("  ", [asked("empty", None, "  ")])]})
    dataset = read(SquadFiles(files=files, errors="skip"))
    assert dataset.summary()["skipped"] == 2, "a question all of whose answers are off, and one without a context"
    assert [question.answers[0].start for question in dataset.splits["train"]] == [0]


def test_files_that_are_refused(tmp_path: Path) -> None:
    held_out = HeldOut(files=conll(tmp_path / "dev.conll", ["Ada/B-PER", "sky/B-COLOUR"]))
    with pytest.raises(UserError, match=r"data\.validation: the sentence at line 3 has a tag .*'B-COLOUR'"):
        tagged(tmp_path, validation=held_out).rows(TAGGED, split="validation", batch_size=1)
    with pytest.raises(
        UserError, match=r"(?s)the sentence at .*train\.conll:3 breaks its scheme.*I-PER.*data\.source\.errors=skip"
    ):
        tagged(tmp_path, ["Ada/B-PER", "Ada/I-PER"])
    context = CONTEXTS["english"]
    off = {"id": "q7", "question": "who?", "answers": [{"text": "Ada", "answer_start": 3}]}
    files = squad(tmp_path / "s.json", {"": [(context, [asked("fine", "London", context), off])]})
    with pytest.raises(
        UserError, match=r"s\.json: data\[0\].*\.qas\[1\].* \(id q7\) .*at 3, .*data\.source\.errors=skip"
    ):
        read(SquadFiles(files=files))
    with pytest.raises(
        UserError, match=r"train\.conll:1 has 2 columns, and words are in column 0 and tags in column 3"
    ):
        read(ConllFiles(files=conll(tmp_path / "train.conll", ENGLISH), tag_column=3))
    with pytest.raises(UserError, match=r"data\.source\.files: no file matches"):
        read(ConllFiles(files=(str(tmp_path / "none"),)))
    with pytest.raises(UserError, match=r"data\.test\.files: no file matches"):
        tagged(tmp_path, test=HeldOut(files=(str(tmp_path / "none"),)))
    with pytest.raises(UserError, match=r"data\.source has no training examples, of 0 examples in all and 1 left out"):
        tagged(tmp_path, ["Ada/I-PER"], errors="skip")
    with pytest.raises(UserError, match=r"data\.validation is 0\.001, but none of the 3 examples fell into that share"):
        tagged(tmp_path, validation=0.001)


def test_settings_that_are_refused(tmp_path: Path) -> None:
    for settings, key in (
        ({"clean": CleaningConfig(exact_duplicates=True)}, "clean"),
        ({"segment": SegmentationConfig(language="zh")}, "segment"),
    ):
        with pytest.raises(
            UserError, match=rf"data\.{key} changes or divides texts, .*'conll'.*; accepted: no data\.{key}"
        ):
            tagged(tmp_path, **settings)
    dataset = tagged(tmp_path)
    with pytest.raises(UserError, match=r"data\.length is 2, which leaves no room for words; accepted: 3 or more"):
        dataset.rows(dataclasses.replace(TAGGED, length=2), batch_size=1)
    with pytest.raises(UserError, match=r"layout 'questions' with spans, .* is 'conll', which has sentences of tagged"):
        dataset.rows(QUESTIONS, batch_size=1)
    with pytest.raises(UserError, match=r"layout 'tagged' with labels"):
        dataset.rows(dataclasses.replace(TAGGED, fields=("labels",)), batch_size=1)
    with pytest.raises(UserError, match=r"RowSpec\.source is 'x'; accepted: null"):
        dataset.rows(dataclasses.replace(TAGGED, source="x"), batch_size=1)
    with pytest.raises(UserError, match=r"the split is 'dev'; accepted: train, validation, test"):
        dataset.rows(TAGGED, split="dev", batch_size=1)
    with pytest.raises(UserError, match=r"the validation split holds no examples; accepted: a larger data\.validation"):
        dataset.rows(TAGGED, split="validation", batch_size=1)
    with pytest.raises(UserError, match="the batch size is 0; accepted: 1 or more"):
        dataset.rows(TAGGED, batch_size=0)
    context = CONTEXTS["english"]
    source = SquadFiles(files=squad(tmp_path / "s.json", {"": [(context, [asked("long question", "Ada", context)])]}))
    questions = read(source)
    with pytest.raises(
        UserError, match=r"data\.length is 8 and data\.source\.max_question 64, .*'long question' of data"
    ):
        questions.rows(dataclasses.replace(QUESTIONS, length=8), batch_size=1)
    with pytest.raises(UserError, match=r"layout 'tagged' with tags, .*'squad', which has questions with answers"):
        questions.rows(TAGGED, batch_size=1)


def test_objectives_for_tasks_are_told_what_data_they_need(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words here\n\n" * 20)
    texts = prepare_any(config(TextFiles(files=(str(tmp_path / "a.txt"),)), cache=str(tmp_path / "cache")), quiet=True)
    for spec, name in ((TAGGED, "conll"), (QUESTIONS, "squad")):
        with pytest.raises(UserError, match=rf"data of data\.source has texts; accepted: data\.source\.name={name}"):
            texts.rows(spec, batch_size=1)


def test_prepare_prints_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = conll(tmp_path / "train.conll", [*ENGLISH, "Ada/I-PER"])
    (tmp_path / "config.yaml").write_text(
        "data:\n"
        f"  source: {{name: conll, files: [{files[0]}], errors: skip}}\n"
        "  tokenizer: {vocab_size: 320}\n  validation: 0\n  test: 0\n"
        "model: {name: encoder, layers: 1, width: 16, heads: 2}\n"
        "objective: {name: token_classification, classes: 5}\n"
    )
    assert main(["prepare", str(tmp_path / "config.yaml"), "-q"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["split", "documents", "tokens", "bytes"]
    size = sum(len(" ".join(pair.split("/")[0] for pair in sentence.split())) for sentence in ENGLISH)
    assert (rows[1][0], rows[1][1], rows[1][3]) == ("train", "3", str(size))
    assert rows[-1] == ["skipped", "1", "", ""]
    assert main(["prepare", str(tmp_path / "config.yaml"), "-q", "--beam"]) == 2
    assert "--beam prepares texts, and data.source.name is 'conll'" in capsys.readouterr().err
