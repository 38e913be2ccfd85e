"""Compile time and program size of a deep and a shallow decoder.

    python tools/measure_compile_time.py

Compiles jit(grad) of both depths in turn, `--repeats` times each, with the persistent cache off, and prints the
medians, their ratio and the number of instructions in the compiled text. The blocks are scanned, so the instructions
must be equal and the ratio near 1 (goal: at most 1.3).
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lmobj import masks
from lmobj.batch import Vocabulary
from lmobj.models import DecoderConfig


def compile_once(layers: int, width: int, length: int) -> tuple[float, int]:
    """(seconds, instructions) of a gradient over a decoder of so many layers. Shapes only: nothing is allocated."""
    config = DecoderConfig(layers=layers, width=width, heads=4, max_length=length, dropout=0.1, attention_dropout=0.1)
    graphdef, params = nnx.split(jax.eval_shape(lambda: config.build(Vocabulary(1000), nnx.Rngs(0))))

    def loss(params: Any, tokens: jax.Array, segments: jax.Array, seeds: jax.Array) -> jax.Array:
        mask = masks.causal().packed(segments)
        return jnp.sum(nnx.merge(graphdef, params).hidden(tokens, mask=mask, dropout=seeds))

    ids, seeds = jax.ShapeDtypeStruct((2, length), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.uint32)
    jax.clear_caches()
    lowered = jax.jit(jax.grad(loss)).lower(params, ids, ids, seeds)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    return seconds, len(re.findall(r"^\s+(?:ROOT )?%?[\w.-]+ = ", compiled.as_text() or "", re.MULTILINE))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description="Compile time of 24 layers against 6.")
    parser.add_argument("--deep", type=int, default=24, help="layers of the deep model")
    parser.add_argument("--shallow", type=int, default=6, help="layers of the shallow model")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5, help="compilations of each depth; the median counts")
    args = parser.parse_args()

    jax.config.update("jax_enable_compilation_cache", False)
    depths = (args.shallow, args.deep)
    seconds: dict[int, list[float]] = {depth: [] for depth in depths}
    instructions: dict[int, int] = {}
    for _ in range(args.repeats):
        for depth in depths:  # in turn, so that whatever else the machine does falls on both
            elapsed, instructions[depth] = compile_once(depth, args.width, args.length)
            seconds[depth].append(elapsed)
    for depth in depths:
        runs = ", ".join(f"{s:.2f}" for s in seconds[depth])
        median = statistics.median(seconds[depth])
        print(f"{depth} layers: {instructions[depth]} instructions, median {median:.2f} s of {runs}")
    ratio = statistics.median(seconds[args.deep]) / statistics.median(seconds[args.shallow])
    print(f"{args.deep} layers to {args.shallow}: {ratio:.2f}")


if __name__ == "__main__":
    main()
