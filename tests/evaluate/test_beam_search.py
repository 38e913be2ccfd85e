"""Beam search: against every continuation there is, and against the rule written with lists."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import pytest

from lmobj.errors import UserError
from lmobj.evaluate import BeamConfig, SamplingConfig, generate
from tests.evaluate.toy_models import VOCAB, TableModel, family, uncached_log_probs

PROMPTS = [[1, 2, 3], [5], [6, 2]]
EOS = 4


def divisor(length: int, penalty: float) -> float:
    return ((5 + length) / 6) ** penalty


def brute_force(prompt: list[int], limit: int, penalty: float, eos: int | None) -> list[tuple[float, tuple[int, ...]]]:
    """Scores of all continuations: those that end with `eos`, and those of `limit` tokens without it."""
    bodies = np.array(list(itertools.product(range(VOCAB), repeat=limit)))
    rows = np.concatenate([np.tile(prompt, (len(bodies), 1)), bodies], axis=1)
    log_probs = uncached_log_probs(family("learned"), rows)[:, len(prompt) - 1 : -1]
    chosen = np.take_along_axis(log_probs, bodies[..., None], axis=2)[..., 0]
    scores = {}
    for body, token_log_probs in zip(bodies.tolist(), chosen, strict=True):
        length = body.index(eos) + 1 if eos in body else limit
        scores[tuple(body[:length])] = token_log_probs[:length].sum() / divisor(length, penalty)
    return sorted(((score, body) for body, score in scores.items()), reverse=True)


def found(generated, row: int) -> list[tuple[int, ...]]:
    return [tuple(t[:n].tolist()) for t, n in zip(generated.tokens[row], generated.lengths[row], strict=True)]


@pytest.mark.parametrize(("eos", "penalty"), [(EOS, 0.0), (EOS, 1.0), (EOS, 3.0), (None, 0.6)])
def test_a_wide_beam_finds_the_best_of_all_continuations(eos: int | None, penalty: float) -> None:
    # With 3 new tokens of 7 there are at most 49 open continuations before the last step, so 49 beams lose nothing.
    settings = BeamConfig(max_new_tokens=3, num_beams=49, num_samples=10, length_penalty=penalty)
    generated = generate(family("learned"), PROMPTS, settings, eos=eos)
    for row, prompt in enumerate(PROMPTS):
        best = brute_force(prompt, 3, penalty, eos)[:10]
        assert found(generated, row) == [body for _, body in best]
        np.testing.assert_allclose(generated.scores[row], [score for score, _ in best], rtol=2e-5)
        lengths = generated.lengths[row]
        np.testing.assert_allclose(
            generated.log_probs[row].sum(-1) / np.vectorize(divisor)(lengths, penalty), generated.scores[row], rtol=1e-5
        )
        assert all((tokens[n:] == 0).all() for tokens, n in zip(generated.tokens[row], lengths, strict=True))
    if eos is not None:
        assert len(set(generated.lengths.ravel().tolist())) > 1  # both kinds are among the best


def slow_beam(
    next_log_probs: Callable[[list[int]], np.ndarray], settings: BeamConfig, eos: int | None
) -> list[tuple[float, list[int]]]:
    """The same rule with lists, always run to the limit."""
    opened: list[tuple[float, list[int]]] = [(0.0, [])]
    closed: list[tuple[float, list[int]]] = []
    for step in range(1, settings.max_new_tokens + 1):
        extended = [(total + lp, [*body, t]) for total, body in opened for t, lp in enumerate(next_log_probs(body))]
        extended = sorted(extended, key=lambda pair: -pair[0])[: 2 * settings.num_beams]
        scored = [(total / divisor(step, settings.length_penalty), body) for total, body in extended if body[-1] == eos]
        closed = sorted(closed + scored, key=lambda pair: -pair[0])[: settings.num_beams]
        opened = [(total, body) for total, body in extended if body[-1] != eos][: settings.num_beams]
    last = [(total / divisor(settings.max_new_tokens, settings.length_penalty), body) for total, body in opened]
    return sorted(closed + last, key=lambda pair: -pair[0])[: settings.num_samples]


@pytest.mark.parametrize("name", ["rotary", "gru"])
@pytest.mark.parametrize("eos", [EOS, None])
def test_narrow_beams_follow_the_rule(name: str, eos: int | None) -> None:
    model = family(name)
    settings = BeamConfig(max_new_tokens=6, num_beams=3, num_samples=3, length_penalty=0.8)
    generated = generate(model, PROMPTS, settings, eos=eos)
    for row, prompt in enumerate(PROMPTS):

        def next_log_probs(body: list[int], prompt: list[int] = prompt) -> np.ndarray:
            padded = np.zeros((1, 16), np.int32)
            text = [*prompt, *body]
            padded[0, : len(text)] = text
            return uncached_log_probs(model, padded)[0, len(text) - 1]

        expected = slow_beam(next_log_probs, settings, eos)
        assert found(generated, row) == [tuple(body) for _, body in expected]
        np.testing.assert_allclose(generated.scores[row], [score for score, _ in expected], rtol=2e-5)


@pytest.mark.parametrize("beams", [1, 2])
def test_the_search_stops_only_when_nothing_can_improve(beams: int) -> None:
    # 0 is the end, and likely at once (0.6); 1 1 1 ... has probability 0.4 * 0.99^n. Without penalty the immediate end
    # wins: ln 0.6 = -0.51 against -0.92. With exponent 3 the long text wins:
    # (ln 0.4 + 9 ln 0.99) / (15 / 6)^3 = -0.065 against -0.51 / 1. One beam has its result after one step, when the
    # open text (ln 0.4 / 1) still scores below it, and must go on all the same.
    model = TableModel(np.array([[0.6, 0.4], [0.01, 0.99]]))
    settings = BeamConfig(max_new_tokens=10, num_beams=beams, length_penalty=0.0)
    short = generate(model, [[0]], settings, eos=0)
    assert found(short, 0) == [(0,)]
    np.testing.assert_allclose(short.scores, [[np.log(0.6)]], rtol=1e-6)
    long = generate(model, [[0]], dataclasses.replace(settings, length_penalty=3.0), eos=0)
    assert found(long, 0) == [(1,) * 10]
    np.testing.assert_allclose(long.scores, [[(np.log(0.4) + 9 * np.log(0.99)) / 2.5**3]], rtol=1e-5)


def test_a_row_that_is_done_does_not_change_while_others_go_on() -> None:
    # From 1 the end is certain at once; from 2 it never comes before the limit.
    chain = np.full((3, 3), 1e-9)
    chain[[0, 1, 2], [0, 0, 2]] = 1
    settings = BeamConfig(max_new_tokens=6, num_beams=2, length_penalty=1.0)
    both = generate(TableModel(chain), [[1], [2]], settings, eos=0)
    assert found(both, 0) == [(0,)]
    assert found(both, 1) == [(2,) * 6]
    alone = generate(TableModel(chain), [[1]], settings, eos=0)
    np.testing.assert_array_equal(alone.scores[0], both.scores[0])


def test_one_beam_without_end_is_greedy() -> None:
    model = family("rotary")
    beam = generate(model, PROMPTS, BeamConfig(max_new_tokens=6, num_beams=1))
    greedy = generate(model, PROMPTS, SamplingConfig(max_new_tokens=6, temperature=0.0))
    np.testing.assert_array_equal(beam.tokens, greedy.tokens)
    np.testing.assert_allclose(beam.log_probs, greedy.log_probs, rtol=1e-5)


def test_missing_results_are_empty() -> None:
    # One new token of two: two results exist, four are asked for.
    model = TableModel(np.array([[0.25, 0.75], [0.5, 0.5]]))
    settings = BeamConfig(max_new_tokens=1, num_beams=4, num_samples=4, length_penalty=0.0)
    generated = generate(model, [[0]], settings, eos=0)
    np.testing.assert_array_equal(generated.lengths, [[1, 1, 0, 0]])
    np.testing.assert_array_equal(generated.tokens, [[[1], [0], [0], [0]]])
    np.testing.assert_allclose(generated.scores, [[np.log(0.75), np.log(0.25), -np.inf, -np.inf]], rtol=1e-6)
    np.testing.assert_array_equal(generated.log_probs[0, 2:], 0)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"num_beams": 2, "num_samples": 3}, "num_samples is 3"),
        ({"length_penalty": -1.0}, "length_penalty is -1.0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, float], named: str) -> None:
    with pytest.raises(UserError, match=named):
        BeamConfig(**settings)
