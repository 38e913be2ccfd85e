"""What `device_report` measures: training steps of lmobj beside Transformers in PyTorch, and the device's own ceiling.

A step is what training takes: forward, backward and AdamW's update, on the same tokens, with the same dropout, in the
same dtype (bfloat16: parameters and moments in float32), from the same weights where lmobj reads the family's
checkpoints. Each takes the step its own way. lmobj compiles the trainer's step, which corrupts the tokens anew for
masked LM and runs the vocabulary head on the predicted positions alone. PyTorch gets inputs corrupted in advance and
takes Transformers' defaults: the head on every position, SDPA attention, and the fused AdamW of its `Trainer`.

Contenders take turns, and a ratio is that of one turn, so that other load on the machine falls on all of them.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lmobj import noise
from lmobj.batch import Vocabulary
from lmobj.config import Experiment
from lmobj.data import DataConfig
from lmobj.interop import bert, gpt2
from lmobj.models import DecoderConfig, EncoderConfig
from lmobj.objectives import CausalLM, Context, MaskedLM, step_keys
from lmobj.train import TrainConfig
from lmobj.train.assemble import Design, design
from lmobj.train.optimizers import AdamW
from lmobj.train.plan import make_plan
from lmobj.train.schedules import ConstantSchedule
from lmobj.train.sharding import MeshConfig, make_mesh

__all__ = ["FLOPS", "WORKLOADS", "Workload", "matmul_ceiling", "measure"]

DTypeName = Literal["float32", "bfloat16"]
CONTENDERS = ("lmobj", "eager", "compiled")
BATCHES = 4
"""Different batches, taken in turn."""
WARMUP = 3
TURN_SECONDS = 1.5
"""A turn is as many steps as fit in this time, at least two."""

FLOPS = (
    "model FLOPs of a step = tokens x (6 x weights in matrix products + 12 x layers x width x length, halved for "
    "causal attention); the vocabulary head counts for predicted tokens only, recomputation for nothing"
)
DATASHEET = {
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
}
"""Dense bfloat16 FLOP/s by jax's `device_kind`, as the makers state them; utilisation is told for these alone."""


@dataclass(frozen=True)
class Family:
    """A model in Transformers' terms and in lmobj's.

    interop: reads Transformers' weights; None where lmobj does not yet: each side then draws its own.
    """

    model: str
    settings: str
    objective: CausalLM | MaskedLM
    config: Callable[[Mapping[str, Any]], DecoderConfig | EncoderConfig]
    interop: Any = None


def _llama(settings: Mapping[str, Any]) -> DecoderConfig:
    return DecoderConfig(
        layers=settings["num_hidden_layers"],
        width=settings["hidden_size"],
        heads=settings["num_attention_heads"],
        kv_heads=settings["num_key_value_heads"],
        mlp_width=settings["intermediate_size"],
        max_length=settings["max_position_embeddings"],
        positions="rotary",
        norm="rmsnorm",
        activation="swiglu",
        bias=False,
        tie_embeddings=False,
    )


FAMILIES = {
    "bert": Family("BertForMaskedLM", "BertConfig", MaskedLM(), bert.config_from_hf, bert),
    "gpt2": Family("GPT2LMHeadModel", "GPT2Config", CausalLM(), gpt2.config_from_hf, gpt2),
    "llama": Family("LlamaForCausalLM", "LlamaConfig", CausalLM(), _llama),
}


@dataclass(frozen=True)
class Workload:
    """A model to train on so many rows of so many tokens, and the platforms that it is for."""

    family: str
    rows: int
    length: int
    dtype: DTypeName
    platforms: tuple[str, ...]
    settings: Mapping[str, Any]


def _bert(width: int, layers: int, vocab: int, length: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64, "vocab_size": vocab}
    return {**sizes, "intermediate_size": 4 * width, "max_position_embeddings": length, **more}


def _gpt2(width: int, layers: int, heads: int, vocab: int, length: int, dropout: float) -> dict[str, Any]:
    sizes = {"n_embd": width, "n_layer": layers, "n_head": heads, "vocab_size": vocab, "n_positions": length}
    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    return {**sizes, **rates, "bos_token_id": 0, "eos_token_id": 0}


def _llama_sizes(width: int, layers: int, heads: int, kv: int, mlp: int, vocab: int, length: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": vocab}
    return {**sizes, "num_key_value_heads": kv, "intermediate_size": mlp, "max_position_embeddings": length}


CPU, ACCELERATORS = ("cpu",), ("gpu", "tpu")
WORKLOADS: dict[str, Workload] = {
    "bert_5m": Workload("bert", 16, 128, "float32", CPU, _bert(256, 4, 8192, 128)),
    "gpt2_3m": Workload("gpt2", 16, 128, "float32", CPU, _gpt2(192, 4, 6, 4096, 128, 0.1)),
    "decoder_5m": Workload("llama", 8, 256, "float32", CPU, _llama_sizes(256, 4, 4, 2, 704, 4096, 256)),
    "bert_base": Workload("bert", 32, 512, "bfloat16", ACCELERATORS, _bert(768, 12, 30522, 512)),
    "gpt2_124m": Workload("gpt2", 16, 1024, "bfloat16", ACCELERATORS, _gpt2(768, 12, 12, 50257, 1024, 0.0)),
    "decoder_1b": Workload(
        "llama", 4, 2048, "bfloat16", ACCELERATORS, _llama_sizes(2048, 22, 32, 4, 5632, 32000, 2048)
    ),
}
"""A model gets its row by a line here. BERT's dropout is the default of 0.1, in attention too, which cuDNN lacks."""


@dataclass
class Result:
    """What was seen of one contender; None where there is nothing to tell."""

    contender: str
    error: str | None = None
    compile_seconds: float | None = None
    """lmobj: of the compiler alone; PyTorch: of the first step, which compiles."""
    first_loss: float | None = None
    step_seconds: list[float] = dataclasses.field(default_factory=list)
    turn_seconds: list[float] = dataclasses.field(default_factory=list)
    """Mean step of each turn."""
    peak_bytes: int | None = None
    """Most memory that the device's allocator had in use for it; CPUs do not tell."""
    planned_bytes: int | None = None
    """What the compiled program says it takes: state, batch and temporaries."""
    attention: str = ""
    """Which attention it took."""


class Bench:
    """One workload: the same batches, and where lmobj reads them the same weights, for every contender."""

    def __init__(self, workload: Workload) -> None:
        self.workload, self.family = workload, FAMILIES[workload.family]
        self.vocab = Vocabulary(size=workload.settings["vocab_size"], pad=0, cls=1, sep=2, mask=3)
        config = dataclasses.replace(self.family.config(workload.settings), dtype=workload.dtype)
        flash = workload.dtype == "bfloat16" and not config.attention_dropout and jax.default_backend() == "gpu"
        self.config = dataclasses.replace(config, attention_backend="cudnn" if flash else "xla")
        optimizer = AdamW(schedule=ConstantSchedule(peak=1e-4), weight_decay=0.01, clip_norm=None)
        self.design: Design = design(
            Experiment(
                data=DataConfig(length=workload.length),
                model=self.config,
                objective=self.family.objective,
                train=TrainConfig(steps=1, batch_size=workload.rows, optimizer=optimizer),
            ),
            self.vocab,
            mesh=make_mesh(MeshConfig(data=1), jax.devices()[:1]),
        )
        self.batches = [self._batch(i) for i in range(BATCHES)]
        self._theirs: Any = None

    def _batch(self, index: int) -> dict[str, Any]:
        """Whole rows of random tokens, one document each."""
        rows, length = self.workload.rows, self.workload.length
        rng = np.random.default_rng(index)
        batch = {name: np.ones(x.shape, x.dtype) for name, x in self.design.abstract_batch.items()}
        return batch | {
            "tokens": rng.integers(4, self.vocab.size, (rows, length), np.int32),
            "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
            "row_ids": np.stack([np.full(rows, index), np.arange(rows)], axis=1).astype(np.int32),
        }

    @property
    def theirs(self) -> Any:
        """Transformers' model, on the CPU."""
        if self._theirs is None:
            import torch
            import transformers

            torch.manual_seed(0)
            settings = getattr(transformers, self.family.settings)(**self.workload.settings)
            self._theirs = getattr(transformers, self.family.model)(settings)
        return self._theirs

    def flops(self) -> float:
        """Model FLOPs of a step (see `FLOPS`)."""
        config, rows, length = self.config, self.workload.rows, self.workload.length
        causal = isinstance(config, DecoderConfig)
        stack = self.design.abstract_state.params["model"]["stack"]
        matrices = sum(x.size for x in jax.tree.leaves(stack) if x.ndim == 3)  # [layers, in, out]
        head = config.width * self.vocab.size
        attention = 12 * config.layers * config.width * length / (2 if causal else 1)
        if causal:
            return rows * length * (6 * (matrices + head) + attention)
        predictions = rows * noise.prediction_count(length, MaskedLM().mask_rate)
        return rows * length * (6 * matrices + attention) + predictions * 6 * (head + config.width**2)

    def lmobj(self, result: Result, *, with_theirs: bool) -> Callable[[], float]:
        """lmobj's step as `train` takes it; with PyTorch's weights where it can read them."""
        plan = make_plan(self.design)
        result.compile_seconds, result.planned_bytes = plan.compile_seconds, plan.total
        result.attention = self.config.attention_backend
        state = self.design.initial_state()
        if with_theirs and self.family.interop is not None:
            tensors = {name: p.detach().numpy().copy() for name, p in self.theirs.named_parameters()}
            params = {"model": self.family.interop.to_lmobj(tensors, self.config)}
            state = state._replace(params=jax.device_put(params, self.design.shardings.params))
        batches = [self.design.on_devices(batch) for batch in self.batches]
        done = 0

        def step() -> float:
            nonlocal state, done
            state, metrics = plan.compiled(state, {}, batches[done % BATCHES])
            done += 1
            jax.block_until_ready(state)
            total, weight = jax.device_get(metrics["loss"])
            return float(total / weight)

        return step

    def torch(self, result: Result, *, compiled: bool) -> Callable[[], float]:
        """A plain PyTorch loop on the same device."""
        import torch

        device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            result.peak_bytes = -torch.cuda.memory_allocated()  # what contenders before it hold is not its own
        model = copy.deepcopy(self.theirs).to(device).train()
        result.attention = str(model.config._attn_implementation)
        groups = [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.01},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
        forward: Any = torch.compile(model) if compiled else model
        half = self.workload.dtype == "bfloat16"
        batches = [{key: torch.from_numpy(x).to(device) for key, x in batch.items()} for batch in self._corrupted()]
        done = 0

        def step() -> float:
            nonlocal done
            with torch.autocast(device, dtype=torch.bfloat16, enabled=half):
                loss = forward(**batches[done % BATCHES]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done += 1
            return float(loss.item())  # waits for the device

        return step

    def _corrupted(self) -> list[dict[str, Any]]:
        """The batches as Transformers takes them: `labels` are -100 where nothing is predicted."""
        batches = []
        for batch in self.batches:
            tokens = batch["tokens"].astype(np.int64)
            if not isinstance(self.family.objective, MaskedLM):
                batches.append({"input_ids": tokens, "labels": tokens})
                continue
            keys, model_keys = step_keys(jax.random.key(0, impl="threefry2x32"), jnp.asarray(batch["row_ids"]), 0)
            arrays = {name: jnp.asarray(x) for name, x in batch.items()}
            example = self.family.objective.corrupt(keys, arrays, Context(model_keys, 0, self.vocab))
            labels = np.full(tokens.shape, -100, np.int64)
            rows, slots = np.nonzero(np.asarray(example.weights))
            labels[rows, np.asarray(example.predict)[rows, slots]] = np.asarray(example.targets)[rows, slots]
            batches.append({"input_ids": np.asarray(example.inputs, np.int64), "labels": labels})
        return batches


def measure(
    workload: Workload, contenders: tuple[str, ...], rounds: int, seconds: float = TURN_SECONDS
) -> dict[str, Any]:
    """One workload's row: every contender's steps, and what follows from them."""
    bench = Bench(workload)
    with_theirs = len(contenders) > 1
    if with_theirs:
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    results, running = [], []
    for name in contenders:
        result = Result(name)
        results.append(result)
        start = time.perf_counter()
        try:
            if name == "lmobj":
                step = bench.lmobj(result, with_theirs=with_theirs)
            else:
                step = bench.torch(result, compiled=name == "compiled")
                start = time.perf_counter()
            result.first_loss = step()
            if name == "compiled":
                result.compile_seconds = time.perf_counter() - start
            for _ in range(WARMUP):
                step()
        except (
            Exception
        ) as error:  # out of memory, or a compiler that is absent or refuses the model: told in the table
            result.error = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
            print(f"{name} failed: {result.error}", file=sys.stderr, flush=True)
            continue
        _add_peak(result)
        start = time.perf_counter()
        step()
        running.append((result, step, max(2, round(seconds / (time.perf_counter() - start)))))
    for turn in range(rounds):
        for result, step, count in running[turn % len(running) :] + running[: turn % len(running)]:
            first = len(result.step_seconds)
            for _ in range(count):
                start = time.perf_counter()
                step()
                result.step_seconds.append(time.perf_counter() - start)
            result.turn_seconds.append(statistics.fmean(result.step_seconds[first:]))
    return _row(bench, results)


def _add_peak(result: Result) -> None:
    """The most bytes that the contender's allocator had in use for it, where it tells."""
    if result.contender == "lmobj":
        result.peak_bytes = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    elif result.peak_bytes is not None:
        import torch

        result.peak_bytes += torch.cuda.max_memory_allocated()


def _row(bench: Bench, results: list[Result]) -> dict[str, Any]:
    workload, flops = bench.workload, bench.flops()
    tokens = workload.rows * workload.length
    peak = DATASHEET.get(jax.devices()[0].device_kind) if workload.dtype == "bfloat16" else None
    ours = next((r for r in results if r.contender == "lmobj" and r.error is None), None)
    rows = []
    for result in results:
        row = dataclasses.asdict(result)
        if result.error is None:
            median = statistics.median(result.step_seconds)
            row |= {
                "median_step_seconds": median,
                "step_seconds_10_90": [float(x) for x in np.percentile(result.step_seconds, [10, 90])],
                "tokens_per_second": tokens / median,
                "model_flops_per_second": flops / median,
                "utilisation": None if peak is None else flops / median / peak,
            }
            if ours is not None and result is not ours:
                ratios = [b / a for a, b in zip(ours.turn_seconds, result.turn_seconds, strict=True)]
                row["lmobj_over_it"] = statistics.median(ratios)
        rows.append(row)
    return {
        "family": workload.family,
        "parameters": bench.design.parameter_count,
        "rows": workload.rows,
        "length": workload.length,
        "dtype": workload.dtype,
        "dropout": bench.config.dropout,
        "model_flops": flops,
        "contenders": rows,
    }


def matmul_ceiling(dtype: str, sizes: tuple[int, ...], repeats: int = 5) -> dict[str, Any]:
    """The most FLOP/s that products of two square matrices reach, over several sizes."""
    best: dict[str, Any] = {"dtype": dtype, "size": 0, "flops_per_second": 0.0}
    for size in sizes:
        count = max(2, round(2e11 / (2 * size**3)) if jax.default_backend() == "cpu" else 20)
        right = jax.random.normal(jax.random.key(0), (size, size), dtype) / jnp.asarray(size**0.5, dtype)
        product = jax.jit(lambda x, right=right, count=count: jax.lax.fori_loop(0, count, lambda _, y: y @ right, x))
        x = jax.block_until_ready(product(right))
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(product(x))
            speed = 2 * size**3 * count / (time.perf_counter() - start)
            if speed > best["flops_per_second"]:
                best = {"dtype": dtype, "size": size, "flops_per_second": speed}
    return best
