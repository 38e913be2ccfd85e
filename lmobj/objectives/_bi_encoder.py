"""Bi-encoders: vectors of texts, and losses that want one text of a whole batch to be the nearest.

    L = - sum_b v_b log( exp(s_bb / tau + w_bb) / sum_{c in C_b} exp(s_bc / tau + w_bc) ) / sum_b v_b

where s_bc = e(q_b) . e(c), C_b holds texts of all rows of the global batch, hard negatives included, and v = 1 where
there are texts; which texts count, and whether any has a weight w, is up to the objective. Every text goes through the
model by itself: the texts of a row are packed segments. Query and text have the same model.

Large batches in parts: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"
(GradCache).
"""

from __future__ import annotations

import abc
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
from lmobj.objectives._objective import Context, Example, Models, Objective, Terms
from lmobj.objectives._tokens import hidden_states
from lmobj.partition import constrain

__all__ = [
    "BiEncoder",
    "Contrastive",
    "Pooling",
    "Texts",
    "other_texts",
    "related_rows",
    "similarities",
    "text_states",
    "texts_there",
]

Pooling = Literal["first", "mean", "last"]


class Texts(NamedTuple):
    """The texts of rows, the query first: their vectors, ids, and 1 where there is one."""

    embeddings: Float[Array, "B T D"]
    ids: Int[Array, "B T"]
    there: Int[Array, "B T"]


@dataclass(frozen=True)
class BiEncoder(Objective):
    """Rows of texts, and the vectors of these: what the objectives of matching share."""

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

    def vectors(
        self, models: Models, tokens: Int[Array, "B L"], segments: Int[Array, "B L"], ctx: Context
    ) -> Float[Array, "B D"]:
        """The vectors of rows of one text each, segment 1."""
        positions = jnp.arange(tokens.shape[1]) * segments
        batch = {"tokens": tokens, "segment_ids": segments, "positions": positions, "text_ids": segments[:, :1]}
        return self.embed(models, self.example(batch, texts_there(segments, 1), 0, 1), ctx)[:, 0]

    def embed(self, models: Models, example: Example, ctx: Context) -> Float[Array, "B T D"]:
        """The vectors of the texts, in float32 or wider."""
        hidden, segments = hidden_states(models["model"], example, ctx), example.mask.segment_ids
        assert segments is not None
        states = text_states(hidden, segments, example.extra["there"].shape[1], self.pooling)
        return constrain(states, ("batch", None, "activation_embed"))


@dataclass(frozen=True)
class Contrastive(BiEncoder, abc.ABC):
    """Base of the objectives that want a query's text to be the nearest of the batch.

    The loss and its gradient are those of the global batch on any mesh, and under `train.accumulate` too: a forward
    pass gives the vectors of all texts, with which each microbatch finds its share of the gradient.
    """

    coefficients: ClassVar[dict[str, float]] = {"contrastive": 1.0}

    negatives: int = 0
    """Hard negatives in a row, 0 or more: texts that the data says do not belong to the query."""
    temperature: float = 0.05
    """What similarities are divided by, above 0; 1 for products of vectors (DPR)."""

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
        there = texts_there(batch["segment_ids"], 2 + self.negatives)
        example = self.example(batch, there, 1, 2)
        extra = {**example.extra, "places": ctx.places(len(there))}
        return Example(**{**vars(example), "extra": extra})

    def statistics(self, models: Models, example: Example, carried: Any, ctx: Context) -> Texts:
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
        whole: Texts | None = ctx.statistics
        if whole is None:
            loss, correct = self.query_losses(own)
            total = jnp.sum(loss * example.weights[:, 0])
        else:
            places = example.extra["places"]
            texts = whole._replace(embeddings=whole.embeddings.at[places].set(own.embeddings))
            every, right = self.query_losses(texts)
            loss, correct = every[places], right[places]
            total = jnp.sum(every * jnp.all(whole.there[:, :2] > 0, axis=1))
            value = jnp.sum(loss * example.weights[:, 0])
            total = jax.lax.stop_gradient(value) + total - jax.lax.stop_gradient(total)
        metrics = {"accuracy": (jnp.sum(correct * example.weights[:, 0]), jnp.sum(example.weights))}
        return Terms({"contrastive": total}, metrics, carried, {"embeddings": own.embeddings})

    @abc.abstractmethod
    def query_losses(self, texts: Texts) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
        """Of each row's query among the texts of all rows: the loss, and whether its own text is the first."""

    def stats(self, similarity: Float[Array, "B B T"], candidates: Bool[Array, "B B T"]) -> losses.LogitStats:
        """Of each query among the candidates, of which the first text of its own row belongs to it."""
        rows, others = similarity.shape[1:]
        return losses.similarity_stats(
            similarity.reshape(rows, -1),
            jnp.arange(rows) * others,
            temperature=self.temperature,
            candidates=candidates.reshape(rows, -1),
        )

    def _texts(self, models: Models, example: Example, ctx: Context) -> Texts:
        there = example.extra["there"].astype(jnp.int32)
        return Texts(self.embed(models, example, ctx), example.extra["text_ids"], there)


def similarities(texts: Texts) -> Float[Array, "B B T"]:
    """[query, row, text of the row]: products of the vectors of every query with those of all texts."""
    rows, others = texts.ids.shape[0], texts.ids.shape[1] - 1
    queries = constrain(texts.embeddings[:, 0], ("batch", "activation_embed"))
    # Every device needs all texts: they are gathered once, and not the similarities of parts of vectors.
    every = constrain(texts.embeddings[:, 1:].reshape(rows * others, -1), (None, "activation_embed"))
    similarity = jnp.einsum("qd,cd->qc", queries, every, precision=jax.lax.Precision.HIGHEST)
    return constrain(similarity, ("batch", None)).reshape(rows, rows, others)


def related_rows(texts: Texts) -> Bool[Array, "B B"]:
    """Rows with an equal query or text: the data says that the one's text belongs to the other's query."""
    ids = texts.ids
    return (ids[:, None, 0] == ids[None, :, 0]) | (ids[:, None, 1] == ids[None, :, 1])


def other_texts(texts: Texts) -> Bool[Array, "B B T"]:
    """Which texts each query is told from: those that are no other's way to spell its own text, nor the query itself,
    nor of `related_rows`."""
    ids, there = texts.ids, texts.there > 0
    itself = ids[:, 0, None, None]
    candidates = there[None, :, 1:] & (ids[None, :, 1:] != ids[:, 1, None, None]) & (ids[None, :, 1:] != itself)
    return candidates.at[:, :, 0].set(candidates[:, :, 0] & ~related_rows(texts))


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


def texts_there(segments: Int[Array, "B L"], texts: int) -> Bool[Array, "B T"]:
    """Which of the segments 1 to `texts` have tokens."""
    return jnp.any(segments[:, None] == jnp.arange(1, texts + 1)[:, None], axis=-1)
