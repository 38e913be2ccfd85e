"""BART against Transformers' PyTorch model: hidden states, logits, loss, gradients and files, both ways."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from flax import nnx  # noqa: E402
from hf_peers import gradient_gaps, within  # noqa: E402

from lmobj import losses, masks  # noqa: E402
from lmobj.batch import Vocabulary  # noqa: E402
from lmobj.errors import UserError  # noqa: E402
from lmobj.interop import bart  # noqa: E402

pytestmark = pytest.mark.parity

SIZE = 53
KINDS = {"gelu": {}, "relu": {"activation_function": "relu", "scale_embedding": True}}
READ = (23, 9, 1)
"""Tokens in each row of the encoder; the rest is padding."""


def _theirs(kind: str) -> Any:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=SIZE, d_model=24, encoder_layers=3, decoder_layers=2, encoder_attention_heads=3,
        decoder_attention_heads=3, encoder_ffn_dim=40, decoder_ffn_dim=40, max_position_embeddings=23, dropout=0.0,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, attn_implementation="eager",
        **KINDS[kind],
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_((1.0 if "norm" in name else 0.0) + 0.3 * torch.randn_like(p))
        model.final_logits_bias.copy_(torch.randn(1, SIZE))
    return model


def _arrays(model: Any) -> dict[str, np.ndarray]:
    return {name: x.detach().numpy() for name, x in model.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_loss_and_gradients(kind: str) -> None:
    with jax.enable_x64(True):
        _compare(kind)


def _compare(kind: str) -> None:
    """In float64: in float32 the gradients of keys are differences of large numbers, in PyTorch as here."""
    theirs = _theirs(kind).double()
    config = dataclasses.replace(bart.config_from_hf(theirs.config.to_dict()), dtype="float64", param_dtype="float64")
    params = bart.to_lmobj(_arrays(theirs), config)
    graphdef = nnx.split(nnx.eval_shape(lambda: config.build(Vocabulary(SIZE), nnx.Rngs(0))))[0]
    generator = np.random.default_rng(0)
    # The padding's embedding is not trained by PyTorch, so no token is the padding's.
    read, written, targets = (generator.integers(1, SIZE, (3, length)) for length in (23, 17, 17))
    valid = (np.arange(23) < np.array(READ)[:, None]).astype(np.int32)

    def run(params: Any) -> Any:
        model = nnx.merge(graphdef, params)
        encoded = model.encode(jnp.asarray(read), mask=masks.bidirectional().packed(jnp.asarray(valid)))
        across = masks.bidirectional().packed(jnp.ones((3, 17), jnp.int32), jnp.asarray(valid))
        hidden = model.decode(jnp.asarray(written), encoded, mask=masks.causal(), cross_mask=across)
        head = model.head_table()
        stats = losses.linear_logit_stats(
            model.head_hidden(hidden), head.table, jnp.asarray(targets), bias=head.bias, vocab_size=head.vocab_size
        )
        return jnp.mean(losses.nll(stats)), (encoded, hidden)

    (loss, (encoded, hidden)), gradients = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    output = theirs(
        input_ids=torch.tensor(read), attention_mask=torch.tensor(valid), decoder_input_ids=torch.tensor(written),
        labels=torch.tensor(targets), output_hidden_states=True,
    )  # fmt: skip
    real = valid > 0
    gap = np.abs(np.asarray(encoded) - output.encoder_last_hidden_state.detach().numpy())[real].max()
    within(f"{kind} encoder", gap, 1e-10)
    within(
        f"{kind} decoder", np.abs(np.asarray(hidden) - output.decoder_hidden_states[-1].detach().numpy()).max(), 1e-4
    )
    within(f"{kind} loss", abs(float(loss) - output.loss.item()), 1e-10)
    output.loss.backward()
    expected = bart.to_lmobj({name: p.grad.numpy() for name, p in theirs.named_parameters()}, config)
    gradients.pop("output_bias"), expected.pop("output_bias")  # not trained by PyTorch
    worst = max(gradient_gaps(gradients, expected).items(), key=lambda item: item[1])
    within(f"{kind} gradient of {worst[0]}", worst[1], 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_folders_there_and_back(kind: str, tmp_path: pathlib.Path) -> None:
    theirs = _theirs(kind)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = bart.load(tmp_path / "theirs")
    bart.save(tmp_path / "ours", ours.params, ours.config, ours.vocab)
    again = transformers.BartForConditionalGeneration.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    ).eval()
    tokens = torch.tensor(np.random.default_rng(1).integers(1, SIZE, (2, 6)))
    with torch.no_grad():
        expected, found = (model(input_ids=tokens, decoder_input_ids=tokens).logits for model in (theirs, again))
    np.testing.assert_array_equal(found.numpy(), expected.numpy())


def test_other_models_are_refused() -> None:
    config = bart.config_from_hf({"d_model": 16})
    with pytest.raises(UserError, match="is 'relative', which"):
        bart.config_to_hf(dataclasses.replace(config, positions="relative"), Vocabulary(SIZE))
    with pytest.raises(UserError, match="decoder_ffn_dim: 32, and 64 in the encoder"):
        bart.config_from_hf({"encoder_ffn_dim": 64, "decoder_ffn_dim": 32})
