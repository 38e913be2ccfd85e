"""T5 and T5 1.1 against Transformers' PyTorch model: hidden states, logits, loss, gradients and files, both ways."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from hf_peers import randomise  # noqa: E402
from seq2seq_peers import SIZE, Limits, compare, there_and_back  # noqa: E402

from lmobj.batch import Vocabulary  # noqa: E402
from lmobj.errors import UserError  # noqa: E402
from lmobj.interop import t5  # noqa: E402

pytestmark = pytest.mark.parity

KINDS = {
    "t5": {"feed_forward_proj": "relu", "tie_word_embeddings": True},
    "t5_1_1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}


def _theirs(kind: str) -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=SIZE, d_model=24, d_kv=5, d_ff=40, num_layers=3, num_decoder_layers=2, num_heads=3, dropout_rate=0.0,
        relative_attention_num_buckets=8, relative_attention_max_distance=12, pad_token_id=0, decoder_start_token_id=0,
        **KINDS[kind],
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    if not KINDS[kind]["tie_word_embeddings"]:  # Transformers 5 ties the tables of new models all the same
        model.lm_head.weight = torch.nn.Parameter(torch.empty(SIZE, 24))
    randomise(model, seed=0)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_loss_and_gradients(kind: str) -> None:
    theirs = _theirs(kind)
    config = t5.config_from_hf(theirs.config.to_dict() | KINDS[kind])
    compare(kind, theirs, t5, config, Limits(states=1e-4, loss=1e-5, gradients=1e-4))


@pytest.mark.parametrize("kind", KINDS)
def test_folders_there_and_back(kind: str, tmp_path: pathlib.Path) -> None:
    there_and_back(_theirs(kind), t5, tmp_path)


def test_other_models_are_refused() -> None:
    config = t5.config_from_hf({"d_model": 16, "num_heads": 2})
    with pytest.raises(UserError, match="is 'learned', which"):
        t5.config_to_hf(dataclasses.replace(config, positions="learned"), Vocabulary(SIZE))
