"""Measures what blockwise loss and recomputation save of a training step's temporary memory; nothing is run.

    python tools/measure_step_memory.py          1 to 2 minutes on 2 cores

GPT-2 124M with a vocabulary of 128,000, 8 rows of 1,024 tokens, compiled for this machine: `temp_size_in_bytes` with
the loss's logits whole or in blocks, under each `model.remat`. Exit code 1 if blocks and `block` together take
more than half of what neither takes.
"""

from __future__ import annotations

import sys
from unittest import mock

from lmobj.batch import Vocabulary
from lmobj.config import Experiment
from lmobj.data import DataConfig
from lmobj.losses import _linear_logit_stats as blocks
from lmobj.models import DecoderConfig
from lmobj.models._block import Remat
from lmobj.objectives import CausalLM
from lmobj.train import TrainConfig
from lmobj.train.assemble import design
from lmobj.train.plan import make_plan
from lmobj.train.sharding import MeshConfig

LIMIT = 0.5


def temporary(remat: Remat, *, blockwise: bool, vocab: int = 128_000, rows: int = 8, length: int = 1024) -> int:
    """Bytes of temporary memory of one step."""
    config = Experiment(
        data=DataConfig(length=length),
        model=DecoderConfig(max_length=length, remat=remat),
        objective=CausalLM(),
        train=TrainConfig(batch_size=rows, mesh=MeshConfig(data=1)),
    )
    made = design(config, Vocabulary(vocab, pad=0, unk=1, bos=2, eos=3))
    if blockwise:
        return make_plan(made).temporary
    with mock.patch.object(blocks, "_default_block_size", lambda layout, tokens, vocab: vocab):
        return make_plan(made).temporary


def main() -> int:
    """Prints one line per variant."""
    found = {}
    for remat in ("none", "dots", "block"):
        for blockwise in (False, True):
            found[remat, blockwise] = temporary(remat, blockwise=blockwise)
            what = "in blocks" if blockwise else "whole"
            print(f"remat {remat:<6} logits {what:<10} {found[remat, blockwise] / 2**30:7.2f} GiB", flush=True)
    share = found["block", True] / found["none", False]
    print(f"in blocks with remat=block: {share:.0%} of whole without (limit {LIMIT:.0%})")
    return int(share > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
