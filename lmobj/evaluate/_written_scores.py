"""Texts that a model wrote beside those that it should have written: BLEU, chrF and ROUGE, by the field's libraries.

BLEU and chrF are those of a whole corpus, by sacrebleu, whose signatures say how. ROUGE is the mean over texts of F1 by
rouge-score, with its stemmer for English. All three are in [0, 100], as papers give them.

Source: Papineni et al. 2002, "BLEU: a Method for Automatic Evaluation of Machine Translation"; Post 2018, "A Call for
Clarity in Reporting BLEU Scores"; Popović 2015, "chrF: character n-gram F-score for automatic MT evaluation"; Lin 2004,
"ROUGE: A Package for Automatic Evaluation of Summaries".
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lmobj.errors import UserError
from lmobj.evaluate._task_report import ExampleScores, Record, TaskKind, TaskReport

__all__ = ["SEQUENCE_TO_SEQUENCE", "Words", "WrittenReference", "check_scores", "score_written"]

Words = Literal["13a", "intl", "zh", "char", "none"]
"""How BLEU finds words; see `WritingConfig.words`."""

_ROUGE = ("rouge1", "rouge2", "rougeL")
_NAMES = {"bleu": "BLEU", "chrf": "chrF", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}


@dataclass(frozen=True)
class WrittenReference:
    """What a split holds, text by text: what is read, and what should be written; and what words are."""

    sources: Sequence[str]
    targets: Sequence[str]
    words: Words = "13a"


@dataclass(frozen=True)
class WrittenScores:
    """figures: `bleu`, `chrf`, `rouge1`, `rouge2`, `rougeL` in [0, 100], and `exact_match`, the share of texts that are
    what they should be.
    signatures: how those but the last are computed, to be quoted with them.
    examples: of each text [length, true length, n-grams that match, n-grams] under `bleu`, for n = 1 .. 4 each, and its
      ROUGE scores.
    """

    figures: dict[str, float]
    signatures: dict[str, str]
    examples: list[Record]


def check_scores() -> None:
    """Refuses to go on without the packages that score texts.

    Raises:
      UserError: one is missing.
    """
    for package in ("sacrebleu", "rouge_score"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(
                "what an encoder with a decoder writes on held-out text is scored by BLEU, chrF and ROUGE, which need "
                f"the package {package}, missing here: pip install 'lmobj[scores]', or set writing.examples=0 to leave "
                "it out."
            ) from error


def score_written(written: Sequence[str], targets: Sequence[str], *, words: Words = "13a") -> WrittenScores:
    """Scores texts against those that should have been written, one for each.

    Args:
      written: by the model, at least one.
      targets: the true texts.
      words: what BLEU counts; and ROUGE too, where it is not `13a`: its own words are runs of a-z and 0-9.

    Raises:
      UserError: a package is missing.
    """
    check_scores()
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU, CHRF

    bleu, chrf, each_bleu = BLEU(tokenize=words), CHRF(), BLEU(tokenize=words, effective_order=True)
    english = words == "13a"
    rouge = RougeScorer(_ROUGE, use_stemmer=english, tokenizer=None if english else _Tokenizer(bleu.tokenizer))
    examples: list[Record] = []
    for text, target in zip(written, targets, strict=True):
        found = each_bleu.sentence_score(text, [target])
        scores = {name: 100 * score.fmeasure for name, score in rouge.score(target, text).items()}
        examples.append({"bleu": [found.sys_len, found.ref_len, *found.counts, *found.totals], **scores})
    figures = {
        "bleu": bleu.corpus_score(written, [targets]).score,
        "chrf": chrf.corpus_score(written, [targets]).score,
        **{name: float(np.mean([one[name] for one in examples])) for name in _ROUGE},
        "exact_match": float(np.mean([text == target for text, target in zip(written, targets, strict=True)])),
    }
    version = importlib.metadata.version("rouge-score")
    own = f"mean F1|{'stemmer:porter' if english else f'tok:{words}'}|version:{version}"
    signatures = {"bleu": str(bleu.get_signature()), "chrf": str(chrf.get_signature()), **dict.fromkeys(_ROUGE, own)}
    return WrittenScores(figures, signatures, examples)


class _Tokenizer:
    """sacrebleu's words for rouge-score."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def tokenize(self, text: str) -> list[str]:
        """Words in lower case, as rouge-score's own are."""
        words: list[str] = self._tokenizer(text.lower()).split()
        return words


def _report(outputs: Mapping[str, NDArray], classes: Sequence[str], reference: WrittenReference) -> TaskReport:
    """Of `written` [N], the texts."""
    written = list(outputs["written"])
    found = score_written(written, reference.targets, words=reference.words)

    def records() -> Iterator[Record]:
        texts = zip(reference.sources, reference.targets, written, found.examples, strict=True)
        for index, (source, target, text, scores) in enumerate(texts):
            yield {"index": index, "source": source, "target": target, "prediction": text, **scores}

    return TaskReport(
        figures=found.figures,
        header=("score", "value", "signature"),
        rows=[(_NAMES[name], found.figures[name], signature) for name, signature in found.signatures.items()],
        picture=None,
        records=records,
    )


def _copied(trained: WrittenReference | None, held_out: WrittenReference) -> dict[str, dict[str, float]]:
    """Sources as they are, which names, numbers and shared words make better than nothing."""
    return {"source copied": score_written(held_out.sources, held_out.targets, words=held_out.words).figures}


def _bleu(records: Sequence[Record]) -> ExampleScores:
    from sacrebleu.metrics import BLEU

    counts = np.array([one["bleu"] for one in records], np.float64)

    def statistic(means: NDArray[np.float64]) -> NDArray[np.float64]:
        sums = np.rint(means * len(counts)).astype(int).tolist()
        return np.array([BLEU.compute_bleu(each[2:6], each[6:], each[0], each[1]).score for each in sums])

    return ExampleScores(counts, statistic)


def _rouge(name: str) -> Any:
    return lambda records: ExampleScores(np.array([one[name] for one in records], np.float64))


SEQUENCE_TO_SEQUENCE = TaskKind(
    figures=(*_NAMES, "exact_match"),
    report=_report,
    baselines=_copied,
    scores={"bleu": _bleu, **{name: _rouge(name) for name in _ROUGE}},
)
