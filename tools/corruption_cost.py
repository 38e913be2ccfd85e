"""What corruption costs: its share of a training step, for every objective that draws noise.

    python tools/corruption_cost.py                                      all of them, in BERT-small's shape: minutes
    python tools/corruption_cost.py masked_lm replaced_token_detection   these
    python tools/corruption_cost.py --layers 2 --width 64 --batch 2 --length 64 --vocab 512     a quick look

Objectives whose example does not depend on the noise key, and those that need settings, are named and left out.
Corruption is compiled by itself, row keys included, and timed in turn with the whole step (forward, backward, AdamW;
float32, default settings, dropout on); each figure is the median of `--repeats`. What a model samples while it trains
is part of the step, not of corruption. Ends with exit code 1 if a share is above `--limit`, 3%.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lmobj.batch import RowSpec, Vocabulary
from lmobj.models import DecoderConfig, ElectraConfig, EncoderConfig, ModelBuilder, XLNetConfig
from lmobj.objectives import REGISTRY, Context, Objective, step_keys
from lmobj.train.batches import batch_shapes
from lmobj.train.step import Program


@dataclass(frozen=True)
class Shape:
    """Sizes; the defaults are those of ELECTRA's BERT-small, but for its batch of 128."""

    layers: int
    width: int
    length: int
    vocab: int
    batch: int

    @property
    def vocabulary(self) -> Vocabulary:
        """Special tokens first."""
        return Vocabulary(self.vocab, pad=0, unk=1, bos=2, eos=3, cls=4, sep=5, mask=6)

    def model(self, objective: str) -> ModelBuilder:
        """A model for the objective of this name."""
        sizes: dict[str, Any] = {"layers": self.layers, "width": self.width, "heads": max(self.width // 64, 1)}
        if objective in ("permutation_lm", "transformer_xl"):
            return XLNetConfig(**sizes)
        sizes["max_length"] = self.length
        if objective == "causal_lm":
            return DecoderConfig(**sizes)
        if objective == "replaced_token_detection":
            return ElectraConfig(**sizes, embedding_width=self.width // 2, generator_fraction=0.25)
        # Span boundary scores whole hidden states against the embeddings.
        return EncoderConfig(**sizes, embedding_width=None if objective == "span_boundary" else self.width // 2)


def make_batch(rows: RowSpec, shape: Shape) -> dict[str, jax.Array]:
    """Full rows of one document each, of random words."""
    rng = np.random.default_rng(0)
    batch = {}
    for name, array in batch_shapes(rows, shape.batch).items():
        values = rng.integers(0, 2, array.shape)
        if name == "tokens":
            values = rng.integers(7, shape.vocab, array.shape)
        elif name == "segment_ids":
            values = np.ones(array.shape)
        elif name == "positions":
            values = np.broadcast_to(np.arange(array.shape[1]), array.shape)
        elif name == "row_ids":
            values = np.stack([np.zeros(shape.batch), np.arange(shape.batch)], 1)
        elif name == "token_types":
            values = np.broadcast_to(np.arange(array.shape[1]) > array.shape[1] // 2, array.shape)
        batch[name] = jnp.asarray(values, array.dtype)
    return batch


def corruption(objective: Objective, vocab: Vocabulary) -> Callable[[Any, Any], Any]:
    """(key, batch) -> example, as in the training step."""

    def corrupt(key: jax.Array, batch: Any) -> Any:
        noise_keys, model_keys = step_keys(key, batch["row_ids"], 0)
        return objective.corrupt(noise_keys, batch, Context(model_keys, 0, vocab))

    return jax.jit(corrupt)


def draws_noise(corrupt: Callable[[Any, Any], Any], batch: Any) -> bool:
    """Whether the example depends on the key."""
    one, other = (jax.tree.leaves(corrupt(jax.random.key(seed), batch)) for seed in (0, 1))
    return any(bool(jnp.any(x != y)) for x, y in zip(one, other, strict=True))


def _constant(value: float) -> Callable[[Any], jax.Array]:
    return lambda step: jnp.asarray(value)


def training_step(objective: Objective, shape: Shape) -> tuple[Callable[[Any, Any], Any], Any]:
    """(state, batch) -> state and metrics, compiled, and the first state."""

    def build() -> dict[str, nnx.Module]:
        model = shape.model(objective.name).build(shape.vocabulary, nnx.Rngs(params=0))  # type: ignore[attr-defined]
        if "heads" not in objective.roles:
            return {"model": model}
        heads = objective.build_heads(model.head_style, shape.vocabulary, nnx.Rngs(params=1))
        return {"model": model, "heads": heads}

    program = Program(
        objective=objective,
        graphs={role: nnx.split(model)[0] for role, model in nnx.eval_shape(build).items()},
        vocab=shape.vocabulary,
        optimizer=optax.adamw(1e-4),
        coefficients={name: _constant(value) for name, value in objective.coefficients.items()},
        seed=0,
    )
    params = {role: nnx.to_pure_dict(nnx.state(model)) for role, model in build().items()}
    step = jax.jit(lambda state, batch: program.train_step(state, {}, batch))
    return step, program.init(params, shape.batch)


def measure(objective: Objective, shape: Shape, repeats: int) -> float | None:
    """Prints one line; the share, or None where nothing is drawn."""
    name: str = objective.name  # type: ignore[attr-defined]
    rows = objective.rows(shape.vocabulary, shape.length)
    assert isinstance(rows, RowSpec)
    batch, corrupt = make_batch(rows, shape), corruption(objective, shape.vocabulary)
    if not draws_noise(corrupt, batch):
        print(f"{name:<26} draws no noise", flush=True)
        return None
    step, state = training_step(objective, shape)
    state, _ = jax.block_until_ready(step(state, batch))
    key, noise, whole = jax.random.key(0), [], []
    for _ in range(repeats):  # in turn, so that whatever else the machine does falls on both
        start = time.perf_counter()
        jax.block_until_ready(corrupt(key, batch))
        middle = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, batch))
        noise.append(middle - start)
        whole.append(time.perf_counter() - middle)
    corrupted, total = statistics.median(noise), statistics.median(whole)
    print(f"{name:<26} {1e3 * corrupted:>10.2f} ms {1e3 * total:>12.1f} ms {corrupted / total:>8.2%}", flush=True)
    return corrupted / total


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; the exit code."""
    parser = argparse.ArgumentParser(description="The share of corruption in a training step.")
    parser.add_argument("objectives", nargs="*", help="names; all registered ones by default")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=30522)
    parser.add_argument("--batch", type=int, default=8, help="rows; both costs are in proportion to it")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit", type=float, default=0.03, help="the largest share that passes")
    args = parser.parse_args(arguments)
    if unknown := set(args.objectives) - set(REGISTRY):
        parser.error(f"no such objective: {', '.join(sorted(unknown))}; there are {', '.join(sorted(REGISTRY))}")

    shape = Shape(args.layers, args.width, args.length, args.vocab, args.batch)
    device = jax.devices()[0].device_kind
    print(
        f"{shape.batch} rows of {shape.length}, {shape.layers} layers of {shape.width}, {shape.vocab} words; {device}"
    )
    print(f"{'objective':<26} {'corruption':>13} {'step':>15} {'share':>8}   (at most {args.limit:.0%})", flush=True)
    shares = []
    for name in args.objectives or REGISTRY:
        try:
            objective = REGISTRY[name]()
            rows = objective.rows(shape.vocabulary, shape.length)
        except (TypeError, ValueError) as error:  # fields without defaults, or defaults that no row can have
            print(f"{name:<26} needs settings: {error}", flush=True)
            continue
        if not isinstance(rows, RowSpec):
            print(f"{name:<26} is made of others", flush=True)
            continue
        shares.append(measure(objective, shape, args.repeats))
    return int(any(share is not None and share > args.limit for share in shares))


if __name__ == "__main__":
    raise SystemExit(main())
