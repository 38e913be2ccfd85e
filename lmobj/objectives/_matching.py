"""Matching: vectors of texts, a query's nearer to that of the text that belongs to it than to those of others.

    in batch:  L = - sum_b v_b log( exp(s_bb / tau) / sum_{c in C_b} exp(s_bc / tau) ) / sum_b v_b
    triplet:   L = sum_(b,n) v_bn max(0, d(q_b, p_b) - d(q_b, n) + margin) / sum_(b,n) v_bn

where s_bc = e(q_b) . e(c), C_b holds the texts of all rows of the global batch, hard negatives included, and v = 1
where there are texts. Every text goes through the model by itself: the texts of a row are packed segments. Query and
text have the same model.

In-batch negatives: Karpukhin et al. 2020, "Dense Passage Retrieval for Open-Domain Question Answering", section 3.2.
Triplets: Schroff et al. 2015, "FaceNet: A Unified Embedding for Face Recognition and Clustering", section 3.1; Reimers
and Gurevych 2019, "Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks", section 3. Large batches in parts:
Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (GradCache).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from lmobj import losses, masks
from lmobj.batch import Batch, RowSpec, Vocabulary
from lmobj.errors import UserError
from lmobj.models import RowUse
from lmobj.objectives._objective import Context, Example, Judge, Models, Objective, Terms
from lmobj.objectives._tokens import hidden_states
from lmobj.partition import constrain

__all__ = ["InBatchContrastive", "Triplet", "text_states"]

Pooling = Literal["first", "mean", "last"]

_TRIPLET_LOSSES = {
    "cosine": losses.cosine_triplet_loss,
    "euclidean": losses.euclidean_triplet_loss,
    "squared_euclidean": losses.squared_euclidean_triplet_loss,
}


class _Texts(NamedTuple):
    """The texts of rows, the query first: their vectors, ids, and 1 where there is one."""

    embeddings: Float[Array, "B T D"]
    ids: Int[Array, "B T"]
    there: Int[Array, "B T"]


@dataclass(frozen=True)
class _BiEncoder(Objective):
    """What both objectives share: the rows, and the vectors of their texts."""

    task: ClassVar[Literal["retrieval"]] = "retrieval"
    judged_by: ClassVar[Judge] = "mrr_at_10"
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: str = ""
    """Selects the objective."""
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    """Whether tokens see their whole text, or what is before them, as a decoder was trained to."""
    pooling: Pooling = "mean"
    """A text's vector: the state of its first token (DPR), the mean over its tokens (Sentence-BERT), or the state of
    its last."""

    def __post_init__(self) -> None:
        for key, accepted in (("attention", ("bidirectional", "causal")), ("pooling", ("first", "mean", "last"))):
            if getattr(self, key) not in accepted:
                raise UserError(f"objective.{key} is {getattr(self, key)!r}; accepted: {', '.join(accepted)}.")
        if self.attention == "causal" and self.pooling == "first":
            raise UserError(
                "objective.pooling is 'first' and objective.attention is 'causal', where the first token sees nothing "
                "of the text; accepted: mean, last."
            )

    @property
    def causal(self) -> bool:
        """As `attention` says."""
        return self.attention == "causal"

    def use(self, length: int) -> RowUse:
        """No vocabulary head."""
        return RowUse(length, 0, self.causal)

    def text_rows(self, vocab: Vocabulary, length: int, negatives: int) -> RowSpec:
        """[CLS] query [SEP], [CLS] text [SEP], ... in one row; refuses a vocabulary without these tokens."""
        cls, sep = vocab.require(f"objective {self.name}", "cls", "sep")
        return RowSpec("texts", length, (cls,), (sep,), ("text_ids",), texts=2 + negatives)

    def example(self, batch: Batch, there: Bool[Array, "B T"], first: int, last: int | None) -> Example:
        """The rows as they are, whose targets are texts `first` to `last`, of rows that have a query and its text."""
        mask = masks.causal() if self.causal else masks.bidirectional()
        counted = there[:, first:last] & jnp.all(there[:, :2], axis=1, keepdims=True)
        return Example(
            inputs=batch["tokens"],
            targets=batch["text_ids"][:, first:last],
            weights=counted.astype(jnp.float32),
            mask=mask.packed(batch["segment_ids"]),
            positions=batch["positions"],
            extra={"text_ids": batch["text_ids"], "there": there},
        )

    def embed(self, models: Models, example: Example, ctx: Context) -> Float[Array, "B T D"]:
        """The vectors of the texts, in float32 or wider."""
        hidden, segments = hidden_states(models["model"], example, ctx), example.mask.segment_ids
        assert segments is not None
        states = text_states(hidden, segments, example.extra["there"].shape[1], self.pooling)
        return constrain(states, ("batch", None, "activation_embed"))


@dataclass(frozen=True)
class InBatchContrastive(_BiEncoder):
    """Pick the text that belongs to a query out of all texts of the batch (`data.source: {name: retrieval}`).

    Candidates of a query are its text, the texts of all other rows, and the hard negatives of all rows. Not among them
    are texts equal to its own or to the query, and the texts of rows whose query is equal: the data says that they
    belong to it. Texts are equal where the files spell them alike (`text_ids`).

    The loss and its gradient are those of the global batch on any mesh, and under `train.accumulate` too: a forward
    pass gives the vectors of all texts, with which each microbatch finds its share of the gradient.

    Metrics: `accuracy`, how often the query's text is the first of its candidates. Evaluation adds figures of a search
    among all texts of the split; with `train.evaluate_batches`, among those of so many batches, which is easier.
    """

    summary: ClassVar[str] = "Find the text that belongs to a query among those of the batch (DPR, InfoNCE)."
    paper: ClassVar[str] = "Karpukhin et al. 2020, Dense Passage Retrieval for Open-Domain Question Answering"
    coefficients: ClassVar[dict[str, float]] = {"contrastive": 1.0}

    name: Literal["in_batch_contrastive"] = "in_batch_contrastive"
    """Find the text that belongs to a query among those of the batch."""
    negatives: int = 0
    """Hard negatives in a row, 0 or more: texts that the data says do not belong to the query."""
    normalise: bool = True
    """Whether vectors are made unit vectors, so that similarity is the cosine; false: products of vectors (DPR)."""
    temperature: float = 0.05
    """What similarities are divided by, above 0; 1 for products of vectors (DPR)."""
    symmetric: bool = False
    """Whether texts look for their queries too, among those of all rows; both directions count half."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.negatives < 0:
            raise UserError(f"objective.negatives is {self.negatives}; accepted: 0 or more texts.")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"objective.temperature is {self.temperature}; it must be a finite number above 0.")

    def rows(self, vocab: Vocabulary, length: int) -> RowSpec:
        """A query, its text, and `negatives` others."""
        return self.text_rows(vocab, length, self.negatives)

    def corrupt(self, keys: Key[Array, " B"], batch: Batch, ctx: Context) -> Example:
        """The rows as they are, and their places in the global batch."""
        there = _texts_there(batch["segment_ids"], 2 + self.negatives)
        example = self.example(batch, there, 1, 2)
        count = len(batch["tokens"])
        places = ctx.part * count + jnp.arange(count, dtype=jnp.int32)
        return Example(**{**vars(example), "extra": {**example.extra, "places": places}})

    def embed(self, models: Models, example: Example, ctx: Context) -> Float[Array, "B T D"]:
        """The vectors, of length 1 with `normalise`."""
        states = super().embed(models, example, ctx)
        return losses.unit_vectors(states) if self.normalise else states

    def statistics(self, models: Models, example: Example, carried: Any, ctx: Context) -> _Texts:
        """The texts of these rows at their places in the global batch, and zeros elsewhere."""
        texts, places = self._texts(models, example, ctx), example.extra["places"]
        count = len(places) * ctx.parts
        return jax.tree.map(lambda x: jnp.zeros((count, *x.shape[1:]), x.dtype).at[places].set(x), texts)

    def terms(self, models: Models, example: Example, carried: Any, ctx: Context) -> Terms:
        """`contrastive`: the sum over queries.

        Of a part of a batch the value is that of its own queries, and the gradient that of all queries' losses with
        respect to its own texts: the chain rule over the texts of the batch, added up over its parts.
        """
        own = self._texts(models, example, ctx)
        whole: _Texts | None = ctx.statistics
        if whole is None:
            loss, correct = self._losses(own)
            total = jnp.sum(loss * example.weights[:, 0])
        else:
            places = example.extra["places"]
            texts = whole._replace(embeddings=whole.embeddings.at[places].set(own.embeddings))
            every, right = self._losses(texts)
            loss, correct = every[places], right[places]
            total = jnp.sum(every * jnp.all(whole.there[:, :2] > 0, axis=1))
            value = jnp.sum(loss * example.weights[:, 0])
            total = jax.lax.stop_gradient(value) + total - jax.lax.stop_gradient(total)
        metrics = {"accuracy": (jnp.sum(correct * example.weights[:, 0]), jnp.sum(example.weights))}
        return Terms({"contrastive": total}, metrics, carried, {"embeddings": own.embeddings})

    def _texts(self, models: Models, example: Example, ctx: Context) -> _Texts:
        there = example.extra["there"].astype(jnp.int32)
        return _Texts(self.embed(models, example, ctx), example.extra["text_ids"], there)

    def _losses(self, texts: _Texts) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
        """Of each row's query among the texts of all rows: the loss, and whether its own text is the first."""
        rows, others = texts.ids.shape[0], texts.ids.shape[1] - 1
        ids, there = texts.ids, texts.there > 0
        queries = constrain(texts.embeddings[:, 0], ("batch", "activation_embed"))
        # Every device needs all texts: they are gathered once, and not the similarities of parts of vectors.
        every = constrain(texts.embeddings[:, 1:].reshape(rows * others, -1), (None, "activation_embed"))
        similarity = jnp.einsum("qd,cd->qc", queries, every, precision=jax.lax.Precision.HIGHEST)
        similarity = constrain(similarity, ("batch", None)).reshape(rows, rows, others)  # [query, row, text of the row]
        related = (ids[:, None, 0] == ids[None, :, 0]) | (ids[:, None, 1] == ids[None, :, 1])
        itself = ids[:, 0, None, None]
        candidates = there[None, :, 1:] & (ids[None, :, 1:] != ids[:, 1, None, None]) & (ids[None, :, 1:] != itself)
        candidates = candidates.at[:, :, 0].set(candidates[:, :, 0] & ~related)
        place = jnp.arange(rows)
        stats = losses.similarity_stats(
            similarity.reshape(rows, -1),
            place * others,
            temperature=self.temperature,
            candidates=candidates.reshape(rows, -1),
        )
        found = losses.nll(stats)
        if self.symmetric:
            others_queries = there[None, :, 0] & ~related & (ids[None, :, 0] != ids[:, 1, None])
            back = losses.info_nce(
                similarity[:, :, 0].T, place, temperature=self.temperature, candidates=others_queries
            )
            found = (found + back) / 2
        return found, stats.correct


@dataclass(frozen=True)
class Triplet(_BiEncoder):
    """Keep hard negatives farther from a query than its text, by a margin (`data.source: {name: retrieval}`).

    Vectors are unit vectors, as FaceNet's. The loss is a mean over triplets: one for each hard negative, and none of
    rows without.

    Metrics: `accuracy`, the share of triplets whose text is nearer to the query than the negative. Evaluation adds
    those of a search, as with `in_batch_contrastive`.
    """

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
        return self.example(batch, _texts_there(batch["segment_ids"], 2 + self.negatives), 2, None)

    def terms(self, models: Models, example: Example, carried: Any, ctx: Context) -> Terms:
        """`triplet`: the sum over triplets."""
        embeddings = losses.unit_vectors(self.embed(models, example, ctx))
        query, text, negatives = embeddings[:, :1], embeddings[:, 1:2], embeddings[:, 2:]
        loss = _TRIPLET_LOSSES[self.distance](query, text, negatives, margin=self.margin)
        nearer = jnp.sum(query * text, axis=-1) > jnp.sum(query * negatives, axis=-1)
        metrics = {"accuracy": (jnp.sum(nearer * example.weights), jnp.sum(example.weights))}
        total = jnp.sum(loss * example.weights)
        return Terms({"triplet": total}, metrics, carried, {"embeddings": embeddings})


def text_states(
    hidden: Float[Array, "B L D"], segments: Int[Array, "B L"], texts: int, pooling: Pooling
) -> Float[Array, "B T D"]:
    """The state of each of the segments 1 to `texts`, in float32 or wider: of its first or last token, or their mean; 0
    of a segment that is not there."""
    inside = segments[:, None] == jnp.arange(1, texts + 1)[:, None]  # [B, T, L]
    precise = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))
    if pooling == "mean":
        counts = jnp.maximum(jnp.sum(inside, axis=-1, keepdims=True), 1)
        shares = inside.astype(precise.dtype) / counts
        return jnp.einsum("btl,bld->btd", shares, precise, precision=jax.lax.Precision.HIGHEST)
    at = jnp.argmax(inside, axis=-1)
    if pooling == "last":
        at = inside.shape[-1] - 1 - jnp.argmax(inside[..., ::-1], axis=-1)
    states = jnp.take_along_axis(precise, at[..., None], axis=1)
    return jnp.where(jnp.any(inside, axis=-1)[..., None], states, 0)


def _texts_there(segments: Int[Array, "B L"], texts: int) -> Bool[Array, "B T"]:
    """Which of the segments 1 to `texts` have tokens."""
    return jnp.any(segments[:, None] == jnp.arange(1, texts + 1)[:, None], axis=-1)
