"""Multiple choice beside BertForMultipleChoice: a row of segments is worth the rows of its choices."""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402
from hf_peers import BERT, randomise, within  # noqa: E402

from lmobj.interop import bert  # noqa: E402
from lmobj.models import PairHead  # noqa: E402
from lmobj.objectives import Context, MultipleChoice, denominators, step_keys, total_loss  # noqa: E402

ROWS, CHOICES, CHOICE_LENGTH = 3, 3, 7


def test_a_row_is_the_rows_of_its_choices(tmp_path: pathlib.Path) -> None:
    torch.manual_seed(7)
    trained = transformers.BertForPreTraining(transformers.BertConfig(**BERT)).eval()
    randomise(trained, 7)
    trained.save_pretrained(tmp_path)
    theirs = transformers.BertForMultipleChoice(transformers.BertConfig(**BERT)).eval()
    theirs.bert.load_state_dict(trained.bert.state_dict())
    config, vocab, params, head_params = bert.load(tmp_path)
    encoder = nnx.merge(nnx.split(nnx.eval_shape(lambda: config.build(vocab, nnx.Rngs(params=0))))[0], params)
    kernel, bias = (x.detach().numpy() for x in (theirs.classifier.weight, theirs.classifier.bias))
    head_params["classifier"] = {"kernel": jnp.asarray(kernel.T), "bias": jnp.asarray(bias)}
    head = nnx.merge(
        nnx.split(nnx.eval_shape(lambda: PairHead(encoder.head_style, 1, nnx.Rngs(params=0))))[0], head_params
    )

    draw = np.random.default_rng(7)
    length = CHOICES * CHOICE_LENGTH
    tokens = draw.integers(4, 101, (ROWS, CHOICES, CHOICE_LENGTH))
    sizes = draw.integers(5, CHOICE_LENGTH + 1, (ROWS, CHOICES))
    there = np.arange(CHOICE_LENGTH) < sizes[..., None]
    types = (np.arange(CHOICE_LENGTH) >= 3) & there
    labels = np.array([2, 0, 1])
    inputs = {"input_ids": tokens * there, "attention_mask": there, "token_type_ids": types, "labels": labels}
    with torch.no_grad():
        expected = theirs(**{name: torch.from_numpy(np.array(x, np.int64)) for name, x in inputs.items()})

    batch = {name: np.zeros((ROWS, length), np.int32) for name in ("tokens", "segment_ids", "positions", "token_types")}
    for row in range(ROWS):
        start = 0
        for choice, size in enumerate(sizes[row]):
            place = slice(start, start + size)
            batch["tokens"][row, place], batch["segment_ids"][row, place] = tokens[row, choice, :size], choice + 1
            batch["positions"][row, place], batch["token_types"][row, place] = (
                np.arange(size),
                types[row, choice, :size],
            )
            start += size
    row_ids = np.stack([np.zeros(ROWS, np.int32), np.arange(ROWS, dtype=np.int32)], axis=1)
    batch |= {"labels": labels.astype(np.int32), "row_ids": row_ids}
    objective = MultipleChoice(choices=CHOICES)
    noise_keys, model_keys = step_keys(jax.random.key(0, impl="threefry2x32"), row_ids, 0)
    ctx = Context(model_keys, 0, vocab, train=False)
    example = objective.corrupt(noise_keys, {name: jnp.asarray(x) for name, x in batch.items()}, ctx)
    terms = objective.terms({"model": encoder, "heads": head}, example, (), ctx)
    logits = np.asarray(terms.outputs["logits"])
    assert np.std(expected.logits.numpy()) > 0.01
    within("multiple choice logits", np.max(np.abs(logits - expected.logits.numpy())), 1e-4)
    loss = total_loss(terms, denominators(objective, example), objective.coefficients)
    within("multiple choice loss", abs(float(loss) - float(expected.loss)), 1e-4)
