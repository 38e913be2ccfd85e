"""Whole numbers in proportion to weights."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

__all__ = ["share_out"]


def share_out(weights: Sequence[float], slots: int) -> list[int]:
    """Whole numbers that add up to `slots`, in proportion to the weights: largest remainders, but at least 1 each."""
    exact = [Fraction(weight) for weight in weights]
    shares = [0] * len(exact)
    open_ = list(range(len(exact)))
    while True:  # what is due less than one slot gets one, and the others share the rest
        unit = Fraction(slots - (len(exact) - len(open_))) / sum(exact[i] for i in open_)
        small = [i for i in open_ if exact[i] * unit < 1]
        if not small:
            break
        open_ = [i for i in open_ if i not in small]
        for i in small:
            shares[i] = 1
    for i in open_:
        shares[i] = int(exact[i] * unit)
    by_remainder = sorted(open_, key=lambda i: (shares[i] - exact[i] * unit, i))
    for i in by_remainder[: slots - sum(shares)]:
        shares[i] += 1
    return shares
