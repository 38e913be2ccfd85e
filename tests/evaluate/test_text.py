"""Text in, text out: continuing prompts and filling masks, with models whose probabilities are known."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy_models import TableModel

from lmobj import masks
from lmobj.data import SentencePieceConfig, Tokenizer
from lmobj.data._tokenizer import train_tokenizer
from lmobj.errors import UserError
from lmobj.evaluate import BeamConfig, SamplingConfig, _text, continue_text, fill_text, infill_text, masked_tokens
from lmobj.models import OutputHead

LIKELY = 0.9
GREEDY = SamplingConfig(max_new_tokens=4, temperature=0.0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = "the quick brown fox sees the quiet river and the old stone\n" * 4
    return train_tokenizer(SentencePieceConfig(vocab_size=340), [text])


def one(tokenizer: Tokenizer, text: str) -> int:
    """The id of a text that is one piece."""
    (token,) = tokenizer.encode(text)
    return int(token)


def chain(tokenizer: Tokenizer, *links: tuple[int, int]) -> np.ndarray:
    """p(next | last): each link has probability 0.9, the rest is spread evenly."""
    size = tokenizer.vocabulary.size
    p = np.full((size, size), 1 / size)
    for last, following in links:
        p[last] = (1 - LIKELY) / (size - 1)
        p[last, following] = LIKELY
    return p


# --- continuing ---------------------------------------------------------------------------------------------------


def test_prompts_are_continued_up_to_the_end_of_sequence(tokenizer: Tokenizer) -> None:
    quick, brown, fox = (one(tokenizer, word) for word in (" quick", " brown", " fox"))
    eos = tokenizer.vocabulary.eos
    assert eos is not None
    model = TableModel(chain(tokenizer, (quick, brown), (brown, fox), (fox, eos)))
    first, second = continue_text(model, tokenizer, ["the quick", "the old stone and the quick brown"], GREEDY)
    assert first[0].text == " brown fox"
    assert first[0].tokens.tolist() == [brown, fox, eos]
    np.testing.assert_allclose(first[0].log_probs, np.log([LIKELY] * 3), rtol=1e-5)
    assert second[0].text == " fox"
    assert second[0].tokens.tolist() == [fox, eos]
    # Two tokens are too few to come to the end.
    short = dataclasses.replace(GREEDY, max_new_tokens=2)
    assert continue_text(model, tokenizer, ["the quick"], short)[0][0].tokens.tolist() == [brown, fox]


def test_every_prompt_has_its_samples_or_beams(tokenizer: Tokenizer) -> None:
    the, quick, river = (one(tokenizer, word) for word in (" the", " quick", " river"))
    model = TableModel(chain(tokenizer, (the, quick), (quick, river)))
    drawn = continue_text(model, tokenizer, ["and the", "quick"], SamplingConfig(max_new_tokens=3, num_samples=4))
    assert [len(samples) for samples in drawn] == [4, 4]
    assert all(sample.tokens.shape == sample.log_probs.shape for samples in drawn for sample in samples)
    beams = continue_text(model, tokenizer, ["and the"], BeamConfig(max_new_tokens=2, num_beams=3))[0]
    assert beams[0].text == " quick river"
    assert [len(continue_text(model, tokenizer, ["and the"], GREEDY)[0])] == [1]


def test_what_cannot_be_continued(tokenizer: Tokenizer) -> None:
    model = TableModel(chain(tokenizer))
    with pytest.raises(UserError, match="the prompt is empty"):
        continue_text(model, tokenizer, ["the", ""], GREEDY)
    with pytest.raises(UserError, match="LeftNeighbour, which reads in both directions or has no cache"):
        continue_text(LeftNeighbour(chain(tokenizer)), tokenizer, ["the"], GREEDY)  # type: ignore[arg-type]


# --- filling ------------------------------------------------------------------------------------------------------


class LeftNeighbour(nnx.Module):
    """p(token | the one to its left) from a table, as a masked language model."""

    def __init__(self, probabilities: np.ndarray) -> None:
        self.logits = nnx.Param(jnp.log(jnp.asarray(probabilities)))

    def hidden(self, tokens: jax.Array, *, mask: masks.AttentionMask, **_: Any) -> jax.Array:
        assert not mask.causal
        return self.logits[...][jnp.roll(tokens, 1, axis=1)]

    def head_hidden(self, hidden: jax.Array) -> jax.Array:
        return hidden

    def head_table(self) -> OutputHead:
        return OutputHead(jnp.eye(self.logits.shape[1]))


def test_masked_tokens_stand_between_cls_and_sep(tokenizer: Tokenizer) -> None:
    vocab = tokenizer.vocabulary
    tokens, where = masked_tokens(tokenizer, "the [MASK] fox[MASK]")
    expected = [vocab.cls, one(tokenizer, "the"), vocab.mask, one(tokenizer, " fox"), vocab.mask, vocab.sep]
    assert tokens.tolist() == [expected]
    assert where.tolist() == [[2, 4]]
    # Spaces before a mask belong to what is guessed: pieces carry the space before them.
    assert masked_tokens(tokenizer, "the  \t[MASK] fox [MASK]")[0].tolist() == [expected]
    tokens, where = masked_tokens(tokenizer, "the [MASK] fox[MASK]", framed=False)
    assert (tokens.tolist(), where.tolist()) == ([expected[1:-1]], [[1, 3]])


def test_masks_are_filled_by_the_likeliest_pieces(tokenizer: Tokenizer) -> None:
    the, quick, river = one(tokenizer, "the"), one(tokenizer, " quick"), one(tokenizer, " river")
    fox = one(tokenizer, " fox")
    p = chain(tokenizer, (the, quick), (fox, river))
    p[the] = (1 - 0.6 - 0.3) / (len(p) - 2)
    p[the, [quick, river]] = 0.6, 0.3
    text, fillings = fill_text(LeftNeighbour(p), tokenizer, "the [MASK] fox [MASK].", k=2)
    assert text == "the quick fox river."
    assert [len(filling.pieces) for filling in fillings] == [2, 2]
    assert fillings[0].pieces == [" quick", " river"]
    np.testing.assert_allclose(fillings[0].probabilities, [0.6, 0.3], rtol=1e-5)
    assert fillings[1].pieces[0] == " river"
    np.testing.assert_allclose(fillings[1].probabilities[0], LIKELY, rtol=1e-5)


def test_each_mask_is_guessed_by_itself(tokenizer: Tokenizer) -> None:
    mask = tokenizer.vocabulary.mask
    assert mask is not None
    the, quick, fox = one(tokenizer, "the"), one(tokenizer, " quick"), one(tokenizer, " fox")
    # The second mask sees a mask to its left, and not what the first was filled with.
    model = LeftNeighbour(chain(tokenizer, (the, quick), (mask, fox), (quick, mask)))
    assert fill_text(model, tokenizer, "the [MASK] [MASK] sees")[0] == "the quick fox sees"


def test_what_cannot_be_filled(tokenizer: Tokenizer) -> None:
    model, size = LeftNeighbour(chain(tokenizer)), tokenizer.vocabulary.size
    with pytest.raises(UserError, match=r"the text 'the fox' has no \[MASK\]; write \[MASK\] where"):
        fill_text(model, tokenizer, "the fox")
    for k in (0, size + 1):
        with pytest.raises(UserError, match=rf"k is {k}; accepted: 1 to {size} guesses"):
            fill_text(model, tokenizer, "the [MASK]", k)
    assert len(fill_text(model, tokenizer, "the [MASK]", size)[1][0].pieces) == size
    without = Tokenizer(tokenizer._model)
    without.vocabulary = dataclasses.replace(tokenizer.vocabulary, mask=None)
    with pytest.raises(UserError, match="needs a vocabulary with a"):
        fill_text(model, without, "the [MASK]")


# --- filling in the middle ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def marked(tokenizer: Tokenizer) -> Tokenizer:
    return tokenizer.extended(("<fim_prefix>", "<fim_suffix>", "<fim_middle>"))


def test_a_middle_is_written_up_to_its_end(marked: Tokenizer) -> None:
    """After MID the model writes quick brown EOS. The space before the hole is the first piece's own."""
    vocab = marked.vocabulary
    assert vocab.fim_middle is not None
    assert vocab.eos is not None
    quick, brown = (one(marked, word) for word in (" quick", " brown"))
    model = TableModel(chain(marked, (vocab.fim_middle, quick), (quick, brown), (brown, vocab.eos)))
    (found,) = infill_text(model, marked, "the <fim_middle> fox sees", GREEDY)
    assert (found.before, found.middle, found.after) == ("the", " quick brown", " fox sees")
    assert found.ended
    np.testing.assert_allclose(found.log_probs, np.log([LIKELY] * 3), rtol=1e-5)
    short = infill_text(model, marked, "<fim_middle>", dataclasses.replace(GREEDY, max_new_tokens=2))[0]
    assert (short.before, short.middle, short.after, short.ended) == ("", " quick brown", "", False)
    assert len(infill_text(model, marked, "the<fim_middle>", SamplingConfig(max_new_tokens=3, num_samples=4))) == 4


def test_the_prompt_is_in_the_order_that_is_asked_for(marked: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    vocab = marked.vocabulary
    prompts = []

    def generate(model: Any, prompts_: Any, settings: Any, *, eos: int) -> Any:
        prompts.append(prompts_[0].tolist())
        return decoded(model, prompts_, settings, eos=eos)

    decoded = _text.generate
    monkeypatch.setattr(_text, "generate", generate)
    text = "the quick<fim_middle>river"
    for order in ("psm", "spm"):
        infill_text(TableModel(chain(marked)), marked, text, GREEDY, order=order)  # type: ignore[arg-type]
    pre, suf, mid = vocab.fim_prefix, vocab.fim_suffix, vocab.fim_middle
    before, after = marked.encode("the quick").tolist(), marked.encode("river").tolist()
    assert prompts == [[pre, *before, suf, *after, mid], [pre, suf, *after, mid, *before]]


def test_what_has_no_middle(marked: Tokenizer, tokenizer: Tokenizer) -> None:
    model = TableModel(chain(marked))
    with pytest.raises(UserError, match="has 0 holes; write <fim_middle> once"):
        infill_text(model, marked, "the fox", GREEDY)
    with pytest.raises(UserError, match="has 2 holes"):
        infill_text(model, marked, "<fim_middle> fox <fim_middle>", GREEDY)
    with pytest.raises(UserError, match=r"needs <fim_prefix> and <fim_suffix> and .*infilling_marks to true"):
        infill_text(model, tokenizer, "the <fim_middle>", GREEDY)
    with pytest.raises(UserError, match="which reads in both directions"):
        infill_text(LeftNeighbour(chain(marked)), marked, "<fim_middle>", GREEDY)  # type: ignore[arg-type]
