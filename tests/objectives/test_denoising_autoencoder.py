"""BART's objective: inputs and targets hold the text, the steps come in order, a batch by hand; and it learns."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmobj import noise
from lmobj.batch import RowSpec, Vocabulary
from lmobj.errors import UserError
from lmobj.models import EncoderDecoderConfig
from lmobj.objectives import Context, DenoisingAutoencoder, Example, _denoising_autoencoder, step_keys
from lmobj.objectives._text_to_text import Rooms
from tests.mutants import Mutant, assert_killed
from tests.objectives.learning import Twins, learn

BOS, EOS, MASK = 2, 3, 6
VOCAB = Vocabulary(size=100, pad=0, bos=BOS, eos=EOS, mask=MASK)
KEY = jax.random.key(0, impl="threefry2x32")
INFILLING = DenoisingAutoencoder(permute_rate=0)
DELETION = DenoisingAutoencoder(permute_rate=0, unit="tokens", mean_span=None, replace="delete")


def make_rows(rows: int, length: int, seed: int = 0) -> dict[str, Any]:
    """Rows of 0 to `length` tokens, the first of each length up to 8; sentences of whole words."""
    rng = np.random.default_rng([length, seed])
    sizes = rng.integers(0, length + 1, rows)
    sizes[:9] = np.minimum(np.arange(9), length)[:rows]
    segments = (np.arange(length) < sizes[:, None]).astype(np.int32)
    starts = rng.random(segments.shape) < np.linspace(0.3, 1.0, rows)[:, None]
    starts[:, 0] = True
    ends = (rng.random(segments.shape) < 0.3) & np.pad(starts[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    numbers = jnp.arange(rows, dtype=jnp.int32)
    return {
        "tokens": jnp.asarray(rng.integers(7, VOCAB.size, segments.shape) * segments, jnp.int32),
        "segment_ids": jnp.asarray(segments),
        "word_starts": jnp.asarray(starts),
        "sentence_ends": jnp.asarray(ends & (segments > 0)),
        "row_ids": jnp.stack([numbers * 0, numbers], 1),
    }


def corrupted(objective: DenoisingAutoencoder, batch: dict[str, Any]) -> Example:
    keys, model = step_keys(KEY, batch["row_ids"], 0)
    return objective.corrupt(keys, batch, Context(model, 0, VOCAB))


def texts_of(batch: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Each row between <s> and </s>, and its length with them, or 0."""
    sizes = np.asarray(batch["segment_ids"]).sum(1)
    at, whole = np.arange(batch["tokens"].shape[1] + 2), np.where(sizes > 0, sizes + 2, 0)
    texts = np.pad(np.asarray(batch["tokens"]), ((0, 0), (1, 1)))
    texts[:, 0] = BOS
    texts[at == sizes[:, None] + 1] = EOS
    return np.where(at < whole[:, None], texts, 0), whole


def noised(objective: DenoisingAutoencoder, batch: dict[str, Any]) -> tuple[Example, noise.NoisedRow]:
    """The example, and the rows of which its inputs are made."""
    texts, whole = texts_of(batch)
    marks = {name: jnp.pad(batch[name], ((0, 0), (1, 1))) for name in ("word_starts", "sentence_ends")}
    room = objective.rooms(batch["tokens"].shape[1]).inputs

    def one(key: Any, text: Any, length: Any, marks: Any) -> noise.NoisedRow:
        return objective.noised(key, noise.whole_row(text, length, room=room), marks, VOCAB)

    @jax.jit
    def run(batch: Any, *texts: Any) -> Any:
        keys, _ = step_keys(KEY, batch["row_ids"], 0)
        return corrupted(objective, batch), jax.vmap(one)(keys, *texts)

    return jax.device_get(run(batch, texts, whole, marks))


SETTINGS = {
    "bart": DenoisingAutoencoder(),
    "released": DenoisingAutoencoder(mean_span=3.5, random_share=0.1),
    "masking": dataclasses.replace(DELETION, replace="span"),
    "deletion": dataclasses.replace(DELETION, mask_rate=0.5),
    "long": DenoisingAutoencoder(mask_rate=0.9, mean_span=16.0, replace="token", permute_rate=0.4),
    "sparse": DenoisingAutoencoder(mask_rate=0.01, mean_span=1.0, rotate_rate=0.5),
    "all": DenoisingAutoencoder(insert_rate=0.2, rotate_rate=0.7, random_share=0.3, unit="tokens"),
}


def check_texts(objective: DenoisingAutoencoder, rows: int, length: int) -> None:
    """What has a source is the token from there, once; the rest are masks, or random; whole words are hidden, and no
    more than the share; and the targets are the text."""
    batch = make_rows(rows, length)
    texts, whole = texts_of(batch)
    example, found = noised(objective, batch)
    np.testing.assert_array_equal(example.targets, texts)
    np.testing.assert_array_equal(example.inputs, found.tokens)
    np.testing.assert_array_equal(example.weights.sum(1), whole)

    at = np.arange(found.tokens.shape[1])
    real, kept = at < found.length[:, None], found.source >= 0
    assert not found.tokens[~real].any()
    assert not (kept & ~real).any()
    np.testing.assert_array_equal(found.tokens[kept], np.take_along_axis(texts, found.source.clip(0), 1)[kept])
    if not objective.random_share:
        assert (found.tokens[real & ~kept] == MASK).all()
    full = np.flatnonzero(whole)
    assert not found.length[whole == 0].any()
    np.testing.assert_array_equal(found.source[full, 0], 0)
    np.testing.assert_array_equal(found.source[full, found.length[full] - 1], whole[full] - 1)

    visible = np.zeros((rows, texts.shape[1]), int)
    np.add.at(visible, (np.nonzero(kept)[0], found.source[kept]), 1)
    assert visible.max() == 1
    starts = np.ones_like(visible, bool)
    if objective.unit == "words":
        starts[:, 1:-1] = batch["word_starts"]
    at = np.arange(texts.shape[1])
    inner = (at >= 1) & (at < whole[:, None] - 1)
    word = np.cumsum(starts & inner, axis=1)
    sizes, seen = np.zeros((2, rows, texts.shape[1]), int)
    row = np.broadcast_to(np.arange(rows)[:, None], word.shape)
    np.add.at(sizes, (row[inner], word[inner]), 1)
    np.add.at(seen, (row[inner], word[inner]), visible[inner])
    words = (sizes > 0).sum(1)
    assert ((seen == 0) | (seen == sizes)).all(), "words are hidden whole"
    hidden = ((sizes > 0) & (seen == 0)).sum(1)
    percent = round(objective.mask_rate * 100)
    budget = -(-words * percent // 100)
    assert (hidden <= budget).all()
    assert (hidden[words > 0] > 0).all()
    if objective.mean_span is None:
        np.testing.assert_array_equal(hidden, budget)


@pytest.mark.parametrize("name", list(SETTINGS))
def test_inputs_and_targets_hold_the_text(name: str) -> None:
    check_texts(SETTINGS[name], rows=300, length=40)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SETTINGS))
@pytest.mark.parametrize(("rows", "length"), [(2_000, 128), (200, 4_094)])
def test_inputs_and_targets_hold_long_texts(name: str, rows: int, length: int) -> None:
    check_texts(SETTINGS[name], rows, length)


def one_word_each(tokens: int, ends: tuple[int, ...] = (), rows: int = 300) -> dict[str, Any]:
    """Rows of the tokens 11, 12, ..., each a word; sentences end with those given."""
    row = jnp.arange(11, 11 + tokens, dtype=jnp.int32)
    batch = make_rows(rows, tokens)
    marks = {"word_starts": row > 0, "sentence_ends": jnp.isin(row, jnp.asarray(ends)), "segment_ids": row * 0 + 1}
    return batch | {name: jnp.tile(x, (rows, 1)) for name, x in (marks | {"tokens": row}).items()}


def read(example: Example) -> list[list[int]]:
    """The inputs without <s>, </s> and padding."""
    rows = np.asarray(example.inputs).tolist()
    assert all(row[0] == BOS and EOS in row for row in rows)
    return [row[1 : row.index(EOS)] for row in rows]


def test_a_batch_by_hand() -> None:
    """With a rate of 0 for all but one sentence, which cannot move: <s> 11 12 13 </s>, an empty row, and one token."""
    batch = one_word_each(3, rows=3)
    batch["segment_ids"] = batch["segment_ids"].at[1].set(0).at[2, 1:].set(0)
    example = corrupted(DenoisingAutoencoder(mask_rate=0), batch)
    rows = [[BOS, 11, 12, 13, EOS], [0] * 5, [BOS, 11, EOS, 0, 0]]
    real = [[1] * 5, [0] * 5, [1, 1, 1, 0, 0]]
    assert example.inputs.tolist() == rows
    assert example.targets.tolist() == rows
    assert example.decoder_inputs.tolist() == [[EOS, BOS, 11, 12, 13], [EOS, 0, 0, 0, 0], [EOS, BOS, 11, EOS, 0]]
    assert example.weights.tolist() == real
    masks = (example.mask, example.decoder_mask, example.cross_mask)
    assert all(mask.segment_ids.tolist() == real for mask in masks)
    assert [mask.causal for mask in masks] == [False, True, False]
    # In one row: the text twice, the second predicted from the end of the first on.
    joined = corrupted(DenoisingAutoencoder(mask_rate=0, rendering="decoder"), batch)
    assert joined.inputs[:, :10].tolist() == [rows[0] * 2, [0] * 10, [*rows[2][:3] * 2, 0, 0, 0, 0]]
    assert joined.predict[0].tolist() == [4, 5, 6, 7, 8]
    assert joined.weights.tolist() == real


def test_spans_are_of_the_text_after_its_sentences_moved() -> None:
    """Half of eight words in one span, of the sentences 11 .. 14 and 15 .. 18 in either order: what is left over is a
    beginning and an end of it. (A span of Poisson(16) is below 4 with probability 1e-4 alone, but may begin near the
    end.)"""
    orders = [[*range(11, 19)], [*range(15, 19), *range(11, 15)]]
    batch = one_word_each(8, ends=(14, 18))
    seen = set()
    for row in read(corrupted(DenoisingAutoencoder(mask_rate=0.5, mean_span=16.0), batch)):
        begin = row.index(MASK)
        before, after = row[:begin], row[begin + 1 :]
        (order,) = [i for i, o in enumerate(orders) if o[: len(before)] == before and o[8 - len(after) :] == after]
        seen.add((order, len(before)))
        assert len(after) == max(4 - len(before), 0)
    assert seen == {*np.ndindex(2, 8)}


def test_the_text_is_turned_last() -> None:
    """Four of the words 11 .. 18 in one span, and the row turned: what the mask hides, wherever it then is, is one run
    of the text."""
    turned = set()
    objective = DenoisingAutoencoder(permute_rate=0, mask_rate=0.5, mean_span=16.0, rotate_rate=1)
    for row in read(corrupted(objective, one_word_each(8))):
        hidden = sorted({*range(11, 19)} - {*row})
        assert hidden == [*range(hidden[0], hidden[0] + len(hidden))]
        turned.add(row.index(MASK) - (hidden[0] - 11))
    assert len(turned) > 4


def test_insertions_are_a_share_of_the_row_that_is_left() -> None:
    """Deleted are ceil(.5 * 9) = 5 of 9 tokens: 6 are left with <s> and </s>, ceil(.4 * 6) = 3 are inserted, of which
    ceil(.5 * 3) = 2 are random, from 1 .. 99, and one is a mask, unless it is random by chance."""
    objective = dataclasses.replace(DELETION, mask_rate=0.5, insert_rate=0.4, random_share=0.5)
    example = corrupted(objective, one_word_each(9))
    assert (np.asarray(example.inputs > 0).sum(1) == 9).all()
    assert example.inputs.shape[1] == 11 + 5  # ceil(.4 * 11)
    assert np.mean(np.sum(np.asarray(example.inputs) == MASK, axis=1) == 1) > 0.9


def test_rows_that_it_reads() -> None:
    objective = DenoisingAutoencoder()
    assert objective.rows(VOCAB, 16) == RowSpec("single", 14, fields=("word_starts", "sentence_ends"))
    assert dataclasses.replace(objective, documents="joined").rows(VOCAB, 16).layout == "packed"
    assert INFILLING.rows(VOCAB, 16).fields == ("word_starts",)
    assert DELETION.rows(VOCAB, 16).fields == ()
    assert DenoisingAutoencoder(mask_rate=0).rows(VOCAB, 16).fields == ("sentence_ends",)
    assert objective.around(VOCAB) == ((BOS,), (EOS,))  # as in the rows of `test_a_batch_by_hand`
    # 18 + ceil(1.8) = 20; 19 + 2 = 21
    assert DenoisingAutoencoder(insert_rate=0.1).raw_length(20) == 16
    # 2 * 20 = 40; with insertions 19 + 19 + 2 = 40
    joined = DenoisingAutoencoder(rendering="decoder")
    assert (joined.raw_length(40), joined.raw_length(41)) == (18, 18)
    assert dataclasses.replace(joined, insert_rate=0.1).raw_length(40) == 17
    use = objective.use(16)
    assert (use.length, use.predictions, use.decoder_length) == (16, 16, 16)
    assert (joined.use(40).length, joined.use(40).predictions) == (40, 20)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"permute_rate": 1.5}, r"objective.permute_rate is 1\.5; it must be from 0 to 1"),
        ({"mask_rate": -0.1}, r"objective.mask_rate is -0\.1"),
        ({"mask_rate": 1.0}, "objective.mask_rate is 1, which leaves nothing"),
        ({"insert_rate": float("nan")}, "objective.insert_rate is nan"),
        ({"rotate_rate": 2}, "objective.rotate_rate is 2"),
        ({"random_share": 1.1}, r"objective.random_share is 1\.1"),
        ({"mean_span": 0.0}, r"objective.mean_span is 0\.0"),
        ({"mean_span": 17.0}, r"objective.mean_span is 17\.0; .* at most 16, or null"),
        ({"unit": "letters"}, "objective.unit is 'letters'; accepted: words, tokens"),
        ({"replace": "word"}, "objective.replace is 'word'; accepted: span, token, delete"),
        ({"permute_rate": 0, "mask_rate": 0}, "are all 0, which leaves the text as it is"),
        ({"decoder_start": "cls"}, "objective.decoder_start is 'cls'"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DenoisingAutoencoder(**settings)


@pytest.mark.parametrize(
    ("settings", "vocab", "length", "message"),
    [
        ({}, {"bos": None}, 16, "needs <s> and </s> and .MASK., and the vocabulary has no <s>"),
        ({}, {"eos": None, "mask": None}, 16, "has no </s> and no .MASK."),
        ({"decoder_start": "bos"}, {"bos": None}, 16, "has no <s>"),
        ({}, {}, 3, "data.length is 3; two tokens of text need at least 4"),
        ({"rendering": "decoder", "insert_rate": 0.3}, {}, 9, "data.length is 9; .* at least 10"),  # 4 + 2 + 4
        # ceil(.95 * 14) = 14
        ({"mask_rate": 0.95}, {}, 16, r"objective.mask_rate 0\.95 hides 14 of the 14 tokens .* data.length 16"),
    ],
)
def test_rows_that_cannot_be(settings: dict[str, Any], vocab: dict[str, Any], length: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DenoisingAutoencoder(**settings).rows(dataclasses.replace(VOCAB, **vocab), length)


def _in_turn(first: dict[str, float], then: dict[str, float]) -> Any:
    """The steps with some rates 0, and after them with others."""

    def replacement(steps: Any) -> Any:
        def in_turn(self: Any, key: Any, row: Any, *args: Any) -> Any:
            if not all(getattr(self, name) for name in (*first, *then)):
                return steps(self, key, row, *args)
            return steps(
                dataclasses.replace(self, **then),
                key,
                steps(dataclasses.replace(self, **first), key, row, *args),
                *args,
            )

        return in_turn

    return replacement


def _written(found: noise.Denoised) -> noise.Denoised:
    return found._replace(targets=found.inputs, target_length=found.input_length)


def _no_room(self: DenoisingAutoencoder, raw: int) -> Rooms:
    return Rooms(raw + 2, raw + 2, 2 * raw + 4)


MUTANTS = [
    Mutant("the decoder starts with <s>", DenoisingAutoencoder, "start", lambda _: lambda self, vocab: vocab.bos),
    Mutant("rows without text count", _denoising_autoencoder, "text_lengths", lambda f: lambda b: jnp.maximum(f(b), 1)),
    Mutant("no room for insertions", DenoisingAutoencoder, "rooms", lambda _: _no_room),
    Mutant("insertions by the text", noise, "ceil_share", lambda f: lambda count, rate: f(count * 0 + 11, rate)),
    Mutant("sentences stay", noise, "permute_sentences", lambda _: lambda key, row, ends, *, rate: row),
    Mutant(
        "sentences move after spans", DenoisingAutoencoder, "noised", _in_turn({"permute_rate": 0}, {"mask_rate": 0})
    ),
    Mutant("nothing is turned", noise, "rotate_row", lambda _: lambda key, row, *, rate: row),
    Mutant("the text is turned first", DenoisingAutoencoder, "noised", _in_turn({"mask_rate": 0}, {"rotate_rate": 0})),
    Mutant("targets are the inputs", DenoisingAutoencoder, "denoise", lambda f: lambda *args: _written(f(*args))),
    Mutant("words are hidden in part", noise, "infill_spans", lambda f: lambda k, r, s, **x: f(k, r, s | True, **x)),
]
CHECKS = [
    test_rows_that_it_reads,
    test_a_batch_by_hand,
    test_insertions_are_a_share_of_the_row_that_is_left,
    test_spans_are_of_the_text_after_its_sentences_moved,
    test_the_text_is_turned_last,
    lambda: check_texts(DenoisingAutoencoder(), rows=100, length=12),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutants_are_noticed(monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    assert_killed(monkeypatch, mutant, CHECKS)


def test_it_learns_twins() -> None:
    """Half of 16 words are masked, of which the second half repeats the first. A masked word is known if its twin is
    seen in the inputs or has been written: all but the first of two twins that are both masked, of which a row has
    8 * (8 * 7) / (16 * 15) = 1.87, each a guess of 1/8, of 18 targets. Who sees no inputs guesses the whole first half:
    accuracy .61; who does not look for twins among them, half of it: .81; who sees the targets is at 1."""
    language = Twins()
    model = EncoderDecoderConfig(
        layers=1, width=32, heads=2, head_width=None, mlp_width=64, max_length=18, positions="learned",
        norm="layernorm", activation="gelu", bias=True, tie_embeddings=True, scale_attention=True, vocab_multiple=1,
        init_std=0.2, remat="none",
    )  # fmt: skip
    objective = dataclasses.replace(DELETION, mask_rate=0.5, replace="token")
    metrics = learn(objective, model, language.vocab, *language.batches(steps=500, held_out=64), lr=5e-3)
    guessed = 8 * (8 * 7) / (16 * 15) / 18
    assert abs(metrics["accuracy"] - (1 - guessed * 7 / 8)) < 0.015
    assert guessed * math.log(8) - 0.01 < metrics["nll"] < guessed * math.log(8) + 0.04
