"""Permutation language modelling: predict some tokens of a row, each from those before it in a random order.

    L = - sum_k w_k log p(x_{i_k} | x_j for all j before i_k in the order z, memory) / sum_k w_k

Yang et al. 2019, "XLNet: Generalized Autoregressive Pretraining for Language Understanding", eq. 5, with two streams
(section 2.3), memory (2.4), two texts per row (2.5) and the targets of section 3.1.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from lmobj import masks, noise
from lmobj.batch import Batch, RowSpec, Vocabulary
from lmobj.errors import UserError
from lmobj.masks import AttentionMask
from lmobj.models import RowUse, TwoStreamModel
from lmobj.objectives._objective import Context, Example, Models, Objective, ObjectiveState, Terms
from lmobj.objectives._tokens import token_terms

__all__ = ["PermutationLM"]


@dataclass(frozen=True)
class PermutationLM(Objective):
    """Permutation LM over streams of [reuse tokens | A SEP B SEP CLS], whose reused tokens are the next row's memory.

    No token is replaced: the order alone hides the targets, which are spans of tokens. The two halves of a row have
    orders of their own, and the second sees all of the first. Whether B follows A in the text is not predicted, as in
    the authors' code. Metrics: `nll` (nats per predicted token) and `accuracy`.

    Deviations from the authors' code: a token that comes first in its order and has no memory sees nothing, where
    theirs sees everything by an even softmax; a batch without targets costs 0, not NaN.
    """

    summary: ClassVar[str] = "Predict spans of tokens in a random order, with memory (XLNet)."
    paper: ClassVar[str] = "Yang et al. 2019, XLNet: Generalized Autoregressive Pretraining for Language Understanding"
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: Literal["permutation_lm"] = "permutation_lm"
    """Predict spans of tokens in a random order, with memory."""
    reuse: int | None = None
    """Tokens by which each row goes on in the text, the first half of the next row's memory; null: data.length // 2. 0,
    for rows of your own: a row is one half, and remembered whole."""
    perm_size: int | None = None
    """Tokens in a block of the order, a divisor of both halves; blocks come one after the other. null: `reuse`."""
    num_predictions: int | None = None
    """Most tokens predicted in a row; null: data.length // mask_alpha * mask_beta, 85 of 512."""
    mask_alpha: int = 6
    """A span of n tokens has n * mask_alpha // mask_beta tokens of context around it (the paper's K = 6)."""
    mask_beta: int = 1
    """See `mask_alpha`."""
    max_span: int = 5
    """Most tokens in a span, at least 1; a length n is drawn in proportion to 1 / n."""
    whole_words: bool = False
    """Spans count whole words; false: tokens, from the beginning of a word (the authors' code)."""
    bidirectional: bool = True
    """The second half of the batch reads its text from the end."""

    def use(self, length: int) -> RowUse:
        """Both streams, with the memory; the query stream stands at the predictions alone."""
        return RowUse(length, self._sizes(length)[2], memory=True, query_stream=True)

    def rows(self, vocab: Vocabulary, length: int) -> RowSpec:
        """[reuse | A SEP B SEP CLS], an end-of-sequence token between documents where the vocabulary has one.

        Refuses a vocabulary without [SEP] or [CLS], and halves that cannot be permuted.
        """
        sep, cls = vocab.require("objective permutation_lm", "sep", "cls")
        reuse, perm_size, predictions = self._sizes(length)
        if not 1 <= reuse <= length - 5:
            raise UserError(
                f"objective.reuse is {reuse}, and data.length gives rows of {length} tokens, which also hold two texts "
                f"and 3 special tokens; accepted: 1 to data.length - 5 = {length - 5}."
            )
        noise.check_permutation(length, predictions, reuse, perm_size, self.max_span, self.mask_alpha, self.mask_beta)
        return RowSpec(
            "stream_pairs",
            length,
            prefix=() if vocab.eos is None else (vocab.eos,),
            suffix=(sep, cls),
            fields=("word_starts",),
            reuse=reuse,
            bidirectional=self.bidirectional,
        )

    def init(self, models: Models, key: Key[Array, ""], batch_size: int) -> ObjectiveState:
        """An empty memory; refuses a model without two streams."""
        return ObjectiveState(carried=_two_streams(models["model"]).init_memory(batch_size))

    def corrupt(self, keys: Key[Array, " B"], batch: Batch, ctx: Context) -> Example:
        """Draws each row's targets and orders by its own key. A row is one text: its documents see one another."""
        tokens = batch["tokens"]
        segments = (batch["segment_ids"] > 0).astype(jnp.int32)
        reuse, perm_size, predictions = self._sizes(tokens.shape[1])
        permute = functools.partial(
            noise.permute_tokens,
            num_predictions=predictions,
            reuse=reuse,
            perm_size=perm_size,
            max_span=self.max_span,
            mask_alpha=self.mask_alpha,
            mask_beta=self.mask_beta,
            whole_words=self.whole_words,
        )
        functional = (tokens == ctx.vocab.sep) | (tokens == ctx.vocab.cls)
        lengths = jnp.sum(segments, axis=1)
        backward = batch.get("backward", lengths < 0)
        permuted = jax.vmap(lambda key, *row, length, backward: permute(key, *row, length=length, backward=backward))(
            keys, tokens, functional, batch["word_starts"], length=lengths, backward=backward
        )
        return Example(
            inputs=tokens,
            targets=permuted.targets,
            weights=permuted.weights,
            mask=masks.permutation(permuted.query_rank, permuted.key_rank, sees_self=True).packed(segments),
            token_types=batch["token_types"],
            predict=permuted.positions,
            extra={"prediction_rank": permuted.prediction_rank}
            | ({"backward": batch["backward"]} if "backward" in batch else {}),
        )

    def terms(self, models: Models, example: Example, carried: Any, ctx: Context) -> Terms:
        """`nll`: the weighted sum of losses at the targets; the memory is carried on."""
        model = _two_streams(models["model"])
        assert example.predict is not None
        _, hidden, memory = model.two_streams(
            example.inputs,
            example.predict,
            content_mask=example.mask,
            query_mask=query_mask(example),
            memory=carried,
            token_types=example.token_types,
            backward=example.extra.get("backward"),
            reuse=self._sizes(example.inputs.shape[1])[0] or None,
            dropout=ctx.dropout,
        )
        return token_terms(model, hidden, example, memory)

    def _sizes(self, length: int) -> tuple[int, int, int]:
        """(reuse, perm_size, predictions) for rows of `length` tokens."""
        reuse = length // 2 if self.reuse is None else self.reuse
        perm_size = (reuse or length) if self.perm_size is None else self.perm_size
        share = length * self.mask_beta // self.mask_alpha if self.mask_alpha > 0 else 1
        return reuse, perm_size, share if self.num_predictions is None else self.num_predictions


def _two_streams(model: nnx.Module) -> TwoStreamModel:
    """The model, if it has two streams."""
    if not isinstance(model, TwoStreamModel):
        raise UserError(
            f"objective permutation_lm needs a model with two streams and {type(model).__name__} has one; set "
            "model.name to xlnet."
        )
    return model


def query_mask(example: Example) -> AttentionMask:
    """The mask of the query stream: a prediction sees what comes before it in the order, and not itself."""
    mask = example.mask
    assert mask.segment_ids is not None
    assert mask.key_rank is not None
    assert example.predict is not None
    segments = jnp.take_along_axis(mask.segment_ids, example.predict, axis=1)
    return masks.permutation(example.extra["prediction_rank"], mask.key_rank).packed(segments, mask.segment_ids)
