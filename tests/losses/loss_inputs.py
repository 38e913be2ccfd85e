"""Arrays for the losses: random ones of four sizes, and extremes. One element of a loss per row, but for a table."""

from __future__ import annotations

import numpy as np

RANDOM, EXTREME = 20, 14
"""Elements of each kind. The first half of the extreme ones is the same in all of a loss's arrays; in the second half,
the second array is moved on by one element, the third by two."""
CLASSES, WIDTH = 5, 4
_HIGH = 1e4


def make_array(kind: str, place: int, rng: np.random.Generator) -> np.ndarray:
    """The array of one kind that is at one place among a loss's arguments; all but a table have an element per row."""
    count = RANDOM + EXTREME
    scales = np.repeat([1e-3, 1, 30, 1e4], RANDOM // 4)[:, None]
    if kind == "table":
        return rng.normal(size=(CLASSES, WIDTH)).astype(np.float32)
    if kind in ("logits", "support"):
        peak, pit = np.full(CLASSES, -_HIGH), np.full(CLASSES, _HIGH)
        peak[0], pit[0] = _HIGH, -_HIGH
        near = _HIGH + np.array([0, 1, -1, -0.5, 2])
        near_but_one = np.where(np.arange(CLASSES) == 2, 3 * _HIGH, near)
        extreme = [np.full(CLASSES, _HIGH), np.full(CLASSES, -_HIGH), peak, pit, np.zeros(CLASSES), near, near_but_one]
        out = np.concatenate([scales * rng.normal(size=(RANDOM, CLASSES)), _moved(extreme, place)])
        if kind == "support":
            out[::3, 2], out[::5, 4] = -np.inf, -np.inf
        return out.astype(np.float32)
    if kind in ("vectors", "hidden"):
        one = np.array([1, -1, 2, 0.25])
        sizes = (0, _HIGH, -_HIGH, 1e-18, _HIGH + 0.5, -80)
        extreme = [*(size * one for size in sizes), _HIGH * one[::-1]]
        return np.concatenate([scales * rng.normal(size=(RANDOM, WIDTH)), _moved(extreme, place)]).astype(np.float32)
    if kind == "scalars":
        extreme = [np.array(x) for x in (0, _HIGH, -_HIGH, 1e-18, 80, _HIGH + 0.5, -80)]
        return np.concatenate([scales[:, 0] * rng.normal(size=RANDOM), _moved(extreme, place)]).astype(np.float32)
    if kind == "probabilities":
        # Dirichlet draws in eighths, so that they are exact in 16 bits; many are 0, and the last are one-hot.
        counts = rng.multinomial(8, rng.dirichlet(np.ones(CLASSES), RANDOM)) / 8
        return np.concatenate([counts, np.eye(CLASSES)[np.arange(EXTREME) % CLASSES]]).astype(np.float32)
    if kind == "labels":
        return np.resize([0, 1, 1, 0, 0.25], count).astype(np.float32)
    if kind == "classes":
        return np.concatenate([rng.integers(0, CLASSES, RANDOM), np.repeat([0, 1], EXTREME // 2)]).astype(np.int32)
    if kind == "bits":
        return np.arange(count) % 2 == 0
    if kind == "candidates":
        return rng.random((count, CLASSES)) < 0.5
    raise AssertionError(kind)


def _moved(extreme: list[np.ndarray], place: int) -> np.ndarray:
    return np.stack([*extreme, *np.roll(np.stack(extreme), place, axis=0)])
