"""Causal and masked LM by hand: which tokens count, what they cost, which settings are refused; and what they learn."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmobj import losses, masks, noise
from lmobj.batch import Vocabulary
from lmobj.data import DataConfig, JsonLines, SentencePieceConfig, prepare
from lmobj.errors import UserError
from lmobj.objectives import CausalLM, Context, MaskedLM, _causal_lm, _masked_lm, denominators, step_keys, total_loss
from tests.mutants import Mutant, assert_killed
from tests.objectives.learning import DECODER, ENCODER, Sums, Twins, learn
from tests.objectives.uniform import Uniform

VOCAB = Vocabulary(size=16, pad=0, eos=3, cls=4, sep=5, mask=6)
ROW_IDS = jnp.asarray([[0, 0], [0, 1]])
KEY = jax.random.key(0, impl="threefry2x32")


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
    sees = np.asarray(example.mask.dense(6, 6))[0, 0]
    np.testing.assert_array_equal(sees[:3, :3], np.tri(3))
    np.testing.assert_array_equal(sees[3:5], [[0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0]])
    terms = CausalLM().terms({"model": Uniform(VOCAB.size)}, example, (), ctx)
    # 6 predictions of log 16 nats, or 4 bits; the predicted words 8, 11 and 12 have 5 bytes, the ends none.
    np.testing.assert_allclose(terms.sums["nll"], 6 * math.log(16), rtol=1e-6)
    np.testing.assert_allclose(terms.metrics["bits_per_byte"], (6 * 4, 15), rtol=1e-6)


def test_joined_documents_are_one_text() -> None:
    noise, ctx = context()
    example = CausalLM(documents="joined").corrupt(noise, causal_batch(), ctx)
    # 7 -> 8 -> 3 -> 9 -> 3 |: the end of the first document predicts the beginning of the second, and sees all of it.
    np.testing.assert_array_equal(example.weights, [[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(example.positions, [range(6)] * 2)
    sees = np.asarray(example.mask.dense(6, 6))
    np.testing.assert_array_equal(sees[0, 0, :5, :5], np.tri(5))
    assert not sees[0, 0, :5, 5].any()
    terms = CausalLM(documents="joined").terms({"model": Uniform(VOCAB.size)}, example, (), ctx)
    np.testing.assert_allclose(terms.metrics["bits_per_byte"], (7 * 4, 20))  # one more, of 5 bytes


def completion_batch() -> dict[str, Any]:
    """A eos B eos. Row 0: A of 2 tokens, B of 3. Row 1: A of 1, B of none."""
    tokens = jnp.asarray([[7, 8, 3, 9, 10, 11, 3, 0], [12, 3, 3, 0, 0, 0, 0, 0]])
    return {
        "tokens": tokens,
        "segment_ids": (tokens > 0).astype(jnp.int32),
        "token_types": jnp.asarray([[0, 0, 0, 1, 1, 1, 1, 0], [0, 0, 1, 0, 0, 0, 0, 0]]),
        "positions": jnp.broadcast_to(jnp.arange(8), (2, 8)),
        "row_ids": ROW_IDS,
    }


def test_completions_alone_are_predicted_their_end_included() -> None:
    noise, ctx = context()
    example = CausalLM(loss_on="completion").corrupt(noise, completion_batch(), ctx)
    np.testing.assert_array_equal(example.weights, [[0, 0, 1, 1, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(example.targets[0, 2:6], [9, 10, 11, 3])
    assert int(example.targets[1, 1]) == 3


def test_completions_from_a_file_of_pairs(tmp_path: pathlib.Path) -> None:
    """What is predicted decodes to the second text, and what stands before it to the first."""
    pairs = {f"What is twice {i}?": f"It is {2 * i}." for i in range(40)}
    lines = [json.dumps({"question": question, "answer": answer}) for question, answer in pairs.items()]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    settings: dict[str, Any] = {"tokenizer": SentencePieceConfig(vocab_size=300), "cache": str(tmp_path / "cache")}
    settings |= {"validation": 0, "test": 0}
    source = JsonLines(files=(str(tmp_path / "pairs.jsonl"),), text="question", pair="answer")
    data = prepare(DataConfig(source=source, **settings), quiet=True)
    objective, (noise, ctx) = CausalLM(loss_on="completion"), context()
    spec = objective.rows(data.vocab, 40)
    (batch,) = data.batches(spec, split="train", batch_size=2, steps=1)
    example = objective.corrupt(noise, {name: jnp.asarray(x) for name, x in batch.items()}, ctx)
    for row in range(2):
        at = np.flatnonzero(example.weights[row])
        answer = np.asarray(example.targets[row])[at]
        assert answer[-1] == data.vocab.eos
        question = np.asarray(example.inputs[row])[: at[0] + 1]
        assert question[-1] == data.vocab.eos
        assert data.tokenizer.decode(answer) == pairs[data.tokenizer.decode(question)]
    single = prepare(DataConfig(source=JsonLines(files=source.files, text="question"), **settings), quiet=True)
    with pytest.raises(UserError, match=r"pairs of texts.*data\.source\.pair: COLUMN"):
        single.rows(spec, batch_size=2)


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
    terms = objective.terms({"model": Uniform(VOCAB.size)}, example, (), ctx)
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
    terms = objective.terms({"model": Uniform(VOCAB.size)}, example, (), ctx)
    np.testing.assert_allclose(terms.sums["nll"], 4 * math.log(16), rtol=1e-6)
    loss = total_loss(terms, denominators(objective, example), {"nll": 1.0})
    np.testing.assert_allclose(loss, 4 * math.log(16) / (4 + 1e-5), rtol=1e-6)


def test_masked_sees_its_own_document_and_all_of_it() -> None:
    noise, ctx = context()
    packed = masked_batch() | {"segment_ids": jnp.asarray([[1] * 4 + [2] * 6, [1] * 4 + [0] * 6])}
    sees = np.asarray(MaskedLM(mask_rate=0.3).corrupt(noise, packed, ctx).mask.dense(10, 10))[:, 0]
    sees = np.broadcast_to(sees, (2, 10, 10))
    same = np.arange(10) >= 4
    np.testing.assert_array_equal(sees, [same[:, None] == same] * 2)  # padding sees padding alone


@pytest.mark.parametrize(
    ("settings", "vocab", "length", "message"),
    [
        ({"mask_rate": 0.0}, VOCAB, 16, r"mask_rate is 0\.0"),
        ({"mask_share": 0.9, "random_share": 0.2}, VOCAB, 16, r"random_share is 0\.2"),
        ({"max_predictions": 0}, VOCAB, 16, "max_predictions is 0"),
        ({"mask_rate": 0.9}, VOCAB, 8, r"selects 7 of the 6 ordinary tokens"),
        ({}, Vocabulary(size=16), 16, r"needs \[MASK\]"),
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
    with pytest.raises(UserError, match=r"documents is joined and objective\.loss_on is completion"):
        CausalLM(documents="joined", loss_on="completion")
    with pytest.raises(UserError, match="loss_on is completion, which ends both texts"):
        CausalLM(loss_on="completion").rows(Vocabulary(size=16), 16)


def test_rows_asked_for() -> None:
    assert CausalLM().rows(VOCAB, 16).suffix == (3,)
    completions = CausalLM(loss_on="completion").rows(VOCAB, 16)
    assert (completions.layout, completions.prefix, completions.suffix) == ("examples", (), (3,))
    # Figures of n-gram models on whole documents are no match for what other documents or questions tell.
    assert CausalLM().judged_by == "bits_per_byte"
    assert CausalLM(documents="joined").judged_by == CausalLM(loss_on="completion").judged_by == "loss"
    rows = MaskedLM(selection="whole_word", layout="single").rows(VOCAB, 16)
    assert (rows.layout, rows.prefix, rows.suffix, rows.fields) == ("single", (4,), (5,), ("word_starts",))


def test_causal_learns_sums() -> None:
    """0.76, and hardly a point more: see `Sums` for what wrong masks and targets reach."""
    language = Sums()
    metrics = learn(CausalLM(), DECODER, language.vocab, *language.batches(steps=300), lr=1e-2)
    assert abs(metrics["accuracy"] - language.ceiling) < 0.04


def test_masked_learns_twins() -> None:
    """All selected tokens become [MASK], so that a token is known if and only if its twin is seen."""
    language = Twins(length=12)
    objective = MaskedLM(mask_rate=0.3, mask_share=1.0, random_share=0.0)  # round(0.3 * 12) = 4 hidden
    metrics = learn(objective, ENCODER, language.vocab, *language.batches(steps=250, held_out=64), lr=1e-2)
    assert abs(metrics["accuracy"] - language.masked_ceiling(hidden=4)) < 0.04


def _batch_changed(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Any], Any]:
    """A replacement of `corrupt` that reads another batch."""
    return lambda corrupt: lambda self, keys, batch, ctx: corrupt(self, keys, change(batch), ctx)


def _without_loss_mask(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in batch.items() if name != "loss_mask"}


def _texts_swapped(batch: dict[str, Any]) -> dict[str, Any]:
    return batch | {"token_types": 1 - batch["token_types"]} if "token_types" in batch else batch


def _all_count(masked: Any) -> Any:
    return masked._replace(weights=jnp.ones_like(masked.weights))


def _targets_shifted(masked: Any) -> Any:
    return masked._replace(targets=jnp.roll(masked.targets, 1))


def _slots_changed(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A replacement of `mask_tokens` with other slots."""
    return lambda mask_tokens: lambda *args, **options: change(mask_tokens(*args, **options))


def _every_position_counts(corrupt: Any) -> Any:
    def mutated(*given: Any) -> Any:
        example = corrupt(*given)
        return dataclasses.replace(example, weights=jnp.ones_like(example.weights))

    return mutated


CAUSAL_BY_HAND = (
    test_causal_predicts_the_next_token_of_the_same_document,
    test_joined_documents_are_one_text,
    test_completions_alone_are_predicted_their_end_included,
    test_loss_mask_keeps_a_prompt_out_of_the_loss,
    test_smoothing_and_z_loss_enter_the_loss_and_not_the_metrics,
)
MASKED_BY_HAND = (
    test_masked_counts_tokens_by_the_papers_rule,
    test_masked_loss_divides_by_the_count_plus_berts_epsilon,
    test_masked_sees_its_own_document_and_all_of_it,
)
BOTH_SIDES = Mutant("a mask of both sides", masks, "causal", lambda _: masks.bidirectional)
TWO_AHEAD = Mutant("target two ahead", _causal_lm, "ahead", lambda f: lambda x, places=1: f(x, 2 * places))
LEFT_SIDE = Mutant("a mask of the left side", masks, "bidirectional", lambda _: masks.causal)
MUTANTS = [
    (BOTH_SIDES, CAUSAL_BY_HAND),
    (TWO_AHEAD, CAUSAL_BY_HAND),
    (Mutant("target is the input", _causal_lm, "ahead", lambda _: lambda x, places=1: x), CAUSAL_BY_HAND),
    (Mutant("documents see one another", masks.AttentionMask, "packed", lambda _: lambda m, _: m), CAUSAL_BY_HAND),
    (Mutant("every position counts", CausalLM, "corrupt", _every_position_counts), CAUSAL_BY_HAND),
    (Mutant("no prompt mask", CausalLM, "corrupt", _batch_changed(_without_loss_mask)), CAUSAL_BY_HAND),
    (Mutant("first text for second", CausalLM, "corrupt", _batch_changed(_texts_swapped)), CAUSAL_BY_HAND),
    (Mutant("no z-loss", losses, "z_loss", lambda _: lambda stats: 0 * stats.logsumexp), CAUSAL_BY_HAND),
    (LEFT_SIDE, MASKED_BY_HAND),
    (Mutant("no document of its own", masks.AttentionMask, "packed", lambda _: lambda m, _: m), MASKED_BY_HAND),
    (Mutant("special tokens are masked", _masked_lm, "is_one_of", lambda _: lambda x, _: x < 0), MASKED_BY_HAND),
    (Mutant("masked target shifted", noise, "mask_tokens", _slots_changed(_targets_shifted)), MASKED_BY_HAND),
    (Mutant("empty slots count", noise, "mask_tokens", _slots_changed(_all_count)), MASKED_BY_HAND),
    (Mutant("no epsilon", MaskedLM, "epsilon", lambda _: {}), MASKED_BY_HAND),
]


@pytest.mark.parametrize(("mutant", "checks"), MUTANTS, ids=[str(mutant) for mutant, _ in MUTANTS])
def test_mutants_are_noticed(
    monkeypatch: pytest.MonkeyPatch, mutant: Mutant, checks: tuple[Callable[[], None], ...]
) -> None:
    assert_killed(monkeypatch, mutant, checks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mutant", "check"),
    [
        (BOTH_SIDES, test_causal_learns_sums),
        (TWO_AHEAD, test_causal_learns_sums),
        (LEFT_SIDE, test_masked_learns_twins),
    ],
    ids=lambda x: str(x) if isinstance(x, Mutant) else "",
)
def test_what_is_learnt_tells_them_too(
    monkeypatch: pytest.MonkeyPatch, mutant: Mutant, check: Callable[[], None]
) -> None:
    assert_killed(monkeypatch, mutant, [check])
