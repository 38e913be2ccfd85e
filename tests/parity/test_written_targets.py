"""Targets that T5 and BART write, against Transformers' `generate`: greedy, and four beams.

Its beams are scored by ln p / length^a where ours have Wu's ln p / ((5 + length) / 6)^a, so ours get its divisor here.
`early_stopping="never"` is the search that stops when nothing can improve. What is left is that it lets a sequence end
only among the `num_beams` best extensions, and ours among twice as many, which finds short ones that it passes over.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from flax import nnx  # noqa: E402
from hf_peers import randomise, within  # noqa: E402
from seq2seq_peers import SIZE  # noqa: E402

from lmobj.batch import Vocabulary  # noqa: E402
from lmobj.evaluate import BeamConfig, SamplingConfig, _beam_search, _written, write_targets  # noqa: E402
from lmobj.interop import bart, t5  # noqa: E402

pytestmark = pytest.mark.parity

LENGTHS, LIMIT = (16, 9, 1, 13, 5, 11), 10
PAD, START = 0, {"t5": 0, "bart": 2}
EOS = {"t5": 39, "bart": 38}
"""Words that these models write now and then."""

_LARGER = ("embed_positions.weight", "fc2.weight", "wo.weight", ".o.weight", "self_attn.out_proj.weight")


@functools.cache
def _pair(kind: str) -> tuple[Any, Any]:
    """Their model, and ours with the same weights."""
    torch.manual_seed(0)
    shared = {"vocab_size": SIZE, "d_model": 24, "pad_token_id": PAD, "eos_token_id": EOS[kind]}
    shared |= {"decoder_start_token_id": START[kind]}
    if kind == "t5":
        settings = transformers.T5Config(
            d_kv=5, d_ff=40, num_layers=3, num_decoder_layers=2, num_heads=3, dropout_rate=0.0,
            relative_attention_num_buckets=8, relative_attention_max_distance=12, tie_word_embeddings=True, **shared,
        )  # fmt: skip
        theirs: Any = transformers.T5ForConditionalGeneration(settings).eval()
        interop: Any = t5
    else:
        settings = transformers.BartConfig(
            encoder_layers=3, decoder_layers=2, encoder_attention_heads=3, decoder_attention_heads=3, bos_token_id=1,
            encoder_ffn_dim=40, decoder_ffn_dim=40, max_position_embeddings=23, dropout=0.0, forced_eos_token_id=None,
            **shared,
        )  # fmt: skip
        theirs, interop = transformers.BartForConditionalGeneration(settings).eval(), bart
    randomise(theirs, seed=0)
    with torch.no_grad():  # what is written depends on what was read and written before
        theirs.get_input_embeddings().weight.mul_(6)
        for name, weight in theirs.named_parameters():
            if "decoder" in name and name.endswith(
                ("fc2.weight", "wo.weight", "o.weight", "self_attn.out_proj.weight")
            ):
                weight.mul_(6)
            if "embed_positions" in name:
                weight.mul_(6)
    config = interop.config_from_hf(theirs.config.to_dict())
    params = interop.to_lmobj({name: x.detach().numpy() for name, x in theirs.state_dict().items()}, config)
    graph = nnx.split(nnx.eval_shape(lambda: config.build(Vocabulary(SIZE), nnx.Rngs(0))))[0]
    return theirs, nnx.merge(graph, params)


def _sources() -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(3, SIZE, length) for length in LENGTHS]


def _theirs(kind: str, **settings: Any) -> tuple[list[list[int]], np.ndarray]:
    """Their targets, and the beams' scores."""
    model = _pair(kind)[0]
    padded = np.zeros((len(LENGTHS), max(LENGTHS)), int)
    for row, source in enumerate(_sources()):
        padded[row, : len(source)] = source
    mask = (np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]).astype(int)
    with torch.no_grad():
        found = model.generate(
            torch.tensor(padded), attention_mask=torch.tensor(mask), max_new_tokens=LIMIT, do_sample=False,
            return_dict_in_generate=True, output_scores=True, **settings,
        )  # fmt: skip
    eos = EOS[kind]
    texts = [row[: row.index(eos) + 1] if eos in row else row for row in found.sequences[:, 1:].tolist()]
    return texts, np.asarray(found.sequences_scores) if "num_beams" in settings else np.zeros(0)


def _ours(kind: str, settings: Any) -> tuple[list[list[int]], np.ndarray]:
    model = _pair(kind)[1]
    found = write_targets(model, _sources(), settings, start=START[kind], eos=EOS[kind], length=16)
    texts = [tokens[0, : n[0]].tolist() for tokens, n in zip(found.tokens, found.lengths, strict=True)]
    return texts, found.scores[:, 0]


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_greedy(kind: str) -> None:
    expected, _ = _theirs(kind)
    assert _ours(kind, SamplingConfig(temperature=0.0, max_new_tokens=LIMIT))[0] == expected
    assert len({*map(tuple, expected)}) > 3
    assert len({*map(len, expected)}) > 1


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_four_beams(kind: str, penalty: float, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, scores = _theirs(kind, num_beams=4, length_penalty=penalty, early_stopping="never")
    monkeypatch.setattr(_beam_search, "_divisor", lambda length, settings: length**settings.length_penalty)
    _written._write.clear_cache()
    found, own = _ours(kind, BeamConfig(max_new_tokens=LIMIT, num_beams=4, length_penalty=penalty))
    _written._write.clear_cache()
    same = np.array([one == other for one, other in zip(found, expected, strict=True)])
    assert same.all() if penalty else same.sum() >= len(same) - 1
    within(f"{kind} scores of beams, penalty {penalty:g}", np.abs(own - scores)[same].max(), 1e-4)
    assert np.all(own[~same] > scores[~same])
