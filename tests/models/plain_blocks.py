"""The block of each kind of model in `families`, by its equations in NumPy: every document in a row of its own."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

__all__ = ["DH", "H", "block", "norm"]

H, DH = 4, 4
"""Heads, and their width."""


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def linear(p: Any, x: np.ndarray) -> np.ndarray:
    return x @ p["kernel"] + p.get("bias", 0)


def norm(p: Any, x: np.ndarray, eps: float, rms: bool) -> np.ndarray:
    centred = x if rms else x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * p["scale"] + p.get("bias", 0)


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_exact(x: np.ndarray) -> np.ndarray:
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def turn(x: np.ndarray) -> np.ndarray:
    """Rotary positions 0, 1, ... on [B, L, heads, 4], by complex numbers."""
    angles = np.arange(x.shape[1])[:, None] * 10000.0 ** (-np.arange(2) / 2)
    turned = (x[..., :2] + 1j * x[..., 2:]) * np.exp(1j * angles)[None, :, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def attend(p: Any, x: np.ndarray, *, causal: bool, rotary: bool, cap: float | None) -> np.ndarray:
    """Multi-head attention with repeated key heads."""
    q, k, v = (linear(p[name], x).reshape(*x.shape[:2], -1, DH) for name in ("query", "key", "value"))
    if rotary:
        q, k = turn(q), turn(k)
    k, v = (np.repeat(t, H // t.shape[2], axis=2) for t in (k, v))
    logits = np.einsum("bqhd,bshd->bhqs", q, k) / np.sqrt(DH)
    logits = logits if cap is None else cap * np.tanh(logits / cap)
    logits = np.where(np.tri(x.shape[1], dtype=bool), logits, -np.inf) if causal else logits
    return linear(p["out"], np.einsum("bhqs,bshd->bqhd", softmax(logits), v).reshape(x.shape))


def block(name: str, p: Any, x: np.ndarray) -> np.ndarray:
    """One layer of each family, as its paper has it."""
    attention, mlp = p["attention"], p["mlp"]
    if name == "bert":
        x = norm(p["attention_norm"], x + attend(attention, x, causal=False, rotary=False, cap=None), 1e-12, False)
        return norm(p["mlp_norm"], x + linear(mlp["down"], gelu_exact(linear(mlp["up"], x))), 1e-12, False)
    llama = name == "llama"
    normed = norm(p["attention_norm"], x, 1e-5, llama)
    x = x + attend(attention, normed, causal=True, rotary=llama, cap=5.0 if llama else None)
    y = norm(p["mlp_norm"], x, 1e-5, llama)
    inner = silu(linear(mlp["gate"], y)) * linear(mlp["up"], y) if llama else gelu_tanh(linear(mlp["up"], y))
    return x + linear(mlp["down"], inner)
