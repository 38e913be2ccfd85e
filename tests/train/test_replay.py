"""Going on with an earlier run on other text, some of its own among it: configs, shares, figures by source, resume."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest
import tiny_runs
from tiny_runs import STEPS, metric_lines, stored_bits

from lmobj import config
from lmobj.data import MixtureSource, TextFiles, prepare
from lmobj.errors import UserError
from lmobj.objectives import Classification, ObjectiveState
from lmobj.train import FitResult, fit
from lmobj.train import replay as module
from lmobj.train.evaluation import Evaluation
from tests.mutants import Mutant, assert_killed

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny_runs.write_corpus(tmp_path_factory.mktemp("domain") / "domain.txt", documents=60, seed=3)


def going_on(causal: FitResult, text: pathlib.Path, run: pathlib.Path, *overrides: str) -> config.Experiment:
    """A config that says what is new, and that a quarter of the rows is of the earlier run's text."""
    path = run.parent / f"{run.name}.yaml"
    path.write_text(
        f"init: {{run: {json.dumps(str(causal.run_dir))}}}\n"
        f"run: {json.dumps(str(run))}\n"
        "objective: {name: causal_lm}\n"
        "data:\n"
        "  source:\n"
        "    name: mixture\n"
        "    sources:\n"
        f"      new: {{weight: 3, source: {{name: text, files: [{json.dumps(str(text))}], documents: blocks}}}}\n"
        "      old: {weight: 1, source: {name: replay}}\n"
        f"  cache: {json.dumps(str(text.parent / 'cache'))}\n"
        "  length: 16\n"
        "train: {steps: 12, batch_size: 8, log_every: 1, evaluate_every: 3, evaluate_batches: 4, checkpoint_every: 4}\n"
    )
    return config.load(path, overrides)


def check_resolved(causal: FitResult, text: pathlib.Path, tmp_path: pathlib.Path) -> None:
    experiment = going_on(causal, text, tmp_path / "run")
    earlier = causal.assembly.config.data
    source = experiment.data.source
    assert isinstance(source, MixtureSource)
    assert source.sources["old"].source == earlier.source
    assert {name: entry.weight for name, entry in source.sources.items()} == {"new": 3, "old": 1}
    assert (experiment.data.validation, experiment.data.test) == (earlier.validation, earlier.test)
    assert experiment.data.tokenizer.path == str(causal.run_dir / "tokenizer.model")
    # Resolved, it needs the earlier run no more.
    again = tmp_path / "again.yaml"
    again.write_text(config.dump(experiment).replace(str(causal.run_dir), "/gone"))
    assert config.load(again).data.source == source


def test_replay_is_the_earlier_runs_source(causal: FitResult, text: pathlib.Path, tmp_path: pathlib.Path) -> None:
    check_resolved(causal, text, tmp_path)


def earlier_run(causal: FitResult, folder: pathlib.Path, text: pathlib.Path, **changes: Any) -> FitResult:
    """A folder like the earlier run's whose data is said to be otherwise."""
    folder.mkdir()
    shutil.copy(causal.run_dir / "tokenizer.model", folder)
    experiment = causal.assembly.config
    assert isinstance(experiment, config.Experiment)
    data = dataclasses.replace(experiment.data, **changes)
    (folder / "config.yaml").write_text(config.dump(dataclasses.replace(experiment, data=data)))
    return dataclasses.replace(causal, run_dir=folder)


def check_parts(causal: FitResult, text: pathlib.Path, tmp_path: pathlib.Path) -> None:
    parts = {
        "a": {"weight": 1.0, "source": {"name": "text", "files": [str(text)], "documents": "blocks"}},
        "b": {"weight": 3.0, "source": {"name": "stdlib"}},
    }
    earlier = earlier_run(causal, tmp_path / "earlier", text)
    path = earlier.run_dir / "config.yaml"
    settings = json.loads(json.dumps(config._yaml.read(path).values))
    settings["data"]["source"] = {"name": "mixture", "sources": parts}
    path.write_text(config._yaml.to_yaml(settings))
    source = going_on(earlier, text, tmp_path / "run").data.source
    assert isinstance(source, MixtureSource)
    weights = {name: entry.weight for name, entry in source.sources.items()}
    assert weights == {"new": 3.0, "old-a": 0.25, "old-b": 0.75}
    assert source.sources["old-a"].source == TextFiles(files=(str(text),), documents="blocks")
    with pytest.raises(UserError, match=r"data\.source\.sources\.old-a is there, and a part of the text"):
        going_on(earlier, text, tmp_path / "run", "data.source.sources.old-a={source: {name: stdlib}}")
    with pytest.raises(UserError, match=r"unknown key data\.source\.sources\.old-a\.weigth"):
        going_on(earlier, text, tmp_path / "run", "data.source.sources.old.weigth=2")


def test_the_parts_of_an_earlier_mixture_share_the_weight(
    causal: FitResult, text: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    check_parts(causal, text, tmp_path)


def test_what_is_refused(causal: FitResult, text: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(
        UserError, match=r"data\.validation is 0\.3, and 0\.15 in the run of init\.run.*accepted: 0\.15"
    ):
        going_on(causal, text, tmp_path / "run", "data.validation=0.3")
    with pytest.raises(UserError, match=r"sources\.old\.weight is \"abc\"; accepted: a number"):
        going_on(causal, text, tmp_path / "run", "data.source.sources.old.weight=abc")
    for key in ("weigth", "source.weight"):
        with pytest.raises(UserError, match=rf"unknown key data\.source\.sources\.old\.{key}"):
            going_on(causal, text, tmp_path / "run", f"data.source.sources.old.{key}=2")
    alone = going_on(causal, text, tmp_path / "run", "init=null", "model={name: decoder}").data
    with pytest.raises(UserError, match=r"sources\.old\.source\.name is 'replay', and init\.run names no run"):
        prepare(alone, quiet=True)
    with pytest.raises(UserError, match=r"init\.run is .*nowhere"):
        going_on(causal, text, tmp_path / "run", "init.run=/nowhere")
    refused = earlier_run(causal, tmp_path / "squad", text).run_dir / "config.yaml"
    settings = config._yaml.read(refused).values
    settings["data"]["source"] = {"name": "squad", "files": ["x.json"]}
    refused.write_text(config._yaml.to_yaml(settings))
    with pytest.raises(UserError, match=r"sources\.old\.source\.name is \"squad\"; accepted: .*text"):
        going_on(causal, text, tmp_path / "run", f"init.run={refused.parent}")


# --- a run ---


@pytest.fixture(scope="module")
def continued(causal: FitResult, text: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> FitResult:
    with tiny_runs.quick_compilation():
        return fit(going_on(causal, text, tmp_path_factory.mktemp("continued") / "run"), quiet=True)


def test_shares_are_exact(continued: FitResult) -> None:
    batches = list(continued.assembly.batches("train", steps=512))
    sources = np.concatenate([batch["row_ids"][:, 0] for batch in batches])
    assert sources.size == 4096
    assert np.sum(sources == 1) == 1024, "of 3 and 1: new is 0, old is 1"
    assert {int(np.sum(batch["row_ids"][:, 0])) for batch in batches} <= {1, 2, 3}


def test_figures_by_source_are_those_of_its_rows(continued: FitResult) -> None:
    run, state = continued.assembly, continued.state
    measured = Evaluation(run)(state)
    sums = {"new": np.zeros(2), "old": np.zeros(2)}
    for batch in run.batches("validation"):  # both sources in the order of their rows, as without figures by source
        for number, pair in enumerate(sums.values()):
            mine = (batch["row_ids"][:, 0] == number)[:, None]
            alone = batch | {name: np.where(mine, batch[name], 0) for name in ("segment_ids", "positions")}
            pair += np.asarray(jax.device_get(run.eval_step(state, alone)[0]["nll"]), np.float64)
    for name, pair in sums.items():
        np.testing.assert_allclose(measured[f"{name}/nll"], pair[0] / pair[1], rtol=1e-5)
        np.testing.assert_allclose(measured[f"{name}/perplexity"], np.exp(measured[f"{name}/nll"]))
    whole = sum(sums.values())
    np.testing.assert_allclose(measured["nll"], whole[0] / whole[1], rtol=1e-5)
    assert measured["new/nll"] != measured["old/nll"]
    assert {f"eval/{name}": value for name, value in measured.items()}.items() <= continued.metrics.items()


def test_part_of_a_split_is_of_every_source(continued: FitResult, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = Evaluation(continued.assembly)
    rows = {name: continued.assembly.read_rows("", "validation", name).steps_per_epoch for name in ("new", "old")}
    assert evaluation._batches_of(None) == evaluation._batches_of(sum(rows.values())) == {"new": None, "old": None}
    assert evaluation._batches_of(1) == {"new": 1, "old": 1}
    shared = evaluation._batches_of(sum(rows.values()) - 1)
    assert sum(n or 0 for n in shared.values()) == sum(rows.values()) - 1
    assert all(1 <= (shared[name] or 0) <= rows[name] for name in rows)


def test_a_checkpoint_can_be_the_best_by_one_source(continued: FitResult) -> None:
    evaluation = Evaluation(continued.assembly)
    evaluation.check_metric("new/nll")
    evaluation.check_metric("old/loss")
    with pytest.raises(UserError, match=r"train\.best\.metric is 'other/nll'; accepted: .*new/nll.*old/perplexity"):
        evaluation.check_metric("other/nll")


def test_who_has_no_figures_by_source(causal: FitResult, continued: FitResult) -> None:
    run = continued.assembly
    assert Evaluation(run).sources == ("new", "old")
    assert Evaluation(causal.assembly).sources == ()
    memory = run.abstract_state._replace(objective=ObjectiveState((), {"memory": np.zeros((8, 1))}))
    for changes in ({"abstract_state": memory}, {"objective": Classification()}, {"rows": {"member": run.rows}}):
        assert Evaluation(dataclasses.replace(run, **changes)).sources == ()  # type: ignore[arg-type]


def test_resume_is_bit_for_bit(continued: FitResult, tmp_path: pathlib.Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(continued.run_dir, run)
    shutil.rmtree(run / "checkpoints" / str(STEPS))
    experiment = dataclasses.replace(continued.assembly.config, run=str(run))  # type: ignore[type-var]
    fit(experiment, resume=True, quiet=True)
    assert metric_lines(run) == metric_lines(continued.run_dir)
    stored = continued.assembly.abstract_state.stored
    assert stored_bits(run, stored) == stored_bits(continued.run_dir, stored)


@pytest.mark.parametrize(
    ("mutant", "check"),
    [
        (Mutant("shares of its own", module, "_SHARES", lambda _: ()), check_resolved),
        (
            Mutant(
                "the whole weight for each", module, "_parts",
                lambda parts: lambda n, e, s: {k: {**p, "weight": e["weight"]} for k, p in parts(n, e, s).items()},
            ),
            check_parts,
        ),
    ],
    ids=lambda x: str(x) if isinstance(x, Mutant) else "",
)  # fmt: skip
def test_mutants_are_noticed(
    monkeypatch: pytest.MonkeyPatch,
    mutant: Mutant,
    check: Any,
    causal: FitResult,
    text: pathlib.Path,
    tmp_path: pathlib.Path,
) -> None:
    assert_killed(monkeypatch, mutant, [lambda: check(causal, text, tmp_path)])
