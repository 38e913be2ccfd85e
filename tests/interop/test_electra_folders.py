"""ELECTRA's tensors, of two folders, to the pair's parameters and back."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from hf_tensors import (
    DISCRIMINATOR_SETTINGS,
    DISCRIMINATOR_SHAPES,
    GENERATOR_INNER,
    GENERATOR_SETTINGS,
    GENERATOR_SHAPES,
    HEADS,
    INNER,
    LAYERS,
    LENGTH,
    VOCAB,
    WIDTH,
    random_tensors,
)

from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.interop import electra
from lmobj.models import ElectraConfig, EncoderConfig

CONFIG = electra.config_from_hf(GENERATOR_SETTINGS, DISCRIMINATOR_SETTINGS)
PADDED = Vocabulary(VOCAB)


def pair(*, tied: bool) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Tensors of a generator and a discriminator, whose embeddings are equal or not."""
    generator, discriminator = random_tensors(GENERATOR_SHAPES), random_tensors(DISCRIMINATOR_SHAPES, seed=1)
    if tied:
        discriminator |= {n: x.copy() for n, x in generator.items() if n.startswith("electra.embeddings.")}
    return generator, discriminator


def write(folder: pathlib.Path, *, tied: bool) -> tuple[pathlib.Path, pathlib.Path]:
    """Two folders, as a user has them."""
    folders = folder / "generator", folder / "discriminator"
    settings = (GENERATOR_SETTINGS, DISCRIMINATOR_SETTINGS)
    for path, values, tensors in zip(folders, settings, pair(tied=tied), strict=True):
        path.mkdir()
        (path / "config.json").write_text(json.dumps(values))
        safetensors.numpy.save_file(tensors, path / "model.safetensors")
    return folders


def test_config() -> None:
    assert (
        ElectraConfig(
            layers=LAYERS,
            width=WIDTH,
            heads=HEADS,
            mlp_width=INNER,
            embedding_width=WIDTH,
            max_length=LENGTH,
            token_types=3,
            generator_fraction=0.5,
            generator_layers=LAYERS,
            generator_heads=1,
            generator_mlp_width=GENERATOR_INNER,
        )
        == CONFIG
    )
    assert electra.config_from_hf(*electra.config_to_hf(CONFIG, PADDED)) == CONFIG
    # What Transformers' ElectraConfig says of itself is the small discriminator.
    small = EncoderConfig(width=256, heads=4, mlp_width=1024, embedding_width=128)
    assert electra.config_from_hf({}, {}).discriminator == electra.config_from_hf({}, {}).generator == small


@pytest.mark.parametrize(
    ("generator", "discriminator", "named"),
    [
        ({"embedding_size": 4}, {}, "generator's embedding_width is 4 and the discriminator's 12"),
        ({}, {"max_position_embeddings": 9}, "max_length is 16 and the discriminator's 9"),
        ({"hidden_act": "gelu_new"}, {}, "hidden_act is 'gelu_new'; accepted: 'gelu'"),
        ({"position_embedding_type": "relative_key"}, {}, "relative_key"),
        ({"hidden_size": 24}, {}, "generator_fraction is 2"),
    ],
)
def test_config_refusals(generator: dict[str, Any], discriminator: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        electra.config_from_hf(GENERATOR_SETTINGS | generator, DISCRIMINATOR_SETTINGS | discriminator)


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_from_folders(tmp_path: pathlib.Path, tied: bool) -> None:
    config, vocab, params, _ = electra.load(*write(tmp_path, tied=tied))
    assert config == dataclasses.replace(CONFIG, sharing="embeddings" if tied else "none")
    assert vocab == Vocabulary(VOCAB, pad=0)
    shapes = nnx.eval_shape(lambda: config.build(vocab, nnx.Rngs(params=0)))
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, nnx.to_pure_dict(nnx.state(shapes)))

    generator, discriminator = pair(tied=tied)
    for theirs, ours in (
        (generator["electra.embeddings_project.weight"].T, params["generator"]["projection"]["kernel"]),
        (generator["generator_predictions.dense.weight"].T, params["generator_head"]["dense"]["kernel"]),
        (generator["generator_lm_head.bias"], params["generator_head"]["bias"][:VOCAB]),
        (generator["electra.embeddings.word_embeddings.weight"], params["embeddings"]["tokens"]["table"][:VOCAB]),
        (
            discriminator["electra.encoder.layer.1.intermediate.dense.weight"].T,
            params["discriminator"]["stack"]["blocks"]["mlp"]["up"]["kernel"][1],
        ),
        (
            discriminator["discriminator_predictions.dense_prediction.weight"].T,
            params["discriminator_head"]["out"]["kernel"],
        ),
    ):
        np.testing.assert_array_equal(theirs, ours)

    new = tmp_path / "new generator", tmp_path / "new discriminator"
    electra.save(*new, params, config, vocab)
    for folder, tensors in zip(new, (generator, discriminator), strict=True):
        written = safetensors.numpy.load_file(folder / "model.safetensors")
        assert written.keys() == tensors.keys()
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(written[name], tensor)
    with pytest.raises(UserError, match="exists"):
        electra.save(*new, params, config, vocab)


def test_embeddings_that_differ_are_not_shared(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"embeddings/.* is shared, and the tensors for it differ"):
        electra.load(*write(tmp_path, tied=False), sharing="embeddings")
    with pytest.raises(UserError, match="sharing is gradient_disentangled, which two folders cannot say"):
        electra.load(tmp_path / "generator", tmp_path / "discriminator", sharing="gradient_disentangled")


def test_older_names() -> None:
    generator, discriminator = pair(tied=True)
    older = generator | {
        "generator_lm_head.weight": generator["electra.embeddings.word_embeddings.weight"].copy(),
        "electra.embeddings.position_ids": np.arange(LENGTH)[None],
    }
    expected = electra.to_lmobj(generator, discriminator, CONFIG)
    jax.tree.map(np.testing.assert_array_equal, electra.to_lmobj(older, discriminator, CONFIG), expected)
    older["generator_lm_head.weight"][0, 0] += 1
    with pytest.raises(
        UserError, match=r"generator_lm_head\.weight and electra\.embeddings\.word_embeddings\.weight differ"
    ):
        electra.to_lmobj(older, discriminator, CONFIG)
    with pytest.raises(UserError, match=r"Missing: generator_predictions"):
        electra.to_lmobj(discriminator, generator, dataclasses.replace(CONFIG, generator_fraction=1.0))


@pytest.mark.parametrize("sharing", ["all", "gradient_disentangled"])
def test_what_is_shared_otherwise_is_written_as_two_models(sharing: Any) -> None:
    own = {"generator_layers": None, "generator_heads": None, "generator_mlp_width": None}
    alike = {"generator_fraction": 1.0, **own} if sharing == "all" else {}
    config = dataclasses.replace(CONFIG, sharing=sharing, **alike)
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(config.build(PADDED, nnx.Rngs(params=1)))))
    if sharing == "gradient_disentangled":
        params["discriminator_embeddings"]["tokens"]["table"] = np.full((128, WIDTH), 0.25, np.float32)
    generator, discriminator = electra.from_lmobj(params, config, VOCAB)
    words = "electra.embeddings.word_embeddings.weight"
    if sharing == "all":
        layer = "electra.encoder.layer.1.output.dense.weight"
        np.testing.assert_array_equal(generator[layer], discriminator[layer])
        np.testing.assert_array_equal(generator[words], discriminator[words])
        assert electra.config_to_hf(config, PADDED)[0]["hidden_size"] == WIDTH
    else:
        np.testing.assert_allclose(discriminator[words], generator[words] + 0.25, rtol=1e-6)
        np.testing.assert_array_equal(generator[words], params["embeddings"]["tokens"]["table"][:VOCAB])
