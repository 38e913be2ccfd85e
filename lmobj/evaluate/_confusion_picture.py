"""The picture of a confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from lmobj.errors import UserError

__all__ = ["draw_confusion"]

_MOST_NUMBERS = 20
"""Classes up to which every cell shows its count."""


def draw_confusion(confusion: ArrayLike, names: Sequence[str], paths: Sequence[Path]) -> None:
    """Draws a confusion matrix into files, whose suffixes choose the format: svg, png, pdf.

    Colour is the share of a row's examples, so that rare classes are as visible as common ones; the numbers are counts.

    Args:
      confusion: [C, C], rows the true classes.
      names: of the classes.
      paths: the files.

    Raises:
      UserError: another shape than there are names.
    """
    counts = np.asarray(confusion)
    if counts.shape != (len(names), len(names)):
        raise UserError(f"the matrix has the shape {counts.shape}; accepted: {(len(names),) * 2}.")
    import matplotlib
    from matplotlib.figure import Figure

    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = 2.0 + 0.5 * len(names)
    # Text as paths and no dates, so that equal matrices give equal files everywhere. Names are no formulas.
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "confusion", "text.parse_math": False}):
        figure = Figure(figsize=(size, size), layout="constrained")
        axes = figure.subplots()
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        if len(names) <= _MOST_NUMBERS:
            for (row, column), count in np.ndenumerate(counts):
                colour = "white" if shares[row, column] > 0.5 else "#1C2733"
                axes.text(column, row, f"{count:,}", ha="center", va="center", color=colour, fontsize=9)
        for path in paths:
            figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)
