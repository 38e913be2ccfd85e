"""XLNet against Transformers' PyTorch model: both streams, logits, memory, loss and gradients.

Every comparison prints what it saw: `pytest -m parity -s`.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from flax import nnx  # noqa: E402
from test_transformers import gradient_gaps, run_key, within  # noqa: E402

from lmobj import masks, objectives  # noqa: E402
from lmobj.batch import Batch, Vocabulary  # noqa: E402
from lmobj.interop import xlnet  # noqa: E402
from lmobj.models import Memory, XLNetConfig  # noqa: E402
from lmobj.objectives import Context, Example  # noqa: E402
from lmobj.objectives._permutation_lm import PermutationLM, query_mask  # noqa: E402

pytestmark = pytest.mark.parity

SIZE, ROWS, LENGTH, MEMORY, REUSE, WIDTH, LAYERS = 101, 4, 16, 7, 8, 36, 3
LENGTHS = (16, 16, 13, 10)
"""Tokens in each row; the rest is padding, which comes after the tokens that are remembered."""
VOCAB = Vocabulary(size=SIZE, pad=0, cls=1, sep=2)
OBJECTIVE = PermutationLM(reuse=REUSE, perm_size=4, num_predictions=6, mask_alpha=2)

SETTINGS: dict[str, Any] = {
    "vocab_size": SIZE,
    "d_model": WIDTH,
    "n_layer": LAYERS,
    "n_head": 3,
    "d_inner": 70,
    "layer_norm_eps": 1e-3,
    "dropout": 0.0,
    "mem_len": MEMORY,
    "reuse_len": REUSE,
    "use_mems_train": True,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "xlnet": {},
    "backward": {"bi_data": True, "clamp_len": 6, "ff_activation": "gelu_new"},
    "transformer_xl": {"attn_type": "uni", "reuse_len": None},
}
by_variant = pytest.mark.parametrize("variant", VARIANTS)


class Pair:
    """A Transformers XLNet and lmobj's with the same weights, all of them off their initial values."""

    def __init__(self, variant: str) -> None:
        torch.manual_seed(0)
        self.theirs = transformers.XLNetLMHeadModel(transformers.XLNetConfig(**SETTINGS | VARIANTS[variant])).train()
        with torch.no_grad():
            for name, parameter in self.theirs.named_parameters():
                noise = torch.randn(parameter.shape)
                is_scale = name.endswith("layer_norm.weight")
                parameter.copy_(1 + 0.3 * noise if is_scale else 0.2 * noise)
        # Which rows read backwards is said with the batch.
        self.config: XLNetConfig = xlnet.config_from_hf(self.theirs.config.to_dict() | {"bi_data": False})
        self.backward = jnp.arange(ROWS) >= ROWS // 2 if variant == "backward" else None
        self.params = self.to_lmobj({name: p.detach() for name, p in self.theirs.named_parameters()})
        self.graph = nnx.split(nnx.eval_shape(lambda: self.config.build(VOCAB, nnx.Rngs(params=0))))[0]

    def to_lmobj(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Tensors by Transformers' names (parameters or gradients) as lmobj's tree."""
        return xlnet.to_lmobj({name: tensor.numpy().copy() for name, tensor in tensors.items()}, self.config)

    def inputs(self, batch: Batch, example: Example, memory: Memory) -> dict[str, Any]:
        """The arguments of Transformers' model."""
        mask = example.mask
        assert mask.query_rank is not None
        assert mask.key_rank is not None
        mapping = np.zeros((*example.weights.shape, LENGTH), np.float32)
        rows, slots = np.nonzero(np.asarray(example.weights))
        mapping[rows, slots, np.asarray(example.predict)[rows, slots]] = 1
        return {
            **self.common(batch, memory),
            "perm_mask": tensor(mask.query_rank[:, :, None] <= mask.key_rank[:, None], np.float32),
            "target_mapping": torch.from_numpy(mapping),
        }

    def common(self, batch: Batch, memory: Memory) -> dict[str, Any]:
        """Those that do not depend on the permutation."""
        return {
            "input_ids": tensor(batch["tokens"]),
            "attention_mask": tensor(batch["segment_ids"], np.float32),
            "token_type_ids": tensor(batch["token_types"]),
            "mems": [tensor(memory.states[:, n].swapaxes(0, 1), np.float32) for n in range(LAYERS)],
        }


def tensor(x: Any, dtype: Any = np.int64) -> Any:
    return torch.from_numpy(np.array(x, dtype))


def make_batch(seed: int, pair: Pair) -> tuple[Batch, Example, Memory]:
    """Rows with separators and padding, what the objective makes of them, and a memory that is full."""
    rng = np.random.default_rng(seed)
    real = np.arange(LENGTH) < np.asarray(LENGTHS)[:, None]
    batch: Batch = {
        "tokens": jnp.asarray(np.where(real, rng.integers(1, SIZE, (ROWS, LENGTH)), 0), jnp.int32),
        "segment_ids": jnp.asarray(real, jnp.int32),
        "token_types": jnp.asarray(rng.integers(0, 3, (ROWS, LENGTH)), jnp.int32),
        "word_starts": jnp.asarray(rng.random((ROWS, LENGTH)) < 0.7),
        "row_ids": jnp.asarray(np.stack([np.full(ROWS, seed), np.arange(ROWS)], axis=1), jnp.int32),
    }
    batch["tokens"] = batch["tokens"].at[:, 9].set(VOCAB.sep or 0)
    if pair.backward is not None:
        batch["backward"] = pair.backward
    noise_keys, model_keys = objectives.step_keys(run_key(seed), batch["row_ids"], 0)
    example = OBJECTIVE.corrupt(noise_keys, batch, Context(model_keys, 0, VOCAB, train=False))
    states = jnp.asarray(rng.normal(size=(ROWS, LAYERS, MEMORY, WIDTH)), jnp.float32)
    return batch, example, Memory(states, jnp.ones((ROWS, MEMORY), bool))


@pytest.fixture(scope="module")
def pairs() -> dict[str, Pair]:
    return {variant: Pair(variant) for variant in VARIANTS}


def close(name: str, ours: Any, theirs: Any, limit: float = 1e-4) -> None:
    within(name, np.max(np.abs(np.asarray(ours) - np.asarray(theirs.detach()))), limit)


@pytest.mark.parametrize("variant", ["xlnet", "backward"])
def test_two_streams_logits_and_memory_over_two_rows(pairs: dict[str, Pair], variant: str) -> None:
    pair = pairs[variant]

    @jax.jit
    def ours(params: Any, batch: Batch, example: Example, memory: Memory) -> Any:
        model = nnx.merge(pair.graph, params)
        h, g, memory = model.two_streams(
            batch["tokens"],
            example.predict,
            content_mask=example.mask,
            query_mask=query_mask(example),
            memory=memory,
            token_types=batch["token_types"],
            backward=pair.backward,
            reuse=REUSE,
        )
        head = model.head_table()
        return h, g, (model.head_hidden(g) @ head.table.T + head.bias)[..., :SIZE], memory

    batch, example, memory = make_batch(0, pair)
    for seed in range(2):  # the second row with the memory of the first
        batch, example, _ = make_batch(seed, pair)
        predicted, real = np.asarray(example.weights) > 0, np.asarray(batch["segment_ids"]) > 0
        h, g, logits, new = ours(pair.params, batch, example, memory)
        with torch.no_grad():
            theirs = pair.theirs(**pair.inputs(batch, example, memory), output_hidden_states=True)
        their_h, their_g = theirs.hidden_states[-2:]
        close(f"{variant} row {seed} content stream", h[real], their_h[real])
        close(f"{variant} row {seed} query stream", g[predicted], their_g[predicted])
        close(f"{variant} row {seed} logits", logits[predicted], theirs.logits[predicted])
        for n in range(LAYERS):
            close(f"{variant} row {seed} memory of layer {n}", new.states[:, n], theirs.mems[n].swapaxes(0, 1))
        assert theirs.logits[predicted].std() > 0.5  # far from zero, so that the limit means something
        memory = new


@pytest.mark.parametrize("variant", ["xlnet", "backward"])
@pytest.mark.parametrize("seed", [2, 3])
def test_loss_and_gradients(pairs: dict[str, Pair], variant: str, seed: int) -> None:
    pair = pairs[variant]
    batch, example, memory = make_batch(seed, pair)
    ctx = Context(jax.vmap(jax.random.key)(jnp.arange(ROWS)), 0, VOCAB, train=False)

    @jax.jit
    @jax.value_and_grad
    def ours(params: Any) -> Any:
        terms = OBJECTIVE.terms({"model": nnx.merge(pair.graph, params)}, example, memory, ctx)
        return terms.sums["nll"] / OBJECTIVE.weights(example)["nll"]

    loss, gradients = ours(pair.params)
    labels = np.where(np.asarray(example.weights) > 0, np.asarray(example.targets), -100)
    assert (labels == -100).any()  # a separator was drawn, or a row is short
    theirs = pair.theirs(**pair.inputs(batch, example, memory), labels=tensor(labels)).loss
    within(f"{variant} seed {seed} loss", abs(float(loss) - theirs.item()), 1e-5)
    pair.theirs.zero_grad()
    theirs.backward()
    expected = pair.to_lmobj({name: p.grad for name, p in pair.theirs.named_parameters()})
    worst = max(gradient_gaps(gradients, expected).items(), key=lambda item: item[1])
    within(f"{variant} seed {seed} gradient of {worst[0]}", worst[1], 1e-4)


@by_variant
def test_content_stream_alone(pairs: dict[str, Pair], variant: str) -> None:
    """As it is fine-tuned, and Transformer-XL: causal, and all of the row remembered."""
    pair = pairs[variant]
    batch, _, memory = make_batch(4, pair)
    causal = variant == "transformer_xl"
    reuse = None if causal else REUSE
    inputs = pair.common(batch, memory)
    if causal:  # Transformers cannot combine a causal mask with padding: it adds the two in place, in different shapes
        batch["segment_ids"] = jnp.ones_like(batch["segment_ids"])
        inputs.pop("attention_mask")
    mask = (masks.causal() if causal else masks.bidirectional()).packed(batch["segment_ids"])
    h, new = jax.jit(
        lambda params: nnx.merge(pair.graph, params).recurrent(
            batch["tokens"],
            mask=mask,
            memory=memory,
            token_types=batch["token_types"],
            backward=pair.backward,
            reuse=reuse,
        )
    )(pair.params)
    with torch.no_grad():
        theirs = pair.theirs.transformer(**inputs)
    real = np.asarray(batch["segment_ids"]) > 0
    close(f"{variant} content stream alone", h[real], theirs.last_hidden_state[real])
    assert new.valid.all()
    for n in range(LAYERS):
        close(f"{variant} memory of layer {n}", new.states[:, n], theirs.mems[n].swapaxes(0, 1))


def test_folders_both_ways(pairs: dict[str, Pair], tmp_path: pathlib.Path) -> None:
    pair = pairs["xlnet"]
    batch, example, memory = make_batch(0, pair)
    pair.theirs.save_pretrained(tmp_path / "theirs")
    config, vocab, params, _ = xlnet.load(tmp_path / "theirs")
    assert config == pair.config
    assert vocab == Vocabulary(SIZE)
    jax.tree.map(np.testing.assert_array_equal, params, pair.params)

    xlnet.save(tmp_path / "ours", params, config, vocab)
    again = transformers.XLNetLMHeadModel.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        inputs = pair.inputs(batch, example, memory)
        np.testing.assert_array_equal(again(**inputs).logits.numpy(), pair.theirs(**inputs).logits.numpy())
