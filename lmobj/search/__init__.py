"""Search for the best settings of an experiment, by Optuna: at random, on a grid, or by a model of what was good.

from lmobj import search

result = search.run(search.load("configs/search/quick.yaml"))
print(result.best.settings, result.best.value)
"""

from __future__ import annotations

from lmobj.search._config import MedianPruner, Search, SearchExperiment, load, schema
from lmobj.search._run import SearchResult, run
from lmobj.search._space import Parameter
from lmobj.search._study import Trial
from lmobj.search._trainer import Trainer

__all__ = [
    "MedianPruner",
    "Parameter",
    "Search",
    "SearchExperiment",
    "SearchResult",
    "Trainer",
    "Trial",
    "load",
    "run",
    "schema",
]
