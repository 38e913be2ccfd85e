"""tools/device_report.py: its references are right by hand, what is wrong is caught, and the report is written."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import device_checks as checks
import device_report
import device_speed
import numpy as np
import pytest

from lmobj import attention as attention_module
from lmobj import masks, objectives
from lmobj.models import EncoderDecoderConfig
from tests.train.tiny_runs import quick_compilation


def here(function: Callable[..., Any], *arguments: Any) -> Any:
    """In place of a process of its own."""
    return function(*arguments)


def run(name: str) -> dict[str, checks.Finding]:
    """The findings of one check, by variant."""
    found = {finding.variant: finding for finding in checks.run_checks(lambda other: other == name)}
    assert found
    return found


@pytest.fixture
def without_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that lets packed documents see each other, the error that a peer shipped."""
    right = attention_module.xla_attention

    def wrong(q: Any, k: Any, v: Any, mask: masks.AttentionMask, *rest: Any) -> Any:
        return right(q, k, v, masks.causal() if mask.causal else masks.bidirectional(), *rest)

    monkeypatch.setattr(attention_module, "xla_attention", wrong)


def test_the_reference_of_attention_by_hand() -> None:
    # Zero queries give equal weights, so a result is the mean of the values that are seen, and the gradient of a value
    # is the sum over the queries that see it of 1 / (how many they see). Keys have no gradient where queries are zero.
    v = np.asarray([1.0, 2.0, 4.0, 8.0]).reshape(1, 4, 1, 1)
    arrays = {"q": np.zeros_like(v), "k": np.ones_like(v), "v": v, "weight": np.ones_like(v)}
    mask = masks.causal().packed(np.asarray([[1, 1, 2, 2]]))
    y, (_, dk, dv) = checks.attention_reference(arrays, mask, None)
    assert y.ravel().tolist() == [1, 1.5, 4, 6]
    assert dv.ravel().tolist() == [1.5, 0.5, 1.5, 0.5]
    assert not dk.any()
    prefix = masks.prefix(np.asarray([[False, True, False, False]]))
    assert checks.attention_reference(arrays, prefix, None)[0].ravel().tolist() == pytest.approx(
        [1.5, 1.5, 7 / 3, 3.75]
    )
    late = masks.sliding_window(2).at(np.asarray([1]))
    arrays["q"] = arrays["weight"] = np.zeros((1, 2, 1, 1))
    assert checks.attention_reference(arrays, late, None)[0].ravel().tolist() == [1.5, 3]


@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_the_gradients_of_the_references_are_differences(soft_cap: float | None) -> None:
    rng = np.random.default_rng(0)
    shapes = {"q": (1, 3, 2, 2), "k": (1, 3, 1, 2), "v": (1, 3, 1, 2), "weight": (1, 3, 2, 2)}
    arrays = {name: rng.normal(size=shape) for name, shape in shapes.items()}

    def attended(**changed: Any) -> float:
        given = arrays | changed
        return float(np.sum(given["weight"] * checks.attention_reference(given, masks.causal(), soft_cap)[0]))

    gradients = dict(zip("qkv", checks.attention_reference(arrays, masks.causal(), soft_cap)[1], strict=True))
    for name in "qkv":
        assert _differences(attended, name, arrays[name]) == pytest.approx(gradients[name], abs=1e-8)

    classes, padding = checks.CLASSES, checks.PADDING
    inputs = {"hidden": rng.normal(size=(2, 3)), "table": rng.normal(size=(classes + padding, 3))}
    inputs |= {"bias": rng.normal(size=classes + padding), "targets": np.asarray([3, 7]), "weight": rng.random(2)}
    options = {"label_smoothing": 0.1, "z_loss": 0.1, "soft_cap": soft_cap}

    def lost(**changed: Any) -> float:
        return float(np.sum(inputs["weight"] * checks.nll_reference(inputs | changed, **options)[0]))

    d_hidden, _, d_bias = checks.nll_reference(inputs, **options)[1]
    assert _differences(lost, "hidden", inputs["hidden"]) == pytest.approx(d_hidden, abs=1e-7)
    assert _differences(lost, "bias", inputs["bias"]) == pytest.approx(d_bias, abs=1e-7)


def _differences(function: Callable[..., float], name: str, at: np.ndarray, step: float = 1e-5) -> np.ndarray:
    gradient = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        moved = np.zeros_like(at)
        moved[index] = step
        gradient[index] = (function(**{name: at + moved}) - function(**{name: at - moved})) / (2 * step)
    return gradient


def test_attention_is_checked_and_what_cudnn_cannot_is_refused() -> None:
    found = run("attention prefix packed")
    assert {variant: finding.status for variant, finding in found.items()} == {
        "float32 xla": "ok",
        "bfloat16 xla": "ok",
        "bfloat16 cudnn": "refused",
        "bfloat16 splash": "refused",
    }
    assert "NVIDIA GPUs" in found["bfloat16 cudnn"].detail


@pytest.mark.usefixtures("without_segments")
def test_wrong_attention_is_caught_and_ends_with_1(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--only", "attention causal packed", "--out", str(tmp_path / "report")]
    assert device_report.main(arguments, child=here) == 1
    found = json.loads((tmp_path / "report" / "device_report.json").read_text())
    failed = {finding["variant"]: finding for finding in found["checks"] if finding["status"] == "failed"}
    assert set(failed) == {"float32 xla", "bfloat16 xla"}
    assert failed["float32 xla"]["value_error"] > 0.1
    assert "2 failed, 2 refused" in capsys.readouterr().out


@pytest.mark.slow
def test_a_wrong_objective_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = objectives.total_loss

    def lower(*arguments: Any) -> Any:
        """Off by a thousandth in all but float64, as a device might be that rounds too early."""
        loss = right(*arguments)
        return loss if loss.dtype == np.float64 else loss * 1.001

    monkeypatch.setattr(objectives, "total_loss", lower)
    found = run("objective causal_lm")
    assert found["float32 xla"].status == "failed"
    assert found["float32 xla"].value_error == pytest.approx(1e-3, rel=0.01)
    assert found["bfloat16 xla"].status == "ok", "a thousandth is within what bfloat16 rounds"


def test_an_error_that_is_no_refusal_fails() -> None:
    def broken(dtype: str, backend: str) -> Any:
        raise ValueError("shapes do not fit")

    check = checks.Check("broken", lambda: ((), ()), broken)
    assert [finding.status for finding in check.findings()] == ["failed", "failed", "refused", "refused"]
    lost = checks.Check("nan", lambda: (np.ones(2), ()), lambda *_: (np.asarray([1, np.nan]), ()))
    assert {finding.status for finding in lost.findings()} == {"failed"}


def test_what_has_no_row_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(checks.missing()) == []
    monkeypatch.setitem(objectives.REGISTRY, "new_lm", objectives.CausalLM)
    monkeypatch.delitem(checks.MASKS, "causal")
    for name in ("causal packed", "causal at an offset", "causal with memory"):
        monkeypatch.delitem(checks.MASKS, name)
    assert [finding.check for finding in checks.missing()] == ["attention causal", "objective new_lm"]


def test_the_gap_of_trees() -> None:
    # Norms 5 and 0.003: the second is below a hundredth of all together, and its error of 0.01 counts against 0.05.
    expected = {"a": np.asarray([3.0, 4.0]), "b": np.asarray([0.003])}
    got = {"a": np.asarray([3.0, 4.5]), "b": np.asarray([0.013])}
    assert checks.gap(got, expected, 0.01) == pytest.approx(0.2, rel=1e-6)
    assert checks.gap({**expected, "b": got["b"]}, expected, 0.01) == pytest.approx(0.2, rel=1e-3)
    assert checks.gap({**expected, "b": got["b"]}, expected, 0.0) == pytest.approx(10 / 3)


def test_a_quick_report(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--skip", "checks", "--skip", "eager", "--out", str(tmp_path / "report")]
    with quick_compilation():
        assert device_report.main(arguments, child=here) == 0
    found = json.loads((tmp_path / "report" / "device_report.json").read_text())
    row = found["workloads"]["quick"]["contenders"][0]
    assert row["error"] is None
    # Untrained, the loss is that of guessing among 512; each of 2 turns takes at least 2 steps.
    assert row["first_loss"] == pytest.approx(np.log(512), abs=0.1)
    assert len(row["step_seconds"]) >= 4
    assert row["tokens_per_second"] == pytest.approx(4 * 32 / row["median_step_seconds"])
    assert found["ceilings"][0]["flops_per_second"] > row["model_flops_per_second"]
    table = (tmp_path / "report" / "device_report.md").read_text()
    assert "| quick, 0.1M, 4 x 32, float32 | lmobj | xla |" in table
    assert found["environment"]["packages"]["jax"] in table
    assert table in capsys.readouterr().out


def test_a_row_without_a_peer_is_lmobjs_alone(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    gpt2 = device_speed.quick()["quick"]
    model = EncoderDecoderConfig(layers=1, width=8, heads=2, positions="sinusoidal")
    rows = {"gpt2": gpt2, "seq2seq": dataclasses.replace(gpt2, model=model, objective=objectives.PrefixLM())}
    assert device_report.by_contenders(rows, ("lmobj", "eager")) == {
        ("lmobj", "eager"): {"gpt2": rows["gpt2"]},
        ("lmobj",): {"seq2seq": rows["seq2seq"]},
    }
    assert "seq2seq has no peer: model.name is encoder_decoder" in capsys.readouterr().err
    assert device_report.by_contenders(rows, ("eager",)) == {("eager",): {"gpt2": rows["gpt2"]}}
    assert device_report.by_contenders(rows, ("lmobj",)) == {("lmobj",): rows}


def test_words_that_name_nothing(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert device_report.main(["--only", "nothing", "--out", str(tmp_path / "report")], child=here) == 1
    assert "--only nothing" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_every_experiment_of_the_list_loads(platform: str) -> None:
    found = device_speed.workloads(platform)
    assert all(experiment.train.accumulate == 1 for experiment in found.values())
    if platform != "cpu":
        lengths = {name: experiment.data.length for name, experiment in found.items()}
        assert {lengths["decoder_1b"], lengths["decoder_1b, 4k"]} == {2048, 4096}
        assert {lengths[name] for name in ("bert_base", "electra_base", "xlnet_base")} == {512}
        assert {experiment.model.dtype for experiment in found.values()} == {"bfloat16"}
