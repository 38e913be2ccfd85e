"""N-gram models: values by hand, against a slow reference with dictionaries, and probabilities that sum to 1."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from lmobj.errors import UserError
from lmobj.evaluate import NGram, bits_per_byte, unigram_top_k

BEGIN = -1


class SlowKneserNey:
    """Interpolated Kneser-Ney over tuples, written from the formula, one token at a time."""

    def __init__(self, documents: list[list[int]], order: int, vocab_size: int, discount: str):
        self.order, self.vocab_size = order, vocab_size
        raw: Counter[tuple[int, ...]] = Counter()
        before: dict[tuple[int, ...], set[int]] = defaultdict(set)
        for document in documents:
            text = [BEGIN, *document]
            for end in range(2, len(text) + 1):
                for n in range(1, order + 2):
                    if end - n >= 0:
                        gram = tuple(text[end - n : end])
                        raw[gram] += 1
                        before[gram[1:]].add(gram[0])
        self.counts = [
            {
                gram: count if n == order or gram[0] == BEGIN else len(before[gram])
                for gram, count in raw.items()
                if len(gram) == n
            }
            for n in range(1, order + 1)
        ]
        self.discounts = []
        for counts in self.counts:
            t = [0] + [sum(c == k for c in counts.values()) for k in (1, 2, 3, 4)]
            if discount == "absolute":
                d = [t[1] / (t[1] + 2 * t[2]) if t[1] else 0.5] * 3
            elif min(t[1:4]) == 0:
                d = [0.5, 1.0, 1.5]
            else:
                y = t[1] / (t[1] + 2 * t[2])
                d = [k - (k + 1) * y * t[k + 1] / t[k] for k in (1, 2, 3)]
                d = d if min(d) > 0 else [0.5, 1.0, 1.5]
            self.discounts.append(d)

    def prob(self, word: int, context: tuple[int, ...]) -> float:
        context = context[max(0, len(context) - self.order + 1) :]
        counts, discount = self.counts[len(context)], self.discounts[len(context)]
        following = [c for gram, c in counts.items() if gram[:-1] == context]
        lower = self.prob(word, context[1:]) if context else 1 / self.vocab_size
        if not following:
            return lower
        count = counts.get((*context, word), 0)
        own = count - discount[min(count, 3) - 1] if count else 0.0
        return (own + sum(discount[min(c, 3) - 1] for c in following) * lower) / sum(following)


def corpus(seed: int, vocab_size: int, documents: int = 30) -> list[list[int]]:
    """Documents of a skewed, repetitive source, so that counts of 1 to 4 and more all occur."""
    rng = np.random.default_rng(seed)
    result = []
    for _ in range(documents):
        tokens = [int(rng.integers(vocab_size))]
        for _ in range(int(rng.integers(0, 25))):
            step = int(rng.choice([1, 2, 5], p=[0.7, 0.2, 0.1]))
            tokens.append((tokens[-1] * step + 1) % vocab_size if rng.random() < 0.8 else int(rng.integers(vocab_size)))
        result.append(tokens)
    return result


def test_bigram_by_hand() -> None:
    # One document 0 1 0 1 over V = 3, absolute discounting. Bigrams: (begin 0) 1, (0 1) 2, (1 0) 1.
    # Order 2: t1 = 2, t2 = 1, D = 2 / 4 = 1/2. Order 1 counts distinct tokens before: 0 has {begin, 1}, 1 has {0}:
    # t1 = 1, t2 = 1, D = 1/3, gamma = (2/3) / 3 = 2/9, so
    # p(0) = (5/3) / 3 + (2/9) / 3 = 17/27, p(1) = (2/3) / 3 + 2/27 = 8/27, p(2) = 2/27.
    model = NGram.fit([[0, 1, 0, 1]], 2, 3, "absolute")
    assert model.discounts == [(1 / 3, 1 / 3, 1 / 3), (0.5, 0.5, 0.5)]
    contexts = model.log_probs([[0, 1, 2, 0], [0, 0, 2, 2]])
    expected = [
        # p(0|begin) = 1/2 + 1/2 17/27;  p(1|0) = (3/2)/2 + 1/4 8/27;  p(2|1) = 1/2 2/27;  2 was never seen: p(0)
        [22 / 27, 89 / 108, 1 / 27, 17 / 27],
        # p(0|begin);  p(0|0) = 1/4 17/27;  p(2|0) = 1/4 2/27;  p(2)
        [22 / 27, 17 / 108, 1 / 54, 2 / 27],
    ]
    np.testing.assert_allclose(np.exp(contexts), expected, rtol=1e-14)


def test_unigram_by_hand() -> None:
    # Tokens 0 0 0 1 1 2 over V = 4, counts 3, 2, 1 and t1 = t2 = t3 = 1, t4 = 0: y = 1/3,
    # D1 = 1 - 2/3 = 1/3, D2 = 2 - 3/3 = 1, D3 = 3 - 0 = 3. The discounts add up to 13/3, of 6 counts.
    model = NGram.fit([[0, 0, 1], [0, 1, 2]], 1, 4)
    np.testing.assert_allclose(model.discounts, [(1 / 3, 1, 3)])
    spread = 13 / 3 / 6 / 4
    expected = [0 + spread, 1 / 6 + spread, (2 / 3) / 6 + spread, spread]
    np.testing.assert_allclose(np.exp(model.log_probs([0, 1, 2, 3])), expected, rtol=1e-14)


@pytest.mark.parametrize("discount", ["modified", "absolute"])
@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_equals_the_slow_reference(order: int, discount: str) -> None:
    vocab_size = 11
    documents = [*corpus(order, vocab_size), [4], [4, 5], []]
    fast = NGram.fit(documents, order, vocab_size, discount)
    slow = SlowKneserNey(documents, order, vocab_size, discount)
    np.testing.assert_allclose(fast.discounts, slow.discounts, rtol=1e-14)
    for document in [*documents[:4], *corpus(99, vocab_size, 4)]:  # text that was seen, and text that was not
        expected = [slow.prob(w, (BEGIN, *document[:i])) for i, w in enumerate(document)]
        np.testing.assert_allclose(np.exp(fast.log_probs(document)), expected, rtol=1e-12)


@pytest.mark.parametrize("discount", ["modified", "absolute"])
@pytest.mark.parametrize("order", [1, 2, 5])
def test_probabilities_sum_to_one(order: int, discount: str) -> None:
    vocab_size = 37  # ids from 30 upwards never occur in training
    documents = corpus(5, 30)
    model = NGram.fit(documents, order, vocab_size, discount)
    rng = np.random.default_rng(0)
    contexts = [[], documents[0][:1], documents[1][:4], documents[2], rng.integers(0, vocab_size, 6), [36] * 3]
    for context in contexts:
        rows = [[*context, word] for word in range(vocab_size)]
        probabilities = np.exp(model.log_probs(rows)[:, -1])
        assert probabilities.min() > 0
        np.testing.assert_allclose(probabilities.sum(), 1, rtol=1e-12)


def test_large_vocabulary_at_order_five() -> None:
    # Naming 5-grams by base-V digits would overflow 64 bits (65536^5 = 2^80); only pairs are ever packed.
    vocab_size = 65_536
    rng = np.random.default_rng(1)
    ids = rng.integers(0, vocab_size, 12)
    documents = [ids[np.asarray(document)].tolist() for document in corpus(3, 12)]
    fast = NGram.fit(documents, 5, vocab_size)
    slow = SlowKneserNey(documents, 5, vocab_size, "modified")
    document = documents[3]
    expected = [slow.prob(w, (BEGIN, *document[:i])) for i, w in enumerate(document)]
    np.testing.assert_allclose(np.exp(fast.log_probs(document)), expected, rtol=1e-12)


def test_segments_of_rows_are_scored_as_documents_of_their_own() -> None:
    documents = corpus(7, 9)
    model = NGram.fit(documents, 3, 9)
    first, second, third = [3, 1, 4], [1, 5], [2, 6, 5, 3]
    rows = [[*first, *second, 0, 0], [*third, *second, *[0]]]
    segments = [[1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 2, 2, 0]]
    scores = model.log_probs(rows, segments)
    np.testing.assert_array_equal(scores[0], [*model.log_probs(first), *model.log_probs(second), 0, 0])
    np.testing.assert_array_equal(scores[1], [*model.log_probs(third), *model.log_probs(second), 0])
    # Without segment ids the same tokens are one document per row, and are read across the boundary.
    assert model.log_probs(rows)[0, 3] != scores[0, 3]
    np.testing.assert_array_equal(model.log_probs(rows), [model.log_probs(row) for row in rows])


def test_bits_per_byte_counts_what_a_causal_model_predicts() -> None:
    model = NGram.fit(corpus(7, 9), 2, 9)
    tokens = np.array([[3, 1, 4, 1, 5, 0], [2, 6, 5, 3, 5, 8]])
    segments = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
    token_bytes = np.array([[9, 1, 2, 9, 3, 9], [9, 1, 0, 4, 1, 2]])
    scores = model.log_probs(tokens, segments)
    nats = -(scores[0, [1, 2, 4]].sum() + scores[1, 1:].sum())  # all but the first token of each segment
    expected = nats / math.log(2) / (1 + 2 + 3 + 1 + 0 + 4 + 1 + 2)
    assert model.bits_per_byte(tokens, segments, token_bytes) == pytest.approx(expected, rel=1e-14)
    assert bits_per_byte(8 * math.log(2), 4) == 2.0


def test_more_context_predicts_a_patterned_text_better() -> None:
    documents = corpus(11, 20, documents=300)
    held_out = corpus(12, 20, documents=40)
    nats = [-sum(NGram.fit(documents, n, 20).log_probs(d).sum() for d in held_out) for n in (1, 2)]
    assert nats[1] < 0.8 * nats[0]


def test_unigram_top_k() -> None:
    # Counts: 2 has 3, 5 and 7 have 2 each (the lower id first), 1 has 1.
    documents = [[5, 2, 7, 2], [1, 7], [], [2, 5]]
    np.testing.assert_array_equal(unigram_top_k(documents, 9, 4), [2, 5, 7, 1])
    np.testing.assert_array_equal(unigram_top_k(documents, 9, 2, exclude=(2, 5)), [7, 1])


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: NGram.fit([], 2, 9), "no tokens"),
        (lambda: NGram.fit([[]], 2, 9), "no tokens"),
        (lambda: NGram.fit([[1]], 0, 9), "order is 0"),
        (lambda: NGram.fit([[1]], 2, 9, "good-turing"), "discount is 'good-turing'"),
        (lambda: NGram.fit([[1, 9]], 2, 9), "1 .. 9"),
        (lambda: NGram.fit([[1]], 2, 9).log_probs([-1, 2]), "-1 .. 2"),
        (lambda: unigram_top_k([[1]], 9, 9, exclude=(0,)), "k is 9"),
        (lambda: bits_per_byte(1.0, 0), "num_bytes is 0"),
    ],
)
def test_mistakes_are_told(call, named: str) -> None:
    with pytest.raises(UserError, match=named):
        call()
