"""Small, randomly initialised Transformers models in PyTorch beside lmobj's with the same weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx

from lmobj import objectives
from lmobj.batch import Batch, Vocabulary
from lmobj.interop import albert, bert, gpt2
from lmobj.models import DecoderConfig, EncoderConfig
from lmobj.objectives import CausalLM, Context, Example, MaskedLM, Objective

SIZE = 101
VOCAB = Vocabulary(size=SIZE, pad=0, cls=1, sep=2, mask=3)
ROWS, LENGTH = 5, 17
LENGTHS = (17, 12, 4, 9, 16)
"""Tokens in each row; the rest is padding."""
ROLE = "model"

_SHARED = {"vocab_size": SIZE, "attn_implementation": "eager", "bos_token_id": None, "eos_token_id": None}
# PyTorch would not train the padding's embedding, which the noise may draw as a random token; so BERT has no such id.
BERT = _SHARED | {
    "hidden_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 70,
    "max_position_embeddings": 23,
    "type_vocab_size": 3,
    "layer_norm_eps": 1e-3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": None,
}
ALBERT = BERT | {"embedding_size": 20, "hidden_act": "gelu_new"}
_GPT2 = _SHARED | {
    "n_embd": 36,
    "n_layer": 3,
    "n_head": 3,
    "n_inner": 70,
    "n_positions": 23,
    "layer_norm_epsilon": 2e-3,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


def _bert(**settings: Any) -> transformers.BertForMaskedLM:
    return transformers.BertForMaskedLM(transformers.BertConfig(**BERT | settings))


def _albert(**settings: Any) -> transformers.AlbertForMaskedLM:
    return transformers.AlbertForMaskedLM(transformers.AlbertConfig(**ALBERT | settings))


def _gpt2(**settings: Any) -> transformers.GPT2LMHeadModel:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**_GPT2 | settings))


@dataclass(frozen=True)
class Family:
    """What differs between the families."""

    name: str
    interop: Any
    objective: Objective
    make: Callable[..., transformers.PreTrainedModel]
    token_types: int
    """0: none."""
    variant: Mapping[str, Any]
    """Settings of the family's other forms."""


FAMILIES = (
    Family("bert", bert, MaskedLM(mask_rate=0.3), _bert, token_types=3, variant={"hidden_act": "gelu_new"}),
    Family("albert", albert, MaskedLM(mask_rate=0.3), _albert, token_types=3, variant={"hidden_act": "gelu"}),
    Family(
        "gpt2",
        gpt2,
        CausalLM(),
        _gpt2,
        token_types=0,
        variant={"activation_function": "gelu", "tie_word_embeddings": False, "n_inner": None},
    ),
)


class Pair:
    """A Transformers model and lmobj's with the same weights."""

    def __init__(self, family: Family, seed: int, **settings: Any) -> None:
        torch.manual_seed(seed)
        self.family = family
        self.theirs = family.make(**settings).train()  # dropout is 0
        randomise(self.theirs, seed)
        self.config: DecoderConfig | EncoderConfig = family.interop.config_from_hf(self.theirs.config.to_dict())
        self.params = {ROLE: self.to_lmobj({n: p.detach() for n, p in self.theirs.named_parameters()})}
        self.model = nnx.eval_shape(lambda: self.config.build(VOCAB, nnx.Rngs(params=0)))
        self.graphs = {ROLE: nnx.split(self.model)[0]}

    def to_lmobj(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Tensors by Transformers' names (parameters or gradients) as lmobj's tree."""
        arrays = {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}
        return self.family.interop.to_lmobj(arrays, self.config)

    def their_inputs(self, batch: Batch, tokens: Any = None) -> dict[str, torch.Tensor]:
        """The arguments of the Transformers model; `tokens` in place of the batch's, where given."""
        tokens = batch["tokens"] if tokens is None else tokens
        inputs = {"input_ids": _tensor(tokens), "attention_mask": _tensor(batch["segment_ids"])}
        if self.family.token_types:
            inputs["token_type_ids"] = _tensor(batch["token_types"])
        return inputs

    def example(self, batch: Batch, key: jax.Array, step: int = 0) -> Example:
        """What the objective makes of the batch at a step."""
        noise_keys, model_keys = objectives.step_keys(key, batch["row_ids"], step)
        return self.family.objective.corrupt(noise_keys, batch, Context(model_keys, step, VOCAB, train=False))

    def their_loss(self, batch: Batch, example: Example) -> tuple[torch.Tensor, float]:
        """(Transformers' loss on the same corrupted inputs, the factor that turns it into lmobj's).

        Labels are -100 where nothing is predicted. MaskedLM divides by the number n of predictions plus 1e-5 where
        Transformers divides by n; that is the only factor.
        """
        if example.predict is None:
            labels = np.where(batch["segment_ids"] > 0, batch["tokens"], -100)  # Transformers shifts them itself
            factor = 1.0
        else:
            labels = np.full(batch["tokens"].shape, -100)
            rows, slots = np.nonzero(np.asarray(example.weights))
            labels[rows, np.asarray(example.predict)[rows, slots]] = np.asarray(example.targets)[rows, slots]
            factor = len(rows) / (len(rows) + 1e-5)
        inputs = self.their_inputs(batch, example.inputs)
        return self.theirs(**inputs, labels=_tensor(labels)).loss, factor

    @functools.cached_property
    def forward(self) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
        """lmobj's (hidden states of every layer, logits) of a batch, compiled."""

        @jax.jit
        def forward(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
            model = nnx.merge(self.graphs[ROLE], params[ROLE])
            ctx = Context(jax.vmap(jax.random.key)(jnp.arange(ROWS)), 0, VOCAB, train=False)
            mask = self.family.objective.corrupt(ctx.keys, batch, ctx).mask
            types = {"token_types": batch["token_types"]} if self.family.token_types else {}
            layers = model.hidden_layers(batch["tokens"], mask=mask, positions=batch["positions"], **types)
            head = model.head_table()
            logits = model.head_hidden(layers[-1]) @ head.table.T
            return layers, (logits if head.bias is None else logits + head.bias)[..., :SIZE]

        return forward

    @functools.cached_property
    def value_and_grad(self) -> Callable[..., Any]:
        """lmobj's ((loss, metrics), gradients) of a batch, compiled."""
        loss = objectives.loss_fn(self.family.objective, self.graphs, VOCAB, train=False)
        return jax.jit(jax.value_and_grad(loss, has_aux=True))


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Moves every parameter off its initial value: biases off 0, scales off 1, and matrices to unit gain."""
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if is_scale else 0.2 * noise)


def within(name: str, seen: float, limit: float) -> None:
    """Prints a figure and holds it against its limit."""
    print(f"\n{name:<40} {seen:.1e}   (limit {limit:.0e})")
    assert seen <= limit


def gradient_gaps(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, float]:
    """Relative distance by norm of every tensor, a stacked one layer by layer.

    Where both norms are below 1e-7 of the global one the distance is 0: the gradient of BERT's key biases is exactly
    zero, because a softmax does not see what all its logits share.
    """
    floor = 1e-7 * np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(theirs)))
    gaps, flat = {}, dict(jax.tree_util.tree_leaves_with_path(ours))
    for path, b in jax.tree_util.tree_leaves_with_path(theirs):
        name, a = jax.tree_util.keystr(path, simple=True, separator="/"), np.asarray(flat.pop(path))
        layers = [(f"{name}[{i}]", *pair) for i, pair in enumerate(zip(a, b, strict=True))]
        for tensor, x, y in layers if "stack/" in name else [(name, a, b)]:
            norms = np.linalg.norm(x), np.linalg.norm(y)
            gaps[tensor] = 0.0 if max(norms) < floor else float(np.linalg.norm(x - y) / max(norms))
    assert not flat
    return gaps


def make_batch(seed: int, token_types: int) -> Batch:
    """Rows of different lengths, right-padded, one document each."""
    rng = np.random.default_rng(seed)
    real = np.arange(LENGTH) < np.asarray(LENGTHS)[:, None]
    batch = {
        "tokens": np.where(real, rng.integers(4, SIZE, (ROWS, LENGTH)), VOCAB.pad),
        "segment_ids": real.astype(np.int32),
        "positions": np.broadcast_to(np.arange(LENGTH), (ROWS, LENGTH)),
        "row_ids": np.stack([np.full(ROWS, seed), np.arange(ROWS)], axis=1),
    }
    if token_types:
        batch["token_types"] = rng.integers(0, token_types, (ROWS, LENGTH))
    return {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}


def without_dropout(config: DecoderConfig | EncoderConfig) -> bool:
    """Whether a step of training draws no dropout."""
    return not any(getattr(config, f.name) for f in dataclasses.fields(config) if f.name.endswith("dropout"))


def _tensor(x: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(x, np.int64))
