"""T5 and T5 1.1 against Transformers' PyTorch model: hidden states, logits, loss, gradients and files, both ways."""

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
from lmobj.interop import t5  # noqa: E402

pytestmark = pytest.mark.parity

SIZE = 53
KINDS = {
    "t5": {"feed_forward_proj": "relu", "tie_word_embeddings": True},
    "t5_1_1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}
READ = (23, 9, 1)
"""Tokens in each row of the encoder; the rest is padding."""


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
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_((1.0 if "norm" in name else 0.0) + 0.3 * torch.randn_like(p))
    return model


def _arrays(model: Any) -> dict[str, np.ndarray]:
    return {name: x.detach().numpy() for name, x in model.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_loss_and_gradients(kind: str) -> None:
    theirs = _theirs(kind)
    config = t5.config_from_hf(theirs.config.to_dict() | KINDS[kind])
    params = t5.to_lmobj(_arrays(theirs), config)
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
            model.head_hidden(hidden), head.table, jnp.asarray(targets), vocab_size=head.vocab_size
        )
        return jnp.mean(losses.nll(stats)), (encoded, hidden)

    (loss, (encoded, hidden)), gradients = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    output = theirs(
        input_ids=torch.tensor(read), attention_mask=torch.tensor(valid), decoder_input_ids=torch.tensor(written),
        labels=torch.tensor(targets), output_hidden_states=True,
    )  # fmt: skip
    real = valid > 0
    gap = np.abs(np.asarray(encoded) - output.encoder_last_hidden_state.detach().numpy())[real].max()
    within(f"{kind} encoder", gap, 1e-4)
    within(
        f"{kind} decoder", np.abs(np.asarray(hidden) - output.decoder_hidden_states[-1].detach().numpy()).max(), 1e-4
    )
    within(f"{kind} loss", abs(float(loss) - output.loss.item()), 1e-5)
    output.loss.backward()
    expected = t5.to_lmobj({name: p.grad.numpy() for name, p in theirs.named_parameters()}, config)
    worst = max(gradient_gaps(gradients, expected).items(), key=lambda item: item[1])
    within(f"{kind} gradient of {worst[0]}", worst[1], 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_folders_there_and_back(kind: str, tmp_path: pathlib.Path) -> None:
    theirs = _theirs(kind)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = t5.load(tmp_path / "theirs")
    t5.save(tmp_path / "ours", ours.params, ours.config, ours.vocab)
    again = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    tokens = torch.tensor(np.random.default_rng(1).integers(1, SIZE, (2, 6)))
    with torch.no_grad():
        expected, found = (model(input_ids=tokens, decoder_input_ids=tokens).logits for model in (theirs, again))
    np.testing.assert_array_equal(found.numpy(), expected.numpy())


def test_other_models_are_refused() -> None:
    config = t5.config_from_hf({"d_model": 16, "num_heads": 2})
    with pytest.raises(UserError, match="is 'learned', which"):
        t5.config_to_hf(dataclasses.replace(config, positions="learned"), Vocabulary(SIZE))
