"""Pictures of what a task's model says, kept as the numbers that they show, so that whoever shows one draws it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import ArrayLike

from lmobj.errors import UserError

__all__ = [
    "PICTURES",
    "ConfusionPicture",
    "Picture",
    "ScatterPicture",
    "draw_confusion",
    "read_picture",
    "save_picture",
]

_MOST_NUMBERS = 20
"""Classes up to which every cell shows its count."""

_MOST_POINTS = 2000
"""Of a scatter; of more, as many at even distances in the order of the examples."""


class Picture(Protocol):
    """A frozen dataclass of plain numbers and names."""

    KIND: ClassVar[str]
    """Tells it from others, and ends the names of its files."""

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in inches that it wants."""

    def draw(self, axes: Any) -> None:
        """Draws it into Matplotlib's axes."""


@dataclasses.dataclass(frozen=True)
class ConfusionPicture:
    """A confusion matrix.

    Colour is the share of a row's examples, so that rare classes are as visible as common ones; the numbers are counts.
    """

    KIND: ClassVar[str] = "confusion"

    names: Sequence[str]
    """Of the classes."""
    counts: Sequence[Sequence[int]]
    """[C, C], rows the true classes."""

    def __post_init__(self) -> None:
        shape, wanted = np.shape(self.counts), (len(self.names),) * 2
        if shape != wanted:
            raise UserError(f"the matrix has the shape {shape}; accepted: {wanted}.")

    @property
    def size(self) -> tuple[float, float]:
        """Larger with more classes."""
        return (2.0 + 0.5 * len(self.names),) * 2

    def draw(self, axes: Any) -> None:
        """Draws the matrix."""
        counts, names = np.asarray(self.counts), list(self.names)
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        if len(names) <= _MOST_NUMBERS:
            for (row, column), count in np.ndenumerate(counts):
                colour = "white" if shares[row, column] > 0.5 else "#1C2733"
                axes.text(column, row, f"{count:,}", ha="center", va="center", color=colour, fontsize=9)


@dataclasses.dataclass(frozen=True)
class ScatterPicture:
    """Predicted numbers over true ones, and the line on which both are equal."""

    KIND: ClassVar[str] = "scatter"

    targets: Sequence[float]
    predictions: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.targets) != len(self.predictions) or not len(self.targets):
            raise UserError(
                f"there are {len(self.targets)} targets and {len(self.predictions)} predictions; accepted: as many of "
                "both, at least one."
            )

    @classmethod
    def of(cls, targets: ArrayLike, predictions: ArrayLike) -> ScatterPicture:
        """Of any number of examples, [N] each."""
        true, given = (np.asarray(each, np.float64) for each in (targets, predictions))
        shown = np.linspace(0, len(true) - 1, min(len(true), _MOST_POINTS)).astype(int)
        return cls(true[shown].tolist(), given[shown].tolist())

    @property
    def size(self) -> tuple[float, float]:
        """A square."""
        return 4.5, 4.5

    def draw(self, axes: Any) -> None:
        """Draws the points."""
        low, high = min(self.targets), max(self.targets)
        axes.plot([low, high], [low, high], color="#5F6B7A", linewidth=1.2, linestyle=(0, (4, 2)))
        axes.plot(self.targets, self.predictions, ".", color="#0072B2", alpha=0.4, markersize=5, markeredgewidth=0)
        axes.set_xlabel("true")
        axes.set_ylabel("predicted")


PICTURES: dict[str, type[ConfusionPicture] | type[ScatterPicture]] = {
    kind.KIND: kind for kind in (ConfusionPicture, ScatterPicture)
}
"""By their kinds."""


def read_picture(stored: Mapping[str, Any]) -> Picture:
    """The picture whose fields, and `kind`, were stored as JSON. ValueError if they are none."""
    fields = dict(stored)
    kind = PICTURES.get(fields.pop("kind", ""))
    if kind is None or set(fields) != {field.name for field in dataclasses.fields(kind)}:
        raise ValueError(f"the picture has the keys {', '.join(sorted(stored))}")
    return kind(**fields)


def save_picture(picture: Picture, paths: Sequence[Path]) -> None:
    """Draws a picture into files, whose suffixes choose the format: svg, png, pdf.

    Equal pictures give equal files everywhere: text becomes paths, and no date is written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    # Names are no formulas.
    settings: dict[Any, Any] = {"svg.fonttype": "path", "svg.hashsalt": picture.KIND, "text.parse_math": False}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=picture.size, layout="constrained")
        picture.draw(figure.subplots())
        for path in paths:
            figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)


def draw_confusion(confusion: ArrayLike, names: Sequence[str], paths: Sequence[Path]) -> None:
    """Draws a confusion matrix into files, as `save_picture` does.

    Args:
      confusion: [C, C], rows the true classes.
      names: of the classes.
      paths: the files.

    Raises:
      UserError: another shape than there are names.
    """
    save_picture(ConfusionPicture(tuple(names), np.asarray(confusion).tolist()), paths)
