"""The ELECTRA pair: a small generator that fills in masked tokens, and a discriminator that tells which were replaced.

Clark et al. 2020, "ELECTRA: Pre-training Text Encoders as Discriminators Rather Than Generators", section 3; the
gradient-disentangled embeddings are of He et al. 2021, "DeBERTaV3", section 3.3. What is shared is shared by functions:
a parameter has one place in the model.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, NoReturn

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt32

from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.masks import AttentionMask
from lmobj.models._encoder import Embeddings, EncoderConfig, MaskedLMHead, Trunk
from lmobj.models._heads import HeadStyle
from lmobj.models._layers import ACTIVATIONS, Linear, glorot_uniform, zeros
from lmobj.models._protocol import OutputHead, RowUse
from lmobj.models._settings import at_least

__all__ = ["Electra", "ElectraConfig"]

Sharing = Literal["embeddings", "none", "all", "gradient_disentangled"]

DISCRIMINATOR = 0x5BF03635
"""Turns a row's dropout seed into that of the discriminator, so that the trunks draw apart."""


@dataclass(frozen=True)
class ElectraConfig(EncoderConfig):
    """A discriminator, which the encoder's settings describe, and its generator. The defaults are ELECTRA base."""

    name: Literal["electra"] = "electra"  # type: ignore[assignment]  # the tag of another family
    """Generator and discriminator (ELECTRA)."""
    generator_fraction: float = 1 / 3
    """Width of the generator over the discriminator's, rounded, in (0, 1]."""
    generator_layers: int | None = None
    """Blocks of the generator; null: `layers`."""
    generator_heads: int | None = None
    """Heads of the generator; null: its width / 64 rounded down, at least 1."""
    generator_mlp_width: int | None = None
    """Inner width of the generator's feed-forward part; null: 4 times its width."""
    sharing: Sharing = "embeddings"
    """`embeddings`: the same embeddings, norm included, for both (ELECTRA); `none`: each has its own; `all`: one trunk
    is both, and the generator has no settings; `gradient_disentangled`: the discriminator adds tables of its own, zero
    at first, to the generator's, into which it sends no gradient (DeBERTa-v3)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.generator_fraction <= 1:
            raise UserError(f"model.generator_fraction is {self.generator_fraction}; it must be above 0 and at most 1.")
        at_least(self, 1, "generator_layers", "generator_heads", "generator_mlp_width")
        if self.sharing == "all":
            self._check_one_trunk()
            return
        width, heads = self._generator_size()
        if width < 1 or width % heads:
            raise UserError(
                f"model.generator_fraction {self.generator_fraction} of model.width {self.width} is a generator of "
                f"width {width} with {heads} heads (model.generator_heads); heads must divide the width."
            )
        if self.positions == "rotary" and width // heads % 2:
            raise UserError(
                f"model.positions is rotary and the generator's heads have width {width // heads}, which must be even: "
                f"change model.generator_heads ({heads}) or model.generator_fraction ({self.generator_fraction})."
            )

    def build(self, vocab: Vocabulary, rngs: nnx.Rngs) -> Electra:
        """The pair with fresh parameters."""
        return Electra(self, vocab, rngs)

    def forward_flops(self, vocab_size: int, use: RowUse) -> float:
        """Operations of a forward pass over one row (`CountsProducts`): of both trunks and heads, or of the
        discriminator's trunk alone where nothing is predicted by the generator, which has the vocabulary head."""
        trunk = self.discriminator.trunk_flops(use)
        if not use.predictions:
            return trunk
        detection = 2 * use.length * (self.width**2 + self.width)
        return trunk + detection + self.generator.forward_flops(vocab_size, use)

    @property
    def discriminator(self) -> EncoderConfig:
        """The discriminator's settings."""
        fields = [field.name for field in dataclasses.fields(EncoderConfig) if field.name != "name"]
        return EncoderConfig(**{name: getattr(self, name) for name in fields})

    @property
    def generator(self) -> EncoderConfig:
        """The generator's settings."""
        if self.sharing == "all":
            return self.discriminator
        width, heads = self._generator_size()
        return dataclasses.replace(
            self.discriminator,
            layers=self.generator_layers or self.layers,
            width=width,
            heads=heads,
            mlp_width=self.generator_mlp_width or 4 * width,
            embedding_width=self.embedding_width or self.width,
        )

    def _generator_size(self) -> tuple[int, int]:
        width = round(self.generator_fraction * self.width)
        return width, self.generator_heads or max(1, width // 64)

    def _check_one_trunk(self) -> None:
        sizes = ("generator_layers", "generator_heads", "generator_mlp_width")
        for name, accepted in (("generator_fraction", 1), *((name, None) for name in sizes)):
            if getattr(self, name) != accepted:
                raise UserError(
                    f"model.sharing is all and model.{name} is {getattr(self, name)}; one trunk is both generator and "
                    f"discriminator then, so it must be {'null' if accepted is None else accepted}."
                )


class DiscriminatorHead(nnx.Module):
    """Logit that a token was replaced: dense, activation, dense; the last begins Glorot-uniform, as released."""

    def __init__(self, style: HeadStyle, rngs: nnx.Rngs) -> None:
        self.activation = style.activation
        self.dense = style.dense(style.width, style.width, rngs)
        self.out = Linear(
            style.width,
            1,
            axes=("embed", None),
            init=glorot_uniform(),
            bias=True,
            param_dtype=style.param_dtype,
            rngs=rngs,
        )

    def __call__(self, hidden: Float[Array, "*shape D"]) -> Float[Array, "*shape"]:
        """Logits."""
        return self.out(ACTIVATIONS[self.activation](self.dense(hidden)))[..., 0]


class Electra(nnx.Module):
    """Generator and discriminator. As a language model to be probed or fine-tuned, it is the discriminator.

    embeddings: the generator's, or both trunks'.
    discriminator_embeddings: the discriminator's own (`none`), or what it adds (`gradient_disentangled`); else None.
    generator: None where the discriminator is both.
    """

    def __init__(self, config: ElectraConfig, vocab: Vocabulary, rngs: nnx.Rngs) -> None:
        generator, discriminator = config.generator, config.discriminator
        self.config = config
        self.embeddings = Embeddings(generator, vocab, rngs)
        self.discriminator_embeddings = (
            Embeddings(discriminator, vocab, rngs, init=None if config.sharing == "none" else zeros())
            if config.sharing in ("none", "gradient_disentangled")
            else None
        )
        self.generator = None if config.sharing == "all" else Trunk(generator, rngs, glorot_uniform())
        self.generator_head = MaskedLMHead(generator, vocab, rngs)
        self.discriminator = Trunk(discriminator, rngs, glorot_uniform())
        self.discriminator_head = DiscriminatorHead(discriminator.head_style, rngs)

    @property
    def head_style(self) -> HeadStyle:
        """What heads on the discriminator's hidden states take over."""
        return self.config.discriminator.head_style

    def generator_hidden(
        self,
        tokens: Int[Array, "B L"],
        *,
        mask: AttentionMask,
        positions: Int[Array, "B L"] | None = None,
        token_types: Int[Array, "B L"] | None = None,
        dropout: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B L Dg"]:
        """The generator's final hidden states, of masked tokens."""
        trunk = self.discriminator if self.generator is None else self.generator
        embedded = self.embeddings(tokens, positions, token_types, dropout)
        return trunk.run(embedded, mask=mask, positions=positions, dropout=dropout)

    def generator_head_hidden(self, hidden: Float[Array, "... Dg"]) -> Float[Array, "... E"]:
        """The generator's masked-LM transform: dense, activation, LayerNorm."""
        return self.generator_head(hidden)

    def generator_head_table(self) -> OutputHead:
        """The generator's output table: its token embedding, with a bias of its own."""
        return self.generator_head.table(self.embeddings.tokens)

    def discriminator_hidden(
        self,
        tokens: Int[Array, "B L"],
        *,
        mask: AttentionMask,
        positions: Int[Array, "B L"] | None = None,
        token_types: Int[Array, "B L"] | None = None,
        dropout: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """The discriminator's final hidden states, of tokens some of which were replaced."""
        dropout = None if dropout is None else dropout ^ jnp.uint32(DISCRIMINATOR)
        own, where = self.discriminator_embeddings, (tokens, positions, token_types)
        if own is None:
            embedded = self.embeddings(*where, dropout)
        elif self.config.sharing == "none":
            embedded = own(*where, dropout)
        else:
            embedded = own(*where, dropout, plus=jax.lax.stop_gradient(self.embeddings.look_up(*where)))
        return self.discriminator.run(embedded, mask=mask, positions=positions, dropout=dropout)

    def discriminate(self, hidden: Float[Array, "*shape D"]) -> Float[Array, "*shape"]:
        """Logits that tokens were replaced, of the discriminator's hidden states."""
        return self.discriminator_head(hidden)

    def hidden(
        self,
        tokens: Int[Array, "B L"],
        *,
        mask: AttentionMask,
        positions: Int[Array, "B L"] | None = None,
        token_types: Int[Array, "B L"] | None = None,
        dropout: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """The discriminator's final hidden states, as `LanguageModel.hidden`."""
        return self.discriminator_hidden(
            tokens, mask=mask, positions=positions, token_types=token_types, dropout=dropout
        )

    def head_hidden(self, hidden: Float[Array, "... D"]) -> NoReturn:
        """Refuses: the discriminator has no vocabulary head."""
        raise UserError(_NO_VOCABULARY_HEAD)

    def head_table(self) -> NoReturn:
        """Refuses: the discriminator has no vocabulary head."""
        raise UserError(_NO_VOCABULARY_HEAD)


_NO_VOCABULARY_HEAD = (
    "model.name is electra, whose discriminator has no vocabulary head; use the objective replaced_token_detection, or "
    "model.name encoder."
)
