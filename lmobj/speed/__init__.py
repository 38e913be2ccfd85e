"""The speed of training steps: tokens per second, time, memory and utilisation, beside PyTorch where it has a peer.

    row = measure(lmobj.config.load("configs/pretrain/gpt2_124m.yaml", ["train.batch_size=16"]))

Steps are those that `train` takes, on rows of random tokens, so that no data is needed.
"""

from __future__ import annotations

from lmobj.speed._batches import synthetic_batch
from lmobj.speed._ceiling import matmul_ceiling
from lmobj.speed._measure import CONTENDERS, TURN_SECONDS, TURNS, Contender, measure
from lmobj.speed._process import in_process
from lmobj.speed._series import measure_each
from lmobj.speed._table import HEADER, notes, speed_rows
from lmobj.speed._theirs import check_peer

__all__ = [
    "CONTENDERS",
    "HEADER",
    "TURNS",
    "TURN_SECONDS",
    "Contender",
    "check_peer",
    "in_process",
    "matmul_ceiling",
    "measure",
    "measure_each",
    "notes",
    "speed_rows",
    "synthetic_batch",
]
