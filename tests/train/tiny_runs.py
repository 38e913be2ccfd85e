"""Tiny runs for the tests of training: one generated corpus, one small model of each kind, one schedule."""

from __future__ import annotations

import contextlib
import json
import pathlib
import random
from collections.abc import Iterator
from typing import Any, Literal

import jax
import numpy as np

from lmobj.config import Experiment
from lmobj.data import DataConfig, HeldOut, JsonLines, SentencePieceConfig, TextFiles
from lmobj.models import DecoderConfig, EncoderConfig
from lmobj.objectives import CausalLM, Classification, MaskedLM
from lmobj.train import TrainConfig
from lmobj.train.checkpoint import Checkpoints
from lmobj.train.optimizers import AdamW
from lmobj.train.schedules import ConstantSchedule
from lmobj.train.sharding import MeshConfig

STEPS = 12
"""Of every shared run. Evaluations at 3, 6, 9 and 12, checkpoints at 4, 8 and 12, of which the newest two are kept."""

PEAK = 3e-3
LENGTH = 16
DROPOUT: dict[str, Any] = {"dropout": 0.1, "attention_dropout": 0.1, "embedding_dropout": 0.1}

Kind = Literal["causal_lm", "masked_lm"]

_WORDS = {
    "noun": ["fox", "dog", "bird", "river", "stone", "house", "garden", "winter", "morning", "letter"],
    "verb": ["sees", "follows", "finds", "leaves", "forgets", "watches"],
    "adjective": ["quick", "lazy", "brown", "quiet", "old", "bright"],
}


@contextlib.contextmanager
def quick_compilation() -> Iterator[None]:
    """Compiles without most of the compiler's optimisations, in half the time, which is most of a tiny run's."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def write_corpus(path: pathlib.Path, documents: int = 160, seed: int = 0) -> pathlib.Path:
    """A file of blocks, each of a few plain sentences: enough order in them for a small model to find."""
    draw = random.Random(seed)

    def phrase() -> str:
        return f"the {draw.choice(_WORDS['adjective'])} {draw.choice(_WORDS['noun'])}"

    def block() -> str:
        return " ".join(
            f"{phrase()} {draw.choice(_WORDS['verb'])} {phrase()}{draw.choice('.!')}" for _ in range(draw.randint(2, 9))
        )

    path.write_text("\n\n".join(block() for _ in range(documents)) + "\n", encoding="utf-8")
    return path


def experiment(
    corpus: pathlib.Path,
    run: pathlib.Path | str,
    kind: Kind = "causal_lm",
    *,
    data: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    **changes: Any,
) -> Experiment:
    """A run of `STEPS` steps with dropout on, prepared data kept beside the corpus; the rest are changes to it."""
    builder = {"causal_lm": DecoderConfig, "masked_lm": EncoderConfig}[kind]
    objective = {"causal_lm": CausalLM(), "masked_lm": MaskedLM()}[kind]
    settings: dict[str, Any] = {
        "name": "tiny",
        "run": str(run),
        "data": DataConfig(
            **{
                "source": TextFiles(files=(str(corpus),), documents="blocks"),
                "tokenizer": SentencePieceConfig(vocab_size=320),
                "length": LENGTH,
                "validation": 0.15,
                "cache": str(corpus.parent / "cache"),
                **(data or {}),
            }
        ),
        "model": builder(**{"layers": 2, "width": 16, "heads": 4, "max_length": 32, **DROPOUT, **(model or {})}),
        "objective": objective,
        "train": TrainConfig(
            **{
                "steps": STEPS,
                "batch_size": 8,
                "optimizer": AdamW(schedule=ConstantSchedule(peak=PEAK, warmup_steps=4)),
                "log_every": 1,
                "evaluate_every": 3,
                "evaluate_batches": 2,
                "checkpoint_every": 4,
                **(train or {}),
            }
        ),
        "sample": {"causal_lm": ("the quick",), "masked_lm": ("the quick [MASK] sees",)}[kind],
    }
    return Experiment(**{**settings, **changes})


def labelled_rows(count: int) -> list[dict[str, object]]:
    """Pairs of texts, of which many are longer than a row, labelled by whether a word is in the first."""
    words = [("sun", "dry") if i % 3 else ("rain", "wet") for i in range(count)]
    return [
        {"a": f"{word} " * (i % 9 + 1), "b": "word " * (i % 5 + 1), "y": label} for i, (word, label) in enumerate(words)
    ]


def classification(folder: pathlib.Path) -> Experiment:
    """A run of classification of such rows, of which it writes 80 to train on and 11 to be evaluated on."""
    for name, count in (("train", 80), ("dev", 11)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled_rows(count)))
    return Experiment(
        run=str(folder / "run"),
        data=DataConfig(
            source=JsonLines(files=(str(folder / "train.jsonl"),), text="a", pair="b", label="y"),
            tokenizer=SentencePieceConfig(vocab_size=280),
            validation=HeldOut(files=(str(folder / "dev.jsonl"),)),
            test=0.0,
            length=12,
            cache=str(folder / "cache"),
        ),
        model=EncoderConfig(layers=1, width=16, heads=2, max_length=12),
        objective=Classification(),
        train=TrainConfig(steps=30, batch_size=4, mesh=MeshConfig(data=1)),
    )


def metric_lines(run: pathlib.Path) -> list[dict[str, float | None]]:
    """The lines of metrics.jsonl without `perf/...`, which no two runs share."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in lines]


def stored_bits(run: pathlib.Path, abstract_state: Any, step: int = STEPS) -> dict[str, bytes]:
    """The bytes of every array of a run's checkpoint, the optimizer's included, by path."""
    with Checkpoints(run / "checkpoints") as checkpoints:
        state = checkpoints.restore(abstract_state, step=step).state
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}
