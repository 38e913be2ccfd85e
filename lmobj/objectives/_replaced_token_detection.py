"""Replaced token detection: a generator fills in masked tokens, and a discriminator tells which tokens it changed.

    L = L_MLM + 50 L_Disc
    L_MLM  = - sum_k w_k log p_G(x_{i_k} | masked x) / (sum_k w_k + 1e-6)          over the slots that were drawn
    L_Disc = - sum_t log p_D([x^_t is not x_t] | x^) / (number of tokens + 1e-6)   over all tokens but padding

where x^ is x with a sample of p_G in each place that was drawn; no gradient passes through the sample. Clark et al.
2020, "ELECTRA: Pre-training Text Encoders as Discriminators Rather Than Generators", section 3.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from lmobj import losses, masks, noise
from lmobj.batch import Batch, RowSpec, Vocabulary
from lmobj.errors import UserError
from lmobj.models import GeneratorDiscriminator, RowUse
from lmobj.objectives._masked_lm import check_room, maskable, masked_rows
from lmobj.objectives._objective import Context, Example, Metric, Models, Objective, Terms, token_metrics
from lmobj.objectives._tokens import head_stats

__all__ = ["ReplacedTokenDetection"]

_SAMPLING = 0x5A3E
"""Tells the keys of samples apart from those of dropout."""


@dataclass(frozen=True)
class ReplacedTokenDetection(Objective):
    """ELECTRA's pre-training: `mlm` trains the generator and `disc` the discriminator, on samples of the generator.

    The vocabulary head runs on the drawn positions alone, for the loss and for the samples, and never stores logits.
    The discriminator judges every token that is no padding, special tokens included. A batch that brings samples of its
    own (`sampled` [B, K]) has them used in place of the generator's.

    Metrics: `mlm_nll` (nats per drawn token) and `mlm_accuracy`; `disc_accuracy` over all tokens, beside which
    1 - `replaced` is what naming no token reaches; `disc_precision` and `disc_recall` of the tokens that were replaced.

    Deviations from the reference code: the count of a packed row is taken over the row, not over each document in it;
    no row has a slot less than round(mask_rate * length), where the reference has int((mask_rate + 0.005) * length) of
    them, which takes one from some rows of fewer than 100 tokens and from them alone;
    where a token is drawn twice, the first sample is taken (see `noise.replace_tokens`); `disallow_correct` excludes
    the true token, where the reference lowers its logit by 1000.
    """

    summary: ClassVar[str] = "Tell which tokens a small generator has replaced (ELECTRA)."
    paper: ClassVar[str] = (
        "Clark et al. 2020, ELECTRA: Pre-training Text Encoders as Discriminators Rather Than Generators"
    )
    coefficients: ClassVar[dict[str, float]] = {"mlm": 1.0, "disc": 50.0}
    epsilon: ClassVar[dict[str, float]] = {"mlm": 1e-6, "disc": 1e-6}
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: Literal["replaced_token_detection"] = "replaced_token_detection"
    """Tell which tokens a small generator has replaced."""
    mask_rate: float = 0.15
    """Share of a row's tokens that is drawn, in (0, 1); 0.25 for ELECTRA large."""
    max_predictions: int | None = None
    """Most tokens drawn in a row, at least 1; by default as many as `mask_rate` asks for."""
    mask_share: float = 0.85
    """Probability that a drawn token is masked for the generator; otherwise it sees the token."""
    replacement: bool = True
    """A token may be drawn more than once (the reference); false: the count is that of different tokens (BERT)."""
    temperature: float = 1.0
    """Of the generator's samples, above 0."""
    disallow_correct: bool = False
    """The generator never samples the true token."""
    layout: Literal["packed", "single"] = "packed"
    """`packed`: documents end to end, each seeing itself only; `single`: one piece of a document per row."""

    def __post_init__(self) -> None:
        if not 0 < self.mask_rate < 1:
            raise UserError(f"objective.mask_rate is {self.mask_rate}; it must be above 0 and below 1.")
        if not 0 <= self.mask_share <= 1:
            raise UserError(f"objective.mask_share is {self.mask_share}; it must be at least 0 and at most 1.")
        if self.max_predictions is not None and self.max_predictions < 1:
            raise UserError(f"objective.max_predictions is {self.max_predictions}; it must be at least 1, or null.")
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"objective.temperature is {self.temperature}; it must be a number above 0.")

    def use(self, length: int) -> RowUse:
        """The generator's head runs on the slots for predictions alone."""
        return RowUse(length, self._predictions(length))

    def rows(self, vocab: Vocabulary, length: int) -> RowSpec:
        """[CLS] document [SEP], packed or single; refuses a vocabulary without [MASK] and rows with nothing to see."""
        spec = masked_rows(self.name, vocab, self.layout, length)
        check_room(self.mask_rate, self._predictions(length), length, len(spec.prefix) + len(spec.suffix))
        return spec

    def corrupt(self, keys: Key[Array, " B"], batch: Batch, ctx: Context) -> Example:
        """The generator's rows, each masked by its own key; special tokens and padding are never drawn."""
        tokens, segments = batch["tokens"], batch["segment_ids"]
        present = segments > 0
        assert ctx.vocab.mask is not None
        mask = functools.partial(
            noise.mask_tokens_electra,
            num_predictions=self._predictions(tokens.shape[1]),
            mask_id=ctx.vocab.mask,
            mask_rate=self.mask_rate,
            mask_share=self.mask_share,
            replacement=self.replacement,
        )
        masked = jax.vmap(lambda *row, length: mask(*row, length=length))(
            keys, tokens, maskable(batch, ctx.vocab), length=jnp.sum(present, axis=1)
        )
        extra = {"original": tokens, "present": present.astype(jnp.float32)}
        return Example(
            inputs=masked.tokens,
            targets=masked.targets,
            weights=masked.weights,
            mask=masks.bidirectional().packed(segments),
            positions=batch["positions"],
            token_types=batch.get("token_types"),
            predict=masked.positions,
            extra=extra | ({"sampled": batch["sampled"]} if "sampled" in batch else {}),
        )

    def weights(self, example: Example) -> dict[str, Float[Array, ""]]:
        """`mlm`: the slots drawn; `disc`: the tokens that are no padding."""
        return {"mlm": jnp.sum(example.weights), "disc": jnp.sum(example.extra["present"])}

    def terms(self, models: Models, example: Example, carried: Any, ctx: Context) -> Terms:
        """`mlm` and `disc`: sums of the two losses."""
        model = _pair(models["model"])
        read: dict[str, Any] = {
            "mask": example.mask,
            "positions": example.positions,
            "token_types": example.token_types,
            "dropout": ctx.dropout,
        }
        generated = example.at_predictions(model.generator_hidden(example.inputs, **read))
        stats, sampled = self._generate(model, generated, example, ctx)
        nll = losses.nll(stats)
        assert example.predict is not None
        corrupted = jax.vmap(noise.replace_tokens)(example.extra["original"], example.predict, example.weights, sampled)
        logits = model.discriminate(model.discriminator_hidden(corrupted.tokens, **read))
        disc = losses.binary_nll(logits, corrupted.replaced)
        present = example.extra["present"]
        metrics = {f"mlm_{name}": x for name, x in token_metrics(nll, example.weights, stats.correct).items()}
        return Terms(
            {"mlm": jnp.sum(nll * example.weights), "disc": jnp.sum(disc * present)},
            metrics | _detection_metrics(logits > 0, corrupted.replaced, present),
            carried,
        )

    def _generate(
        self, model: GeneratorDiscriminator, hidden: Float[Array, "B K Dg"], example: Example, ctx: Context
    ) -> tuple[losses.LogitStats, Int[Array, "B K"]]:
        """The generator's losses at the slots, and its samples: constants, whatever the model is trained for."""
        states, head = model.generator_head_hidden(hidden), model.generator_head_table()
        stats = head_stats(states, head, example.targets)
        if "sampled" in example.extra:
            return stats, example.extra["sampled"]
        seeds = _slot_seeds(ctx.keys, hidden.shape[1])
        excluded = example.targets if self.disallow_correct else None
        return stats, losses.linear_gumbel_sample(
            states,
            head.table,
            seeds,
            bias=head.bias,
            temperature=self.temperature,
            vocab_size=head.vocab_size,
            soft_cap=head.soft_cap,
            excluded=excluded,
        )

    def _predictions(self, length: int) -> int:
        """K: slots of a row of `length` tokens."""
        return self.max_predictions or noise.prediction_count(length, self.mask_rate)


def _detection_metrics(
    named: Bool[Array, "B L"], replaced: Bool[Array, "B L"], present: Float[Array, "B L"]
) -> dict[str, Metric]:
    """How well the tokens `named` are those `replaced`."""
    total, hits = jnp.sum(present), jnp.sum(present * (named & replaced))
    changed = jnp.sum(present * replaced)
    return {
        "disc_accuracy": (jnp.sum(present * (named == replaced)), total),
        "disc_precision": (hits, jnp.sum(present * named)),
        "disc_recall": (hits, changed),
        "replaced": (changed, total),
    }


def _slot_seeds(keys: Key[Array, " B"], slots: int) -> UInt32[Array, "B K"]:
    """A seed for the sample of each slot of each row."""
    rows = jax.vmap(lambda key: jax.random.bits(jax.random.fold_in(key, _SAMPLING), dtype="uint32"))(keys)
    index: Int[Array, " K"] = jnp.arange(slots)
    return noise.fold_index(rows[:, None], index)


def _pair(model: nnx.Module) -> GeneratorDiscriminator:
    """The model, if it is a generator and a discriminator."""
    if not isinstance(model, GeneratorDiscriminator):
        raise UserError(
            f"objective replaced_token_detection needs a generator and a discriminator and {type(model).__name__} is "
            "one model; set model.name to electra."
        )
    return model
