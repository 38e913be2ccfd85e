"""Decodings side by side: figures by hand, passages that do not overlap, and settings that cannot be compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from toy_models import TableModel

from lmobj.data import SentencePieceConfig
from lmobj.data._tokenizer import train_tokenizer
from lmobj.errors import UserError
from lmobj.evaluate import BeamConfig, GenerationConfig, SamplingConfig, compare_decodings, passages, text_figures


def test_figures_by_hand() -> None:
    first = [np.array([1, 2, 1, 2]), np.array([3, 3])]  # 6 tokens of which 3 differ, 4 pairs of which 3 do
    second = [np.array([1, 2, 3, 4]), np.array([5, 6])]  # all differ
    log_probs = [np.log([0.5, 0.25, 0.5, 0.25]), np.log([0.5, 0.5]), np.log([0.5] * 4), np.log([0.5, 0.5])]
    figures = text_figures([first, second], log_probs)
    assert figures.perplexity == pytest.approx(2 ** ((2 * 2 + 10) / 12))
    assert figures.distinct_1 == pytest.approx((3 / 6 + 1) / 2)
    assert figures.distinct_2 == pytest.approx((3 / 4 + 1) / 2)
    assert figures.distinct_3 == 1.0
    assert figures.repeated_4 == 0.0
    assert figures.self_bleu == 0.0, "no token in common within a set"
    assert figures.tokens == 3.0
    assert text_figures([first[:1], first[:1]], log_probs[:2]).self_bleu is None, "one prompt"
    alike = [np.array([1, 2, 3, 4, 5])] * 2
    assert text_figures([alike], log_probs[:2]).self_bleu == pytest.approx(1.0)
    # 1 2 1 2 1 2 1 has four 4-grams, of which two differ.
    assert text_figures([[np.array([1, 2] * 3 + [1])]], log_probs[:1]).repeated_4 == 0.5


def test_decodings_are_compared_on_as_many_texts_of_each_prompt() -> None:
    tokenizer = train_tokenizer(SentencePieceConfig(vocab_size=330), ["the quick brown fox sees the quiet river\n" * 4])
    size = tokenizer.vocabulary.size
    p = np.random.default_rng(0).dirichlet(np.full(size, 0.05), size) + 1e-6
    p[:, tokenizer.vocabulary.eos] = 1e-12  # no text ends before it has its 6 tokens
    p = p / p.sum(1, keepdims=True)
    config = GenerationConfig(
        samples=3,
        max_tokens=6,
        decodings={"a": SamplingConfig(temperature=0.0), "b": SamplingConfig(), "c": BeamConfig()},
    )
    model: Any = TableModel(p)
    found = compare_decodings(model, tokenizer, ["the", "fox"], config)
    assert {name: [len(texts) for texts in written] for name, (written, _) in found.items()} == {
        "a": [1, 1], "b": [3, 3], "c": [1, 1]
    }  # fmt: skip
    for written, figures in found.values():
        sets = [[texts[i].tokens for texts in written] for i in range(len(written[0]))]
        by_hand = [len({*one[0], *one[1]}) / 12 for one in sets]
        assert figures.distinct_1 == pytest.approx(np.mean(by_hand))
        # Whatever the decoding does to the probabilities, the perplexity is that of the table.
        last = [int(tokenizer.encode(prompt)[-1]) for prompt in ("the", "fox")]
        nats = [
            -np.log(p[before, token])
            for prompt, texts in enumerate(written)
            for one in texts
            for before, token in zip([last[prompt], *one.tokens], one.tokens, strict=False)
        ]
        assert figures.perplexity == pytest.approx(np.exp(np.mean(nats)), rel=1e-4)
    assert found["a"][1].perplexity < found["b"][1].perplexity


def test_passages_do_not_overlap_and_are_short_only_where_documents_end() -> None:
    documents = [np.arange(100, 125), np.arange(200, 206), np.arange(300, 302), np.arange(400, 408)]
    every = passages(documents, 99, read=2, length=6)
    # 25 tokens hold three windows of 8; 6 tokens are a short one; 2 leave nothing that follows; 8 are a whole one.
    assert [row.tokens.tolist() for row in every] == [
        [*range(100, 108)], [*range(108, 116)], [*range(116, 124)], [*range(200, 206)], [*range(400, 408)]
    ]  # fmt: skip
    assert {row.start for row in every} == {2}
    drawn = {tuple(int(row.tokens[0]) for row in passages(documents, 2, read=2, length=6, seed=s)) for s in range(20)}
    assert len(drawn) > 3
    assert all(a < b for a, b in drawn)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"samples": 0}, "generation.samples is 0"),
        ({"max_tokens": 0}, "generation.max_tokens is 0"),
        ({"max_tokens": 2**21}, "max_tokens is 2097152"),
        ({"decodings": {}}, "generation.decodings is empty"),
        ({"decodings": {"x": SamplingConfig(num_samples=2)}}, "generation.decodings.x.num_samples is 2"),
        ({"decodings": {"x": BeamConfig(max_new_tokens=2)}}, "generation.decodings.x.max_new_tokens is 2"),
    ],
)
def test_settings_that_cannot_be_compared_are_refused(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError, match=part):
        GenerationConfig(**changes)
