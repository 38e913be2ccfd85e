"""How each kind of task reads files and says of every example what the model does, as a line of JSON."""

from __future__ import annotations

import abc
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, softmax

from lmobj.data import MixtureSource, StdlibSource, Tally, TextFiles, find_inputs, open_corpus, text_rows
from lmobj.errors import UserError
from lmobj.evaluate import answer_questions
from lmobj.objectives import Task
from lmobj.tasks import ExampleDataset, MultipleChoice, Question, Relation, TaggedSentence, decode_tags
from lmobj.train.trained import TrainedRun

__all__ = ["Predictor", "predictor"]

_DIGITS = 6
"""Of probabilities and scores."""

Line = dict[str, Any]
Text = tuple[str, str | None]


class Predictor(abc.ABC):
    """Of one task, over the files of `--input`."""

    size: int
    """Bytes of the files."""

    @property
    @abc.abstractmethod
    def read(self) -> int:
        """Bytes of them that were read."""

    @abc.abstractmethod
    def examples(self) -> Iterator[Any]:
        """The examples, in order; read as they are asked for."""

    @abc.abstractmethod
    def lines(self, examples: Sequence[Any]) -> Iterator[Line]:
        """What the model says of each of some examples, at most as many as rows of a training batch."""


def predictor(trained: TrainedRun, inputs: Sequence[str]) -> Predictor:
    """That of a run's task.

    Raises:
      UserError: a run that trained no task, or files that cannot be read.
    """
    objective = trained.assembly.objective
    if objective.task not in _PREDICTORS:
        name = getattr(objective, "name", type(objective).__name__)
        raise UserError(
            f"the objective of this run is {name}, which says nothing about single examples; accepted: a run of "
            f"{', '.join(_PREDICTORS)}."
        )
    return _PREDICTORS[objective.task](trained, inputs)


class Texts(Predictor):
    """`text` (and `pair`), and `label` (of several, `labels`: those with a probability of 1/2 or more) with
    `probabilities` by the names of the classes, or `score`."""

    def __init__(self, trained: TrainedRun, inputs: Sequence[str]) -> None:
        self._trained = trained
        self._corpus = open_corpus(_text_source(trained, inputs), os.cpu_count() or 1, "--input")
        self._tally = Tally()
        self.size = self._corpus.size

    @property
    def read(self) -> int:
        return self._tally.read

    def examples(self) -> Iterator[Text]:
        return ((document.text, document.pair) for document in self._corpus.documents(self._tally))

    def lines(self, examples: Sequence[Text]) -> Iterator[Line]:
        run = self._trained.assembly
        rows = text_rows(examples, self._trained.tokenizer, run.spec, run.spec.length, key="data.length")
        count, length = rows.tokens.shape
        arrays = {
            name: np.zeros((count, run.spec.length), np.int32) for name in ("tokens", "segment_ids", "token_types")
        }
        for name, values in (("tokens", rows.tokens), ("segment_ids", rows.segments), ("token_types", rows.types)):
            arrays[name][:, :length] = values
        arrays["tokens"][arrays["segment_ids"] == 0] = run.vocab.pad
        arrays["token_types"][arrays["segment_ids"] == 0] = 0
        arrays["positions"] = np.arange(run.spec.length) * arrays["segment_ids"]
        outputs = _outputs(self._trained, arrays)
        for index, (text, pair) in enumerate(examples):
            line: Line = {"text": text} if pair is None else {"text": text, "pair": pair}
            if "scores" in outputs:
                yield {**line, "score": round(float(outputs["scores"][index]), _DIGITS)}
            elif run.objective.task == "multi_label":
                p = expit(outputs["logits"][index].astype(np.float64))
                labels = [name for name, x in zip(run.dataset.classes, p, strict=True) if x >= 0.5]
                yield {**line, "labels": labels, "probabilities": _named(p, run.dataset.classes)}
            else:
                yield {**line, **_told(outputs["logits"][index], run.dataset.classes)}


class Targets(Texts):
    """`text`, and what is written for it as `prediction` with its `log_probability` in nats."""

    def lines(self, examples: Sequence[Text]) -> Iterator[Line]:
        writer = self._trained.writer
        assert writer is not None  # it is the objective's task
        written = writer.write_texts([text for text, _ in examples], writer.decoding)
        for (text, _), (best, *_) in zip(examples, written, strict=True):
            total = round(float(best.log_probs.sum(dtype=np.float64)), _DIGITS)
            yield {"text": text, "prediction": best.text, "log_probability": total}


class _Examples(Predictor):
    """Of examples of a `Kind`, which are read without their labels."""

    def __init__(self, trained: TrainedRun, inputs: Sequence[str]) -> None:
        data = trained.assembly.dataset
        assert isinstance(data, ExampleDataset)
        self._trained, self._data = trained, data
        self._files = find_inputs("--input", inputs, workers=2)
        self.size = sum(file.size for file in self._files)
        self._read = 0

    @property
    def read(self) -> int:
        return self._read

    def examples(self) -> Iterator[Any]:
        for file in self._files:
            yield from self._data.kind.read_unlabelled(file.name)
            self._read += file.size

    def _predicted(self, examples: Sequence[Any]) -> tuple[dict[str, NDArray], Any]:
        """The outputs of the examples' rows, and the reference that turns them into answers."""
        built = self._data.kind.rows(
            examples, self._data.classes, self._data.tokenizer, self._trained.assembly.spec, "--input"
        )
        size = self._trained.assembly.config.train.batch_size
        found = [
            _outputs(self._trained, {name: x[start : start + size] for name, x in built.arrays.items()})
            for start in range(0, len(built.arrays["tokens"]), size)
        ]
        return {name: np.concatenate([each[name] for each in found]) for name in found[0]}, built.reference


class Sentences(_Examples):
    """`words`, their `tags`, and `entities` as [type, first word, the one after the last]."""

    def lines(self, examples: Sequence[TaggedSentence]) -> Iterator[Line]:
        outputs, reference = self._predicted(examples)
        every = reference.word_tags(np.argmax(outputs["logits"], axis=-1))
        for sentence, tags in zip(examples, every, strict=True):
            entities = [list(entity) for entity in decode_tags(tags, reference.scheme)]
            yield {"words": sentence.words, "tags": tags, "entities": entities}


class Choices(_Examples):
    """`context`, `choices`, the place of the best as `label`, and `probabilities` in their order."""

    def lines(self, examples: Sequence[MultipleChoice]) -> Iterator[Line]:
        outputs, _ = self._predicted(examples)
        for example, logits in zip(examples, outputs["logits"], strict=True):
            p = softmax(logits[: len(example.choices)].astype(np.float64))
            said = {"label": int(np.argmax(p)), "probabilities": p.round(_DIGITS).tolist()}
            yield {"context": example.context, "choices": example.choices, **said}


class Relations(_Examples):
    """`text`, `head`, `tail`, and `label` with `probabilities` by the names of the relations."""

    def lines(self, examples: Sequence[Relation]) -> Iterator[Line]:
        outputs, _ = self._predicted(examples)
        for example, logits in zip(examples, outputs["logits"], strict=True):
            where = {"text": example.text, "head": example.head, "tail": example.tail}
            yield {**where, **_told(logits, self._data.classes)}


class Questions(_Examples):
    """`id`, `question` and `answer`; `score` and `probability` of the best span, answered or not, and `null_odds`: how
    much better no answer is. A context without text has no span, and these are null."""

    def lines(self, examples: Sequence[Question]) -> Iterator[Line]:
        with_text = [question for question in examples if question.context.strip()]
        answers = iter(self._answers(with_text) if with_text else ())
        for question in examples:
            said = next(answers) if question.context.strip() else _NOTHING
            yield {"id": question.id, "question": question.question, **said}

    def _answers(self, questions: Sequence[Question]) -> Iterator[Line]:
        outputs, reference = self._predicted(questions)
        _, every = answer_questions(outputs["start_logits"], outputs["end_logits"], reference)
        for found in every:
            best = found.spans[0] if found.spans else None
            yield {
                "answer": found.answer(reference.source.null_threshold),
                "score": round(best.score, _DIGITS) if best else None,
                "probability": round(best.probability, _DIGITS) if best else None,
                "null_odds": round(found.null_odds, _DIGITS) if best else None,
            }


_NOTHING: Line = {"answer": "", "score": None, "probability": None, "null_odds": None}


def _text_source(trained: TrainedRun, inputs: Sequence[str]) -> Any:
    """The run's source, with other files and without labels, or without second texts where these are to be written."""
    source: Any = trained.assembly.config.data.source
    if isinstance(source, MixtureSource | StdlibSource | TextFiles) or not hasattr(source, "files"):
        raise UserError(f"data.source of this run is {source.name}; accepted: a run that read records from files.")
    written = {"pair": None} if trained.assembly.objective.task == "sequence_to_sequence" else {}
    return dataclasses.replace(source, files=tuple(inputs), label=None, **written)


def _outputs(trained: TrainedRun, arrays: Mapping[str, NDArray]) -> dict[str, NDArray]:
    """What the model puts out for some rows, at most as many as those of a training batch, which empty ones fill."""
    run = trained.assembly
    filled = {name: np.zeros(x.shape, x.dtype) for name, x in run.abstract_batch.items()}
    filled["tokens"][:] = run.vocab.pad
    for name, values in arrays.items():
        filled[name][: len(values)] = values
    outputs = jax.device_get(run.eval_step(trained.state, filled)[2])
    return {name: np.asarray(x)[: len(arrays["tokens"])] for name, x in outputs.items()}


def _told(logits: NDArray, classes: Sequence[str]) -> Line:
    """The best class, and the probabilities of all."""
    p = softmax(logits.astype(np.float64))
    return {"label": classes[int(np.argmax(p))], "probabilities": _named(p, classes)}


def _named(p: NDArray[np.float64], classes: Sequence[str]) -> dict[str, float]:
    return {name: round(float(x), _DIGITS) for name, x in zip(classes, p, strict=True)}


_PREDICTORS: dict[Task, Callable[[TrainedRun, Sequence[str]], Predictor]] = {
    **dict.fromkeys(("classification", "multi_label", "regression"), Texts),
    "extractive_qa": Questions,
    "multiple_choice": Choices,
    "relation": Relations,
    "sequence_to_sequence": Targets,
    "token_classification": Sentences,
}
