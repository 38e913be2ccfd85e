"""Every objective that lmobj ships, by the name a config uses. Registering one here puts it under the contract test."""

from __future__ import annotations

from lmobj.objectives._causal_lm import CausalLM
from lmobj.objectives._masked_lm import MaskedLM
from lmobj.objectives._objective import Objective

__all__ = ["REGISTRY", "ObjectiveConfig"]

ObjectiveConfig = CausalLM | MaskedLM
"""The union that a config's `objective` section is validated against, told apart by `name`."""

REGISTRY: dict[str, type[Objective]] = {kind.name: kind for kind in (CausalLM, MaskedLM)}
