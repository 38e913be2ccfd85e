"""Multi-token prediction: from each token predict several that follow, not the next one alone.

    L = L_1 + c / (n - 1) sum_{k=2..n} L_k          L_k = - sum_t w_{tk} log p_k(x_{t+k} | ...) / sum_t w_{tk}

where w_{tk} is 0 if x_{t+k} is not in the document of x_t, and all p_k share the model's output table:

    parallel      p_k(x_{t+k} | x_1 .. x_t)          from B_k(z_t), z being the input of the model's last block B_1
    sequential    p_k(x_{t+k} | x_1 .. x_{t+k-1})    from h_t^{k-1} = B_k(M_k [RMSNorm(h_t^{k-2}); RMSNorm(e_{t+k-1})]),
                                                     h^0 being the model's hidden states and e its embedded tokens

Gloeckle et al. 2024, "Better & Faster Large Language Models via Multi-token Prediction", section 2; DeepSeek-AI 2024,
"DeepSeek-V3 Technical Report", section 2.2, eqs. 21 to 25.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from lmobj import losses
from lmobj.batch import Batch, RowSpec, Vocabulary
from lmobj.errors import UserError
from lmobj.models import HeadStyle, ParallelHeads, RowUse, SequentialHeads
from lmobj.objectives._causal_lm import next_token_example, next_token_terms, targets_ahead
from lmobj.objectives._objective import Context, Example, Models, Objective, Role, Terms, token_metrics
from lmobj.objectives._tokens import head_stats

__all__ = ["MultiTokenPrediction"]


@dataclass(frozen=True)
class MultiTokenPrediction(Objective):
    """Causal LM over packed rows, with heads that predict further tokens of the same document.

    The model by itself is a whole causal language model: it predicts the next token, and text is written and scored by
    it alone. A further token's head is one more block, built like the model's own and scored against the model's
    output table. Each term is a mean over targets of its own, which are fewer the further ahead they are.

    `parallel`: the model's last block is the first head, and the others stand beside it, under the model's last norm,
    as in the published code. The paper takes as many layers from the trunk as there are further heads, so that size
    and work stay as they were; set `model.layers` accordingly.

    `sequential`: each head reads the states that the one before it made, and the token that was predicted there. The
    first reads the model's states after its last norm, and each has a norm of its own after its block, as Megatron-LM
    and vLLM have it for the published weights, which the paper leaves open. Those weights put the token's half of the
    joined vector first; here it is second, as in the paper.

    Metrics: those of causal_lm for the next token; `nll_k` and `accuracy_k` of the token k places ahead.

    Deviations: heads have no experts where the model has some, and DeepSeek-V3's have. Its further losses are divided
    by the row's length (eq. 24), here by the number of their targets. All losses are computed without logits, so the
    order of heads by which Gloeckle et al. save memory has no place.
    """

    summary: ClassVar[str] = "Predict several tokens ahead from each one (multi-token prediction)."
    paper: ClassVar[str] = (
        "Gloeckle et al. 2024, Better & Faster Large Language Models via Multi-token Prediction; DeepSeek-AI 2024, "
        "DeepSeek-V3 Technical Report"
    )
    roles: ClassVar[Mapping[str, Role]] = {"model": Role.TRAINABLE, "heads": Role.TRAINABLE}
    causal: ClassVar[bool] = True
    judged_by: ClassVar[Literal["bits_per_byte"]] = "bits_per_byte"
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: Literal["multi_token_prediction"] = "multi_token_prediction"
    """Predict several tokens ahead from each one."""
    variant: Literal["parallel", "sequential"] = "parallel"
    """`parallel`: heads side by side that read the same states (Gloeckle et al.); `sequential`: one after the other,
    each of which reads one more token (DeepSeek-V3)."""
    tokens: int | None = None
    """How many tokens are predicted from each, the next one included, at least 2; null: 4 in parallel, 2 in sequence
    (the papers')."""
    further_weight: float | None = None
    """Weight c of the mean loss of the further tokens, above 0; null: in parallel their number, so that all tokens
    weigh alike, and in sequence 0.3 (the papers'). For a schedule set train.coefficients of nll_2, nll_3, ..."""

    def __post_init__(self) -> None:
        if self.variant not in ("parallel", "sequential"):
            raise UserError(f"objective.variant is {self.variant!r}; accepted: parallel, sequential.")
        if self.tokens is not None and self.tokens < 2:
            raise UserError(
                f"objective.tokens is {self.tokens}; accepted: at least 2, or objective.name=causal_lm to predict the "
                "next token alone."
            )
        if self.further_weight is not None and self.further_weight <= 0:
            raise UserError(f"objective.further_weight is {self.further_weight}; it must be above 0, or null.")

    @property
    def further(self) -> range:
        """How many places ahead the further tokens are: 2, 3, ..., n."""
        default = 4 if self.variant == "parallel" else 2
        return range(2, (default if self.tokens is None else self.tokens) + 1)

    @property
    def coefficients(self) -> Mapping[str, float]:
        """1 for the next token, and for each further one its share of the weight."""
        default = len(self.further) if self.variant == "parallel" else 0.3
        weight = default if self.further_weight is None else self.further_weight
        return {"nll": 1.0} | {f"nll_{k}": weight / len(self.further) for k in self.further}

    def build_heads(self, style: HeadStyle, vocab: Vocabulary, rngs: nnx.Rngs) -> nnx.Module:
        """A block for each further token; refuses models whose blocks cannot have others beside them."""
        if style.blocks is None:
            raise UserError(
                "objective multi_token_prediction makes heads of blocks like the model's own, and the model that "
                "model.name gives has none that others can stand beside; accepted: model.name=decoder."
            )
        heads = ParallelHeads if self.variant == "parallel" else SequentialHeads
        return heads(style.blocks, len(self.further), rngs)

    def use(self, length: int) -> RowUse:
        """Every position predicts each of the tokens, the further ones by blocks of their own."""
        further = len(self.further)
        return RowUse(length, (1 + further) * length, causal=True, further_blocks=further)

    def rows(self, vocab: Vocabulary, length: int) -> RowSpec:
        """Rows of `length` tokens, as for causal_lm; refuses a length within which the furthest token never lies."""
        furthest = self.further[-1]
        if length <= furthest:
            raise UserError(
                f"data.length is {length}; multi_token_prediction predicts up to {furthest} tokens ahead and needs at "
                f"least {furthest + 1}, or fewer objective.tokens."
            )
        suffix = () if vocab.eos is None else (vocab.eos,)
        return RowSpec("packed", length, suffix=suffix, fields=("token_bytes",))

    def corrupt(self, keys: Key[Array, " B"], batch: Batch, ctx: Context) -> Example:
        """Shifts the row by one token and more to make targets; nothing is random. `loss_mask` is read as in causal_lm.

        `extra` has `targets_k` and `weights_k` [B, L] of the tokens k places ahead.
        """
        example = next_token_example(batch, batch["segment_ids"], batch["positions"])
        extra = dict(example.extra)
        for k in self.further:
            extra[f"targets_{k}"], extra[f"weights_{k}"] = targets_ahead(batch, batch["segment_ids"], k)
        return dataclasses.replace(example, extra=extra)

    def weights(self, example: Example) -> dict[str, Float[Array, ""]]:
        """Of each term the targets of its own."""
        further = {f"nll_{k}": jnp.sum(example.extra[f"weights_{k}"]) for k in self.further}
        return {"nll": jnp.sum(example.weights)} | further

    def terms(self, models: Models, example: Example, carried: Any, ctx: Context) -> Terms:
        """`nll` of the next token, by the model itself, and `nll_k` of the token k places ahead."""
        model = models["model"]
        states = model.block_states(example.inputs, mask=example.mask, positions=example.positions, dropout=ctx.dropout)
        main = next_token_terms(model, states.hidden, example, label_smoothing=0.0, z_loss=0.0, carried=carried)
        sums, metrics = dict(main.sums), dict(main.metrics)
        heads = model.head_hidden(models["heads"](model, states))
        for k, hidden in zip(self.further, heads, strict=True):
            weights = example.extra[f"weights_{k}"]
            stats = head_stats(hidden, model.head_table(), example.extra[f"targets_{k}"])
            nll = losses.nll(stats)
            sums[f"nll_{k}"] = jnp.sum(nll * weights)
            metrics |= {f"{name}_{k}": x for name, x in token_metrics(nll, weights, stats.correct).items()}
        return Terms(sums, metrics, carried)
