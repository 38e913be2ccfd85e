"""Malformed source files for `tools/fuzz_inputs.py`: text, JSON Lines, compressed ones, Parquet, TFDS data sets.

What is damaged is made once per process from a fixed generator of random numbers.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import gzip
import io
import json
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from fuzz_case import Case, Kind, flipped

from lmobj.data import DataConfig, SentencePieceConfig, TextFiles, prepare

__all__ = ["BLOCKS", "KINDS", "PREPARE", "TEXT", "changed_file", "good_tokenizer", "scratch", "write_config"]

_WORDS = ("the", "a", "fox", "dog", "house", "tree", "sees", "finds", "likes", "red", "old", "quick", "and", "never")
PREPARE = ("prepare", "bad.yaml")
BLOCKS = {"name": "text", "files": ["text.txt"], "documents": "blocks"}
"""A good source, where text.txt is there."""


def _rows(draw: Random, count: int = 60) -> list[dict[str, Any]]:
    return [
        {
            "text": " ".join(draw.choices(_WORDS, k=draw.randint(8, 20))) + ".",
            "title": " ".join(draw.choices(_WORDS, k=3)),
            "label": draw.choice(("good", "bad")),
            "score": draw.random(),
            "number": number,
        }
        for number in range(count)
    ]


_ROWS = _rows(random.Random(0))
_LINES = [json.dumps(row).encode() + b"\n" for row in _ROWS]
TEXT = "\n\n".join(row["text"] for row in _ROWS).encode() + b"\n"
"""The content of a good text.txt."""


@functools.cache
def scratch() -> Path:
    """A folder for good things, kept while this process lives."""
    folder = tempfile.mkdtemp(prefix="lmobj-fuzz-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def good_tokenizer() -> Path:
    """A trained tokenizer: loading it is much quicker than training."""
    (scratch() / "text.txt").write_bytes(TEXT)
    config = DataConfig(
        source=TextFiles(files=(str(scratch() / "text.txt"),), documents="blocks"),
        tokenizer=SentencePieceConfig(vocab_size=300),
        length=16,
        validation=0.2,
        cache=str(scratch() / "first"),
        workers=1,
    )
    path = scratch() / "tokenizer.model"
    prepare(config, quiet=True).tokenizer.save(path)
    return path


def write_config(folder: Path, source: dict[str, Any], **data: Any) -> None:
    """Writes bad.yaml, a small experiment that reads `source`."""
    settings = {
        "source": source,
        "tokenizer": {"path": str(good_tokenizer())},
        "length": 16,
        "validation": 0.2,
        "test": 0.1,
        "cache": "cache",
        "workers": 1,
    }
    experiment = {
        "run": "run",
        "data": settings | data,
        "model": {"name": "gru", "layers": 1, "width": 8},
        "objective": {"name": "causal_lm"},
        "train": {"steps": 2, "batch_size": 2, "log_every": 1, "checkpoint_every": 1},
    }
    (folder / "bad.yaml").write_text(json.dumps(experiment))


def _in_use(draw: Random, folder: Path, source: dict[str, Any]) -> None:
    """Writes bad.yaml with the source alone or in a mixture, and now and then with its text cleaned."""
    if draw.random() < 0.2:
        (folder / "text.txt").write_bytes(TEXT)
        mixed = {"first": {"weight": 2, "source": BLOCKS}, "second": {"source": source}}
        source = {"name": "mixture", "sources": mixed}
    steps: dict[str, Any] = {
        "html": True,
        "control": True,
        "unicode": draw.choice(("nfc", "nfkd")),
        "whitespace": True,
        "lowercase": True,
        "min_characters": 2,
        "exact_duplicates": True,
        "near_duplicates": {"permutations": 16, "threshold": 0.9},
    }
    chosen = {name: value for name, value in steps.items() if draw.random() < 0.4}
    write_config(folder, source, **({"clean": chosen} if draw.random() < 0.3 else {}))


def changed_file(what: str, path: Path, good: bytes, *, malformed: bool, names: tuple[str, ...] = ("data.",)) -> Case:
    """A case about one file that `lmobj prepare` reads; it can be made good again."""

    def repair() -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.write_bytes(good)

    return Case(what, PREPARE, malformed=malformed, names=names, repair=repair, may_leave=("cache",))


def text(draw: Random, folder: Path) -> Case:
    """Text files that are not UTF-8, hold nothing, or are no files."""
    strict, blocks = draw.random() < 0.7, draw.random() < 0.7
    documents, errors = "blocks" if blocks else "file", "strict" if strict else "replace"
    write_config(folder, {"name": "text", "files": ["bad.txt"], "documents": documents, "errors": errors})
    path = folder / "bad.txt"
    at = draw.randrange(len(TEXT))
    broken = draw.choice((b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\xc0\x80", b"\xf4\x90\x80\x80"))
    contents: dict[str, tuple[bytes, bool]] = {
        "bytes that are not UTF-8": (TEXT[:at] + broken + TEXT[at:], strict),
        "UTF-16": (TEXT.decode().encode("utf-16"), strict),
        "random bytes": (b"\xff" + draw.randbytes(draw.choice((1, 100, 100_000))), strict),
        "empty": (b"", True),
        "blanks": (b" \n\t\n\r\n" * draw.choice((1, 1000)), True),
        "a mark alone": (b"\xef\xbb\xbf", True),
        "one word": (b"word", True),
        "zero bytes": (TEXT[:at] + bytes(5) + TEXT[at:], False),
        "damaged": (flipped(draw, TEXT)[1], False),
    }
    what = draw.choice((*contents, "folder", "absent", "link to itself"))
    content, malformed = contents.get(what, (None, True))
    if content is not None:
        path.write_bytes(content)
    elif what == "folder":
        path.mkdir()
    elif what == "link to itself":
        path.symlink_to("bad.txt")
    case = changed_file(f"{what}, {documents}, {errors}", path, TEXT, malformed=malformed)
    # One file is one document, too few for three splits even where it is good.
    return case if blocks else dataclasses.replace(case, malformed=True, repair=None)


_BAD_LINES: dict[str, tuple[bytes, bool]] = {
    "no JSON": (b"nonsense\n", True),
    "cut": (b'{"text": "the quick\n', True),
    "single quotes": (b"{'text': 'the'}\n", True),
    "a comma too many": (b'{"text": "the",}\n', True),
    "two objects": (b'{"text": "a"} {"text": "b"}\n', True),
    "a list": (b'["text"]\n', True),
    "a number": (b"3\n", True),
    "a string": (b'"text"\n', True),
    "null": (b"null\n", True),
    "NaN": (b"NaN\n", True),
    "empty object": (b"{}\n", True),
    "another column": (b'{"Text": "the"}\n', True),
    "text: number": (b'{"text": 3}\n', True),
    "text: null": (b'{"text": null}\n', True),
    "text: true": (b'{"text": true}\n', True),
    "text: list": (b'{"text": ["the"]}\n', True),
    "text: object": (b'{"text": {"text": "the"}}\n', True),
    "text: many digits": (b'{"text": ' + b"9" * 10_000 + b"}\n", True),
    "text: huge exponent": (b'{"text": 1e999999}\n', True),
    "half a pair": (b'{"text": "\\ud800 the"}\n', True),
    "the other half": (b'{"text": "the \\udfff"}\n', True),
    "raw control character": (b'{"text": "a\x00b"}\n', True),
    "zero bytes": (b"\x00\x00\x00\n", True),
    "not UTF-8": (b'{"text": "\xff"}\n', True),
    "surrogate in UTF-8": (b'{"text": "\xed\xa0\x80"}\n', True),
    "UTF-16": ('{"text": "the"}'.encode("utf-16") + b"\n", True),
    "nested lists": (b'{"text": ' + b"[" * 100_000 + b"\n", True),
    "nested lists, closed": (b"[" * 100_000 + b"]" * 100_000 + b"\n", True),
    "nested objects": (b'{"text": ' * 100_000 + b"\n", True),
    "nested beside": (b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", True),
    "bad escape": (b'{"text": "\\x"}\n', True),
    "short escape": (b'{"text": "\\u12"}\n', True),
    "giant, cut": (b'{"text": "' + b"the dog " * 300_000 + b"\n", True),
    "escaped zero": (b'{"text": "a\\u0000b"}\n', False),
    "column twice": (b'{"text": 3, "text": "the dog"}\n', False),
    "mark": (b'\xef\xbb\xbf{"text": "the dog"}\n', False),
    "blanks": (b"  \t \r\n\n", False),
    "blank text": (b'{"text": "  "}\n', False),
    "giant": (b'{"text": "' + b"the dog " * 300_000 + b'"}\n', False),
    "other line end": (b'{"text": "the\\r\\ndog"}\r\n', False),
}
"""Lines among good ones, and whether they are no rows."""


def jsonl(draw: Random, folder: Path) -> Case:
    """JSON Lines with a line that is no row, or without a column that is asked for."""
    strict = draw.random() < 0.7
    source: dict[str, Any] = {"name": "jsonl", "files": ["bad.jsonl"], "errors": "strict" if strict else "skip"}
    path, good = folder / "bad.jsonl", b"".join(_LINES)
    what = draw.choice((*_BAD_LINES, *["damaged"] * 3, "empty", "blank lines", "folder", *["column"] * 4))
    content, malformed = good, True
    if what in _BAD_LINES:
        line, wrong = _BAD_LINES[what]
        at = draw.randrange(1, len(_LINES))
        content, malformed = b"".join([*_LINES[:at], line, *_LINES[at:]]), strict and wrong
    elif what == "damaged":
        how, content = flipped(draw, good)
        what, malformed = f"damaged: {how}", False
    elif what in ("empty", "blank lines"):
        content = b"" if what == "empty" else b"\n \n"
    elif what == "column":
        columns = draw.choice(
            (
                {"text": draw.choice(("nothing", "", "Text", "é", "text\n", "\x00"))},
                {"pair": draw.choice(("nothing", "number", "score"))},
                {"label": draw.choice(("nothing", "score"))},
                {"label": draw.choice(("nothing", "label", "text")), "label_kind": "number"},
            )
        )
        source, what = source | columns, str(columns)
    path.mkdir() if what == "folder" else path.write_bytes(content)
    _in_use(draw, folder, source)
    case = changed_file(f"{what}, {source['errors']}", path, good, malformed=malformed)
    return dataclasses.replace(case, repair=None) if content is good else case


def compressed(draw: Random, folder: Path) -> Case:
    """Compressed JSON Lines, damaged, cut off, or not compressed at all."""
    import pyarrow

    plain = b"".join(_LINES)
    packed = {"gz": gzip.compress(plain, mtime=0), "zst": pyarrow.compress(plain, codec="zstd", asbytes=True)}
    ending = draw.choice(list(packed))
    good = packed.pop(ending)
    how, damaged = flipped(draw, good)
    contents: dict[str, tuple[bytes, bool]] = {
        "cut": (good[: draw.randrange(1, len(good) - 8)], True),
        "plain": (plain, True),
        "the other kind": (*packed.values(), True),
        "empty": (b"", True),
        "random": (draw.randbytes(2000), True),
        "rubbish behind": (good + draw.randbytes(50), False),
        "twice": (good + good, False),
        how: (damaged, False),
    }
    what = draw.choice((*contents, how, how, how, how))
    path = folder / f"bad.jsonl.{ending}"
    path.write_bytes(contents[what][0])
    _in_use(draw, folder, {"name": "jsonl", "files": [path.name], "errors": draw.choice(("strict", "skip"))})
    return changed_file(f"{ending}: {what}", path, good, malformed=contents[what][1])


@functools.cache
def _parquet(codec: str, version: str, dictionary: bool) -> bytes:
    import pyarrow
    import pyarrow.parquet

    columns = {name: [row[name] for row in _ROWS] for name in _ROWS[0]}
    columns["nested"] = [{"text": row["text"], "more": [1, 2]} for row in _ROWS]
    columns["list"] = [[row["text"]] for row in _ROWS]
    columns["bytes"] = [row["text"].encode() + b"\xff" for row in _ROWS]
    columns["gaps"] = [row["text"] if row["number"] % 7 else None for row in _ROWS]
    columns["none"] = [None] * len(_ROWS)
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.table(columns),
        buffer,
        compression=codec,
        data_page_version=version,
        use_dictionary=dictionary,
        row_group_size=25,
    )
    return buffer.getvalue()


@functools.cache
def _parquet_without_rows() -> bytes:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), buffer)
    return buffer.getvalue()


def parquet(draw: Random, folder: Path) -> Case:
    """Parquet files with changed bytes, cut off, or with other columns than asked for."""
    codec, version = draw.choice(("NONE", "SNAPPY", "ZSTD", "GZIP", "LZ4")), draw.choice(("1.0", "2.0"))
    good = _parquet(codec, version, draw.random() < 0.5)
    source = {"name": "parquet", "files": ["bad.parquet"], "errors": draw.choice(("strict", "strict", "skip"))}
    content, malformed = good, True
    match draw.randrange(6):
        case 0:
            how, content = flipped(draw, good, max(0, len(good) - 4000))
            what, malformed = f"{codec}, footer: {how}", False
        case 1:
            wrong = ("number", "score", "nested", "list", "bytes", "none", "nothing", "nested.text", "", "gaps")
            key, column = draw.choice(("text", "pair")), draw.choice(wrong)
            source[key] = column
            what, malformed = f"{key}: {column!r}, {source['errors']}", column != "gaps" or source["errors"] == "strict"
        case 2:
            marks = (b"", b"PAR1", b"PAR1" * 2, b"PAR1" * 50, b"PAR1\x00\x00\x00\x00PAR1", TEXT, draw.randbytes(500))
            ends = (b"\xff\xff\xff\x7fPAR1", bytes(4) + b"PAR1", good[-8:-4] + b"PARE")
            content = draw.choice((*marks, *(good[:-8] + end for end in ends), _parquet_without_rows()))
            what = f"no Parquet, or without rows: {content[:12]!r}...{content[-12:]!r}"
        case _:
            how, content = flipped(draw, good)
            what, malformed = f"{codec}: {how}", False
    path = folder / "bad.parquet"
    path.write_bytes(content)
    _in_use(draw, folder, source)
    case = changed_file(what, path, good, malformed=malformed)
    return dataclasses.replace(case, repair=None) if content is good else case


@functools.cache
def _tfds() -> Path:
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():  # or TFDS would take from the class what the files lack

        class FuzzCorpus(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self) -> Any:
                features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "title": tfds.features.Text()})
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, _: Any) -> dict[str, Any]:
                return {"train": self._generate_examples()}

            def _generate_examples(self) -> Iterator[Any]:
                for row in _ROWS:
                    yield row["number"], {"text": row["text"], "title": row["title"]}

    folder = scratch() / "tfds"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        FuzzCorpus(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


_TFDS_SETTINGS: tuple[dict[str, str], ...] = (
    *({"builder": name} for name in ("none", "fuzz_corpus:9.9.9", "fuzz_corpus/x", "../x", "é", ":", "/", "a/b/c:d:e",
      "\x00", "fuzz_corpus:x", "fuzz_corpus:1.0.0?split=1", "mnist")),
    *({"split": name} for name in ("dev", "", "train[:10%]", "train+train")),
    *({"data_dir": name} for name in ("none", "bad.yaml", "", "gs://")),
    {"text": "nothing"}, {"pair": "x"}, {"label": "x"},
)  # fmt: skip


def tfds(draw: Random, folder: Path) -> Case:
    """A prepared TFDS data set with damaged or missing files, or asked for what it has not."""
    shutil.copytree(_tfds(), folder / "tfds")
    source = {"name": "tfds", "builder": "fuzz_corpus:1.0.0", "data_dir": str(folder / "tfds")}
    if draw.random() < 0.2:
        wrong = draw.choice(_TFDS_SETTINGS)
        write_config(folder, source | wrong)
        return Case(f"{wrong}", PREPARE, names=("data.source",), may_leave=("cache",))
    path = draw.choice(sorted(path for path in (folder / "tfds").rglob("*") if path.is_file()))
    good = path.read_bytes()
    how, content = flipped(draw, good)
    what = draw.choice((how, how, how, "removed", "emptied"))
    if what == "removed":
        path.unlink()
    else:
        path.write_bytes(b"" if what == "emptied" else content)
    write_config(folder, source)
    return changed_file(f"{path.name} {what}", path, good, malformed=False)


KINDS: dict[str, Kind] = {
    "text": Kind(text, 200, 30),
    "jsonl": Kind(jsonl, 500, 30),
    "compressed": Kind(compressed, 300, 30),
    "parquet": Kind(parquet, 400, 30),
    "tfds": Kind(tfds, 150, 60),
}
