"""Runs that learn to fill in the middle of a text: by an objective that moves it, or from data in which it is moved."""

from __future__ import annotations

from lmobj.batch import RowSpec
from lmobj.data import DataConfig, Tokenizer
from lmobj.errors import UserError
from lmobj.evaluate import InfillingOrder
from lmobj.objectives import FillInMiddle, Objective, Rows

__all__ = ["check_infilling", "has_hole", "infilling_order"]

_LAYOUTS = ("packed", "stream")
"""Of rows that are texts end to end."""


def infilling_order(objective: Objective, data: DataConfig) -> InfillingOrder | None:
    """The order in which a model is asked to fill in a middle: PSM, or SPM where it learned no other; None where it
    learned none."""
    settings = objective if isinstance(objective, FillInMiddle) else data.fill_in_middle
    if settings is None or settings.fim_rate == 0:
        return None
    return "spm" if settings.spm_rate == 1 else "psm"


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
            "causal_lm, multi_token_prediction or transformer_xl, or no data.fill_in_middle."
        )


def has_hole(text: str, tokenizer: Tokenizer) -> bool:
    """Whether a text has a <fim_middle> in it; none has where the vocabulary has no such mark."""
    mark = tokenizer.vocabulary.fim_middle
    return mark is not None and tokenizer.piece(mark) in text
