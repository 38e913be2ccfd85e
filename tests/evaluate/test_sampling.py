"""Sampling: against un-cached reading, exact frequencies, and independence of rows."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import stats

from lmobj.errors import UserError
from lmobj.evaluate import SamplingConfig, _decoding, generate
from tests.evaluate.toy_models import VOCAB, TableModel, family, uncached_log_probs

PROMPTS = [[1, 2, 3, 4], [5], [6, 6, 2]]
GREEDY = SamplingConfig(max_new_tokens=6, temperature=0.0)


@pytest.mark.parametrize("name", ["learned", "rotary", "gru"])
def test_greedy_equals_argmax_without_a_cache(name: str) -> None:
    model = family(name)
    generated = generate(model, PROMPTS, GREEDY)
    assert generated.tokens.shape == (3, 1, 6)
    np.testing.assert_array_equal(generated.lengths, 6)
    for prompt, tokens, log_probs in zip(PROMPTS, generated.tokens[:, 0], generated.log_probs[:, 0], strict=True):
        rows = np.zeros((1, 16), np.int32)
        rows[0, : len(prompt)] = prompt
        for i, (token, log_prob) in enumerate(zip(tokens, log_probs, strict=True)):
            end = len(prompt) + i
            distribution = uncached_log_probs(model, rows)[0, end - 1]
            assert token == distribution.argmax()
            np.testing.assert_allclose(log_prob, distribution[token], rtol=2e-5, atol=2e-6)
            rows[0, end] = token
    np.testing.assert_allclose(generated.scores, generated.log_probs.sum(-1), rtol=1e-6)


def test_sampled_tokens_have_the_log_probs_of_the_model_itself() -> None:
    # Temperature and filters shape what is drawn, not what is reported.
    model = family("rotary")
    settings = SamplingConfig(max_new_tokens=8, num_samples=3, temperature=0.7, top_k=5, top_p=0.95, min_p=0.01)
    generated = generate(model, PROMPTS, settings)
    for p, prompt in enumerate(PROMPTS):
        for n in range(3):
            row = np.zeros((1, 16), np.int32)
            text = [*prompt, *generated.tokens[p, n]]
            row[0, : len(text)] = text
            log_probs = uncached_log_probs(model, row)[0, len(prompt) - 1 : len(text) - 1]
            expected = np.take_along_axis(log_probs, generated.tokens[p, n][:, None], 1)[:, 0]
            np.testing.assert_allclose(generated.log_probs[p, n], expected, rtol=2e-5, atol=2e-6)


def test_rows_depend_on_nothing_but_themselves() -> None:
    model = family("learned")
    settings = SamplingConfig(max_new_tokens=4, num_samples=2)
    together = generate(model, PROMPTS, settings)
    first = generate(model, PROMPTS[:2], dataclasses.replace(settings, num_samples=3))  # fewer prompts, more samples
    np.testing.assert_array_equal(together.tokens[:2], first.tokens[:, :2])
    longer = generate(model, [*PROMPTS[:2], [1] * 9], settings)  # more padding
    np.testing.assert_array_equal(together.tokens[:2], longer.tokens[:2])
    np.testing.assert_allclose(together.log_probs[:2], longer.log_probs[:2], rtol=2e-5, atol=2e-6)
    again = generate(model, PROMPTS, dataclasses.replace(settings, seed=1))
    assert (again.tokens != together.tokens).any()


FREQUENCIES = np.array([0.05, 0.4, 0.3, 0.2, 0.05])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (SamplingConfig(), FREQUENCIES),
        # p^2 normalised: .0025 .16 .09 .04 .0025 over .295
        (SamplingConfig(temperature=0.5), FREQUENCIES**2 / 0.295),
        (SamplingConfig(top_k=2), np.array([0, 4 / 7, 3 / 7, 0, 0])),
        (SamplingConfig(top_p=0.75), np.array([0, 4 / 9, 3 / 9, 2 / 9, 0])),
        (SamplingConfig(min_p=0.6), np.array([0, 4 / 7, 3 / 7, 0, 0])),
        # Temperature comes first: p^2 is .54 .31 .14 .01 .01, so the nucleus of 0.75 is two tokens (16 : 9).
        (SamplingConfig(temperature=0.5, top_p=0.75), np.array([0, 16 / 25, 9 / 25, 0, 0])),
        # Top-k comes before top-p: after it 4/9 + 3/9 reach 0.75, which 0.4 + 0.3 would not.
        (SamplingConfig(top_k=3, top_p=0.75), np.array([0, 4 / 7, 3 / 7, 0, 0])),
    ],
)
def test_frequencies_are_those_of_the_filtered_softmax(settings: SamplingConfig, expected: np.ndarray) -> None:
    # Every token is followed by the same distribution, so 40 tokens in 500 samples are 20,000 draws.
    model = TableModel(np.tile(FREQUENCIES, (5, 1)))
    generated = generate(model, [[0]], dataclasses.replace(settings, max_new_tokens=40, num_samples=500))
    counts = np.bincount(generated.tokens.ravel(), minlength=5)
    assert counts.sum() == 20_000
    np.testing.assert_array_equal(counts > 0, expected > 0)
    assert stats.chisquare(counts[expected > 0], 20_000 * expected[expected > 0]).pvalue > 1e-3
    np.testing.assert_allclose(generated.log_probs, np.log(FREQUENCIES)[generated.tokens], rtol=1e-5)


def test_draws_of_one_row_are_independent() -> None:
    model = TableModel(np.tile(FREQUENCIES, (5, 1)))
    tokens = generate(model, [[0]], SamplingConfig(max_new_tokens=2, num_samples=20_000)).tokens[0]
    counts = np.bincount(tokens @ [5, 1], minlength=25)
    assert stats.chisquare(counts, 20_000 * np.outer(FREQUENCIES, FREQUENCIES).ravel()).pvalue > 1e-3


def test_rows_end_at_eos() -> None:
    # 1 -> 2 -> 3 (eos) -> 1, always: prompt 0 leads to 1. Each row ends by itself, and what follows is 0.
    chain = np.full((4, 4), 1e-9)
    chain[[0, 1, 2, 3], [1, 2, 3, 1]] = 1
    model = TableModel(chain)
    settings = SamplingConfig(max_new_tokens=5, temperature=0.0)
    generated = generate(model, [[0], [1, 2], [0, 1]], settings, eos=3)
    np.testing.assert_array_equal(generated.tokens[:, 0], [[1, 2, 3, 0, 0], [3, 0, 0, 0, 0], [2, 3, 0, 0, 0]])
    np.testing.assert_array_equal(generated.lengths[:, 0], [3, 1, 2])
    assert np.isfinite(generated.log_probs).all()
    without = generate(model, [[0], [1, 2]], settings)
    np.testing.assert_array_equal(without.tokens[:, 0], [[1, 2, 3, 1, 2], [3, 1, 2, 3, 1]])
    np.testing.assert_array_equal(without.lengths, 5)


def test_repetition_penalty_counts_prompt_and_generated_tokens_but_not_padding() -> None:
    # Logits ln(0.4), ln(0.3), ln(0.2), ln(0.1) everywhere are negative: seen tokens are multiplied by 3.
    # 3 ln 0.4 < ln 0.1, so each seen token falls behind all unseen ones. Prompt [1] leaves 0, 2, 3 in this order;
    # then all are seen and 0 is first again. Padding of the second prompt (zeros) must not count as token 0.
    model = TableModel(np.tile([0.4, 0.3, 0.2, 0.1], (4, 1)))
    settings = SamplingConfig(max_new_tokens=5, temperature=0.0, repetition_penalty=3.0)
    generated = generate(model, [[1, 2, 1, 2], [1]], settings)
    np.testing.assert_array_equal(generated.tokens[:, 0], [[0, 3, 0, 0, 0], [0, 2, 3, 0, 0]])


def test_tiny_temperatures_are_greedy_and_finite() -> None:
    model = family("gru")
    cold = generate(model, PROMPTS, dataclasses.replace(GREEDY, temperature=1e-30))
    np.testing.assert_array_equal(cold.tokens, generate(model, PROMPTS, GREEDY).tokens)
    assert np.isfinite(cold.log_probs).all()


def test_generation_fills_the_models_length_exactly() -> None:
    model = family("learned")  # max_length 16; the last new token is not read again, so 4 + 13 tokens fit
    generate(model, PROMPTS, dataclasses.replace(GREEDY, max_new_tokens=13))
    with pytest.raises(UserError, match="max_length is 16"):
        generate(model, PROMPTS, dataclasses.replace(GREEDY, max_new_tokens=14))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, float], named: str) -> None:
    with pytest.raises(UserError, match=named):
        SamplingConfig(**settings)


def test_another_seed_does_not_compile_again() -> None:
    model = family("gru")
    settings = SamplingConfig(max_new_tokens=2)
    generate(model, [[1]], settings)
    compiled = _decoding._sample._cache_size()
    generate(model, [[2]], dataclasses.replace(settings, seed=5))
    assert _decoding._sample._cache_size() == compiled


def test_vocabulary_is_that_of_the_model() -> None:
    assert uncached_log_probs(family("learned"), np.zeros((1, 2), np.int32)).shape == (1, 2, VOCAB)
