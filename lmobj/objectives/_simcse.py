"""SimCSE: vectors of sentences, from nothing but dropout, or from pairs of which one follows from the other.

    L = - sum_b v_b log( exp(cos(x_b, y_b) / tau) / sum_{c in C} exp(cos(x_b, c) / tau + w_bc) ) / sum_b v_b

Unsupervised, x_b and y_b are the vectors of one sentence under two draws of dropout, and C holds those y of the whole
batch. Supervised, y_b is a sentence that follows from x_b, and C also holds the sentences that contradict, of which the
row's own have the weight w_bc = log alpha. In both the loss has one direction: y does not look for its x.

The sentence is in the row twice, one behind the other: dropout is a hash of the place in the row, so each copy draws
for itself, and attention keeps segments apart.

Gao et al. 2021, "SimCSE: Simple Contrastive Learning of Sentence Embeddings", sections 3 and 4 and eq. 5; the head and
where it is used as in its released code. Deviation: a sentence is cut to half of data.length.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from lmobj import losses
from lmobj.batch import Batch, RowSpec, Vocabulary
from lmobj.errors import UserError
from lmobj.models import HeadStyle, VectorHead
from lmobj.objectives._bi_encoder import Contrastive, Pooling, Texts, other_texts, similarities
from lmobj.objectives._objective import Context, Example, Judge, Models, Role, Task

__all__ = ["SimCSE"]

HeadUse = Literal["train_only", "always", "none"]
_LEAST = 3
"""Tokens of a sentence's row: those around it, and one of its own."""


@dataclass(frozen=True)
class SimCSE(Contrastive):
    """Vectors of sentences that tell a sentence from the others of the batch (SimCSE).

    Unsupervised, a document is a sentence (records of jsonl, tsv or parquet, or blocks of text files), cut to half of
    `data.length`, and the model must have dropout. Equal sentences of a batch are negatives of one another, as in the
    paper: `data.clean.exact_duplicates` leaves them out of the data. Supervised, `data.source: {name: retrieval}` has
    for each sentence one that follows from it, and hard negatives that contradict it.

    For masked language modelling beside it, as in the paper's ablation, make it a member of a mixture with `masked_lm`
    at a weight of 0.1.

    Metrics: `accuracy`, how often a sentence's own view is the nearest. Without dropout, in evaluation, the two views
    of a sentence are equal, and the unsupervised loss says how far sentences are from one another; `lmobj eval
    --similarity` says what the vectors are worth. The supervised form adds figures of a search among held-out texts.
    """

    summary: ClassVar[str] = "Tell a sentence's second view from all others of the batch (SimCSE)."
    paper: ClassVar[str] = "Gao et al. 2021, SimCSE: Simple Contrastive Learning of Sentence Embeddings"

    name: Literal["simcse"] = "simcse"
    """Tell a sentence's second view from all others of the batch."""
    supervised: bool = False
    """Whether pairs of sentences are given; false: views of a sentence by dropout alone."""
    pooling: Pooling = "first"
    """A sentence's vector: the state of its first token (the paper's), the mean over its tokens, or the last's."""
    hard_negative_weight: float = 0.0
    """Added to the logits of the row's own hard negatives, log alpha of the paper's eq. 5; supervised."""
    equal_texts: Literal["negatives", "left_out"] = "negatives"
    """Supervised: texts of other rows that are spelt as the row's own are negatives all the same, as in the paper's
    code, or left out, as `in_batch_contrastive` does."""
    head: HeadUse | None = None
    """Dense and tanh on the vector: `train_only` leaves it away in evaluation, as the unsupervised form does by
    default, `always` is the default of the supervised one, and `none` that of any pooling but `first`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head not in (None, "train_only", "always", "none"):
            raise UserError(f"objective.head is {self.head!r}; accepted: train_only, always, none.")
        if self.equal_texts not in ("negatives", "left_out"):
            raise UserError(f"objective.equal_texts is {self.equal_texts!r}; accepted: negatives, left_out.")
        if not math.isfinite(self.hard_negative_weight):
            raise UserError(
                f"objective.hard_negative_weight is {self.hard_negative_weight}; it must be a finite number."
            )
        if self.hard_negative_weight and not self.negatives:
            raise UserError(
                f"objective.hard_negative_weight is {self.hard_negative_weight} and objective.negatives is 0; "
                "accepted: a weight with negatives of 1 or more."
            )
        if not self.supervised and self.negatives:
            raise UserError(
                f"objective.negatives is {self.negatives} and objective.supervised is false, where a row is one "
                "sentence; accepted: 0, or supervised: true."
            )
        if not self.supervised and self.equal_texts == "left_out":
            raise UserError(
                "objective.equal_texts is 'left_out' and objective.supervised is false, where rows do not say which "
                "sentence they are; accepted: negatives, with data.clean.exact_duplicates: true."
            )

    @property
    def head_use(self) -> HeadUse:
        """`head`, or what it is by default."""
        if self.head is not None:
            return self.head
        if self.pooling != "first":
            return "none"
        return "always" if self.supervised else "train_only"

    @property
    def roles(self) -> Mapping[str, Role]:
        """The model, and the head but for `none`."""
        return {"model": Role.TRAINABLE} | ({} if self.head_use == "none" else {"heads": Role.TRAINABLE})

    @property
    def task(self) -> Task | None:
        """Supervised, the vectors are searched."""
        return "retrieval" if self.supervised else None

    @property
    def judged_by(self) -> Judge:
        """The search, or the loss."""
        return "mrr_at_10" if self.supervised else "loss"

    def check_model(self, settings: Any) -> None:
        """Refuses a model without dropout, whose views of a sentence are equal."""
        fields = dataclasses.fields(settings) if dataclasses.is_dataclass(settings) else ()
        rates = [field.name for field in fields if field.name.endswith("dropout")]
        if not self.supervised and rates and not any(getattr(settings, name) for name in rates):
            keys = [f"model.{name}" for name in rates]
            raise UserError(
                f"{', '.join(keys)} are 0, and the views that objective simcse makes of a sentence differ by dropout "
                f"alone; accepted: one of them above 0, such as {keys[0]}=0.1, or objective.supervised=true."
            )

    def build_heads(self, style: HeadStyle, vocab: Vocabulary, rngs: nnx.Rngs) -> nnx.Module:
        """Dense and tanh."""
        return VectorHead(style, rngs)

    def rows(self, vocab: Vocabulary, length: int) -> RowSpec:
        """[CLS] sentence [SEP], with room for it twice; supervised, with others behind it."""
        if self.supervised:
            return super().rows(vocab, length)
        cls, sep = vocab.require(f"objective {self.name}", "cls", "sep")
        if length // 2 < _LEAST:
            raise UserError(
                f"data.length is {length}, half of which is a sentence; accepted: {2 * _LEAST} or more tokens."
            )
        return RowSpec("examples", length // 2, (cls,), (sep,))

    def corrupt(self, keys: Key[Array, " B"], batch: Batch, ctx: Context) -> Example:
        """Two views of each sentence; supervised, the rows as they are."""
        return super().corrupt(keys, batch if self.supervised else _twice(batch, ctx), ctx)

    def embed(self, models: Models, example: Example, ctx: Context) -> Float[Array, "B T D"]:
        """Unit vectors, of what the head says where it is used."""
        states = super().embed(models, example, ctx)
        if self.head_use == "always" or (ctx.train and self.head_use == "train_only"):
            states = models["heads"](states)
        return losses.unit_vectors(states)

    def query_losses(self, texts: Texts) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
        """Of each sentence among the second views, or the other sentences, of all rows."""
        similarity, candidates = similarities(texts), other_texts(texts)
        if self.equal_texts == "negatives":
            candidates = jnp.broadcast_to(texts.there[None, :, 1:] > 0, similarity.shape)
        if self.hard_negative_weight:
            place = jnp.arange(len(similarity))
            similarity = similarity.at[place, place, 1:].add(self.hard_negative_weight * self.temperature)
        stats = self.stats(similarity, candidates)
        return losses.nll(stats), stats.correct


def _twice(batch: Batch, ctx: Context) -> Batch:
    """Rows twice as long, which hold their sentence twice: segments 1 and 2, the second right behind the first, so
    that where it stands, and with it its dropout, does not depend on padding."""
    segments = batch["segment_ids"]
    size, place = jnp.sum(segments > 0, axis=1, keepdims=True), jnp.arange(2 * segments.shape[1])
    first, inside = place < size, place < 2 * size
    whence = jnp.clip(jnp.where(first, place, place - size), 0, segments.shape[1] - 1)

    def doubled(name: str, outside: int) -> Array:
        return jnp.where(inside, jnp.take_along_axis(batch[name], whence, axis=1), outside)

    return {
        "tokens": doubled("tokens", ctx.vocab.pad),
        "segment_ids": jnp.where(inside, jnp.where(first, 1, 2), 0),
        "positions": doubled("positions", 0),
        "text_ids": 2 * ctx.places(len(segments))[:, None] + jnp.arange(2, dtype=jnp.int32),
    }
