"""Token classification: the class of each tagged token (named entities, parts of speech).

    L = - sum_(b,t) v_bt log p_bt,y_bt / sum_(b,t) v_bt        p = softmax of the head's logits

with v = 1 where the token has a tag. Devlin et al. 2019, section 5.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from lmobj import losses
from lmobj.batch import NO_TAG, Batch, RowSpec, Vocabulary
from lmobj.models import HeadStyle, TokenHead
from lmobj.objectives._objective import Context, Example, Judge, Models, Terms, token_metrics
from lmobj.objectives._row_classes import check_class_count, check_classes_found
from lmobj.objectives._token_task import TokenTask

__all__ = ["TokenClassification"]


@dataclass(frozen=True)
class TokenClassification(TokenTask):
    """The class of each token of a sentence whose words are tagged (`data.source: {name: conll}`).

    A linear map of each token's state. Metrics: `nll` (nats per tagged token) and `accuracy` of tokens; evaluation adds
    precision, recall and F1 of entities, all of whose words must be right.
    """

    task: ClassVar[Literal["token_classification"]] = "token_classification"
    judged_by: ClassVar[Judge] = "entity_f1"
    summary: ClassVar[str] = "Tell the class of each word: entities, parts of speech."
    paper: ClassVar[str] = "Devlin et al. 2019, BERT, section 5.3"

    name: Literal["token_classification"] = "token_classification"
    """Tell the class of each word: entities, parts of speech."""
    classes: int = 2
    """Number of tags, at least 2: O, and those that the scheme has for each type of entity."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_class_count(self.classes)

    def check_classes(self, classes_of: Callable[[str | None], Sequence[str]]) -> None:
        """Refuses data whose tags are not as many as this objective's classes."""
        check_classes_found(self.classes, classes_of(None))

    def rows(self, vocab: Vocabulary, length: int) -> RowSpec:
        """[CLS] sentence [SEP], tagged; refuses a vocabulary without these tokens."""
        cls, sep = vocab.require(f"objective {self.name}", "cls", "sep")
        self.check_dropout(vocab)
        return RowSpec("tagged", length, (cls,), (sep,), ("tags",))

    def build_heads(self, style: HeadStyle, vocab: Vocabulary, rngs: nnx.Rngs) -> nnx.Module:
        """The classes of a token."""
        return TokenHead(style, self.classes, rngs)

    def corrupt(self, keys: Key[Array, " B"], batch: Batch, ctx: Context) -> Example:
        """The rows as they are, or with tokens dropped."""
        tags = batch["tags"]
        tagged = (tags != NO_TAG) & (batch["segment_ids"] > 0)
        return self.example(self.dropped(keys, batch, ctx), jnp.where(tagged, tags, 0), tagged.astype(jnp.float32))

    def terms(self, models: Models, example: Example, carried: Any, ctx: Context) -> Terms:
        """`nll`: the sum over tagged tokens."""
        logits = self.logits(models, example, ctx)
        stats = losses.logit_stats(logits, example.targets)
        nll = losses.nll(stats)
        metrics = token_metrics(nll, example.weights, stats.correct)
        return Terms({"nll": jnp.sum(nll * example.weights)}, metrics, carried, {"logits": logits})
