"""Report of token classification: entities by type."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lmobj.evaluate._entity_scores import score_entities
from lmobj.evaluate._task_report import Record, TaskKind, TaskReport, f1_of_counts
from lmobj.tasks import TagReference, decode_tags

__all__ = ["TOKEN_CLASSIFICATION"]


def _report(outputs: Mapping[str, NDArray], classes: Sequence[str], reference: TagReference) -> TaskReport:
    """Of `logits` [n, L, C] of the first n sentences: precision, recall and F1 of entities, by type and in all."""
    given = reference.word_tags(np.argmax(outputs["logits"], axis=-1))
    sentences = reference.sentences[: len(given)]
    report = score_entities([sentence.tags for sentence in sentences], given, reference.scheme)

    def records() -> Iterator[Record]:
        for index, (sentence, tags) in enumerate(zip(sentences, given, strict=True)):
            true, found = (set(decode_tags(each, reference.scheme)) for each in (sentence.tags, tags))
            counts = [len(true), len(found), len(true & found)]
            yield {
                "index": index,
                "words": sentence.words,
                "target": sentence.tags,
                "prediction": tags,
                "entities": counts,
            }

    overall = report.overall
    return TaskReport(
        figures={"entity_f1": overall.f1, "entity_precision": overall.precision, "entity_recall": overall.recall},
        header=("entity", "precision", "recall", "F1", "true", "found"),
        rows=[(name, *score[:5]) for name, score in [*report.by_type.items(), ("all", overall)]],
        picture=None,
        records=records,
    )


def _most_frequent_tags(trained: TagReference, held_out: TagReference) -> dict[str, dict[str, float]]:
    """Each word has the tag that it has most often in training; a word that is not there is O."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for sentence in trained.sentences:
        for word, tag in zip(sentence.words, sentence.tags, strict=True):
            counts[word][tag] += 1
    most = {word: max(sorted(tags), key=tags.__getitem__) for word, tags in counts.items()}
    given = [[most.get(word, "O") for word in sentence.words] for sentence in held_out.sentences]
    overall = score_entities([sentence.tags for sentence in held_out.sentences], given, held_out.scheme).overall
    return {"most frequent tag of each word": {"entity_f1": overall.f1}}


TOKEN_CLASSIFICATION = TaskKind(
    figures=("entity_f1", "entity_precision", "entity_recall"),
    report=_report,
    baselines=_most_frequent_tags,
    scores={"entity_f1": f1_of_counts("entities")},
)
