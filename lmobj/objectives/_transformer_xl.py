"""Causal language modelling over streams of text, with a memory of the rows before.

    L = - sum_t w_t log p(x_{t+1} | x_1..x_t, memory) / sum_t w_t

Dai et al. 2019, "Transformer-XL: Attentive Language Models beyond a Fixed-Length Context", section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from flax import nnx
from jaxtyping import Array, Key

from lmobj.batch import Batch, RowSpec, Vocabulary
from lmobj.errors import UserError
from lmobj.models import MemoryModel, RowUse
from lmobj.objectives._causal_lm import as_one_text, check_token_loss, next_token_example, next_token_terms
from lmobj.objectives._objective import Context, Example, Models, Objective, ObjectiveState, Terms

__all__ = ["TransformerXL"]


@dataclass(frozen=True)
class TransformerXL(Objective):
    """Causal LM whose rows go on where the rows of the batch before ended, and see what the model remembers of them.

    A row is one text: attention and targets run on from document to document, as an end-of-sequence token after each,
    where the vocabulary has one, tells. Metrics: `nll`, `accuracy` and `bits_per_byte`, as for causal_lm.

    Deviation from the paper: the last token of a row predicts nothing, because its target is in the next row, so that
    one token in `data.length` is never a target, and figures are of the others.
    """

    summary: ClassVar[str] = "Predict each token from those before it, with memory of earlier rows (Transformer-XL)."
    paper: ClassVar[str] = "Dai et al. 2019, Transformer-XL: Attentive Language Models beyond a Fixed-Length Context"
    causal: ClassVar[bool] = True
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: Literal["transformer_xl"] = "transformer_xl"
    """Predict each token from those before it, with memory of earlier rows."""
    label_smoothing: float = 0.0
    """Share of the target's probability spread evenly over the whole vocabulary, in [0, 1)."""
    z_loss: float = 0.0
    """Weight of logsumexp(logits)^2 per token, at least 0 (PaLM: 1e-4)."""

    def __post_init__(self) -> None:
        check_token_loss(self.label_smoothing, self.z_loss)

    def use(self, length: int) -> RowUse:
        """Every position is predicted, with the memory."""
        return RowUse(length, length, causal=True, memory=True)

    def rows(self, vocab: Vocabulary, length: int) -> RowSpec:
        """Streams in rows of `length` tokens; refuses a length that leaves nothing to predict."""
        if length < 2:
            raise UserError(f"data.length is {length}; transformer_xl predicts the next token and needs at least 2.")
        suffix = () if vocab.eos is None else (vocab.eos,)
        return RowSpec("stream", length, suffix=suffix, fields=("token_bytes",))

    def init(self, models: Models, key: Key[Array, ""], batch_size: int) -> ObjectiveState:
        """An empty memory; refuses a model that cannot have one."""
        return ObjectiveState(carried=_with_memory(models["model"]).init_memory(batch_size))

    def corrupt(self, keys: Key[Array, " B"], batch: Batch, ctx: Context) -> Example:
        """Shifts the row by one to make targets; nothing is random. `loss_mask` is read as in causal_lm."""
        return next_token_example(batch, *as_one_text(batch["segment_ids"]))

    def terms(self, models: Models, example: Example, carried: Any, ctx: Context) -> Terms:
        """`nll`: the weighted sum of next-token losses; the memory is carried on."""
        model = _with_memory(models["model"])
        hidden, memory = model.recurrent(example.inputs, mask=example.mask, memory=carried, dropout=ctx.dropout)
        return next_token_terms(
            model, hidden, example, label_smoothing=self.label_smoothing, z_loss=self.z_loss, carried=memory
        )


def _with_memory(model: nnx.Module) -> MemoryModel:
    """The model, if it can have a memory."""
    if not isinstance(model, MemoryModel):
        raise UserError(
            f"objective transformer_xl needs a model with a memory and {type(model).__name__} has none; set model.name "
            "to xlnet, or use objective causal_lm."
        )
    return model
