"""Augmentation: copies by hand, rates by chi-square, training documents alone, labels kept, fingerprints."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lmobj.batch import RowSpec
from lmobj.data import (
    Augmentation,
    DataConfig,
    Dataset,
    HeldOut,
    SentencePieceConfig,
    SeparatedValues,
    Synonyms,
    _augment,
    _work,
    prepare,
)
from lmobj.data._augment import Augmenter, open_augmenter
from lmobj.data._corpus import Document
from lmobj.errors import UserError
from tests.mutants import Mutant, assert_killed

WORDS = "cat\tFeline\ndog\thound\tpooch\nwell-known\tfamous\nisn't\tain't\nCat\tkitty\tFeline\n"


def augmenter(folder: pathlib.Path, paraphrases: str | None = None, **settings: Any) -> Augmenter:
    """Of the synonyms above, every word replaced unless the settings say otherwise."""
    (folder / "words.tsv").write_text(WORDS, encoding="utf-8")
    synonyms = Synonyms(str(folder / "words.tsv"), **{"rate": 1.0, **settings})
    return open_augmenter(Augmentation(synonyms, paraphrases))


def copies(make: Augmenter, *document: Any) -> list[Document]:
    return list(make(Document(*document), Counter()))


def test_words_become_their_synonyms(tmp_path: pathlib.Path) -> None:
    make = augmenter(tmp_path)
    assert make.synonyms["cat"] == ("Feline", "kitty"), "of both lines, each once"
    (copy,) = copies(make, "A WELL-KNOWN fact:  it Isn't\tknown, well_known", "category", 1.5)
    assert copy == Document("A FAMOUS fact:  it Ain't\tknown, well_known", "category", 1.5)
    (copy,) = copies(make, "dog, Dog and DOG.", None, "yes")
    first, second, third = copy.text.rstrip(".").replace(",", "").replace(" and", "").split()
    assert {first.lower(), second.lower(), third.lower()} <= {"hound", "pooch"}
    assert (first.islower(), second.istitle(), third.isupper()) == (True, True, True)
    assert (copy.pair, copy.label) == (None, "yes")


def test_words_are_replaced_at_the_rate_and_synonyms_alike(tmp_path: pathlib.Path) -> None:
    make = augmenter(tmp_path, rate=0.3, copies=20)
    every = [text.split() for text, _, _ in copies(make, " ".join(["dog", "tree"] * 100))]
    counts = Counter(word for words in every for word in words)
    assert counts["tree"] == 2000
    found = [counts[word] for word in ("dog", "hound", "pooch")]
    assert stats.chisquare(found, [1400, 300, 300]).pvalue > 1e-3
    places = np.array([[word != "dog" for word in words[::2]] for words in every])
    assert stats.chisquare(places.sum(axis=0)).pvalue > 1e-3, "at every place of a text"


def test_a_copy_depends_on_document_number_and_seed_alone(tmp_path: pathlib.Path) -> None:
    text = " ".join(["dog"] * 60)
    make = augmenter(tmp_path, rate=0.5, copies=3)
    three = copies(make, text)
    assert three == copies(make, text)
    assert len({copy.text for copy in three}) == 3
    assert three[:2] == copies(augmenter(tmp_path, rate=0.5, copies=2), text)
    one, other = (" ".join(each.split()[:40]) for each in (three[0].text, copies(make, text + " and more")[0].text))
    assert one != other
    assert copies(augmenter(tmp_path, rate=0.5, seed=1), text)[0] != three[0]


def test_paraphrases_by_text(tmp_path: pathlib.Path) -> None:
    table = {"one  two": ["a", " b "], "three": ["c"]}
    (tmp_path / "texts.json").write_text(json.dumps(table))
    make = open_augmenter(Augmentation(paraphrases=str(tmp_path / "texts.json")))
    assert copies(make, " one two\n", None, 3) == [Document("a", None, 3), Document("b", None, 3)]
    assert copies(make, "one two", "three") == [Document("a", "c"), Document("b", "three")]
    assert copies(make, "other", "three") == [Document("other", "c")]
    assert copies(make, "other") == []


# --- prepared data ---

SPEC = RowSpec("examples", 24, (4,), (5,), ("labels",))


def text_of(number: int) -> str:
    return f"the dog {number} is " + " ".join(str(number + j) for j in range(6))


@pytest.fixture
def config(tmp_path: pathlib.Path) -> DataConfig:
    """Sixty lines of three classes, of which shares are held out; every line has a paraphrase."""
    (tmp_path / "train.tsv").write_text("\n".join(f"{'abc'[i % 3]}\t{text_of(i)}" for i in range(60)))
    (tmp_path / "words.tsv").write_text("dog\thound\n")
    (tmp_path / "texts.tsv").write_text("".join(f"{text_of(i)}\tnumber {i} barks\n" for i in range(60)))
    source = SeparatedValues(files=(str(tmp_path / "train.tsv"),), columns=("l", "t"), text="t", label="l")
    return DataConfig(
        source=source,
        tokenizer=SentencePieceConfig(vocab_size=300),
        augment=Augmentation(
            Synonyms(str(tmp_path / "words.tsv"), rate=1.0, copies=2), paraphrases=str(tmp_path / "texts.tsv")
        ),
        validation=0.2,
        test=0.1,
        length=24,
        cache=str(tmp_path / "cache"),
    )


def texts(dataset: Dataset, split: str) -> list[str]:
    return [dataset.tokenizer.decode(document).strip() for document in dataset.documents(split)]


def check_training_alone(config: DataConfig) -> None:
    plain, more = (prepare(dataclasses.replace(config, augment=a), quiet=True) for a in (None, config.augment))
    assert more.tokenizer.fingerprint == plain.tokenizer.fingerprint
    for split in ("validation", "test"):
        assert texts(more, split) == texts(plain, split)
        assert len(texts(plain, split)) > 0
    expected, labels = [], []
    for text, label in zip(texts(plain, "train"), plain.reference(SPEC, "train"), strict=True):
        number = text.split()[2]
        copies = [*[text.replace("dog", "hound")] * 2, f"number {number} barks"]
        said = [text, *(copy for copy in copies if config.shares.split(copy) == "train")]
        expected, labels = expected + said, labels + [label] * len(said)
    assert texts(more, "train") == expected
    count = len(texts(plain, "train"))
    assert 2 * count < len(expected) <= 4 * count - any(config.shares), "some fall into what is held out by share"
    summary = more.summary()
    assert summary["augmented"] == {"synonyms": 2 * count, "paraphrases": count}
    assert summary["splits"]["train"]["documents"] == len(expected)
    assert "augmented" not in plain.summary()
    np.testing.assert_array_equal(more.reference(SPEC, "train"), labels)


def test_training_documents_alone_are_copied_with_their_labels(config: DataConfig) -> None:
    check_training_alone(config)


def test_documents_held_out_in_files_are_not_copied(config: DataConfig, tmp_path: pathlib.Path) -> None:
    (tmp_path / "dev.tsv").write_text(f"a\t{text_of(1)}\nb\t{text_of(70)}\n")
    held_out = HeldOut(files=(str(tmp_path / "dev.tsv"),))
    check_training_alone(dataclasses.replace(config, validation=held_out, test=held_out))


def test_what_copies_are_made_of_is_in_the_fingerprint(config: DataConfig, tmp_path: pathlib.Path) -> None:
    assert config.augment is not None
    assert config.augment.synonyms is not None
    first = prepare(config, quiet=True).fingerprint
    (tmp_path / "moved.tsv").write_text((tmp_path / "words.tsv").read_text())
    moved = dataclasses.replace(config.augment.synonyms, file=str(tmp_path / "moved.tsv"))

    def fingerprint(**changes: Any) -> str:
        augment = dataclasses.replace(config.augment, **changes)  # type: ignore[type-var]
        return prepare(dataclasses.replace(config, augment=augment), quiet=True).fingerprint

    assert fingerprint(synonyms=moved) == first
    seen = {first, prepare(dataclasses.replace(config, augment=None), quiet=True).fingerprint}
    (tmp_path / "moved.tsv").write_text("dog\tpooch\n")
    for changes in ({"synonyms": moved}, {"synonyms": dataclasses.replace(moved, seed=3)}, {"paraphrases": None}):
        assert fingerprint(**changes) not in seen
        seen.add(fingerprint(**changes))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("words.tsv", "dog\thound\nsunday\n", r"synonyms\.file: \S+words\.tsv:2 is 'sunday' with 0 replacements"),
        ("words.tsv", "hot dog\tsausage\n", r"words\.tsv:1 is 'hot dog'; accepted: single words"),
        ("words.tsv", "\n\n", r"words\.tsv has no entries"),
        ("words.tsv", b"dog\t\xff\n", r"words\.tsv is not UTF-8 at byte 4"),
        ("words.tsv", "zebra\tokapi\n", r"synonyms\.file is .* gives no training document another wording"),
        ("words.json", "[1]", r"words\.json holds a list; accepted: one object"),
        ("words.json", '{"dog": "hound"}', r"'hound' under 'dog'; accepted: a list of text"),
        ("words.json", "{", r"words\.json is no JSON"),
        ("none", "", r"synonyms\.file: no file matches"),
    ],
)
def test_tables_that_are_none(
    config: DataConfig, tmp_path: pathlib.Path, name: str, content: str | bytes, message: str
) -> None:
    if name != "none":
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    augment = Augmentation(Synonyms(str(tmp_path / name), rate=1.0))
    with pytest.raises(UserError, match=message):
        prepare(dataclasses.replace(config, augment=augment), quiet=True)


def test_settings_that_are_refused() -> None:
    for settings, message in (
        ({"file": " "}, r"synonyms\.file is ' '"),
        ({"rate": 0.0}, r"synonyms\.rate is 0\.0; accepted: above 0, at most 1"),
        ({"rate": float("nan")}, r"synonyms\.rate is nan"),
        ({"copies": 0}, r"synonyms\.copies is 0; accepted: 1 to 100"),
        ({"copies": 101}, r"synonyms\.copies is 101"),
    ):
        with pytest.raises(UserError, match=message):
            Synonyms(**{"file": "words.tsv", **settings})  # type: ignore[arg-type]
    for settings, message in (({}, "neither synonyms nor paraphrases"), ({"paraphrases": ""}, "paraphrases is ''")):
        with pytest.raises(UserError, match=message):
            Augmentation(**settings)


def _without_split(documents: Callable[..., Any]) -> Callable[..., Any]:
    def every(self: Any, part: Any, counts: Any, augmented: Any) -> Any:
        for split, document in self.selection.documents(part, counts):
            yield split, document
            yield from ((split, copy) for copy in (self.augmenter or (lambda *_: ()))(document, augmented))

    return every


def _unlabelled(call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, document, counts: (copy._replace(label="a") for copy in call(self, document, counts))


@pytest.mark.parametrize(
    "mutant",
    [
        Mutant("held-out documents too", _work.WriteShards, "_documents", _without_split),
        Mutant("labels lost", Augmenter, "__call__", _unlabelled),
        Mutant("texts by their spaces", _augment, "_plain", lambda _: lambda text: text),
        Mutant("capitals lost", _augment, "_capitalised", lambda _: lambda word, like: word),
        Mutant(
            "the first copy again", Augmenter, "_in_synonyms", lambda copy: lambda self, d, _, s: copy(self, d, 0, s)
        ),
    ],
    ids=str,
)
def test_mutants_are_noticed(
    monkeypatch: pytest.MonkeyPatch, mutant: Mutant, config: DataConfig, tmp_path: pathlib.Path
) -> None:
    by_hand = (
        test_words_become_their_synonyms,
        test_paraphrases_by_text,
        test_a_copy_depends_on_document_number_and_seed_alone,
    )
    checks = [lambda check=check: check(tmp_path) for check in by_hand]
    if mutant.name in ("held-out documents too", "labels lost"):
        checks = [lambda: check_training_alone(config)]
    assert_killed(monkeypatch, mutant, checks)
