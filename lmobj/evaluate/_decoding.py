"""Generating text from prompts, and filling masks.

    prompt = tokenizer.encode("Once upon")
    generated = generate(model, [prompt], SamplingConfig(top_p=0.9, num_samples=3), eos=vocab.eos)
    text = tokenizer.decode(generated.tokens[0, 0, : generated.lengths[0, 0]])

`generate` works on the host with prompts of any lengths; `sample`, `beam_search` and `unmask` are what it compiles, and
can be called inside other compiled code. Rows are independent: padding and neighbours change neither tokens nor draws.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key
from numpy.typing import ArrayLike

from lmobj import masks
from lmobj.errors import UserError
from lmobj.evaluate._beam_search import BeamConfig, beam_search
from lmobj.evaluate._cached import Generated, HeadModel, output_logits
from lmobj.evaluate._sampling import SamplingConfig, sample
from lmobj.evaluate._unmasking import UnmaskingConfig, unmask
from lmobj.models import CachedModel, LanguageModel

__all__ = ["DecodingConfig", "FilledMasks", "check_prompts", "fill_masks", "generate", "pad_rows", "sample_keys"]

DecodingConfig = SamplingConfig | BeamConfig
"""How to decode with a causal model, told apart by `name`."""


class FilledMasks(NamedTuple):
    """The k most probable tokens for each mask, most probable first. Masks are filled independently."""

    tokens: Int[Array, "B K k"]
    probabilities: Float[Array, "B K k"]


def generate(
    model: CachedModel | LanguageModel,
    prompts: Sequence[ArrayLike],
    settings: DecodingConfig | UnmaskingConfig,
    *,
    eos: int | None = None,
    mask_id: int | None = None,
) -> Generated:
    """Continues each prompt; returns host arrays of P prompts x N samples x at most `max_new_tokens` tokens.

    Compiles once per (model structure, number of prompts, longest prompt, settings, eos).

    Args:
      model: an NNX module that is a `CachedModel`; for unmasking, one that masked diffusion has trained.
      prompts: P one-dimensional arrays of token ids, each of at least 1 token.
      settings: sampling (greedy with temperature 0), beam search or unmasking.
      eos: the token that ends a text; None: every text has `max_new_tokens` tokens.
      mask_id: for unmasking, what stands for a token to be written.

    Raises:
      UserError: the model has no cache, or unmasking no `mask_id`; no prompt, a prompt without tokens or with ids
        outside the vocabulary, an `eos` outside it, or texts longer than the model allows.
    """
    if isinstance(settings, UnmaskingConfig):
        if mask_id is None:
            raise UserError("unmasking needs a vocabulary with a [MASK] token, and mask_id is None.")
    elif not isinstance(model, CachedModel):
        raise UserError(
            f"model is {type(model).__name__}, which reads in both directions or has no cache; text can be generated "
            "by causal models that have `init_cache` and `step`."
        )
    rows = [np.asarray(prompt) for prompt in prompts]
    check_prompts(model, rows, eos)
    lengths = np.array([len(row) for row in rows], np.int32)
    padded = pad_rows(rows, lengths.max())
    graphdef, state = nnx.split(model)
    if isinstance(settings, BeamConfig):
        return jax.device_get(_search(graphdef, state, padded, lengths, settings, eos))
    count, samples = len(rows), settings.num_samples
    keys = sample_keys(settings.seed, np.arange(count), samples)
    settings = dataclasses.replace(settings, seed=0)  # so that another seed does not compile again
    padded, lengths = np.repeat(padded, samples, axis=0), np.repeat(lengths, samples)
    if isinstance(settings, UnmaskingConfig):
        generated = jax.device_get(_unmask(graphdef, state, padded, lengths, keys, settings, mask_id, eos))
    else:
        generated = jax.device_get(_sample(graphdef, state, padded, lengths, keys, settings, eos))
    return Generated(*(x.reshape(count, samples, *x.shape[1:]) for x in generated))


def fill_masks(
    model: LanguageModel,
    tokens: Int[Array, "B L"],
    positions: Int[Array, "B K"],
    k: int = 5,
    *,
    segment_ids: Int[Array, "B L"] | None = None,
    token_types: Int[Array, "B L"] | None = None,
) -> FilledMasks:
    """The k most probable tokens at each position, by a masked language model; jit-able with `k` static.

    Args:
      model: a bidirectional model.
      tokens: rows with the mask token at `positions`.
      positions: which tokens to fill.
      k: fillings per mask, from 1 to the vocabulary size.
      segment_ids: 0 for padding; by default there is none.
      token_types: as for `model.hidden`.
    """
    segments = jnp.ones_like(tokens) if segment_ids is None else segment_ids
    hidden = model.hidden(tokens, mask=masks.bidirectional().packed(segments), token_types=token_types)
    picked = jnp.take_along_axis(hidden, positions[..., None], axis=1)
    probabilities, filling = jax.lax.top_k(jax.nn.softmax(output_logits(model, picked)), k)
    return FilledMasks(filling, probabilities)


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _search(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    prompts: Int[Array, "P L"],
    lengths: Int[Array, " P"],
    settings: BeamConfig,
    eos: int | None,
) -> Generated:
    return beam_search(nnx.merge(graphdef, state), prompts, lengths, settings=settings, eos=eos)


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def _sample(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    prompts: Int[Array, "PN L"],
    lengths: Int[Array, " PN"],
    keys: Key[Array, " PN"],
    settings: SamplingConfig,
    eos: int | None,
) -> Generated:
    return sample(nnx.merge(graphdef, state), prompts, lengths, keys, settings=settings, eos=eos)


@functools.partial(jax.jit, static_argnums=(0, 5, 6, 7))
def _unmask(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    prompts: Int[Array, "PN L"],
    lengths: Int[Array, " PN"],
    keys: Key[Array, " PN"],
    settings: UnmaskingConfig,
    mask_id: int,
    eos: int | None,
) -> Generated:
    model = nnx.merge(graphdef, state)
    return unmask(model, prompts, lengths, keys, settings=settings, mask_id=mask_id, eos=eos)


def pad_rows(rows: Sequence[np.ndarray], width: int) -> np.ndarray:
    """The rows as one array, [rows, width] int32, with 0 after their ends."""
    padded = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded


def sample_keys(seed: int, addresses: np.ndarray, samples: int) -> Key[Array, " PN"]:
    """One key per (address of a prompt, sample), prompt by prompt; more of either changes no key."""
    base = jax.random.key(seed, impl="threefry2x32")

    def key_of(address: Int[Array, ""], number: Int[Array, ""]) -> Key[Array, ""]:
        return jax.random.fold_in(jax.random.fold_in(base, address), number)

    numbers = jnp.tile(jnp.arange(samples), len(addresses))
    return jax.vmap(key_of)(jnp.repeat(jnp.asarray(addresses), samples), numbers)


def check_prompts(model: HeadModel, prompts: list[np.ndarray], eos: int | None) -> None:
    """Refuses prompts without tokens, and ids outside the model's vocabulary."""
    head = model.head_table()
    vocab_size = head.vocab_size or head.table.shape[0]
    if not prompts:
        raise UserError("prompts are empty; give at least one.")
    if eos is not None and not 0 <= eos < vocab_size:
        raise UserError(f"eos is {eos}; the model's vocabulary accepts 0 .. {vocab_size - 1}.")
    for number, prompt in enumerate(prompts):
        if prompt.ndim != 1 or prompt.size == 0:
            raise UserError(
                f"prompt {number} has shape {prompt.shape}; it must be a list of at least 1 token, "
                "for instance the token that begins or ends a document."
            )
        if not 0 <= prompt.min() <= prompt.max() < vocab_size:
            raise UserError(
                f"prompt {number} has ids in {prompt.min()} .. {prompt.max()}; "
                f"the model's vocabulary accepts 0 .. {vocab_size - 1}."
            )
