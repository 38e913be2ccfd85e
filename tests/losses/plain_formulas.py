"""The formulas of the losses as they are written, on numbers of 50 digits and without a largest exponent (mpmath).

So nothing here needs a trick against overflow: softmax is exp(x) / sum exp(x), whatever x is. One element at a time:
vectors are lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import mpmath
from mpmath import mpf

Vector: TypeAlias = Sequence[mpf]

mpmath.mp.dps = 50


def softmax(x: Vector, temperature: float = 1.0) -> list[mpf]:
    powers = [mpmath.exp(each / mpf(temperature)) for each in x]
    total = mpmath.fsum(powers)
    return [each / total for each in powers]


def sigmoid(x: mpf) -> mpf:
    return 1 / (1 + mpmath.exp(-x))


def x_log_y(x: mpf, y: mpf) -> mpf:
    """x log y, where 0 log 0 = 0."""
    return mpf(0) if x == 0 else x * mpmath.log(y)


def cross_entropy(q: Vector, p: Vector) -> mpf:
    return -mpmath.fsum(x_log_y(a, b) for a, b in zip(q, p, strict=True))


def kl(p: Vector, q: Vector) -> mpf:
    return cross_entropy(p, q) - cross_entropy(p, p)


def dot(a: Vector, b: Vector) -> mpf:
    return mpmath.fsum(x * y for x, y in zip(a, b, strict=True))


def length(a: Vector) -> mpf:
    return mpmath.sqrt(dot(a, a))


def distance(a: Vector, b: Vector) -> mpf:
    return length([x - y for x, y in zip(a, b, strict=True)])


def cosine(a: Vector, b: Vector) -> mpf:
    return dot(a, b) / (length(a) * length(b)) if length(a) * length(b) else mpf(0)


def unit_vector(a: Vector) -> list[mpf]:
    return [x / length(a) if length(a) else x for x in a]


def nll(logits: Vector, target: int) -> mpf:
    return -mpmath.log(softmax(logits)[target])


def log_sum_exp(logits: Vector) -> mpf:
    return mpmath.log(mpmath.fsum(map(mpmath.exp, logits)))


def smoothed(logits: Vector, target: int, on_target: mpf, elsewhere: mpf) -> mpf:
    """Cross-entropy to a target distribution of two levels."""
    return cross_entropy([on_target if v == target else elsewhere for v in range(len(logits))], softmax(logits))


def through_table(hidden: Vector, table: Sequence[Vector], cap: float | None = None) -> list[mpf]:
    logits = [dot(hidden, row) for row in table]
    return [mpf(cap) * mpmath.tanh(x / mpf(cap)) for x in logits] if cap else logits


def binary_nll(x: mpf, y: mpf) -> mpf:
    return -x_log_y(y, sigmoid(x)) - x_log_y(1 - y, sigmoid(-x))


def binary_focal(x: mpf, y: mpf, gamma: float, alpha: float | None) -> mpf:
    p, rest = sigmoid(x), sigmoid(-x)
    one, zero = (mpf(1), mpf(1)) if alpha is None else (mpf(alpha), 1 - mpf(alpha))
    return -y * one * rest ** mpf(gamma) * mpmath.log(p) - (1 - y) * zero * p ** mpf(gamma) * mpmath.log(rest)


def focal(logits: Vector, target: int, gamma: float) -> mpf:
    p = softmax(logits)
    return -(mpmath.fsum(p[:target] + p[target + 1 :]) ** mpf(gamma)) * mpmath.log(p[target])


def jensen_shannon(s: Vector, t: Vector, beta: float) -> mpf:
    b = mpf(beta)
    m = [b * x + (1 - b) * y for x, y in zip(t, s, strict=True)]
    return b * kl(t, m) + (1 - b) * kl(s, m)


def info_nce(similarity: Vector, target: int, candidates: Sequence[bool] | None, temperature: float) -> mpf:
    counts = [candidates is None or candidates[m] or m == target for m in range(len(similarity))]
    scaled = [x / mpf(temperature) for x in similarity]
    return log_sum_exp([x for x, count in zip(scaled, counts, strict=True) if count]) - scaled[target]


def huber(x: mpf, y: mpf, delta: float) -> mpf:
    e, d = abs(x - y), mpf(delta)
    return e * e / 2 if e <= d else d * (e - d / 2)


def contrastive(d: mpf, similar: bool, margin: float) -> mpf:
    return d**2 / 2 if similar else max(mpf(0), mpf(margin) - d) ** 2 / 2


def hinge(near: mpf, far: mpf, margin: float) -> mpf:
    return max(mpf(0), near - far + mpf(margin))
