"""Adapters against PEFT on small random models: logits both ways, gradients, and AdaLoRA's allocation step for step."""

from __future__ import annotations

import functools
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # an import of its own that is deprecated
    peft = pytest.importorskip("peft")

from flax import nnx  # noqa: E402
from hf_peers import FAMILIES, LENGTHS, SIZE, Pair, make_batch, within  # noqa: E402

from lmobj import adapt, masks  # noqa: E402
from lmobj.interop import peft as files  # noqa: E402
from lmobj.models._layers import Linear, zeros  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    # PEFT asks Transformers by a name that is deprecated there.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]

LIMIT = 1e-5
BY_NAME = {family.name: family for family in FAMILIES}
ATTENTION = {"bert": ["query", "value"], "gpt2": ["c_attn"]}
WIDE = {"bert": ["query", "output.dense"], "gpt2": ["c_attn", "mlp.c_proj"]}
"""Linear maps of both shapes, and with `output.dense` those of attention and feed-forward part."""


def low_rank(kind: Callable[..., Any] = peft.LoraConfig, **settings: Any) -> Callable[[str], Any]:
    """Settings of PEFT by family."""
    return lambda family: kind(
        target_modules=WIDE[family], fan_in_fan_out=family == "gpt2", **{"r": 3, "lora_alpha": 5} | settings
    )


def adalora(family: str) -> Any:
    """AdaLoRA, whose rank has a name of its own."""
    return peft.AdaLoraConfig(
        target_modules=WIDE[family], fan_in_fan_out=family == "gpt2", init_r=4, target_r=2, lora_alpha=7, total_step=10
    )


def ia3(family: str) -> Any:
    """Keys and values (all three on GPT-2) and the inputs of the feed-forward part's second half."""
    return peft.IA3Config(
        target_modules=[*({"bert": ["key", "value"], "gpt2": ["c_attn"]}[family]), WIDE[family][1]],
        feedforward_modules=[WIDE[family][1]],
        fan_in_fan_out=family == "gpt2",
    )


METHODS = {
    "lora": low_rank(),
    "rslora": low_rank(use_rslora=True),
    "dora": low_rank(use_dora=True),
    "adalora": adalora,
    "ia3": ia3,
}


@pytest.fixture(scope="module")
def pairs() -> dict[str, Pair]:
    """Base models with the same weights in both libraries."""
    return {name: Pair(BY_NAME[name], 0) for name in ("bert", "gpt2")}


def base_model(pair: Pair) -> Any:
    return nnx.merge(pair.graphs["model"], pair.params["model"])


def adapted_peer(pair: Pair, settings: Any, seed: int = 0) -> Any:
    """PEFT's model around a copy of the base with every adapter away from its initial value."""
    copy = type(pair.theirs)(pair.theirs.config)
    copy.load_state_dict(pair.theirs.state_dict())
    model = peft.get_peft_model(copy, settings).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    if isinstance(settings, peft.AdaLoraConfig):
        # As at the end of training: ranks differ, and files hold no more than those that are left.
        names = [name for name, _ in model.base_model.model.named_parameters() if "lora_E" in name]
        settings.rank_pattern = {name: [j < 1 + i % 4 for j in range(4)] for i, name in enumerate(names)}
        model.base_model.rankallocator.mask_using_rank_pattern(model.base_model.model, settings.rank_pattern)
    return model


@functools.partial(jax.jit, static_argnames=("graph", "causal"))
def _forward(graph: Any, params: Any, batch: Any, causal: bool) -> Any:
    model = nnx.merge(graph, params)
    mask = (masks.causal() if causal else masks.bidirectional()).packed(batch["segment_ids"])
    types = {} if causal else {"token_types": batch["token_types"]}
    head = model.head_table()
    logits = model.head_hidden(model.hidden(batch["tokens"], mask=mask, **types)) @ head.table.T
    return (logits if head.bias is None else logits + head.bias)[..., :SIZE]


def our_logits(model: Any, pair: Pair, batch: Any) -> np.ndarray:
    """lmobj's logits."""
    return np.asarray(_forward(*nnx.split(model), batch, causal=pair.family.name == "gpt2"))


def real(x: Any) -> np.ndarray:
    """Values at real tokens."""
    return np.asarray(x)[np.arange(np.asarray(x).shape[1]) < np.asarray(LENGTHS)[:, None]]


QUICK = [("bert", "lora"), ("gpt2", "dora"), ("gpt2", "adalora")]
EVERY = [(family, method) for family in ("bert", "gpt2") for method in METHODS]


@pytest.mark.parametrize(("family", "method"), QUICK)
def test_logits_both_ways(pairs: dict[str, Pair], tmp_path: pathlib.Path, family: str, method: str) -> None:
    check_logits(pairs, tmp_path, family, method, merged=False)


@pytest.mark.parametrize(("family", "method"), EVERY)
@pytest.mark.slow
def test_logits_both_ways_and_merged(pairs: dict[str, Pair], tmp_path: pathlib.Path, family: str, method: str) -> None:
    check_logits(pairs, tmp_path, family, method, merged=True)


def check_logits(pairs: dict[str, Pair], tmp_path: pathlib.Path, family: str, method: str, *, merged: bool) -> None:
    """Adapters that PEFT wrote, read, merged and written again: the same logits everywhere."""
    pair = pairs[family]
    batch = make_batch(0, pair.family.token_types)
    theirs = adapted_peer(pair, METHODS[method](family))
    theirs.save_pretrained(tmp_path / "theirs")
    base = base_model(pair)
    model, adapter = files.load(tmp_path / "theirs", base, family)
    with torch.no_grad():
        wanted = real(theirs(**pair.their_inputs(batch)).logits)
        plain = real(pair.theirs(**pair.their_inputs(batch)).logits)
    assert np.max(np.abs(wanted - plain)) > 0.1  # the adapters do something
    ours = real(our_logits(model, pair, batch))
    within(f"{family} {method} read", np.max(np.abs(ours - wanted)), LIMIT)
    if merged:
        alone = real(our_logits(adapt.merge(model), pair, batch))
        within(f"{family} {method} merged", np.max(np.abs(alone - wanted)), LIMIT)

    files.save(tmp_path / "ours", model, adapter, family)
    copy = type(pair.theirs)(pair.theirs.config)
    copy.load_state_dict(pair.theirs.state_dict())
    again = peft.PeftModel.from_pretrained(copy, tmp_path / "ours").eval()
    with torch.no_grad():
        read = real(again(**pair.their_inputs(batch)).logits)
    within(f"{family} {method} written", np.max(np.abs(read - wanted)), LIMIT)


class Net(torch.nn.Module):
    """Linear maps of two shapes in three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict({"query": torch.nn.Linear(5, 7), "up": torch.nn.Linear(7, 4)}) for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One layer's two maps."""
        return self.layers[0]["up"](self.layers[0]["query"](x))


TINY: dict[str, tuple[Any, Any]] = {
    "lora": (adapt.LoRA(rank=3, alpha=5, targets=("query",)), peft.LoraConfig(r=3, lora_alpha=5)),
    "rslora": (
        adapt.LoRA(rank=3, alpha=5, scaling="root_rank", targets=("query",)),
        peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True),
    ),
    "dora": (adapt.DoRA(rank=3, alpha=5, targets=("query",)), peft.LoraConfig(r=3, lora_alpha=5, use_dora=True)),
    "adalora": (
        adapt.AdaLoRA(initial_rank=3, target_rank=2, alpha=5, targets=("query",)),
        peft.AdaLoraConfig(init_r=3, target_r=2, lora_alpha=5, total_step=10),
    ),
    "ia3": (adapt.IA3(targets=("query",), inputs=()), peft.IA3Config(feedforward_modules=[])),
    "ia3 on inputs": (adapt.IA3(targets=("query",), inputs=("query",)), peft.IA3Config(feedforward_modules=["query"])),
}
"""Settings of both libraries for one linear map."""


class One(nnx.Module):
    """A model of one linear map, [in, out] = [5, 7]."""

    def __init__(self, kernel: Any, bias: Any) -> None:
        self.query = Linear(
            5, 7, axes=("embed", "heads"), init=zeros(), bias=True, param_dtype=jnp.float32, rngs=nnx.Rngs(0)
        )
        self.query.kernel, self.query.bias = (
            variable.replace(jnp.asarray(x)) for variable, x in ((self.query.kernel, kernel), (self.query.bias, bias))
        )


@pytest.mark.parametrize("method", TINY)
def test_gradients_of_a_linear_map(method: str) -> None:
    """Of a weighted sum of outputs, to the adapter and to the input. To DoRA's gradient its norm is a constant."""
    adapter, settings = TINY[method]
    settings.target_modules = {"query"}
    net = peft.get_peft_model(Net(), settings)
    generator = torch.Generator().manual_seed(1)
    layer = net.base_model.model.layers[0]["query"]
    own = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    for parameter in own.values():
        parameter.data = parameter.data + 0.5 * torch.randn(parameter.shape, generator=generator)
    x, weights = torch.randn(6, 5, generator=generator, requires_grad=True), torch.randn(6, 7, generator=generator)
    y = layer(x)
    (y * weights).sum().backward()

    base = layer.get_base_layer()
    model = adapt.apply(One(base.weight.detach().numpy().T, base.bias.detach().numpy()), adapter, nnx.Rngs(0))
    for name, parameter in own.items():
        ours = _our_name(name)
        variable = getattr(model.query, ours)
        value = parameter.detach().numpy()
        setattr(model.query, ours, variable.replace(jnp.asarray(_as_ours(value, variable.shape))))
    graph, params = nnx.split(model)
    trained, frozen = adapt.split(nnx.to_pure_dict(params), adapt.trainable(model))

    def total(trained: Any, x: Any) -> Any:
        y = nnx.merge(graph, adapt.join(trained, frozen)).query(x)
        return jnp.sum(y * weights.numpy()), y

    (grads, of_x), ours = jax.grad(total, (0, 1), has_aux=True)(trained, jnp.asarray(x.detach().numpy()))
    np.testing.assert_allclose(ours, y.detach().numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(of_x, x.grad.numpy(), rtol=1e-5, atol=1e-5)
    assert len(grads["query"]) == len(own)
    for name, parameter in own.items():
        grad = grads["query"][_our_name(name)]
        np.testing.assert_allclose(grad, _as_ours(parameter.grad.numpy(), grad.shape), rtol=1e-5, atol=1e-5)


def _our_name(theirs: str) -> str:
    names = {"lora_A": "lora_a", "lora_B": "lora_b", "lora_E": "lora_e", "lora_magnitude": "magnitude", "ia3": "scale"}
    return next(ours for start, ours in names.items() if theirs.startswith(start))


def _as_ours(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return value.T if len(shape) == 2 else value.reshape(shape)


@pytest.mark.parametrize("interval", [1, 3])
def test_allocation_of_ranks_step_by_step(interval: int) -> None:
    """Budgets, kept triples and singular values after each step, under the same random gradients and updates."""
    total, start, final, rank = 24, 3, 6, 5
    settings = peft.AdaLoraConfig(
        init_r=rank,
        target_r=2,
        tinit=start,
        tfinal=final,
        deltaT=interval,
        beta1=0.7,
        beta2=0.9,
        total_step=total,
        target_modules=["query", "up"],
    )
    adapter = adapt.AdaLoRA(
        total_steps=total,
        initial_rank=rank,
        target_rank=2,
        initial_steps=start,
        final_steps=final,
        interval=interval,
        beta1=0.7,
        beta2=0.9,
    )
    net = peft.get_peft_model(Net(), settings).base_model
    parameters = {n: p for n, p in net.model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(interval)

    def tree(values: dict[str, torch.Tensor]) -> dict[str, Any]:
        """By map and kind, stacked over layers, in our layout."""
        return {
            name: {
                ours: jnp.stack(
                    [
                        jnp.asarray(
                            layout(values[f"layers.{i}.{name}.lora_{ours[-1].upper()}.default"].detach().numpy())
                        )
                        for i in range(3)
                    ]
                )
                for ours, layout in (("lora_a", np.transpose), ("lora_e", np.ravel), ("lora_b", np.transpose))
            }
            for name in ("query", "up")
        }

    step = jax.jit(adapt.allocate, static_argnums=0)
    state = adapt.init_allocation(tree(parameters))
    budgets = []
    for t in range(total + 1):
        for p in parameters.values():
            p.grad = torch.randn(p.shape, generator=generator)
            p.data = p.data + 0.3 * torch.randn(p.shape, generator=generator)
        params, state = step(adapter, tree(parameters), tree({n: p.grad for n, p in parameters.items()}), state, t)
        net.update_and_allocate(t)
        budgets.append(net.rankallocator.budget_schedule(t)[0])
        assert int(adapt.rank_budget(adapter, 6, t)) == budgets[-1]
        theirs = tree(parameters)
        jax.tree.map(np.testing.assert_array_equal, params, theirs)
        pattern = settings.rank_pattern or {}
        for name in ("query", "up"):
            for i in range(3):
                kept = pattern.get(f"layers.{i}.{name}.lora_E.default", [True] * rank)
                assert state.kept[name][i].tolist() == kept, (t, name, i)
    assert budgets[:4] == [30] * 4
    assert budgets[-6:] == [12] * 6
    assert len(set(budgets)) > 8
    assert sum(map(sum, settings.rank_pattern.values())) == 12


def test_the_regulariser() -> None:
    """PEFT adds it to the loss of an output that has one."""
    net = peft.get_peft_model(Net(), peft.AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=["query"]))
    matrices = {n: p.detach() for n, p in net.named_parameters() if "lora_A" in n or "lora_B" in n}

    class Output:
        loss = torch.zeros(())

    net.base_model.model.forward = Output
    theirs = net.base_model().loss / 0.5  # the default coefficient
    ours = adapt.orthogonality(
        {
            name: {
                "lora_a": matrices[name].numpy().T,
                "lora_e": np.zeros(3),
                "lora_b": matrices[name.replace("_A", "_B")].numpy().T,
            }
            for name in matrices
            if "lora_A" in name
        }
    )
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-6)
