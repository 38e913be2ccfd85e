"""Measures training throughput on CPU of lmobj beside Transformers in PyTorch, eager and compiled.

    python tools/measure_throughput.py                        both models, some minutes (PyTorch compiles for one)
    python tools/measure_throughput.py --model gpt2 --skip compiled --rounds 9

A step is what training takes: forward, backward and AdamW's update, in float32, with dropout 0.1 on embeddings,
attention probabilities and residuals, from the same weights on the same tokens. Each takes the step its own way. lmobj
takes `train.step.Program`'s, which corrupts the tokens anew for masked LM and runs the vocabulary head on the predicted
positions alone. PyTorch gets inputs corrupted in advance and takes Transformers' defaults: the head on every position,
SDPA attention, and the fused AdamW of its `Trainer`.

Contenders take turns, and a ratio is that of one turn, so that other load on the machine falls on all of them; the
ratio shown is the median over rounds. The last line of the output holds everything as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

BATCH, LENGTH, DROPOUT = 16, 128, 0.1
CONTENDERS = ("lmobj", "eager", "compiled")
BATCHES = 4
"""Different batches, taken in turn."""
WARMUP = 3
TURN_SECONDS = 1.5
"""A turn is as many steps as fit in this time, at least two."""

Steps = Callable[[int], float]
"""Takes a number of steps and returns the last one's loss."""


@dataclass(frozen=True)
class Workload:
    """A model to train, in Transformers' terms."""

    name: str
    settings: Mapping[str, Any]


WORKLOADS = {
    "bert": Workload(
        "bert",
        {
            "vocab_size": 8192,
            "hidden_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 1024,
            "max_position_embeddings": LENGTH,
            "hidden_dropout_prob": DROPOUT,
            "attention_probs_dropout_prob": DROPOUT,
        },
    ),
    "gpt2": Workload(
        "gpt2",
        {
            "vocab_size": 4096,
            "n_embd": 192,
            "n_layer": 4,
            "n_head": 6,
            "n_positions": LENGTH,
            "resid_pdrop": DROPOUT,
            "embd_pdrop": DROPOUT,
            "attn_pdrop": DROPOUT,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    ),
}


class Bench:
    """One workload: the same weights and batches for every contender."""

    def __init__(self, workload: Workload) -> None:
        import numpy as np
        import torch
        import transformers

        from lmobj.batch import Vocabulary
        from lmobj.interop import bert, gpt2
        from lmobj.objectives import CausalLM, MaskedLM

        torch.manual_seed(0)
        self.masked = workload.name == "bert"
        if self.masked:
            self.theirs: Any = transformers.BertForMaskedLM(transformers.BertConfig(**workload.settings))
        else:
            self.theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**workload.settings))
        self.objective = MaskedLM() if self.masked else CausalLM()
        interop: Any = bert if self.masked else gpt2
        self.config = interop.config_from_hf(self.theirs.config.to_dict())
        tensors = {name: p.detach().numpy().copy() for name, p in self.theirs.named_parameters()}
        self.params = {"model": interop.to_lmobj(tensors, self.config)}
        self.parameter_count = sum(tensor.size for tensor in tensors.values())
        self.vocab = Vocabulary(size=workload.settings["vocab_size"], pad=0, cls=1, sep=2, mask=3)
        rng = np.random.default_rng(0)
        self.batches: list[dict[str, Any]] = [
            {
                "tokens": rng.integers(4, self.vocab.size, (BATCH, LENGTH), np.int32),
                "segment_ids": np.ones((BATCH, LENGTH), np.int32),
                "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (BATCH, LENGTH)),
                "row_ids": np.stack([np.full(BATCH, i), np.arange(BATCH)], axis=1).astype(np.int32),
            }
            for i in range(BATCHES)
        ]

    def contender(self, name: str) -> Steps:
        """Makes a contender, weights reset."""
        return self.lmobj() if name == "lmobj" else self.torch(compiled=name == "compiled")

    def lmobj(self) -> Steps:
        """lmobj's step as `train` takes it."""
        import jax
        from flax import nnx

        from lmobj.train.optimizers import AdamW, make_optimizer
        from lmobj.train.schedules import ConstantSchedule, make_schedule
        from lmobj.train.sharding import logical_axes
        from lmobj.train.step import Program

        model = nnx.eval_shape(lambda: self.config.build(self.vocab, nnx.Rngs(params=0)))
        settings = AdamW(schedule=ConstantSchedule(peak=1e-4), weight_decay=0.01, clip_norm=None)
        program = Program(
            objective=self.objective,
            graphs={"model": nnx.split(model)[0]},
            vocab=self.vocab,
            optimizer=make_optimizer(
                settings, make_schedule(settings.schedule, 1), logical_axes={"model": logical_axes(model)}
            ),
            coefficients={"nll": lambda step: jax.numpy.ones(())},
            seed=0,
        )
        step = jax.jit(program.train_step, donate_argnums=0)
        state = program.init(jax.tree.map(jax.numpy.asarray, self.params), BATCH)
        done = 0

        def take(count: int) -> float:
            nonlocal state, done
            metrics: Any = None
            for _ in range(count):
                state, metrics = step(state, {}, self.batches[done % BATCHES])
                done += 1
            return float(metrics["loss"][0] / metrics["loss"][1])

        return take

    def torch(self, *, compiled: bool) -> Steps:
        """A plain PyTorch loop."""
        import copy

        import torch

        model = copy.deepcopy(self.theirs).train()
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim == 1]
        groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
        forward: Any = torch.compile(model) if compiled else model
        batches = [{key: torch.from_numpy(x) for key, x in batch.items()} for batch in self.corrupted()]
        done = 0

        def take(count: int) -> float:
            nonlocal done
            loss: Any = None
            for _ in range(count):
                loss = forward(**batches[done % BATCHES]).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                done += 1
            return float(loss.item())

        return take

    def corrupted(self) -> list[dict[str, Any]]:
        """The batches as Transformers takes them: `labels` are -100 where nothing is predicted."""
        import jax
        import numpy as np

        from lmobj.objectives import Context, step_keys

        batches = []
        for batch in self.batches:
            tokens = batch["tokens"].astype(np.int64)
            if not self.masked:
                batches.append({"input_ids": tokens, "labels": tokens})
                continue
            keys, model_keys = step_keys(jax.random.key(0, impl="threefry2x32"), jax.numpy.asarray(batch["row_ids"]), 0)
            arrays = {name: jax.numpy.asarray(x) for name, x in batch.items()}
            example = self.objective.corrupt(keys, arrays, Context(model_keys, 0, self.vocab))
            labels = np.full(tokens.shape, -100, np.int64)
            rows, slots = np.nonzero(np.asarray(example.weights))
            labels[rows, np.asarray(example.predict)[rows, slots]] = np.asarray(example.targets)[rows, slots]
            batches.append({"input_ids": np.asarray(example.inputs, np.int64), "labels": labels})
        return batches


@dataclass
class Result:
    """What was seen of one contender."""

    contender: str
    compile_seconds: float | None = None
    first_loss: float | None = None
    tokens_per_second: list[float] = dataclasses.field(default_factory=list)
    error: str | None = None


def measure(workload: Workload, contenders: list[str], rounds: int) -> tuple[list[Result], int]:
    """Every contender's tokens per second in each round, and the number of parameters."""
    bench = Bench(workload)
    results, running = [], []
    for name in contenders:
        result = Result(name)
        results.append(result)
        start = time.perf_counter()
        try:
            take = bench.contender(name)
            result.first_loss = take(1)
        except Exception as error:  # the compiler may be absent or refuse the model: told in the table
            result.error = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            print(f"{workload.name} {name} failed: {result.error}", file=sys.stderr, flush=True)
            continue
        result.compile_seconds = time.perf_counter() - start
        take(WARMUP)
        running.append((result, take, steps_per_turn(take)))
    for turn in range(rounds):
        for result, take, count in running[turn % len(running) :] + running[: turn % len(running)]:
            start = time.perf_counter()
            take(count)
            result.tokens_per_second.append(count * BATCH * LENGTH / (time.perf_counter() - start))
    return results, bench.parameter_count


def steps_per_turn(take: Steps) -> int:
    """How many steps fit in a turn."""
    start = time.perf_counter()
    take(2)
    return max(2, round(TURN_SECONDS * 2 / (time.perf_counter() - start)))


def summary(workload: Workload, results: list[Result], parameters: int) -> dict[str, Any]:
    """Prints the table of one workload and returns it."""
    print(
        f"\n{workload.name}: {parameters / 1e6:.1f} M parameters, batch {BATCH} x {LENGTH}, float32, dropout {DROPOUT}"
    )
    print(f"{'':<10} {'tokens/s':>9} {'min':>9} {'max':>9} {'first loss':>11} {'first step, s':>14}   lmobj over it")
    ours = next((r for r in results if r.contender == "lmobj" and not r.error), None)
    rows = []
    for result in results:
        row: dict[str, Any] = {"contender": result.contender, "error": result.error}
        if result.error is not None:
            print(f"{result.contender:<10} failed: {result.error}")
        else:
            speeds = result.tokens_per_second
            row |= {
                "tokens_per_second": statistics.median(speeds),
                "rounds": speeds,
                "first_loss": result.first_loss,
                "first_step_seconds": result.compile_seconds,
            }
            line = f"{result.contender:<10} {statistics.median(speeds):>9.0f} {min(speeds):>9.0f} {max(speeds):>9.0f}"
            line += f" {result.first_loss:>11.4f} {result.compile_seconds:>14.1f}"
            if ours is not None and result is not ours:
                ratios = [a / b for a, b in zip(ours.tokens_per_second, speeds, strict=True)]
                row["lmobj_over_it"] = statistics.median(ratios)
                line += f"   {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(line, flush=True)
        rows.append(row)
    return {"model": workload.name, "parameters": parameters, "batch": BATCH, "length": LENGTH, "results": rows}


def limit_threads(threads: int | None) -> int:
    """Keeps the process on so many cores, so that XLA and PyTorch have as many threads; returns the number."""
    if not hasattr(os, "sched_getaffinity"):  # only Linux lets a process choose its cores
        if threads is not None:
            sys.exit(f"--threads is {threads}; accepted on this system: nothing, for all cores.")
        return os.cpu_count() or 1
    cores = sorted(os.sched_getaffinity(0))
    if threads is not None:
        if not 1 <= threads <= len(cores):
            sys.exit(f"--threads is {threads}; accepted: 1 to {len(cores)}.")
        os.sched_setaffinity(0, cores[:threads])
    return threads or len(cores)


def main() -> None:
    """Prints a table for each model, then everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=WORKLOADS, action="append", help="default: all")
    parser.add_argument("--skip", choices=CONTENDERS, action="append", default=[], help="leave a contender out")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contender (default: 9)")
    parser.add_argument("--threads", type=int, help="cores to use (default: all that the process has)")
    args = parser.parse_args()
    threads = limit_threads(args.threads)  # before the libraries start their threads

    import jax
    import torch
    import transformers

    torch.set_num_threads(threads)
    versions = {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    print(f"{threads} threads; {', '.join(f'{k} {v}' for k, v in versions.items())}; load {os.getloadavg()[0]:.1f}")
    contenders = [name for name in CONTENDERS if name not in args.skip]
    tables = [
        summary(WORKLOADS[name], *measure(WORKLOADS[name], contenders, args.rounds)) for name in args.model or WORKLOADS
    ]
    print(json.dumps({"threads": threads, "versions": versions, "models": tables}))


if __name__ == "__main__":
    main()
