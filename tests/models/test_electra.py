"""The ELECTRA pair: what generator and discriminator share, by values, gradients and counts, and their sizes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import CONFIGS, SEEDS, VOCAB, build, hidden, random_tokens
from flax import nnx

from lmobj import masks
from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.models import Electra, ElectraConfig, EncoderConfig
from lmobj.models._electra import DiscriminatorHead

CONFIG: Any = CONFIGS["electra"]
ALIKE = {"generator_fraction": 1.0, "generator_heads": 4}
"""A generator of the discriminator's size."""
SHARED = ["embeddings", "none", "all", "gradient_disentangled"]
SEEN = {"mask": masks.bidirectional()}


def shared(sharing: str) -> ElectraConfig:
    """The tiny pair with another sharing."""
    alike = {"generator_fraction": 1.0, "generator_mlp_width": None} if sharing == "all" else {}
    return dataclasses.replace(CONFIG, sharing=sharing, **alike)


@functools.partial(jax.jit, static_argnames=("graphdef", "which"))
def outputs(graphdef: Any, params: Any, which: str, dropout: Any = None) -> Any:
    """Hidden states of one of the two, for the same tokens."""
    model = nnx.merge(graphdef, params)
    run = model.generator_hidden if which == "generator" else model.discriminator_hidden
    types = jnp.tile(jnp.asarray([0, 0, 1, 1, 1]), (3, 1))
    return run(random_tokens(3, 5), token_types=types, dropout=dropout, **SEEN)


def count(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("sharing", SHARED)
def test_gradients_reach_only_what_each_loss_may_train(sharing: str) -> None:
    graphdef, params = build(shared(sharing))
    tokens = random_tokens(3, 5)

    def losses(params: Any) -> tuple[Any, Any]:
        model = nnx.merge(graphdef, params)
        head = model.generator_head_table()
        logits = model.generator_head_hidden(model.generator_hidden(tokens, **SEEN)) @ head.table.T + head.bias
        return jnp.sum(jnp.sin(logits)), jnp.sum(
            jnp.sin(model.discriminate(model.discriminator_hidden(tokens, **SEEN)))
        )

    mlm, disc = jax.jit(jax.jacrev(losses))(params)
    reached = [
        {name for name, part in grads.items() if jax.tree.reduce(lambda a, x: a or bool(x.any()), part, False)}
        for grads in (mlm, disc)
    ]
    own = {"discriminator", "discriminator_head"}
    assert reached[0] == {"embeddings", "generator_head", "discriminator" if sharing == "all" else "generator"}
    assert (
        reached[1]
        == own
        | {
            "embeddings": {"embeddings"},
            "all": {"embeddings"},
            "none": {"discriminator_embeddings"},
            "gradient_disentangled": {"discriminator_embeddings"},
        }[sharing]
    )
    assert set(params) == reached[0] | reached[1], "every part is trained by one of the losses"
    if sharing != "none":
        for table in ("tokens", "positions", "token_types"):
            assert jax.tree.reduce(lambda a, x: a or bool(x.any()), mlm["embeddings"][table], False), table


@pytest.mark.parametrize("sharing", SHARED)
def test_both_equal_encoders_with_the_same_parameters(sharing: str) -> None:
    with jax.enable_x64(True):
        config = dataclasses.replace(shared(sharing), dtype="float64", param_dtype="float64")
        graphdef, params = build(config)
        embeddings = params["embeddings"]
        of_discriminator = params.get("discriminator_embeddings", embeddings)
        if sharing == "gradient_disentangled":
            tables = ("tokens", "positions", "token_types")
            added = {t: {"table": embeddings[t]["table"] + of_discriminator[t]["table"]} for t in tables}
            of_discriminator = added | {"norm": of_discriminator["norm"]}
        parts = {
            "generator": (config.generator, embeddings, params.get("generator", params["discriminator"])),
            "discriminator": (config.discriminator, of_discriminator, params["discriminator"]),
        }
        for which, (encoder, its_embeddings, trunk) in parts.items():
            graph, whole = build(encoder)
            whole = whole | trunk | {"embeddings": its_embeddings}
            model = nnx.merge(graph, whole)
            types = jnp.tile(jnp.asarray([0, 0, 1, 1, 1]), (3, 1))
            expected = model.hidden(random_tokens(3, 5), token_types=types, **SEEN)
            np.testing.assert_allclose(outputs(graphdef, params, which), expected, rtol=0, atol=1e-12)


def test_disentangled_embeddings_begin_as_the_generators() -> None:
    graphdef, state = nnx.split(dataclasses.replace(CONFIG, sharing="gradient_disentangled").build(VOCAB, nnx.Rngs(3)))
    params = nnx.to_pure_dict(state)
    for name, part in params["discriminator_embeddings"].items():
        assert name == "norm" or not part["table"].any(), name
    tied = {name: part for name, part in params.items() if name != "discriminator_embeddings"}
    began = outputs(graphdef, params, "discriminator")
    np.testing.assert_allclose(began, outputs(build(CONFIG)[0], tied, "discriminator"), rtol=0, atol=1e-6)
    moved = params["embeddings"] | {"tokens": {"table": jax.random.normal(jax.random.key(0), (32, 8))}}
    changed = outputs(graphdef, params | {"embeddings": moved}, "discriminator")
    assert float(jnp.abs(changed - began).max()) > 0.1, "the discriminator follows the generator's table"


@pytest.mark.parametrize("sharing", ["all", "embeddings"])
@pytest.mark.parametrize("rates", [{}, {"dropout": 0.0, "attention_dropout": 0.0}], ids=["everywhere", "embedding"])
def test_the_two_draw_dropout_apart(sharing: str, rates: dict[str, float]) -> None:
    alike = {"generator_fraction": 1.0} if sharing == "all" else ALIKE
    graphdef, params = build(dataclasses.replace(CONFIG, sharing=sharing, **alike, **rates))
    if sharing != "all":
        params = params | {"generator": params["discriminator"]}
    off = [outputs(graphdef, params, which) for which in ("generator", "discriminator")]
    np.testing.assert_allclose(*off, rtol=0, atol=1e-6)
    on = [outputs(graphdef, params, which, SEEDS) for which in ("generator", "discriminator")]
    assert float(jnp.abs(on[0] - on[1]).max()) > 0.1


def test_as_a_language_model_it_is_the_discriminator() -> None:
    graphdef, params = build(CONFIG)
    types = jnp.tile(jnp.asarray([0, 0, 1, 1, 1]), (3, 1))
    states = hidden(graphdef, params, random_tokens(3, 5), token_types=types, dropout=SEEDS, **SEEN)
    np.testing.assert_allclose(states, outputs(graphdef, params, "discriminator", SEEDS), rtol=0, atol=1e-6)
    model = nnx.merge(graphdef, params)
    assert model.head_style.width == states.shape[-1] == 16
    for head in (lambda: model.head_hidden(states), model.head_table):
        with pytest.raises(UserError, match="no vocabulary head; use the objective replaced_token_detection"):
            head()


def test_heads_written_out() -> None:
    graphdef, params = build(CONFIG)
    model = nnx.merge(graphdef, params)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    gelu = lambda x: np.asarray(jax.nn.gelu(jnp.asarray(x, jnp.float32), approximate=False), np.float64)  # noqa: E731
    states = np.random.default_rng(0).normal(size=(2, 5, 16))
    head = p["discriminator_head"]
    dense = gelu(states @ head["dense"]["kernel"] + head["dense"]["bias"])  # and no norm
    expected = (dense @ head["out"]["kernel"] + head["out"]["bias"])[..., 0]
    np.testing.assert_allclose(model.discriminate(jnp.asarray(states, jnp.float32)), expected, rtol=0, atol=1e-5)

    states, head = states[..., :8], p["generator_head"]  # the generator is half as wide, and the embedding 8
    dense = gelu(states @ head["dense"]["kernel"] + head["dense"]["bias"])
    normed = (dense - dense.mean(-1, keepdims=True)) / np.sqrt(dense.var(-1, keepdims=True) + 1e-12)
    expected = normed * head["norm"]["scale"] + head["norm"]["bias"]
    np.testing.assert_allclose(model.generator_head_hidden(jnp.asarray(states, jnp.float32)), expected, atol=1e-4)
    np.testing.assert_array_equal(model.generator_head_table().table, params["embeddings"]["tokens"]["table"])
    np.testing.assert_array_equal(model.generator_head_table().bias, params["generator_head"]["bias"])


def test_the_discriminators_last_layer_begins_glorot_uniform() -> None:
    head = DiscriminatorHead(EncoderConfig(width=1024, heads=16).head_style, nnx.Rngs(0))
    out = np.asarray(head.out.kernel[...])
    bound = np.sqrt(6 / 1025)  # 0.0765; its standard deviation is bound / sqrt(3) = 0.0442, not 0.02
    assert 0.99 * bound < np.abs(out).max() <= bound
    assert out.std() == pytest.approx(bound / np.sqrt(3), rel=0.05)
    assert head.dense.kernel[...].std() == pytest.approx(0.02 * 0.8796, rel=0.01)


def test_the_projections_of_the_embeddings_begin_glorot_uniform() -> None:
    config = ElectraConfig(layers=1, width=256, heads=4, embedding_width=128, generator_fraction=0.25, max_length=8)
    model = config.build(Vocabulary(16), nnx.Rngs(0))
    for trunk, into, out in ((model.discriminator, 128, 256), (model.generator, 128, 64)):
        kernel, bound = np.asarray(trunk.projection.kernel[...]), np.sqrt(6 / (into + out))
        assert kernel.shape == (into, out)
        assert 0.99 * bound < np.abs(kernel).max() <= bound


SMALL = {"layers": 12, "width": 256, "heads": 4, "embedding_width": 128, "generator_fraction": 0.25}
BASE: dict[str, Any] = {}
LARGE = {"layers": 24, "width": 1024, "heads": 16, "generator_fraction": 0.25}


@pytest.mark.parametrize(
    ("size", "discriminator", "generator"),
    [
        # Embeddings V E + 512 E + 2 E + 2 E; projection E H + H where E is not H; a block 4 (H H + H) + 2 H F + F + H +
        # 4 H with F = 4 H; discriminator head H H + H + H + 1; generator head h E + E + 2 E + V. V = 30522.
        # small: 3,972,864 + 33,024 + 12 x 789,760 + 66,049; generator h = 64: 8,256 + 12 x 49,984 + 39,098
        (SMALL, 13_549_057, 647_162),
        # base: 23,837,184 + 12 x 7,087,872 + 591,361; h = 256: 196,864 + 12 x 789,760 + 229,434
        (BASE, 109_483_009, 9_903_418),
        # large: 31,782,912 + 24 x 12,596,224 + 1,050,625; h = 256: 262,400 + 24 x 789,760 + 295,738
        (LARGE, 335_142_913, 19_512_378),
    ],
    ids=["small", "base", "large"],
)
def test_parameters_of_the_published_sizes(size: dict[str, Any], discriminator: int, generator: int) -> None:
    config = ElectraConfig(**size, vocab_multiple=1)

    def counts(config: ElectraConfig) -> dict[str, int]:
        model = jax.eval_shape(lambda: config.build(Vocabulary(30522), nnx.Rngs(0)))
        return {name: count(part) for name, part in nnx.to_pure_dict(nnx.state(model)).items()}

    tied = counts(config)
    assert tied["embeddings"] + tied["discriminator"] + tied["discriminator_head"] == discriminator
    assert tied["generator"] + tied["generator_head"] == generator
    for sharing in ("none", "gradient_disentangled"):
        apart = counts(dataclasses.replace(config, sharing=sharing))
        assert apart == tied | {"discriminator_embeddings": tied["embeddings"]}


def test_rules_of_the_generators_size() -> None:
    def size(**settings: Any) -> tuple[int | None, ...]:
        g = ElectraConfig(**settings).generator
        return g.layers, g.width, g.heads, g.mlp_width, g.embedding_width

    assert size() == (12, 256, 4, 1024, 768)  # base: a third
    assert size(**SMALL) == (12, 64, 1, 256, 128)
    assert size(**LARGE) == (24, 256, 4, 1024, 1024)
    assert size(**SMALL | {"generator_fraction": 1.0}) == (12, 256, 4, 1024, 128)  # the released small model
    assert size(width=100, heads=4, generator_fraction=0.125)[1] == 12  # 12.5 to even
    own = {"generator_layers": 3, "generator_heads": 2, "generator_mlp_width": 7}
    assert size(**own) == (3, 256, 2, 7, 768)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generator_fraction": 0.0}, r"generator_fraction is 0\.0; it must be above 0"),
        ({"generator_fraction": 1.5}, r"generator_fraction is 1\.5"),
        ({"generator_fraction": 0.0001}, "a generator of width 0"),
        ({"generator_heads": 5}, "width 256 with 5 heads"),
        ({"generator_layers": 0}, "generator_layers is 0"),
        ({"heads": 7}, "model.heads is 7"),
        ({"sharing": "all"}, "sharing is all and model.generator_fraction is 0.33.*must be 1"),
        ({"sharing": "all", "generator_fraction": 1.0, "generator_layers": 2}, "generator_layers is 2; .* be null"),
        ({"positions": "rotary", "generator_fraction": 33 / 768}, "heads have width 33, which must be even"),
    ],
)
def test_impossible_pairs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ElectraConfig(**change)


def test_one_trunk_for_both() -> None:
    model = shared("all").build(VOCAB, nnx.Rngs(0))
    assert isinstance(model, Electra)
    assert model.generator is None
    tied = dataclasses.replace(CONFIG, **ALIKE).build(VOCAB, nnx.Rngs(0))
    assert count(nnx.state(tied)) - count(nnx.state(model)) == count(nnx.state(tied.discriminator))
