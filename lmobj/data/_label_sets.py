"""Sets of classes that documents are labelled with.

Shards hold one label for each document, so a set has a name of its own there: the JSON list of its classes' names.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["LabelSets", "names_of_set", "set_name"]


def set_name(names: Iterable[object]) -> str:
    """The name of the set of these classes, without their outer spaces; empty names are none."""
    stripped = {str(name).strip() for name in names} - {""}
    return json.dumps(sorted(stripped), ensure_ascii=False)


def names_of_set(name: str) -> list[str]:
    """The classes of a set by its name, in order."""
    names: list[str] = json.loads(name)
    return names


class LabelSets:
    """The set of each document: indexing by documents [N] gives [N, C] float32, 1 for the classes of each, else 0."""

    def __init__(self, sets: NDArray[np.int32], names: Sequence[str], classes: Sequence[str]):
        """
        Args:
          sets: [D] which of `names` each document has.
          names: of the sets.
          classes: names of the classes by their ids.
        """
        ids = {name: index for index, name in enumerate(classes)}
        self._sets = sets
        self._members = [np.array([ids[name] for name in names_of_set(one)], np.int64) for one in names]
        self._classes = len(classes)

    def __getitem__(self, documents: NDArray[np.integer]) -> NDArray[np.float32]:
        found = np.zeros((len(documents), self._classes), np.float32)
        for row, index in enumerate(self._sets[documents].tolist()):
            found[row, self._members[index]] = 1
        return found

    def __len__(self) -> int:
        return len(self._sets)
