"""Zero- and few-shot evaluation of a run: its model answers by which answer it finds most probable.

A causal model says how probable an answer is, and one of masked diffusion how probable at least.

found = evaluate_task(open_run(config), load_task("sentiment.yaml"))
found.figures["accuracy"], found.report.macro_f1
"""

from __future__ import annotations

import bisect
import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lmobj.data import ChoiceFiles, Tokenizer, find_inputs, open_corpus, progress_bar
from lmobj.errors import UserError
from lmobj.evaluate import (
    AnsweredText,
    AnswerSource,
    AnswerTask,
    ClassReport,
    ScoredText,
    answer_scores,
    choose_shots,
    continuation_log_probs,
    diffusion_bounds,
    same_start,
    score_classes,
    scored_text,
)
from lmobj.tasks import read_multiple_choice
from lmobj.train.run_folder import RunFolder
from lmobj.train.trained import TrainedRun

__all__ = ["TaskResult", "evaluate_task"]

_SAMPLES = 128
"""Noised copies of each answer: LLaDA's."""
_LEFT_OUT = 2**32 - 1
"""Keeps the draw of questions apart from those of their examples, which are numbered from 0."""


@dataclass(frozen=True)
class TaskResult:
    """How a model did at a task."""

    figures: dict[str, Any]
    """In JSON. Of all tasks `task`, `step`, `normalise`, `examples`, `accuracy`, `majority` (the share of the commonest
    answer), `shots` and `shots_shown` (on average), and `cut`, how many questions were too long and lost their
    beginning; of masked diffusion `samples`. Of classes also `macro_f1`, `matthews`, `majority_macro_f1`, `classes` and
    `confusion`; of questions with choices of their own `chance`, the mean of one over the number of choices."""
    answers: list[dict[str, Any]]
    """Of each question `text` (and `pair`), `label`, `prediction`; of its answers `scores` and `log_likelihoods`."""
    report: ClassReport | None
    """The classes; None of questions with choices of their own."""

    def write(self, folder: RunFolder) -> None:
        """Writes eval/tasks/NAME.json and eval/tasks/NAME.jsonl, a line for each answer."""
        name = f"eval/tasks/{self.figures['task']}"
        folder.add(f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.answers))
        folder.add(f"{name}.json", json.dumps(self.figures, indent=2, ensure_ascii=False) + "\n")


class _Question(NamedTuple):
    text: str
    pair: str | None
    choices: tuple[str, ...]
    """Words of the answers to choose from."""
    label: int

    @property
    def answered(self) -> AnsweredText:
        return AnsweredText(self.text, self.pair, self.choices[self.label])


class _Asked(NamedTuple):
    """A question in tokens: a row for each choice, and with `prior` one more for each."""

    rows: list[ScoredText]
    priors: list[ScoredText]
    shown: int
    cut: bool


def evaluate_task(trained: TrainedRun, task: AnswerTask, *, quiet: bool = False) -> TaskResult:
    """Answers the questions of a task, each with the choice whose score (`task.normalise`) is the highest.

    Of a prompt that is longer than the model reads, the first examples are left out; if it still is, so is the
    beginning of the prompt, as much of it before each choice.

    Args:
      trained: a run of a causal model, or of masked diffusion.
      task: what to ask.
      quiet: no progress bar.

    Raises:
      UserError: a run of neither, `task.samples` for a causal model, a source that cannot be read, a class without
        words, too few examples, or a choice that is longer than the model reads.
    """
    _check_model(trained, task)
    questions = _questions(task, task.source, "source")
    examples = [] if task.shots_source is None else _questions(task, task.shots_source, "shots_source")
    if len(examples) < task.shots:
        raise UserError(
            f"shots is {task.shots}, and shots_source has {len(examples)} examples; accepted: that at most."
        )
    if task.limit is not None and task.limit < len(questions):
        drawn = np.random.default_rng([task.seed % 2**64, _LEFT_OUT]).permutation(len(questions))
        questions = [questions[i] for i in sorted(drawn[: task.limit])]
    asker = _asker(trained, task, model := trained.model)
    told = [question.answered for question in examples]
    asked = [
        asker.ask(question, choose_shots(told, task.shots, seed=task.seed, query=number))
        for number, question in enumerate(questions)
    ]
    samples = (task.samples or _SAMPLES) if trained.unmasks else None
    log_probs = _log_probs(trained, model, asked, samples, task.seed, quiet=quiet)
    answers = [_line(task, question, one, log_probs) for question, one in zip(questions, asked, strict=True)]
    figures = {
        "task": task.name,
        "step": int(trained.state.step),
        "examples": len(questions),
        "normalise": task.normalise,
        "shots": task.shots,
        "shots_shown": float(np.mean([one.shown for one in asked])),
        "cut": sum(one.cut for one in asked),
        **({} if samples is None else {"samples": samples}),
    }
    if task.has_own_choices:
        return TaskResult({**figures, **_choice_figures(questions, answers)}, answers, None)
    names, labels = list(task.answers), [question.label for question in questions]
    report = score_classes(labels, [names.index(answer["prediction"]) for answer in answers], names)
    return TaskResult({**figures, **_class_figures(report, labels)}, answers, report)


def _asker(trained: TrainedRun, task: AnswerTask, model: Any) -> _Asker:
    suffix = trained.assembly.spec.suffix if trained.writes_second_texts else ()
    context = getattr(getattr(model, "config", None), "max_length", None)
    if context is not None and not trained.unmasks:
        context += 1  # the last token is not read
    return _Asker(task, trained.tokenizer, suffix, context)


def _check_model(trained: TrainedRun, task: AnswerTask) -> None:
    objective = trained.assembly.objective
    if trained.unmasks:
        return
    if objective.causal and objective.task is None:
        if task.samples is not None:
            raise UserError(
                f"samples is {task.samples}, and the model of this run is causal, which needs none to say how probable "
                "a text is; accepted: null, or a run of masked_diffusion."
            )
        return
    name = getattr(objective, "name", type(objective).__name__)
    why = (
        "trains no vocabulary head, so that its model gives no token a probability"
        if objective.task is not None
        else "trains a model that sees both sides of a token: it gives no probability to a text after another"
    )
    raise UserError(
        f"the objective of this run is {name}, which {why}; accepted: a causal model, as of causal_lm, or one of "
        "masked_diffusion."
    )


def _questions(task: AnswerTask, source: AnswerSource, key: str) -> list[_Question]:
    """The questions of a source, in the order of its files."""
    if isinstance(source, ChoiceFiles):
        found = list(_choice_questions(source, key))
    else:
        classes, words = list(task.answers), tuple(task.answers.values())
        found = []
        for document in open_corpus(source, os.cpu_count() or 1, key).documents():
            if document.label not in task.answers:
                raise UserError(
                    f"answers has no words for the class {document.label!r} of {key}; it has {', '.join(classes)}."
                )
            found.append(_Question(document.text, document.pair, words, classes.index(str(document.label))))
    if not found:
        raise UserError(f"{key} holds no example; accepted: at least one.")
    return found


def _choice_questions(source: ChoiceFiles, key: str) -> Iterator[_Question]:
    for file in find_inputs(f"{key}.files", source.files, os.cpu_count() or 1):
        read = read_multiple_choice(file.name, context=source.context, choices=source.choices, label=source.label)
        for number, example in enumerate(read, 1):
            if example.label is None:
                raise UserError(
                    f"{key}.files: example {number} of {file.name} has no label; accepted: examples with one."
                )
            yield _Question(example.context, None, example.choices, example.label)


@dataclass(frozen=True)
class _Asker:
    """Makes prompts of questions, in tokens."""

    task: AnswerTask
    tokenizer: Tokenizer
    suffix: tuple[int, ...]
    """Ends each of two texts, where the model learned from such; the prompt is the first and an answer the second."""
    context: int | None
    """Most tokens of a row; None: any number."""

    def ask(self, question: _Question, shots: Sequence[AnsweredText]) -> _Asked:
        """The question after as many of its examples as fit, those farthest from it left out first."""
        excess = functools.partial(self._excess, question, shots)
        left_out = bisect.bisect_left(range(len(shots)), True, key=lambda count: excess(count) <= 0)
        kept = shots[left_out:]
        rows = self._rows(question.choices, kept, question.text, question.pair)
        priors = []
        if self.task.normalise == "prior":
            priors = self._rows(question.choices, kept, "", None if question.pair is None else "")
        cut = max(excess(left_out), 0)
        if cut and any(row.start <= cut for row in rows):
            raise UserError(
                f"source has the question {question.text!r:.60}, an answer to which takes "
                f"{max(len(row.tokens) - row.start for row in rows)} tokens, and a row has room for "
                f"{self.context}; accepted: answers that leave room for a part of the question."
            )
        return _Asked([ScoredText(row.tokens[cut:], row.start - cut) for row in rows], priors, len(kept), cut > 0)

    def _excess(self, question: _Question, shots: Sequence[AnsweredText], left_out: int) -> int:
        """Tokens beyond those that a row has room for."""
        if self.context is None:
            return 0
        rows = self._rows(question.choices, shots[left_out:], question.text, question.pair)
        return max(len(row.tokens) for row in rows) - self.context

    def _rows(
        self, choices: Sequence[str], shots: Sequence[AnsweredText], text: str, pair: str | None
    ) -> list[ScoredText]:
        """The prompt with each choice after it."""
        prompt = self.task.prompt.prompt(shots, text, pair)
        completions = [self.task.prompt.completion(choice) for choice in choices]
        if not self.suffix:
            return same_start([scored_text(self.tokenizer, prompt, completion) for completion in completions])
        first, *seconds = self.tokenizer.encode_batch([prompt, *(text.lstrip(" ") for text in completions)])
        opening = np.concatenate([first, self.suffix]).astype(np.int32)
        return [
            ScoredText(np.concatenate([opening, second, self.suffix]).astype(np.int32), len(opening))
            for second in seconds
        ]


def _log_probs(
    trained: TrainedRun, model: Any, asked: Sequence[_Asked], samples: int | None, seed: int, *, quiet: bool
) -> dict[tuple[bytes, int], float]:
    """ln p of what is scored of each row, or with `samples` a bound of it. Rows that are alike, as those without input
    often are, are read once."""
    rows = {_key(row): row for one in asked for row in (*one.rows, *one.priors)}
    every = list(rows.values())
    with progress_bar(quiet) as progress:
        bar = progress.add_task("answering", total=len(rows))

        def done(count: int) -> None:
            progress.update(bar, completed=count)

        if samples is None:
            found = [float(values.sum()) for values in continuation_log_probs(model, every, done=done)]
        else:
            (mask_id,) = trained.tokenizer.vocabulary.require("masked diffusion", "mask")
            bounds = diffusion_bounds(model, every, mask_id=mask_id, samples=samples, seed=seed, done=done)
            found = (-bounds.nats).tolist()
    return dict(zip(rows, found, strict=True))


def _key(row: ScoredText) -> tuple[bytes, int]:
    return row.tokens.tobytes(), row.start


def _line(task: AnswerTask, question: _Question, one: _Asked, log_probs: Mapping[tuple[bytes, int], float]) -> dict:
    """What is told of a question: its answers by name, and the one with the highest score."""
    likelihoods = [log_probs[_key(row)] for row in one.rows]
    scores = answer_scores(
        likelihoods,
        task.normalise,
        tokens=[len(row.tokens) - row.start for row in one.rows],
        num_bytes=[len(task.prompt.completion(choice).encode()) for choice in question.choices],
        priors=[log_probs[_key(row)] for row in one.priors] or None,
    ).tolist()
    names = list(task.answers) or [str(place) for place in range(len(question.choices))]
    return {
        "text": question.text,
        **({} if question.pair is None else {"pair": question.pair}),
        "label": names[question.label],
        "prediction": names[int(np.argmax(scores))],
        "scores": dict(zip(names, scores, strict=True)),
        "log_likelihoods": dict(zip(names, likelihoods, strict=True)),
    }


def _class_figures(report: ClassReport, labels: Sequence[int]) -> dict[str, Any]:
    commonest = score_classes(labels, np.full(len(labels), _commonest(labels)), [one.name for one in report.classes])
    return {
        "accuracy": report.accuracy,
        "macro_f1": report.macro_f1,
        "matthews": report.matthews,
        "majority": commonest.accuracy,
        "majority_macro_f1": commonest.macro_f1,
        "classes": [one._asdict() for one in report.classes],
        "confusion": report.confusion.tolist(),
    }


def _choice_figures(questions: Sequence[_Question], answers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    labels = [question.label for question in questions]
    return {
        "accuracy": float(np.mean([answer["label"] == answer["prediction"] for answer in answers])),
        "majority": float(np.mean(np.array(labels) == _commonest(labels))),
        "chance": float(np.mean([1 / len(question.choices) for question in questions])),
    }


def _commonest(labels: Sequence[int]) -> int:
    return int(np.argmax(np.bincount(labels)))
