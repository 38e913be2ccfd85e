"""BART against Transformers' PyTorch model: hidden states, logits, loss, gradients and files, both ways."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from hf_peers import randomise  # noqa: E402
from seq2seq_peers import SIZE, Limits, compare, there_and_back  # noqa: E402

from lmobj.batch import Vocabulary  # noqa: E402
from lmobj.errors import UserError  # noqa: E402
from lmobj.interop import bart  # noqa: E402

pytestmark = pytest.mark.parity

KINDS = {"gelu": {}, "relu": {"activation_function": "relu", "scale_embedding": True}}


def _theirs(kind: str) -> Any:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=SIZE, d_model=24, encoder_layers=3, decoder_layers=2, encoder_attention_heads=3,
        decoder_attention_heads=3, encoder_ffn_dim=40, decoder_ffn_dim=40, max_position_embeddings=23, dropout=0.0,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, attn_implementation="eager",
        **KINDS[kind],
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config).eval()
    randomise(model, seed=0)
    with torch.no_grad():
        model.final_logits_bias.copy_(torch.randn(1, SIZE))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_loss_and_gradients(kind: str) -> None:
    """In float64: in float32 the gradients of keys are differences of large numbers, in PyTorch as here."""
    with jax.enable_x64(True):
        theirs = _theirs(kind).double()
        config = bart.config_from_hf(theirs.config.to_dict())
        config = dataclasses.replace(config, dtype="float64", param_dtype="float64")
        # The output's bias is not trained by PyTorch.
        compare(kind, theirs, bart, config, Limits(1e-10, 1e-10, 1e-10), untrained=("output_bias",))


@pytest.mark.parametrize("kind", KINDS)
def test_folders_there_and_back(kind: str, tmp_path: pathlib.Path) -> None:
    there_and_back(_theirs(kind), bart, tmp_path, attn_implementation="eager")


def test_other_models_are_refused() -> None:
    config = bart.config_from_hf({"d_model": 16})
    with pytest.raises(UserError, match="is 'relative', which"):
        bart.config_to_hf(dataclasses.replace(config, positions="relative"), Vocabulary(SIZE))
    with pytest.raises(UserError, match="decoder_ffn_dim: 32, and 64 in the encoder"):
        bart.config_from_hf({"encoder_ffn_dim": 64, "decoder_ffn_dim": 32})
