"""What devices send one another in a training step, read from the compiled program."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest

from lmobj.batch import Vocabulary
from lmobj.config import Experiment
from lmobj.data import DataConfig
from lmobj.models import DecoderConfig
from lmobj.objectives import CausalLM
from lmobj.train import TrainConfig
from lmobj.train.assemble import design
from lmobj.train.sharding import MeshConfig, make_mesh

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROWS, LENGTH, WIDTH, MLP, HEADS, VOCAB = 24, 48, 64, 192, 8, 640
LLAMA: dict[str, Any] = {
    "positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "tie_embeddings": False,
}  # fmt: skip


def gathered(mesh: MeshConfig, *, zero: bool = False) -> Counter[tuple[int, ...]]:
    """How often arrays of floats are gathered in a training step, by their sizes in ascending order.

    The layers are the body of a loop, whose instructions count once.
    """
    config = Experiment(
        data=DataConfig(length=LENGTH),
        model=DecoderConfig(layers=3, width=WIDTH, mlp_width=MLP, heads=HEADS, max_length=LENGTH, **LLAMA),
        objective=CausalLM(),
        train=TrainConfig(batch_size=ROWS, mesh=mesh, zero=zero),
    )
    made = design(config, Vocabulary(VOCAB, pad=0, unk=1, bos=2, eos=3), mesh=make_mesh(mesh))
    text = made.lower_train_step().compile().as_text()
    assert text is not None
    found = re.findall(r" = (.*?) all-gather(?:-start)?\(", text)
    return Counter(
        tuple(sorted(int(n) for n in dims.split(",") if int(n) > 1))
        for shapes in found
        for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        if kind.startswith("f")
    )


def test_fsdp_gathers_the_matrices_of_a_layer_twice_and_nothing_else() -> None:
    # Query, key, value and output; gate, up and down: where they are used, forwards and backwards. Neither a table
    # (its rows are looked up where they are, and go round a ring in the loss) nor anything that belongs to tokens.
    assert gathered(MeshConfig(data=1, fsdp=8)) == {(WIDTH, WIDTH): 2 * 4, (WIDTH, MLP): 2 * 3}


def test_tensor_parallelism_gathers_nothing() -> None:
    assert gathered(MeshConfig(data=1, tensor=8)) == {}


@pytest.mark.slow
def test_data_parallelism_gathers_nothing_unless_each_replica_updates_its_own_part() -> None:
    assert gathered(MeshConfig(data=8)) == {}
    updates = gathered(MeshConfig(data=8), zero=True)
    # Two tables and, of all three layers at once, the matrices: each once, as the update.
    assert updates[(WIDTH, VOCAB)] == 2
    assert updates[(3, WIDTH, WIDTH)] == 4
    assert updates[(3, WIDTH, MLP)] == 3
    assert not [sizes for sizes in updates if ROWS in sizes or LENGTH in sizes]


@pytest.mark.slow
def test_context_parallelism_gathers_keys_and_values_and_no_logits() -> None:
    found = gathered(MeshConfig(data=1, sequence=8))
    by_heads = tuple(sorted((ROWS, LENGTH, HEADS, WIDTH // HEADS)))
    assert by_heads in found
    # Besides keys and values, the gradient of the embedding's vectors for its table: nothing as large as L x L.
    assert set(found) <= {by_heads, tuple(sorted((ROWS, LENGTH, WIDTH)))}
