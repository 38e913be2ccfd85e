"""Vectors of sentences from a run's model, and how well their cosines agree with what people say of pairs.

found = evaluate_similarity(open_run(config), "sts.tsv", columns=("sentence1", "sentence2", "score"))
found.figures["spearman"]
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt32
from numpy.typing import NDArray

from lmobj import masks
from lmobj.batch import RowSpec
from lmobj.data import JsonLines, SeparatedValues, open_corpus, progress_bar, text_rows
from lmobj.errors import UserError
from lmobj.evaluate import score_numbers, score_similarity, word_overlap
from lmobj.masks import AttentionMask
from lmobj.models import EncoderDecoderModel
from lmobj.objectives import BiEncoder, Context, InBatchContrastive, Mixture, Objective, Pooling, member_models
from lmobj.train.run_folder import RunFolder
from lmobj.train.trained import TrainedRun

__all__ = ["COLUMNS", "SimilarityResult", "evaluate_similarity", "text_vectors"]

COLUMNS = ("sentence1", "sentence2", "score")
"""Of GLUE's STS-B."""
_ROWS = 64
"""Texts that the model reads at once."""


class _Pair(NamedTuple):
    first: str
    second: str
    score: float


@dataclass(frozen=True)
class SimilarityResult:
    """How a model's vectors did on pairs."""

    name: str
    figures: dict[str, Any]
    """In JSON: `step`, `pooling`, `pairs`, `spearman`, `pearson`, `alignment` (null without related pairs),
    `uniformity`, and `words`: the correlations of shared words."""

    def write(self, folder: RunFolder) -> Path:
        """Writes eval/similarity/NAME.json."""
        return folder.add(f"eval/similarity/{self.name}.json", json.dumps(self.figures, indent=2) + "\n")


def evaluate_similarity(
    trained: TrainedRun,
    file: str,
    *,
    columns: Sequence[str] = COLUMNS,
    pooling: Pooling | None = None,
    quiet: bool = False,
) -> SimilarityResult:
    """Compares cosines of vectors with the scores of a file of pairs.

    Args:
      trained: any run whose model has hidden states.
      file: a table with names in its first line: .csv with commas, .jsonl, or else with tabs.
      columns: names of those that hold the two texts and the score.
      pooling: as `text_vectors` has it.
      quiet: no progress bar.

    Raises:
      UserError: columns that are not there, rows without two texts and a score, or fewer than two pairs.
    """
    pairs = _pairs(file, columns)
    if len(pairs) < 2:
        raise UserError(f"--similarity is {file!r}, which holds {len(pairs)} pairs; accepted: two or more.")
    first, second = [pair.first for pair in pairs], [pair.second for pair in pairs]
    scores = np.array([pair.score for pair in pairs], np.float64)
    every = list(dict.fromkeys([*first, *second]))
    number = {text: index for index, text in enumerate(every)}
    vectors = text_vectors(trained, every, pooling=pooling, quiet=quiet)
    found = score_similarity(
        vectors[[number[text] for text in first]], vectors[[number[text] for text in second]], scores
    )
    words = score_numbers(scores, word_overlap(first, second))
    figures = {
        "step": int(trained.state.step),
        "pooling": _reader(trained.assembly.objective, pooling)[1].pooling,
        "pairs": len(pairs),
        **found._asdict(),
        "words": {"spearman": words.spearman, "pearson": words.pearson},
    }
    if np.isnan(found.alignment):
        figures["alignment"] = None
    return SimilarityResult(Path(file).stem, figures)


def text_vectors(
    trained: TrainedRun, texts: Sequence[str], *, pooling: Pooling | None = None, quiet: bool = False
) -> NDArray[np.float32]:
    """[N, D] the vectors of texts, each read by itself and cut to the row that the run read.

    A run of matching or of SimCSE gives those that it trained. Of other runs they are hidden states, between [CLS] and
    [SEP] where the vocabulary has both and the model sees both sides; of an encoder-decoder its encoder's.

    Args:
      trained: the run.
      texts: what to read.
      pooling: the state of the first or the last token, or the mean; by default the objective's, or else the mean.
      quiet: no progress bar.

    Raises:
      UserError: a pooling that the model has no use for.
    """
    run = trained.assembly
    name, reader = _reader(run.objective, pooling)
    models = _models(trained, name)
    spec = _row_spec(trained, reader, name is not None)
    rows = text_rows([(text, None) for text in texts], trained.tokenizer, spec, spec.length, key="data.length")
    graphs, params = {}, {}
    for role, model in models.items():
        graphs[role], state = nnx.split(model)
        params[role] = nnx.to_pure_dict(state)

    @jax.jit
    def read(params: Any, tokens: Any, segments: Any) -> Any:
        merged = {role: nnx.merge(graphs[role], params[role]) for role in graphs}
        return reader.vectors(merged, tokens, segments, Context(None, 0, run.vocab, train=False))

    found = []
    with progress_bar(quiet) as progress:
        bar = progress.add_task("reading", total=len(texts))
        for start in range(0, len(texts), _ROWS):
            part = [x[start : start + _ROWS] for x in (rows.tokens, rows.segments)]
            empty = _ROWS - len(part[0])
            tokens, segments = (jnp.asarray(np.pad(x, ((0, empty), (0, 0)))) for x in part)
            found.append(np.asarray(read(params, tokens, segments), np.float32)[: _ROWS - empty])
            progress.update(bar, advance=_ROWS - empty)
    return np.concatenate(found)


def _reader(objective: Objective, pooling: Pooling | None) -> tuple[str | None, BiEncoder]:
    """The objective that makes vectors, and its name in a mixture ("" outside of one); None: one of our own."""
    if pooling is not None and pooling not in get_args(Pooling):
        raise UserError(f"--pooling is {pooling!r}; accepted: {', '.join(get_args(Pooling))}.")
    members = objective.objectives if isinstance(objective, Mixture) else {"": objective}
    trained = {name: one for name, one in members.items() if isinstance(one, BiEncoder)}
    if trained and pooling in (None, *(one.pooling for one in trained.values())):
        return next((name, one) for name, one in trained.items() if pooling in (None, one.pooling))
    attention: Any = "causal" if objective.causal else "bidirectional"
    if pooling == "first" and objective.causal:
        raise UserError(
            "--pooling is first, and the model of this run sees earlier tokens alone, so that the first token knows "
            "nothing of the text; accepted: mean, last."
        )
    return None, InBatchContrastive(pooling=pooling or "mean", attention=attention)


def _models(trained: TrainedRun, name: str | None) -> dict[str, Any]:
    """The model, and the heads of the objective that makes vectors."""
    run, params = trained.assembly, trained.assembly.gathered(trained.state)
    models = {role: nnx.merge(graph, params[role]) for role, graph in run.program.graphs.items()}
    if name is None:
        model = models["model"]
        return {"model": _EncoderAlone(model) if isinstance(model, EncoderDecoderModel) else model}
    return dict(member_models(models, name)) if name else models


class _EncoderAlone(nnx.Module):
    """The encoder of an encoder-decoder as a model that reads rows, whose tokens see both sides of their document."""

    def __init__(self, model: EncoderDecoderModel) -> None:
        self.model = model

    def hidden(
        self,
        tokens: Int[Array, "B L"],
        *,
        mask: AttentionMask,
        positions: Int[Array, "B L"] | None = None,
        token_types: Int[Array, "B L"] | None = None,
        dropout: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """As `LanguageModel.hidden`; an encoder has no token types."""
        assert token_types is None
        assert mask.segment_ids is not None
        whole = masks.bidirectional().packed(mask.segment_ids)
        return self.model.encode(tokens, mask=whole, positions=positions, dropout=dropout)


def _row_spec(trained: TrainedRun, reader: BiEncoder, trained_it: bool) -> RowSpec:
    """The row of one text."""
    run, vocab = trained.assembly, trained.assembly.vocab
    length = run.config.data.length
    if trained_it:
        rows = reader.rows(vocab, length)
        assert isinstance(rows, RowSpec)
        return RowSpec("examples", rows.length, rows.prefix, rows.suffix)
    if vocab.cls is None or vocab.sep is None or reader.causal:
        return RowSpec("examples", length)
    return RowSpec("examples", length, (vocab.cls,), (vocab.sep,))


def _pairs(file: str, columns: Sequence[str]) -> list[_Pair]:
    """The pairs of a file, each with its score."""
    if len(columns) != len(COLUMNS) or len(set(columns)) < len(columns):
        raise UserError(
            f"--columns is {','.join(columns)!r}; accepted: three names, of the two texts and of the score, such as "
            f"{','.join(COLUMNS)}."
        )
    names: dict[str, Any] = dict(zip(("text", "pair", "label"), columns, strict=True))
    source: JsonLines | SeparatedValues
    if file.endswith(".jsonl"):
        source = JsonLines(files=(file,), label_kind="number", **names)
    else:
        commas = file.endswith(".csv")
        source = SeparatedValues(
            files=(file,), label_kind="number", separator="," if commas else "\t", quotes=commas, **names
        )
    try:
        corpus = open_corpus(source, os.cpu_count() or 1, "--similarity")
        return [_Pair(one.text, str(one.pair), float(one.label or 0)) for one in corpus.documents()]
    except UserError as error:
        message = str(error)
        for key in names:
            message = message.replace(f"--similarity.{key} is", "--columns has")
        raise UserError(message.replace("--similarity.files", "--similarity")) from None
