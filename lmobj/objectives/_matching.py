"""Matching: vectors of texts, a query's nearer to that of the text that belongs to it than to those of others.

    in batch:  L = - sum_b v_b log( exp(s_bb / tau) / sum_{c in C_b} exp(s_bc / tau) ) / sum_b v_b
    triplet:   L = sum_(b,n) v_bn max(0, d(q_b, p_b) - d(q_b, n) + margin) / sum_(b,n) v_bn

where s_bc = e(q_b) . e(c), C_b holds the texts of all rows of the global batch, hard negatives included, and v = 1
where there are texts. Every text goes through the model by itself: the texts of a row are packed segments. Query and
text have the same model.

In-batch negatives: Karpukhin et al. 2020, "Dense Passage Retrieval for Open-Domain Question Answering", section 3.2.
Triplets: Schroff et al. 2015, "FaceNet: A Unified Embedding for Face Recognition and Clustering", section 3.1; Reimers
and Gurevych 2019, "Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks", section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from lmobj import losses
from lmobj.batch import Batch, RowSpec, Vocabulary
from lmobj.errors import UserError
from lmobj.objectives._bi_encoder import (
    BiEncoder,
    Contrastive,
    Texts,
    other_texts,
    related_rows,
    similarities,
    texts_there,
)
from lmobj.objectives._objective import Context, Example, Judge, Models, Terms

__all__ = ["InBatchContrastive", "Triplet"]

_TRIPLET_LOSSES = {
    "cosine": losses.cosine_triplet_loss,
    "euclidean": losses.euclidean_triplet_loss,
    "squared_euclidean": losses.squared_euclidean_triplet_loss,
}


@dataclass(frozen=True)
class InBatchContrastive(Contrastive):
    """Pick the text that belongs to a query out of all texts of the batch (`data.source: {name: retrieval}`).

    Candidates of a query are its text, the texts of all other rows, and the hard negatives of all rows. Not among them
    are texts equal to its own or to the query, and the texts of rows whose query is equal: the data says that they
    belong to it. Texts are equal where the files spell them alike (`text_ids`).

    The loss and its gradient are those of the global batch on any mesh, and under `train.accumulate` too: a forward
    pass gives the vectors of all texts, with which each microbatch finds its share of the gradient.

    Metrics: `accuracy`, how often the query's text is the first of its candidates. Evaluation adds figures of a search
    among all texts of the split; with `train.evaluate_batches`, among those of so many batches, which is easier.
    """

    task: ClassVar[Literal["retrieval"]] = "retrieval"
    judged_by: ClassVar[Judge] = "mrr_at_10"
    summary: ClassVar[str] = "Find the text that belongs to a query among those of the batch (DPR, InfoNCE)."
    paper: ClassVar[str] = "Karpukhin et al. 2020, Dense Passage Retrieval for Open-Domain Question Answering"

    name: Literal["in_batch_contrastive"] = "in_batch_contrastive"
    """Find the text that belongs to a query among those of the batch."""
    normalise: bool = True
    """Whether vectors are made unit vectors, so that similarity is the cosine; false: products of vectors (DPR)."""
    symmetric: bool = False
    """Whether texts look for their queries too, among those of all rows; both directions count half."""

    def embed(self, models: Models, example: Example, ctx: Context) -> Float[Array, "B T D"]:
        """The vectors, of length 1 with `normalise`."""
        states = super().embed(models, example, ctx)
        return losses.unit_vectors(states) if self.normalise else states

    def query_losses(self, texts: Texts) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
        """Of each row's query among the texts of all rows: the loss, and whether its own text is the first."""
        similarity = similarities(texts)
        stats = self.stats(similarity, other_texts(texts))
        found = losses.nll(stats)
        if self.symmetric:
            ids, there = texts.ids, texts.there > 0
            others_queries = there[None, :, 0] & ~related_rows(texts) & (ids[None, :, 0] != ids[:, 1, None])
            place = jnp.arange(len(ids))
            back = losses.info_nce(
                similarity[:, :, 0].T, place, temperature=self.temperature, candidates=others_queries
            )
            found = (found + back) / 2
        return found, stats.correct


@dataclass(frozen=True)
class Triplet(BiEncoder):
    """Keep hard negatives farther from a query than its text, by a margin (`data.source: {name: retrieval}`).

    Vectors are unit vectors, as FaceNet's. The loss is a mean over triplets: one for each hard negative, and none of
    rows without.

    Metrics: `accuracy`, the share of triplets whose text is nearer to the query than the negative. Evaluation adds
    those of a search, as with `in_batch_contrastive`.
    """

    task: ClassVar[Literal["retrieval"]] = "retrieval"
    judged_by: ClassVar[Judge] = "mrr_at_10"
    summary: ClassVar[str] = "Keep a query nearer to its text than to others, by a margin (triplet loss)."
    paper: ClassVar[str] = "Schroff et al. 2015, FaceNet: A Unified Embedding for Face Recognition and Clustering"
    coefficients: ClassVar[dict[str, float]] = {"triplet": 1.0}

    name: Literal["triplet"] = "triplet"
    """Keep a query nearer to its text than to others, by a margin."""
    negatives: int = 1
    """Hard negatives in a row, 1 or more: texts that the data says do not belong to the query."""
    distance: Literal["cosine", "euclidean", "squared_euclidean"] = "cosine"
    """1 - the cosine, the distance (Sentence-BERT), or its square (FaceNet), which between unit vectors is twice the
    first."""
    margin: float = 0.2
    """By how much the distance to a negative is to be larger, above 0; at most 2, or 4 of squares, can be reached."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.negatives < 1:
            raise UserError(f"objective.negatives is {self.negatives}; accepted: 1 or more texts.")
        if self.distance not in _TRIPLET_LOSSES:
            raise UserError(f"objective.distance is {self.distance!r}; accepted: {', '.join(_TRIPLET_LOSSES)}.")
        if not 0 < self.margin < math.inf:
            raise UserError(f"objective.margin is {self.margin}; it must be a finite number above 0.")

    def rows(self, vocab: Vocabulary, length: int) -> RowSpec:
        """A query, its text, and `negatives` others."""
        return self.text_rows(vocab, length, self.negatives)

    def corrupt(self, keys: Key[Array, " B"], batch: Batch, ctx: Context) -> Example:
        """The rows as they are."""
        return self.example(batch, texts_there(batch["segment_ids"], 2 + self.negatives), 2, None)

    def terms(self, models: Models, example: Example, carried: Any, ctx: Context) -> Terms:
        """`triplet`: the sum over triplets."""
        embeddings = losses.unit_vectors(self.embed(models, example, ctx))
        query, text, negatives = embeddings[:, :1], embeddings[:, 1:2], embeddings[:, 2:]
        loss = _TRIPLET_LOSSES[self.distance](query, text, negatives, margin=self.margin)
        nearer = jnp.sum(query * text, axis=-1) > jnp.sum(query * negatives, axis=-1)
        metrics = {"accuracy": (jnp.sum(nearer * example.weights), jnp.sum(example.weights))}
        total = jnp.sum(loss * example.weights)
        return Terms({"triplet": total}, metrics, carried, {"embeddings": embeddings})
