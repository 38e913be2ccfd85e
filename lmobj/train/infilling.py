"""Runs that learn to fill in the middle of a text: by an objective that moves it, or from data in which it is moved."""

from __future__ import annotations

from lmobj.batch import RowSpec
from lmobj.data import DataConfig, DocumentFillInMiddle
from lmobj.errors import UserError
from lmobj.objectives import FillInMiddle, Objective, Rows

__all__ = ["check_infilling", "infilling_of"]

_LAYOUTS = ("packed", "stream")
"""Of rows that are texts end to end."""


def infilling_of(objective: Objective, data: DataConfig) -> FillInMiddle | DocumentFillInMiddle | None:
    """The settings by which middles are moved; None if none are."""
    return objective if isinstance(objective, FillInMiddle) else data.fill_in_middle


def check_infilling(objective: Objective, rows: Rows, data: DataConfig) -> None:
    """Refuses objectives for which `data.fill_in_middle` makes no sense.

    Raises:
      UserError: naming both settings.
    """
    if data.fill_in_middle is None:
        return
    if isinstance(objective, FillInMiddle):
        raise UserError(
            "data.fill_in_middle is set and objective.name is fill_in_middle, and both move the middle of documents; "
            "accepted: objective.name=causal_lm, or no data.fill_in_middle."
        )
    if not (objective.causal and isinstance(rows, RowSpec) and rows.layout in _LAYOUTS):
        raise UserError(
            "data.fill_in_middle moves the middle of documents for models that read them end to end from the left, "
            f"which objective.name={getattr(objective, 'name', type(objective).__name__)} does not; accepted: "
            "causal_lm or transformer_xl, or no data.fill_in_middle."
        )
