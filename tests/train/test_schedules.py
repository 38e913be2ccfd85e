"""Schedules against slow Python formulas, the original implementations' arithmetic, and optax."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pydantic import TypeAdapter

from lmobj.errors import UserError
from lmobj.train import schedules as s

PEAK, WARMUP, TOTAL = 3e-4, 10, 100
STEPS = np.arange(TOTAL + 20)


def values(config: s.Schedule, total: int = TOTAL) -> np.ndarray:
    with jax.enable_x64(True):
        return np.asarray(jax.jit(s.make_schedule(config, total))(jnp.asarray(STEPS)))


def bert_rate(step: int) -> float:
    """google-research/bert optimization.py: polynomial_decay(power=1, end=0), then replaced below num_warmup_steps."""
    decayed = PEAK * (1 - min(step, TOTAL) / TOTAL)
    return PEAK * step / WARMUP if step < WARMUP else decayed


def electra_rate(step: int) -> float:
    """google-research/electra model/optimization.py: the same decay, times min(1, step / warmup)."""
    return PEAK * (1 - min(step, TOTAL) / TOTAL) * min(1.0, step / WARMUP)


def test_bert_replaces_and_electra_multiplies() -> None:
    bert = values(s.LinearSchedule(peak=PEAK, warmup_steps=WARMUP, warmup="replace"))
    electra = values(s.LinearSchedule(peak=PEAK, warmup_fraction=0.1, warmup="multiply"))
    np.testing.assert_allclose(bert, [bert_rate(t) for t in STEPS], rtol=1e-12)
    np.testing.assert_allclose(electra, [electra_rate(t) for t in STEPS], rtol=1e-12)
    # They differ during the warm-up: at step 5 BERT has peak / 2, ELECTRA peak / 2 * 0.95.
    assert bert[5] == pytest.approx(PEAK / 2)
    assert electra[5] == pytest.approx(PEAK / 2 * 0.95)


def test_linear_and_cosine_before_match_optax() -> None:
    linear = optax.join_schedules(
        [optax.linear_schedule(0, PEAK, WARMUP), optax.linear_schedule(PEAK, 0.2 * PEAK, TOTAL - WARMUP)], [WARMUP]
    )
    cosine = optax.warmup_cosine_decay_schedule(0.0, PEAK, WARMUP, TOTAL, end_value=0.2 * PEAK)
    for config, peer in (
        (s.LinearSchedule(peak=PEAK, warmup_steps=WARMUP, final_fraction=0.2), linear),
        (s.CosineSchedule(peak=PEAK, warmup_steps=WARMUP, final_fraction=0.2), cosine),
    ):
        with jax.enable_x64(True):
            expected = np.asarray(peer(jnp.asarray(STEPS)))
        np.testing.assert_allclose(values(config), expected, rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize(
    ("shape", "left"),
    [
        ("linear", lambda x: 1 - x),
        ("cosine", lambda x: (1 + math.cos(math.pi * x)) / 2),
        ("sqrt", lambda x: 1 - math.sqrt(x)),
    ],
)
def test_warmup_stable_decay(shape: s.DecayShape, left) -> None:
    got = values(
        s.WarmupStableDecaySchedule(
            peak=PEAK, warmup_steps=WARMUP, decay_fraction=0.2, decay_shape=shape, final_fraction=0.1
        )
    )

    def expected(step: int) -> float:
        if step < 10:
            return PEAK * step / 10
        if step <= 80:
            return PEAK
        return PEAK * (0.1 + 0.9 * left(min((step - 80) / 20, 1.0)))

    np.testing.assert_allclose(got, [expected(t) for t in STEPS], rtol=1e-12)


def test_inverse_sqrt_is_noam_and_t5() -> None:
    d_model, warmup = 512, 40
    # Vaswani et al. 2017, eq. 3: d^-0.5 * min(step^-0.5, step * warmup^-1.5), here for step >= 1.
    noam = [d_model**-0.5 * min(t**-0.5, t * warmup**-1.5) for t in STEPS[1:]]
    ours = values(s.InverseSqrtSchedule(peak=d_model**-0.5 * warmup**-0.5, warmup_steps=warmup))
    np.testing.assert_allclose(ours[1:], noam, rtol=1e-12)
    # T5: 1 / sqrt(max(step, k)).
    t5 = values(s.InverseSqrtSchedule(peak=50**-0.5, timescale=50))
    np.testing.assert_allclose(t5, [1 / math.sqrt(max(t, 50)) for t in STEPS], rtol=1e-12)
    floor = values(s.InverseSqrtSchedule(peak=1.0, timescale=1, final_fraction=0.5))
    np.testing.assert_allclose(floor[[1, 2, 4, 50]], [1.0, 2**-0.5, 0.5, 0.5], rtol=1e-12)


def test_constant_and_plain_integers() -> None:
    schedule = s.make_schedule(s.ConstantSchedule(peak=0.5, warmup_steps=4), 8)
    assert [float(schedule(t)) for t in (0, 1, 3, 4, 7)] == [0.0, 0.125, 0.375, 0.5, 0.5]
    # A coefficient may be zero or negative, and annealed upwards.
    assert float(s.make_schedule(s.LinearSchedule(peak=-1.0, final_fraction=3.0), 4)(4)) == -3.0


def test_float64_follows_x64() -> None:
    with jax.enable_x64(True):
        value = s.make_schedule(s.LinearSchedule(peak=1.0), 3)(1)
        assert value.dtype == jnp.float64
        assert float(value) == pytest.approx(2 / 3, abs=1e-15)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: s.ConstantSchedule(peak=math.inf), "peak"),
        (lambda: s.LinearSchedule(warmup_steps=-1), "warmup_steps"),
        (lambda: s.CosineSchedule(warmup_fraction=1.5), "warmup_fraction"),
        (lambda: s.CosineSchedule(warmup_steps=1, warmup_fraction=0.1), "one of the two"),
        (lambda: s.LinearSchedule(final_fraction=-0.1), "final_fraction"),
        (lambda: s.WarmupStableDecaySchedule(decay_fraction=0.0), "decay_fraction"),
        (lambda: s.InverseSqrtSchedule(timescale=0), "timescale"),
        (lambda: s.make_schedule(s.LinearSchedule(warmup_steps=11), 10), "0 to 10"),
        (lambda: s.make_schedule(s.LinearSchedule(), 0), "at least 1"),
        (lambda: s.make_schedule(s.WarmupStableDecaySchedule(warmup_steps=9, decay_fraction=0.5), 10), "do not fit"),
    ],
)
def test_refusals(make, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()


def test_settings_are_told_apart_by_name() -> None:
    adapter = TypeAdapter(s.Schedule)
    assert adapter.validate_python({"name": "wsd", "decay_fraction": 0.3}) == s.WarmupStableDecaySchedule(
        decay_fraction=0.3
    )
    with pytest.raises(ValueError, match="peek"):
        adapter.validate_python({"name": "linear", "peek": 1.0})
    for definition in adapter.json_schema()["$defs"].values():
        assert all(field.get("description") for field in definition["properties"].values())
