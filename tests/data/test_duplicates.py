"""Duplicates are found, near ones by an estimate that is as good as it says, and the first of them stays."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys

import numpy as np
import pytest

from lmobj.data import _duplicates as module
from lmobj.data._cleaning_config import CleaningConfig, NearDuplicates
from lmobj.data._duplicates import Duplicates, signature
from lmobj.data._words import find_words

BOTH = CleaningConfig(exact_duplicates=True, near_duplicates=NearDuplicates())
WORDS = [f"w{number}" for number in range(5000)]
CHINESE = "".join(chr(0x4E00 + 7 * number % 2000) for number in range(300))


def document(seed: int, words: int = 300) -> list[str]:
    return random.Random(seed).choices(WORDS, k=words)


def decide(config: CleaningConfig, *texts: str) -> list[str | None]:
    duplicates = Duplicates(config)
    return [duplicates(signature(config, text)) for text in texts]


def jaccard(one: str, other: str, size: int = 5) -> float:
    """The similarity that MinHash estimates, by its definition."""
    sets = []
    for text in (one, other):
        words = find_words(text.casefold())
        sets.append({tuple(words[i : i + size]) for i in range(len(words) - size + 1)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_the_first_of_exact_duplicates_stays():
    exact = CleaningConfig(exact_duplicates=True)
    assert decide(exact, "a b", "a c", "a b", "A b", "a b") == [
        None,
        None,
        "exact_duplicates",
        None,
        "exact_duplicates",
    ]
    pairs = [signature(exact, *texts) for texts in (("a", "b"), ("ab",), ("a", ""), ("a",), ("a", "b"))]
    assert list(map(Duplicates(exact), pairs)) == [None, None, None, None, "exact_duplicates"]


def test_a_paragraph_with_a_few_words_changed_is_a_near_duplicate():
    words = document(0)
    changed = words.copy()
    changed[40] = changed[200] = "other"
    text, near = " ".join(words), ", ".join(changed).upper()
    assert jaccard(text, near) > 0.9  # 10 of 296 runs differ on each side
    far = words.copy()
    far[::20] = ["other"] * 15
    assert 0.5 < jaccard(text, " ".join(far)) < 0.65  # 15 words spoil 75 of 296 runs
    texts = [text, near, " ".join(far), " ".join(document(1)), text]
    assert decide(BOTH, *texts) == [None, "near_duplicates", None, None, "exact_duplicates"]


def test_ideographs_are_compared_by_character():
    changed = CHINESE[:100] + "改" + CHINESE[101:]
    assert decide(BOTH, CHINESE, changed, CHINESE[::-1]) == [None, "near_duplicates", None]


def test_documents_with_few_words_or_none_are_not_all_alike():
    texts = ["a b", "a c", "b a", "a, b", "...", "!!!", ""]
    assert decide(BOTH, *texts) == [None, None, None, "near_duplicates", None, None, None]


def test_the_estimate_is_within_its_standard_error():
    # 24 pairs of known similarity: the mean error must be within 4 standard errors of zero, and their spread
    # about sqrt(s (1 - s) / P), for P = 512 values at most 0.0221.
    config = CleaningConfig(near_duplicates=NearDuplicates(permutations=512))
    errors = []
    for seed in range(24):
        words = document(seed)
        other = words.copy()
        for place in range(0, 300, 12 + seed):
            other[place] = "other"
        one, two = " ".join(words), " ".join(other)
        agree = signature(config, one).minhash == signature(config, two).minhash
        errors.append(np.mean(agree) - jaccard(one, two))
    assert abs(np.mean(errors)) < 4 * 0.0221 / np.sqrt(24)
    assert np.std(errors) < 1.6 * 0.0221


def test_values_are_datasketchs_own():
    from datasketch import MinHash

    hashes = [7, 2**32 - 1, 12345]
    expected = MinHash(64, seed=1, scheme="affine32", hashfunc=lambda value: value)
    expected.update_batch(hashes)
    config = NearDuplicates(permutations=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_run_hashes", lambda text, size: np.array(hashes, np.uint32))
        patch.setattr(module, "_BATCH", 2)
        np.testing.assert_array_equal(module._minhash("", b"", config), expected.hashvalues)


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9])
def test_bands_compare_a_pair_at_the_threshold_nineteen_times_in_twenty(threshold):
    config = NearDuplicates(threshold=threshold)
    index = module._NearIndex(config)
    draw = np.random.default_rng(0)
    found = 0
    for _ in range(300):
        one = draw.integers(0, 2**32, 128, dtype=np.uint32)
        other = np.where(draw.random(128) < threshold, one, draw.integers(0, 2**32, 128, dtype=np.uint32))
        found += bool(set(index._hashes(one)) & set(index._hashes(other)))
    assert found / 300 > 0.95 - 3 * np.sqrt(0.95 * 0.05 / 300)
    rows, bands = index._rows, 128 // (index._rows + 1)
    assert 1 - (1 - threshold ** (rows + 1)) ** bands < 0.95  # no wider band would do


def test_a_document_is_compared_with_all_that_share_a_band():
    # The second shares its first band with the first document; the third agrees with the second in 111 of 128 values,
    # but in no whole band other than that one.
    index = module._NearIndex(NearDuplicates())
    assert index._rows == 7
    draw = np.random.default_rng(0)
    one, two = draw.integers(0, 2**32, (2, 128), dtype=np.uint32)
    two[:7] = one[:7]
    three = two.copy()
    three[7:126:7] += 1
    assert [index.add(minhash) for minhash in (one, two, three)] == [True, True, False]


def test_decisions_are_those_of_comparing_all_pairs(monkeypatch):
    # Clusters of variants in random order, against every kept document by the same estimate.
    monkeypatch.setattr(module, "_BLOCK", 3)
    config = CleaningConfig(near_duplicates=NearDuplicates(threshold=0.7))
    draw = random.Random(3)
    texts = []
    for seed in range(25):
        words = document(seed, 60)
        for changes in (0, 1, 2, 5):
            variant = words.copy()
            for place in draw.sample(range(60), changes):
                variant[place] = draw.choice(WORDS)
            texts.append(" ".join(variant))
    draw.shuffle(texts)
    signatures = [signature(config, text) for text in texts]
    kept: list[np.ndarray] = []
    expected = []
    for entry in signatures:
        assert entry.minhash is not None
        alike = any(np.mean(entry.minhash == other) >= 0.7 for other in kept)
        expected.append("near_duplicates" if alike else None)
        if not alike:
            kept.append(entry.minhash)
    assert 10 < sum(step is not None for step in expected) < 90
    assert list(map(Duplicates(config), signatures)) == expected


def test_signatures_are_the_same_in_another_process():
    text = "Der schnelle braune Fuchs, été 中文 and so on and so forth."
    here = signature(BOTH, text)
    assert here.minhash is not None
    assert here.minhash.dtype == np.uint32
    code = (
        "import sys; from lmobj.data._cleaning_config import *; from lmobj.data._duplicates import signature;"
        "s = signature(CleaningConfig(exact_duplicates=True, near_duplicates=NearDuplicates()), sys.argv[1]);"
        "print(s.digest.hex(), s.minhash.tobytes().hex())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, text], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}
    )
    assert done.stdout.split() == [here.digest.hex(), here.minhash.tobytes().hex()]
    assert len(pickle.dumps(here)) < 1000
