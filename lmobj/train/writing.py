"""What the encoder with a decoder of a run writes, and what is told of it on a split."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmobj.data import Dataset, Tokenizer, progress_bar
from lmobj.errors import UserError
from lmobj.evaluate import (
    TASKS,
    Continuation,
    DecodingConfig,
    Filling,
    TaskReport,
    WritingConfig,
    WrittenReference,
    check_scores,
    continuations,
    fill_spans,
    sentinel_tokens,
    write_targets,
)
from lmobj.objectives import InputsToTargets, Objective
from lmobj.train.assemble import Assembly

__all__ = ["TargetWriter", "check_goes_on", "check_writing", "report_written", "score_line", "writes_targets"]


def writes_targets(objective: Objective) -> TypeGuard[InputsToTargets]:
    """Whether it trains an encoder with a decoder to write targets for inputs."""
    return isinstance(objective, InputsToTargets) and objective.rendering == "encoder_decoder"


def check_goes_on(objective: Objective) -> None:
    """Refuses to have a text gone on with by a model that learned to read it from both sides."""
    if isinstance(objective, InputsToTargets) and not writes_targets(objective):
        raise UserError(
            f"the objective of this run is {getattr(objective, 'name', '')} with objective.rendering=decoder, whose "
            "model reads its inputs from both sides and is not generated from; accepted: a causal model, or a run with "
            "objective.rendering=encoder_decoder."
        )


@dataclass(frozen=True)
class TargetWriter:
    """The model of a run whose objective `writes_targets`, on one device."""

    run: Assembly
    model: Any

    @property
    def tokenizer(self) -> Tokenizer:
        """That of the run."""
        return self.run.dataset.tokenizer

    @functools.cached_property
    def decoding(self) -> DecodingConfig:
        """How the run's config says that targets are written, as long as those of training at most."""
        return dataclasses.replace(_config(self.run).decoding, max_new_tokens=self.max_new_tokens)

    def settings(self, given: DecodingConfig | None, max_new_tokens: int | None) -> DecodingConfig:
        """What is given, or `decoding`; with as many tokens as are given, or `max_new_tokens`."""
        return dataclasses.replace(given or self.decoding, max_new_tokens=max_new_tokens or self.max_new_tokens)

    @property
    def max_new_tokens(self) -> int:
        """Most tokens of a target in training, its end included."""
        return self._objective.rooms(self.run.spec.length).targets

    def write(
        self,
        sources: Sequence[ArrayLike],
        settings: DecodingConfig,
        done: Callable[[int], None] = lambda count: None,
    ) -> list[list[Continuation]]:
        """Targets for sources in tokens, of which those that are too long lose their last ones."""
        before, after = self._around
        cut = (np.asarray(source)[: self._room] for source in sources)
        rows = [np.concatenate([before, source, after]).astype(np.int32) for source in cut]
        size = self.run.config.train.batch_size
        eos = self.run.vocab.eos
        found = write_targets(
            self.model, rows, settings, start=self._start, eos=eos, length=self._length, batch_size=size, done=done
        )
        return continuations(self.tokenizer, found)

    def write_texts(self, sources: Sequence[str], settings: DecodingConfig) -> list[list[Continuation]]:
        """Targets for texts; for every one the samples or beams, the best beam first.

        Raises:
          UserError: a text that is too long, where its target is not one of a task but goes on with all of it.
        """
        encoded = self.tokenizer.encode_batch(sources)
        if not all(len(ids) for ids in encoded):
            raise UserError("the prompt is empty; accepted: a text of at least one character.")
        for text, tokens in zip(sources, encoded, strict=True):
            self._check_length(text, len(tokens))
        return self.write(encoded, settings)

    def fill(self, text: str, k: int = 5) -> tuple[str, list[Filling]]:
        """The text with the spans filled in that sentinels stand for; see `lmobj.evaluate.fill_spans`."""
        rooms: dict[str, Any] = {"length": self._length, "max_new_tokens": self.max_new_tokens}
        return fill_spans(self.model, self.tokenizer, text, k, start=self._start, around=self._end, **rooms)

    def check(self, prompt: str) -> None:
        """Refuses a prompt that nothing could be written for, or filled into."""
        if self.fills_spans:
            sentinel_tokens(self.tokenizer, prompt, around=self._end, length=self._length)
        else:
            self._check_length(prompt, len(self.tokenizer.encode(prompt)))

    def _check_length(self, text: str, count: int) -> None:
        if count > self._room and self._objective.task is None:
            raise UserError(f"the text {text!r:.60} has {count} tokens; accepted: up to {self._room}, as in training.")

    @property
    def fills_spans(self) -> bool:
        """Whether what it writes are the spans that sentinels stand for."""
        return self._objective.fills_spans

    @property
    def _objective(self) -> InputsToTargets:
        objective = self.run.objective
        assert isinstance(objective, InputsToTargets)
        return objective

    @property
    def _length(self) -> int:
        """Most tokens that the encoder read in training."""
        return self._objective.rooms(self.run.spec.length).inputs

    @property
    def _room(self) -> int:
        """Most tokens of a source itself."""
        return self._length - sum(map(len, self._around))

    @property
    def _start(self) -> int:
        return self._objective.start(self.run.vocab)

    @property
    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self._objective.around(self.run.vocab)

    @property
    def _end(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What is around a text with sentinels, of which a mode token is part."""
        return (), self._around[1][-1:]


def report_written(
    run: Assembly, model: Any, split: str, *, quiet: bool = True
) -> tuple[TaskReport, dict[str, dict[str, float]]] | None:
    """What is told of the targets that a model writes for the sources of a split, and of the sources as they are.

    None where `writing.examples` is 0. Targets are compared as they are in the data, and not as far as rows hold them.
    """
    config, data = _config(run), run.dataset
    assert isinstance(data, Dataset)  # the only one with rows of two texts
    pairs = list(itertools.islice(data.pairs(run.spec, split), config.examples))
    if not pairs:
        return None
    writer = TargetWriter(run, model)
    with progress_bar(quiet) as progress:
        bar = progress.add_task(f"writing {split}", total=len(pairs))
        written = writer.write(
            [source for source, _ in pairs], writer.decoding, lambda count: progress.update(bar, completed=count)
        )
    sources, targets = ([data.tokenizer.decode(pair[side]) for pair in pairs] for side in (0, 1))
    reference = WrittenReference(sources, targets, config.words)
    outputs: dict[str, NDArray] = {"written": np.array([texts[0].text for texts in written], object)}
    kind = TASKS["sequence_to_sequence"]
    return kind.report(outputs, (), reference), kind.baselines(None, reference)


def score_line(figures: Mapping[str, float]) -> str:
    """The scores of what was written, as papers give them."""
    bleu, chrf, *rouge = (f"{figures[name]:.1f}" for name in ("bleu", "chrf", "rouge1", "rouge2", "rougeL"))
    return f"BLEU {bleu}, chrF {chrf}, ROUGE-1/2/L {'/'.join(rouge)}"


def check_writing(run: Assembly) -> None:
    """Refuses, before any training, settings of writing where nothing is written, and to score texts without the
    packages for it."""
    objective = run.objective
    if run.config.writing is not None and not writes_targets(objective):
        raise UserError(
            f"writing is set, and objective.name={getattr(objective, 'name', type(objective).__name__)} trains no "
            "encoder with a decoder to write; accepted: an objective with rendering encoder_decoder, such as "
            "sequence_to_sequence, or no such section."
        )
    if objective.task == "sequence_to_sequence" and _config(run).examples != 0:
        check_scores()


def _config(run: Assembly) -> WritingConfig:
    return run.config.writing or WritingConfig()
