"""Folders of config.json and safetensors: what is read, and what is refused."""

from __future__ import annotations

import json
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy
from hf_tensors import BERT_SETTINGS, GPT2_SETTINGS, VOCAB

from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.interop import bert, gpt2


@pytest.fixture
def folder(gpt2_tensors: dict[str, np.ndarray], tmp_path: pathlib.Path) -> pathlib.Path:
    """A GPT-2."""
    (tmp_path / "config.json").write_text(json.dumps(GPT2_SETTINGS))
    safetensors.numpy.save_file(gpt2_tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_shards(folder: pathlib.Path) -> None:
    whole = gpt2.load(folder)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, part in shards.items():
        safetensors.numpy.save_file({name: tensors[name] for name in part}, folder / shard)
    index = {"weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    jax.tree.map(np.testing.assert_array_equal, gpt2.load(folder).params, whole.params)

    index["weight_map"][names[0]] = "../model-1.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"names the file '\.\./model-1\.safetensors'"):
        gpt2.load(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="weight_map is missing"):
        gpt2.load(folder)


def test_refuses_pickles(folder: pathlib.Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"It holds pytorch_model\.bin, which lmobj does not read, .*safetensors"):
        gpt2.load(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors\. Accepted"):
        gpt2.load(folder)


def test_refuses_malformed_files(folder: pathlib.Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-8])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read as safetensors"):
        gpt2.load(folder)
    for text, message in (("{", "is not JSON"), ("[1]", "holds a list"), ("\xff", "is not JSON")):
        (folder / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match=message):
            gpt2.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        gpt2.load(folder)
    with pytest.raises(UserError, match="is no folder"):
        gpt2.load(folder / "absent")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "model_type is 'bert'; accepted here: 'gpt2'"),
        ({"vocab_size": VOCAB + 1}, r"wte\.weight has the shape \[37, 12\]"),
        ({"eos_token_id": VOCAB}, f"eos_token_id is {VOCAB}; accepted: one id from 0 to {VOCAB - 1}"),
        ({"eos_token_id": [3, 4]}, r"eos_token_id is \[3, 4\]; accepted: one id"),
    ],
)
def test_refuses_settings_that_do_not_fit(folder: pathlib.Path, change: dict[str, object], message: str) -> None:
    (folder / "config.json").write_text(json.dumps(GPT2_SETTINGS | change))
    with pytest.raises(UserError, match=message):
        gpt2.load(folder)


def test_never_overwrites(folder: pathlib.Path, bert_tensors: dict[str, np.ndarray]) -> None:
    config, vocab, params, _ = gpt2.load(folder)
    with pytest.raises(UserError, match=r"config\.json exists"):
        gpt2.save(folder, params, config, vocab)
    encoder = bert.config_from_hf(BERT_SETTINGS)
    with pytest.raises(UserError, match=r"config\.json exists"):
        bert.save(folder, bert.to_lmobj(bert_tensors, encoder), encoder, Vocabulary(VOCAB))
    jax.tree.map(np.testing.assert_array_equal, gpt2.load(folder).params, params)
