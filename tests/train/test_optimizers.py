"""Optimizers against PyTorch, against NumPy written from the papers, and stacked layers against separate ones."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pydantic import TypeAdapter

from lmobj.errors import UserError
from lmobj.train import optimizers as o
from lmobj.train.schedules import ConstantSchedule, LinearSchedule, make_schedule

STEPS, LAYERS, D, F, V = 3, 5, 3, 4, 6
RATE = LinearSchedule(peak=0.1, final_fraction=0.5)
RATES = [0.1 * (1 - 0.5 * t / STEPS) for t in range(STEPS)]
AXES = {
    "model": {
        "embed": {"table": ("vocab", "embed")},
        "layers": {"kernel": ("embed", "mlp"), "bias": ("mlp",), "scale": ("embed",)},
        "norm": {"scale": ("embed",)},
    }
}
SHAPES = {
    "model": {
        "embed": {"table": (V, D)},
        "layers": {"kernel": (LAYERS, D, F), "bias": (LAYERS, F), "scale": (LAYERS, D)},
        "norm": {"scale": (D,)},
    }
}
EVERY: list[Any] = [
    o.AdamW(),
    o.BertAdam(),
    o.Lamb(),
    o.Lamb(adapt_vectors=True),
    o.SGD(),
    o.Adafactor(min_factored_size=2),
    o.Adafactor(min_factored_size=4, momentum=0.9, relative=False),
    o.Lion(),
    o.Muon(),
    o.Muon(consistent_rms=None, nesterov=False),
]


def arrays(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.normal(size=s), SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def unstack(tree: Any) -> Any:
    """The same model with one module per layer."""
    layers = tree["model"]["layers"]
    per = {i: {k: v[i] if isinstance(v, np.ndarray) else v for k, v in layers.items()} for i in range(LAYERS)}
    return {"model": {**tree["model"], "layers": per}}


def train(config: Any, params: Any, grads: list[Any], axes: Any) -> Any:
    """Parameters after one step per gradient, in float64."""
    with jax.enable_x64(True):
        optimizer = o.make_optimizer(config, make_schedule(config.schedule, STEPS), logical_axes=axes)
        params = jax.tree.map(jnp.asarray, params)
        state = optimizer.init(params)

        @jax.jit
        def step(params: Any, state: Any, grad: Any) -> Any:
            updates, state = optimizer.update(grad, state, params)
            return optax.apply_updates(params, updates), state

        for grad in grads:
            params, state = step(params, state, jax.tree.map(jnp.asarray, grad))
        return jax.tree.map(np.asarray, params)


def with_rate(config: Any, **changes: Any) -> Any:
    return type(config)(**{**vars(config), "schedule": RATE, **changes})


def flat(tree: Any) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def reference(rule: Any, params: Any, grads: list[Any], decay: float) -> Any:
    """Runs `rule(name, p, g, memory, t, lr, decay) -> new p` tensor by tensor, layer by layer; biases do not decay."""
    memory: dict[str, dict] = {}
    current = flat(unstack(params))
    for t, grad in enumerate(flat(unstack(g)) for g in grads):
        for name, p in current.items():
            wd = decay if p.ndim >= 2 else 0.0
            current[name] = rule(name, p, grad[name], memory.setdefault(name, {}), t, RATES[t], wd)
    return current


def compare(config: Any, rule: Any, rtol: float = 1e-12) -> None:
    params, grads = arrays(0), [arrays(i + 1) for i in range(STEPS)]
    config = with_rate(config, clip_norm=None, weight_decay=0.03)
    got = flat(unstack(train(config, params, grads, AXES)))
    want = reference(rule, params, grads, 0.03)
    assert got.keys() == want.keys()
    for name, value in got.items():
        np.testing.assert_allclose(value, want[name], rtol=rtol, atol=1e-13, err_msg=name)


def adam_direction(g: Any, memory: Any, t: int, b1: float, b2: float, eps: float, correct: bool) -> Any:
    m = memory["m"] = b1 * memory.get("m", 0.0) + (1 - b1) * g
    v = memory["v"] = b2 * memory.get("v", 0.0) + (1 - b2) * g**2
    if correct:
        m, v = m / (1 - b1 ** (t + 1)), v / (1 - b2 ** (t + 1))
    return m / (np.sqrt(v) + eps)


def test_bert_adam_has_no_bias_correction() -> None:
    def rule(name, p, g, memory, t, lr, wd):
        return p - lr * (adam_direction(g, memory, t, 0.9, 0.999, 1e-6, correct=False) + wd * p)

    compare(o.BertAdam(), rule)


def test_adamw_formula() -> None:
    def rule(name, p, g, memory, t, lr, wd):
        return p - lr * (adam_direction(g, memory, t, 0.9, 0.999, 1e-8, correct=True) + wd * p)

    compare(o.AdamW(), rule)


@pytest.mark.parametrize("vectors", [False, True])
def test_lamb_formula(vectors: bool) -> None:
    def rule(name, p, g, memory, t, lr, wd):
        u = adam_direction(g, memory, t, 0.9, 0.999, 1e-6, correct=True) + wd * p
        ratio = np.linalg.norm(p) / np.linalg.norm(u) if p.ndim >= 2 or vectors else 1.0
        return p - lr * ratio * u

    compare(o.Lamb(adapt_vectors=vectors), rule)


def test_lion_formula() -> None:
    def rule(name, p, g, memory, t, lr, wd):
        m = memory.get("m", 0.0)
        memory["m"] = 0.99 * m + 0.01 * g
        return p - lr * (np.sign(0.9 * m + 0.1 * g) + wd * p)

    compare(o.Lion(), rule)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_adafactor_formula(momentum: float) -> None:
    """Shazeer and Stern 2018, algorithm 4 (and 5 for vectors): row and column means, clipping at RMS 1."""

    def rms(x):
        return np.sqrt(np.mean(x**2))

    def rule(name, p, g, memory, t, lr, wd):
        beta = 1 - (t + 1.0) ** -0.8
        square = g**2 + 1e-30
        if p.ndim == 2:
            rows = memory["r"] = beta * memory.get("r", 0.0) + (1 - beta) * square.mean(1)
            columns = memory["c"] = beta * memory.get("c", 0.0) + (1 - beta) * square.mean(0)
            second = np.outer(rows, columns) / rows.mean()
        else:
            second = memory["v"] = beta * memory.get("v", 0.0) + (1 - beta) * square
        u = g / np.sqrt(second)
        u = u / max(1.0, rms(u)) * max(1e-3, rms(p)) * lr
        u = memory["m"] = momentum * memory.get("m", 0.0) + (1 - momentum) * u
        return p - u - lr * wd * p

    # optax computes the decay rate beta in float32 whatever the parameters are.
    compare(o.Adafactor(min_factored_size=2, momentum=momentum), rule, rtol=1e-6)


@pytest.mark.parametrize(("consistent_rms", "nesterov"), [(0.2, True), (None, False)])
def test_muon_formula(consistent_rms: float | None, nesterov: bool) -> None:
    """Hidden matrices by five Newton-Schulz steps on the corrected momentum; table, biases and scales by Adam."""

    def orthogonalise(x):
        a, b, c = 3.4445, -4.7750, 2.0315
        x = x / (np.linalg.norm(x) + 1e-8)
        for _ in range(5):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x

    def rule(name, p, g, memory, t, lr, wd):
        if "kernel" not in name:
            return p - lr * (0.5 * adam_direction(g, memory, t, 0.9, 0.95, 1e-8, correct=True) + wd * p)
        m = memory["m"] = 0.95 * memory.get("m", 0.0) + 0.05 * g
        # optax corrects the momentum's zero start, and looks one step ahead in Nesterov's form.
        if nesterov:
            m = 0.95 * m / (1 - 0.95 ** (t + 2)) + 0.05 * g / (1 - 0.95 ** (t + 1))
        else:
            m = m / (1 - 0.95 ** (t + 1))
        scale = np.sqrt(max(1, F / D)) if consistent_rms is None else 0.2 * np.sqrt(max(F, D))
        return p - lr * (scale * orthogonalise(m) + wd * p)

    compare(o.Muon(consistent_rms=consistent_rms, nesterov=nesterov, adam_ratio=0.5), rule)


@pytest.mark.parity
@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize(
    "config",
    [o.AdamW(b2=0.95), o.SGD(momentum=0.9), o.SGD(momentum=0.8, nesterov=True), o.SGD(momentum=0.0)],
    ids=lambda c: f"{c.name}-{getattr(c, 'momentum', '')}",
)
def test_same_as_torch(config: Any, clip: float | None) -> None:
    torch = pytest.importorskip("torch")
    params, grads = arrays(0), [arrays(i + 1) for i in range(STEPS)]
    config = with_rate(config, clip_norm=clip, weight_decay=0.1)
    got = flat(train(config, params, grads, AXES))

    tensors = {k: torch.tensor(v, requires_grad=True) for k, v in flat(params).items()}
    matrices = [v for k, v in tensors.items() if "kernel" in k or "table" in k]
    vectors = [v for k, v in tensors.items() if "bias" in k or "scale" in k]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    if isinstance(config, o.AdamW):
        peer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    else:
        peer = torch.optim.SGD(groups, lr=1.0, momentum=config.momentum, nesterov=config.nesterov)
    for t, grad in enumerate(grads):
        norm = np.sqrt(sum(np.sum(g**2) for g in flat(grad).values()))
        assert norm > 0.7  # the clip is active
        for name, g in flat(grad).items():
            tensors[name].grad = torch.tensor(g * (clip / norm if clip else 1.0))
        for group in peer.param_groups:
            group["lr"] = RATES[t]
        peer.step()
    for name, value in got.items():
        np.testing.assert_allclose(value, tensors[name].detach().numpy(), rtol=1e-12, atol=1e-14, err_msg=name)


@pytest.mark.parametrize("config", EVERY, ids=lambda c: c.name)
def test_stacked_layers_equal_separate_layers(config: Any) -> None:
    """More layers than either dimension, so that a rule that took the layer axis for a dimension would show."""
    params, grads = arrays(0), [arrays(i + 1) for i in range(STEPS)]
    config = with_rate(config, weight_decay=0.1, clip_norm=1.0)
    stacked = flat(unstack(train(config, params, grads, AXES)))
    separate = flat(train(config, unstack(params), [unstack(g) for g in grads], unstack(AXES)))
    assert stacked.keys() == separate.keys()
    for name, value in stacked.items():
        np.testing.assert_allclose(value, separate[name], rtol=1e-11, atol=1e-14, err_msg=name)


@pytest.mark.parametrize("config", EVERY, ids=lambda c: c.name)
def test_experts_are_matrices_of_their_own(config: Any) -> None:
    """Two layers of three experts as one array, and as six arrays: the same updates, decay of biases included."""
    rng = np.random.default_rng(0)

    def drawn() -> dict[str, Any]:
        return {"up": {"kernel": rng.normal(size=(2, 3, 4, 5)), "bias": rng.normal(size=(2, 3, 5))}}

    def apart(tree: Any) -> Any:
        return {f"{i}{e}": jax.tree.map(lambda x, i=i, e=e: x[i, e], tree) for i in range(2) for e in range(3)}

    params, grads = drawn(), [drawn() for _ in range(STEPS)]
    config = with_rate(config, weight_decay=0.1, clip_norm=1.0)
    names = {"up": {"kernel": ("embed", "mlp"), "bias": ("mlp",)}}
    one = train(config, params, grads, jax.tree.map(lambda axes: ("experts", *axes), names, is_leaf=_is_names))
    six = train(config, apart(params), [apart(g) for g in grads], dict.fromkeys(apart(params), names))
    for name, value in flat(apart(one)).items():
        np.testing.assert_allclose(value, flat(six)[name], rtol=1e-11, atol=1e-14, err_msg=name)


def _is_names(x: Any) -> bool:
    return isinstance(x, tuple)


@pytest.mark.parametrize("config", EVERY, ids=lambda c: c.name)
def test_biases_and_scales_never_decay(config: Any) -> None:
    params = arrays(0)
    zeros = jax.tree.map(np.zeros_like, params)
    got = flat(train(with_rate(config, weight_decay=0.5), params, [zeros], AXES))
    for name, before in flat(params).items():
        if "kernel" in name or "table" in name:
            # Lamb: the update is weight_decay * p, whose trust ratio is 1 / weight_decay.
            factor = 1 - RATES[0] * (1.0 if isinstance(config, o.Lamb) else 0.5)
            np.testing.assert_allclose(got[name], factor * before, rtol=1e-12, err_msg=name)
        else:
            np.testing.assert_array_equal(got[name], before, err_msg=name)


def test_decay_mask_reads_names_and_logical_rank() -> None:
    params = {
        "matrix": np.zeros((2, 2)),
        "stacked_vector": np.zeros((4, 2)),
        "stacked_matrix": np.zeros((4, 2, 2)),
        "named_layers": np.zeros((4, 2)),
        "head_bias": np.zeros((2, 2)),
        "scale": np.zeros((2, 2)),
        "unnamed": np.zeros((2, 2)),
        "scalar": np.zeros(()),
    }
    axes = {
        "matrix": ("embed", "mlp"),
        "stacked_vector": ("embed",),
        "stacked_matrix": ("embed", "mlp"),
        "named_layers": ("layers", "embed"),
        "head_bias": ("heads", "head_dim"),
        "scale": ("heads", "head_dim"),
        "scalar": (),
    }
    decays = {name for name, value in o.decay_mask(params, axes).items() if value}
    assert decays == {"matrix", "stacked_matrix", "unnamed"}
    with pytest.raises(ValueError, match="do not fit"):
        o.decay_mask({"matrix": np.zeros((2, 2, 2, 2))}, axes)


def test_muon_takes_attention_matrices_by_their_sides() -> None:
    """[embed, heads, head_dim] is one matrix embed -> heads * head_dim; [heads, head_dim, embed] the reverse."""
    rng = np.random.default_rng(0)
    query, out = rng.normal(size=(2, 4, 2, 3)), rng.normal(size=(2, 2, 3, 4))
    axes = {"query": ("embed", "heads", "head_dim"), "out": ("heads", "head_dim", "embed")}
    plain = {"query": ("embed", "mlp"), "out": ("mlp", "embed")}
    config = with_rate(o.Muon())
    cube = train(config, {"query": query, "out": out}, [{"query": query**2, "out": out**2}], axes)
    square = {"query": query.reshape(2, 4, 6), "out": out.reshape(2, 6, 4)}
    matrix = train(config, square, [jax.tree.map(np.square, square)], plain)
    for name in axes:
        np.testing.assert_allclose(cube[name].reshape(matrix[name].shape), matrix[name], rtol=1e-12)


def test_muon_refuses_what_it_cannot_orthogonalise() -> None:
    schedule = make_schedule(ConstantSchedule(), 1)
    with pytest.raises(UserError, match="adamw"):
        o.make_optimizer(o.Muon(), schedule, logical_axes={}).init({"w": jnp.ones((2, 2))})
    cube = {"w": jnp.ones((2, 2, 2))}
    optimizer = o.make_optimizer(o.Muon(), schedule, logical_axes={"w": ("mlp", "heads", "head_dim")})
    with pytest.raises(UserError, match="two axes"):
        optimizer.update(cube, optimizer.init(cube), cube)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: o.AdamW(weight_decay=-1.0), "weight_decay"),
        (lambda: o.AdamW(schedule=ConstantSchedule(peak=-1.0)), r"schedule\.peak"),
        (lambda: o.BertAdam(clip_norm=0.0), "clip_norm"),
        (lambda: o.Lamb(b2=1.0), "b2"),
        (lambda: o.SGD(momentum=1.0), "momentum"),
        (lambda: o.Lion(b1=-0.1), "b1"),
        (lambda: o.AdamW(eps=0.0), "eps"),
        (lambda: o.Adafactor(decay_rate=0.0), "decay_rate"),
        (lambda: o.Adafactor(clip_threshold=0.5), "clip_threshold"),
        (lambda: o.Adafactor(min_factored_size=0), "min_factored_size"),
        (lambda: o.Muon(newton_schulz_steps=0), "newton_schulz_steps"),
        (lambda: o.Muon(consistent_rms=0.0), "consistent_rms"),
    ],
)
def test_refusals(make: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()


def test_settings_are_told_apart_by_name() -> None:
    adapter = TypeAdapter(o.Optimizer)
    got = adapter.validate_python({"name": "muon", "schedule": {"name": "constant", "peak": 0.5}})
    assert got == o.Muon(schedule=ConstantSchedule(peak=0.5))
    with pytest.raises(ValueError, match="lr"):
        adapter.validate_python({"name": "adamw", "lr": 1.0})
    for definition in adapter.json_schema()["$defs"].values():
        assert all(field.get("description") for field in definition["properties"].values())
