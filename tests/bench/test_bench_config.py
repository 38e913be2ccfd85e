"""A benchmark's config: read as an experiment's is, refused with the key, the value and what is accepted."""

from __future__ import annotations

import json
import pathlib

import pytest

from lmobj import bench
from lmobj.bench._plan import steps_within
from lmobj.cli import main
from lmobj.errors import UserError
from lmobj.objectives import CausalLM, MaskedLM

_CONFIG = """
data: {source: {name: text, files: [words.txt]}, length: 16}
model: {name: decoder, layers: 1, width: 8, heads: 2, max_length: 16}
objective: {name: causal_lm}
train: {batch_size: 4, optimizer: {name: adamw, schedule: {name: cosine, peak: 1.0e-3}}}
arms:
  clm: {}
  wide: {model: {width: 16}}
  mlm:
    model: {name: encoder, layers: 1, width: 8, heads: 2, max_length: 16}
    objective: {name: masked_lm}
budget: {tokens: 6400}
probe: {name: tsv, train: [a.tsv]}
"""


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "three.yaml"
    path.write_text(_CONFIG)
    return path


def test_an_arm_is_the_shared_experiment_with_its_own_settings_over_it(path: pathlib.Path) -> None:
    benchmark = bench.load(path, ["arms.wide.train.batch_size=2", "seeds=[3]"])
    arms = bench.experiments(benchmark)
    assert list(arms) == ["clm", "wide", "mlm"]
    assert (arms["clm"].model.width, arms["wide"].model.width) == (8, 16)  # type: ignore[union-attr]
    assert (arms["clm"].train.batch_size, arms["wide"].train.batch_size) == (4, 2)
    assert arms["wide"].model.heads == 2, "what the arm does not say stays"  # type: ignore[union-attr]
    assert isinstance(arms["clm"].objective, CausalLM)
    assert isinstance(arms["mlm"].objective, MaskedLM)
    assert arms["mlm"].model.name == "encoder"
    assert {arm.data for arm in arms.values()} == {benchmark.data}
    assert str(benchmark.run_dir) == "runs/three"
    assert benchmark.seeds == (3,)


def test_the_written_config_reads_back_to_the_same_arms(path: pathlib.Path, tmp_path: pathlib.Path) -> None:
    from lmobj import _settings, _yaml

    benchmark = bench.load(path)
    again = tmp_path / "config.yaml"
    again.write_text(_yaml.to_yaml(_settings.plain(benchmark)))
    assert bench.load(again) == benchmark
    assert bench.experiments(bench.load(again)) == bench.experiments(benchmark)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("armz={}", ["unknown key armz", "Did you mean arms?"]),
        ("arms.mlm.model.widht=3", ["override", "unknown key model.widht", "model.width", "arm mlm"]),
        ("arms.mlm.objective.mask_rate=2.0", ["objective.mask_rate is 2.0", "arm mlm"]),
        ("arms.clm.train.steps=5", ["arms.clm.train.steps is set", "budget"]),
        ("arms.clm.train.seed=5", ["arms.clm.train.seed is set", "seeds"]),
        ("arms.clm.run=x", ["arms.clm.run is set"]),
        ("arms.a|b.train.batch_size=1", ['"a|b"', "without"]),
        ("arms.clm=3", ["arms", "accepted: a mapping"]),
        ("budget.flops=1.0", ["budget is {flops: 1.0, tokens: 6400}", "exactly one of tokens, flops and seconds"]),
        ("budget.tokens=null", ["budget is empty", "exactly one"]),
        ("budget.tokens=0", ["budget.tokens is 0", "above 0"]),
        ("budget.steps=5", ["unknown key budget.steps", "tokens, flops, seconds"]),
        ("seeds=[]", ["seeds is []"]),
        ("seeds=[1, 1]", ["seeds is [1, 1]", "different"]),
        ("metrics=[loss]", ["metrics has 'loss'", "eval/bits_per_byte"]),
        ("probe=null", ["probe is null and metrics is empty"]),
        ("probe.name=csv", ["probe.name is", "accepted: tsv, jsonl, which_document, swapped_words"]),
        ("probe.train=[]", ["probe.train is empty"]),
        ("probe.text=sentence", ['probe.text is "sentence" and probe.header is false']),
        ("probe.label=-1", ["probe.label is -1"]),
        ("probe.test_share=1.0", ["probe.test_share is 1.0"]),
        ("probe.features=max", ["probe.features is", "mean, first, last"]),
        ("probe.regularisation=0.0", ["probe.regularisation is 0.0", "above 0"]),
        ("probe={name: swapped_words, swaps: 4}", ["probe.words is [6, 30]", "= 8"]),
        ("probe={name: which_document, documents: 1}", ["probe.documents is 1"]),
        ("run=gs://bucket/x", ["run is 'gs://bucket/x'", "a folder on this machine"]),
    ],
)
def test_mistakes_are_told_with_key_value_and_what_is_accepted(
    path: pathlib.Path, override: str, parts: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        bench.load(path, [override])
    for part in parts:
        assert part in str(error.value)


def test_a_benchmark_without_arms_is_refused(path: pathlib.Path) -> None:
    path.write_text(_CONFIG[: _CONFIG.index("arms:")] + "arms: {}\nbudget: {tokens: 1}\nmetrics: [eval/loss]\n")
    with pytest.raises(UserError, match="arms is empty"):
        bench.load(path)


def test_a_mistake_ends_the_command_with_2_and_writes_nothing(
    path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    assert main(["bench", "three.yaml", "budget.tokens=0"]) == 2
    assert capsys.readouterr().err.startswith("lmobj: override 'budget.tokens=0': budget.tokens is 0")
    assert not (path.parent / "runs").exists()


@pytest.mark.parametrize(
    ("budget", "cost", "steps"),
    [
        # 6400 tokens at 4 rows of 16: 100 steps; at 4 of 42, or 168, a rest is not spent: 39 would take 6552.
        (bench.Budget(tokens=6400), 64, 100),
        (bench.Budget(tokens=6400), 4 * 42, 38),
        (bench.Budget(tokens=6535), 4 * 42, 38),
        (bench.Budget(flops=1e12), 2.5e9, 400),
        (bench.Budget(flops=1e12), 3e9, 333),
        (bench.Budget(seconds=30.0), 0.25, 120),
    ],
)
def test_a_budget_pays_for_whole_steps(budget: bench.Budget, cost: float, steps: int) -> None:
    assert steps_within("a", budget, cost) == steps


def test_a_budget_below_one_step_is_refused() -> None:
    with pytest.raises(UserError, match=r"budget.tokens is 63, and one step of the arm a takes 64; accepted: 64"):
        steps_within("a", bench.Budget(tokens=63), 64)
    assert steps_within("a", bench.Budget(tokens=64), 64) == 1


def test_the_schema_describes_benchmarks_and_their_arms(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "--bench"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["properties"]) == {
        "base", "name", "run", "data", "model", "init", "adapter", "objective", "train", "sample", "generation",
        "writing",
        "arms", "budget", "seeds", "probe", "metrics",
    }  # fmt: skip
    assert schema["additionalProperties"] is False
    arm = schema["$defs"]["Arm"]
    own = {"arms", "base", "budget", "metrics", "name", "probe", "run", "seeds"}
    assert set(arm["properties"]) == set(schema["properties"]) - own
    assert schema["properties"]["arms"]["additionalProperties"] == {"$ref": "#/$defs/Arm"}
    assert set(schema["$defs"]["Budget"]["properties"]) == {"tokens", "flops", "seconds"}


_SHIPPED = sorted((pathlib.Path(__file__).parent.parent.parent / "configs/bench").glob("*.yaml"))


@pytest.mark.parametrize("shipped", _SHIPPED, ids=lambda path: path.stem)
def test_shipped_benchmarks_load(shipped: pathlib.Path) -> None:
    benchmark = bench.load(shipped)
    assert len(benchmark.arms) > 1
    assert f"lmobj bench configs/bench/{shipped.name}" in shipped.read_text().splitlines()[0]


def test_every_self_supervised_objective_has_an_arm() -> None:
    """Those that read plain text; `mixture` is made of others, and what reads pairs has benchmarks of its own."""
    arms = [arm for path in _SHIPPED for arm in bench.experiments(bench.load(path)).values()]
    found = {arm.objective.name for arm in arms}
    assert found >= {
        "causal_lm", "masked_lm", "replaced_token_detection", "masked_diffusion", "multi_token_prediction",
        "fill_in_middle", "prefix_lm", "span_corruption", "mixture_of_denoisers", "denoising_autoencoder", "simcse",
        "sequence_to_sequence",
    }  # fmt: skip
