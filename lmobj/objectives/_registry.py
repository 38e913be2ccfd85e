"""Every objective that lmobj ships, by the name a config uses. What is here is under the contract test."""

from __future__ import annotations

from typing import get_args

from lmobj.objectives._mixture import Mixture
from lmobj.objectives._objective import Objective
from lmobj.objectives._single import SingleObjective

__all__ = ["REGISTRY", "ObjectiveConfig"]

ObjectiveConfig = SingleObjective | Mixture
"""The union that a config's `objective` section is validated against, told apart by `name`."""

REGISTRY: dict[str, type[Objective]] = {kind.name: kind for kind in get_args(ObjectiveConfig)}
