"""Targets of an encoder with a decoder: against every target there is, and against rows read without a cache."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lmobj import masks
from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.evaluate import BeamConfig, SamplingConfig, _written, output_logits, write_targets
from lmobj.models import EncoderDecoderConfig
from tests.evaluate.toy_models import VOCAB, family
from tests.mutants import Mutant, assert_killed

SOURCES = [[1, 2, 3, 5], [5], [6, 2, 2]]
START, EOS, LIMIT = 0, 4, 3
GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=8)


@functools.cache
def model() -> Any:
    """A tiny model with weights so large that what it writes depends on all it reads."""
    config = EncoderDecoderConfig(
        layers=1, width=16, heads=2, head_width=8, mlp_width=16, max_length=12, positions="learned",
        scale_attention=True, init_std=0.7, vocab_multiple=4,
    )  # fmt: skip
    return config.build(Vocabulary(VOCAB), nnx.Rngs(params=3))


def write(settings: Any, sources: Any = SOURCES, eos: int | None = EOS, **more: Any) -> Any:
    return write_targets(model(), sources, settings, start=START, eos=eos, length=12, **more)


def log_probs(source: list[int], targets: np.ndarray) -> np.ndarray:
    """ln p(next | source, START and what comes before) of targets [N, T] that are read whole, [N, T, V]."""
    padded = np.zeros((1, 4), np.int32)
    padded[0, : len(source)] = source
    read = np.concatenate([np.full((len(targets), 1), START), targets[:, :-1]], axis=1)
    return np.asarray(_read(*nnx.split(model()), padded, jnp.asarray([len(source)]), jnp.asarray(read)))


@functools.partial(jax.jit, static_argnums=0)
def _read(graphdef: Any, state: Any, source: Any, length: Any, read: Any) -> Any:
    whole = nnx.merge(graphdef, state)
    valid = (jnp.arange(4) < length[:, None]).astype(jnp.int32)
    encoded = whole.encode(source, mask=masks.bidirectional().packed(valid))
    encoded, valid = (jnp.repeat(x, len(read), axis=0) for x in (encoded, valid))
    across = masks.bidirectional().packed(jnp.ones_like(read), valid)
    return jax.nn.log_softmax(output_logits(whole, whole.decode(read, encoded, mask=masks.causal(), cross_mask=across)))


def texts(found: Any, row: int) -> list[tuple[int, ...]]:
    return [tuple(t[:n].tolist()) for t, n in zip(found.tokens[row], found.lengths[row], strict=True)]


@pytest.mark.parametrize(("eos", "penalty"), [(EOS, 0.0), (EOS, 1.0), (None, 0.0)])
def test_a_wide_beam_finds_the_best_of_all_targets(eos: int | None, penalty: float) -> None:
    # Of 3 tokens of 7 there are at most 49 open before the last, so 49 beams lose nothing.
    settings = BeamConfig(max_new_tokens=LIMIT, num_beams=49, num_samples=5, length_penalty=penalty)
    found = write(settings, eos=eos)
    bodies = np.array(list(itertools.product(range(VOCAB), repeat=LIMIT)))
    for row, source in enumerate(SOURCES):
        chosen = np.take_along_axis(log_probs(source, bodies), bodies[..., None], axis=2)[..., 0]
        scores = {}
        for body, each in zip(bodies.tolist(), chosen, strict=True):
            n = body.index(eos) + 1 if eos in body else LIMIT
            scores[tuple(body[:n])] = each[:n].sum() / ((5 + n) / 6) ** penalty
        best = sorted(scores, key=lambda body: -scores[body])[:5]
        assert texts(found, row) == best
        np.testing.assert_allclose(found.scores[row], [scores[body] for body in best], rtol=2e-5)


def test_greedy_targets_are_those_of_rows_read_whole() -> None:
    found = write(GREEDY)
    for row, source in enumerate(SOURCES):
        written = np.zeros((1, 8), np.int32)
        for step in range(8):
            each = log_probs(source, written)[0, step]
            written[0, step] = each.argmax()
            np.testing.assert_allclose(found.log_probs[row, 0, step], each.max(), rtol=1e-4)
            if written[0, step] == EOS:
                break
        assert texts(found, row) == [tuple(written[0, : step + 1].tolist())]
    assert len({tuple(texts(found, row)) for row in range(3)}) == 3  # what is read matters


def test_one_beam_without_end_is_greedy() -> None:
    greedy, beam = write(GREEDY, eos=None), write(BeamConfig(max_new_tokens=8, num_beams=1), eos=None)
    np.testing.assert_array_equal(beam.tokens, greedy.tokens)
    np.testing.assert_allclose(beam.log_probs, greedy.log_probs, rtol=1e-4, atol=1e-6)


def test_what_is_drawn_is_the_sources_own() -> None:
    """By itself, and behind others, as parts of a file are written."""
    settings = SamplingConfig(max_new_tokens=4, num_samples=2, seed=7)
    together, alone = write(settings), write(settings, SOURCES[2:])
    assert texts(together, 2) == texts(alone, 0)
    assert texts(together, 0) != texts(together, 2)


def test_batches_change_nothing_and_every_source_has_its_samples() -> None:
    settings = SamplingConfig(max_new_tokens=4, num_samples=3, seed=7)
    sources = [*SOURCES, [1] * 12, [2, 3], [5, 5, 5]]
    counts: list[int] = []
    whole = write(settings, sources)
    parts = write(settings, sources, batch_size=4, done=counts.append)
    assert counts == [4, 6]
    np.testing.assert_array_equal(whole.tokens, parts.tokens)
    np.testing.assert_allclose(whole.log_probs, parts.log_probs, rtol=1e-4, atol=1e-6)
    assert whole.tokens.shape == (6, 3, 4)
    assert len({text for row in range(6) for text in texts(whole, row)}) > 6
    other = write(SamplingConfig(max_new_tokens=4, num_samples=3, seed=8), sources)
    assert (other.tokens != whole.tokens).any()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sources": []}, "prompts are empty"),
        ({"sources": [[1], []]}, "prompt 1 has shape"),
        ({"sources": [[1], [VOCAB]]}, "prompt 1 has ids in 7"),
        ({"sources": [[1], [1] * 13]}, "source 1 has 13 tokens; accepted: at most 12"),
        ({"eos": VOCAB}, "eos is 7"),
        ({"settings": BeamConfig(max_new_tokens=13)}, "model.max_length is 12 and rows have 13 tokens"),
    ],
    ids=["none", "empty", "ids", "long", "eos", "limit"],
)
def test_what_cannot_be_written_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        write(**{"settings": GREEDY, **changes})


def test_other_models_are_refused() -> None:
    other: Any = family("learned")
    with pytest.raises(UserError, match="model is Decoder, which does not read one text and write another"):
        write_targets(other, SOURCES, GREEDY, start=0, eos=None, length=4)


MUTANTS = [
    Mutant(
        "padding is read",
        _written,
        "_Beside",
        lambda kind: lambda model, encoded, valid: kind(model, encoded, jnp.ones_like(valid)),
    ),
    Mutant(
        "the decoder begins with the end",
        _written,
        "sample",
        lambda f: lambda model, prompts, *more, **settings: f(model, prompts * 0 + EOS, *more, **settings),
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutants_are_noticed(monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    _written._write.clear_cache()
    assert_killed(monkeypatch, mutant, [test_greedy_targets_are_those_of_rows_read_whole])
    _written._write.clear_cache()
