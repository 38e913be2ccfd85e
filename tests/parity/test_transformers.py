"""BERT, ALBERT and GPT-2 against Transformers' PyTorch models: hidden states, logits, loss and gradients.

BERT and GPT-2 also for 50 steps of AdamW. Every comparison prints what it saw: `pytest -m parity -s`.
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from flax import nnx  # noqa: E402
from hf_peers import (  # noqa: E402
    ALBERT,
    BERT,
    FAMILIES,
    LENGTHS,
    ROLE,
    ROWS,
    SIZE,
    VOCAB,
    Family,
    Pair,
    gradient_gaps,
    make_batch,
    randomise,
    within,
    without_dropout,
)

from lmobj import masks  # noqa: E402
from lmobj.batch import Vocabulary  # noqa: E402
from lmobj.interop import albert, bert, roberta  # noqa: E402
from lmobj.models import PairHead  # noqa: E402
from lmobj.train.optimizers import AdamW, make_optimizer  # noqa: E402
from lmobj.train.schedules import ConstantSchedule, make_schedule  # noqa: E402
from lmobj.train.sharding import logical_axes  # noqa: E402
from lmobj.train.step import Program  # noqa: E402

pytestmark = pytest.mark.parity

STEPS = 50
RATE, DECAY, CLIP = 2e-3, 0.5, 1.0
SEEDS = (0, 1, 2, 3)
"""Of weights and batches. The last has the family's other settings as well, such as its other activation."""

by_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@pytest.fixture(scope="module")
def pairs() -> dict[tuple[str, int], Pair]:
    """Every family with every seed."""
    return {
        (family.name, seed): Pair(family, seed, **(family.variant if seed == SEEDS[-1] else {}))
        for family in FAMILIES
        for seed in SEEDS
    }


def run_key(seed: int) -> jax.Array:
    """The key of a run."""
    return jax.random.key(seed, impl="threefry2x32")


@by_family
@pytest.mark.parametrize("seed", SEEDS)
def test_hidden_states_and_logits(pairs: dict[tuple[str, int], Pair], family: Family, seed: int) -> None:
    pair, batch = pairs[family.name, seed], make_batch(seed, family.token_types)
    real = np.asarray(batch["segment_ids"]) > 0
    assert real.sum() == sum(LENGTHS)
    layers, logits = pair.forward(pair.params, batch)
    with torch.no_grad():
        theirs = pair.theirs(**pair.their_inputs(batch), output_hidden_states=True)
    assert len(theirs.hidden_states) == len(layers) == 4
    for i, (ours, hidden) in enumerate(zip(layers, theirs.hidden_states, strict=True)):
        error = np.max(np.abs(np.asarray(ours)[real] - hidden.numpy()[real]))
        within(f"{family.name} seed {seed} hidden states {i}", error, 1e-4)
    within(
        f"{family.name} seed {seed} logits",
        np.max(np.abs(np.asarray(logits)[real] - theirs.logits.numpy()[real])),
        1e-4,
    )
    assert np.std(theirs.logits.numpy()) > 0.5  # far from zero, so that the limit means something


@by_family
@pytest.mark.parametrize("seed", SEEDS)
def test_loss_and_gradients(pairs: dict[tuple[str, int], Pair], family: Family, seed: int) -> None:
    pair, batch = pairs[family.name, seed], make_batch(seed, family.token_types)
    (loss, _), grads = pair.value_and_grad(pair.params, batch, run_key(seed))
    theirs, factor = pair.their_loss(batch, pair.example(batch, run_key(seed)))
    within(f"{family.name} seed {seed} loss", abs(float(loss) - factor * theirs.item()), 1e-5)

    pair.theirs.zero_grad()
    (factor * theirs).backward()
    expected = pair.to_lmobj({name: p.grad for name, p in pair.theirs.named_parameters()})
    worst = max(gradient_gaps(grads[ROLE], expected).items(), key=lambda item: item[1])
    within(f"{family.name} seed {seed} gradient of {worst[0]}", worst[1], 1e-4)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name != "albert"], ids=lambda family: family.name)
def test_fifty_steps_of_adamw(family: Family) -> None:
    pair, seed = Pair(family, 7), 7
    assert without_dropout(pair.config)
    settings = AdamW(schedule=ConstantSchedule(peak=RATE), weight_decay=DECAY, clip_norm=CLIP)
    program = Program(
        objective=family.objective,
        graphs=pair.graphs,
        vocab=VOCAB,
        optimizer=make_optimizer(
            settings, make_schedule(settings.schedule, STEPS), logical_axes={ROLE: logical_axes(pair.model)}
        ),
        coefficients={"nll": lambda step: 1.0},
        seed=seed,
    )
    step = jax.jit(program.train_step)
    state = program.init(pair.params, ROWS)

    matrices = [p for p in pair.theirs.parameters() if p.ndim > 1]
    vectors = [p for p in pair.theirs.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}], lr=RATE
    )
    batches = [make_batch(seed + i, family.token_types) for i in range(4)]
    ours, theirs = [], []
    for i in range(STEPS):
        batch = batches[i % len(batches)]
        state, metrics = step(state, {}, batch)
        ours.append(float(metrics["loss"][0] / metrics["loss"][1]))
        loss, factor = pair.their_loss(batch, pair.example(batch, program.key, i))
        theirs.append(factor * loss.item())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(pair.theirs.parameters(), CLIP)
        np.testing.assert_allclose(float(metrics["grad_norm"][0]), norm.item(), rtol=1e-3)
        optimizer.step()
    assert theirs[-1] < 0.8 * theirs[0]  # it learns, so the parameters have moved
    within(f"{family.name} {STEPS} steps of AdamW, loss", np.max(np.abs(np.divide(ours, theirs) - 1)), 1e-3)


@by_family
def test_folders_both_ways(family: Family, pairs: dict[tuple[str, int], Pair], tmp_path: pathlib.Path) -> None:
    pair, batch = pairs[family.name, 0], make_batch(0, family.token_types)
    pair.theirs.save_pretrained(tmp_path / "theirs")
    config, vocab, params, _ = family.interop.load(tmp_path / "theirs")
    assert config == pair.config
    assert vocab == Vocabulary(SIZE)
    jax.tree.map(np.testing.assert_array_equal, params, pair.params[ROLE])

    family.interop.save(tmp_path / "ours", params, config, vocab)
    again = type(pair.theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager")
    with torch.no_grad():
        inputs = pair.their_inputs(batch)
        np.testing.assert_array_equal(again(**inputs).logits.numpy(), pair.theirs(**inputs).logits.numpy())


@pytest.mark.parametrize(
    ("family", "architecture"),
    [
        (bert, lambda: transformers.BertForPreTraining(transformers.BertConfig(**BERT))),
        (albert, lambda: transformers.AlbertForPreTraining(transformers.AlbertConfig(**ALBERT))),
    ],
    ids=["bert", "albert"],
)
def test_pair_head(family: Any, architecture: Any, tmp_path: pathlib.Path) -> None:
    """Sentence tasks: logits from the pooled first token, and both heads on one encoder."""
    torch.manual_seed(5)
    theirs = architecture().eval()
    randomise(theirs, 5)
    theirs.save_pretrained(tmp_path / "theirs")
    config, vocab, params, head_params = family.load(tmp_path / "theirs")
    encoder = nnx.merge(nnx.split(nnx.eval_shape(lambda: config.build(vocab, nnx.Rngs(params=0))))[0], params)
    head = nnx.eval_shape(lambda: PairHead(encoder.head_style, 2, nnx.Rngs(params=0)))
    head = nnx.merge(nnx.split(head)[0], head_params)
    batch = make_batch(5, token_types=3)
    mask = masks.bidirectional().packed(batch["segment_ids"])
    hidden = encoder.hidden(batch["tokens"], mask=mask, positions=batch["positions"], token_types=batch["token_types"])
    names = {"input_ids": "tokens", "attention_mask": "segment_ids", "token_type_ids": "token_types"}
    inputs = {k: torch.from_numpy(np.array(batch[v], np.int64)) for k, v in names.items()}
    with torch.no_grad():
        whole = theirs(**inputs)
        pooled = theirs.base_model(**inputs).pooler_output
    pair_logits = next(x for x in (whole.get("seq_relationship_logits"), whole.get("sop_logits")) if x is not None)
    name = family.__name__.rpartition(".")[2]
    within(f"{name} pooled output", np.max(np.abs(np.asarray(head.pooled(hidden)) - pooled.numpy())), 1e-4)
    within(f"{name} logits of pairs", np.max(np.abs(np.asarray(head(hidden)) - pair_logits.numpy())), 1e-4)
    assert np.std(pair_logits.numpy()) > 0.1

    family.save(tmp_path / "ours", params, config, vocab, pair_head=head_params)
    again = type(theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    with torch.no_grad():
        np.testing.assert_array_equal(again(**inputs).prediction_logits, whole.prediction_logits)
        np.testing.assert_array_equal(again.base_model(**inputs).pooler_output, pooled)


def test_roberta(tmp_path: pathlib.Path) -> None:
    """Positions are counted from the padding on; the rest is BERT's."""
    torch.manual_seed(6)
    settings = BERT | {"pad_token_id": 0, "type_vocab_size": 1}
    theirs = transformers.RobertaForMaskedLM(transformers.RobertaConfig(**settings)).eval()
    randomise(theirs, 6)
    theirs.save_pretrained(tmp_path / "theirs")
    config, vocab, params, _ = roberta.load(tmp_path / "theirs")
    assert (config.max_length, vocab.pad) == (22, 0)
    encoder = nnx.merge(nnx.split(nnx.eval_shape(lambda: config.build(vocab, nnx.Rngs(params=0))))[0], params)
    batch = make_batch(6, token_types=0)
    hidden = encoder.hidden(batch["tokens"], mask=masks.bidirectional().packed(batch["segment_ids"]))
    head = encoder.head_table()
    logits = np.asarray(encoder.head_hidden(hidden) @ head.table.T + head.bias)[..., :SIZE]
    tokens, real = torch.from_numpy(np.array(batch["tokens"], np.int64)), np.asarray(batch["segment_ids"]) > 0
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=torch.from_numpy(real.astype(np.int64))).logits.numpy()
    within("roberta logits", np.max(np.abs(logits[real] - expected[real])), 1e-4)
    roberta.save(tmp_path / "ours", params, config, vocab)
    again = transformers.RobertaForMaskedLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    with torch.no_grad():
        np.testing.assert_array_equal(
            again(tokens[:1]).logits.numpy(), theirs(tokens[:1]).logits.numpy()
        )  # a row without padding, whose position is zeros in what lmobj writes
