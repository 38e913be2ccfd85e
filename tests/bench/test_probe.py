"""The probe: right rows, right features, scores that are known beforehand; and a table and a picture of them."""

from __future__ import annotations

import json
import math
import pathlib
import statistics
import xml.etree.ElementTree as ET
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lmobj import masks
from lmobj.batch import RowSpec, Vocabulary
from lmobj.bench import (
    Budget,
    Labelled,
    ProbeData,
    Reading,
    Results,
    TsvProbe,
    fit_and_score,
    majority,
    markdown_table,
    probe_model,
    spread,
)
from lmobj.bench._picture import draw_results
from lmobj.bench._probe import NotFinite, _features
from lmobj.bench._results import table
from lmobj.data import text_rows
from lmobj.errors import UserError
from lmobj.models import EncoderConfig, EncoderDecoderConfig
from lmobj.objectives import (
    CausalLM,
    MaskedLM,
    Member,
    Mixture,
    NextSentencePrediction,
    PermutationLM,
    SpanCorruption,
    TransformerXL,
)

_CLS, _SEP = 1, 2


class Letters:
    """A tokenizer of letters: a is 3, b is 4, ..."""

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array([ord(c) - ord("a") + 3 for c in text], np.int32) for text in texts]


_LETTERS: Any = Letters()
_PACKED = RowSpec("packed", 16, prefix=(_CLS,), suffix=(_SEP,))
_PAIRS = RowSpec("pairs", 16, prefix=(_CLS,), suffix=(_SEP,))
_XLNET = RowSpec("stream_pairs", 16, suffix=(_SEP, _CLS), reuse=4)


def _reading(spec: RowSpec = _PACKED, *, causal: bool = False) -> Reading:
    return Reading(_LETTERS, spec, causal)


def _rows(*texts: Any, spec: RowSpec = _PACKED, length: int = 16) -> Any:
    given = [Labelled(*(text if isinstance(text, tuple) else (text, None)), "x") for text in texts]
    return text_rows([(row.text, row.pair) for row in given], _LETTERS, spec, length, key="probe.length")


# --- rows ---------------------------------------------------------------------------------------------------------


def test_a_text_stands_between_the_tokens_of_its_training() -> None:
    rows = _rows("abc", "")
    assert rows.tokens[0].tolist() == [_CLS, 3, 4, 5, _SEP, *[0] * 11]
    assert rows.segments.sum(1).tolist() == [5, 2], "an empty text has its special tokens"
    assert not rows.types.any()
    decoder = _rows("abc", spec=RowSpec("packed", 16, suffix=(9,)))
    assert decoder.tokens[0, :5].tolist() == [3, 4, 5, 9, 0]
    xlnet = _rows("abc", spec=_XLNET)
    assert xlnet.tokens[0, :6].tolist() == [3, 4, 5, _SEP, _CLS, 0]
    assert xlnet.types[0, :6].tolist() == [0, 0, 0, 0, 2, 0]


def test_long_texts_are_cut_and_keep_their_ends() -> None:
    assert _rows("a" * 40, length=8).tokens[0].tolist() == [_CLS, *[3] * 6, _SEP]
    with pytest.raises(UserError, match=r"probe.length is 3, which leaves 1 tokens for text; accepted: 4 or more"):
        _rows("abc", length=3)


@pytest.mark.parametrize(
    ("spec", "first", "tokens", "types"),
    [
        # BERT: [CLS] A [SEP] B [SEP]
        (_PACKED, "ab", [_CLS, 3, 4, _SEP, 5, _SEP], [0, 0, 0, 0, 1, 1]),
        # XLNet: A SEP B SEP CLS, of which CLS has a type of its own
        (_XLNET, "ab", [3, 4, _SEP, 5, _SEP, _CLS], [0, 0, 0, 1, 1, 2]),
        # GPT: A eos B eos
        (RowSpec("packed", 16, suffix=(9,)), "a", [3, 9, 5, 9], [0, 0, 1, 1]),
    ],
)
def test_pairs_are_closed_as_in_training(spec: RowSpec, first: str, tokens: list[int], types: list[int]) -> None:
    rows = _rows((first, "c"), spec=spec)
    assert rows.tokens[0, : len(tokens)].tolist() == tokens
    assert rows.types[0].tolist() == types + [0] * (16 - len(types))
    assert rows.segments[0].sum() == len(tokens)


def test_of_a_long_pair_the_longer_text_is_cut() -> None:
    # Room for 13 letters beside [CLS] and two [SEP]: 2 of the short one and 11 of the long one, or half each.
    rows = _rows(("a" * 20, "bb"), ("aa", "b" * 20), ("a" * 20, "b" * 20))
    counts = [((row == 3).sum(), (row == 4).sum()) for row in rows.tokens]
    assert counts == [(11, 2), (2, 11), (6, 7)]


# --- features -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder() -> Any:
    config = EncoderConfig(layers=1, width=8, heads=2, max_length=32, dropout=0.0, attention_dropout=0.0)
    return config.build(Vocabulary(40, cls=_CLS, sep=_SEP), nnx.Rngs(0))


@pytest.mark.parametrize("features", ["mean", "first", "last"])
def test_features_are_those_of_each_text_alone(encoder: Any, features: Any) -> None:
    texts = ["abc", "abcdefgh", "z" * 11]
    found = _features(encoder, _rows(*texts), _reading(), features, batch_size=2)  # two batches, the second half empty
    for text, feature in zip(texts, found, strict=True):
        tokens = jnp.array([[_CLS, *_LETTERS.encode_batch([text])[0], _SEP]])
        hidden = encoder.hidden(tokens, mask=masks.bidirectional())[0]
        expected = {"mean": hidden.mean(0), "first": hidden[0], "last": hidden[-1]}[features]
        np.testing.assert_allclose(feature, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_of_an_encoder_decoder_the_encoder_is_probed(causal: bool) -> None:
    """It sees both sides whichever way the decoder looks, and there are no token types in it."""
    config = EncoderDecoderConfig(layers=1, width=8, heads=2, max_length=32)
    model = config.build(Vocabulary(40, cls=_CLS, sep=_SEP), nnx.Rngs(0))
    rows = _rows("abc", "abcdefgh")
    found = _features(model, rows, Reading(_LETTERS, _PAIRS, causal), "mean", batch_size=2)
    for tokens, segments, feature in zip(rows.tokens, rows.segments, found, strict=True):
        encoded = model.encode(jnp.asarray(tokens[None, : segments.sum()]), mask=masks.bidirectional())[0]
        np.testing.assert_allclose(feature, encoded.mean(0), rtol=1e-5, atol=1e-6)


def test_a_text_is_read_in_the_direction_of_training(encoder: Any) -> None:
    for causal in (False, True):
        first, second = _features(encoder, _rows("abc", "abd"), _reading(causal=causal), "first", batch_size=2)
        assert (np.abs(first - second).max() > 1e-6) == (not causal)


class _Witness(nnx.Module):
    """A model whose hidden states say how it was asked to read: the type of each token (-1: none given), and whether
    the mask is causal."""

    def hidden(self, tokens: Any, *, mask: Any, token_types: Any = None) -> Any:
        types = jnp.full(tokens.shape, -1) if token_types is None else token_types
        return jnp.stack([types, jnp.full(tokens.shape, mask.causal)], -1).astype(jnp.float32)


@pytest.mark.parametrize(
    ("objective", "last"),
    [
        (CausalLM(), [-1, 1]),
        (CausalLM(loss_on="completion"), [-1, 1]),  # its rows of two texts have types, which it does not read
        (TransformerXL(), [-1, 1]),  # on an XLNet, which could see both sides
        (Mixture(members={"a": Member(CausalLM())}), [-1, 1]),
        (Mixture(members={"a": Member(MaskedLM()), "b": Member(CausalLM())}), [-1, 0]),
        (MaskedLM(), [-1, 0]),
        (PermutationLM(), [2, 0]),
        (NextSentencePrediction(), [0, 0]),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_masks_and_types_are_those_of_the_objective(objective: Any, last: list[int]) -> None:
    rows = objective.rows(Vocabulary(40, cls=_CLS, sep=_SEP, mask=3, eos=4), 32)
    spec = rows if isinstance(rows, RowSpec) else next(iter(rows.values()))
    reading = _reading_of(objective, spec)
    texts = text_rows([("abc", None)], _LETTERS, spec, 16, key="probe.length")
    assert _features(_Witness(), texts, reading, "last", batch_size=1).tolist() == [last]


def test_texts_are_no_longer_than_what_the_model_reads() -> None:
    """32 tokens, made of rows of 34 with spans of them hidden; or rows of 20, which leave room."""
    vocab = Vocabulary(40, eos=4, sentinels=tuple(range(39, 29, -1)))
    assert SpanCorruption().rows(vocab, 32).length == 34
    assert _reading_of(SpanCorruption(), SpanCorruption().rows(vocab, 32)).rows.length == 32
    assert _reading_of(CausalLM(), RowSpec("packed", 20)).rows.length == 20


def _reading_of(objective: Any, spec: RowSpec) -> Reading:
    """Of a run with that objective and those rows, whose `data.length` is 32."""
    data, config = SimpleNamespace(tokenizer=_LETTERS), SimpleNamespace(data=SimpleNamespace(length=32))
    run: Any = SimpleNamespace(dataset=data, spec=spec, objective=objective, config=config)
    return Reading.of(run)


# --- scores -------------------------------------------------------------------------------------------------------


def test_the_classifier_reaches_what_is_known_to_be_reachable() -> None:
    # Two classes at -1 and +1 on an axis with noise of deviation 1 around: the best rule, its sign, is right with
    # probability Phi(1) = 0.8413. Forty other axes say nothing, and the scales are far apart.
    draw = np.random.default_rng(0)

    def sample(count: int) -> tuple[np.ndarray, list[str]]:
        labels = draw.integers(0, 2, count)
        features = draw.normal(size=(count, 41))
        features[:, 0] += 2 * labels - 1
        return features * 10.0 ** draw.integers(-3, 3), ["no" if y == 0 else "yes" for y in labels]

    (train, train_labels), (test, test_labels) = sample(4000), sample(20_000)
    scale = np.abs(train).mean() / np.abs(test).mean()
    scores = fit_and_score(train, train_labels, test * scale, test_labels)
    best = 0.5 * (1 + math.erf(1 / math.sqrt(2)))
    assert best - 0.015 < scores.accuracy < best + 0.01  # three deviations of a share of 20,000 are 0.008
    assert abs(scores.macro_f1 - scores.accuracy) < 0.01, "classes of equal size"
    assert scores.converged
    nothing = fit_and_score(train[:, 1:], train_labels, test[:, 1:], test_labels)
    assert abs(nothing.accuracy - 0.5) < 0.02
    assert not fit_and_score(train, train_labels, test, test_labels, iterations=1).converged


def test_the_majority_class_by_hand() -> None:
    rows = [Labelled("", None, label) for label in "aabc"]
    test = [Labelled("", None, label) for label in "abbca"]
    scores = majority(ProbeData(rows, test))
    # Always "a": right for 2 of 5; its F1 is 2 * 2 / (5 + 2) = 4/7, and those of b and c are 0.
    assert scores.accuracy == pytest.approx(2 / 5)
    assert scores.macro_f1 == pytest.approx(4 / 7 / 3)


def test_hidden_states_that_are_not_finite_are_refused() -> None:
    features = np.full((4, 2), np.nan)
    with pytest.raises(NotFinite, match="not all finite"):
        fit_and_score(features, list("abab"), features, list("abab"))


def test_a_probe_reads_a_class_off_a_model(encoder: Any) -> None:
    draw = np.random.default_rng(1)

    def some(count: int) -> list[Labelled]:
        words = ["".join(draw.choice(list("abcdefgh"), 8)) for _ in range(count)]
        return [Labelled("z" * (i % 2) + word, None, f"{i % 2}") for i, word in enumerate(words)]

    data = ProbeData(some(80), some(40))
    scores = probe_model(TsvProbe(train=("x",)), data, encoder, _reading())
    assert scores.accuracy > 0.9, "one class has a letter that the other never has"


# --- results ------------------------------------------------------------------------------------------------------


def _line(arm: str, seed: int, accuracy: float, **changes: Any) -> dict[str, Any]:
    scores = {"accuracy": accuracy, "macro_f1": accuracy / 2}
    return {
        "arm": arm, "seed": seed, "steps": 1200, "tokens": 1.2e6, "flops": 2.5e12, "flops_formula": 3.14159e12,
        "diverged": False, "seconds": 10.0 + seed, "metrics": {"eval/bits_per_byte": 2.0 + seed},
        "run": f"arms/{arm}/seed_{seed}",
        "probe": {**scores, "untrained": {"accuracy": 0.5}, "majority": {"accuracy": 0.25, "macro_f1": 0.1}},
        **changes,
    }  # fmt: skip


def _diverged(arm: str, seed: int) -> dict[str, Any]:
    return _line(arm, seed, 0.0, diverged=True, seconds=None, metrics=None, probe=None)


@pytest.fixture
def results(tmp_path: pathlib.Path) -> Results:
    results = Results(tmp_path / "results.jsonl", (0, 1, 2))
    for seed, accuracy in enumerate((0.6, 0.7, 0.8)):
        results.add(_line("one", seed, accuracy))
    results.add(_line("two", 0, 0.5))
    results.add(_line("two", 7, 0.9))  # a seed that is not asked for
    return results


def test_the_table_has_means_and_deviations_over_seeds(results: Results) -> None:
    header, rows = table(results, ["one", "two", "three"], ["eval/bits_per_byte"], Budget(tokens=1))
    assert len(rows) == 3, "an arm without results has no row yet"
    one, two, guess = (dict(zip(header, row, strict=True)) for row in rows)
    # Mean of 60, 70, 80: 70; deviation sqrt((100 + 0 + 100) / 2) = 10. Of 2, 3, 4: 3 and 1.
    assert one["probe accuracy %"] == "70.0 ± 10.0"
    assert one["probe macro F1 %"] == "35.0 ± 5.0"
    assert one["eval/bits_per_byte"] == "3.0000 ± 1.0000"
    assert (one["n"], one["steps"], one["tokens"], one["seconds"]) == ("3", "1,200", "1.2 M", "11")
    assert (one["FLOPs counted"], one["FLOPs 6ND"]) == ("2.5 T", "3.14 T")
    assert (two["n"], two["probe accuracy %"]) == ("1", "50.0"), "no deviation of one value"
    assert guess["arm"] == "majority class"
    assert guess["probe accuracy %"] == "25.0"
    lines = markdown_table(header, rows).splitlines()
    assert {line.count("|") for line in lines} == {len(header) + 1}
    assert lines[1].startswith("| --- | ---: |")


def test_seeds_that_failed_are_told_beside_the_mean(tmp_path: pathlib.Path) -> None:
    results = Results(tmp_path / "results.jsonl", (0, 1, 2))
    for line in (_line("one", 0, 0.6), _diverged("one", 1), _line("one", 2, 0.8, metrics={})):
        results.add(line)
    results.add(_diverged("two", 0))
    header, rows = table(results, ["one", "two"], ["eval/bits_per_byte"], Budget(tokens=1))
    one, two, guess = (dict(zip(header, row, strict=True)) for row in rows)
    # Of 60 and 80: mean 70, deviation sqrt(100 + 100). Bits per byte are there with seed 0 alone: 2.
    assert (one["n"], two["n"]) == ("3 (1 diverged)", "1 (1 diverged)")
    assert one["probe accuracy %"] == "70.0 ± 14.1 (2 of 3)"
    assert one["untrained %"] == "50.0 ± 0.0 (2 of 3)"
    assert one["eval/bits_per_byte"] == "2.0000 (1 of 3)"
    assert (one["seconds"], two["seconds"]) == ("11", "")
    assert (two["probe accuracy %"], two["steps"]) == ("(0 of 1)", "1,200")
    assert guess["arm"] == "majority class"


def test_the_spread_leaves_out_what_is_no_number() -> None:
    found = spread([1.0, None, 4.0])
    assert found is not None
    assert (found.mean, found.n) == (2.5, 2)
    assert found.deviation == pytest.approx(statistics.stdev([1.0, 4.0])) == pytest.approx(math.sqrt(4.5))
    assert spread([None]) is None


def test_lines_are_kept_whole_and_without_nan(results: Results, tmp_path: pathlib.Path) -> None:
    results.add(_line("three", 1, 0.5, metrics={"eval/loss": math.nan}))
    text = (tmp_path / "results.jsonl").read_text()
    assert [json.loads(line)["arm"] for line in text.splitlines()] == ["one"] * 3 + ["two"] * 2 + ["three"]
    assert "NaN" not in text
    again = Results(tmp_path / "results.jsonl", (0, 1))
    assert [line["seed"] for line in again.of("one")] == [0, 1]
    found = again.find("three", 1)
    assert found is not None
    assert found["metrics"] == {"eval/loss": None}
    (tmp_path / "results.jsonl").write_text(text + '{"arm": "o')
    with pytest.raises(UserError, match=r"results.jsonl:7 is damaged"):
        Results(tmp_path / "results.jsonl", (0,))


def test_a_picture_is_drawn_with_error_bars_and_curves(results: Results, tmp_path: pathlib.Path) -> None:
    for line in results.lines:  # bits per byte on the way: at half of the steps and at the end
        folder = tmp_path / line["run"]
        folder.mkdir(parents=True)
        entries = [{"step": step, "eval/bits_per_byte": 5.0 - step / 600 + line["seed"]} for step in (600, 1200)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    paths = [tmp_path / "a.svg", tmp_path / "a.png", tmp_path / "b.svg"]
    draw_results(results, tmp_path, ["one", "two"], ["eval/bits_per_byte"], Budget(flops=2.5e12), paths)
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    assert ET.fromstring(paths[0].read_text()).tag.endswith("svg")
    assert paths[0].read_bytes() == paths[2].read_bytes(), "equal results, equal files"


def test_a_picture_tells_of_seeds_that_failed(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []

    def read(self: Figure, *_: Any, **__: Any) -> None:
        for axes in self.axes:
            legend = axes.get_legend()
            texts.extend(label.get_text() for label in axes.get_xticklabels())
            texts.extend(text.get_text() for text in (legend.get_texts() if legend else ()))

    monkeypatch.setattr(Figure, "savefig", read)
    results = Results(tmp_path / "results.jsonl", (0, 1))
    results.add(_diverged("one", 0))
    draw_results(results, tmp_path, ["one"], [], Budget(flops=1.0), [tmp_path / "a.png"])
    assert texts == ["one\n1,200 steps\n0 of 1"], "a panel for the probe, though nothing was probed"
    texts.clear()
    results.add(_line("one", 1, 0.5))
    for line, values in zip(results.lines, ((9.0, 9.0), (2.0, 1.0)), strict=True):
        folder = tmp_path / line["run"]
        folder.mkdir(parents=True)
        entries = [{"step": step, "eval/bits_per_byte": value} for step, value in zip((600, 1200), values, strict=True)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    drawn = _record_error_bars(monkeypatch)
    draw_results(results, tmp_path, ["one"], ["eval/bits_per_byte"], Budget(flops=1.0), [tmp_path / "a.png"])
    assert "one\n1,200 steps\n1 of 2" in texts
    assert "one (1 of 2)" in texts
    assert drawn[1] == ([2.0, 1.0], [0.0, 0.0]), "the curve is that of the seed which came to its end"


def test_error_bars_are_deviations(results: Results, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = _record_error_bars(monkeypatch)
    draw_results(results, tmp_path, ["one", "two"], [], Budget(flops=2.5e12), [tmp_path / "a.png"])
    np.testing.assert_allclose(drawn, [(0.7, 0.1), (0.5, 0.0)], rtol=1e-12)


def _record_error_bars(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """(values, deviations) of each call that draws some."""
    drawn: list[tuple[Any, Any]] = []
    errorbar = Axes.errorbar

    def record(self: Any, x: Any, y: Any, yerr: Any = None, **kwargs: Any) -> Any:
        drawn.append((y, yerr))
        return errorbar(self, x, y, yerr=yerr, **kwargs)

    monkeypatch.setattr(Axes, "errorbar", record)
    return drawn
