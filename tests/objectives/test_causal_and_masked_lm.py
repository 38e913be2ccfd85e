"""Causal and masked LM by hand: which tokens count, what they cost, and which settings are refused."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.models import OutputHead
from lmobj.objectives import CausalLM, Context, MaskedLM, denominators, step_keys, total_loss

VOCAB = Vocabulary(size=16, pad=0, eos=3, cls=4, sep=5, mask=6)
ROW_IDS = jnp.asarray([[0, 0], [0, 1]])
KEY = jax.random.key(0, impl="threefry2x32")


class Uniform:
    """A model for which every token is equally likely."""

    def hidden(self, tokens: Any, **_: Any) -> Any:
        return jnp.zeros((*tokens.shape, 4))

    def head_hidden(self, hidden: Any) -> Any:
        return hidden

    def head_table(self) -> OutputHead:
        return OutputHead(jnp.ones((VOCAB.size, 4)))


def context() -> tuple[Any, Context]:
    noise, model = step_keys(KEY, ROW_IDS, 0)
    return noise, Context(model, 0, VOCAB, train=False)


def causal_batch() -> dict[str, Any]:
    """Row 0: documents of 3 and 2 tokens, 1 of padding. Row 1: one document of 4, 2 of padding."""
    tokens = jnp.asarray([[7, 8, 3, 9, 3, 0], [10, 11, 12, 3, 0, 0]])
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0]])
    return {
        "tokens": tokens,
        "segment_ids": segments,
        "positions": jnp.asarray([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0]]),
        "row_ids": ROW_IDS,
        "token_bytes": jnp.where(tokens > 6, 5, 0),
    }


def test_causal_predicts_the_next_token_of_the_same_document() -> None:
    noise, ctx = context()
    example = CausalLM().corrupt(noise, causal_batch(), ctx)
    # 7 -> 8 -> 3 | 9 -> 3 |: the last token of a document and padding predict nothing.
    np.testing.assert_array_equal(example.weights, [[1, 1, 0, 1, 0, 0], [1, 1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(example.targets[0, :4], [8, 3, 9, 3])
    terms = CausalLM().terms({"model": Uniform()}, example, (), ctx)
    # 6 predictions of log 16 nats, or 4 bits; the predicted words 8, 11 and 12 have 5 bytes, the ends none.
    np.testing.assert_allclose(terms.sums["nll"], 6 * math.log(16), rtol=1e-6)
    np.testing.assert_allclose(terms.metrics["bits_per_byte"], (6 * 4, 15), rtol=1e-6)


def test_loss_mask_keeps_a_prompt_out_of_the_loss() -> None:
    """The mask names the tokens that are predicted, not the positions that predict them."""
    noise, ctx = context()
    answers = jnp.asarray([[0, 0, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0]])
    example = CausalLM().corrupt(noise, {**causal_batch(), "loss_mask": answers}, ctx)
    np.testing.assert_array_equal(example.weights, [[0, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0]])


def test_smoothing_and_z_loss_enter_the_loss_and_not_the_metrics() -> None:
    noise, ctx = context()
    objective = CausalLM(label_smoothing=0.1, z_loss=0.01)
    example = objective.corrupt(noise, causal_batch(), ctx)
    terms = objective.terms({"model": Uniform()}, example, (), ctx)
    # All logits are 0: every class costs log 16, smoothed or not, and logsumexp is log 16.
    np.testing.assert_allclose(terms.sums["nll"], 6 * (math.log(16) + 0.01 * math.log(16) ** 2), rtol=1e-6)
    np.testing.assert_allclose(terms.metrics["nll"][0], 6 * math.log(16), rtol=1e-6)


def masked_batch() -> dict[str, Any]:
    """Row 0: [CLS] 8 words [SEP]. Row 1: [CLS] 2 words [SEP] and padding."""
    words = jnp.asarray([[4, 7, 8, 9, 10, 11, 12, 13, 14, 5], [4, 7, 8, 5, 0, 0, 0, 0, 0, 0]])
    segments = jnp.asarray([[1] * 10, [1] * 4 + [0] * 6])
    return {"tokens": words, "segment_ids": segments, "positions": jnp.zeros_like(words), "row_ids": ROW_IDS}


def test_masked_counts_tokens_by_the_papers_rule() -> None:
    """round(0.3 * 10) = 3 of row 0 and round(0.3 * 4) = 1 of row 1, never a special token."""
    noise, ctx = context()
    example = MaskedLM(mask_rate=0.3).corrupt(noise, masked_batch(), ctx)
    np.testing.assert_array_equal(jnp.sum(example.weights, axis=1), [3, 1])
    assert int(example.targets[0].min()) >= 7
    original = jnp.take_along_axis(masked_batch()["tokens"], example.predict, 1)
    np.testing.assert_array_equal(example.targets * example.weights, original * example.weights)


def test_masked_loss_divides_by_the_count_plus_berts_epsilon() -> None:
    noise, ctx = context()
    objective = MaskedLM(mask_rate=0.3)
    example = objective.corrupt(noise, masked_batch(), ctx)
    terms = objective.terms({"model": Uniform()}, example, (), ctx)
    np.testing.assert_allclose(terms.sums["nll"], 4 * math.log(16), rtol=1e-6)
    loss = total_loss(terms, denominators(objective, example), {"nll": 1.0})
    np.testing.assert_allclose(loss, 4 * math.log(16) / (4 + 1e-5), rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "vocab", "length", "message"),
    [
        ({"mask_rate": 0.0}, VOCAB, 16, r"mask_rate is 0\.0"),
        ({"mask_share": 0.9, "random_share": 0.2}, VOCAB, 16, r"random_share is 0\.2"),
        ({"max_predictions": 0}, VOCAB, 16, "max_predictions is 0"),
        ({"mask_rate": 0.9}, VOCAB, 8, r"selects 7 of the 6 ordinary tokens"),
        ({}, Vocabulary(size=16), 16, r"needs a \[MASK\] token"),
    ],
)
def test_masked_refuses_what_cannot_be_done(
    settings: dict[str, Any], vocab: Vocabulary, length: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        MaskedLM(**settings).rows(vocab, length)


def test_causal_refuses_what_cannot_be_done() -> None:
    with pytest.raises(UserError, match=r"data\.length is 1"):
        CausalLM().rows(VOCAB, 1)
    with pytest.raises(UserError, match=r"label_smoothing is 1\.0"):
        CausalLM(label_smoothing=1.0)
    with pytest.raises(UserError, match=r"z_loss is -1"):
        CausalLM(z_loss=-1)


def test_rows_asked_for() -> None:
    assert CausalLM().rows(VOCAB, 16).suffix == (3,)
    rows = MaskedLM(selection="whole_word", layout="single").rows(VOCAB, 16)
    assert (rows.layout, rows.prefix, rows.suffix, rows.fields) == ("single", (4,), (5,), ("word_starts",))
