"""Settings refuse what cannot be, and say what could."""

from __future__ import annotations

import pytest

from lmobj.data import DataConfig, SentencePieceConfig, TextFiles
from lmobj.errors import UserError


@pytest.mark.parametrize(
    ("make", "key", "value"),
    [
        (lambda: TextFiles(), "data.source.files", "empty"),
        (lambda: TextFiles(files=("a",), documents="lines"), "data.source.documents", "'lines'"),
        (lambda: TextFiles(files=("a",), errors="ignore"), "data.source.errors", "'ignore'"),
        (lambda: SentencePieceConfig(model="word"), "data.tokenizer.model", "'word'"),
        (lambda: SentencePieceConfig(vocab_size=0), "data.tokenizer.vocab_size", "0"),
        (lambda: SentencePieceConfig(character_coverage=0.5), "data.tokenizer.character_coverage", "0.5"),
        (lambda: SentencePieceConfig(sample_bytes=0), "data.tokenizer.sample_bytes", "0"),
        (lambda: DataConfig(length=1), "data.length", "1"),
        (lambda: DataConfig(validation=1.0), "data.validation", "1.0"),
        (lambda: DataConfig(test=-0.1), "data.test", "-0.1"),
        (lambda: DataConfig(validation=0.5, test=0.5), "data.validation and data.test", "0.5 and 0.5"),
        (lambda: DataConfig(workers=0), "data.workers", "0"),
    ],
)
def test_a_setting_out_of_range_names_key_value_and_what_is_accepted(make, key, value):
    with pytest.raises(UserError) as error:
        make()
    message = str(error.value)
    assert key in message
    assert value in message
    assert "accepted: " in message
    assert "\n" not in message
