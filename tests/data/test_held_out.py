"""Splits that have documents of their own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from lmobj.batch import RowSpec
from lmobj.data import (
    CleaningConfig,
    DataConfig,
    HeldOut,
    MixtureSource,
    SentencePieceConfig,
    SeparatedValues,
    StdlibSource,
    TfdsSource,
    WeightedSource,
    prepare,
)
from lmobj.errors import UserError

SPEC = RowSpec("examples", 12, (4,), (5,), ("labels",))


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """Forty lines to train on, of three classes, and two other files."""
    lines = [f"{'abc'[i % 3]}\t{' '.join(str(i + j) for j in range(9))} text" for i in range(40)]
    (tmp_path / "train.tsv").write_text("\n".join(lines))
    (tmp_path / "dev.tsv").write_text("c\t1 2 3\na\t4 5\na\t4 5\n")
    (tmp_path / "test.tsv").write_text("b\t6 7 8\n")
    source = SeparatedValues(files=(str(tmp_path / "train.tsv"),), columns=("l", "t"), text="t", label="l")
    return DataConfig(
        source=source,
        tokenizer=SentencePieceConfig(vocab_size=300),
        clean=CleaningConfig(exact_duplicates=True),
        validation=HeldOut(files=(str(tmp_path / "dev.tsv"),)),
        test=HeldOut(files=(str(tmp_path / "test.tsv"),)),
        length=12,
        cache=str(tmp_path / "cache"),
    )


def test_each_split_is_its_own_file(config: DataConfig) -> None:
    dataset = prepare(config, quiet=True)
    read = {
        split: [dataset.tokenizer.decode(document).strip() for document in dataset.documents(split)]
        for split in ("train", "validation", "test")
    }
    assert len(read["train"]) == 40
    assert read["validation"] == ["1 2 3", "4 5", "4 5"], "in order, and none dropped as the double of another"
    assert read["test"] == ["6 7 8"]
    counts = {name: split["documents"] for name, split in dataset.summary()["splits"].items()}
    assert counts == {"train": 40, "validation": 3, "test": 1}
    # Their own folders know the classes a, c and b alone: ids are those of the training data all the same.
    (batch,) = dataset.batches(SPEC, split="validation", batch_size=4)
    np.testing.assert_array_equal(batch["labels"], [2, 0, 0, 0])
    (batch,) = dataset.batches(SPEC, split="test", batch_size=1)
    np.testing.assert_array_equal(batch["labels"], [1])


def test_what_is_held_out_is_part_of_the_fingerprint(config: DataConfig) -> None:
    dataset = prepare(config, quiet=True)
    another = prepare(dataclasses.replace(config, test=config.validation), quiet=True)
    assert dataset.fingerprint != another.fingerprint
    shares = prepare(dataclasses.replace(config, validation=0.0, test=0.0), quiet=True)
    assert shares.fingerprint not in (dataset.fingerprint, another.fingerprint)


def test_a_label_that_training_never_sees(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "test.tsv").write_text("b\t6 7 8\nd\t9\n")
    with pytest.raises(UserError, match=r"data\.test has the label 'd', which no .*; accepted: a, b, c"):
        prepare(config, quiet=True)


@pytest.mark.parametrize(
    ("source", "held", "message"),
    [
        (StdlibSource(), HeldOut(files=("x",)), r"data\.test has documents of its own, and data\.source is stdlib"),
        (MixtureSource(sources={"a": WeightedSource()}), HeldOut(files=("x",)), "data.source is mixture"),
        (TfdsSource(builder="b"), HeldOut(files=("x",)), r"data\.test\.split says"),
        (SeparatedValues(files=("x",)), HeldOut(split="x"), r"data\.test\.files says"),
        (SeparatedValues(files=("x",)), HeldOut(), r"data\.test\.files says"),
        (SeparatedValues(files=("x",)), HeldOut(files=("x",), split="x"), r"data\.test\.files says"),
    ],
)
def test_what_cannot_be_held_out(source: object, held: HeldOut, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DataConfig(source=source, test=held)  # type: ignore[arg-type]
