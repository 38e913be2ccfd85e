"""RoBERTa's tensors to the encoder's parameters and back."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
import safetensors.numpy
from hf_tensors import BERT_SETTINGS, BERT_SHAPES, LENGTH, VOCAB, WIDTH, random_tensors

from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.interop import bert, roberta

PAD = 3
SETTINGS = BERT_SETTINGS | {"model_type": "roberta", "pad_token_id": PAD, "max_position_embeddings": LENGTH + PAD + 1}
RENAMED = {
    "bert.": "roberta.",
    "cls.predictions.transform.LayerNorm": "lm_head.layer_norm",
    "cls.predictions.transform.dense": "lm_head.dense",
    "cls.predictions.bias": "lm_head.bias",
}
PLACES = "roberta.embeddings.position_embeddings.weight"


def tensors() -> dict[str, np.ndarray]:
    """BERT's under RoBERTa's names, with 4 more positions, of which training leaves zeros."""
    result = {}
    for name, tensor in random_tensors(BERT_SHAPES).items():
        for old, new in RENAMED.items():
            name = new + name.removeprefix(old) if name.startswith(old) else name
        result[name] = tensor
    result[PLACES] = np.concatenate([np.zeros((PAD + 1, WIDTH), np.float32), result[PLACES]])
    return result


def test_config() -> None:
    assert roberta.config_from_hf(SETTINGS) == bert.config_from_hf(BERT_SETTINGS)
    # The released base model says 514, of which 2 are not positions.
    assert roberta.config_from_hf({"max_position_embeddings": 514}).max_length == 512
    described = roberta.config_to_hf(roberta.config_from_hf(SETTINGS), Vocabulary(VOCAB, pad=PAD))
    assert described["max_position_embeddings"] == LENGTH + 4
    assert roberta.config_from_hf(described) == roberta.config_from_hf(SETTINGS)
    with pytest.raises(UserError, match="max_position_embeddings is 4, and the first 4 are not for tokens"):
        roberta.config_from_hf(SETTINGS | {"max_position_embeddings": 4})


def test_round_trip(tmp_path: pathlib.Path) -> None:
    theirs = tensors()
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
    copies = {"lm_head.decoder.bias": theirs["lm_head.bias"].copy()}  # older files keep the tied head too
    safetensors.numpy.save_file(theirs | copies, tmp_path / "model.safetensors")
    config, vocab, params, pair_head = roberta.load(tmp_path)
    assert (vocab.pad, pair_head) == (PAD, None)
    as_bert = bert.to_lmobj(random_tensors(BERT_SHAPES), config)
    np.testing.assert_array_equal(
        params["embeddings"]["positions"]["table"], as_bert["embeddings"]["positions"]["table"]
    )
    np.testing.assert_array_equal(params["head"]["norm"]["scale"], as_bert["head"]["norm"]["scale"])
    roberta.save(tmp_path / "new", params, config, vocab)
    written = safetensors.numpy.load_file(tmp_path / "new" / "model.safetensors")
    assert written.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(written[name], tensor)
