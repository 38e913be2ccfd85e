"""Measures the share of training time that is spent waiting for batches, at BERT-small shape on CPU.

    python tools/measure_input_wait.py                     some minutes on 2 cores
    python tools/measure_input_wait.py --steps 6 --layers 1 --width 64

An encoder of 4 layers, 512 wide with 8 heads, learns from the documentation that Python ships, 16 rows of 128 tokens a
step, through `lmobj.train.fit` with all that a run does. What is shown is `perf/input_wait` as the run itself logs it:
time in which the loop waited for the next batch and its way to the device, as a share of the whole time, in which
nothing is evaluated or saved. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

BATCH, LENGTH = 16, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="training steps; every one is a line of metrics")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--cache", help="where prepared data is kept; the usual place by default")
    given = parser.parse_args()

    from lmobj import config, train
    from lmobj.train.tracking import read_metrics

    quickstart = Path(__file__).parent.parent / "configs" / "quickstart_mlm.yaml"
    settings = {
        "model.layers": given.layers,
        "model.width": given.width,
        "model.heads": 8,
        "model.mlp_width": 4 * given.width,
        "model.max_length": LENGTH,
        "data.length": LENGTH,
        "train.batch_size": BATCH,
        "train.steps": given.steps,
        "train.log_every": 1,
        "train.evaluate_every": "null",
        "train.checkpoint_every": "null",
        "sample": "[]",
    }
    if given.cache:
        settings["data.cache"] = given.cache
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        overrides = [f"{key}={value}" for key, value in settings.items()]
        train.fit(config.load(quickstart, [*overrides, f"run={run}"]), quiet=True)
        lines = [line for line in read_metrics(run / "metrics.jsonl") if "perf/input_wait" in line]
    waits = [line["perf/input_wait"] for line in lines]
    seconds = [1 / line["perf/steps_per_second"] for line in lines]
    share = sum(wait * second for wait, second in zip(waits, seconds, strict=True)) / sum(seconds)
    print(f"{len(lines)} steps of {BATCH} x {LENGTH}, {statistics.median(seconds):.3f} s each (median)")
    print(f"waiting for input: {share:.3%} of the time; worst step {max(waits):.3%}")
    print(json.dumps({"input_wait": share, "worst": max(waits), "seconds_per_step": statistics.median(seconds)}))


if __name__ == "__main__":
    main()
