"""Measures what an adapter saves of a training step's memory; nothing is run.

    python tools/measure_adapter_memory.py          half a minute on 2 cores

A decoder of 1.1 billion parameters (configs/pretrain/decoder_1b.yaml), 4 rows of 2,048 tokens in bfloat16 beside
float32 weights, compiled for this machine: optimizer state, and the memory of the step as the compiler says, with LoRA
of rank 16 on queries and values and without. Exit code 1 if LoRA takes more than 2% of the one or 45% of the other.
"""

from __future__ import annotations

import sys

from lmobj import config
from lmobj.train.assemble import design
from lmobj.train.plan import Plan, make_plan, planned_vocabulary

STATE_LIMIT, STEP_LIMIT = 0.02, 0.45
SETTINGS = (
    "train.batch_size=4", "train.accumulate=1", "train.mesh={data: 1, fsdp: 1}", "model.attention_backend=xla",
    "model.remat=block",
)  # fmt: skip


def planned(*overrides: str) -> Plan:
    """What a step takes."""
    loaded = config.load("configs/pretrain/decoder_1b.yaml", (*SETTINGS, *overrides))
    return make_plan(design(loaded, planned_vocabulary(loaded.data.tokenizer)))


def main() -> int:
    """Prints both, and their shares."""
    full, lora = planned(), planned("adapter={name: lora, rank: 16}")
    print(f"all parameters: {full}\nLoRA:           {lora}")
    state, step = lora.optimizer / full.optimizer, lora.total / full.total
    print(
        f"optimizer state {state:.2%} (limit {STATE_LIMIT:.0%}), memory of the step {step:.1%} (limit {STEP_LIMIT:.0%})"
    )
    return int(state > STATE_LIMIT or step > STEP_LIMIT)


if __name__ == "__main__":
    sys.exit(main())
