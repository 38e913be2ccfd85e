"""Windows over long contexts are those of Transformers' fast tokenizers, whose stride is what two windows share."""

from __future__ import annotations

import numpy as np
import pytest

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from lmobj.tasks import qa_windows, window_labels  # noqa: E402

pytestmark = pytest.mark.parity

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "ab", "c", "de", "f", "?", "who"]


def bert() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of whole words that makes pairs as BERT's does."""
    model = tokenizers.models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def test_windows_and_labels_are_those_of_fast_tokenizers() -> None:
    tokenizer = bert()
    rng = np.random.default_rng(0)
    windows_seen = 0
    for _ in range(100):
        context = " ".join(rng.choice(WORDS[4:8], rng.integers(1, 40)))
        alone = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)
        room = int(rng.integers(2, 15))
        stride = int(rng.integers(1, room + 1))
        question = tokenizer("who c?", add_special_tokens=False)["input_ids"]
        theirs = tokenizer(
            "who c?",
            context,
            max_length=room + 6,
            stride=room - stride,
            truncation="only_second",
            padding="max_length",
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_token_type_ids=True,
        )
        ours = qa_windows(
            question, alone["input_ids"], max_length=room + 6, stride=stride, prefix=[2], separator=[3], suffix=[3]
        )
        np.testing.assert_array_equal(ours.tokens, theirs["input_ids"])
        np.testing.assert_array_equal(ours.segment_ids, theirs["attention_mask"])
        np.testing.assert_array_equal(ours.token_types, theirs["token_type_ids"])
        offsets = np.array(alone["offset_mapping"])
        for index, spans, row in zip(ours.context_index, theirs["offset_mapping"], range(99), strict=False):
            kinds = np.array([kind == 1 for kind in theirs.sequence_ids(row)])
            np.testing.assert_array_equal(index >= 0, kinds)
            np.testing.assert_array_equal(offsets[index[kinds]], np.array(spans)[kinds])
        first, last = sorted(rng.integers(0, len(offsets), 2).tolist())
        answer = (int(offsets[first, 0]), int(offsets[last, 1]))
        starts, ends = window_labels(ours, alone["offset_mapping"], answer)
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            edges = [theirs.char_to_token(row, at, sequence_index=1) for at in (answer[0], answer[1] - 1)]
            assert [start, end] == (edges if None not in edges else [0, 0])
        windows_seen += len(starts)
    assert windows_seen > 200
