"""Transformers' encoder-decoders in PyTorch beside lmobj's with the same weights."""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from hf_peers import gradient_gaps, within

from lmobj import losses, masks
from lmobj.batch import Vocabulary
from lmobj.models import EncoderDecoderConfig

SIZE = 53
READ = (23, 9, 1)
"""Tokens in each row of the encoder; the rest is padding."""


class Limits(NamedTuple):
    """How far states, losses and gradients may be apart."""

    states: float
    loss: float
    gradients: float


def compare(
    kind: str, theirs: Any, interop: Any, config: EncoderDecoderConfig, limits: Limits, untrained: tuple[str, ...] = ()
) -> None:
    """Holds hidden states of encoder and decoder, loss and gradients against those of `theirs`, but for the gradients
    of what PyTorch does not train."""
    params = interop.to_lmobj({name: x.detach().numpy() for name, x in theirs.state_dict().items()}, config)
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
    seen = np.abs(np.asarray(encoded) - output.encoder_last_hidden_state.detach().numpy())[valid > 0].max()
    within(f"{kind} encoder", seen, limits.states)
    seen = np.abs(np.asarray(hidden) - output.decoder_hidden_states[-1].detach().numpy()).max()
    within(f"{kind} decoder", seen, limits.states)
    within(f"{kind} loss", abs(float(loss) - output.loss.item()), limits.loss)
    output.loss.backward()
    expected = interop.to_lmobj({name: p.grad.numpy() for name, p in theirs.named_parameters()}, config)
    for name in untrained:
        gradients.pop(name), expected.pop(name)
    worst = max(gradient_gaps(gradients, expected).items(), key=lambda item: item[1])
    within(f"{kind} gradient of {worst[0]}", worst[1], limits.gradients)


def there_and_back(theirs: Any, interop: Any, folder: pathlib.Path, **settings: Any) -> None:
    """Their files, read and written by lmobj, make the same model again, bit for bit."""
    theirs.save_pretrained(folder / "theirs")
    ours = interop.load(folder / "theirs")
    interop.save(folder / "ours", ours.params, ours.config, ours.vocab)
    again = type(theirs).from_pretrained(folder / "ours", **settings).eval()
    tokens = torch.tensor(np.random.default_rng(1).integers(1, SIZE, (2, 6)))
    with torch.no_grad():
        expected, found = (model(input_ids=tokens, decoder_input_ids=tokens).logits for model in (theirs, again))
    np.testing.assert_array_equal(found.numpy(), expected.numpy())
