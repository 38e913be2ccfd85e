"""The encoder-decoder: who sees whom, positions, dropout, the cache and the settings."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lmobj import masks
from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.models import EncoderDecoderConfig, EncoderDecoderModel, RowUse
from lmobj.models._attention import Attention, Call, Cross, CrossAttention
from lmobj.models._encoder_decoder import DECODER
from lmobj.models._layers import normal
from lmobj.models._relative_bias import RelativeBias, relative_buckets
from lmobj.objectives import CausalLM, Context, Example

_SIZE: dict[str, Any] = {
    "layers": 2, "decoder_layers": 1, "width": 12, "heads": 2, "head_width": 4, "mlp_width": 16, "max_length": 16,
    "vocab_multiple": 8, "relative_buckets": 8, "relative_distance": 6, "dtype": "float64", "param_dtype": "float64",
}  # fmt: skip
_KINDS: dict[str, dict[str, Any]] = {
    "t5": {"scale_output": True, "tie_embeddings": True},
    "transformer": {
        "positions": "sinusoidal", "norm": "layernorm", "pre_norm": False, "activation": "relu", "bias": True,
        "tie_embeddings": True, "scale_attention": True, "scale_embeddings": True,
    },
    "bart": {
        "positions": "learned", "norm": "layernorm", "pre_norm": False, "embedding_norm": True, "bias": True,
        "activation": "gelu_exact", "tie_embeddings": True, "output_bias": True, "scale_attention": True,
        "init_std": 0.5,
    },
}  # fmt: skip
_SEEDS = jnp.asarray([7, 8], jnp.uint32)


@functools.cache
def _model(kind: str, **settings: Any) -> Any:
    with jax.enable_x64(True):
        return EncoderDecoderConfig(**(_SIZE | _KINDS[kind] | settings)).build(Vocabulary(21), nnx.Rngs(params=3))


@functools.partial(jax.jit, static_argnames="graphdef")
def _run(graphdef: Any, state: Any, read: Any, written: Any, segments: Any, of: Any, positions: Any, seeds: Any) -> Any:
    """The decoder's hidden states of rows that read other rows; `of` are the written tokens' segments."""
    model = nnx.merge(graphdef, state)
    encoded = model.encode(
        read, mask=masks.bidirectional().packed(segments), positions=None if positions is None else positions[0],
        dropout=seeds,
    )  # fmt: skip
    return model.decode(
        written, encoded, mask=masks.causal().packed(of), cross_mask=masks.bidirectional().packed(of, segments),
        positions=None if positions is None else positions[1], dropout=seeds,
    )  # fmt: skip


def _hidden(
    model: Any, read: Any, written: Any, segments: Any = None, of: Any = None, positions: Any = None, seeds: Any = None
) -> Any:
    read, written = jnp.asarray(read), jnp.asarray(written)
    segments = jnp.ones_like(read) if segments is None else jnp.asarray(segments)
    of = jnp.ones_like(written) if of is None else jnp.asarray(of)
    return _run(*nnx.split(model), read, written, segments, of, positions, seeds)


def _tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 21, shape)


@pytest.mark.parametrize("kind", _KINDS)
def test_padding_of_the_encoder_does_not_matter_and_a_cache_gives_the_same(kind: str) -> None:
    with jax.enable_x64(True):
        model = _model(kind)
        assert isinstance(model, EncoderDecoderModel)
        read, written = _tokens(2, 7), _tokens(2, 5, seed=1)
        valid = np.arange(7) < np.array([[7], [4]])
        whole = _hidden(model, read, written, valid.astype(int))
        short = _hidden(model, read[1:, :4], written[1:])
        np.testing.assert_allclose(whole[1:], short, atol=1e-12)

        encoded = model.encode(jnp.asarray(read), mask=masks.bidirectional().packed(jnp.asarray(valid.astype(int))))
        cache = model.init_cache(encoded, jnp.asarray(valid), 6)
        assert all(len(x) == 2 for x in jax.tree.leaves(cache))
        step = jax.jit(lambda tokens, cache, positions: model.step(tokens, cache, positions))
        first, cache = step(jnp.asarray(written[:, :3]), cache, jnp.asarray([[0, 1, 2], [0, 1, -1]]))
        np.testing.assert_allclose(first[0], whole[0, :3], atol=1e-12)
        np.testing.assert_allclose(first[1, :2], whole[1, :2], atol=1e-12)
        second, cache = step(jnp.asarray([written[0, 3:4], written[1, 2:3]]), cache, jnp.asarray([[3], [2]]))
        np.testing.assert_allclose(second[0, 0], whole[0, 3], atol=1e-12)
        np.testing.assert_allclose(second[1, 0], whole[1, 2], atol=1e-12)


@pytest.mark.parametrize("kind", _KINDS)
def test_packed_rows_are_the_rows_by_themselves(kind: str) -> None:
    with jax.enable_x64(True):
        model = _model(kind)
        read, written = _tokens(1, 9), _tokens(1, 8, seed=1)
        segments, of = np.array([[1] * 5 + [2] * 3 + [0]]), np.array([[1] * 2 + [2] * 4 + [0] * 2])
        positions = (jnp.asarray([[0, 1, 2, 3, 4, 0, 1, 2, 0]]), jnp.asarray([[0, 1, 0, 1, 2, 3, 0, 0]]))
        packed = _hidden(model, read, written, segments, of, positions)
        np.testing.assert_allclose(packed[:, :2], _hidden(model, read[:, :5], written[:, :2]), atol=1e-12)
        np.testing.assert_allclose(packed[:, 2:6], _hidden(model, read[:, 5:8], written[:, 2:6]), atol=1e-12)
        assert np.isfinite(packed).all()


def test_decoder_tokens_do_not_see_later_ones_and_see_all_of_the_encoder() -> None:
    with jax.enable_x64(True):
        model = _model("t5")
        mask, read = masks.bidirectional(), jnp.asarray(_tokens(1, 4))

        def third(x: Any, encoded: Any) -> Any:
            y = model.decoder.run(x, masks.causal(), None, None, Cross(mask, encoded))
            return jnp.sum(jnp.sin(y[0, 2]))

        encoded = model.encode(read, mask=mask)
        own, other = jax.jit(jax.grad(third, (0, 1)))(
            jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 12))), encoded
        )
        norms = np.linalg.norm(own[0], axis=-1)
        assert (norms[:3] > 1e-6).all()
        assert (norms[3:] == 0).all()
        assert (np.linalg.norm(other[0], axis=-1) > 1e-6).all()


def test_padding_that_sees_nothing_gives_finite_gradients() -> None:
    with jax.enable_x64(True):
        graphdef, state = nnx.split(_model("t5"))
        read, written = jnp.asarray(_tokens(1, 4)), jnp.asarray(_tokens(1, 5))
        of = jnp.asarray([[1, 1, 1, 0, 0]])

        def loss(state: Any) -> Any:
            y = _run(graphdef, state, read, written, jnp.ones_like(read), of, None, None)
            return jnp.sum(jnp.sin(y) * (of > 0)[..., None])

        gradients = jax.tree.leaves(jax.jit(jax.grad(loss))(state))
        assert all(np.isfinite(g).all() for g in gradients)
        assert all(np.any(g != 0) for g in gradients[:5])


def test_dropout_is_a_rows_own_and_differs_between_encoder_and_decoder() -> None:
    with jax.enable_x64(True):
        model = _model("t5", dropout=0.3, attention_dropout=0.2, embedding_dropout=0.2)
        read, written = _tokens(2, 4), _tokens(2, 5, seed=1)
        both = _hidden(model, read, written, seeds=_SEEDS)
        np.testing.assert_allclose(both[1:], _hidden(model, read[1:], written[1:], seeds=_SEEDS[1:]), atol=1e-12)
        assert np.abs(both - _hidden(model, read, written, seeds=_SEEDS + 1)).max() > 1e-3
        ones = jnp.ones((2, 4, 12))
        at = jnp.zeros((2, 4), int)
        first = model.encoder.enter(ones, at, _SEEDS)
        assert np.any(first != model.decoder.enter(ones, at, _SEEDS ^ jnp.uint32(DECODER)))


def _t5_bucket(distance: int, *, buckets: int, furthest: int, bidirectional: bool) -> int:
    """T5's rule for one distance key - query, in plain Python."""
    base, n = 0, -distance
    if bidirectional:
        buckets //= 2
        base, n = (buckets if n < 0 else 0), abs(n)
    n = max(n, 0)
    exact = buckets // 2
    if n < exact:
        return base + n
    # The boundaries of these sizes are met exactly where the logarithm is a whole number: guard against its rounding.
    share = math.log(n / exact) / math.log(furthest / exact) * (buckets - exact)
    return base + min(exact + math.floor(share + 1e-9), buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_are_those_of_t5(bidirectional: bool) -> None:
    distances = np.arange(-600, 601)
    ours = relative_buckets(distances, buckets=32, distance=128, bidirectional=bidirectional)
    theirs = [_t5_bucket(int(d), buckets=32, furthest=128, bidirectional=bidirectional) for d in distances]
    np.testing.assert_array_equal(ours, theirs)


def test_buckets_by_hand() -> None:
    # Both directions: 16 each, 8 exact; bucket 8 + floor(log_16(n / 8) * 8), that is two for each doubling.
    both = relative_buckets(np.array([0, -1, -7, -8, -15, -16, -32, -64, -127, -128, -900, 1, 16]), buckets=32,
                            distance=128, bidirectional=True)  # fmt: skip
    assert both.tolist() == [0, 1, 7, 8, 9, 10, 12, 14, 15, 15, 15, 17, 26]
    # One direction: 32, 16 exact; 16 + floor(log_8(n / 16) * 16); 127: log_8(7.9375) * 16 = 15.94.
    one = relative_buckets(np.array([0, 5, -1, -15, -16, -127, -128, -900]), buckets=32, distance=128,
                           bidirectional=False)  # fmt: skip
    assert one.tolist() == [0, 0, 1, 15, 16, 31, 31, 31]


def test_biases_stand_where_their_distances_are() -> None:
    init = lambda key, shape, dtype: jnp.arange(math.prod(shape), dtype=dtype).reshape(shape)  # noqa: E731
    for bidirectional in (True, False):
        settings: dict[str, Any] = {"buckets": 8, "distance": 6, "bidirectional": bidirectional}
        bias = RelativeBias(3, **settings, init=init, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
        distance = np.arange(7)[None] - np.arange(7)[:, None]
        expected = np.moveaxis(np.arange(24).reshape(8, 3)[relative_buckets(distance, **settings)], -1, 0)
        np.testing.assert_array_equal(bias.row(7, jnp.float32)[0], expected)
        cached = bias.cached(jnp.asarray([[4, 5], [0, 1]]), 7, jnp.float32)
        np.testing.assert_array_equal(cached[0], expected[:, 4:6])
        np.testing.assert_array_equal(cached[1], expected[:, :2])


def test_the_defaults_are_t5_1_1_small() -> None:
    shapes = jax.eval_shape(lambda: EncoderDecoderConfig(vocab_multiple=1).build(Vocabulary(32128), nnx.Rngs(0)))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(shapes)))
    # Two tables of 32128 * 512 and two of 32 * 6; attention 4 * 512 * 384, feed-forward part 3 * 512 * 1024, norms of
    # 512: 8 * (attention + mlp + 2 norms) + a norm, and 8 * (2 attention + mlp + 3 norms) + a norm.
    attention, mlp = 4 * 512 * 384, 3 * 512 * 1024
    assert count == 2 * (32128 * 512 + 32 * 6 + 512) + 8 * (3 * attention + 2 * mlp + 5 * 512) == 76_961_152


def test_operations_are_counted_by_hand() -> None:
    config = EncoderDecoderConfig(**(_SIZE | {"dtype": "float32", "param_dtype": "float32"}))
    # Heads are 2 * 4 = 8 wide. Encoder, 2 layers, 10 tokens: weights 4 * 12 * 8 + 3 * 12 * 16 = 960. Decoder, 1 layer,
    # 6 tokens, of which each sees 3: the same weights; of its cross attention 2 * 12 * 8 for each token on either side.
    encoder = 2 * 10 * (2 * 960 + 4 * 8 * 10)
    decoder = 6 * (2 * 960 + 4 * 8 * 3) + 2 * (6 + 10) * 192 + 4 * 8 * 6 * 10
    assert config.forward_flops(21, RowUse(10, 5, decoder_length=6)) == encoder + decoder + 2 * 5 * 12 * 21


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"heads": 5, "head_width": None}, "model.heads is 5 .* the width, or model.head_width be set"),
        ({"relative_buckets": 30}, "model.relative_buckets is 30"),
        ({"relative_distance": 16}, "model.relative_distance is 16"),
        ({"attention_backend": "splash"}, "model.attention_backend is splash"),
        ({"positions": "sinusoidal", "width": 33}, "model.width is 33"),
        ({"decoder_layers": 0}, "model.decoder_layers is 0"),
        ({"init_std": 0.0}, "model.init_std is 0.0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        EncoderDecoderConfig(**settings)


def test_both_attentions_of_a_layer_drop_out_different_things() -> None:
    with jax.enable_x64(True):
        config = EncoderDecoderConfig(**_SIZE, attention_dropout=0.5)
        spec = config._block_spec(decoder=True)
        shared: dict[str, Any] = {"init": normal(0.5), "out_init": normal(0.5)}
        own, across = (kind(spec, **shared, rngs=nnx.Rngs(params=0)) for kind in (Attention, CrossAttention))
        x, mask = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 12))), masks.bidirectional()

        def gap(dropout: Any) -> Any:
            call = Call(mask, jnp.zeros((2, 5), int), dropout=dropout, cross=Cross(mask, x))
            return jnp.abs(own(x, jnp.int32(0), call, None)[0] - across(x, jnp.int32(0), call)).max()

        assert gap(None) < 1e-12  # the same weights see the same rows
        assert gap(_SEEDS) > 1e-3


def test_an_objective_of_one_row_refuses_it() -> None:
    model = EncoderDecoderConfig(layers=1, width=8, heads=2, mlp_width=8).build(Vocabulary(21), nnx.Rngs(params=0))
    ones = jnp.ones((1, 3), int)
    example = Example(inputs=ones, targets=ones, weights=jnp.ones((1, 3)), mask=masks.causal())
    with pytest.raises(UserError, match="EncoderDecoder, which model"):
        CausalLM().terms({"model": model}, example, (), Context((), 0, Vocabulary(21)))
