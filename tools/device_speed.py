"""What `device_report` measures: experiments of `configs/pretrain` at fixed sizes, and the device's own ceiling.

They are measured by `lmobj.speed`, beside Transformers in PyTorch where it is installed and has a peer. Where more than
one setting may be the fastest, each has a row. A row is a config and what it changes in it, whatever the model.
"""

from __future__ import annotations

import pathlib

from lmobj.config import Experiment, load

__all__ = ["ceilings", "quick", "workloads"]

_CONFIGS = pathlib.Path(__file__).parent.parent / "configs" / "pretrain"
_ONE_DEVICE = (
    "train.accumulate=1",
    "train.mesh={data: 1, fsdp: 1}",
    "train.optimizer={name: adamw, schedule: {name: constant, peak: 1.0e-4}, weight_decay: 0.01, clip_norm: 1.0}",
)
_SMALL = ("model.dtype=float32", "model.remat=none")


def _experiment(config: str, *overrides: str) -> Experiment:
    return load(_CONFIGS / f"{config}.yaml", [*_ONE_DEVICE, *overrides])


def workloads(platform: str) -> dict[str, Experiment]:
    """The experiments for a platform, by name. On accelerators they fit 80 GB, or are halved until they do."""
    return _small() if platform == "cpu" else _large("splash" if platform == "tpu" else "cudnn")


def _large(flash: str) -> dict[str, Experiment]:
    """One row for each setting of what is recomputed and of attention that may be the fastest.

    Flash attention has no dropout of probabilities, so those rows are without it, peers' too. XLNet's relative
    positions leave it none.
    """
    backend = f"model.attention_backend={flash}"
    no_dropout = ("model.dropout=0", "model.attention_dropout=0", "model.embedding_dropout=0")
    decoder = ("decoder_1b", backend)
    gpt2 = ("gpt2_124m", backend, *no_dropout, "train.batch_size=32")
    bert = ("bert_base", "objective={name: masked_lm}")
    plain_bert = (*bert, backend, "model.attention_dropout=0")
    electra = ("electra_base", "model.attention_dropout=0", backend, "train.batch_size=64")
    xlnet = ("xlnet_base", "data.length=512", "train.batch_size=32")
    t5 = ("t5_base", "train.batch_size=64", "model.attention_dropout=0")
    longer = ("data.length=4096", "model.max_length=4096", "train.batch_size=8")
    return {
        "decoder_1b": _experiment(*decoder, "train.batch_size=16"),
        "decoder_1b, remat none": _experiment(*decoder, "train.batch_size=8", "model.remat=none"),
        "decoder_1b, 4k": _experiment(*decoder, *longer),
        "decoder_1b, 4k, remat none": _experiment(*decoder, *longer, "train.batch_size=4", "model.remat=none"),
        "gpt2_124m": _experiment(*gpt2, "model.remat=none"),
        "gpt2_124m, remat dots": _experiment(*gpt2, "model.remat=dots", "train.batch_size=64"),
        "bert_base": _experiment(
            *bert, backend, "model.attention_dropout=0", "model.remat=none", "train.batch_size=64"
        ),
        "bert_base, remat dots": _experiment(*plain_bert, "model.remat=dots", "train.batch_size=128"),
        "bert_base, attention dropout": _experiment(
            *bert, "model.attention_backend=xla", "model.remat=dots", "train.batch_size=64"
        ),
        "electra_base": _experiment(*electra, "model.remat=none"),
        "electra_base, remat dots": _experiment(*electra, "model.remat=dots"),
        "xlnet_base": _experiment(*xlnet, "model.remat=dots"),
        "xlnet_base, remat none": _experiment(*xlnet, "model.remat=none"),
        "t5_base": _experiment(*t5, "model.remat=dots"),
        "t5_base, remat none": _experiment(*t5, "model.remat=none"),
        "ul2_base": _experiment("ul2_base", "train.batch_size=32"),
        "bart_base": _experiment("bart_base", "train.batch_size=64", backend, *no_dropout),
        "multi_token_1b": _experiment("multi_token_1b", backend, "train.batch_size=8"),
        "llada_1b": _experiment("llada_1b", backend, "train.batch_size=8"),
        "santacoder_1.1b": _experiment("santacoder_1.1b", backend, "train.batch_size=8"),
    }


def _small() -> dict[str, Experiment]:
    """For a few CPU cores, in float32."""
    bert = ("model.width=256", "model.layers=4", "model.heads=4", "data.tokenizer.vocab_size=8192")
    gpt2 = ("model.width=192", "model.layers=4", "model.heads=6", "data.tokenizer.vocab_size=4096")
    decoder = ("model.width=256", "model.layers=4", "model.heads=4", "model.kv_heads=2", "model.mlp_width=704")
    at_128 = ("data.length=128", "model.max_length=128", "train.batch_size=16", *_SMALL)
    return {
        "bert_5m": _experiment("bert_base", "objective={name: masked_lm}", *bert, *at_128),
        "gpt2_3m": _experiment("gpt2_124m", *gpt2, *at_128),
        "decoder_5m": _experiment(
            "decoder_1b", *decoder, "data.tokenizer.vocab_size=4096", "data.length=256", "model.max_length=256",
            "train.batch_size=8", "model.attention_backend=xla", *_SMALL,
        ),
    }  # fmt: skip


def quick() -> dict[str, Experiment]:
    """One that takes seconds anywhere."""
    sizes = ("model.width=64", "model.layers=2", "model.heads=2", "model.max_length=32", "data.length=32")
    few = ("train.batch_size=4", "data.tokenizer.vocab_size=512")
    return {"quick": _experiment("gpt2_124m", *sizes, *few, *_SMALL)}


def ceilings(platform: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Dtypes and sizes of the matrix products that are timed."""
    if platform == "cpu":
        return (("float32", (512, 1024, 2048)),)
    return (("bfloat16", (4096, 8192, 16384)), ("float32", (4096, 8192)))
