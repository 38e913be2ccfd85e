"""The heads of tasks on BERT, ELECTRA and XLNet against Transformers' PyTorch models: logits and losses.

Only heads that are the same: those of whole rows differ in ELECTRA and XLNet, and XLNet's beam search over ends is not
here. Every comparison prints what it saw: `pytest -m parity -s`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from flax import nnx  # noqa: E402
from hf_peers import BERT, LENGTH, ROWS, VOCAB, make_batch, randomise, within  # noqa: E402
from test_electra_peers import DISCRIMINATOR, GENERATOR  # noqa: E402
from test_xlnet_peers import SETTINGS as XLNET  # noqa: E402

from lmobj import objectives  # noqa: E402
from lmobj.batch import NO_TAG, Batch  # noqa: E402
from lmobj.interop import bert, electra, xlnet  # noqa: E402
from lmobj.objectives import Classification, Context, ExtractiveQA, Objective, TokenClassification  # noqa: E402

pytestmark = pytest.mark.parity

CLASSES = 4


def arrays(model: Any) -> dict[str, np.ndarray]:
    return {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}


def made(kind: Any, settings: dict[str, Any], seed: int) -> Any:
    """A Transformers model with weights off their initial values."""
    config = getattr(transformers, f"{kind.partition('For')[0].replace('LMHeadModel', '')}Config")
    model = getattr(transformers, kind)(config(**settings)).eval()
    randomise(model, seed)
    return model


def bert_body() -> tuple[Any, Any, Any]:
    """(Transformers' body, lmobj's settings and parameters)."""
    theirs = made("BertForMaskedLM", BERT, 0)
    config = bert.config_from_hf(theirs.config.to_dict())
    return theirs.bert, config, bert.to_lmobj(arrays(theirs), config)


def electra_body() -> tuple[Any, Any, Any]:
    generator, theirs = made("ElectraForMaskedLM", GENERATOR, 0), made("ElectraForPreTraining", DISCRIMINATOR, 1)
    theirs.electra.embeddings.load_state_dict(generator.electra.embeddings.state_dict())
    config = electra.config_from_hf(generator.config.to_dict(), theirs.config.to_dict())
    return theirs.electra, config, electra.to_lmobj(arrays(generator), arrays(theirs), config)


def xlnet_body() -> tuple[Any, Any, Any]:
    theirs = made("XLNetLMHeadModel", XLNET, 0)
    config = xlnet.config_from_hf(theirs.config.to_dict())
    return theirs.transformer, config, xlnet.to_lmobj(arrays(theirs), config)


BODIES = {
    "Bert": (bert_body, BERT, "bert"),
    "Electra": (electra_body, DISCRIMINATOR, "electra"),
    "XLNet": (xlnet_body, XLNET, "transformer"),
}


def full_rows(batch: Batch) -> Batch:
    """The batch without padding: Transformers lets padding be an answer, which lmobj does not."""
    tokens = jnp.asarray(np.random.default_rng(1).integers(4, VOCAB.size, (ROWS, LENGTH)), jnp.int32)
    return batch | {"tokens": tokens, "segment_ids": jnp.ones((ROWS, LENGTH), jnp.int32)}


def compared(family: str, task: str, objective: Objective, batch: Batch, labels: dict[str, Any]) -> None:
    """Holds logits and loss against those of Transformers' `FAMILYForTASK`."""
    make, settings, prefix = BODIES[family]
    body, config, params = make()
    theirs = made(f"{family}For{task}", settings | {"num_labels": 2 if "Question" in task else CLASSES}, 2)
    getattr(theirs, prefix).load_state_dict(body.state_dict(), strict="Sequence" not in task)
    names = {"input_ids": "tokens", "attention_mask": "segment_ids", "token_type_ids": "token_types"}
    inputs = {name: torch.from_numpy(np.array(batch[key], np.int64)) for name, key in names.items()}
    with torch.no_grad():
        said = theirs(**inputs, **{name: torch.from_numpy(np.array(x, np.int64)) for name, x in labels.items()})

    model = nnx.merge(nnx.split(nnx.eval_shape(lambda: config.build(VOCAB, nnx.Rngs(params=0))))[0], params)
    graph = nnx.split(objective.build_heads(model.head_style, VOCAB, nnx.Rngs(params=0)))[0]
    last = theirs.qa_outputs if "Question" in task else theirs.classifier
    given = {"classifier": linear(last)}
    if "Sequence" in task:
        given["pooler"] = linear(theirs.bert.pooler.dense)
    models = {"model": model, "heads": nnx.merge(graph, given)}
    noise_keys, model_keys = objectives.step_keys(jax.random.key(0, impl="threefry2x32"), batch["row_ids"], 0)
    ctx = Context(model_keys, 0, VOCAB, train=False)
    example = objective.corrupt(noise_keys, batch, ctx)
    terms = objective.terms(models, example, (), ctx)
    loss = objectives.total_loss(terms, objectives.denominators(objective, example), objective.coefficients)
    for name, ours in terms.outputs.items():
        expected = said[name].numpy()
        real = np.asarray(batch["segment_ids"]) > 0 if ours.shape[:2] == (ROWS, LENGTH) else np.ones(ROWS, bool)
        within(f"{family} {task} {name}", np.max(np.abs(np.asarray(ours)[real] - expected[real])), 1e-4)
        assert np.std(expected) > 0.1  # far from zero, so that the limit means something
    within(f"{family} {task} loss", abs(float(loss) - said.loss.item()), 1e-5)


def linear(layer: Any) -> dict[str, Any]:
    """A linear map of PyTorch's, [out, in], as lmobj's parameters."""
    return {"kernel": jnp.asarray(layer.weight.detach().numpy().T), "bias": jnp.asarray(layer.bias.detach().numpy())}


@pytest.mark.parametrize("family", BODIES)
def test_token_classification(family: str) -> None:
    batch = make_batch(0, token_types=2)
    tags = np.random.default_rng(2).integers(-1, CLASSES, (ROWS, LENGTH))
    tags = np.where(np.asarray(batch["segment_ids"]) > 0, tags, NO_TAG)
    batch["tags"] = jnp.asarray(tags, jnp.int32)
    compared(
        family,
        "TokenClassification",
        TokenClassification(classes=CLASSES),
        batch,
        {"labels": np.where(tags < 0, -100, tags)},
    )


@pytest.mark.parametrize("family", BODIES)
def test_extractive_qa(family: str) -> None:
    batch = full_rows(make_batch(0, token_types=2))
    spans = np.sort(np.random.default_rng(3).integers(0, LENGTH, (ROWS, 2)), axis=1)
    batch["spans"] = jnp.asarray(spans, jnp.int32)
    task = "QuestionAnsweringSimple" if family == "XLNet" else "QuestionAnswering"
    compared(family, task, ExtractiveQA(), batch, {"start_positions": spans[:, 0], "end_positions": spans[:, 1]})


def test_classification() -> None:
    batch = make_batch(0, token_types=2)
    labels = np.random.default_rng(4).integers(0, CLASSES, ROWS)
    batch["labels"] = jnp.asarray(labels, jnp.int32)
    compared("Bert", "SequenceClassification", Classification(classes=CLASSES), batch, {"labels": labels})
