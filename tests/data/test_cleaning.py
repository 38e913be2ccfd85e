"""Each step of cleaning does what it says, and counts all that it changes, drops and removes."""

from __future__ import annotations

import pickle
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmobj.data._cleaning import Cleaner, add_counts
from lmobj.data._cleaning_config import (
    CleaningConfig,
    LanguageFilter,
    NearDuplicates,
    SegmentationConfig,
    StopWords,
)
from lmobj.data._words import find_words
from lmobj.errors import UserError

ENGLISH = "The weather in the mountains was cold, and the travellers stayed inside until the morning came."
GERMAN = "Das Wetter in den Bergen war kalt, und die Reisenden blieben bis zum Morgen im Haus."
CHINESE = "今天的天气很好，我们一起去公园玩，然后回家吃饭。"  # noqa: RUF001


def clean(text: str, **steps: object) -> str | None:
    return Cleaner(CleaningConfig(**steps))(text).text  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<p>One <b>bo<i>ld</i></b> word.</p><p>Two&nbsp;&amp; three.</p>", "One bold word.\n\nTwo\xa0& three."),
        ("<div><div>in<div>ner</div></div>out</div>", "in\n\nner\n\nout"),
        ("a<script>var x = '<p>no</p>';</script><style>p { color: red }</style>b", "ab"),
        (
            "<html><head><title>no</title></head><body>\n  caf&eacute;\n &#x4e2d;&#25991; <!-- no --></body>",
            "café 中文",
        ),
        ("<ul><li>one<li>two</ul>then", "one\ntwo\n\nthen"),
        ("<table><tr><td>1<td>2<tr><td>3</table>", "1 2\n3"),
        ("one<br>two<br><br>three", "one\ntwo\n\nthree"),
        ("x<pre>def f():\n    pass\n\n\n# end</pre>y", "x\n\ndef f():\n    pass\n\n\n# end\n\ny"),
        ("<b>&amp;lt;</b>", "&lt;"),  # decoded once
        ("two\n\nparagraphs,  a &lt; b and c > d", "two\n\nparagraphs,  a < b and c > d"),  # no tags: white space stays
        ("see <https://example.org/x> or a <b", "see <https://example.org/x> or a <b"),
    ],
)
def test_html_becomes_the_text_that_a_reader_sees(page, text):
    assert clean(page, html=True) == text


def test_control_and_invisible_characters_go_and_line_ends_become_newlines():
    assert clean("a\x00b\x07c\td\ne\r\nf\rg\x0bh\x85i\u2028j", control=True) == "abc\td\ne\nf\ng\nh\ni\nj"
    assert clean("\ufeffa\u200bb\u2060c\xadd\u202ee\u2066f\ufeff", control=True) == "abcdef"
    kept = "\U0001f469\u200d\U0001f52c \u0645\u06cc\u200c\u062e"  # an emoji and Persian need their joiners
    assert clean(kept, control=True) == kept


def test_unicode_is_normalised():
    assert clean("Ａｂ１\ufb01\u3000x", unicode="nfkc") == "Ab1fi x"  # noqa: RUF001
    assert clean("e\u0301", unicode="nfc") == "\xe9"
    assert clean("\xe9\ufb01", unicode="nfd") == "e\u0301\ufb01"
    assert clean("\xe9\ufb01", unicode="nfkd") == "e\u0301fi"


def test_white_space_is_collapsed():
    assert clean("  a  b\tc \t d\xa0\u3000e  \n f \n \n\n\n g\n\nh\n ", whitespace=True) == "a b c d e\n f\n\n g\n\nh"


def test_lower_case():
    assert clean("ÀB c", lowercase=True) == "àb c"


def test_stop_words_are_whole_words_in_any_case():
    words = StopWords(words=("the", "don't"))
    assert clean("The theme, the other: DON\u2019T! bathe_the the", stop_words=words) == "theme, other: ! bathe_the "
    assert clean("This is about the mountains", stop_words=StopWords(languages=("en",))) == "mountains"
    hindi = StopWords(words=("कि",))  # ends in a vowel sign, and begins a longer word
    assert clean("कि किताब", stop_words=hindi) == "किताब"


def test_chinese_stop_words_are_found_by_segmentation():
    # jieba divides it 我 来到 北京 清华大学; the 大 and the 来 inside words are no words.
    words = StopWords(words=("我", "大", "来", "北京"))
    assert clean("我来到北京清华大学 ok", stop_words=words) == "来到清华大学 ok"
    assert "的" in CHINESE
    assert "的" not in (clean(CHINESE, stop_words=StopWords(languages=("zh",))) or "")


def test_words_are_counted_in_any_script():
    assert find_words("It's a 1st-rate re_do, été.") == ["It's", "a", "1st", "rate", "re_do", "été"]
    assert find_words("中文abc かなไทย") == ["中", "文", "abc", "か", "な", "ไ", "ท", "ย"]
    assert find_words("किताब e\u0301te") == ["किताब", "e\u0301te"]


def test_documents_in_other_languages_are_dropped():
    english = LanguageFilter(accepted=("en",))
    assert clean(ENGLISH, language=english) == ENGLISH
    assert clean(GERMAN, language=english) is None
    assert clean(CHINESE, language=LanguageFilter(accepted=("de", "zh"))) == CHINESE
    assert clean("ok", language=LanguageFilter(accepted=("en",), probability=0.99)) is None


def test_documents_too_short_or_too_long_are_dropped():
    assert clean("12345", min_characters=5) == "12345"
    assert clean("1234", min_characters=5) is None
    assert clean("12345", max_characters=5) == "12345"
    assert clean("123456", max_characters=5) is None
    assert clean("one two", min_words=2) == "one two"
    assert clean("one-", min_words=2) is None
    assert clean("中文", min_words=2) == "中文"


def test_steps_are_applied_in_the_order_of_the_fields():
    config = CleaningConfig(html=True, control=True, unicode="nfc", whitespace=True, lowercase=True, min_characters=3)
    assert config.steps == ("html", "control", "unicode", "whitespace", "lowercase", "length")
    # A zero-width space between e and its accent: composed only if it goes first. The entity is a control character.
    cleaned = Cleaner(config)("<p>E\u200b\u0301t&#x7f;É  </p>")
    assert cleaned.text == "été"
    assert set(cleaned.counts) == {"html", "control", "unicode", "lowercase"}


def test_counts_tell_each_step_apart():
    cleaner = Cleaner(CleaningConfig(html=True, whitespace=True, min_characters=3))
    assert cleaner("abc").counts == {}
    # <b></b>: 7 bytes; two no-break spaces of two bytes and a space become one space: 4 bytes
    assert cleaner("<b>é</b>\xa0\xa0 d").counts == {
        "html": {"changed": 1, "dropped": 0, "bytes": 7},
        "whitespace": {"changed": 1, "dropped": 0, "bytes": 4},
    }
    assert cleaner("<b>é</b>").counts == {
        "html": {"changed": 1, "dropped": 0, "bytes": 7},
        "length": {"changed": 0, "dropped": 1, "bytes": 2},
    }
    assert cleaner("<p> </p>").counts == {"html": {"changed": 0, "dropped": 1, "bytes": 8}}


def test_a_pair_is_cleaned_alike_and_judged_as_one_document():
    cleaner = Cleaner(CleaningConfig(html=True, lowercase=True, min_words=2))
    assert cleaner("<i>A</i>", "B")[:2] == ("a", "b")
    assert cleaner("A", "B").counts == {"lowercase": {"changed": 1, "dropped": 0, "bytes": 0}}
    assert cleaner("A b", "<i></i>").counts == {"html": {"changed": 0, "dropped": 1, "bytes": 10}}


texts = st.text("aB.é中 \n\t\r\x00\u200b\u0301\xa0Ａ<>&;/bpi", max_size=24) | st.text(  # noqa: RUF001
    st.characters(codec="utf-8"), max_size=24
)
configs = st.builds(
    CleaningConfig,
    html=st.booleans(),
    control=st.booleans(),
    unicode=st.sampled_from([None, "nfc", "nfkd"]),
    whitespace=st.booleans(),
    lowercase=st.booleans(),
    stop_words=st.sampled_from([None, StopWords(words=("a", "中"))]),
    min_characters=st.integers(0, 4),
    max_characters=st.sampled_from([None, 12]),
    min_words=st.integers(0, 2),
)


@settings(max_examples=150, deadline=None)
@given(configs, st.lists(st.tuples(texts, st.none() | texts), max_size=6))
def test_documents_and_bytes_balance(config, documents):
    total: dict = {}
    kept = size = left = 0
    for text, pair in documents:
        cleaned = Cleaner(config)(text, pair)
        size += len((text + (pair or "")).encode())
        assert set(cleaned.counts) <= set(config.steps)
        add_counts(total, cleaned.counts)
        if cleaned.text is not None:
            kept += 1
            left += len((cleaned.text + (cleaned.pair or "")).encode())
            assert (cleaned.pair is None) == (pair is None)
    assert len(documents) == kept + sum(step["dropped"] for step in total.values())
    assert size == left + sum(step["bytes"] for step in total.values())


@settings(max_examples=100, deadline=None)
@given(texts)
def test_clean_text_stays_as_it_is(text):
    cleaner = Cleaner(CleaningConfig(control=True, unicode="nfkc", whitespace=True))
    once = cleaner(text).text
    if once is not None:
        assert cleaner(once).counts == {}
        assert unicodedata.is_normalized("NFKC", once)


def test_a_cleaner_can_be_pickled():
    config = CleaningConfig(html=True, language=LanguageFilter(accepted=("en",)), near_duplicates=NearDuplicates())
    cleaner = pickle.loads(pickle.dumps(Cleaner(config)))
    assert cleaner(f"<p>{ENGLISH}").text == ENGLISH


@pytest.mark.parametrize(
    ("make", "key", "value"),
    [
        (lambda: CleaningConfig(unicode="nfx"), "data.clean.unicode", "'nfx'"),
        (lambda: CleaningConfig(min_characters=-1), "data.clean.min_characters", "-1"),
        (lambda: CleaningConfig(min_words=-2), "data.clean.min_words", "-2"),
        (lambda: CleaningConfig(min_characters=5, max_characters=4), "data.clean.max_characters", "4"),
        (lambda: CleaningConfig(max_characters=0), "data.clean.max_characters", "0"),
        (lambda: StopWords(), "data.clean.stop_words", "neither"),
        (lambda: StopWords(languages=("EN",)), "data.clean.stop_words.languages", "'EN'"),
        (lambda: StopWords(words=("two words",)), "data.clean.stop_words.words", "'two words'"),
        (lambda: LanguageFilter(), "data.clean.language.accepted", "empty"),
        (lambda: LanguageFilter(accepted=("english",)), "data.clean.language.accepted", "'english'"),
        (lambda: LanguageFilter(accepted=("en",), probability=1.5), "data.clean.language.probability", "1.5"),
        (lambda: NearDuplicates(threshold=1.0), "data.clean.near_duplicates.threshold", "1.0"),
        (lambda: NearDuplicates(permutations=8), "data.clean.near_duplicates.permutations", "8"),
        (lambda: NearDuplicates(shingle=0), "data.clean.near_duplicates.shingle", "0"),
        (lambda: SegmentationConfig(sentences="x"), "data.segment.sentences", "'x'"),
        (lambda: SegmentationConfig(words="x"), "data.segment.words", "'x'"),
        (lambda: SegmentationConfig(language="English"), "data.segment.language", "'English'"),
        (lambda: check(language=LanguageFilter(accepted=("qq",))), "data.clean.language.accepted", "'qq'"),
        (lambda: check(stop_words=StopWords(languages=("qq",))), "data.clean.stop_words.languages", "'qq'"),
        (lambda: check(stop_words=StopWords(languages=("ja",))), "data.clean.stop_words.languages", "'ja'"),
        (lambda: check(stop_words=StopWords(words=("a-b",))), "data.clean.stop_words.words", "'a-b'"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name(make, key, value):
    with pytest.raises(UserError) as error:
        make()
    message = str(error.value)
    assert message.startswith(key)
    assert value in message
    assert "accepted: " in message


def check(**steps: object) -> None:
    Cleaner(CleaningConfig(**steps)).check()  # type: ignore[arg-type]


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    import importlib

    def absent(name: str) -> object:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(UserError, match=r"data\.clean\.html is true, .* selectolax.*pip install 'lmobj\[clean\]'"):
        check(html=True)
