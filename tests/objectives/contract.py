"""Fixtures of the contract test: for each objective one tiny model, one batch, and functions compiled once.

A new objective gets its row by adding a `Case` to `CASES`; the contract test fails if a registered one has none.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lmobj import objectives
from lmobj.batch import NO_TAG, Batch, Vocabulary
from lmobj.models import (
    DecoderConfig,
    ElectraConfig,
    EncoderConfig,
    EncoderDecoderConfig,
    ModelBuilder,
    MoEConfig,
    XLNetConfig,
)
from lmobj.objectives import Objective
from lmobj.train.step import Program, State
from tests import styles

BATCH, LENGTH = 8, 16
WORDS = 40
"""Ordinary tokens are those from 7 on and below; after them come marks and sentinels."""
VOCAB = Vocabulary(
    size=WORDS + 16,
    pad=0,
    unk=1,
    bos=2,
    eos=3,
    cls=4,
    sep=5,
    mask=6,
    nlu=WORDS,
    s2s=WORDS + 1,
    nlg=WORDS + 2,
    fim_prefix=WORDS + 3,
    fim_suffix=WORDS + 4,
    fim_middle=WORDS + 5,
    sentinels=tuple(range(WORDS + 15, WORDS + 5, -1)),
)
DROPOUT = {"dropout": 0.1, "attention_dropout": 0.1}
DECODER = DecoderConfig(layers=2, width=16, heads=2, max_length=2 * LENGTH, **DROPOUT)
SEQ2SEQ = EncoderDecoderConfig(
    layers=2, width=16, heads=2, head_width=8, mlp_width=32, max_length=2 * LENGTH, remat="none", **DROPOUT
)
ENCODER = EncoderConfig(layers=2, width=16, heads=2, max_length=2 * LENGTH, **DROPOUT)
ELECTRA = ElectraConfig(
    layers=2, width=16, heads=2, generator_fraction=0.5, generator_heads=2, max_length=2 * LENGTH, **DROPOUT
)
XLNET = XLNetConfig(layers=2, width=16, heads=2, memory_length=10, **DROPOUT)
TRANSFORMER_XL = dataclasses.replace(
    XLNET, direction="backward", segments=False, query_stream=False, untie_biases=False
)
BART = EncoderDecoderConfig(layers=2, width=16, heads=2, mlp_width=32, max_length=2 * LENGTH, **styles.BART, **DROPOUT)


@dataclass(frozen=True)
class Case:
    """What the contract test needs to know of an objective.

    make: makes its batches, `make(rows=, first_row=)`: row r is the same in every batch.
    packed: rows are packed documents and the one term is over tokens: that a packed row is worth its documents, and who
      sees whom, is tested here. The others have tests of their own.
    per_document: a packed row is worth its documents separately.
    sees_later: whether a prediction may depend on later tokens of its document.
    padded: rows may be padded further without any change of the settings.
    unused: parts of parameter paths that the objective has no use for.
    gathers: each row's loss looks at all rows, which devices therefore gather.
    placed: the noise of a row depends on its place in the global batch, and so on the batch's size.
    variant: another corruption of an objective that has a case already: only what depends on corruption is tested.
    """

    objective: Objective
    builders: Mapping[str, ModelBuilder]
    make: Callable[..., Batch] = dataclasses.field(default_factory=lambda: make_batch)
    packed: bool = True
    per_document: bool = True
    sees_later: bool = False
    padded: bool = True
    unused: tuple[str, ...] = ("token_types",)
    gathers: bool = False
    placed: bool = False
    variant: bool = False

    def models(self, dtype: str) -> tuple[dict[str, nnx.GraphDef], dict[str, Any]]:
        """(graphs, params) of every role. Parameters are drawn on the host, which compiles nothing, and none begins at
        zero or one, so that a lost gradient shows."""
        graphs, params = {}, {}
        for name, module in nnx.eval_shape(lambda: self._build(dtype)).items():
            graphs[name], state = nnx.split(module)
            params[name] = jax.tree_util.tree_map_with_path(_drawn, nnx.to_pure_dict(state))
        return graphs, params

    def _build(self, dtype: str) -> dict[str, nnx.Module]:
        models: dict[str, Any] = {}
        for i, (role, builder) in enumerate(self.builders.items()):
            config = dataclasses.replace(builder, dtype=dtype, param_dtype="float32" if dtype == "bfloat16" else dtype)
            models[role] = config.build(VOCAB, nnx.Rngs(params=i))
        if "heads" in self.objective.roles:
            models["heads"] = self.objective.build_heads(models["model"].head_style, VOCAB, nnx.Rngs(params=100))
        return models


def _drawn(path: Any, leaf: Any) -> jax.Array:
    name = jax.tree_util.keystr(path)
    noise = np.random.default_rng(list(name.encode())).normal(scale=0.05, size=leaf.shape)
    return jnp.asarray(noise + name.endswith("['scale']"), leaf.dtype)


def make_batch(seed: int = 0, rows: int = BATCH, length: int = LENGTH, *, first_row: int = 0) -> Batch:
    """Packed rows of one to three documents, most of them with padding; row r is the same in every batch."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("tokens", "segment_ids", "positions", "word_starts")}
    for row in range(first_row, first_row + rows):
        rng = np.random.default_rng([seed, row])
        cuts = sorted(rng.choice(np.arange(3, length - 2), size=rng.integers(0, 3), replace=False))
        end = length - int(rng.integers(0, 4))
        bounds = [0, *[c for c in cuts if c < end - 2], end]
        tokens, segments, positions = np.zeros(length, int), np.zeros(length, int), np.zeros(length, int)
        starts = rng.random(length) < 0.6
        for i, (a, b) in enumerate(itertools.pairwise(bounds)):
            tokens[a:b] = rng.integers(7, WORDS, b - a)
            segments[a:b], positions[a:b], starts[a] = i + 1, np.arange(b - a), True
        for name, value in zip(columns, (tokens, segments, positions, starts), strict=True):
            columns[name].append(value)
    batch = {
        name: jnp.asarray(np.stack(value), bool if name == "word_starts" else jnp.int32)
        for name, value in columns.items()
    }
    batch["token_bytes"] = jnp.where(batch["segment_ids"] > 0, 3, 0)
    batch["row_ids"] = jnp.stack(
        [jnp.zeros(rows, jnp.int32), jnp.arange(first_row, first_row + rows, dtype=jnp.int32)], 1
    )
    return batch


def make_pairs(seed: int = 0, rows: int = BATCH, length: int = LENGTH, *, first_row: int = 0) -> Batch:
    """[CLS] A [SEP] B [SEP] with labels, most of them with padding; row r is the same in every batch."""
    batch = {name: np.array(x) for name, x in make_batch(seed, rows, length, first_row=first_row).items()}
    batch["token_types"] = np.zeros_like(batch["tokens"])
    for row in range(rows):
        rng = np.random.default_rng([seed, first_row + row, 1])
        end, middle = length - int(rng.integers(0, 4)), int(rng.integers(4, length - 7))
        batch["tokens"][row] = rng.integers(7, WORDS, length)
        batch["tokens"][row, [0, middle, end - 1]] = VOCAB.cls, VOCAB.sep, VOCAB.sep
        batch["token_types"][row] = np.arange(length) > middle
        batch["segment_ids"][row], batch["positions"][row] = 1, np.arange(length)
        for name in ("tokens", "token_types", "segment_ids", "positions", "word_starts"):
            batch[name][row, end:] = 0
    labels = np.random.default_rng([seed, 2]).integers(0, 2, first_row + rows)[first_row:]
    batch |= {"pair_labels": labels.astype(np.int32), "labels": labels.astype(np.int32)}
    batch["scores"] = 1.5 * labels.astype(np.float32) - 0.5
    batch["label_sets"] = np.stack(
        [labels, np.arange(first_row, first_row + rows) % 2, 0 * labels], 1, dtype=np.float32
    )
    return {name: jnp.asarray(x) for name, x in batch.items()}


def make_translations(rows: int = BATCH, *, first_row: int = 0) -> Batch:
    """source EOS target EOS, most with padding; row r is the same in every batch."""
    batch = {name: np.array(x) for name, x in make_batch(rows=rows, first_row=first_row).items()}
    for row in range(rows):
        draw = np.random.default_rng([6, first_row + row])
        source, target = draw.integers(2, LENGTH // 2 + 1, 2)
        texts = draw.integers(7, 40, source + target)
        texts[[source - 1, -1]] = VOCAB.eos
        batch["tokens"][row] = np.pad(texts, (0, LENGTH - len(texts)))
        batch["segment_ids"][row] = np.arange(LENGTH) < len(texts)
        batch["positions"][row] = np.arange(LENGTH) * batch["segment_ids"][row]
    types = np.cumsum(batch["tokens"] == VOCAB.eos, axis=1) - (batch["tokens"] == VOCAB.eos)
    batch["token_types"] = np.where(batch["segment_ids"], types, 0)
    names = ("tokens", "segment_ids", "positions", "token_types", "row_ids")
    return {name: jnp.asarray(batch[name], jnp.int32) for name in names}


def make_tagged(rows: int = BATCH, *, first_row: int = 0) -> Batch:
    """`make_batch` with tags of three classes on some tokens; row r is the same in every batch."""
    batch = make_batch(rows=rows, first_row=first_row)
    tags = [np.random.default_rng([4, row]).integers(NO_TAG, 3, LENGTH) for row in range(first_row, first_row + rows)]
    return batch | {"tags": jnp.where(batch["segment_ids"] > 0, jnp.asarray(np.stack(tags), jnp.int32), NO_TAG)}


def make_sentences_ended(rows: int = BATCH, *, first_row: int = 0) -> Batch:
    """`make_batch` with a sentence's end at about every fifth token; row r is the same in every batch."""
    ends = [np.random.default_rng([6, row]).random(LENGTH) < 0.2 for row in range(first_row, first_row + rows)]
    batch = make_batch(rows=rows, first_row=first_row)
    return batch | {"sentence_ends": jnp.asarray(np.stack(ends)) & (batch["segment_ids"] > 0)}


def make_questions(rows: int = BATCH, *, first_row: int = 0) -> Batch:
    """`make_pairs` with an answer in B, or in every third row none; row r is the same in every batch."""
    batch = make_pairs(rows=rows, first_row=first_row)
    spans = np.zeros((rows, 2), np.int32)
    for row, types in enumerate(np.asarray(batch["token_types"])):
        if (first_row + row) % 3:
            text = np.flatnonzero(types)[:-1]
            spans[row] = np.sort(np.random.default_rng([5, first_row + row]).choice(text, 2))
    return batch | {"spans": jnp.asarray(spans)}


def make_choices(rows: int = BATCH, *, first_row: int = 0) -> Batch:
    """Two or three segments [CLS] context [SEP] choice [SEP], most with padding; row r is the same in every batch."""
    names = ("tokens", "segment_ids", "positions", "token_types")
    batch: dict[str, Any] = {name: np.zeros((rows, LENGTH), np.int32) for name in names}
    for row in range(rows):
        rng = np.random.default_rng([4, first_row + row])
        end = 0
        for segment in range(1, 3 + rng.integers(0, 2)):
            start, context, choice = end, int(rng.integers(0, 2)), int(rng.integers(1, 2))
            middle, end = start + 2 + context, start + 3 + context + choice
            batch["tokens"][row, start:end] = rng.integers(7, WORDS, end - start)
            batch["tokens"][row, [start, middle - 1, end - 1]] = VOCAB.cls, VOCAB.sep, VOCAB.sep
            batch["segment_ids"][row, start:end], batch["positions"][row, start:end] = segment, np.arange(end - start)
            batch["token_types"][row, middle:end] = 1
    place = np.arange(first_row, first_row + rows, dtype=np.int32)
    batch |= {"labels": place % 2, "row_ids": np.stack([0 * place, place], 1)}
    return {name: jnp.asarray(x) for name, x in batch.items()}


def make_sentences(**rows: int) -> Batch:
    """[CLS] text [SEP], most with padding; row r is the same in every batch."""
    return {name: make_pairs(**rows)[name] for name in ("tokens", "segment_ids", "positions", "row_ids")}


def make_relations(**rows: int) -> Batch:
    """[CLS] text [SEP] with two marked places, either first; most with padding; row r is the same in every batch."""
    batch = make_pairs(**rows)
    place = batch["row_ids"][:, 1]
    spans = jnp.stack([1 + place % 5, 1 + (3 * place + 2) % 7], axis=1).astype(jnp.int32)
    names = ("tokens", "segment_ids", "positions", "row_ids", "labels")
    return {name: batch[name] for name in names} | {"spans": spans}


def make_streams(seed: int = 0, rows: int = BATCH, length: int = LENGTH, *, first_row: int = 0) -> Batch:
    """[half a row | A SEP B SEP CLS] as permutation LM reads it, every second row backwards; some end in padding."""
    batch = {name: np.array(x) for name, x in make_pairs(seed, rows, length, first_row=first_row).items()}
    half, middle = length // 2, length // 2 + 3
    batch["tokens"][:, 0], batch["tokens"][:, middle] = 7, VOCAB.sep
    batch["tokens"][:, [-2, -1]] = np.where(batch["segment_ids"][:, -1:], [VOCAB.sep, VOCAB.cls], 0)
    place = np.arange(length)
    types = np.where(place > middle, 1, 0) + (place == length - 1)
    batch["token_types"] = np.where(batch["segment_ids"], np.where(place < half, 0, types), 0).astype(np.int32)
    batch["backward"] = np.arange(first_row, first_row + rows) % 2 == 1
    return {name: jnp.asarray(x) for name, x in batch.items()}


def make_sampled(rows: int = BATCH, *, first_row: int = 0) -> Batch:
    """`make_batch` with recorded samples for 6 slots; row r is the same in every batch."""
    sampled = [np.random.default_rng([3, row]).integers(7, WORDS, 6) for row in range(first_row, first_row + rows)]
    return make_batch(rows=rows, first_row=first_row) | {"sampled": jnp.asarray(np.stack(sampled), jnp.int32)}


def make_texts(seed: int = 0, rows: int = BATCH, length: int = LENGTH, *, first_row: int = 0) -> Batch:
    """A query, its text and perhaps a hard negative: segments 1 to 3, most with padding; row r is the same in every
    batch. Rows 1 and 2 have equal texts, rows 3 and 4 equal queries, and row 5 has another row's text for negative."""
    names = ("tokens", "segment_ids", "positions", "text_ids")
    columns: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for row in range(first_row, first_row + rows):
        rng = np.random.default_rng([seed, row, 4])
        sizes = rng.integers(3, length // 3 + 1, 2 if row % 4 == 3 else 3)
        segments = np.repeat(np.arange(1, len(sizes) + 1), sizes)
        positions = np.concatenate([np.arange(size) for size in sizes])
        tokens = rng.integers(7, WORDS, len(segments))
        tokens[positions == 0] = VOCAB.cls
        ids = 3 * row + np.arange(3)
        ids[0] -= 3 * (row % 8 == 4)
        ids[1] -= 3 * (row % 8 == 2)
        ids[2] = 3 * row + 4 if row % 8 == 5 else ids[2]
        padded = [np.pad(x, (0, length - len(x))) for x in (tokens, segments, positions)]
        for name, value in zip(names, (*padded, ids), strict=True):
            columns[name].append(value)
    batch = {name: jnp.asarray(np.stack(value), jnp.int32) for name, value in columns.items()}
    numbers = jnp.arange(first_row, first_row + rows, dtype=jnp.int32)
    return batch | {"row_ids": jnp.stack([jnp.zeros_like(numbers), numbers], 1)}


_TOKEN_FIELDS = ("tokens", "segment_ids", "positions", "token_types", "word_starts", "sentence_ends", "token_bytes")


def pad_columns(batch: Batch, extra: int) -> Batch:
    """The same rows with `extra` columns of padding."""
    if "row_ids" not in batch:
        return {name: pad_columns(part, extra) for name, part in batch.items()}
    padding = {**dict.fromkeys(_TOKEN_FIELDS, 0), "tags": NO_TAG}
    return {
        k: jnp.pad(v, ((0, 0), (0, extra)), constant_values=padding[k]) if k in padding else v for k, v in batch.items()
    }


def pad_rows(batch: Batch, extra: int) -> Batch:
    """The same rows and `extra` empty ones."""
    return jax.tree.map(lambda x: jnp.pad(x, ((0, extra), *((0, 0),) * (x.ndim - 1))), batch)


def blank_rows(batch: Batch, rows: Any) -> Batch:
    """The batch with some of its rows made empty."""
    if "row_ids" not in batch:
        return {name: blank_rows(part, rows) for name, part in batch.items()}
    return {k: v.at[rows].set(0) if k in ("tokens", "segment_ids") else v for k, v in batch.items()}


def take_rows(batch: Batch, rows: Any) -> Batch:
    """Some of the rows, in the order given."""
    return jax.tree.map(lambda x: x[jnp.asarray(rows)], batch)


CASES: dict[str, Case] = {
    "causal_lm": Case(objectives.CausalLM(label_smoothing=0.1, z_loss=1e-3), {"model": DECODER}),
    "causal_lm/joined": Case(
        objectives.CausalLM(documents="joined"), {"model": DECODER}, per_document=False, variant=True
    ),
    "causal_lm/experts": Case(
        objectives.Routed(objectives.CausalLM()),
        {"model": dataclasses.replace(DECODER, moe=MoEConfig(experts=4, capacity_factor=None))},
        packed=False,  # its terms have other weights than tokens
    ),
    "fill_in_middle": Case(
        objectives.FillInMiddle(fim_rate=0.7, max_documents=2, label_smoothing=0.1, z_loss=1e-3),
        {"model": DECODER},
        make=lambda **rows: make_batch(length=LENGTH - 6, **rows),
    ),
    "fill_in_middle/joined": Case(
        objectives.FillInMiddle(documents="joined", max_documents=2),
        {"model": DECODER},
        make=lambda **rows: make_batch(length=LENGTH - 6, **rows),
        per_document=False,
        variant=True,
    ),
    "masked_lm": Case(objectives.MaskedLM(mask_rate=0.3, max_predictions=6), {"model": ENCODER}, sees_later=True),
    "masked_lm/bernoulli": Case(
        objectives.MaskedLM(selection="bernoulli", mask_rate=0.3), {"model": ENCODER}, sees_later=True, variant=True
    ),
    "masked_lm/whole_word": Case(
        objectives.MaskedLM(selection="whole_word", mask_rate=0.3, max_predictions=6),
        {"model": ENCODER},
        sees_later=True,
        variant=True,
    ),
    "masked_lm/roberta": Case(
        objectives.MaskedLM(selection="roberta", mask_rate=0.3, max_predictions=6),
        {"model": ENCODER},
        sees_later=True,
        variant=True,
    ),
    "masked_lm/ngram": Case(
        objectives.MaskedLM(selection="ngram", mask_rate=0.3, max_predictions=6),
        {"model": ENCODER},
        sees_later=True,
        variant=True,
    ),
    "masked_diffusion": Case(objectives.MaskedDiffusion(), {"model": DECODER}, sees_later=True),
    "masked_diffusion/mdlm": Case(
        objectives.MaskedDiffusion(variant="mdlm"), {"model": ENCODER}, sees_later=True, placed=True, variant=True
    ),
    "masked_diffusion/truncated": Case(
        objectives.MaskedDiffusion(truncate_rate=0.5), {"model": ENCODER}, sees_later=True, variant=True
    ),
    "span_corruption": Case(
        objectives.SpanCorruption(noise_density=0.3, mean_span=2, label_smoothing=0.1, z_loss=1e-3),
        {"model": SEQ2SEQ},
        packed=False,
    ),
    "span_corruption/decoder": Case(
        objectives.SpanCorruption(noise_density=0.3, mean_span=2, rendering="decoder"),
        {"model": dataclasses.replace(DECODER, max_length=4 * LENGTH)},  # rows hold inputs and targets
        packed=False,
        variant=True,
    ),
    "span_corruption/tokens": Case(
        objectives.SpanCorruption(noise="tokens", noise_density=0.3), {"model": SEQ2SEQ}, packed=False, variant=True
    ),
    "prefix_lm": Case(objectives.PrefixLM(), {"model": SEQ2SEQ}, packed=False),
    "prefix_lm/decoder": Case(
        objectives.PrefixLM(rendering="decoder"),
        {"model": dataclasses.replace(DECODER, max_length=4 * LENGTH)},
        packed=False,
        variant=True,
    ),
    "mixture_of_denoisers": Case(
        objectives.MixtureOfDenoisers(
            denoisers=(
                objectives.Denoiser(noise_density=0.15, mean_span=3, mark="nlu"),
                objectives.Denoiser(noise_density=0.25, mean_span=None, mark="s2s", weight=2.0),
                objectives.Denoiser(noise_density=0.5, mean_span=4, mark="nlg"),
            )
        ),
        {"model": SEQ2SEQ},
        packed=False,
        padded=False,  # rows are read as far as each denoiser's inputs have room, which is a share of their length
    ),
    "mixture_of_denoisers/decoder": Case(
        objectives.MixtureOfDenoisers(
            denoisers=(objectives.Denoiser(mean_span=2), objectives.Denoiser(mean_span=None)), rendering="decoder"
        ),
        {"model": dataclasses.replace(DECODER, max_length=4 * LENGTH)},
        packed=False,
        padded=False,
        variant=True,
    ),
    "multi_token_prediction": Case(
        objectives.MultiTokenPrediction(tokens=3),
        {"model": DECODER},
        packed=False,  # each of its terms has weights
    ),
    "multi_token_prediction/sequential": Case(
        objectives.MultiTokenPrediction(variant="sequential", tokens=3), {"model": DECODER}, packed=False
    ),
    "sequence_to_sequence": Case(
        objectives.SequenceToSequence(target_length=LENGTH // 2, label_smoothing=0.1),
        {"model": SEQ2SEQ},
        make=make_translations,
        packed=False,
    ),
    "sequence_to_sequence/decoder": Case(
        objectives.SequenceToSequence(target_length=LENGTH // 2, rendering="decoder"),
        {"model": DECODER},
        make=make_translations,
        packed=False,
        variant=True,
    ),
    "denoising_autoencoder": Case(
        objectives.DenoisingAutoencoder(rotate_rate=0.5),
        {"model": BART},
        make=make_sentences_ended,
        packed=False,
        unused=(),
    ),
    "denoising_autoencoder/decoder": Case(
        objectives.DenoisingAutoencoder(
            rendering="decoder", unit="tokens", replace="token", random_share=0.5, insert_rate=0.1
        ),
        {"model": dataclasses.replace(DECODER, max_length=4 * LENGTH)},
        make=make_sentences_ended,
        packed=False,
        variant=True,
    ),
    "span_boundary": Case(
        objectives.SpanBoundary(mask_rate=0.3, max_span=2, layout="packed"), {"model": ENCODER}, packed=False
    ),
    "permutation_lm": Case(
        objectives.PermutationLM(perm_size=4, num_predictions=6, mask_alpha=2),
        {"model": XLNET},
        make=make_streams,
        packed=False,
        padded=False,  # the halves of a row are settings
    ),
    "replaced_token_detection": Case(
        objectives.ReplacedTokenDetection(mask_rate=0.3, max_predictions=6),
        {"model": ELECTRA},
        make=make_sampled,
        packed=False,
    ),
    "replaced_token_detection/sampling": Case(
        objectives.ReplacedTokenDetection(mask_rate=0.3, max_predictions=6, replacement=False, disallow_correct=True),
        {"model": ELECTRA},
        packed=False,
        variant=True,
    ),
    "transformer_xl": Case(
        objectives.TransformerXL(label_smoothing=0.1, z_loss=1e-3), {"model": TRANSFORMER_XL}, packed=False
    ),
    "next_sentence_prediction": Case(
        objectives.NextSentencePrediction(masked_lm=objectives.MaskedLM(mask_rate=0.3, max_predictions=6)),
        {"model": ENCODER},
        make=make_pairs,
        packed=False,
        unused=(),
    ),
    "sentence_order_prediction": Case(
        objectives.SentenceOrderPrediction(masked_lm=None),
        {"model": ENCODER},
        make=make_pairs,
        packed=False,
        unused=("['head']",),
    ),
    "mixture": Case(
        objectives.Mixture(
            weighting="uncertainty",
            members={
                "lm": objectives.Member(objectives.MaskedLM(mask_rate=0.3, max_predictions=6), weight=2.0),
                "order": objectives.Member(objectives.SentenceOrderPrediction(masked_lm=None)),
            },
        ),
        {"model": ENCODER},
        make=lambda **rows: {"lm": make_batch(**rows), "order": make_pairs(**rows)},
        packed=False,
        unused=(),
    ),
    "classification": Case(
        objectives.Classification(class_weights=(1.0, 2.5), label_smoothing=0.1),
        {"model": ENCODER},
        make=make_pairs,
        packed=False,
        unused=("['head']",),
    ),
    "multi_label": Case(
        objectives.MultiLabel(classes=3, class_weights=(1.0, 2.5, 0.5)),
        {"model": ENCODER},
        make=make_pairs,
        packed=False,
        unused=("['head']",),
    ),
    "multiple_choice": Case(
        objectives.MultipleChoice(choices=3),
        {"model": ENCODER},
        make=make_choices,
        packed=False,
        unused=("['head']",),
    ),
    "relation": Case(
        objectives.RelationClassification(),
        {"model": ENCODER},
        make=make_relations,
        packed=False,
        unused=("['head']", "token_types"),
    ),
    "in_batch_contrastive": Case(
        objectives.InBatchContrastive(negatives=1, symmetric=True, temperature=0.5),
        {"model": ENCODER},
        make=make_texts,
        packed=False,
        unused=("token_types", "['head']"),
        gathers=True,
    ),
    "simcse": Case(
        objectives.SimCSE(temperature=0.5),
        {"model": dataclasses.replace(ENCODER, max_length=4 * LENGTH)},  # rows are read at twice their length
        make=make_sentences,
        packed=False,
        unused=("token_types", "['head']"),
        gathers=True,
    ),
    "simcse/supervised": Case(
        objectives.SimCSE(supervised=True, negatives=1, hard_negative_weight=0.3, temperature=0.5),
        {"model": ENCODER},
        make=make_texts,
        packed=False,
        gathers=True,
        variant=True,
    ),
    "triplet": Case(
        objectives.Triplet(distance="euclidean", pooling="first", margin=1.0),
        {"model": ENCODER},
        make=make_texts,
        packed=False,
        unused=("token_types", "['head']"),
    ),
    "regression": Case(
        objectives.Regression(attention="causal", pooling="mean"),
        {"model": DECODER},
        make=make_pairs,
        packed=False,
    ),
    "token_classification": Case(
        objectives.TokenClassification(classes=3),
        {"model": ENCODER},
        make=make_tagged,
        sees_later=True,
        unused=("token_types", "['head']"),
    ),
    "extractive_qa": Case(
        objectives.ExtractiveQA(),
        {"model": ENCODER},
        make=make_questions,
        packed=False,
        unused=("['head']",),
    ),
}


class Bench:
    """One objective with its models in one dtype, and its functions compiled once per shape."""

    def __init__(self, case: Case, dtype: str = "float64") -> None:
        self.case = case
        self.objective = case.objective
        self.graphs, self.params = case.models(dtype)
        self.key = jax.random.key(3, impl="threefry2x32")
        self.batch = case.make()
        self.loss = objectives.loss_fn(self.objective, self.graphs, VOCAB)
        self.value_and_grad = jax.jit(self._value_and_grad)

    def _value_and_grad(self, params: Any, batch: Batch, key: Any) -> tuple[tuple[Any, Any], Any]:
        """((loss, metrics), gradients). Variants have no gradients: they are those of the objective itself."""
        if self.case.variant:
            return self.loss(params, batch, key), {}
        return jax.value_and_grad(self.loss, has_aux=True)(params, batch, key)

    def in_bfloat16(self) -> tuple[Any, Any]:
        """(loss, gradients) of the same parameters in float32, computed in bfloat16."""
        graphs, _ = self.case.models("bfloat16")
        loss = objectives.loss_fn(self.objective, graphs, VOCAB)
        params = jax.tree.map(lambda x: x.astype(jnp.float32), self.params)
        (value, _), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, self.batch, self.key)
        return value, grads

    @functools.cached_property
    def reference(self) -> tuple[float, Any]:
        """(loss, gradients) of the whole batch on one device, dropout on."""
        (loss, _), grads = self.value_and_grad(self.params, self.batch, self.key)
        return float(loss), grads

    @functools.cached_property
    def trained(self) -> tuple[State, list[float]]:
        """State and losses of two steps on one device, batches whole."""
        return self.train(self.program(), steps=2)

    def program(self, accumulate: int = 1, optimizer: optax.GradientTransformation | None = None) -> Program:
        """The training program with plain SGD at rate 1, so that a parameter's change is its gradient."""
        constant: Callable[[float], Any] = lambda value: lambda step: jnp.asarray(value)  # noqa: E731
        return Program(
            objective=self.objective,
            graphs=self.graphs,
            vocab=VOCAB,
            optimizer=optimizer or optax.sgd(1.0),
            coefficients={name: constant(value) for name, value in self.objective.coefficients.items()},
            seed=3,
            accumulate=accumulate,
        )

    def train(self, program: Program, steps: int = 1, batch: Batch | None = None) -> tuple[State, list[float]]:
        """The state after `steps` steps, and the loss of each."""
        state, step, losses = program.init(self.params, BATCH), jax.jit(program.train_step), []
        for i in range(steps):
            state, metrics = step(state, {}, batch or self.case.make(first_row=i * BATCH))
            losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
        return state, losses


def norm_gap(a: Any, b: Any) -> float:
    """The largest relative distance, by norm, between matching tensors of two trees.

    Tensors of which both are below 1e-12 of the global norm are rounding noise and count as equal: the gradient of a
    key bias is exactly zero, because a softmax does not see what all its logits share.
    """
    a, b = (jax.tree.map(lambda x: np.asarray(x, np.float64), tree) for tree in (a, b))
    noise = 1e-12 * np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(b)))

    def gap(x: np.ndarray, y: np.ndarray) -> float:
        scale = max(np.linalg.norm(x), np.linalg.norm(y))
        return 0.0 if scale <= noise else float(np.linalg.norm(x - y) / scale)

    return max(jax.tree.leaves(jax.tree.map(gap, a, b)), default=0.0)
