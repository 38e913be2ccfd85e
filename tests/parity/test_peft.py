"""Adapters against PEFT on small random models: logits both ways, gradients, and AdaLoRA's allocation step for step."""

from __future__ import annotations

import functools
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # an import of its own that is deprecated
    peft = pytest.importorskip("peft")

from flax import nnx  # noqa: E402
from hf_peers import FAMILIES, LENGTHS, SIZE, VOCAB, Pair, make_batch, within  # noqa: E402

from lmobj import adapt, masks  # noqa: E402
from lmobj.interop import peft as files  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    # PEFT asks Transformers by a name that is deprecated there.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]

LIMIT = 1e-5
BY_NAME = {family.name: family for family in FAMILIES}
ATTENTION = {"bert": ["query", "value"], "gpt2": ["c_attn"]}
WIDE = {"bert": ["query", "output.dense"], "gpt2": ["c_attn", "mlp.c_proj"]}
"""Linear maps of both shapes, and with `output.dense` those of attention and feed-forward part."""


def low_rank(kind: Callable[..., Any] = peft.LoraConfig, **settings: Any) -> Callable[[str], Any]:
    """Settings of PEFT by family."""
    return lambda family: kind(
        target_modules=WIDE[family], fan_in_fan_out=family == "gpt2", **{"r": 3, "lora_alpha": 5} | settings
    )


def adalora(family: str) -> Any:
    """AdaLoRA, whose rank has a name of its own."""
    return peft.AdaLoraConfig(
        target_modules=WIDE[family], fan_in_fan_out=family == "gpt2", init_r=4, target_r=2, lora_alpha=7, total_step=10
    )


def ia3(family: str) -> Any:
    """Keys and values (all three on GPT-2) and the inputs of the feed-forward part's second half."""
    return peft.IA3Config(
        target_modules=[*({"bert": ["key", "value"], "gpt2": ["c_attn"]}[family]), WIDE[family][1]],
        feedforward_modules=[WIDE[family][1]],
        fan_in_fan_out=family == "gpt2",
    )


METHODS = {
    "lora": low_rank(),
    "rslora": low_rank(use_rslora=True),
    "dora": low_rank(use_dora=True),
    "adalora": adalora,
    "ia3": ia3,
}


@pytest.fixture(scope="module")
def pairs() -> dict[str, Pair]:
    """Base models with the same weights in both libraries."""
    return {name: Pair(BY_NAME[name], 0) for name in ("bert", "gpt2")}


def base_model(pair: Pair) -> Any:
    return nnx.merge(pair.graphs["model"], pair.params["model"])


def adapted_peer(pair: Pair, settings: Any, seed: int = 0) -> Any:
    """PEFT's model around a copy of the base with every adapter away from its initial value."""
    copy = type(pair.theirs)(pair.theirs.config)
    copy.load_state_dict(pair.theirs.state_dict())
    model = peft.get_peft_model(copy, settings).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@functools.partial(jax.jit, static_argnames=("graph", "causal"))
def _forward(graph: Any, params: Any, batch: Any, causal: bool) -> Any:
    model = nnx.merge(graph, params)
    mask = (masks.causal() if causal else masks.bidirectional()).packed(batch["segment_ids"])
    types = {} if causal else {"token_types": batch["token_types"]}
    head = model.head_table()
    logits = model.head_hidden(model.hidden(batch["tokens"], mask=mask, **types)) @ head.table.T
    return (logits if head.bias is None else logits + head.bias)[..., :SIZE]


def our_logits(model: Any, pair: Pair, batch: Any) -> np.ndarray:
    """lmobj's logits."""
    return np.asarray(_forward(*nnx.split(model), batch, causal=pair.family.name == "gpt2"))


def real(x: Any) -> np.ndarray:
    """Values at real tokens."""
    return np.asarray(x)[np.arange(np.asarray(x).shape[1]) < np.asarray(LENGTHS)[:, None]]


QUICK = [("bert", "lora"), ("gpt2", "dora"), ("gpt2", "adalora"), ("bert", "ia3")]
REST = [(family, method) for family in ("bert", "gpt2") for method in METHODS if (family, method) not in QUICK]


@pytest.mark.parametrize(("family", "method"), QUICK)
def test_logits_both_ways(pairs: dict[str, Pair], tmp_path: pathlib.Path, family: str, method: str) -> None:
    check_logits(pairs, tmp_path, family, method)


@pytest.mark.parametrize(("family", "method"), REST)
@pytest.mark.slow
def test_logits_both_ways_of_the_rest(pairs: dict[str, Pair], tmp_path: pathlib.Path, family: str, method: str) -> None:
    check_logits(pairs, tmp_path, family, method)


def check_logits(pairs: dict[str, Pair], tmp_path: pathlib.Path, family: str, method: str) -> None:
    """Adapters that PEFT wrote, read, merged and written again: the same logits everywhere."""
    pair = pairs[family]
    batch = make_batch(0, pair.family.token_types)
    theirs = adapted_peer(pair, METHODS[method](family))
    theirs.save_pretrained(tmp_path / "theirs")
    base = base_model(pair)
    model, adapter = files.load(tmp_path / "theirs", base, family)
    with torch.no_grad():
        wanted = real(theirs(**pair.their_inputs(batch)).logits)
        plain = real(pair.theirs(**pair.their_inputs(batch)).logits)
    assert np.max(np.abs(wanted - plain)) > 0.1  # the adapters do something
    ours = real(our_logits(model, pair, batch))
    within(f"{family} {method} read", np.max(np.abs(ours - wanted)), LIMIT)
    merged = real(our_logits(adapt.merge(model), pair, batch))
    within(f"{family} {method} merged", np.max(np.abs(merged - wanted)), LIMIT)

    files.save(tmp_path / "ours", model, adapter, family)
    copy = type(pair.theirs)(pair.theirs.config)
    copy.load_state_dict(pair.theirs.state_dict())
    again = peft.PeftModel.from_pretrained(copy, tmp_path / "ours").eval()
    with torch.no_grad():
        read = real(again(**pair.their_inputs(batch)).logits)
    within(f"{family} {method} written", np.max(np.abs(read - wanted)), LIMIT)
