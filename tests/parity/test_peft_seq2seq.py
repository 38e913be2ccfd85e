"""Adapters of T5 and BART against PEFT on small random models: logits both ways, merged, and the same places."""

from __future__ import annotations

import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # an import of its own that is deprecated
    peft = pytest.importorskip("peft")

from flax import nnx  # noqa: E402
from hf_peers import randomise, within  # noqa: E402

from lmobj import adapt, masks  # noqa: E402
from lmobj.batch import Vocabulary  # noqa: E402
from lmobj.interop import bart, t5  # noqa: E402
from lmobj.interop import peft as files  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    # PEFT asks Transformers by a name that is deprecated there.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]

SIZE, LIMIT = 53, 1e-5
INTEROP = {"t5": t5, "bart": bart}
METHODS: dict[str, Callable[[], Any]] = {
    # PEFT's own targets for each family: none is given.
    "lora": lambda: peft.LoraConfig(r=3, lora_alpha=5, task_type="SEQ_2_SEQ_LM"),
    "dora": lambda: peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, task_type="SEQ_2_SEQ_LM"),
    "ia3": lambda: peft.IA3Config(task_type="SEQ_2_SEQ_LM"),
}


def _theirs(family: str) -> Any:
    torch.manual_seed(0)
    common = {"vocab_size": SIZE, "d_model": 24, "pad_token_id": 0, "decoder_start_token_id": 0}
    if family == "t5":
        config = transformers.T5Config(
            d_kv=5, d_ff=40, num_layers=3, num_decoder_layers=2, num_heads=3, dropout_rate=0.0,
            relative_attention_num_buckets=8, relative_attention_max_distance=12, **common,
        )  # fmt: skip
    else:
        config = transformers.BartConfig(
            encoder_layers=2, decoder_layers=3, encoder_attention_heads=3, decoder_attention_heads=3, dropout=0.0,
            encoder_ffn_dim=40, decoder_ffn_dim=40, max_position_embeddings=32, eos_token_id=2, **common,
        )  # fmt: skip
    kind = transformers.T5ForConditionalGeneration if family == "t5" else transformers.BartForConditionalGeneration
    model = kind(config).eval()
    randomise(model, seed=0)
    return model


def _ours(family: str, theirs: Any) -> Any:
    config = INTEROP[family].config_from_hf(theirs.config.to_dict())
    tensors = {name: x.detach().numpy() for name, x in theirs.state_dict().items()}
    graph = nnx.graphdef(nnx.eval_shape(lambda: config.build(Vocabulary(SIZE), nnx.Rngs(0))))
    return nnx.merge(graph, jax.tree.map(jnp.asarray, INTEROP[family].to_lmobj(tensors, config)))


def _adapted(theirs: Any, settings: Any) -> Any:
    """PEFT's model around a copy of the base, with every adapter away from its initial value."""
    copy = type(theirs)(theirs.config)
    copy.load_state_dict(theirs.state_dict())
    model = peft.get_peft_model(copy, settings).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def _their_logits(model: Any, read: np.ndarray, written: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor(read), decoder_input_ids=torch.tensor(written)).logits.numpy()


def _our_logits(model: Any, read: np.ndarray, written: np.ndarray) -> np.ndarray:
    graph, params = nnx.split(model)

    def logits(params: Any) -> Any:
        model = nnx.merge(graph, params)
        encoded = model.encode(jnp.asarray(read), mask=masks.bidirectional())
        hidden = model.decode(jnp.asarray(written), encoded, mask=masks.causal(), cross_mask=masks.bidirectional())
        head = model.head_table()
        found = model.head_hidden(hidden) @ head.table.T
        return (found if head.bias is None else found + head.bias)[..., :SIZE]

    return np.asarray(jax.jit(logits)(params))


def test_logits_both_ways(tmp_path: pathlib.Path) -> None:
    _check("t5", "lora", tmp_path, merged=False)


@pytest.mark.parametrize(("family", "method"), [(family, method) for family in INTEROP for method in METHODS])
@pytest.mark.slow
def test_logits_both_ways_and_merged(family: str, method: str, tmp_path: pathlib.Path) -> None:
    _check(family, method, tmp_path, merged=True)


def _check(family: str, method: str, folder: pathlib.Path, *, merged: bool) -> None:
    """Adapters that PEFT wrote, read, merged and written again: the same logits everywhere."""
    base = _theirs(family)
    theirs = _adapted(base, METHODS[method]())
    theirs.save_pretrained(folder / "theirs")
    generator = np.random.default_rng(0)
    rows = generator.integers(3, SIZE, (2, 9)), generator.integers(3, SIZE, (2, 7))
    wanted = _their_logits(theirs, *rows)
    assert np.max(np.abs(wanted - _their_logits(base, *rows))) > 0.1  # the adapters do something
    model, adapter = files.load(folder / "theirs", _ours(family, base), family)  # type: ignore[arg-type]
    within(f"{family} {method} read", np.max(np.abs(_our_logits(model, *rows) - wanted)), LIMIT)
    if merged:
        alone = _our_logits(adapt.merge(model), *rows)
        within(f"{family} {method} merged", np.max(np.abs(alone - wanted)), LIMIT)
    files.save(folder / "ours", model, adapter, family)  # type: ignore[arg-type]
    again = peft.PeftModel.from_pretrained(base, folder / "ours").eval()
    within(f"{family} {method} written", np.max(np.abs(_their_logits(again, *rows) - wanted)), LIMIT)


def test_lora_adapts_what_peft_adapts() -> None:
    """By default, without a target named: queries and values of both stacks and of attention over the encoder."""
    theirs = peft.get_peft_model(_theirs("t5"), METHODS["lora"]())
    adapted = {name.split(".lora_")[0] for name, _ in theirs.named_parameters() if "lora_" in name}
    model = adapt.apply(_ours("t5", _theirs("t5")), adapt.LoRA(), nnx.Rngs(params=0))
    ours = adapt.split(nnx.to_pure_dict(nnx.state(model)), adapt.trainable(model))[0]
    layers = sum(x.shape[0] for path, x in jax.tree_util.tree_leaves_with_path(ours) if "lora_a" in str(path))
    assert layers == len(adapted) == (3 + 2 * 2) * 2
