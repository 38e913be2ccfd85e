"""Measures `linear_token_nll` against the NLL of full logits: memory, exactness, and what devices send each other.

    python tools/measure_linear_nll.py           memory and layouts (compiled only), exactness at a small size: minutes
    python tools/measure_linear_nll.py --full    exactness at full size too: 10 minutes on 2 cores, 8 GB

"temp" is `memory_analysis().temp_size_in_bytes` of the compiled value and gradient (of a weighted sum, with respect to
hidden states, table and bias), which counts neither arguments nor results. "sent" adds up the result sizes of the
collectives on one device, each times the trip count of the loops around it. Ends with exit code 1 if a limit is missed:
5% of the naive memory, values within 1e-6 of max(1, |logsumexp|), gradients within 2e-6 by norm, no all-gather.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding

from lmobj import losses, partition

TOKENS, WIDTH, VOCABULARIES = 8192, 1024, (131072, 128000)
MIB = 2**20
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
AXES = ("data", "fsdp", "tensor")

Arrays = tuple[Any, Any, Any, Any, Any]
"""hidden, table, bias, targets, weights."""


def blockwise(hidden: Any, table: Any, bias: Any, targets: Any) -> Any:
    """What is measured."""
    return losses.linear_token_nll(hidden, table, targets, bias=bias)


def naive(hidden: Any, table: Any, bias: Any, targets: Any) -> Any:
    """The same by full logits."""
    return losses.token_nll(hidden @ table.T + bias, targets)


def value_and_gradient(loss: Callable[..., Any]) -> Callable[..., Any]:
    """(nll, gradients) of the weighted sum of `loss`."""

    def weighted(hidden: Any, table: Any, bias: Any, targets: Any, weights: Any) -> Any:
        nll = loss(hidden, table, bias, targets)
        return jnp.sum(nll * weights), nll

    def run(*arrays: Any) -> Any:
        (_, nll), grads = jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True)(*arrays)
        return nll, grads

    return run


def shapes(vocab: int, shardings: tuple[Any, ...] = (None,) * 5, batch: tuple[int, ...] = (TOKENS,)) -> Arrays:
    """The arguments' shapes at full size."""
    sizes = ((*batch, WIDTH), (vocab, WIDTH), (vocab,), batch, batch)
    types = (jnp.float32, jnp.float32, jnp.float32, jnp.int32, jnp.float32)
    made = [jax.ShapeDtypeStruct(*x, sharding=s) for *x, s in zip(sizes, types, shardings, strict=True)]
    return made[0], made[1], made[2], made[3], made[4]


def temp_bytes(compiled: Any) -> int:
    """Temporary memory per device."""
    return int(compiled.memory_analysis().temp_size_in_bytes)


def memory() -> bool:
    """One device: temporary memory of both; whether the limit holds."""
    good = True
    print(f"\nMemory on one device: {TOKENS} tokens x {WIDTH} wide, float32, value and gradient")
    print(f"{'vocabulary':>10} {'naive MiB':>10} {'blockwise MiB':>14} {'ratio':>7}   (at most 5%)")
    for vocab in VOCABULARIES:
        full, blocks = (
            temp_bytes(jax.jit(value_and_gradient(f)).lower(*shapes(vocab)).compile()) for f in (naive, blockwise)
        )
        print(f"{vocab:>10} {full / MIB:>10.0f} {blocks / MIB:>14.0f} {blocks / full:>7.2%}")
        good &= blocks <= 0.05 * full
    return good


def sent_bytes(text: str) -> Mapping[str, int]:
    """Bytes that each kind of collective yields on one device in the compiled `text`, trip counts included."""
    computations = {m[1]: m[2] for m in re.finditer(r"^(?:ENTRY )?(%[\w.\-]+) \([^\n]*\{\n(.*?)^\}", text, re.M | re.S)}
    entry = re.search(r"^ENTRY (%[\w.\-]+)", text, re.M)
    assert entry is not None
    total: collections.Counter[str] = collections.Counter()

    def walk(name: str, times: int) -> None:
        for line in computations[name].splitlines():
            if called := re.search(r"(?:body|to_apply|calls)=(%[\w.\-]+)", line):
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                if " while(" in line and trips is None:
                    raise ValueError(f"a loop without a known trip count: {line.strip()[:200]}")
                if " while(" in line or " call(" in line:
                    walk(called[1], times * (int(trips[1]) if trips else 1))
            if found := re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", line):
                for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", found[1]):
                    total[found[2]] += times * BYTES[kind] * math.prod(int(d) for d in dims.split(",") if d)

    walk(entry[1], 1)
    return total


def layouts(vocab: int) -> bool:
    """Eight devices: memory and traffic of each layout, beside the partitioner alone; whether none gathers."""
    good = True
    print(f"\nEight devices: {TOKENS} tokens (8 rows of {TOKENS // 8}) x {WIDTH} x {vocab}; per device, MiB")
    print(f"{'data,fsdp,tensor':<17} {'table':<25} {'loss':<20} {'temp':>6}  sent")
    by_width = dict(partition.DEFAULT_RULES, batch=("data", "fsdp"))
    stored = {"vocab->tensor embed->fsdp": by_width, "vocab->tensor,fsdp": dict(by_width, vocab=("tensor", "fsdp"))}
    for shape in ((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (2, 4, 1)):
        mesh = jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3)
        for name, rules in stored.items():
            if name != "vocab->tensor embed->fsdp" and shape[1] == 1:
                continue  # the same as the line before
            for label, loss, active in (
                ("blockwise", blockwise, True),
                ("blockwise, no rules", blockwise, False),
                ("naive", naive, False),
            ):
                specs = [("batch",), ("vocab", "embed"), ("vocab",), ("batch",), ("batch",)]
                at = tuple(NamedSharding(mesh, partition.spec(axes, rules)) for axes in specs)
                with jax.set_mesh(mesh), partition.rules(rules) if active else contextlib.nullcontext():
                    run = jax.jit(value_and_gradient(loss), out_shardings=(at[3], at[:3]))
                    compiled = run.lower(*shapes(vocab, at, (8, TOKENS // 8))).compile()
                sent = sent_bytes(str(compiled.as_text()))
                good &= not (active and "all-gather" in sent)
                listed = ", ".join(f"{kind} {size / MIB:.0f}" for kind, size in sorted(sent.items()))
                where = f"{','.join(map(str, shape)):<17} {name:<25} {label:<20}"
                print(f"{where} {temp_bytes(compiled) / MIB:>6.0f}  {listed}", flush=True)
    return good


def inputs(tokens: int, width: int, vocab: int) -> Arrays:
    """Seeded arguments with logits of standard deviation about 2."""
    rng = np.random.default_rng(0)
    return (
        rng.standard_normal((tokens, width), np.float32),
        rng.standard_normal((vocab, width), np.float32) * np.float32(2 / math.sqrt(width)),
        rng.standard_normal(vocab, np.float32) * np.float32(0.1),
        rng.integers(0, vocab, tokens).astype(np.int32),
        rng.random(tokens, np.float32),
    )


def reference(arrays: Arrays, chunk: int = 512) -> tuple[np.ndarray, list[np.ndarray]]:
    """Values and gradients by full logits in float64, a few tokens at a time."""
    with jax.enable_x64(True):
        run = jax.jit(value_and_gradient(naive))
        hidden, table, bias, targets, weights = (
            jnp.asarray(x, jnp.float64 if np.issubdtype(x.dtype, np.floating) else None) for x in arrays
        )
        values, d_hidden = [], []
        sums = [np.zeros(table.shape), np.zeros(bias.shape)]
        for i in range(0, len(targets), chunk):
            part = slice(i, i + chunk)
            value, grads = run(hidden[part], table, bias, targets[part], weights[part])
            values.append(np.asarray(value))
            d_hidden.append(np.asarray(grads[0]))
            for total, grad in zip(sums, grads[1:], strict=True):
                total += np.asarray(grad)
    return np.concatenate(values), [np.concatenate(d_hidden), *sums]


def exactness(tokens: int, width: int, vocab: int, *, with_naive: bool) -> bool:
    """Float32 against float64: worst value and relative error of gradients by norm; whether the limits hold."""
    print(f"\nFloat32 against float64: {tokens} tokens x {width} wide x {vocab} classes")
    print("values: worst error in units of max(1, |logsumexp|), at most 1e-6; gradients: by norm, at most 2e-6")
    print(f"{'':<10} {'values':>9} {'d hidden':>9} {'d table':>9} {'d bias':>9}")
    arrays = inputs(tokens, width, vocab)
    values, grads = reference(arrays)
    stats = jax.jit(losses.linear_logit_stats)(arrays[0], arrays[1], arrays[3], bias=arrays[2])
    scale = np.maximum(1, np.abs(np.asarray(stats.logsumexp)))
    good = True
    for name, loss in (("blockwise", blockwise), ("naive", naive)):
        if name == "naive" and not with_naive:
            continue
        got, got_grads = jax.jit(value_and_gradient(loss))(*arrays)
        worst = np.max(np.abs(np.asarray(got) - values) / scale)
        norms = [np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b) for a, b in zip(got_grads, grads, strict=True)]
        print(f"{name:<10} {worst:>9.1e} {' '.join(f'{x:>9.1e}' for x in norms)}")
        good &= bool(name == "naive" or (worst <= 1e-6 and max(norms) <= 2e-6))
    return good


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="also compare at full size with float64")
    full = parser.parse_args().full
    good = [memory(), layouts(VOCABULARIES[0]), exactness(1024, WIDTH, 32000, with_naive=True)]
    if full:
        good.append(exactness(TOKENS, WIDTH, VOCABULARIES[1], with_naive=False))
    if not all(good):
        raise SystemExit("a limit is missed")


if __name__ == "__main__":
    main()
