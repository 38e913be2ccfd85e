"""lmobj.speed: rows are what objectives read, steps are timed in turns, what fails costs a row, peers do the same."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from lmobj.batch import RowSpec, Vocabulary
from lmobj.cli import main
from lmobj.config import Experiment, load
from lmobj.errors import UserError
from lmobj.models import EncoderDecoderConfig
from lmobj.objectives import PrefixLM
from lmobj.speed import _measure, check_peer, measure, measure_each, notes, speed_rows, synthetic_batch
from lmobj.speed._ours import Pending
from lmobj.train.assemble import Design, design
from lmobj.train.plan import planned_vocabulary
from tests.styles import BART
from tests.train.tiny_runs import quick_compilation

_CONFIGS = pathlib.Path(__file__).parent.parent.parent / "configs"
TINY = sorted((_CONFIGS / "tiny").glob("*.yaml"))
VOCAB = Vocabulary(12, pad=0, unk=1, bos=2, eos=3, cls=4, sep=5, mask=6)


def tiny(name: str, *overrides: str) -> Experiment:
    return load(_CONFIGS / "tiny" / f"{name}.yaml", ["train.mesh.data=1", "train.batch_size=4", *overrides])


# --- rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", TINY, ids=lambda path: path.stem)
def test_batches_have_the_arrays_that_a_run_has(path: pathlib.Path) -> None:
    config = load(path, ["train.mesh.data=1"])
    parts = design(config, planned_vocabulary(config.data.tokenizer))
    batch = _measure._batch(parts, 1)
    of = jax.tree.map(lambda x: (x.shape, x.dtype), batch)
    assert of == jax.tree.map(lambda x: (x.shape, x.dtype), dict(parts.abstract_batch))


def test_special_tokens_stand_where_the_rows_put_them() -> None:
    packed = synthetic_batch(RowSpec("packed", 6, prefix=(4,), suffix=(5,)), 3, VOCAB, 0)
    assert packed["tokens"][:, [0, 5]].tolist() == [[4, 5]] * 3
    assert packed["tokens"][:, 1:5].min() > 6, "ordinary tokens are those after the special ones"
    pairs = synthetic_batch(RowSpec("pairs", 9, prefix=(4,), suffix=(5,)), 2, VOCAB, 0)
    assert (pairs["tokens"][0] == 5).tolist() == [False] * 4 + [True] + [False] * 3 + [True]
    assert pairs["token_types"].tolist() == [[0] * 5 + [1] * 4] * 2
    spec = RowSpec("stream_pairs", 9, suffix=(5, 4), reuse=2, fields=("word_starts", "token_bytes"), bidirectional=True)
    stream = synthetic_batch(spec, 4, VOCAB, 0)
    assert np.isin(stream["tokens"][0], (4, 5)).tolist() == [False] * 4 + [True] + [False] * 2 + [True, True]
    assert stream["token_types"][0].tolist() == [0] * 5 + [1] * 3 + [2]
    assert stream["backward"].tolist() == [False, False, True, True]
    assert ((stream["token_bytes"] == 0) == np.isin(stream["tokens"], (4, 5))).all()
    tagged = synthetic_batch(RowSpec("tagged", 6, (4,), (5,), ("tags",)), 3, VOCAB, 0)
    assert tagged["tokens"][:, [0, 5]].tolist() == [[4, 5]] * 3
    assert ((tagged["tags"] == -1) == np.isin(tagged["tokens"], (4, 5))).all()
    assert set(tagged["tags"].flat) == {-1, 0, 1}
    questions = synthetic_batch(RowSpec("questions", 9, (4,), (5,), ("spans",)), 8, VOCAB, 0)
    assert questions["token_types"].tolist() == [[0] * 5 + [1] * 4] * 8
    assert set(questions["spans"].flat) <= {5, 6, 7}, "answers are in the second text"
    assert (np.diff(questions["spans"]) >= 0).all()
    other = synthetic_batch(RowSpec("packed", 6, prefix=(4,), suffix=(5,)), 3, VOCAB, 1)
    assert (other["tokens"] != packed["tokens"]).any()


# --- turns --------------------------------------------------------------------------------------------------------


class Steps:
    """Steps that take a second each on a clock of its own, on a device that works while the next is queued."""

    compile_seconds, planned_bytes, attention = 2.0, 7, "none"

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, queues: bool) -> None:
        self.queues, self.now, self.free, self.log = queues, 0.0, 0.0, ""
        monkeypatch.setattr(_measure.time, "perf_counter", lambda: self.now)

    def step(self) -> Pending:
        self.log += "s"
        self.free = max(self.free, self.now) + 1
        end = self.free
        if not self.queues:
            self.now = end

        def wait() -> None:
            self.log += "w"
            self.now = max(self.now, end)

        return Pending(wait, lambda: 0.5)

    def peak_bytes(self) -> None:
        return None


@pytest.mark.parametrize(("queues", "order"), [(True, "sswsww"), (False, "swswsw")])
def test_the_next_step_is_queued_while_one_runs(monkeypatch: pytest.MonkeyPatch, queues: bool, order: str) -> None:
    steps, seen = Steps(monkeypatch, queues=queues), _measure.Seen("lmobj")
    _measure._turn(seen, steps, 3)
    assert steps.log == order
    assert seen.step_seconds == [1.0, 1.0, 1.0]
    assert seen.turn_seconds == [1.0]


@pytest.mark.parametrize(
    ("steps", "counts"), [(1, [1]), (3, [3]), (7, [3, 2, 2]), (9 * 4, [4] * 9), (38, [5, 5, *[4] * 7])]
)
def test_steps_are_shared_among_turns(steps: int, counts: list[int]) -> None:
    assert _measure._shared(steps, 9) == counts


# --- what fails ---------------------------------------------------------------------------------------------------


def test_out_of_memory_halves_the_rows_and_the_others_go_on() -> None:
    tried: list[tuple[str, int]] = []

    def child(call: Any) -> dict[str, Any]:
        (config, _), rows = call.args, call.args[0].train.batch_size
        tried.append((config.objective.name, rows))
        return {"contenders": [{"out_of_memory": config.objective.name == "causal_lm" and rows > 2}]}

    given = {"a": tiny("causal_lm", "train.batch_size=8"), "b": tiny("masked_lm")}
    found = measure_each(given, fewer_rows=True, child=child)
    assert list(found) == ["a", "a, 4 rows", "a, 2 rows", "b"]
    assert tried == [("causal_lm", 8), ("causal_lm", 4), ("causal_lm", 2), ("masked_lm", 4)]
    assert list(measure_each(given, child=child)) == ["a", "b"], "only where it is asked for"
    # Microbatches of one row cannot be halved.
    given = {"a": tiny("causal_lm", "train.batch_size=8", "train.accumulate=8")}
    assert list(measure_each(given, fewer_rows=True, child=child)) == ["a"]


def test_a_mistake_in_one_of_several_is_told_in_its_row() -> None:
    def child(call: Any) -> dict[str, Any]:
        if call.args[0].objective.name == "masked_lm":
            raise UserError("data.length is 1")
        return {"contenders": []}

    bad = {"bad": tiny("masked_lm")}
    assert measure_each({**bad, "good": tiny("causal_lm")}, child=child)["bad"] == {"error": "data.length is 1"}
    with pytest.raises(UserError, match=r"data\.length is 1"):
        measure_each(bad, child=child)


def test_memory_that_runs_out_is_told_in_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: Any) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12345 bytes.")

    monkeypatch.setattr(Design, "initial_state", exhausted)
    with quick_compilation():
        found = measure(tiny("causal_lm_gru"), steps=2)
    (row,) = found["contenders"]
    assert row["out_of_memory"]
    assert "The cheapest change is train.accumulate=2" in row["error"]
    (cells,) = speed_rows("gru", found)
    assert cells[1] == "lmobj"
    assert cells[2].startswith("failed: OutOfMemory")


# --- measuring ----------------------------------------------------------------------------------------------------


def test_a_measurement_over_a_mesh() -> None:
    with quick_compilation():
        found = measure(tiny("causal_lm_gru", "train.mesh={data: 1, fsdp: 2}"), steps=6)
    (row,) = found["contenders"]
    assert row["error"] is None
    assert found["mesh"] == {"fsdp": 2}
    assert found["devices"] == 2
    assert len(row["step_seconds"]) == 6
    assert len(row["turn_seconds"]) == 3
    assert row["tokens_per_second"] == pytest.approx(4 * 64 / np.median(row["step_seconds"]))
    assert row["model_flops_per_second"] == pytest.approx(found["model_flops"] / np.median(row["step_seconds"]))
    # Untrained, it guesses among 2,048 pieces.
    assert row["first_loss"] == pytest.approx(np.log(2048), abs=0.2)
    assert row["peak_bytes"] is None
    assert row["planned_bytes"] > 0
    told = " ".join(notes([found]))
    assert "On 2 x cpu (cpu)." in told
    assert "do not tell how much memory was in use" in told
    assert "MFU = model FLOPs" in told


@pytest.mark.slow
def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(_CONFIGS)
    argv = ["speed", "tiny/causal_lm_gru.yaml", "train.batch_size=8", "--steps", "2"]
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (one,) = found["experiments"].values()
    assert (one["rows"], len(one["contenders"][0]["step_seconds"])) == (8, 2)
    assert "MFU = " in found["formula"]
    assert main(argv) == 0
    header, row, *_ = capsys.readouterr().out.splitlines()
    assert len(header.split("\t")) == len(row.split("\t"))
    assert row.startswith("tiny/causal_lm_gru.yaml, ")


# --- peers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["a=1"], ["no config", "YAML"]),
        (["tiny/span_boundary.yaml", "--peer", "transformers"], ["span_boundary", "no peer", "masked_lm"]),
        (["tiny/masked_lm.yaml", "--peer", "transformers"], ["model.positions is 'rotary'", "'learned'"]),
        (["tiny/causal_lm.yaml", "model.dropout=0.1", "--peer", "transformers"], ["model.dropout is 0.1", "llama"]),
        (["tiny/causal_lm_gru.yaml", "--peer", "transformers"], ["model.name is gru", "causal_lm on a decoder"]),
    ],
)
def test_refusals(
    argv: list[str], parts: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(_CONFIGS)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert main(["speed", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert all(part in err for part in parts), err


def test_a_peer_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else object())
    with pytest.raises(ValueError, match="needs torch, not installed here; run `pip install torch`"):
        check_peer(tiny("causal_lm"))


def _like_bert(name: str, *overrides: str) -> Experiment:
    return tiny(name, "model.positions=learned", "model.pre_norm=false", "model.init_std=0.2", *overrides)


def _like_gpt2() -> Experiment:
    config = tiny("causal_lm", "objective.documents=joined")
    plain: dict[str, Any] = {"positions": "learned", "norm": "layernorm", "activation": "gelu", "bias": True}
    model = dataclasses.replace(config.model, **plain, kv_heads=None, mlp_width=None, tie_embeddings=True, init_std=0.2)
    return dataclasses.replace(config, model=model)


def _seq2seq(**settings: Any) -> Experiment:
    """An encoder-decoder that writes how rows go on."""
    sizes: dict[str, Any] = {"layers": 2, "width": 32, "heads": 2, "mlp_width": 64, "max_length": 64, "init_std": 0.2}
    model = EncoderDecoderConfig(**{**sizes, "head_width": 8, **settings})
    return dataclasses.replace(tiny("causal_lm"), model=model, objective=PrefixLM())


@pytest.mark.parity
@pytest.mark.parametrize(
    ("make", "apart"),
    [
        pytest.param(_like_gpt2, 1e-4, id="gpt2"),
        # BERT's denominator has 1e-5 more.
        pytest.param(lambda: _like_bert("masked_lm"), 1e-3, id="bert", marks=pytest.mark.slow),
        # Slots that were drawn twice count twice in lmobj; the second loss is of samples that are drawn anew.
        pytest.param(
            lambda: _like_bert(
                "replaced_token_detection", "train.coefficients={disc: 0}", "objective.replacement=false"
            ),
            1e-3,
            id="electra",
            marks=pytest.mark.slow,
        ),
        # A memory that was never written is invisible in lmobj, and zeros for the peer.
        pytest.param(
            lambda: tiny("permutation_lm", "model.activation=gelu_exact", "model.memory_length=0"),
            1e-3,
            id="xlnet",
            marks=pytest.mark.slow,
        ),
        pytest.param(_seq2seq, 1e-4, id="t5", marks=pytest.mark.slow),
        pytest.param(lambda: _seq2seq(**BART), 1e-4, id="bart", marks=pytest.mark.slow),
        # LLaMA has weights of its own: both guess.
        pytest.param(lambda: tiny("causal_lm", "model.init_std=0.02"), 0.05, id="llama", marks=pytest.mark.slow),
    ],
)
def test_peers_begin_with_the_same_loss(make: Callable[[], Experiment], apart: float) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    with quick_compilation():
        row = measure(make(), ("lmobj", "eager"), steps=2)
    ours, theirs = row["contenders"]
    assert theirs["error"] is None
    assert ours["first_loss"] == pytest.approx(theirs["first_loss"], abs=apart)
    assert len(theirs["turn_ratios"]) == len(theirs["turn_seconds"]) == 1
    assert theirs["lmobj_over_it"] == pytest.approx(theirs["turn_seconds"][0] / ours["turn_seconds"][0])
