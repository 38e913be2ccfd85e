"""Vectors of sentences of a run, whatever it trained, and how pairs are read."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import types
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lmobj import masks
from lmobj.cli._evaluating import check_options
from lmobj.data import SentencePieceConfig, Tokenizer
from lmobj.data._tokenizer import train_tokenizer
from lmobj.errors import UserError
from lmobj.models import EncoderConfig, EncoderDecoderConfig
from lmobj.objectives import CausalLM, InBatchContrastive, MaskedLM, Member, Mixture, Objective, SimCSE
from lmobj.train.run_folder import RunFolder
from lmobj.train.similarity import evaluate_similarity, text_vectors

TEXTS = ["the quick fox", "the quiet river sees the brown fox", "fox", "a"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(SentencePieceConfig(vocab_size=330), ["the quick brown fox sees the quiet river\n" * 4])


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Any:
    config = EncoderConfig(layers=1, width=8, heads=2, max_length=32, vocab_multiple=1, init_std=0.3)
    return config.build(tokenizer.vocabulary, nnx.Rngs(params=0))


def run_of(tokenizer: Tokenizer, model: Any, objective: Objective) -> Any:
    """A run of this objective."""
    models = {"model": model}
    if "heads" in objective.roles:
        models["heads"] = objective.build_heads(model.head_style, tokenizer.vocabulary, nnx.Rngs(params=1))
    split = {role: nnx.split(one) for role, one in models.items()}
    params = {role: nnx.to_pure_dict(state) for role, (_, state) in split.items()}
    assembly = types.SimpleNamespace(
        objective=objective,
        vocab=tokenizer.vocabulary,
        program=types.SimpleNamespace(graphs={role: graph for role, (graph, _) in split.items()}),
        config=types.SimpleNamespace(data=types.SimpleNamespace(length=32)),
        gathered=lambda state: params,
    )
    return types.SimpleNamespace(assembly=assembly, tokenizer=tokenizer, state=types.SimpleNamespace(step=7))


def states(tokenizer: Tokenizer, model: Any, text: str) -> np.ndarray:
    """[L, D] of [CLS] text [SEP] alone."""
    vocab = tokenizer.vocabulary
    tokens = jnp.asarray([[vocab.cls, *tokenizer.encode(text), vocab.sep]])
    mask = masks.bidirectional().packed(jnp.ones_like(tokens))
    return np.asarray(model.hidden(tokens, mask=mask, positions=jnp.arange(tokens.shape[1])[None])[0])


def unit(x: Any) -> Any:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_vectors_are_those_that_a_run_trained(tokenizer: Tokenizer, model: Any) -> None:
    """By default the mean; of SimCSE the first token, with the head where it is used; of a mixture its member's."""
    alone = [states(tokenizer, model, text) for text in TEXTS]
    first, mean = unit([x[0] for x in alone]), unit([x.mean(0) for x in alone])
    last = unit([x[-1] for x in alone])
    headed = SimCSE(head="always")
    run = run_of(tokenizer, model, headed)
    dense = run.assembly.gathered(None)["heads"]["dense"]
    (kernel,) = [leaf for leaf in dense.values() if np.ndim(leaf) == 2]
    expected_head = unit(np.tanh(np.stack([x[0] for x in alone]) @ np.asarray(kernel)))
    cases: list[tuple[Objective, Any, Any]] = [
        (MaskedLM(), None, mean),
        (MaskedLM(), "first", first),
        (SimCSE(), None, first),
        (SimCSE(), "last", last),
        (InBatchContrastive(pooling="last"), None, last),
        (Mixture(members={"a": Member(SimCSE()), "b": Member(MaskedLM())}), None, first),
        (headed, None, expected_head),
    ]
    for objective, pooling, expected in cases:
        found = text_vectors(run_of(tokenizer, model, objective), TEXTS, pooling=pooling, quiet=True)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    mixed = Mixture(members={"a": Member(headed), "b": Member(MaskedLM())})
    run = run_of(tokenizer, model, mixed)
    (kernel,) = [x for x in run.assembly.gathered(None)["heads"]["members"]["a"]["dense"].values() if np.ndim(x) == 2]
    expected = unit(np.tanh(np.stack([x[0] for x in alone]) @ np.asarray(kernel)))
    np.testing.assert_allclose(text_vectors(run, TEXTS, quiet=True), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", [MaskedLM(), CausalLM()], ids=lambda objective: objective.name)
def test_of_an_encoder_decoder_the_encoder_reads(tokenizer: Tokenizer, objective: Objective) -> None:
    """Whichever way the decoder looks: it has no part in this, and the encoder's tokens see both sides."""
    config = EncoderDecoderConfig(layers=1, width=8, heads=2, max_length=32, vocab_multiple=1)
    model = config.build(tokenizer.vocabulary, nnx.Rngs(params=0))
    vocab, expected = tokenizer.vocabulary, []
    for text in TEXTS:
        ends = [[], []] if objective.causal else [[vocab.cls], [vocab.sep]]
        tokens = jnp.asarray([[*ends[0], *tokenizer.encode(text), *ends[1]]])
        expected.append(np.asarray(model.encode(tokens, mask=masks.bidirectional())[0]).mean(0))
    found = text_vectors(run_of(tokenizer, model, objective), TEXTS, quiet=True)
    np.testing.assert_allclose(found, unit(np.stack(expected)), rtol=1e-4, atol=1e-5)


def test_pairs_are_read_and_scored(tokenizer: Tokenizer, model: Any, tmp_path: pathlib.Path) -> None:
    (tmp_path / "sts.tsv").write_text(
        'sentence1\tother\tsentence2\tscore\nthe fox\tx\tthe fox\t5\nthe "fox\tx\ta river\t1.5\nfox\tx\tthe\t0\n'
    )
    run = run_of(tokenizer, model, SimCSE())
    result = evaluate_similarity(run, str(tmp_path / "sts.tsv"), quiet=True)
    vectors = text_vectors(run, ["the fox", 'the "fox', "a river", "fox", "the"], quiet=True).astype(float)
    cosines = [1.0, vectors[1] @ vectors[2], vectors[3] @ vectors[4]]
    assert result.figures["pearson"] == pytest.approx(np.corrcoef(cosines, [5, 1.5, 0])[0, 1], abs=1e-5)
    # Shared words 1, 0 and 0, ranks 3, 1.5 and 1.5 against 3, 2 and 1.
    assert result.figures["words"]["spearman"] == pytest.approx(np.corrcoef([3, 1.5, 1.5], [3, 2, 1])[0, 1])
    assert (result.figures["pairs"], result.figures["step"], result.figures["pooling"]) == (3, 7, "first")
    folder = RunFolder(str(tmp_path / "run"))
    assert json.loads(result.write(folder).read_text()) == result.figures
    assert (tmp_path / "run" / "eval" / "similarity" / "sts.json").exists()
    (tmp_path / "sts.jsonl").write_text(
        "\n".join(json.dumps({"a": a, "b": b, "y": y}) for a, b, y in [("the fox", "the fox", 5), ("fox", "the", 5)])
    )
    result = evaluate_similarity(run, str(tmp_path / "sts.jsonl"), columns=("a", "b", "y"), quiet=True)
    assert result.figures["alignment"] is None


def test_what_cannot_be_read_is_refused(tokenizer: Tokenizer, model: Any, tmp_path: pathlib.Path) -> None:
    run = run_of(tokenizer, model, SimCSE())
    file = tmp_path / "sts.tsv"
    file.write_text("a\tb\ty\nthe fox\tfox\tmuch\n")
    with pytest.raises(UserError, match=r"--columns has 'sentence1', but .*sts.tsv has no such column; accepted: a, b"):
        evaluate_similarity(run, str(file), quiet=True)
    with pytest.raises(UserError, match=r"--columns is 'a,b'; accepted: three names"):
        evaluate_similarity(run, str(file), columns=("a", "b"), quiet=True)
    with pytest.raises(UserError, match="instead of a number"):
        evaluate_similarity(run, str(file), columns=("a", "b", "y"), quiet=True)
    file.write_text("a\tb\ty\nthe fox\tfox\t1\n")
    with pytest.raises(UserError, match=r"holds 1 pairs; accepted: two or more"):
        evaluate_similarity(run, str(file), columns=("a", "b", "y"), quiet=True)
    with pytest.raises(UserError, match=r"--similarity: no file matches .*none.tsv"):
        evaluate_similarity(run, str(tmp_path / "none.tsv"), quiet=True)
    with pytest.raises(UserError, match=r"--pooling is 'all'; accepted: first, mean, last"):
        text_vectors(run, ["a"], pooling="all", quiet=True)  # type: ignore[arg-type]
    causal = dataclasses.replace(run.assembly.objective, attention="causal", pooling="mean")
    for objective in (CausalLM(), causal):
        with pytest.raises(UserError, match=r"--pooling is first, and the model of this run sees earlier tokens alone"):
            text_vectors(run_of(tokenizer, model, objective), ["a"], pooling="first", quiet=True)


def test_options_that_do_not_go_together() -> None:
    file = pathlib.Path("sts.tsv")
    with pytest.raises(UserError, match=r"--similarity is 'sts\.tsv', and --task is given too"):
        check_options(file, False, "validation", file)
    with pytest.raises(UserError, match="--split is test, and --similarity does not evaluate a split"):
        check_options(None, False, "test", file)
    with pytest.raises(UserError, match="without --similarity"):
        check_options(None, False, "validation", None, "a,b,c")
    check_options(None, False, "validation", file, "a,b,c")
