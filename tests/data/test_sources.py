"""Documents out of files and out of the standard library."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmobj.data import StdlibSource, TextFiles
from lmobj.data._inputs import Tally
from lmobj.data._sources import open_corpus, open_stdlib
from lmobj.errors import UserError


def texts(*patterns: str | Path, **options: str) -> list[str]:
    corpus = open_corpus(TextFiles(files=tuple(map(str, patterns)), **options), 2)
    return [document.text for document in corpus.documents()]


def test_one_document_per_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.txt").write_text("three")
    (tmp_path / "blank.txt").write_text(" \n\n")
    assert sorted(texts(tmp_path / "*.txt")) == ["one\n\ntwo\n", "three"]


def test_one_document_per_block(tmp_path):
    (tmp_path / "a.txt").write_text("\n\none\n  more\n\n \t\n\ntwo\n\n\n")
    assert texts(tmp_path / "a.txt", documents="blocks") == ["one\n  more", "two"]


@pytest.mark.parametrize("documents", ["file", "blocks"])
def test_a_byte_order_mark_and_foreign_line_ends_are_no_text(tmp_path, documents):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert texts(tmp_path / "a.txt", documents=documents) == ["one\ntwo"]


def test_blocks_end_at_blank_lines_with_foreign_line_ends(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\ntwo\r\n")
    assert texts(tmp_path / "a.txt", documents="blocks") == ["one", "two"]


# The first bad byte of each text, counted by hand from the start of the file, byte order mark included.
@pytest.mark.parametrize(
    ("content", "offset"),
    [(b"ab\xffcd", 2), (b"\xef\xbb\xbfab\xff", 5), (b"one\n\nt\xc3\x28o", 6), (b"one\n\ntwo\n\n\xe9", 10)],
)
@pytest.mark.parametrize("documents", ["file", "blocks"])
def test_bytes_that_are_not_utf8_are_named(tmp_path, content, offset, documents):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"bad\.txt is not UTF-8 at byte {offset} .*replace"):
        texts(path, documents=documents)


def test_bytes_that_are_not_utf8_can_be_replaced(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"ab\xffcd")
    assert texts(tmp_path / "bad.txt", errors="replace") == ["ab\ufffdcd"]


def test_a_pattern_without_files_is_named(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UserError, match=r"no file matches '.*\.txt'"):
        texts(tmp_path / "*.txt")


def test_empty_files_are_an_empty_corpus(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match="are empty"):
        texts(tmp_path / "a.txt")


def test_a_file_is_counted_once_however_it_is_matched(tmp_path):
    (tmp_path / "a[1].txt").write_text("one")
    assert texts(tmp_path / "a[1].txt", tmp_path / "*.txt", tmp_path / ".." / tmp_path.name / "*") == ["one"]


def test_order_and_identity_depend_on_content_alone(tmp_path):
    contents = [f"document {number}" for number in range(8)]
    for folder, names in (("x", "abcdefgh"), ("y", "hgfedcba")):
        (tmp_path / folder).mkdir()
        for name, content in zip(names, contents, strict=True):
            (tmp_path / folder / name).write_text(content)
    first, second = (open_corpus(TextFiles(files=(str(tmp_path / folder / "*"),)), 2) for folder in "xy")
    assert first.identity == second.identity
    assert list(first.documents()) == list(second.documents())
    (tmp_path / "x" / "a").write_text("document 0.")
    assert open_corpus(TextFiles(files=(str(tmp_path / "x" / "*"),)), 2).identity != first.identity


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A folder laid out as a standard library."""
    files = {
        "pydoc_data/topics.py": 'topics = {"b": "Second topic.  \\n   indented", "a": "First topic."}\n',
        "one.py": '"""Module."""\nclass C:\n  """Class."""\n'
        '  def f(self):\n    """Method.\n\n    flat\n      deep\n    """\n'
        'if True:\n  try:\n    pass\n  except E:\n    async def g():\n      "Async."\n',
        "package/two.py": 'def f():\n  """Module."""\ndef g():\n  """Own."""\nx = lambda: "no docstring"\ny = "\\d"\n',
        "broken.py": "def (:\n",
        "test/skipped.py": '"""Never seen."""\n',
        "site-packages/skipped.py": '"""Never seen."""\n',
        "silent.py": "x = 1\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def test_the_library_gives_topics_and_docstrings_once_each(library):
    tally = Tally()
    assert [document.text for document in open_stdlib(library, 2).documents(tally)] == [
        "First topic.",
        "Second topic.\nindented",  # cleandoc takes the common indentation of all lines but the first
        "Module.\n\nClass.\n\nMethod.\n\nflat\n  deep\n\nAsync.",
        "Own.",
    ]
    assert tally.skipped == 1


def test_a_folder_without_library_sources_is_named(tmp_path):
    with pytest.raises(UserError, match=r"stdlib.*pydoc_data/topics\.py"):
        open_stdlib(tmp_path, 2)


def test_the_library_of_this_python_is_a_corpus():
    tally = Tally()
    documents = [document.text for document in open_corpus(StdlibSource(), 2).documents(tally)]
    assert len(documents) == len(set(documents)) > 400
    # The reference of the language and the docstrings of some 500 modules: about 2 MB, in every CPython.
    assert 1_500_000 < sum(len(text) for text in documents) < 4_000_000
    assert any(text.startswith("Boolean operations") for text in documents)
    assert any("Return a shallow copy" in text for text in documents)
    assert tally.skipped == 0
