"""Tensors of both families."""

from __future__ import annotations

import numpy as np
import pytest
from hf_tensors import BERT_SHAPES, GPT2_SHAPES, random_tensors


@pytest.fixture
def gpt2_tensors() -> dict[str, np.ndarray]:
    """A tied GPT-2."""
    return random_tensors(GPT2_SHAPES)


@pytest.fixture
def bert_tensors() -> dict[str, np.ndarray]:
    """A BERT for masked LM."""
    return random_tensors(BERT_SHAPES)
