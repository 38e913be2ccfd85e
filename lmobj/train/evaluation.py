"""Evaluation on held-out rows: sums over the whole split, added on the host in float64 and divided once.

Of data that is a mixture of sources, each is read by itself, so that there are figures of every source beside those of
all: `new/nll` and `old/nll` beside `nll`. Rows and their noise are the same either way.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from lmobj._shares import share_out
from lmobj.batch import RowSpec
from lmobj.errors import UserError
from lmobj.evaluate import TASK_METRICS, TASKS, Cloze, NGram, TaskReport, cloze_hits, task_report, unigram_top_k
from lmobj.objectives import Task
from lmobj.train import distributed
from lmobj.train.assemble import Assembly
from lmobj.train.sharding import active
from lmobj.train.step import TERM, State, StepMetrics

__all__ = ["Evaluation", "readable"]

_GUESSES = 5


@dataclass(frozen=True)
class Evaluation:
    """Evaluates a run's states on one split."""

    run: Assembly
    split: str = "validation"

    @functools.cached_property  # the loop asks after every step
    def has_text(self) -> bool:
        """Whether the split holds any documents; without them there is nothing to evaluate on."""
        return self.run.dataset.summary()["splits"][self.split]["documents"] > 0

    @functools.cached_property
    def sources(self) -> tuple[str, ...]:
        """The sources that figures are given of; none where the data is no mixture, or the objective is one, carries a
        memory from batch to batch, or is judged by a task's figures."""
        run, found = self.run, self.run.dataset.summary()["sources"]
        carries = jax.tree.leaves(run.abstract_state.objective.carried)
        if len(found) < 2 or not isinstance(run.rows, RowSpec) or carries or self._task is not None:
            return ()
        return tuple(name for name, source in found.items() if source["splits"][self.split]["documents"] > 0)

    def __call__(self, state: State, batches: int | None = None) -> dict[str, float]:
        """Metrics over the split, or over its first `batches` batches; each is one quotient of sums.

        Of a mixture those batches are shared among the sources in proportion to their held-out rows, at least one each;
        SOURCE/metric is that of one source.

        For an objective judged by it, `top5_accuracy` on masked words is among them.
        """
        return self.examine(state, batches)[0]

    def examine(self, state: State, batches: int | None = None) -> tuple[dict[str, float], TaskReport | None]:
        """The same metrics, and of tasks what is told of the split beside them. Every process calls it and has all."""
        by_source: dict[str, dict[str, NDArray]] = {name: defaultdict(_nothing) for name in ("", *self.sources)}
        outputs: list[dict[str, NDArray]] = []
        steps = self._steps(state, batches)
        for step, _ in itertools.pairwise(itertools.chain(steps, [None])):  # read while the device is at the next one
            assert step is not None
            for name, pair in jax.device_get(step[1]).items():
                for source in {"", step[0]}:
                    by_source[source][name] += np.asarray(pair, np.float64)
            outputs.append(_rows_with_text(step[2]))
        metrics: dict[str, float] = {}
        for source, sums in by_source.items():
            for name, epsilon in self.run.objective.epsilon.items():
                if sums[TERM + name][1] > 0:
                    sums[TERM + name][1] += epsilon
            figures = readable(sums, self.run.coefficients(state.step))
            metrics |= {f"{source}/{name}" if source else name: value for name, value in figures.items()}
        if self.cloze is not None and self.cloze.count:
            metrics["top5_accuracy"] = self._top5_accuracy(state, self.cloze)
        task, data = self._task, self.run.dataset
        if task is None:
            return metrics, None
        every = {name: np.concatenate([one[name] for one in outputs]) for name in outputs[0]}
        report = task_report(task, every, data.classes, data.reference(self.run.spec, self.split))
        return metrics | report.figures, report

    def check_metric(self, name: str, key: str = "train.best.metric") -> None:
        """Refuses a figure that this evaluation would not give; `key` is the setting that names it.

        The evaluation is traced for it. Without held-out text any name is accepted: nothing is evaluated.
        """
        run = self.run
        with active(run.mesh, run.rules):
            carried = run.abstract_state.objective.carried
            metrics, _, _ = jax.eval_shape(run.program.eval_step, run.abstract_state, {}, run.abstract_batch, carried)
        known = [one for one in metrics if not one.startswith(TERM)] + ["loss"] + ["perplexity"] * ("nll" in metrics)
        known += [f"{source}/{one}" for source in self.sources for one in known]
        known += TASK_METRICS[self._task] if self._task else ()
        known.append(self.run.objective.judged_by)
        if self.has_text and name not in known:
            raise UserError(f"{key} is {name!r}; accepted: {', '.join(sorted(set(known)))}.")

    @property
    def _task(self) -> Task | None:
        """The task that outputs of rows are judged by; not the one whose texts are written (`report_written`), which
        takes too long to be done at every evaluation."""
        task = self.run.objective.task
        return None if task == "sequence_to_sequence" else task

    def _steps(self, state: State, batches: int | None) -> Iterator[tuple[str, StepMetrics, dict[str, Any]]]:
        """The source and metrics of each batch, and of tasks the outputs; what the objective carries goes from one to
        the next."""
        carried = self.run.fresh_carried(state)
        for source, steps in self._batches_of(batches).items():
            for batch in self.run.batches(self.split, steps=steps, source=source or None):
                metrics, carried, outputs = self.run.eval_step(state, batch, carried)
                yield source, metrics, outputs

    def _batches_of(self, batches: int | None) -> dict[str, int | None]:
        """How many batches of each source are read, None for all; under no name those of all sources together."""
        if not self.sources:
            return {"": batches}
        whole = [self.run.read_rows("", self.split, name).steps_per_epoch for name in self.sources]
        if batches is None or batches >= sum(whole):
            return dict.fromkeys(self.sources)
        return dict(zip(self.sources, share_out(whole, max(batches, len(whole))), strict=True))

    def baselines(self) -> dict[str, dict[str, float]]:
        """What models without a network reach on the same held-out text, by the figure the objective is judged by."""
        data, spec = self.run.dataset, self.run.spec
        vocab = data.vocab
        if not self.has_text or (self.cloze is not None and not self.cloze.count):
            return {}
        if self.cloze is not None:
            no_words = tuple(np.flatnonzero(~data.tokenizer.is_word).tolist())
            excluded = {"unigram": vocab.special_ids, "unigram of words": no_words}
            return {
                name: {"top5_accuracy": self.cloze.baseline(self._most_frequent(ids))} for name, ids in excluded.items()
            }
        if task := self._task:
            return TASKS[task].baselines(data.reference(spec, "train"), data.reference(spec, self.split))
        if self.run.objective.judged_by != "bits_per_byte":
            return {}
        before, after = np.array(spec.prefix, np.int32), np.array(spec.suffix, np.int32)
        documents = [np.concatenate([before, document, after]) for document in data.documents("train")]
        rows = self._read()
        scored = [rows[name] for name in ("tokens", "segment_ids", "token_bytes")]
        orders = {"unigram": 1, "bigram": 2, "5-gram": 5}
        return {
            name: {"bits_per_byte": NGram.fit(documents, order, vocab.size).bits_per_byte(*scored)}
            for name, order in orders.items()
        }

    def _most_frequent(self, exclude: tuple[int, ...]) -> NDArray[np.integer]:
        """The five most frequent tokens of the training text, but for `exclude`."""
        data = self.run.dataset
        return unigram_top_k(data.documents("train"), data.vocab.size, _GUESSES, exclude=exclude)

    @functools.cached_property
    def cloze(self) -> Cloze | None:
        """500 held-out words to guess, for objectives judged by that."""
        mask = self.run.dataset.vocab.mask
        if self.run.objective.judged_by != "top5_accuracy" or mask is None:
            return None
        rows = self._read(("word_starts",))
        return Cloze.make(rows, self.run.dataset.tokenizer.is_word, mask_id=mask, count=500)

    def _read(self, fields: tuple[str, ...] = ()) -> dict[str, NDArray]:
        """All rows of the split, with these fields beside those that the objective reads."""
        spec, size = self.run.spec, self.run.config.train.batch_size
        spec = dataclasses.replace(spec, fields=tuple(dict.fromkeys((*spec.fields, *fields))))
        batches = list(self.run.dataset.batches(spec, split=self.split, batch_size=size))
        return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}

    def _top5_accuracy(self, state: State, cloze: Cloze) -> float:
        arrays = (cloze.tokens, cloze.segment_ids, cloze.positions, cloze.where, cloze.answers)
        hits = _cloze_hits(self.run.program.graphs["model"], self.run.gathered(state)["model"], *arrays)
        return float(np.sum(hits)) / cloze.count


def _nothing() -> NDArray[np.float64]:
    """A sum and a weight that nothing was added to."""
    return np.zeros(2)


def _rows_with_text(outputs: Mapping[str, Any]) -> dict[str, NDArray]:
    """The outputs of a batch on the host, without its empty rows. Every process calls it and has all of them."""
    found = {name: np.asarray(distributed.on_host(x)) for name, x in outputs.items()}
    if not found:
        return {}
    there = found.pop("there")
    return {name: x[there] for name, x in found.items()}


@functools.partial(jax.jit, static_argnums=0)
def _cloze_hits(graph: nnx.GraphDef, params: Any, *arrays: Any) -> Any:
    return cloze_hits(nnx.merge(graph, params), *arrays, k=_GUESSES)


def readable(pairs: Mapping[str, Any], coefficients: Mapping[str, float] | None = None) -> dict[str, float]:
    """(sum, weight) pairs as numbers, with `perplexity` (exp of nll).

    A metric without weight in this batch is left out, and so are the terms where there is but one.

    Args:
      pairs: the metrics.
      coefficients: of the terms, to add `loss`, the weighted terms together, where it is missing; None: it is not.
    """
    values = {name: float(total) / float(weight) for name, (total, weight) in pairs.items() if float(weight) > 0}
    terms = {name.removeprefix(TERM): value for name, value in values.items() if name.startswith(TERM)}
    if coefficients is not None and terms:
        values.setdefault("loss", sum(coefficients[name] * value for name, value in terms.items()))
    if "nll" in values:
        values["perplexity"] = math.exp(min(values["nll"], 700.0))
    return {name: value for name, value in values.items() if not name.startswith(TERM) or len(terms) > 1}
