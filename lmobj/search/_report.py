"""The report of a search: one HTML page that needs nothing but itself."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from lmobj import _yaml
from lmobj.search._config import SearchExperiment
from lmobj.search._folder import SearchFolder
from lmobj.search._pictures import charts
from lmobj.search._results import clock, overrides, show, table
from lmobj.search._space import nested
from lmobj.search._study import Study, Trial, best_of
from lmobj.train.page import render
from lmobj.train.storage import write_atomically

__all__ = ["write_report"]


def write_report(folder: SearchFolder, search: SearchExperiment, study: Study) -> None:
    """Writes report.html, of what is known so far."""
    trials, importances = study.trials, study.importances()
    best = best_of(trials, search.mode)
    header, rows = table(search, trials, whole_reasons=True)
    page = render(
        "lmobj.search",
        "report.html.j2",
        title=search.name,
        subtitle=" · ".join(_subtitle(search)),
        tiles=list(_tiles(search, trials)),
        best=best,
        yaml="" if best is None else _yaml.to_yaml(nested(best.settings)),
        overrides="" if best is None else overrides(best.settings),
        command=f"lmobj train {shlex.quote(str(folder.best))} run=FOLDER",
        charts=list(charts(search, trials, importances)),
        complete=sum(trial.state == "complete" for trial in trials),
        importances=importances,
        header=header,
        rows=rows,
        config=folder.config.read_text(encoding="utf-8"),
    )
    write_atomically(folder.report, page)


def _subtitle(search: SearchExperiment) -> Iterator[str]:
    yield {"tpe": "tree-structured Parzen estimator", "random": "random search", "grid": "grid search"}[
        search.search.method
    ]
    yield f"{len(search.search.space)} setting{'s' * (len(search.search.space) > 1)}"
    yield f"{search.metric}, {'less' if search.mode == 'min' else 'more'} is better"


def _tiles(search: SearchExperiment, trials: Sequence[Trial]) -> Iterator[tuple[str, str, str]]:
    """(value, what it is, remark) of the headline figures."""
    best = best_of(trials, search.mode)
    if best is not None:
        yield show(best.value), f"best {search.metric}", f"trial {best.number}"
    counts = {state: sum(trial.state == state for trial in trials) for state in ("complete", "pruned", "failed")}
    most = search.search.most_trials
    yield (
        f"{sum(counts.values())}",
        "trials" if most is None else f"of {most} trials",
        ", ".join(f"{count} {state}" for state, count in counts.items() if count),
    )
    yield clock(sum(trial.seconds for trial in trials)), "time", "of all trials together"
