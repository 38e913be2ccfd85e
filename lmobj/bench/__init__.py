"""Benchmarks: several ways to train a model, on one budget, with several seeds, judged by one probe.

from lmobj import bench

result = bench.run(bench.load("configs/bench/quick.yaml"))
print(bench.markdown_table(result.header, result.rows))
"""

from __future__ import annotations

from lmobj.bench._config import Benchmark, Budget, experiments, load, schema
from lmobj.bench._labelled import Labelled, ProbeData, labelled_texts
from lmobj.bench._plan import ArmPlan, plan_arm
from lmobj.bench._probe import Scores, fit_and_score, majority, probe_model
from lmobj.bench._probe_config import JsonLinesProbe, Probe, SwappedWordsProbe, TsvProbe, WhichDocumentProbe
from lmobj.bench._reading import Reading
from lmobj.bench._results import Results, markdown_table, spread
from lmobj.bench._run import BenchResult, run
from lmobj.train.products import matmul_flops, step_flops

__all__ = [
    "ArmPlan",
    "BenchResult",
    "Benchmark",
    "Budget",
    "JsonLinesProbe",
    "Labelled",
    "Probe",
    "ProbeData",
    "Reading",
    "Results",
    "Scores",
    "SwappedWordsProbe",
    "TsvProbe",
    "WhichDocumentProbe",
    "experiments",
    "fit_and_score",
    "labelled_texts",
    "load",
    "majority",
    "markdown_table",
    "matmul_flops",
    "plan_arm",
    "probe_model",
    "run",
    "schema",
    "spread",
    "step_flops",
]
