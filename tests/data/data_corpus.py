"""A small generated corpus, and settings to prepare it with."""

from __future__ import annotations

import random
from pathlib import Path

from lmobj.data import DataConfig, SentencePieceConfig, TextFiles

_SYLLABLES = ("ba", "ko", "ri", "ten", "lo", "mu", "sha", "ver", "ing", "ed", "qu", "ox", "é", "日本", "str")


def generated_documents(count: int, seed: int = 0) -> list[str]:
    """Documents of 1 to 12 lines, with sentences, indentation, runs of spaces and some wide characters."""
    draw = random.Random(seed)
    words = ["".join(draw.choices(_SYLLABLES, k=draw.randint(1, 3))) for _ in range(200)]

    def line() -> str:
        text = " ".join(draw.choices(words, k=draw.randint(1, 9)))
        return " " * draw.choice((0, 0, 0, 4, 8)) + text + draw.choice((".", "! So.", "", "?", "。", "！ba"))  # noqa: RUF001

    return ["\n".join(line() for _ in range(draw.randint(1, 12))) for _ in range(count)]


def write_blocks(path: Path, documents: list[str]) -> Path:
    """A file with the documents as blocks between blank lines."""
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return path


def small_config(folder: Path, file: Path, **changes: object) -> DataConfig:
    """Blocks of one file, a vocabulary that the generated text supports, and a cache of the test's own."""
    settings: dict = {
        "source": TextFiles(files=(str(file),), documents="blocks"),
        "tokenizer": SentencePieceConfig(vocab_size=400),
        "length": 16,
        "validation": 0.1,
        "test": 0.1,
        "cache": str(folder / "cache"),
    }
    return DataConfig(**(settings | changes))
