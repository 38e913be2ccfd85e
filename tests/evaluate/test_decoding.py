"""The entry point's refusals, the output head, and filling masks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lmobj import masks
from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.evaluate import SamplingConfig, fill_masks, generate, output_logits
from lmobj.models import EncoderConfig, OutputHead
from tests.evaluate.toy_models import VOCAB, family

SETTINGS = SamplingConfig(max_new_tokens=2)


def encoder() -> nnx.Module:
    config = EncoderConfig(layers=2, width=16, heads=2, max_length=8, init_std=0.5, vocab_multiple=4)
    return config.build(Vocabulary(VOCAB), nnx.Rngs(params=0))


@pytest.mark.parametrize(
    ("prompts", "eos", "named"),
    [
        ([], None, "prompts are empty"),
        ([[1], []], None, "prompt 1 has shape"),
        ([[[1, 2]]], None, "prompt 0 has shape"),
        ([[1, VOCAB]], None, "prompt 0 has ids in 1 .. 7"),  # a row of the table, but one that only pads it
        ([[-1]], None, "prompt 0 has ids in -1"),
        ([[1]], VOCAB, "eos is 7"),
    ],
)
def test_impossible_prompts_are_refused(prompts: list, eos: int | None, named: str) -> None:
    with pytest.raises(UserError, match=named):
        generate(family("learned"), prompts, SETTINGS, eos=eos)


def test_models_without_a_cache_are_refused() -> None:
    with pytest.raises(UserError, match="model is Encoder"):
        generate(encoder(), [[1]], SETTINGS)


class Head(nnx.Module):
    """A head with everything: a dense layer before it, a bias, a cap, and a padded table."""

    def head_hidden(self, hidden: jax.Array) -> jax.Array:
        return 2 * hidden

    def head_table(self) -> OutputHead:
        table = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0], [9.0, 9.0]])
        return OutputHead(table, bias=jnp.array([0.0, 1.0, 0.0, 9.0]), soft_cap=10.0, vocab_size=3)


def test_output_logits_by_hand() -> None:
    # 2 * (3, 1) = (6, 2): products 6, 2, 4, with bias 6, 3, 4, capped at 10; the fourth row only pads the table.
    logits = output_logits(Head(), jnp.array([[3.0, 1.0]]))
    np.testing.assert_allclose(logits, [10 * np.tanh([0.6, 0.3, 0.4])], rtol=1e-6)
    # In bfloat16 inputs and table are rounded (these are exact), the logits are float32.
    half = output_logits(Head(), jnp.array([[3.0, 1.0]], jnp.bfloat16))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, logits, rtol=1e-6)


def test_fill_masks_ranks_the_models_probabilities() -> None:
    model = encoder()
    tokens = jnp.array([[1, 2, 6, 3, 6], [4, 6, 5, 0, 0]])
    positions = jnp.array([[2, 4], [1, 1]])
    segment_ids = jnp.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    filled = fill_masks(model, tokens, positions, 3, segment_ids=segment_ids)
    # The second row alone, without padding, and with whole logits.
    alone = tokens[1:, :3]
    hidden = model.head_hidden(model.hidden(alone, mask=masks.bidirectional()))
    head = model.head_table()
    logits = (hidden @ head.table.T + (0 if head.bias is None else head.bias))[0, 1, :VOCAB]
    probabilities = np.asarray(jax.nn.softmax(logits))
    best = np.argsort(-probabilities)[:3]
    assert filled.tokens.shape == filled.probabilities.shape == (2, 2, 3)
    for slot in range(2):
        np.testing.assert_array_equal(filled.tokens[1, slot], best)
        np.testing.assert_allclose(filled.probabilities[1, slot], probabilities[best], rtol=1e-5)
    assert (np.diff(filled.probabilities, axis=-1) <= 0).all()
    assert (np.asarray(filled.probabilities[0, 0]) != np.asarray(filled.probabilities[0, 1])).any()
    everything = fill_masks(model, tokens, positions, VOCAB)
    np.testing.assert_allclose(everything.probabilities.sum(-1), 1, rtol=1e-6)
