"""What `device_report` checks: values and gradients on the device that jax runs on, against the CPU in float64.

Attention and the loss without logits are compared with NumPy, formula by formula, so that nothing is shared with what
is checked. Objectives and models are compared with themselves on the CPU in float64, where the tests hold them to their
definitions; what an objective draws must be the same to the bit.

Objectives and model families come from the tables of the contract tests: what has a test there has its rows here. A
mask or a form of the loss gets its row by a line in `MASKS` or `LOSSES`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lmobj import losses, masks, objectives
from lmobj.attention import attention
from lmobj.errors import UserError

__all__ = ["Finding", "run_checks"]

TOLERANCES = {
    "function": {"float32": (1e-5, 1e-5), "bfloat16": (1e-2, 1e-2)},
    "model": {"float32": (1e-5, 1e-4), "bfloat16": (5e-2, 1e-1)},
}
"""Of values and of gradients: distance by norm over the reference's norm. A number in bfloat16 is rounded by up to
4e-3, and the tests' tiny models, whose weights are large so that every part of them matters, let that grow."""
FLOORS = {"float32": 1e-3, "bfloat16": 1e-2}
"""A tensor smaller than this share of all of them together is measured against that share: the gradient of a key bias
is nothing but rounding."""

Arrays = dict[str, Any]
Variant = tuple[str, str]
"""(dtype, attention backend)."""
VARIANTS: tuple[Variant, ...] = (("float32", "xla"), ("bfloat16", "xla"), ("bfloat16", "cudnn"), ("bfloat16", "splash"))


@dataclass(frozen=True)
class Finding:
    """One row of the table. Errors are relative, by norm; None where nothing was computed."""

    check: str
    variant: str
    status: Literal["ok", "failed", "refused"]
    detail: str = ""
    value_error: float | None = None
    gradient_error: float | None = None


@dataclass(frozen=True)
class Check:
    """Something to compute in several ways.

    reference: () -> (values, gradients), trees of float64 arrays.
    computed: (dtype, backend) -> the same on the device; raises where the combination is refused.
    kind: whose tolerances hold.
    exact: whether the two must be equal to the bit.
    """

    name: str
    reference: Callable[[], tuple[Any, Any]]
    computed: Callable[[str, str], tuple[Any, Any]]
    variants: tuple[Variant, ...] = VARIANTS
    kind: Literal["function", "model"] = "model"
    exact: bool = False

    def findings(self) -> Iterator[Finding]:
        """One for each variant. The reference is computed once, and only if a variant is."""
        reference = functools.cache(self.reference)
        for dtype, backend in self.variants:
            yield self._finding(reference, dtype, backend)

    def _finding(self, reference: Callable[[], tuple[Any, Any]], dtype: str, backend: str) -> Finding:
        variant = f"{dtype} {backend}"
        try:
            with jax.default_matmul_precision("highest"):  # TPUs and newer GPUs shorten float32 otherwise
                got = jax.device_get(self.computed(dtype, backend))
            value, gradient = (gap(x, y, FLOORS[dtype]) for x, y in zip(got, reference(), strict=True))
        except Exception as error:  # told in the table; only a backend may refuse, all else fails the report
            refused = backend != "xla" and isinstance(error, ValueError)
            return Finding(self.name, variant, "refused" if refused else "failed", _first_line(error))
        limits = (0.0, 0.0) if self.exact else TOLERANCES[self.kind][dtype]
        good = value <= limits[0] and gradient <= limits[1]  # a NaN is not
        detail = "" if good else f"accepted: {limits[0]:.0e} in values, {limits[1]:.0e} in gradients"
        return Finding(self.name, variant, "ok" if good else "failed", detail, value, gradient)


def run_checks(chosen: Callable[[str], bool] = lambda name: True) -> list[Finding]:
    """Every finding of the checks whose names are chosen."""
    made = (*attention_checks(), *loss_checks(), *family_checks(), *objective_checks())
    findings = [finding for check in made if chosen(check.name) for finding in check.findings()]
    return findings + [finding for finding in missing() if chosen(finding.check)]


def missing() -> Iterator[Finding]:
    """What exists and has no row."""
    kinds = {name for name in masks.__all__ if not inspect.isclass(getattr(masks, name))}
    for name in sorted(kinds - {row.split()[0] for row in MASKS}):
        yield Finding(f"attention {name}", "", "failed", "masks has it, and MASKS no row for it")
    cases = importlib.import_module("tests.objectives.contract").CASES
    for name in sorted(set(objectives.REGISTRY) - set(cases)):
        yield Finding(f"objective {name}", "", "failed", "registered, and the contract test has no case for it")


def gap(got: Any, expected: Any, floor: float) -> float:
    """The largest distance, by norm, of a tensor from its reference, over the reference's norm (see `FLOORS`)."""
    pairs = [
        (np.asarray(jax.device_get(x), np.float64), np.asarray(y, np.float64))
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    ]
    least = floor * np.sqrt(sum(np.sum(y**2) for _, y in pairs))
    distances = [np.linalg.norm(x - y) / max(np.linalg.norm(y), least, 1e-300) for x, y in pairs]
    return float(np.max(distances, initial=0.0))  # np.max keeps a NaN, which max may lose


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    kind = "" if isinstance(error, UserError | ValueError) else f"{type(error).__name__}: "
    return f"{kind}{text}"[:240]


# --- attention ----------------------------------------------------------------------------------------------------

ROWS, LENGTH, HEADS, GROUPS, WIDTH = 2, 128, 4, 2, 16
SEGMENTS = np.stack([np.repeat([1, 2, 3, 0], [44, 24, 36, 24]), np.repeat([1, 2], [20, 108])]).astype(np.int32)
IS_PREFIX = np.stack([np.isin(np.arange(LENGTH), [0, 1, 2, 44, 45, 68]), np.arange(LENGTH) < 4])
OFFSETS = np.asarray([3, 120], np.int32)
RANKS = np.stack([(np.arange(LENGTH) * 7 + 3) % LENGTH, (np.arange(LENGTH) * 11 + 5) % LENGTH]).astype(np.int32)
"""Two orders of a row."""
KEY_RANKS = np.where(np.arange(LENGTH) < 2, -1, RANKS).astype(np.int32)
"""The first two tokens are seen by all, so that no query of another stream sees nothing."""
REMEMBERED = np.stack([np.arange(8) >= 3, np.arange(8) >= 0])

MASKS: dict[str, Callable[[], masks.AttentionMask]] = {
    "causal": masks.causal,
    "causal packed": lambda: masks.causal().packed(jnp.asarray(SEGMENTS)),
    "causal at an offset": lambda: masks.causal().at(jnp.asarray(OFFSETS)),
    "causal with memory": lambda: masks.causal().with_memory(jnp.asarray(REMEMBERED)),
    "bidirectional": masks.bidirectional,
    "bidirectional packed": lambda: masks.bidirectional().packed(jnp.asarray(SEGMENTS)),
    "prefix": lambda: masks.prefix(jnp.asarray(IS_PREFIX)),
    "prefix packed": lambda: masks.prefix(jnp.asarray(IS_PREFIX)).packed(jnp.asarray(SEGMENTS)),
    "permutation": lambda: masks.permutation(jnp.asarray(RANKS), jnp.asarray(RANKS), sees_self=True),
    "permutation of queries": lambda: masks.permutation(jnp.asarray(RANKS), jnp.asarray(KEY_RANKS)),
    "permutation packed": lambda: masks.permutation(jnp.asarray(RANKS), jnp.asarray(RANKS), sees_self=True).packed(
        jnp.asarray(SEGMENTS)
    ),
    "sliding_window": lambda: masks.sliding_window(7),
    "sliding_window packed": lambda: masks.sliding_window(7).packed(jnp.asarray(SEGMENTS)),
}
"""Each constructor of `lmobj.masks`, alone and with packed documents."""


def attention_checks() -> Iterator[Check]:
    """Attention under every mask, with grouped queries, and with capped logits."""
    for name, make in MASKS.items():
        yield _attention_check(f"attention {name}", make)
    yield _attention_check("attention causal, capped logits", MASKS["causal packed"], soft_cap=2.0)


def _attention_check(name: str, make: Callable[[], masks.AttentionMask], soft_cap: float | None = None) -> Check:
    queries = 8 if "offset" in name else LENGTH
    rng = np.random.default_rng(0)
    shapes = {"q": (queries, HEADS), "k": (LENGTH, GROUPS), "v": (LENGTH, GROUPS), "weight": (queries, HEADS)}
    arrays = {key: _bfloat16(rng.normal(size=(ROWS, *shape, WIDTH))) for key, shape in shapes.items()}

    def computed(dtype: str, backend: Any) -> tuple[Any, Any]:
        weight = jnp.asarray(arrays["weight"], dtype)

        def total(q: Any, k: Any, v: Any) -> tuple[Any, Any]:
            y = attention(q, k, v, make(), backend=backend, soft_cap=soft_cap)
            return jnp.sum((y * weight).astype(jnp.float32)), y

        inputs = [jnp.asarray(arrays[key], dtype) for key in "qkv"]
        (_, y), gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(*inputs)
        return y, gradients

    return Check(name, lambda: attention_reference(arrays, make(), soft_cap), computed, kind="function")


def attention_reference(arrays: Arrays, mask: masks.AttentionMask, soft_cap: float | None) -> tuple[Any, Any]:
    """(y, (dq, dk, dv)) of sum(weight * attention(q, k, v)), one row and head at a time."""
    q, k, v, weight = (arrays[name] for name in ("q", "k", "v", "weight"))
    mask = jax.tree.map(np.asarray, mask)  # read one element at a time
    y, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    scale = 1 / np.sqrt(q.shape[-1])
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        g = h // (q.shape[2] // k.shape[2])
        allowed = [[_visible(mask, b, i, j) for j in range(k.shape[1])] for i in range(q.shape[1])]
        logits = scale * q[b, :, h] @ k[b, :, g].T
        slope = np.ones_like(logits)
        if soft_cap is not None:
            slope = 1 - np.tanh(logits / soft_cap) ** 2
            logits = soft_cap * np.tanh(logits / soft_cap)
        logits = np.where(allowed, logits, -np.inf)
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        y[b, :, h] = p @ v[b, :, g]
        dv[b, :, g] += p.T @ weight[b, :, h]
        dp = weight[b, :, h] @ v[b, :, g].T
        ds = p * (dp - np.sum(dp * p, axis=1, keepdims=True)) * slope * scale
        dq[b, :, h] += ds @ k[b, :, g]
        dk[b, :, g] += ds.T @ q[b, :, h]
    return y, (dq, dk, dv)


def _visible(mask: masks.AttentionMask, b: int, i: int, j: int) -> bool:
    """Whether query i of row b sees key j, rule by rule as `AttentionMask` states them."""
    if mask.memory is not None:
        if j < mask.memory.shape[1]:
            return bool(mask.memory[b, j])
        j -= mask.memory.shape[1]
    at = i if mask.query_offset is None else i + int(np.asarray(mask.query_offset)[b])
    if mask.causal:
        seen = j <= at and (mask.window is None or j > at - mask.window)
        if not seen and not (mask.is_prefix is not None and bool(mask.is_prefix[b, j])):
            return False
    if mask.query_rank is not None and mask.key_rank is not None:
        before = int(mask.query_rank[b, i]) > int(mask.key_rank[b, j])
        if not before and not (mask.sees_self and i == j):
            return False
    return mask.segment_ids is None or bool(mask.segment_ids[b, i] == mask.segment_ids[b, j])


def _bfloat16(x: Any) -> Any:
    """Float64 numbers that bfloat16 holds exactly, so that every dtype gets the same inputs."""
    return np.asarray(np.asarray(x, jnp.bfloat16), np.float64)


# --- the loss without logits --------------------------------------------------------------------------------------

LOSSES: dict[str, dict[str, float]] = {
    "linear_token_nll": {},
    "linear_token_nll, smoothed, z-loss": {"label_smoothing": 0.1, "z_loss": 1e-2},
    "linear_token_nll, capped": {"soft_cap": 3.0},
}
TOKENS, INNER, CLASSES, PADDING = 96, 32, 200, 56


def loss_checks() -> Iterator[Check]:
    """`linear_token_nll` in blocks, over a padded table with a bias."""
    rng = np.random.default_rng(1)
    arrays = {
        "hidden": _bfloat16(rng.normal(size=(TOKENS, INNER))),
        "table": _bfloat16(rng.normal(size=(CLASSES + PADDING, INNER)) / 4),
        "bias": _bfloat16(rng.normal(size=CLASSES + PADDING)),
        "targets": rng.integers(0, CLASSES, TOKENS).astype(np.int32),
        "weight": rng.random(TOKENS),
    }
    for name, options in LOSSES.items():

        def computed(dtype: str, backend: str, options: Any = options) -> tuple[Any, Any]:
            def total(hidden: Any, table: Any, bias: Any) -> tuple[Any, Any]:
                nll = losses.linear_token_nll(
                    hidden, table, arrays["targets"], bias=bias, vocab_size=CLASSES, block_size=64, **options
                )
                return jnp.sum(nll * arrays["weight"].astype(np.float32)), nll

            inputs = [jnp.asarray(arrays[key], dtype) for key in ("hidden", "table", "bias")]
            (_, nll), gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(*inputs)
            return nll, gradients

        reference = functools.partial(nll_reference, arrays, **options)
        yield Check(f"loss {name}", reference, computed, VARIANTS[:2], kind="function")


def nll_reference(
    arrays: Arrays, label_smoothing: float = 0.0, z_loss: float = 0.0, soft_cap: float | None = None
) -> tuple[Any, Any]:
    """(nll, (d hidden, d table, d bias)) of sum(weight * nll), by full logits."""
    hidden, table, bias, targets, weight = (arrays[k] for k in ("hidden", "table", "bias", "targets", "weight"))
    logits = hidden @ table[:CLASSES].T + bias[:CLASSES]
    slope = np.ones_like(logits)
    if soft_cap is not None:
        slope = 1 - np.tanh(logits / soft_cap) ** 2
        logits = soft_cap * np.tanh(logits / soft_cap)
    logsumexp = np.log(np.sum(np.exp(logits), axis=1))
    share = (1 - label_smoothing) * np.eye(CLASSES)[targets] + label_smoothing / CLASSES
    nll = logsumexp - np.sum(share * logits, axis=1) + z_loss * logsumexp**2
    p = np.exp(logits - logsumexp[:, None])
    d_logits = weight[:, None] * (p * (1 + 2 * z_loss * logsumexp)[:, None] - share) * slope
    d_table, d_bias = np.zeros_like(table), np.zeros_like(bias)
    d_table[:CLASSES], d_bias[:CLASSES] = d_logits.T @ hidden, d_logits.sum(axis=0)
    return nll, (d_logits @ table[:CLASSES], d_table, d_bias)


# --- models and objectives ----------------------------------------------------------------------------------------


def _self_checks(name: str, run: Callable[[str, str, bool], tuple[Any, Any]]) -> Iterator[Check]:
    """`run(dtype, backend, plain)` against itself on the CPU in float64.

    cuDNN's attention has neither dropout nor caps, so where it is checked no side has: it is `plain`.
    """
    for label, backends, plain in ((name, VARIANTS[:2], False), (f"{name}, plain attention", VARIANTS[2:], True)):

        def reference(plain: bool = plain) -> tuple[Any, Any]:
            with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
                return jax.device_get(run("float64", "xla", plain))

        def computed(dtype: str, backend: str, plain: bool = plain) -> tuple[Any, Any]:
            return run(dtype, backend, plain)

        yield Check(label, reference, computed, backends)


_PLAIN = ("attention_dropout", "attention_soft_cap")


def _abstract(builder: Any, vocab: Any, dtype: str, backend: str, plain: bool) -> Any:
    """A model of a family in some variant; nothing is initialised."""
    changes: Arrays = {"dtype": dtype, "param_dtype": _parameter_dtype(dtype)}
    if hasattr(builder, "attention_backend"):
        changes["attention_backend"] = backend
        if plain:
            changes |= {name: None if "cap" in name else 0.0 for name in _PLAIN if hasattr(builder, name)}
    elif backend != "xla":
        raise ValueError(f"a {builder.name} has no attention")
    config = dataclasses.replace(builder, **changes)
    return nnx.eval_shape(lambda: config.build(vocab, nnx.Rngs(params=0)))


def _graphs(case: Any, vocab: Any, dtype: str, backend: str, plain: bool) -> dict[str, Any]:
    """The graph definitions of an objective's models, its heads among them."""
    built = {role: _abstract(builder, vocab, dtype, backend, plain) for role, builder in case.builders.items()}
    if "heads" in case.objective.roles:
        style = built["model"].head_style
        built["heads"] = nnx.eval_shape(lambda: case.objective.build_heads(style, vocab, nnx.Rngs(params=0)))
    return {role: nnx.split(model)[0] for role, model in built.items()}


def _parameter_dtype(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


def _floats(tree: Any, dtype: str) -> Any:
    """The tree with its floating-point arrays in another dtype."""
    return jax.tree.map(lambda x: jnp.asarray(x, dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def family_checks() -> Iterator[Check]:
    """Hidden states and gradients of every model family, dropout on, over packed rows."""
    families = importlib.import_module("tests.models.families")
    rng = np.random.default_rng(2)
    tokens = rng.integers(1, families.VOCAB.size, (2, 16)).astype(np.int32)
    segments = np.stack([np.repeat([1, 2, 0], [9, 4, 3]), np.full(16, 1)]).astype(np.int32)
    real = (segments > 0)[..., None]
    for name, builder in families.CONFIGS.items():
        if hasattr(builder, "heads"):
            builder = dataclasses.replace(builder, heads=builder.width // 8)  # heads of the least width cuDNN takes
        weight = rng.normal(size=(2, 16, builder.width)) * real

        def run(
            dtype: str, backend: str, plain: bool, name: str = name, builder: Any = builder, weight: Any = weight
        ) -> tuple[Any, Any]:
            graph = nnx.split(_abstract(builder, families.VOCAB, dtype, backend, plain))[0]
            mask = masks.causal() if name in families.CAUSAL else masks.bidirectional()
            precise = _parameter_dtype(dtype)

            def total(params: Any) -> tuple[Any, Any]:
                model = nnx.merge(graph, params)
                packed = mask.packed(jnp.asarray(segments))
                hidden = families.states(model, jnp.asarray(tokens), mask=packed, dropout=families.SEEDS[:2])
                hidden = jnp.where(real, hidden.astype(precise), 0)
                return jnp.sum(hidden * weight.astype(precise)), hidden

            params = _floats(families.build(builder)[1], precise)
            (_, hidden), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
            return hidden, gradients

        yield from _self_checks(f"family {name}", run)


def objective_checks() -> Iterator[Check]:
    """Loss and gradients of every objective, dropout on; and that the device corrupts rows as the CPU does."""
    contract = importlib.import_module("tests.objectives.contract")
    for name, case in contract.CASES.items():
        yield from _objective_checks(f"objective {name}", case, contract)


def _objective_checks(name: str, case: Any, contract: Any) -> Iterator[Check]:
    objective, vocab = case.objective, contract.VOCAB
    batch = jax.device_get(case.make())
    params = functools.cache(lambda: jax.device_get(case.models("float32")[1]))

    def graphs(dtype: str, backend: str, plain: bool) -> Any:
        return _graphs(case, vocab, dtype, backend, plain)

    def models(graphs: Any, values: Any) -> Any:
        return {role: nnx.merge(graph, values[role]) for role, graph in graphs.items()}

    def context(models: Any) -> tuple[Any, objectives.Context, Any]:
        key = jax.random.key(3, impl="threefry2x32")
        noise_keys, model_keys = objectives.step_keys(key, jax.tree.map(jnp.asarray, objectives.row_ids_of(batch)), 0)
        own = objective.init(models, key, len(jax.tree.leaves(model_keys)[0]))
        return noise_keys, objectives.Context(model_keys, 0, vocab, own.params), own.carried

    def corrupted() -> tuple[Any, Any]:
        graph = graphs("float32", "xla", False)

        def corrupt(values: Any, rows: Any) -> Any:
            given = models(graph, values)
            noise_keys, ctx, _ = context(given)
            return objective.corrupt(noise_keys, objective.prepare(given, rows, ctx), ctx)

        return jax.device_get(jax.jit(corrupt)(params(), batch)), ()

    def on_cpu() -> tuple[Any, Any]:
        with jax.enable_x64(False), jax.default_device(jax.devices("cpu")[0]):
            return corrupted()

    example = functools.cache(lambda: on_cpu()[0])

    def run(dtype: str, backend: str, plain: bool) -> tuple[Any, Any]:
        graph, precise = graphs(dtype, backend, plain), _parameter_dtype(dtype)

        def total(values: Any, rows: Any) -> Any:
            given = models(graph, values)
            _, ctx, carried = context(given)
            terms = objective.terms(given, rows, carried, ctx)
            return objectives.total_loss(terms, objectives.denominators(objective, rows), objective.coefficients)

        return jax.jit(jax.value_and_grad(total))(_floats(params(), precise), _floats(example(), precise))

    yield Check(f"{name}, corruption", on_cpu, lambda dtype, backend: corrupted(), VARIANTS[:1], exact=True)
    yield from _self_checks(name, run)
