"""A whole run: the folder it leaves, what it prints, what it refuses before writing, and objectives of one's own."""

from __future__ import annotations

import inspect
import json
import pathlib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_wandb import FakeWandB
from own_objective import Bigram, BigramConfig, PredictPrevious
from tiny_runs import PEAK, STEPS, experiment, metric_lines

from lmobj import config
from lmobj.data import SentencePieceConfig, TextFiles
from lmobj.errors import UserError
from lmobj.objectives import Example, Terms
from lmobj.train import FitResult, fit, run_folder
from lmobj.train.checkpoint import Checkpoints
from lmobj.train.evaluation import Evaluation
from lmobj.train.optimizers import AdamW
from lmobj.train.schedules import ConstantSchedule
from lmobj.train.sharding import MeshConfig
from lmobj.train.sinks import WandB
from lmobj.train.tracking import read_metrics

pytestmark = pytest.mark.usefixtures("quick_compilation")

# --- the run folder -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_the_run_folder_holds_what_its_module_lists(kind: str, request: pytest.FixtureRequest) -> None:
    result: FitResult = request.getfixturevalue(kind)
    listed = set(re.findall(r"^(\S+?)/?  +\S", run_folder.__doc__ or "", re.MULTILINE))
    assert {path.name for path in result.run_dir.iterdir()} == listed
    assert len(listed) == 9
    assert [path.name for path in sorted((result.run_dir / "checkpoints").iterdir())] == ["12", "8"]


def test_config_yaml_loads_back_to_the_same_experiment(causal: FitResult) -> None:
    assert config.load(causal.run_dir / "config.yaml") == causal.assembly.config


def test_metrics_have_their_names_at_their_steps(causal: FitResult, masked: FitResult) -> None:
    common = {"loss", "nll", "accuracy", "perplexity"}
    judged = {"causal_lm": "bits_per_byte", "masked_lm": "top5_accuracy"}
    for result in (causal, masked):
        kind = result.assembly.config.objective.name
        train, held_out = set(common), {*common, judged[kind]}
        train |= {"grad_norm", "learning_rate", "skipped"} | ({"bits_per_byte"} if kind == "causal_lm" else set())
        lines = metric_lines(result.run_dir)
        assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, STEPS + 1))
        assert [line["step"] for line in lines if "eval/loss" in line] == [3, 6, 9, 12]
        for line in lines:
            group = "train" if "train/loss" in line else "eval"
            names = train if group == "train" else held_out
            assert set(line) == {"step", *(f"{group}/{name}" for name in names)}
        perf = {name for line in read_metrics(result.run_dir / "metrics.jsonl") for name in line if "perf/" in name}
        shares = {f"perf/{name}" for name in ("input_wait", "evaluation", "saving", "step")}
        assert perf == {"perf/steps_per_second", "perf/tokens_per_second", *shares}
        timed = [line for line in read_metrics(result.run_dir / "metrics.jsonl") if "perf/step" in line]
        assert all(sum(line[name] for name in shares) == pytest.approx(1) for line in timed)
        assert all(line[name] >= 0 for line in timed for name in shares)


def test_each_metric_fits_the_others(causal: FitResult) -> None:
    for line in metric_lines(causal.run_dir):
        group = "train" if "train/loss" in line else "eval"
        # One term with coefficient 1 and no smoothing: the loss is the nll.
        np.testing.assert_allclose(line[f"{group}/loss"], line[f"{group}/nll"], rtol=1e-6)
        np.testing.assert_allclose(line[f"{group}/perplexity"], np.exp(line[f"{group}/nll"]), rtol=1e-6)
    rates = [line["train/learning_rate"] for line in metric_lines(causal.run_dir) if "train/loss" in line]
    # Four updates of warm-up from 0, then the peak: the rate that update s, counted from 0, was made with.
    np.testing.assert_allclose(rates, [PEAK * min(s / 4, 1) for s in range(STEPS)], rtol=1e-6)


def test_the_loss_falls(causal: FitResult, masked: FitResult) -> None:
    for result in (causal, masked):
        losses = [line["eval/loss"] for line in metric_lines(result.run_dir) if "eval/loss" in line]
        assert losses[-1] < losses[0] - 0.3


def test_the_result_is_what_the_folder_holds(causal: FitResult) -> None:
    assert int(causal.state.step) == STEPS
    last = {k: v for line in read_metrics(causal.run_dir / "metrics.jsonl") for k, v in line.items() if k != "step"}
    assert causal.metrics == last
    with Checkpoints(causal.run_dir / "checkpoints", best="eval/loss") as checkpoints:
        restored = checkpoints.restore(causal.assembly.abstract_state)
        assert checkpoints.best_step == STEPS
        assert checkpoints.restore(causal.assembly.abstract_state, step=8).metrics == {}  # 8 was not evaluated
    assert restored.step == STEPS
    jax.tree.map(np.testing.assert_array_equal, restored.state, causal.state)
    assert restored.metadata == causal.assembly.identity
    # Checkpoints are judged on the same rows at every step, and the run by all.
    run, batches = causal.assembly, causal.assembly.config.train.evaluate_batches
    assert restored.metrics["eval/loss"] == Evaluation(run)(causal.state, batches)["loss"]
    assert causal.metrics["eval/loss"] == Evaluation(run)(causal.state)["loss"] != restored.metrics["eval/loss"]


def test_the_report_stands_by_itself(causal: FitResult, masked: FitResult) -> None:
    for result, figure in ((causal, "bits per byte"), (masked, "top-5 accuracy")):
        page = (result.run_dir / "report.html").read_text(encoding="utf-8")
        assert not re.search(r"""(src|href)=["'](?!#)|url\((?!#)|@import""", page)
        assert "<svg" in page
        assert figure in page.lower()
        assert "unigram" in page
        (sample,) = json.loads((result.run_dir / "samples.json").read_text())
        assert sample["prompt"] == result.assembly.config.sample[0]
        assert sample["text"].startswith("the quick")
        assert "[MASK]" not in sample["text"]


# --- printing -----------------------------------------------------------------------------------------------------


def test_quiet_prints_nothing_and_otherwise_the_figures_and_the_report(
    causal: FitResult, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "again"
    again = replace(causal.assembly.config, run=str(folder))
    fit(again, quiet=True)
    assert capfd.readouterr() == ("", "")
    assert metric_lines(folder) == metric_lines(causal.run_dir)  # the folder is no part of what is computed
    fit(again, resume=True)
    out, err = capfd.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0] == f"Resuming from step {STEPS}."
    assert re.match(r"CausalLM, [\d,]+ parameters; \d+ documents, [\d,]+ tokens; batches of 8 x 16 on 8 ", lines[1])
    figures = json.loads((folder / "baselines.json").read_text())
    for name, values in figures.items():
        assert f"{name:>10}  bits_per_byte {values['bits_per_byte']:.4f}" in lines
    assert f"this model  bits_per_byte {causal.metrics['eval/bits_per_byte']:.4f}" in out
    assert lines[-1] == f"Report: {folder / 'report.html'}"
    assert "\nthe quick\n-> the quick" in out


# --- refusals -----------------------------------------------------------------------------------------------------


def test_an_existing_folder_is_refused_and_left_alone(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for name in ("mine", "file"):
        with pytest.raises(UserError, match=rf"{name}', which already exists; continue it with `lmobj resume"):
            fit(experiment(corpus, tmp_path / name), quiet=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "mine", "notes.txt"]
    with pytest.raises(UserError, match="under', which cannot be made"):
        fit(experiment(corpus, tmp_path / "file" / "under"), quiet=True)
    with pytest.raises(UserError, match="is not a run folder"):
        fit(experiment(corpus, tmp_path / "mine"), resume=True, quiet=True)


def _refused(corpus: pathlib.Path, run: pathlib.Path, words: str, **changes: Any) -> None:
    with pytest.raises(UserError, match=words):
        fit(experiment(corpus, run, **changes), quiet=True)
    assert not run.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": {"mesh": MeshConfig(data=3)}}, r"mesh\.data=3.*does not divide the 8 devices"),
        ({"train": {"batch_size": 12}}, "batch_size is 12, which does not split.*a multiple of 8"),
        ({"train": {"coefficients": {"nil": 2.0}}}, r"train\.coefficients\.nil is 2\.0; accepted:.*nll"),
        ({"train": {"sharding": {"mlp": ("tensors",)}}}, r"sharding\.mlp names the mesh axis 'tensors'"),
        ({"data": {"tokenizer": SentencePieceConfig(vocab_size=5000)}}, "vocab_size is 5000, but.*supports at most"),
        ({"data": {"length": 100_000}}, "data.length is 100000, but the training split has .* tokens"),
        ({"model": {"max_length": 15}}, r"model\.max_length is 15 and rows have 16 tokens"),
        ({"model": {"dtype": "float64"}}, r"model\.dtype is float64 and jax's 64-bit mode is off"),
        ({"sample": ("the", "")}, "sample has the prompt ''.*it is empty"),
        ({"sample": ("the " * 40,)}, "sample has the prompt .*max_length is 32"),
        ({"kind": "masked_lm", "sample": ("no mask",)}, r"sample has the prompt 'no mask'.*has no \[MASK\]"),
        ({"kind": "masked_lm", "sample": ("[MASK]" * 40,)}, "sample has the prompt .*max_length is 32"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    corpus: pathlib.Path, tmp_path: pathlib.Path, changes: dict[str, Any], words: str
) -> None:
    _refused(corpus, tmp_path / "run", words, **changes)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "files are empty"),
        (b" \n\n \n", "holds no text but blanks"),
        (b"one word\n", "vocab_size is 320, but the training split supports at most"),
        (b"good\n\nb\xffd\n", r"words\.txt.* 7"),
        (None, r"missing\.txt"),
    ],
)
def test_text_that_cannot_be_used_is_refused_before_anything_is_written(
    tmp_path: pathlib.Path, content: bytes | None, words: str
) -> None:
    file = tmp_path / "words.txt"
    if content is None:
        file = tmp_path / "missing.txt"
    else:
        file.write_bytes(content)
    _refused(file, tmp_path / "run", words, data={"source": TextFiles(files=(str(file),), documents="blocks")})


# --- an objective and a model of one's own ------------------------------------------------------------------------


def test_an_objective_and_a_model_of_ones_own_in_under_40_lines(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    parts = (PredictPrevious, Bigram, BigramConfig)
    assert sum(len(inspect.getsource(part).splitlines()) for part in parts) < 40
    assert not any(part.__module__.startswith("lmobj") for part in parts)

    fast = AdamW(schedule=ConstantSchedule(peak=0.1))
    settings = experiment(corpus, tmp_path / "run", train={"optimizer": fast, "steps": 40}, sample=())
    result = fit(settings, objective=PredictPrevious(), model=BigramConfig(), quiet=True)
    curve = [line["train/loss"] for line in metric_lines(result.run_dir) if "train/loss" in line]
    # It begins at ln V, for the tables are small, and learns which words go together.
    assert curve[0] == pytest.approx(np.log(result.assembly.dataset.vocab.size), abs=0.05)
    assert np.mean(curve[-5:]) < curve[0] - 1.5
    assert result.metrics["eval/loss"] < curve[0] - 1.5
    assert set(result.state.params["model"]) == {"embed", "out"}
    assert (result.run_dir / "report.html").is_file()


def test_wandb_gets_the_config_and_every_line(
    corpus: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    _refused(corpus, tmp_path / "run", r"train\.wandb is set and the package wandb", train={"wandb": WandB()})

    service = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", service)
    settings = experiment(corpus, tmp_path / "run", train={"steps": 4, "wandb": WandB(), "log_every": 2}, sample=())
    result = fit(settings, objective=PredictPrevious(), model=BigramConfig(), quiet=True)
    (_, given), *_ = service.calls
    assert given["config"] == result.assembly.identity["config"]
    assert (given["name"], given["settings"]["silent"]) == ("tiny", True)
    assert [values for name, values in service.calls if name == "log"] == read_metrics(result.run_dir / "metrics.jsonl")
    assert service.calls[-1] == ("finish", 0)


# --- settings at the edge -----------------------------------------------------------------------------------------


def test_without_a_validation_split_it_trains_and_says_so(
    corpus: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = experiment(corpus, tmp_path / "run", data={"validation": 0.0}, train={"steps": 4}, sample=())
    result = fit(settings, objective=PredictPrevious(), model=BigramConfig())
    assert "data.validation is 0: no text is held out, so the run is not evaluated." in capsys.readouterr().out
    assert [line["step"] for line in metric_lines(result.run_dir)] == [1, 2, 3, 4]
    assert not any(name.startswith("eval/") for name in result.metrics)
    assert json.loads((result.run_dir / "baselines.json").read_text()) == {}


@dataclass(frozen=True)
class TwoTerms(PredictPrevious):
    """Two terms, one of them with a schedule."""

    coefficients: ClassVar[Mapping[str, float]] = {"nll": 1.0, "size": 0.5}

    def weights(self, example: Example) -> dict[str, Any]:
        return {"nll": jnp.sum(example.weights), "size": jnp.asarray(float(example.inputs.shape[0]))}

    def terms(self, models: Any, example: Example, carried: Any, ctx: Any) -> Terms:
        nll = super().terms(models, example, carried, ctx).sums["nll"]
        size = jnp.sum(models["model"].embed[...][example.inputs[:, 0]] ** 2)
        return Terms({"nll": nll, "size": size}, {})


def test_terms_are_logged_apart_and_weighted_together(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    ramp = ConstantSchedule(peak=8.0, warmup_steps=4)
    settings = experiment(corpus, tmp_path / "run", train={"steps": 4, "coefficients": {"size": ramp}}, sample=())
    result = fit(settings, objective=TwoTerms(), model=BigramConfig(), quiet=True)
    for line in metric_lines(result.run_dir):
        group = "train" if "train/loss" in line else "eval"
        # The coefficient of update s is 8 s / 4. An evaluation after step s uses that of the update to come.
        step = line["step"] - (group == "train")
        together = line[f"{group}/term/nll"] + 2.0 * step * line[f"{group}/term/size"]
        np.testing.assert_allclose(line[f"{group}/loss"], together, rtol=1e-5)
    assert len(metric_lines(result.run_dir)) == 6
