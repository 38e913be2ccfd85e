"""Every file of configs/pretrain: its training step compiles for eight devices from shapes alone, and is spread well.

    pytest -n 0 -s tests/test_pretrain_configs.py      prints what each takes on a device

Attention is compiled as `xla`, since cuDNN's is for GPUs alone; batch and microbatches are the config's own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import re
from typing import Any

import jax
import numpy as np
import pytest

from lmobj import config
from lmobj.objectives import BiEncoder
from lmobj.train.assemble import Design, assemble, design
from lmobj.train.batches import batch_shapes
from lmobj.train.plan import Plan, make_plan, planned_vocabulary, shard_bytes
from lmobj.train.sharding import MeshConfig, make_mesh
from tests.train.tiny_runs import experiment, write_corpus

FILES = sorted((pathlib.Path(__file__).parent.parent / "configs" / "pretrain").glob("*.yaml"))
BASES = ("bert_base", "electra_base", "gpt2_124m")
"""The others are slow tests."""
every_config = pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=[] if p.stem in BASES else [pytest.mark.slow]) for p in FILES]
)
DEVICES = 8
DEVICE_BYTES = 80 * 2**30
"""Of the accelerators that the configs' microbatches are made for."""


def designed(path: pathlib.Path) -> Design:
    """A config's design on the mesh that it asks for."""
    loaded = config.load(path)
    if getattr(loaded.model, "attention_backend", "xla") != "xla":
        loaded = dataclasses.replace(loaded, model=dataclasses.replace(loaded.model, attention_backend="xla"))
    return design(loaded, planned_vocabulary(loaded.data.tokenizer), mesh=make_mesh(loaded.train.mesh))


@functools.cache
def planned(path: pathlib.Path) -> tuple[Design, Plan]:
    """The design and what its compiled step takes."""
    made = designed(path)
    return made, make_plan(made)


def gathered_shapes(text: str) -> set[tuple[int, ...]]:
    """Shapes of floats that any all-gather in a compiled program yields, without axes of length 1, in no order."""
    shapes = re.findall(r"= \(?b?f\d+\[([\d,]*)\][^=]*? all-gather(?:-start)?\(", text)
    return {_bare(tuple(int(n) for n in shape.split(",") if n)) for shape in shapes}


def _bare(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(n for n in shape if n > 1))


@every_config
def test_a_config_compiles_from_shapes_and_fits(path: pathlib.Path) -> None:
    made, plan = planned(path)
    settings = made.config
    print(
        f"\n{path.stem}: {made.parameter_count / 1e6:,.0f}M parameters, {settings.train.batch_size} x "
        f"{settings.data.length} tokens in {settings.train.accumulate} microbatches on {dict(made.mesh.shape)}\n"
        f"  a device: {plan}; compiled in {plan.compile_seconds:.1f} s"
    )
    assert made.mesh.size == DEVICES
    # The compiler's own count of what goes in and stays: state and batch, each device its shard.
    arguments = plan.compiled.memory_analysis().argument_size_in_bytes
    assert arguments == pytest.approx(plan.parameters + plan.optimizer + plan.other, rel=1e-3)
    assert plan.total < DEVICE_BYTES, f"raise train.accumulate of {path.name}"


@every_config
def test_no_device_holds_what_the_mesh_divides(path: pathlib.Path) -> None:
    made, plan = planned(path)
    assert made.replicated == ()
    ways = math.prod(made.mesh.shape[axis] for axis in ("fsdp", "tensor"))
    experts = [x for path, x in jax.tree.leaves_with_path(made.abstract_state.params) if "experts" in str(path)]
    routed = sum(x.size for x in experts)
    least = 4 * (routed / made.mesh.shape["expert"] + made.parameter_count - routed) / ways
    # Biases, norms and tables of positions may stay whole: a hundredth at these sizes.
    assert least <= plan.parameters <= least + 4 * made.parameter_count / 100
    if made.config.train.optimizer.name == "adafactor":
        assert plan.optimizer < plan.parameters / 100, "a row and a column of each matrix"
    else:
        assert plan.optimizer == pytest.approx(2 * plan.parameters, rel=1e-3), "two moments"
    # What is gathered is one parameter of one layer at a time: no stack of layers, no hidden states, no logits, and no
    # table of the vocabulary.
    layers = getattr(made.config.model, "layers", 0)
    parameters = {_bare(x.shape) for x in jax.tree.leaves(made.abstract_state.params)}
    parameters |= {_bare(x.shape[1:]) for x in jax.tree.leaves(made.abstract_state.params) if x.shape[0] == layers}
    parameters |= {_bare((x.shape[1] // made.mesh.shape["expert"], *x.shape[2:])) for x in experts}
    stacks = {
        _bare(x.shape) for x in jax.tree.leaves(made.abstract_state.params) if x.shape[0] == layers and x.ndim > 2
    }
    tables = {_bare(x.shape) for x in jax.tree.leaves(made.abstract_state.params) if made.vocab.size <= x.shape[0]}
    assert tables
    allowed = parameters - stacks - tables
    if isinstance(made.objective, BiEncoder):  # a row's loss looks at the vectors of all
        allowed |= {_bare((made.config.train.batch_size, made.config.model.width))}
    assert gathered_shapes(plan.compiled.as_text() or "") <= allowed


def test_the_published_sizes() -> None:
    # Millions: BERT's papers count 110 and 340, rounded; GPT-2's four are in the names; TinyLlama 1.1 and Llama 3 8.0
    # billion. Biases and padding of the vocabulary stay within 2%.
    published = {"bert_base": 110, "bert_large": 335, "gpt2_124m": 124, "gpt2_355m": 355, "gpt2_774m": 774}
    published |= {"gpt2_1.5b": 1558, "decoder_1b": 1100, "decoder_8b": 8030}
    published |= {"multi_token_1b": 1100}  # decoder_1b's, three layers of which are heads
    published |= {"llada_1b": 1490}
    published |= {"gpt1_117m": 117, "gpt3_125m": 125, "gpt3_1.3b": 1320, "gpt3_6.7b": 6660}
    # To whole millions. ALBERT with the heads of both objectives; its xxlarge is 235 in the paper and 223 as released.
    # ELECTRA: the discriminator with its embeddings, without the generator.
    published |= {"roberta_base": 125, "roberta_large": 355}
    # XLNet: layers * (13 D^2 + 14 D), for five maps of attention and two of 4 D, and 32001 D + 32000 for the table. The
    # maps of relative positions make large 20 more than BERT large, whose 340 the paper calls its size.
    published |= {"xlnet_base": 117, "xlnet_large": 360}
    published |= {"albert_base": 12, "albert_large": 18, "albert_xlarge": 60, "albert_xxlarge": 223}
    # BART base as released.
    published |= {"bart_base": 139}
    published |= {"electra_small": 14, "electra_base": 110, "electra_large": 335}
    # SantaCoder: 24 layers of 10 D^2 + 256 D, with one head of 128 for keys and values, and tables of 49,152 D and
    # 2,048 D; 1.1 billion in the paper.
    published |= {"santacoder_1.1b": 1124}
    for path in FILES:
        if path.stem in published:
            made = designed(path)
            params = made.abstract_state.params["model"]
            generator = [params[part] for part in ("generator", "generator_head") if part in params]
            counted = made.parameter_count - sum(x.size for x in jax.tree.leaves(generator))
            assert counted / 1e6 == pytest.approx(published[path.stem], rel=0.02, abs=0.5), path.stem


def test_a_gather_of_hidden_states_is_seen() -> None:
    # The partitioner must gather rows here; the search of the test above finds it, whatever the layout is called.
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    hidden = jax.ShapeDtypeStruct((16, 6, 4), np.float32, sharding=rows)
    text = jax.jit(lambda x: x * 2, out_shardings=everywhere).lower(hidden).compile().as_text()
    assert gathered_shapes(text or "") == {(4, 6, 16)}


def test_a_share_of_an_array() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    # 3 x 8 floats over 4 devices: 3 x 2 x 4 bytes; a whole vector of 5 half-precision numbers: 10 bytes.
    tree: Any = {"a": jax.ShapeDtypeStruct((3, 8), np.float32, sharding=spread)}
    tree["b"] = jax.ShapeDtypeStruct(
        (5,), np.float16, sharding=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    )
    assert shard_bytes(tree) == 24 + 10


@pytest.mark.parametrize("kind", ["causal_lm", "masked_lm"])
def test_a_design_expects_the_batches_that_the_data_gives(tmp_path: pathlib.Path, kind: Any) -> None:
    run = assemble(experiment(write_corpus(tmp_path / "corpus.txt"), "unused", kind), quiet=True)
    (batch,) = run.batches("train", steps=1)
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
        name: (x.shape, x.dtype) for name, x in batch_shapes(run.rows, run.config.train.batch_size).items()
    }
    alone = design(run.config, planned_vocabulary(run.config.data.tokenizer))
    assert alone.vocab == run.dataset.vocab
    assert alone.abstract_state == run.abstract_state
