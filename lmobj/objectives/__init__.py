"""Training objectives: each a frozen dataclass of hyper-parameters that is a pure function of (models, batch, keys)."""

from lmobj.objectives._causal_lm import CausalLM
from lmobj.objectives._functional import denominators, loss_fn, step_keys, total_loss
from lmobj.objectives._masked_lm import MaskedLM
from lmobj.objectives._objective import (
    Context,
    Example,
    Metric,
    Models,
    Objective,
    ObjectiveState,
    Role,
    TermKind,
    Terms,
    token_metrics,
)
from lmobj.objectives._registry import REGISTRY, ObjectiveConfig

__all__ = [
    "REGISTRY",
    "CausalLM",
    "Context",
    "Example",
    "MaskedLM",
    "Metric",
    "Models",
    "Objective",
    "ObjectiveConfig",
    "ObjectiveState",
    "Role",
    "TermKind",
    "Terms",
    "denominators",
    "loss_fn",
    "step_keys",
    "token_metrics",
    "total_loss",
]
