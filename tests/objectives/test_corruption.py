"""From settings to noise: each reaches the corruption it names, defaults are the papers', empty slots cost nothing."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmobj import noise
from lmobj.batch import Vocabulary
from lmobj.models import OutputHead
from lmobj.objectives import (
    CausalLM,
    Classification,
    Context,
    Example,
    ExtractiveQA,
    MaskedLM,
    NextSentencePrediction,
    Objective,
    PermutationLM,
    ReplacedTokenDetection,
    SentenceOrderPrediction,
    SpanBoundary,
    TokenClassification,
    TransformerXL,
    step_keys,
)
from tests.mutants import Mutant, assert_killed

VOCAB = Vocabulary(size=50, pad=0, unk=1, bos=2, eos=3, cls=4, sep=5, mask=6)
ROWS, LENGTH = 4, 40


@functools.cache
def batch() -> dict[str, Any]:
    """[CLS] A [SEP] B [SEP], some words of which are unknown; row 1 ends after 33 tokens."""
    draw = np.random.default_rng(0)
    tokens = np.where(draw.random((ROWS, LENGTH)) < 0.1, VOCAB.unk, draw.integers(7, VOCAB.size, (ROWS, LENGTH)))
    lengths = np.array([[40], [33], [40], [40]])
    at = np.arange(LENGTH)
    tokens = np.where(at == 0, VOCAB.cls, np.where((at == 20) | (at == lengths - 1), VOCAB.sep, tokens))
    tokens = np.where(at < lengths, tokens, VOCAB.pad)
    arrays = {
        "tokens": tokens,
        "segment_ids": at < lengths,
        "positions": np.broadcast_to(at, tokens.shape),
        "token_types": np.broadcast_to(at > 20, tokens.shape),
        "pair_labels": np.zeros(ROWS),
        "row_ids": np.stack([np.zeros(ROWS), np.arange(ROWS)], axis=1),
    }
    flags = {"word_starts": draw.random((ROWS, LENGTH)) < 0.6, "backward": np.arange(ROWS) % 2 == 1}
    return {name: jnp.asarray(x, jnp.int32) for name, x in arrays.items()} | {
        k: jnp.asarray(x) for k, x in flags.items()
    }


def rows() -> dict[str, Any]:
    """What corruptions read of the batch, by their names for it. Unknown words may be masked, control tokens not."""
    tokens, segments = batch()["tokens"], batch()["segment_ids"]
    return {
        "tokens": tokens,
        "candidates": (segments > 0) & ((tokens == VOCAB.unk) | (tokens > 6)),
        "functional": (tokens == VOCAB.sep) | (tokens == VOCAB.cls),
        "word_starts": batch()["word_starts"],
        "backward": batch()["backward"],
        "segment_ids": segments,
        "length": jnp.sum(segments, axis=1),
    }


def context(batch: dict[str, Any]) -> tuple[Any, Context]:
    noise_keys, model_keys = step_keys(jax.random.key(0, impl="threefry2x32"), batch["row_ids"], 0)
    return noise_keys, Context(model_keys, 0, VOCAB, train=False)


@dataclass(frozen=True, eq=False)
class Case:
    """An objective, and the function of `noise` that it is to call, with which settings."""

    objective: Objective
    function: Callable[..., Any]
    settings: dict[str, Any]


IDS: dict[str, Any] = {"mask_id": 6, "vocab_size": 50}
SHARES: dict[str, Any] = {"mask_share": 0.5, "random_share": 0.2}
RATE: dict[str, Any] = {"mask_rate": 0.31}  # 12.4 of 40 tokens, of which 37 are words
MASKED = IDS | SHARES | RATE
SPANS: dict[str, Any] = {"span_probability": 0.7, "max_span": 3, "max_targets": 2}
ORDER: dict[str, Any] = {
    "reuse": 20,
    "perm_size": 10,
    "num_predictions": 9,
    "mask_alpha": 5,
    "mask_beta": 2,
    "max_span": 3,
    "whole_words": True,
}
ROBERTA = MaskedLM(selection="roberta", **SHARES, **RATE)
SPECIALS = {"special_ids": (0, 1, 2, 3, 4, 5, 6)}
CASES = {
    "exact": Case(MaskedLM(**SHARES, **RATE), noise.mask_tokens, MASKED | {"num_predictions": 12}),
    "bernoulli": Case(
        MaskedLM(selection="bernoulli", **SHARES, **RATE),
        noise.mask_tokens_bernoulli,
        MASKED | {"num_predictions": None},
    ),
    "bernoulli, few": Case(
        MaskedLM(selection="bernoulli", max_predictions=5, **SHARES, **RATE),
        noise.mask_tokens_bernoulli,
        MASKED | {"num_predictions": 5},
    ),
    "roberta": Case(ROBERTA, noise.mask_tokens_roberta, MASKED | SPECIALS | {"num_predictions": 13}),  # ceil(12.4)
    "roberta, few": Case(
        dataclasses.replace(ROBERTA, max_predictions=5),
        noise.mask_tokens_roberta,
        MASKED | SPECIALS | {"num_predictions": 5},
    ),
    "whole_word": Case(
        MaskedLM(selection="whole_word", **SHARES, **RATE), noise.mask_whole_words, MASKED | {"num_predictions": 12}
    ),
    "ngram": Case(
        MaskedLM(selection="ngram", **SHARES, **RATE),
        noise.mask_ngrams,
        MASKED | {"num_predictions": 12, "max_ngram": 3},
    ),
    "ngram of 6": Case(
        MaskedLM(selection="ngram", max_ngram=6, **SHARES, **RATE),
        noise.mask_ngrams,
        MASKED | {"num_predictions": 12, "max_ngram": 6},
    ),
    "spans": Case(
        SpanBoundary(**SPANS, **SHARES, **RATE), noise.mask_spans, MASKED | SPANS | {"num_predictions": 13}
    ),  # ceil(12.4)
    "permutation": Case(PermutationLM(**ORDER), noise.permute_tokens, ORDER),
    "electra": Case(
        ReplacedTokenDetection(mask_share=0.5, **RATE),
        noise.mask_tokens_electra,
        {"mask_id": 6, "mask_share": 0.5, "num_predictions": 12, **RATE},
    ),
    "electra, few": Case(
        ReplacedTokenDetection(mask_share=0.5, max_predictions=5, replacement=False, **RATE),
        noise.mask_tokens_electra,
        {"mask_id": 6, "mask_share": 0.5, "num_predictions": 5, "replacement": False, **RATE},
    ),
    "next sentence": Case(
        NextSentencePrediction(masked_lm=ROBERTA),
        noise.mask_tokens_roberta,
        MASKED | SPECIALS | {"num_predictions": 13},
    ),
    "sentence order": Case(
        SentenceOrderPrediction(masked_lm=ROBERTA),
        noise.mask_tokens_roberta,
        MASKED | SPECIALS | {"num_predictions": 13},
    ),
}


@functools.cache
def expected(case: Case) -> dict[str, Any]:
    """The corruption by itself: each field of what it returns."""
    wanted = {name: x for name, x in rows().items() if name in inspect.signature(case.function).parameters}
    mask = functools.partial(case.function, **case.settings)
    keys, _ = context(batch())
    return jax.device_get(jax.vmap(lambda key, row: mask(key, **row))(keys, wanted))._asdict()


def assert_corrupts(case: Case) -> None:
    keys, ctx = context(batch())
    example = case.objective.corrupt(keys, batch(), ctx)
    found = {
        **example.extra,
        "tokens": example.inputs,
        "positions": example.predict,
        "targets": example.targets,
        "weights": example.weights,
        "query_rank": example.mask.query_rank,
        "key_rank": example.mask.key_rank,
    }
    for name, x in expected(case).items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_settings_reach_the_corruption(case: Case) -> None:
    """The same keys, rows and settings give the same row, slot by slot."""
    assert_corrupts(case)


def _without(name: str) -> Callable[[Any], Any]:
    """The function with one argument left at its default, whatever it is given."""
    return lambda f: lambda *args, **given: f(*args, **{k: x for k, x in given.items() if k != name})


def _lost(case: Case) -> list[str]:
    """The settings that have defaults, from which those of the case differ."""
    defaults = {k: p.default for k, p in inspect.signature(case.function).parameters.items()}
    return [k for k, x in case.settings.items() if defaults[k] not in (inspect.Parameter.empty, x)]


LOST = {
    f"{name}: {setting}": (CASES[name], setting)
    for name in ("exact", "bernoulli", "roberta", "whole_word", "ngram of 6", "spans", "permutation", "electra")
    for setting in _lost(CASES[name])
}
LOST["bernoulli: num_predictions"] = CASES["bernoulli, few"], "num_predictions"
LOST["permutation: backward"] = CASES["permutation"], "backward"
LOST["electra: replacement"] = CASES["electra, few"], "replacement"


@pytest.mark.parametrize(("case", "setting"), LOST.values(), ids=LOST)
def test_a_lost_setting_is_noticed(monkeypatch: pytest.MonkeyPatch, case: Case, setting: str) -> None:
    mutant = Mutant(f"{setting} lost", noise, case.function.__name__, _without(setting))
    assert_killed(monkeypatch, mutant, [functools.partial(assert_corrupts, case)])


def _always_exact(corruption: Any) -> Any:
    """`mask_tokens`, whatever the selection."""

    def mutated(self: MaskedLM, vocab: Vocabulary, length: int) -> Any:
        mask = corruption(dataclasses.replace(self, selection="exact", max_ngram=None), vocab, length)
        # Bernoulli's rows come without their length.
        return lambda key, tokens, candidates, length=LENGTH, **_: mask(key, tokens, candidates, length=length)

    return mutated


@pytest.mark.parametrize("name", ["bernoulli", "roberta", "whole_word", "ngram", "next sentence"])
def test_an_ignored_selection_is_noticed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    mutant = Mutant("selection ignored", MaskedLM, "_corruption", _always_exact)
    assert_killed(monkeypatch, mutant, [functools.partial(assert_corrupts, CASES[name])])


BERT = {"mask_rate": 0.15, "mask_share": 0.8, "random_share": 0.1}
DEFAULTS: list[tuple[Objective, dict[str, Any]]] = [
    # Devlin et al. 2019, section 3.1: 15%, of which 80% [MASK] and 10% random; the 1e-5 is of their code.
    (MaskedLM(), {**BERT, "selection": "exact", "max_predictions": None, "epsilon": {"nll": 1e-5}}),
    (NextSentencePrediction(), {"masked_lm": MaskedLM(), "short_rate": 0.1, "coefficients": {"nll": 1.0, "nsp": 1.0}}),
    (
        SentenceOrderPrediction(),
        {"masked_lm": MaskedLM(), "short_rate": 0.1, "coefficients": {"nll": 1.0, "sop": 1.0}},
    ),
    # Joshi et al. 2020, section 3.1: p = 0.2 and at most 10 words; section 4.2 and code: widths, targets, the + 1.
    (
        SpanBoundary(),
        {
            **BERT,
            "span_probability": 0.2,
            "max_span": 10,
            "max_targets": 15,
            "offset_width": 200,
            "layout": "single",
            "coefficients": {"nll": 1.0, "sbo": 1.0},
            "epsilon": {"sbo": 1.0},
        },
    ),
    # Clark et al. 2020, section 3 (lambda = 50) and appendix A; masks of 85% and epsilons of their code.
    (
        ReplacedTokenDetection(),
        {
            "mask_rate": 0.15,
            "mask_share": 0.85,
            "replacement": True,
            "temperature": 1.0,
            "disallow_correct": False,
            "coefficients": {"mlm": 1.0, "disc": 50.0},
            "epsilon": {"mlm": 1e-6, "disc": 1e-6},
        },
    ),
    # Yang et al. 2019, section 3.1: K = 6, spans of 1 to 5; no epsilon in their code.
    (
        PermutationLM(),
        {"mask_alpha": 6, "mask_beta": 1, "max_span": 5, "whole_words": False, "bidirectional": True, "epsilon": {}},
    ),
    # Radford et al. 2018, eq. 1, and Dai et al. 2019: plain likelihood.
    (CausalLM(), {"documents": "isolated", "label_smoothing": 0.0, "z_loss": 0.0, "epsilon": {}}),
    (TransformerXL(), {"label_smoothing": 0.0, "z_loss": 0.0, "epsilon": {}}),
    # Bowman et al. 2015: three classes. Devlin et al. 2019: dropout 0.1 of the pooled state.
    (Classification(), {"classes": 2, "label_smoothing": 0.0, "dropout": 0.1, "epsilon": {}}),
    # Devlin et al. 2019: dropout 0.1 of the states, which see both sides.
    (TokenClassification(), {"attention": "bidirectional", "token_types": True, "dropout": 0.1, "epsilon": {}}),
    (ExtractiveQA(), {"attention": "bidirectional", "token_types": True, "dropout": 0.1, "epsilon": {}}),
]


@pytest.mark.parametrize(("objective", "values"), DEFAULTS, ids=lambda x: getattr(x, "name", ""))
def test_defaults_are_those_of_the_papers(objective: Objective, values: dict[str, Any]) -> None:
    assert {name: getattr(objective, name) for name in values} == values


class Given:
    """Models whose hidden states are given, and a vocabulary head of random numbers."""

    bias = jnp.zeros(VOCAB.size)

    def __init__(self, hidden: Any) -> None:
        self.states = hidden

    def hidden(self, tokens: Any, **_: Any) -> Any:
        return self.states

    def two_streams(self, tokens: Any, predict: Any, **_: Any) -> tuple[Any, Any, Any]:
        return None, jnp.take_along_axis(self.states, predict[..., None], axis=1), ()

    recurrent = init_memory = two_streams  # never called here

    def discriminator_hidden(self, tokens: Any, **_: Any) -> Any:
        return jnp.zeros(tokens.shape)

    def discriminate(self, hidden: Any) -> Any:
        return hidden

    def head_hidden(self, hidden: Any) -> Any:
        return hidden

    def head_table(self) -> OutputHead:
        return OutputHead(jnp.asarray(np.random.default_rng(1).normal(size=(VOCAB.size, 4)), jnp.float32))

    generator_hidden, generator_head_hidden, generator_head_table = hidden, head_hidden, head_table

    def __call__(self, left: Any, right: Any, offset: Any) -> Any:
        return left + 2 * right


def read_places(example: Example) -> np.ndarray:
    """[B, L] where a prediction, or a border of its span, is."""
    places = np.zeros(example.inputs.shape, bool)
    slots = [(example.predict, example.weights)]
    if "boundary_weights" in example.extra:
        slots += [(example.extra[side], example.extra["boundary_weights"]) for side in ("left", "right")]
    for at, weights in slots:
        for row, column in np.argwhere(np.asarray(weights) > 0):
            places[row, at[row, column]] = True
    return places


@functools.cache
def open_rows() -> dict[str, Any]:
    """Rows that begin with a word, but for row 0: [CLS] 4 words [SEP] and padding, which leaves slots empty."""
    tokens = np.array(batch()["tokens"])
    tokens[1:, 0] = 9
    tokens[0, 5], tokens[0, 6:] = VOCAB.sep, VOCAB.pad
    more = {"tokens": tokens, "segment_ids": tokens != VOCAB.pad, "sampled": np.full((ROWS, 12), 40)}
    more["row_ids"] = np.stack(
        [np.zeros(ROWS), np.arange(20, 20 + ROWS)], axis=1
    )  # rows of which some predict their first
    return batch() | {name: jnp.asarray(x, jnp.int32) for name, x in more.items()}


@pytest.mark.parametrize("name", ["exact", "spans", "electra", "permutation"])
def test_empty_slots_cost_nothing_although_they_point_at_the_first_token(name: str) -> None:
    objective = CASES[name].objective
    keys, ctx = context(open_rows())
    example = objective.corrupt(keys, open_rows(), ctx)
    places = read_places(example)
    empty = np.asarray(example.weights) == 0
    assert empty[0].any()
    assert not np.asarray(example.predict)[empty].any()
    assert not places[0, 0]
    assert places[1:, 0].any()

    @jax.jit
    def run(hidden: Any) -> Any:
        def loss(hidden: Any) -> Any:
            model = Given(hidden)
            return sum(objective.terms({"model": model, "heads": model}, example, (), ctx).sums.values())

        return jax.value_and_grad(loss)(hidden)

    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, LENGTH, 4)), jnp.float32)
    value, gradient = run(hidden)
    np.testing.assert_array_equal(np.linalg.norm(gradient, axis=-1) > 0, places)
    same, other = run(hidden.at[0, 0].set(9.0)), run(hidden.at[1:, 0].set(9.0))
    assert same[0] == value != other[0]
    np.testing.assert_array_equal(same[1], gradient)
