"""BERT and GPT-2 against Transformers' PyTorch models: hidden states, logits, loss, gradients, and 50 steps of AdamW.

Every comparison prints what it saw: `pytest -m parity -s`.
"""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from flax import nnx  # noqa: E402
from hf_peers import BERT, FAMILIES, LENGTHS, ROLE, ROWS, SIZE, VOCAB, Family, Pair, make_batch, without_dropout  # noqa: E402

from lmobj import masks  # noqa: E402
from lmobj.batch import Vocabulary  # noqa: E402
from lmobj.interop import bert  # noqa: E402
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


def within(name: str, seen: float, limit: float) -> None:
    """Prints a figure and holds it against its limit."""
    print(f"\n{name:<40} {seen:.1e}   (limit {limit:.0e})")
    assert seen <= limit


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


def gradient_gaps(ours: dict[str, object], theirs: dict[str, object]) -> dict[str, float]:
    """Relative distance by norm of every tensor, a stacked one layer by layer.

    Where both norms are below 1e-7 of the global one the distance is 0: the gradient of BERT's key biases is exactly
    zero, because a softmax does not see what all its logits share.
    """
    floor = 1e-7 * np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(theirs)))
    gaps, flat = {}, dict(jax.tree_util.tree_leaves_with_path(ours))
    for path, b in jax.tree_util.tree_leaves_with_path(theirs):
        name, a = jax.tree_util.keystr(path, simple=True, separator="/"), np.asarray(flat.pop(path))
        layers = [(f"{name}[{i}]", *pair) for i, pair in enumerate(zip(a, b, strict=True))]
        for tensor, x, y in layers if name.startswith("stack") else [(name, a, b)]:
            norms = np.linalg.norm(x), np.linalg.norm(y)
            gaps[tensor] = 0.0 if max(norms) < floor else float(np.linalg.norm(x - y) / max(norms))
    assert not flat
    return gaps


@by_family
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
    config, vocab, params = family.interop.load(tmp_path / "theirs")
    assert config == pair.config
    assert vocab == Vocabulary(SIZE)
    jax.tree.map(np.testing.assert_array_equal, params, pair.params[ROLE])

    family.interop.save(tmp_path / "ours", params, config, vocab)
    again = type(pair.theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager")
    with torch.no_grad():
        inputs = pair.their_inputs(batch)
        np.testing.assert_array_equal(again(**inputs).logits.numpy(), pair.theirs(**inputs).logits.numpy())


def test_pooler(tmp_path: pathlib.Path) -> None:
    torch.manual_seed(5)
    theirs = transformers.BertForPreTraining(transformers.BertConfig(**BERT)).eval()
    theirs.save_pretrained(tmp_path)
    config, vocab, params = bert.load(tmp_path, ignore=["cls.seq_relationship"])
    encoder = nnx.merge(nnx.split(nnx.eval_shape(lambda: config.build(vocab, nnx.Rngs(params=0))))[0], params)
    batch = make_batch(5, token_types=3)
    hidden = encoder.hidden(
        batch["tokens"],
        mask=masks.bidirectional().packed(batch["segment_ids"]),
        positions=batch["positions"],
        token_types=batch["token_types"],
    )
    with torch.no_grad():
        inputs = {"input_ids": "tokens", "attention_mask": "segment_ids", "token_type_ids": "token_types"}
        pooled = theirs.bert(**{k: torch.from_numpy(np.array(batch[v], np.int64)) for k, v in inputs.items()})
    within(
        "bert pooled output", np.max(np.abs(np.asarray(encoder.pooled(hidden)) - pooled.pooler_output.numpy())), 1e-4
    )
