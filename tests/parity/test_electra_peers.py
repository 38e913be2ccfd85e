"""ELECTRA's pair against Transformers' PyTorch models: hidden states, logits, both losses and their gradients.

Every comparison prints what it saw: `pytest -m parity -s`.
"""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from flax import nnx  # noqa: E402
from hf_peers import BERT, LENGTHS, SIZE, VOCAB, gradient_gaps, make_batch, randomise, within  # noqa: E402

from lmobj import losses, masks  # noqa: E402
from lmobj.interop import electra  # noqa: E402

pytestmark = pytest.mark.parity

GENERATOR = BERT | {"embedding_size": 20, "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 50}
DISCRIMINATOR = BERT | {"embedding_size": 20}
SEEDS = (0, 1)
K = 4
"""Predictions of a row."""


class Peers:
    """Both models in PyTorch with the same embeddings, as training leaves them, and lmobj's pair with their weights."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.generator = transformers.ElectraForMaskedLM(transformers.ElectraConfig(**GENERATOR)).train()
        self.discriminator = transformers.ElectraForPreTraining(transformers.ElectraConfig(**DISCRIMINATOR)).train()
        randomise(self.generator, seed)
        randomise(self.discriminator, seed + 10)
        self.discriminator.electra.embeddings.load_state_dict(self.generator.electra.embeddings.state_dict())
        self.config = electra.config_from_hf(self.generator.config.to_dict(), self.discriminator.config.to_dict())
        self.graph = nnx.split(nnx.eval_shape(lambda: self.config.build(VOCAB, nnx.Rngs(params=0))))[0]
        self.params = electra.to_lmobj(_arrays(self.generator), _arrays(self.discriminator), self.config)
        self.batch = make_batch(seed, token_types=3)
        self.inputs = {
            "input_ids": _tensor(self.batch["tokens"]),
            "attention_mask": _tensor(self.batch["segment_ids"]),
            "token_type_ids": _tensor(self.batch["token_types"]),
        }
        rng = np.random.default_rng(seed)
        self.positions = np.stack([rng.permutation(length)[:K] for length in LENGTHS])
        self.targets = rng.integers(4, SIZE, self.positions.shape)
        self.replaced = rng.integers(0, 2, self.batch["tokens"].shape)

    @functools.cached_property
    def run(self) -> Any:
        """lmobj's hidden states, logits and losses of the batch, and the gradients of each loss."""
        batch, positions, targets = self.batch, jnp.asarray(self.positions), jnp.asarray(self.targets)
        real, replaced = batch["segment_ids"] > 0, jnp.asarray(self.replaced)
        where = {"positions": batch["positions"], "token_types": batch["token_types"]}

        def generate(params: Any) -> Any:
            model = nnx.merge(self.graph, params)
            hidden = model.generator_hidden(
                batch["tokens"], mask=masks.bidirectional().packed(batch["segment_ids"]), **where
            )
            head = model.generator_head_table()
            logits = (model.generator_head_hidden(hidden) @ head.table.T + head.bias)[..., :SIZE]
            chosen = model.generator_head_hidden(jnp.take_along_axis(hidden, positions[..., None], axis=1))
            stats = losses.linear_logit_stats(chosen, head.table, targets, bias=head.bias, vocab_size=head.vocab_size)
            return jnp.mean(losses.nll(stats)), (hidden, logits)

        def discriminate(params: Any) -> Any:
            model = nnx.merge(self.graph, params)
            hidden = model.discriminator_hidden(
                batch["tokens"], mask=masks.bidirectional().packed(batch["segment_ids"]), **where
            )
            logits = model.discriminate(hidden)
            nll = losses.binary_nll(logits, replaced)
            return jnp.sum(nll * real) / jnp.sum(real), (hidden, logits)

        @jax.jit
        def run(params: Any) -> Any:
            return [jax.value_and_grad(f, has_aux=True)(params) for f in (generate, discriminate)]

        return run(self.params)

    def their_losses(self) -> tuple[Any, Any]:
        """(Output of the generator with labels at the predicted positions, output of the discriminator)."""
        labels = np.full(self.batch["tokens"].shape, -100)
        np.put_along_axis(labels, self.positions, self.targets, axis=1)
        generated = self.generator(**self.inputs, labels=_tensor(labels), output_hidden_states=True)
        return generated, self.discriminator(**self.inputs, labels=_tensor(self.replaced), output_hidden_states=True)


@pytest.fixture(scope="module")
def peers() -> dict[int, Peers]:
    return {seed: Peers(seed) for seed in SEEDS}


@pytest.mark.parametrize("seed", SEEDS)
def test_hidden_states_logits_and_losses(peers: dict[int, Peers], seed: int) -> None:
    pair = peers[seed]
    real = np.asarray(pair.batch["segment_ids"]) > 0
    for name, ours, theirs in zip(("generator", "discriminator"), pair.run, pair.their_losses(), strict=True):
        (loss, (hidden, logits)), _ = ours
        last = theirs.hidden_states[-1].detach().numpy()
        within(f"{name} seed {seed} hidden states", np.max(np.abs(np.asarray(hidden)[real] - last[real])), 1e-4)
        expected = theirs.logits.detach().numpy()
        within(f"{name} seed {seed} logits", np.max(np.abs(np.asarray(logits)[real] - expected[real])), 1e-4)
        assert np.std(expected[real]) > 0.5
        within(f"{name} seed {seed} loss", abs(float(loss) - theirs.loss.item()), 1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_gradients(peers: dict[int, Peers], seed: int) -> None:
    """Of the weighted sum of the losses, in which both trunks' gradients meet in the embeddings."""
    pair = peers[seed]
    for model in (pair.generator, pair.discriminator):
        model.zero_grad()
    generated, discriminated = pair.their_losses()
    (generated.loss + 50 * discriminated.loss).backward()
    (_, of_generator), (_, of_discriminator) = pair.run
    ours = jax.tree.map(lambda a, b: np.asarray(a + 50 * b), of_generator, of_discriminator)

    gradients = [{n: p.grad.numpy() for n, p in m.named_parameters()} for m in (pair.generator, pair.discriminator)]
    # Tied tables get the sum of both models' gradients, which the reader then takes for what both folders hold.
    for name in [name for name in gradients[0] if name.startswith("electra.embeddings.")]:
        gradients[0][name] = gradients[1][name] = gradients[0][name] + gradients[1][name]
    gaps = gradient_gaps(ours, electra.to_lmobj(*gradients, pair.config))
    assert {"embeddings/tokens/table", "embeddings/norm/scale", "generator/stack/blocks/mlp/up/kernel[2]"} <= set(gaps)
    worst = max(gaps.items(), key=lambda item: item[1])
    within(f"electra seed {seed} gradient of {worst[0]}", worst[1], 1e-4)


def test_folders_both_ways(peers: dict[int, Peers], tmp_path: pathlib.Path) -> None:
    pair = peers[0]
    pair.generator.save_pretrained(tmp_path / "generator")
    pair.discriminator.save_pretrained(tmp_path / "discriminator")
    config, vocab, params, _ = electra.load(tmp_path / "generator", tmp_path / "discriminator")
    assert config == pair.config
    jax.tree.map(np.testing.assert_array_equal, params, pair.params)
    electra.save(tmp_path / "our generator", tmp_path / "our discriminator", params, config, vocab)
    for theirs, folder in ((pair.generator, "our generator"), (pair.discriminator, "our discriminator")):
        again = type(theirs).from_pretrained(tmp_path / folder, attn_implementation="eager")
        with torch.no_grad():
            np.testing.assert_array_equal(again(**pair.inputs).logits.numpy(), theirs(**pair.inputs).logits.numpy())


def _arrays(model: Any) -> dict[str, np.ndarray]:
    return {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}


def _tensor(x: Any) -> Any:
    return torch.from_numpy(np.array(x, np.int64))
