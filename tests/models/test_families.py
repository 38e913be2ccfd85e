"""What every family keeps: shapes, visibility, packing, padding and batch invariance, precision, axes, depth."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from families import CAUSAL, CONFIGS, HEADLESS, SEEDS, VOCAB, build, hidden, random_tokens, states
from flax import nnx

from lmobj import masks, partition
from lmobj.errors import UserError
from lmobj.masks import AttentionMask
from lmobj.models import DecoderConfig, EncoderConfig, EncoderDecoderModel, GRUConfig, HeadedModel, ModelConfig

L = 10
EVERY = list(CONFIGS)
WITH_HEAD = [name for name in CONFIGS if name not in HEADLESS]


def natural_mask(name: str) -> AttentionMask:
    """The mask a family is used with."""
    return masks.causal() if name in CAUSAL else masks.bidirectional()


def in_float64(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, dtype="float64", param_dtype="float64")


@pytest.mark.parametrize("name", WITH_HEAD)
def test_shapes_and_protocol(name: str) -> None:
    graphdef, params = build(CONFIGS[name])
    model = nnx.merge(graphdef, params)
    assert isinstance(model, HeadedModel) != isinstance(model, EncoderDecoderModel)
    found = hidden(graphdef, params, random_tokens(3, L), mask=natural_mask(name))
    head = model.head_table()
    table_width = 8 if name == "albert" else 16
    assert found.shape == (3, L, 16)
    assert model.head_hidden(found).shape == (3, L, table_width)
    assert head.table.shape == (32, table_width)  # 30 tokens padded up to a multiple of 8
    assert model.head_style.width == 16
    assert model.head_style.param_dtype == jnp.float32
    assert head.vocab_size == 30
    assert head.bias is None or head.bias.shape == (32,)


def test_an_unpadded_table_says_so() -> None:
    config = dataclasses.replace(CONFIGS["gpt2"], vocab_multiple=10, soft_cap=30.0)
    head = config.build(VOCAB, nnx.Rngs(0)).head_table()
    assert (head.table.shape, head.vocab_size, head.soft_cap) == ((30, 16), None, 30.0)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_hidden_layers_begin_with_the_embedding_and_end_with_hidden(name: str) -> None:
    graphdef, params = build(CONFIGS[name])
    tokens, mask = random_tokens(3, L), natural_mask(name)

    def hidden_layers(graphdef: Any, params: Any) -> Any:
        model = nnx.merge(graphdef, params)
        return nnx.jit(lambda model: model.hidden_layers(tokens, mask=mask, dropout=SEEDS))(model)

    layers = hidden_layers(graphdef, params)
    assert layers.shape == (3, 3, L, 16)
    final = hidden(graphdef, params, tokens, mask=mask, dropout=SEEDS)
    np.testing.assert_allclose(layers[-1], final, rtol=1e-5, atol=1e-5)
    one_layer = dataclasses.replace(CONFIGS[name], layers=1)
    first = jax.tree.map(lambda x: x[:1], params["stack"])
    expected = hidden_layers(build(one_layer)[0], params | {"stack": first})
    np.testing.assert_allclose(layers[0], expected[0], rtol=1e-5)
    if name == "bert":  # no norm at the end, so the shallow model's last state is the deep one's middle state
        np.testing.assert_allclose(layers[1], expected[1], rtol=1e-5, atol=1e-6)


def reach(mask: AttentionMask, layers: int) -> np.ndarray:
    """[L, L]: which inputs an output can depend on after so many layers of attention."""
    allowed = np.asarray(mask.dense(L, L))[0, 0].astype(int)
    return np.linalg.matrix_power(allowed, layers) > 0


SEGMENTS = jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 3, 0, 0]])
PREFIX = jnp.asarray([[1, 1, 0, 0, 1, 0, 0, 0, 0, 0]], bool)
VISIBILITY = {
    "causal": masks.causal(),
    "packed": masks.causal().packed(SEGMENTS),
    "window": masks.sliding_window(3),
    "prefix": masks.prefix(PREFIX).packed(SEGMENTS),
    "bidirectional": masks.bidirectional().packed(SEGMENTS),
}


@pytest.mark.parametrize(
    ("name", "mask_name"),
    [
        *(("gpt2", mask) for mask in VISIBILITY),
        *(("llama", mask) for mask in ("packed", "window")),
        *(("bert", mask) for mask in ("prefix", "bidirectional")),
        *(("gru", mask) for mask in ("causal", "packed")),
    ],
)
def test_gradients_reach_exactly_what_the_mask_shows(name: str, mask_name: str) -> None:
    mask, config = VISIBILITY[mask_name], CONFIGS[name]
    graphdef, params = build(config)
    tokens = jnp.arange(L)[None]  # all different: row j of the table's gradient belongs to position j alone
    direction = jax.random.normal(jax.random.key(5), (16,))

    def outputs(table: Any) -> Any:
        changed = params["embeddings"] | {"tokens": {"table": table}} if "embeddings" in params else {"table": table}
        model = nnx.merge(graphdef, params | {"embeddings" if "embeddings" in params else "tokens": changed})
        return model.hidden(tokens, mask=mask)[0] @ direction

    jacobian = jax.jit(jax.jacrev(outputs))(params.get("embeddings", params)["tokens"]["table"])
    np.testing.assert_array_equal(np.linalg.norm(jacobian[:, :L], axis=-1) > 0, reach(mask, config.layers))


@pytest.mark.parametrize("name", EVERY)
def test_packed_row_equals_its_documents_alone(name: str) -> None:
    with jax.enable_x64(True):
        graphdef, params = build(in_float64(CONFIGS[name]))
        tokens, mask = random_tokens(1, 12), natural_mask(name)
        lengths = (5, 5, 2)
        segments = jnp.repeat(jnp.arange(1, 4), jnp.asarray(lengths))[None]
        positions = jnp.concatenate([jnp.arange(n) for n in lengths])[None]
        packed = hidden(graphdef, params, tokens, mask=mask.packed(segments), positions=positions)
        pieces = jnp.split(tokens, np.cumsum(lengths)[:-1], axis=1)
        alone = [hidden(graphdef, params, piece, mask=mask) for piece in pieces]
        np.testing.assert_allclose(packed, jnp.concatenate(alone, axis=1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_padding_and_batch_split_change_nothing_with_dropout_on(name: str) -> None:
    with jax.enable_x64(True):
        graphdef, params = build(in_float64(CONFIGS[name]))
        tokens = random_tokens(3, 8)

        def of(rows: slice, padding: int, seeds: Any = SEEDS) -> Any:
            row_tokens, segments = (jnp.pad(x[rows], ((0, 0), (0, padding))) for x in (tokens, jnp.ones_like(tokens)))
            mask = natural_mask(name).packed(segments)
            return hidden(graphdef, params, row_tokens, mask=mask, dropout=seeds[rows])[:, :8]

        whole = of(slice(None), 0)
        np.testing.assert_allclose(of(slice(None), 4), whole, rtol=0, atol=1e-12)
        np.testing.assert_allclose(of(slice(1, 3), 0), whole[1:], rtol=0, atol=1e-12)
        off = hidden(graphdef, params, tokens, mask=natural_mask(name))
        assert float(jnp.abs(whole - off).max()) > 0.1, "dropout is off"
        assert float(jnp.abs(whole - of(slice(None), 0, SEEDS + 1)).max()) > 0.1, "the seed is not read"


def dtypes_inside(jaxpr: Any) -> Iterator[tuple[str, Any]]:
    """(primitive, dtype of an output) of every equation, nested ones included."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield equation.primitive.name, getattr(variable.aval, "dtype", None)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from dtypes_inside(inner)


def gradient_jaxpr(config: ModelConfig, name: str) -> Any:
    graphdef, params = build(config)
    tokens = random_tokens(3, L)

    def loss(params: Any) -> Any:
        model = nnx.merge(graphdef, params)
        found = states(model, tokens, mask=natural_mask(name).packed(jnp.ones_like(tokens)), dropout=SEEDS)
        head = model.head_table()
        logits = model.head_hidden(found) @ head.table.astype(found.dtype).T
        return jnp.sum(jnp.square(logits))

    return jax.make_jaxpr(jax.value_and_grad(loss))(params).jaxpr


@pytest.mark.parametrize("name", WITH_HEAD)
def test_float64_never_passes_through_less(name: str) -> None:
    with jax.enable_x64(True):
        found = set(dtypes_inside(gradient_jaxpr(in_float64(CONFIGS[name]), name)))
        narrow = {(op, str(t)) for op, t in found if t is not None and t in (jnp.float32, jnp.bfloat16)}
        assert not narrow
        assert ("dot_general", jnp.dtype("float64")) in found


@pytest.mark.parametrize("name", WITH_HEAD)
def test_bfloat16_products_and_float32_parameters(name: str) -> None:
    config = dataclasses.replace(CONFIGS[name], dtype="bfloat16")
    graphdef, params = build(config)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    found = hidden(graphdef, params, random_tokens(3, L), mask=natural_mask(name), dropout=SEEDS)
    assert found.dtype == jnp.bfloat16
    assert bool(jnp.isfinite(found).all())
    products = [t for op, t in dtypes_inside(gradient_jaxpr(config, name)) if op == "dot_general"]
    # Attention logits come out of their product in float32; every other product is bfloat16.
    assert products.count(jnp.bfloat16) > len(products) / 2


@pytest.mark.parametrize("name", ["gpt2", pytest.param("t5", marks=pytest.mark.slow)])
def test_remat_policies_agree(name: str) -> None:
    with jax.enable_x64(True):
        tokens = random_tokens(3, L)
        results = []
        for remat in ("none", "dots", "block", "offload"):
            graphdef, params = build(dataclasses.replace(in_float64(CONFIGS[name]), remat=remat))

            def loss(params: Any, graphdef: Any = graphdef) -> Any:
                return jnp.sum(jnp.sin(hidden(graphdef, params, tokens, mask=natural_mask(name), dropout=SEEDS)))

            results.append(jax.jit(jax.value_and_grad(loss))(params))
        for other in results[1:]:
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-11), results[0], other)


def test_offload_is_refused_where_there_is_no_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        def addressable_memories(self) -> list[Any]:
            return [type("Memory", (), {"kind": "device"})]

    graphdef, params = build(dataclasses.replace(CONFIGS["gpt2"], remat="offload"))
    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    with pytest.raises(ValueError, match=r"model\.remat is offload, .* these have device; accepted here: none"):
        hidden(graphdef, params, random_tokens(3, L), mask=natural_mask("gpt2"))


@pytest.mark.parametrize("name", EVERY)
def test_every_parameter_has_axes_that_the_rules_know(name: str) -> None:
    state = nnx.state(jax.eval_shape(lambda: CONFIGS[name].build(VOCAB, nnx.Rngs(0))))
    stacked = 0
    for path, variable in nnx.to_flat_state(state):
        assert type(variable) is nnx.Param, f"{path} is not a parameter"
        axes, rank = variable.get_metadata()["axes"], variable.get_value().ndim
        assert len(partition.spec(axes, partition.DEFAULT_RULES, rank=rank)) == rank, path
        stacked += rank == len(axes) + 1
    assert stacked >= 4


@pytest.mark.parametrize("name", WITH_HEAD)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    graphdef, params = build(CONFIGS[name])
    tokens = random_tokens(3, L)

    def loss(params: Any) -> Any:
        model = nnx.merge(graphdef, params)
        head = model.head_table()
        logits = model.head_hidden(states(model, tokens, mask=natural_mask(name))) @ head.table.T
        return jnp.sum(jnp.sin(logits if head.bias is None else logits + head.bias))

    gradients = jax.jit(jax.grad(loss))(params)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        leaf = jax.tree_util.keystr(path)
        # A key's bias adds the same to every logit of a query and moves no softmax, unless keys are rotated after it.
        silent = leaf.endswith("['key']['bias']") and CONFIGS[name].positions != "rotary"
        assert (float(jnp.abs(gradient).max()) > 1e-3) != silent, leaf


@pytest.mark.parametrize("name", EVERY)
def test_the_program_does_not_grow_with_depth(name: str) -> None:
    def instructions(layers: int) -> int:
        config = dataclasses.replace(CONFIGS[name], layers=layers)
        graphdef, params = nnx.split(jax.eval_shape(lambda: config.build(VOCAB, nnx.Rngs(0))))

        def loss(params: Any, tokens: Any) -> Any:
            return jnp.sum(states(nnx.merge(graphdef, params), tokens, mask=natural_mask(name), dropout=SEEDS))

        program = jax.jit(jax.grad(loss)).lower(params, random_tokens(3, L)).as_text()
        return len(re.findall(r"^\s+%\S+ = ", program, re.MULTILINE))

    few = instructions(6)
    assert few > 100
    assert instructions(24) == few


@pytest.mark.parametrize("name", EVERY)
def test_builds_under_jit_with_the_same_values(name: str) -> None:
    def params_of(key: Any) -> Any:
        return nnx.to_pure_dict(nnx.split(CONFIGS[name].build(VOCAB, nnx.Rngs(params=key)))[1])

    eager, jitted = params_of(jax.random.key(3)), jax.jit(params_of)(jax.random.key(3))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), eager, jitted)
    stack = {"gru": "layers", "electra": "discriminator", "t5": "decoder", "bart": "decoder"}.get(name, "stack")
    stacked = jax.tree.leaves(eager[stack].get("stack", eager[stack]))
    if name == "albert":
        assert {len(x) for x in stacked} == {1}
    else:
        assert any(bool(jnp.any(x[0] != x[1])) for x in stacked), "layers begin alike"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DecoderConfig(width=10, heads=3), "model.heads is 3 and model.width is 10"),
        (lambda: DecoderConfig(heads=12, kv_heads=5), "model.kv_heads is 5 and model.heads is 12"),
        (lambda: DecoderConfig(kv_heads=0), "model.kv_heads is 0; it must be at least 1"),
        (lambda: DecoderConfig(width=12, heads=4, positions="rotary"), "is 3; it must be even"),
        (lambda: DecoderConfig(rope_base=1.0), "model.rope_base is 1.0"),
        (lambda: DecoderConfig(window=0), "model.window is 0"),
        (lambda: DecoderConfig(soft_cap=0.0), "model.soft_cap is 0.0"),
        (lambda: DecoderConfig(layers=0), "model.layers is 0; it must be at least 1"),
        (lambda: DecoderConfig(dropout=1.0), r"model.dropout is 1.0; it must be in \[0, 1\)"),
        (lambda: DecoderConfig(attention_backend="cudnn", attention_dropout=0.1), "cannot drop out"),
        (lambda: DecoderConfig(attention_backend="splash", attention_dropout=0.1), "is splash, which cannot drop out"),
        (lambda: DecoderConfig(attention_backend="cudnn", attention_soft_cap=5.0), "cannot cap"),
        (lambda: EncoderConfig(width=10, heads=3), "model.heads is 3 and model.width is 10"),
        (lambda: EncoderConfig(token_types=0), "model.token_types is 0"),
        (lambda: EncoderConfig(embedding_width=0), "model.embedding_width is 0"),
        (lambda: EncoderConfig(norm_eps=0.0), "model.norm_eps is 0.0"),
        (lambda: GRUConfig(width=0), "model.width is 0"),
        (lambda: GRUConfig(embedding_dropout=-0.1), "model.embedding_dropout is -0.1"),
        (lambda: GRUConfig(init_range=0.0), "model.init_range is 0.0"),
        (lambda: DecoderConfig(dtype="float64").build(VOCAB, nnx.Rngs(0)), "model.dtype is float64"),
    ],
)
def test_impossible_settings_are_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("family", typing.get_args(ModelConfig), ids=lambda family: family.name)
def test_no_number_below_zero_is_accepted_anywhere(family: Any) -> None:
    hints = typing.get_type_hints(family)
    numbers = [name for name, hint in hints.items() if {int, float} & {hint, *typing.get_args(hint)}]
    assert len(numbers) >= 5
    for name in numbers:
        with pytest.raises(UserError, match=rf"model\.{name} is -1"):
            family(**{name: -1})


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5"])
def test_rows_beyond_max_length_are_refused(name: str) -> None:
    model = CONFIGS[name].build(VOCAB, nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"model\.max_length is 16 and rows have 17 tokens"):
        states(model, random_tokens(1, 17), mask=natural_mask(name))
