"""The objective contract: a training objective is a pure function of (models, batch, keys).

    rows(vocab, length)                     the rows it reads; refuses settings that cannot be satisfied
    build_heads(style, vocab, rngs)         what it puts on the model's hidden states, if it has a role `heads`
    init(models, key, batch_size)           parameters of its own and what is carried from step to step
    prepare(models, batch, ctx)             outside the gradient, once per global batch
    corrupt(keys, batch, ctx)               rows -> Example, on the device
    weights(example)                        {term: denominator}, additive over rows
    statistics(models, example, carried, ctx)  what terms need to know of the whole batch, additive over rows
    terms(models, example, carried, ctx)    {term: sum}, metrics, carried

The trainer owns coefficients and denominators: total = sum over terms of coefficient(step) * sum / denominator,
where the denominator is added over every microbatch and device before the backward pass. No objective divides.
Statistics are added up in the same way before it, and are constants in it: with them a term whose summand depends on
the whole batch (the load of experts) is a sum over rows like any other, and exact under any split.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from lmobj.batch import Batch, RowSpec, Vocabulary, dropout_seeds
from lmobj.masks import AttentionMask
from lmobj.models import HeadStyle, RowUse

__all__ = ["Context", "Example", "Judge", "Models", "Objective", "ObjectiveState", "Role", "Rows", "TermKind", "Terms"]

Models = Mapping[str, nnx.Module]
"""Role name -> model."""

Rows = RowSpec | Mapping[str, RowSpec]
"""The rows of one batch, or of each batch of a mixture by the names of its members."""

Judge = Literal["loss", "bits_per_byte", "top5_accuracy", "accuracy", "mse", "entity_f1", "f1", "micro_f1", "mrr_at_10"]
Task = Literal[
    "classification",
    "regression",
    "multi_label",
    "multiple_choice",
    "relation",
    "token_classification",
    "extractive_qa",
    "retrieval",
    "sequence_to_sequence",
]

Metric = tuple[Array, Array]
"""(sum, weight): added over rows, microbatches and devices, divided once when it is logged."""


class Role(enum.Enum):
    """What the trainer does with a model that an objective needs."""

    TRAINABLE = "trainable"
    FROZEN = "frozen"


class TermKind(enum.Enum):
    """How a term behaves when a batch is split into microbatches."""

    SUM = "sum"
    """Additive over rows: exact under any split."""
    PARAMETER = "parameter"
    """A function of the parameters alone: counted once per step."""
    BATCH = "batch"
    """Needs the whole batch at once: refused under gradient accumulation."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """What surrounds a batch. `keys` are one per row, for dropout and for sampling from models; of a mixture, by the
    names of its members."""

    keys: Any
    step: Int[Array, ""] | int
    vocab: Vocabulary = dataclasses.field(metadata={"static": True})
    params: Any = ()
    """The objective's own trained parameters (`ObjectiveState.params`)."""
    statistics: Any = None
    """`Objective.statistics` of the whole batch; None: the rows at hand are the whole batch."""
    train: bool = dataclasses.field(default=True, metadata={"static": True})
    parts: int = dataclasses.field(default=1, metadata={"static": True})
    """How many equal parts the whole batch is in, of which the rows at hand are one."""
    part: Int[Array, ""] | int = 0
    """Where `corrupt` sees one of `parts`: which, from 0; its rows follow those of the part before."""

    @property
    def dropout(self) -> UInt32[Array, " B"] | None:
        """Dropout seeds, one per row; None in evaluation."""
        return dropout_seeds(self.keys) if self.train else None

    def places(self, rows: int) -> Int[Array, " B"]:
        """Of the `rows` rows that `corrupt` sees: where they stand in the global batch."""
        return self.part * rows + jnp.arange(rows, dtype=jnp.int32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Example:
    """What `corrupt` makes of a batch: everything that `weights` and `terms` read.

    targets and weights have shape [B, L], or [B, K] where only the K positions in `predict` are predicted.
    `extra` holds what one objective alone needs, rows first.
    """

    inputs: Int[Array, "B L"]
    targets: Int[Array, "B N"]
    weights: Float[Array, "B N"]
    mask: AttentionMask
    positions: Int[Array, "B L"] | None = None
    token_types: Int[Array, "B L"] | None = None
    predict: Int[Array, "B K"] | None = None
    decoder_inputs: Int[Array, "B T"] | None = None
    decoder_mask: AttentionMask | None = None
    cross_mask: AttentionMask | None = None
    decoder_positions: Int[Array, "B T"] | None = None
    extra: Mapping[str, Array] = dataclasses.field(default_factory=dict)

    def at_predictions(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B N D"]:
        """The hidden states that predict the targets: those at `predict`, or all."""
        return hidden if self.predict is None else jnp.take_along_axis(hidden, self.predict[..., None], axis=1)


class ObjectiveState(NamedTuple):
    """An objective's own state: trained parameters (uncertainty weights), and carried arrays with rows first."""

    params: Any = ()
    carried: Any = ()


class Terms(NamedTuple):
    """Sums per term, metrics as (sum, weight), the carried state for the next step, and of tasks what the model says.

    outputs: arrays with rows first, such as logits of classes, for figures that are no sums over rows and for whoever
      wants predictions. Training does not compute what nothing else needs.
    """

    sums: dict[str, Float[Array, ""]]
    metrics: dict[str, Metric]
    carried: Any = ()
    outputs: Mapping[str, Array] = {}


@dataclass(frozen=True)
class Objective:
    """Base of every objective: a frozen dataclass of hyper-parameters. See the module docstring for the contract.

    A subclass sets `summary` and `paper`, implements `rows`, `corrupt` and `terms`, and overrides the rest when it
    differs: the properties by a ClassVar, or by a property where they depend on its settings.
    """

    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    updates: ClassVar[int] = 1
    """Optimizer updates over one prepared batch (PPO's inner epochs)."""

    @property
    def roles(self) -> Mapping[str, Role]:
        """The models it needs. `model` is the config's; `heads`, if there, what `build_heads` returns."""
        return {"model": Role.TRAINABLE}

    @property
    def coefficients(self) -> Mapping[str, float]:
        """Each term, and its coefficient unless the config sets another."""
        return {"nll": 1.0}

    @property
    def epsilon(self) -> Mapping[str, float]:
        """Added to a term's denominator where the reference does so (BERT: 1e-5)."""
        return {}

    @property
    def term_kinds(self) -> Mapping[str, TermKind]:
        """Kinds of the terms that are not `TermKind.SUM`."""
        return {}

    @property
    def judged_by(self) -> Judge:
        """The held-out figure that says most about a model of this objective: `bits_per_byte`, beside n-gram models,
        `top5_accuracy` on masked words, beside a unigram, or what a task is scored by, beside an answer that does not
        look at the text."""
        return "loss"

    @property
    def causal(self) -> bool:
        """Whether hidden states are trained to see earlier tokens alone; otherwise they see both sides."""
        return False

    @property
    def fills_masks(self) -> bool:
        """Whether the vocabulary head is trained to tell what a [MASK] in the row stands for."""
        return False

    @property
    def task(self) -> Task | None:
        """Which task's figures `Terms.outputs`, or texts that the model writes, are judged by; None where losses and
        metrics say all."""
        return None

    def use(self, length: int) -> RowUse | Mapping[str, RowUse]:
        """How it runs the model over a row of `length` tokens, or those of each member of a mixture; by default every
        position is predicted. Of heads of its own only blocks are in it."""
        return RowUse(length, length, self.causal)

    def rows(self, vocab: Vocabulary, length: int) -> Rows:
        """The rows this objective reads for model inputs of `length` tokens. Raises UserError when it cannot."""
        raise NotImplementedError

    def check_classes(self, classes_of: Callable[[str | None], Sequence[str]]) -> None:
        """Refuses data whose classes (`Dataset.classes_of`) it cannot tell apart. Most do not look at them."""

    def check_model(self, settings: Any) -> None:
        """Refuses settings of a model (`ModelBuilder`) that it cannot train. Most do not look at them."""

    def member_rows(self, batch_size: int) -> Mapping[str, int]:
        """Rows of each member's batch in a global batch of `batch_size`, where `rows` returns those of members."""
        raise NotImplementedError

    def build_heads(self, style: HeadStyle, vocab: Vocabulary, rngs: nnx.Rngs) -> nnx.Module:
        """The model of the role `heads`, in the style of the model that it stands on."""
        raise NotImplementedError

    def init(self, models: Models, key: Key[Array, ""], batch_size: int) -> ObjectiveState:
        """Initial state for a global batch of `batch_size` rows; empty for most objectives."""
        return ObjectiveState()

    def prepare(self, models: Models, batch: Batch, ctx: Context) -> Batch:
        """Adds to the global batch what must stay outside the gradient; the identity for most objectives."""
        return batch

    def corrupt(self, keys: Key[Array, " B"], batch: Batch, ctx: Context) -> Example:
        """Corrupts rows, each by its own key. `keys` are for noise; `ctx.keys` are another domain."""
        raise NotImplementedError

    def weights(self, example: Example) -> dict[str, Float[Array, ""]]:
        """Denominator of each term, additive over rows; by default the sum of the example's weights."""
        return {name: jnp.sum(example.weights) for name in self.coefficients}

    def statistics(self, models: Models, example: Example, carried: Any, ctx: Context) -> Any:
        """Sums over the rows given that `terms` needs of the whole batch, as constants; () for most objectives.

        `terms` finds those of the whole batch in `ctx.statistics`, and computes them itself where that is None. They
        are only asked for where a batch is split, and cost a forward pass of their own there. Sums over rows can hold
        the rows themselves: each at its place in the batch, and zeros elsewhere.
        """
        return ()

    def terms(self, models: Models, example: Example, carried: Any, ctx: Context) -> Terms:
        """Weighted sums of each term over the rows given, never means."""
        raise NotImplementedError


def token_metrics(
    nll: Float[Array, "B N"], weights: Float[Array, "B N"], correct: Bool[Array, "B N"] | None = None
) -> dict[str, Metric]:
    """The usual (sum, weight) metrics of predicted tokens: `nll` in nats, and `accuracy` where it is known."""
    total = jnp.sum(weights)
    metrics: dict[str, Metric] = {"nll": (jnp.sum(nll * weights), total)}
    if correct is not None:
        metrics["accuracy"] = (jnp.sum(correct * weights), total)
    return metrics
