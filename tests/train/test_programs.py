"""What is in a compiled program and what is given to it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from lmobj.batch import Vocabulary
from lmobj.config import Experiment
from lmobj.data import DataConfig
from lmobj.errors import UserError
from lmobj.models import DecoderConfig, GRUConfig
from lmobj.objectives import CausalLM
from lmobj.train import TrainConfig
from lmobj.train.assemble import Design, design
from lmobj.train.sharding import MeshConfig

VOCAB = Vocabulary(64, pad=0, unk=1, bos=2, eos=3)
DECODER = DecoderConfig(layers=1, width=12, heads=3, max_length=12, dropout=0.1)


def made(model: DecoderConfig | GRUConfig = DECODER, **train: object) -> Design:
    settings = dataclasses.replace(TrainConfig(batch_size=8, mesh=MeshConfig(data=1)), **train)
    config = Experiment(data=DataConfig(length=12), model=model, objective=CausalLM(), train=settings)
    return design(config, VOCAB)


def test_runs_with_other_seeds_share_their_programs() -> None:
    one, other = made(seed=0), made(seed=2**40 + 1)
    assert one.lower_train_step().as_text() == other.lower_train_step().as_text()
    tables = [np.asarray(run.initial_state().params["model"]["tokens"]["table"]) for run in (one, other)]
    assert not np.any(tables[0] == tables[1])


@pytest.mark.parametrize(
    ("mesh", "model", "message"),
    [
        (MeshConfig(data=1, sequence=8), DECODER, r"data\.length is 12, .* 8 devices \(train\.mesh\.sequence=8\)"),
        (MeshConfig(data=1, tensor=2), DECODER, r"train\.mesh\.tensor=2 does not divide the 3 heads"),
        (MeshConfig(data=1, sequence=2), GRUConfig(layers=1, width=8), r"model\.name is gru.*train\.mesh\.sequence=1"),
    ],
    ids=["length", "heads", "recurrence"],
)
def test_meshes_that_do_not_fit_are_refused(mesh: MeshConfig, model: DecoderConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(model, mesh=mesh).lower_train_step()
