"""Text to text by hand: lengths of the papers, inputs and targets of a row, both renderings, round trips; it learns."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmobj import noise
from lmobj.batch import RowSpec, Vocabulary
from lmobj.errors import UserError
from lmobj.models import DecoderConfig, RowUse
from lmobj.objectives import (
    Context,
    Denoiser,
    Example,
    MixtureOfDenoisers,
    PrefixLM,
    SpanCorruption,
    TextToText,
    _mixture_of_denoisers,
    _text_to_text,
    step_keys,
)
from tests.mutants import Mutant, assert_killed
from tests.objectives.learning import SEQ2SEQ, Topics, learn

PAD, EOS, FIRST_SENTINEL, SENTINELS = 0, 3, 299, 128
VOCAB = Vocabulary(
    size=300,
    pad=PAD,
    bos=2,
    eos=EOS,
    nlu=40,
    s2s=41,
    nlg=42,
    sentinels=tuple(range(FIRST_SENTINEL, FIRST_SENTINEL - SENTINELS, -1)),
)
MODES = (40, 41, 42)
KEY = jax.random.key(0, impl="threefry2x32")


def make_rows(raw: int, lengths: list[int], rows: int = 64) -> dict[str, Any]:
    """Rows of `raw` tokens, of which the first have the lengths given and all others are full."""
    size = np.full(rows, raw)
    size[: len(lengths)] = lengths
    there = np.arange(raw) < size[:, None]
    tokens = np.where(there, np.random.default_rng(0).integers(50, 150, (rows, raw)), 0)
    ids = np.stack([np.zeros(rows), np.arange(rows)], 1)
    return {
        name: jnp.asarray(x, jnp.int32) for name, x in (("tokens", tokens), ("segment_ids", there), ("row_ids", ids))
    }


def corrupted(objective: TextToText, batch: dict[str, Any], vocab: Vocabulary = VOCAB) -> tuple[Example, Context]:
    keys, model = step_keys(KEY, batch["row_ids"], 0)
    ctx = Context(model, 0, vocab, train=False)
    return jax.jit(lambda keys, batch: objective.corrupt(keys, batch, ctx))(keys, batch), ctx


def written(example: Example, row: int) -> list[int]:
    """The targets of a row, without padding."""
    return [t for t, w in zip(example.targets[row].tolist(), example.weights[row].tolist(), strict=True) if w]


def read(example: Example, row: int) -> list[int]:
    """The inputs of a row: what its encoder, or everything in it before the targets, has."""
    if example.decoder_inputs is None:
        assert example.mask.is_prefix is not None
        seen = np.asarray(example.mask.is_prefix[row])
    else:
        assert example.mask.segment_ids is not None
        seen = np.asarray(example.mask.segment_ids[row]) > 0
    return np.asarray(example.inputs[row])[seen].tolist()


def restored(inputs: list[int], targets: list[int]) -> list[int]:
    """The text that inputs and targets were made of."""
    assert inputs[-1] == targets[-1] == EOS
    body = inputs[1:-1] if inputs[0] in MODES else inputs[:-1]
    return np.asarray(noise.join_spans(body, targets[:-1], FIRST_SENTINEL, SENTINELS)).tolist()


# --- lengths ------------------------------------------------------------------------------------------------------


def test_lengths_of_the_papers() -> None:
    """T5: 512 inputs are 568 tokens with 114 targets, 256 are 284 with 58, 128 are 141 with 29; at a half, 766 and
    512."""
    for length, raw, targets in ((512, 568, 114), (256, 284, 58), (128, 141, 29)):
        objective = SpanCorruption()
        assert objective.rows(VOCAB, length) == RowSpec("packed", raw)
        assert objective.use(length) == RowUse(length, targets, decoder_length=targets)
    half = SpanCorruption(noise_density=0.5)
    assert (half.raw_length(512), half.use(512).predictions) == (766, 512)
    assert SpanCorruption(documents="isolated").rows(VOCAB, 512) == RowSpec("single", 568)


def test_lengths_of_one_row() -> None:
    """20 tokens, 3 of noise (0.15), in 1 span: 17 + 1 + 1 inputs and 3 + 1 + 1 targets, 24; 21 would be 25."""
    objective = SpanCorruption(rendering="decoder")
    assert objective.raw_length(24) == 20
    assert objective.use(24) == RowUse(24, 5)
    # Both ends take 2 of 24; of 22 tokens 1 at least is the prefix, and 21 and the end follow.
    assert PrefixLM(rendering="decoder").use(24) == RowUse(24, 22)
    # One token of the row is not in the inputs, and the end is: 24 of 24. Targets of 23 and the end.
    assert PrefixLM().use(24) == RowUse(24, 24, decoder_length=24)
    # 0.25: the prefix is 12 (half of 23, to the even) to 23 tokens, so at most 12 and the end follow.
    assert PrefixLM(noise_density=0.25).use(24) == RowUse(24, 13, decoder_length=13)
    # Every second of 23 tokens noise: 12 + 11 sentinels + end, or 11 + 12 + end.
    assert SpanCorruption(noise="tokens").use(24) == RowUse(24, 24, decoder_length=24)


def test_lengths_of_ul2() -> None:
    """Each denoiser's inputs have 512 tokens, mode and end included: 511 as T5 would have them. By hand, of 567 tokens
    85 are noise in 28 spans: 482 + 28 + 1 = 511, and 85 + 28 + 1 = 114 targets. Of 1004, 502 in 8: 511 and 511. A
    prefix of 509 of 510 tokens, mode, sentinel and end: 512; of at least 254 (half of 509, to the even): 256 + 2."""
    objective = MixtureOfDenoisers()
    raw = objective.raw_length(512)
    assert raw == 1004
    found = [tuple(one.rooms(n))[:2] for one, n in zip(objective.denoisers, objective._read(raw), strict=True)]
    assert [inputs for inputs, _ in found] == [512] * 7
    assert (found[0][1], found[2][1], found[6][1]) == (114, 258, 511)
    assert objective._read(raw)[:3:2] == [567, 510]
    assert objective.use(512) == RowUse(512, 511, decoder_length=511)
    assert objective.rows(VOCAB, 512) == RowSpec("packed", 1004)
    assert MixtureOfDenoisers(rendering="decoder").use(512).length == 512


# --- rows ---------------------------------------------------------------------------------------------------------


def test_a_row_by_hand() -> None:
    """10 tokens, 3 of noise in 1 span, which ends the row: inputs are 7 tokens, sentinel 0 and the end; targets are
    sentinel 0 for the 7, the 3 and the end. START is what the decoder reads first, and it predicts what comes next."""
    objective = SpanCorruption(noise_density=0.3, mean_span=3)
    batch = make_rows(10, [], rows=2)
    example, _ = corrupted(objective, batch)
    tokens = batch["tokens"][0].tolist()
    assert example.inputs[0].tolist() == [*tokens[:7], FIRST_SENTINEL, EOS]
    assert example.targets[0].tolist() == [FIRST_SENTINEL, *tokens[7:], EOS]
    assert example.weights.tolist() == [[1.0] * 5] * 2
    for name, first in (("pad", PAD), ("bos", 2), ("eos", EOS)):
        example, _ = corrupted(dataclasses.replace(objective, decoder_start=name), batch)
        assert example.decoder_inputs is not None
        assert example.decoder_inputs[0].tolist() == [first, FIRST_SENTINEL, *tokens[7:]]


def test_one_row_has_both() -> None:
    """Each target is predicted where the token before it is, the first at the end of the inputs."""
    objective = SpanCorruption(noise_density=0.3, mean_span=2, rendering="decoder")
    batch = make_rows(20, [7, 2, 1, 0])
    example, _ = corrupted(objective, batch)
    apart, _ = corrupted(dataclasses.replace(objective, rendering="encoder_decoder"), batch)
    assert example.predict is not None
    assert example.mask.causal
    for row in range(len(batch["tokens"])):
        inputs, targets = read(example, row), written(example, row)
        assert (inputs, targets) == (read(apart, row), written(apart, row))
        whole, end = example.inputs[row].tolist(), len(inputs) + len(targets)
        assert whole == inputs + targets + [0] * (len(whole) - end)
        assert np.asarray(example.mask.segment_ids)[row].tolist() == [1] * end + [0] * (len(whole) - end)
        for t, target in enumerate(targets):
            assert whole[int(example.predict[row, t]) + 1] == target


OBJECTIVES = {
    "spans": SpanCorruption(),
    "short spans": SpanCorruption(noise_density=0.5, mean_span=1),
    "long spans": SpanCorruption(noise_density=0.9, mean_span=20),
    "tokens": SpanCorruption(noise="tokens", noise_density=0.3),
    "one row": SpanCorruption(rendering="decoder"),
    "denoisers": MixtureOfDenoisers(),
    "denoisers in one row": MixtureOfDenoisers(rendering="decoder"),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_inputs_and_targets_restore_the_text(name: str) -> None:
    """Of each row that counts: all but those of one token or none."""
    objective = OBJECTIVES[name]
    raw = objective.raw_length(96)
    batch = make_rows(raw, [0, 1, 2, 3, 5, 17, raw - 1], rows=128)
    example, _ = corrupted(objective, batch)
    counted = np.asarray(example.weights).any(axis=1)
    np.testing.assert_array_equal(counted, np.arange(128) >= 2)
    longest = 0
    for row in range(2, 128):
        inputs, targets = read(example, row), written(example, row)
        text = restored(inputs, targets)
        assert text == batch["tokens"][row].tolist()[: len(text)]
        size = len(inputs) + len(targets) if objective.rendering == "decoder" else len(inputs)
        assert size <= 96
        longest = max(longest, size)
        if not isinstance(objective, MixtureOfDenoisers):
            assert len(text) == int(jnp.sum(batch["segment_ids"][row]))
    assert longest == 96 or name in ("tokens", "short spans")


def test_a_prefix_and_the_rest() -> None:
    """The prefix of a row of 24 is 1 .. 23 tokens, all of them drawn among 512 rows; both parts end with the end."""
    objective = PrefixLM()
    batch = make_rows(24, [0, 1, 2], rows=512)
    example, _ = corrupted(objective, batch)
    sizes = set()
    for row in range(512):
        length = int(jnp.sum(batch["segment_ids"][row]))
        inputs, targets = read(example, row), written(example, row)
        if length < 2:
            assert (inputs, targets) == ([], [])
            continue
        assert inputs[-1] == targets[-1] == EOS
        assert inputs[:-1] + targets[:-1] == batch["tokens"][row].tolist()[:length]
        sizes.add(len(inputs) - 1)
    assert sizes == set(range(1, 24))


def test_every_denoiser_has_its_share_of_the_rows_and_its_lengths() -> None:
    """512 rows of seven denoisers, one of which has half of all rows: of the others a twelfth each, 43 with a standard
    deviation of 6.3. Each row's mode and lengths are those of one of them."""
    weights = (1.0, 1.0, 6.0, 1.0, 1.0, 1.0, 1.0)
    denoisers = tuple(
        dataclasses.replace(one, weight=w) for one, w in zip(MixtureOfDenoisers().denoisers, weights, strict=True)
    )
    objective = MixtureOfDenoisers(denoisers=denoisers)
    raw = objective.raw_length(96)
    example, _ = corrupted(objective, make_rows(raw, [], rows=512))
    lengths: dict[tuple[int, ...], int] = {}
    sequential = 0
    for row in range(512):
        inputs, targets = read(example, row), written(example, row)
        mode = inputs[0]
        if mode == VOCAB.s2s:
            sequential += 1
            assert inputs[-2:] == [FIRST_SENTINEL, EOS]
            assert targets[0] == FIRST_SENTINEL
            continue
        key = (mode, len(inputs), len(targets))
        lengths[key] = lengths.get(key, 0) + 1
    expected: dict[tuple[int, ...], int] = {}
    for one, n in zip(denoisers, objective._read(raw), strict=True):
        if one.mean_span is not None:
            key = (getattr(VOCAB, one.mark or ""), *tuple(one.rooms(n))[:2])
            expected[key] = expected.get(key, 0) + 1
    assert set(lengths) == set(expected)
    assert all(abs(lengths[key] - 512 / 12 * n) < 4 * 6.5 * n**0.5 for key, n in expected.items())
    assert abs(sequential - 256) < 4 * 11.4


def test_a_text_is_given_as_inputs_are_made() -> None:
    """To go on with a text, each objective's model is shown what stands around a prefix in training; UL2's, what its
    denoiser of prefixes makes."""
    prefixes = Denoiser(0.25, None, "s2s")
    for objective in (
        PrefixLM(),
        MixtureOfDenoisers(denoisers=(prefixes,)),
        MixtureOfDenoisers(denoisers=(dataclasses.replace(prefixes, mark=None),)),
    ):
        before, after = objective.around(VOCAB)
        batch = make_rows(objective.raw_length(24), [], rows=8)
        example, _ = corrupted(objective, batch)
        for row in range(8):
            inputs, text = read(example, row), batch["tokens"][row].tolist()
            body = inputs[len(before) : len(inputs) - len(after)]
            assert inputs == [*before, *text[: len(body)], *after]
            assert len(body) >= 1
    assert MixtureOfDenoisers().around(VOCAB) == ((VOCAB.s2s,), (FIRST_SENTINEL, EOS))
    assert MixtureOfDenoisers(denoisers=(Denoiser(),)).around(VOCAB) == ((), (EOS,))


def test_rows_with_more_spans_than_sentinels_count_nothing() -> None:
    few = dataclasses.replace(VOCAB, sentinels=VOCAB.sentinels[:3])
    example, _ = corrupted(SpanCorruption(noise="tokens", noise_density=0.3), make_rows(12, []), few)
    weights = np.asarray(example.weights)
    marks = np.isin(np.asarray(example.inputs), VOCAB.sentinels).sum(1)
    assert 0 < weights.any(axis=1).sum() < 64
    assert marks.max() == 3
    assert not np.asarray(example.inputs)[~weights.any(axis=1)].any()


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpanCorruption(noise_density=1.0), r"objective.noise_density is 1.0, which leaves nothing to see"),
        (lambda: SpanCorruption(noise_density=0.0), r"objective.noise_density is 0.0, which leaves nothing to write"),
        (lambda: SpanCorruption(mean_span=0.5), r"objective.mean_span is 0.5"),
        (lambda: SpanCorruption(noise="words"), r"objective.noise is 'words'; accepted: spans, tokens"),  # type: ignore[arg-type]
        (lambda: SpanCorruption(rendering="encoder"), r"objective.rendering is 'encoder'"),  # type: ignore[arg-type]
        (lambda: PrefixLM(decoder_start="cls"), r"objective.decoder_start is 'cls'"),  # type: ignore[arg-type]
        (lambda: PrefixLM(documents="packed"), r"objective.documents is 'packed'"),  # type: ignore[arg-type]
        (lambda: PrefixLM(label_smoothing=1.0), r"objective.label_smoothing is 1.0"),
        (lambda: Denoiser(mark="cls"), r"objective.denoisers.mark is 'cls'"),  # type: ignore[arg-type]
        (lambda: Denoiser(weight=0), r"objective.denoisers.weight is 0"),
        (lambda: Denoiser(noise_density=-1), r"objective.denoisers.noise_density is -1"),
        (lambda: MixtureOfDenoisers(denoisers=()), r"objective.denoisers is empty"),
        (lambda: SpanCorruption().rows(VOCAB, 2), r"data.length is 2; .* 3 tokens or more"),
        (lambda: SpanCorruption(rendering="decoder").rows(VOCAB, 5), r"data.length is 5; .* 6 tokens or more"),
        (lambda: SpanCorruption(noise="tokens").rows(VOCAB, 2), r"data.length is 2; accepted: 3"),
        (lambda: PrefixLM(rendering="decoder").rows(VOCAB, 3), r"data.length is 3; .* at least 4"),
        (lambda: MixtureOfDenoisers().rows(VOCAB, 3), r"data.length is 3; accepted: 4 or more"),
        (
            lambda: SpanCorruption(noise_density=0.5, mean_span=1).rows(VOCAB, 512),
            r"marks up to 255 spans .* has 128; set data.tokenizer.sentinels to 255 or more",
        ),
        (
            # 511 tokens at 0.15 have 65.2 runs of noise on average: 65.2 + 4 * 8.07 = 97.4.
            lambda: SpanCorruption(noise="tokens").rows(dataclasses.replace(VOCAB, sentinels=(299,)), 512),
            r"marks up to 98 spans .* has 1",
        ),
        (
            lambda: MixtureOfDenoisers().rows(dataclasses.replace(VOCAB, nlu=None), 64),
            r"needs \[NLU\] and \[S2S\] and \[NLG\], .* no \[NLU\]; set data.tokenizer.denoiser_marks to true",
        ),
        (lambda: PrefixLM().rows(dataclasses.replace(VOCAB, eos=None), 64), r"prefix_lm ends inputs and targets with"),
        (lambda: PrefixLM(decoder_start="bos").rows(dataclasses.replace(VOCAB, bos=None), 64), r"decoder_start is bos"),
    ],
    ids=range(22),
)
def test_what_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_the_model_has_to_be_of_the_kind_that_is_rendered_for() -> None:
    class Model:
        pass

    for rendering, message in (("encoder_decoder", "is no encoder with a decoder"), ("decoder", "not of that kind")):
        objective = PrefixLM(rendering=rendering)  # type: ignore[arg-type]
        example, ctx = corrupted(objective, make_rows(12, []))
        with pytest.raises(UserError, match=message):
            objective.terms({"model": Model()}, example, (), ctx)  # type: ignore[dict-item]


# --- mutants ------------------------------------------------------------------------------------------------------

MUTANTS = [
    Mutant(
        "prediction from the token itself",
        _text_to_text,
        "_joined",
        lambda f: lambda *a: (lambda x: dataclasses.replace(x, predict=x.predict + 1))(f(*a)),
    ),
    Mutant("no mode token", _mixture_of_denoisers, "_opened", lambda _: lambda found, mark, marked: found),
    Mutant("every denoiser reads the whole row", MixtureOfDenoisers, "_read", lambda _: lambda self, raw: [raw] * 7),
    Mutant("always the first", MixtureOfDenoisers, "_draw", lambda _: lambda self, key: jnp.int32(0)),
    Mutant("the decoder starts with the first target", TextToText, "start", lambda _: lambda self, vocab: 299),
    Mutant("a longer raw row", SpanCorruption, "raw_length", lambda f: lambda self, length: f(self, length) + 2),
]
CHECKS = [
    test_lengths_of_the_papers,
    test_lengths_of_ul2,
    test_a_row_by_hand,
    test_one_row_has_both,
    test_every_denoiser_has_its_share_of_the_rows_and_its_lengths,
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutants_are_noticed(monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    assert_killed(monkeypatch, mutant, CHECKS)


# --- learning -----------------------------------------------------------------------------------------------------

PREFIX_DECODER = DecoderConfig(layers=2, width=32, heads=4, max_length=64, vocab_multiple=1, init_std=0.2, remat="none")
LANGUAGE = Topics(topics=4)
TOPIC_VOCAB = dataclasses.replace(
    LANGUAGE.vocab, size=LANGUAGE.vocab.size + 19, nlu=15, s2s=16, nlg=17, sentinels=tuple(range(33, 17, -1))
)
"""Words are 7 .. 14."""
SPANS = {"noise_density": 0.3, "mean_span": 1}


def best_of_spans() -> float:
    """Of 16 tokens 5 are noise, each a span: 5 sentinels and the end are known, and of 5 words their topic is."""
    return (5 + 1 + 5 * LANGUAGE.ceiling) / (5 + 1 + 5)


DENOISERS = (
    Denoiser(0.3, 1.0, "nlu"),
    Denoiser(0.5, None, "s2s"),
)


def best_of_denoisers() -> float:
    """Both read 16 tokens, in inputs of up to 18. Half of the rows have 5 spans of a word; of the others 1 .. 15 words
    are written, a sentinel before them and the end after, which are known."""
    rest = sum(n * LANGUAGE.ceiling + 2 for n in range(1, 16)) / 15
    return (6 + 5 * LANGUAGE.ceiling + rest) / (11 + 8 + 2)


def best_of_prefixes() -> float:
    """After a prefix of 1 .. 15 of 16 words come 15 .. 1 of the same topic, and the end."""
    return sum(n * LANGUAGE.ceiling + 1 for n in range(1, 16)) / sum(n + 1 for n in range(1, 16))


@pytest.mark.parametrize(
    ("objective", "model", "best"),
    [
        pytest.param(SpanCorruption(**SPANS), SEQ2SEQ, best_of_spans(), id="spans"),
        pytest.param(
            SpanCorruption(**SPANS, rendering="decoder"),
            PREFIX_DECODER,
            best_of_spans(),
            id="spans-decoder",
            marks=pytest.mark.slow,
        ),
        pytest.param(PrefixLM(), SEQ2SEQ, best_of_prefixes(), id="prefix", marks=pytest.mark.slow),
        pytest.param(
            MixtureOfDenoisers(denoisers=DENOISERS),
            SEQ2SEQ,
            best_of_denoisers(),
            id="denoisers",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            PrefixLM(rendering="decoder"),
            PREFIX_DECODER,
            best_of_prefixes(),
            id="prefix-decoder",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_it_learns_topics(objective: TextToText, model: Any, best: float) -> None:
    metrics = learn(objective, model, TOPIC_VOCAB, *LANGUAGE.batches(steps=300, held_out=64), lr=5e-3)
    assert abs(metrics["accuracy"] - best) < 0.04
