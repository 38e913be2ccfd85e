"""What lmobj itself reads again, malformed for `tools/fuzz_inputs.py`: tokenizers, prepared caches, run folders; and
places and options that no command accepts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import shutil
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from fuzz_case import Case, Kind, flipped
from fuzz_configs import odd_setting, walk
from fuzz_data import BLOCKS, PREPARE, TEXT, changed_file, good_tokenizer, scratch, write_config

from lmobj import _yaml
from lmobj.cli import main as lmobj
from lmobj.errors import UserError
from lmobj.train.run_folder import RunFolder

__all__ = ["KINDS"]


def tokenizer(draw: Random, folder: Path) -> Case:
    """A tokenizer that is none, or is damaged."""
    (folder / "text.txt").write_bytes(TEXT)
    path, good = folder / "bad.model", good_tokenizer().read_bytes()
    how, damaged = flipped(draw, good)
    contents: dict[str, tuple[bytes | None, bool]] = {
        "empty": (b"", True),
        "text": (TEXT, True),
        "JSON": (b'{"model": {"type": "BPE"}}', True),
        "folder": (None, True),
        "absent": (None, True),
        "size": (good, True),
        "random": (draw.randbytes(draw.choice((1, 100, 10_000))), False),
        "cut": (good[: draw.randrange(len(good))], False),
        how: (damaged, False),
    }
    what = draw.choice((*contents, *[how] * 5))
    content, malformed = contents[what]
    if content is not None:
        path.write_bytes(content)
    elif what == "folder":
        path.mkdir()
    size = {"vocab_size": draw.choice((299, 301, 1, 10**9))} if what == "size" else {}
    write_config(folder, BLOCKS, tokenizer={"path": path.name, **size})
    case = changed_file(what, path, good, malformed=malformed, names=("data.tokenizer",))
    return dataclasses.replace(case, repair=None) if what == "size" else case


def _quietly(*argv: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as told:
        code = lmobj(argv)
    if code != 0:
        raise RuntimeError(f"lmobj {' '.join(argv)} ended with {code}: {told.getvalue()}")


@functools.cache
def _prepared() -> Path:
    """A folder with text.txt, bad.yaml and the cache that `prepare` made of them."""
    folder = scratch() / "prepared"
    folder.mkdir()
    (folder / "text.txt").write_bytes(TEXT)
    write_config(folder, BLOCKS)
    with contextlib.chdir(folder):
        _quietly(*PREPARE)
    return folder


def cache(draw: Random, folder: Path) -> Case:
    """A prepared cache that is damaged, or in a place that cannot be one."""
    shutil.copytree(_prepared(), folder, dirs_exist_ok=True)
    if draw.random() < 0.1:
        place = draw.choice(("bad.yaml", "bad.yaml/below", "/dev/null", "/proc/none", "x" * 300, "a\x00b", "~none/x"))
        write_config(folder, BLOCKS, cache=place)
        return Case(f"cache: {place:.50}", PREPARE, names=("data.cache",))
    (prepared,) = (path for path in (folder / "cache" / "data").iterdir() if path.is_dir())
    what = draw.choice(("damaged", "damaged", "damaged", "removed", "emptied", "folder", "manifest", "manifest"))
    path = prepared / "manifest.json" if what == "manifest" else draw.choice(sorted(prepared.iterdir()))
    good = path.read_bytes()
    how = ""
    if what == "manifest":
        how, changed = _changed_json(draw, json.loads(good))
        path.write_text(json.dumps(changed))
    elif what in ("removed", "folder"):
        path.unlink()
        if what == "folder":
            path.mkdir()
    else:
        how, content = flipped(draw, good) if what == "damaged" else ("", b"")
        path.write_bytes(content)
    same = path.is_file() and (path.read_bytes() == good or (what == "manifest" and json.loads(good) == changed))
    return changed_file(f"{path.name} {what} {how}", path, good, malformed=not same, names=("data.cache",))


def _changed_json(draw: Random, value: Any) -> tuple[str, Any]:
    """JSON with one of its values removed or exchanged."""
    path: list[str] = []
    holder = value
    if not (isinstance(value, dict | list) and value):
        return "replaced", draw.choice((None, 3, "x", [], {}))
    while True:
        key = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        path.append(str(key))
        if not (isinstance(holder[key], dict | list) and holder[key]) or draw.random() < 0.2:
            break
        holder = holder[key]
    wrong: Any = draw.choice((None, True, -1, 0, 10**30, 1.5, "", "nonsense", "../../x", [], {}, [[]], [None], ...))
    if wrong is ...:
        del holder[key]
    else:
        holder[key] = wrong
    return f"{'.'.join(path)}: {wrong!r}", value


_PLACES = (
    "none/*.txt", "", " ", "[", "a\x00b", "x" * 300, "/dev/null", "/proc/self/mem", "nonsense://x", "://", "a://", "http://",
    "https://", "file://", "file:///none", "memory://none", "memory://", "gs://", "gs:///", "s3://", "hf://", "::",
    "zip://x", "zip://x::file:///none", "filecache::none", "simplecache::file:///none", "github://", "ftp://",
    "local://none", "data:,x", "memory://\x00", "~none/x", "${HOME}", "tar://x::memory://y", "reference://", "dir://x",
    "ssh://", "hdfs://", "dask://", "\ud800", "jupyter://x", "libarchive://x", "cached://x", "blockcache::x",
    "generic://x", "arrow_hdfs://x",
)  # fmt: skip


def place(draw: Random, folder: Path) -> Case:
    """Sources, tokenizers and runs at paths and URLs where none can be."""
    url = draw.choice(_PLACES)
    (folder / "text.txt").write_bytes(TEXT)
    which = draw.choice(("source", "source", "tokenizer", "resume", "eval", "generate", "fill", "train"))
    if which == "source":
        write_config(folder, {"name": draw.choice(("text", "jsonl", "parquet")), "files": [url]})
        return Case(f"source: {url!r:.60}", PREPARE, names=("data.source",), may_leave=("cache",))
    if which == "tokenizer":
        write_config(folder, BLOCKS, tokenizer={"path": url})
        return Case(f"tokenizer: {url!r:.60}", PREPARE, names=("data.tokenizer",), may_leave=("cache",))
    if which == "train":
        write_config(folder, BLOCKS)
        bad = draw.choice(
            ("", " ", "nonsense://x", "://", "memory://", "gs://", "zip://x", "text.txt", "text.txt/below", "/proc/x")
        )
        return Case(f"run: {bad!r}", ("train", "bad.yaml", f"run={bad}"), names=("run",), may_leave=("cache",))
    more = {"generate": ("--prompt", "x"), "fill": ("x [MASK]",)}.get(which, ())
    return Case(f"{which} {url!r:.60}", (which, url, *more), own_words=False)


@functools.cache
def _run() -> Path:
    """A folder with a finished run of two steps, and what it was made from."""
    folder = scratch() / "trained"
    shutil.copytree(_prepared(), folder)
    with contextlib.chdir(folder):
        _quietly("train", "bad.yaml", "--quiet")
    return folder


_USES = (
    ("eval", "run"), ("eval", "run", "--split", "test", "--json"), ("eval", "run", "--best"),
    ("resume", "run", "--quiet"), ("generate", "run", "--prompt", "the", "--tokens", "4"),
)  # fmt: skip


def run_folder(draw: Random, folder: Path) -> Case:
    """A run folder with damaged, missing or exchanged files, used again."""
    shutil.copytree(_run(), folder, dirs_exist_ok=True)
    run = folder / "run"
    if draw.random() < 0.6:  # so that no earlier checkpoint can be used instead
        shutil.rmtree(run / "checkpoints" / "1")
    inner = [path for path in sorted((run / "checkpoints").rglob("*")) if path.is_file()]
    path = draw.choice((run / "config.yaml", run / "metrics.jsonl", draw.choice(inner)))
    good = path.read_bytes()
    what = draw.choice(("damaged", "damaged", "removed", "emptied", "folder", "JSON"))
    how = ""
    if what in ("removed", "folder"):
        path.unlink()
        if what == "folder":
            path.mkdir()
    elif what == "JSON" and path.suffix == ".json":
        how, changed = _changed_json(draw, json.loads(good))
        path.write_text(json.dumps(changed))
    elif what == "emptied" or not good:
        path.write_bytes(b"")
    else:
        how, content = flipped(draw, good)
        path.write_bytes(content)
    command = draw.choice(_USES)
    shown = f"{command[0]}: {path.relative_to(folder)} {what} {how}"
    return Case(shown, command, malformed=False, may_leave=("run", "cache"))


class _RehearsedError(UserError):
    """Training would begin now."""

    exit_code = 0


@contextlib.contextmanager
def _rehearsal() -> Iterator[None]:
    """In it, `lmobj train` ends where it would make the run folder: what cannot work must have been told by then."""

    def create(run: RunFolder, config_yaml: str) -> None:
        run.check_free()
        raise _RehearsedError("rehearsed")

    with unittest.mock.patch.object(RunFolder, "create", create):
        yield


_MODELS = {
    "gru": {"name": "gru", "layers": 1, "width": 8},
    "decoder": {"name": "decoder", "layers": 1, "width": 8, "heads": 2, "max_length": 32},
    "encoder": {"name": "encoder", "layers": 1, "width": 8, "heads": 2, "max_length": 32},
    "electra": {"name": "electra", "layers": 1, "width": 8, "heads": 2, "max_length": 32},
    "xlnet": {"name": "xlnet", "layers": 1, "width": 8, "heads": 2},
}
_OBJECTIVES = {"encoder": "masked_lm", "electra": "replaced_token_detection", "xlnet": "transformer_xl"}
"""What each model is tried with, if the setting is not one of an objective; the others with causal_lm."""
_AXES = ("data", "fsdp", "tensor", "sequence", "expert", "nothing", "")
_DECIDE_DATA = ("source", "clean", "segment", "tokenizer", "cache", "workers")
"""Settings of data that the kinds above are about."""


def train(draw: Random, folder: Path) -> Case:
    """A setting at the edge of what can be trained with, or past it, in a run that is ready to begin."""
    shutil.copytree(_prepared(), folder, dirs_exist_ok=True)
    spot = walk(draw)
    while spot.path[0] in ("name", "run") or (spot.path[0] == "data" and spot.path[1] in _DECIDE_DATA):
        spot = walk(draw)
    value = odd_setting(draw, spot)
    if spot.path[:2] == ("train", "sharding"):
        value = draw.choices(_AXES, k=draw.randint(0, 3))
    values = json.loads((folder / "bad.yaml").read_text())
    model = spot.names.get(("model",)) or draw.choice(list(_MODELS))
    objective = spot.names.get(("objective",)) or _OBJECTIVES.get(model, "causal_lm")
    values |= {"model": _MODELS[model], "objective": {"name": objective}}
    changed = _yaml.merge(_yaml.Document(values), _yaml.Document(spot.holding(value))).values
    (folder / "bad.yaml").write_bytes(_yaml.to_yaml(changed).encode("utf-8", "surrogatepass"))
    what = f"{model}, {objective}: {spot.key} = {value!r:.60}"
    return Case(what, ("train", "bad.yaml", "--quiet"), malformed=False, within=_rehearsal, may_leave=("cache",))


_NUMERIC = ("--tokens", "--samples", "--temperature", "--top-k", "--top-p", "--min-p", "--repetition-penalty", "--beam")
_NO_NUMBERS = ("-1", "nan", "-inf", "x", "")
_OPTIONS: tuple[tuple[str, ...], ...] = (
    ("train",), ("eval", "run", "--split", "dev"), ("eval", "run", "--split"), ("eval", "bad.yaml"), ("eval", "."),
    *(("train", "bad.yaml", *options) for options in (
        ("--processes", "0"), ("--processes", "-3"), ("--processes", "two"), ("--process", "1"),
        ("--coordinator", "nowhere"),
        ("--join-timeout", "nan"), ("--heartbeat", "0"), ("--distributed", "--process", "-1"),
        ("--coordinator", "a:1", "--processes", "2", "--process", "2"),
        ("--coordinator", "a:99999999", "--processes", "1", "--process", "0"),
    )),
    *(("resume", "run", change) for change in (
        "train.steps=9", "data.length=8", "model.width=16", "nonsense=1", "train.mesh.data=7",
        "objective.name=masked_lm",
    )),
    ("resume", "text.txt"), ("train", "bad.yaml"), ("fill", "run"), ("fill", "run", "no mask"),
    ("fill", "run", "a [MASK]"),
    ("fill", "run", "[MASK]", "--top", "0"), ("generate", "run"),
    *(("generate", "run", "--prompt", "the", option, value) for option in _NUMERIC for value in _NO_NUMBERS),
    *(("generate", "run", "--prompt", "the", *options) for options in (
        ("--beam", "0"), ("--tokens", "0"), ("--samples", "0"), ("--beam", "2", "--top-k", "3"), ("--seed", "x"),
        ("--length-penalty", "1"), ("--top-p", "1.5"), ("--repetition-penalty", "0"),
        ("--tokens", "99999999999999999999"),
    )),
)  # fmt: skip


def options(draw: Random, folder: Path) -> Case:
    """Options and arguments that no command accepts, or not of this run."""
    shutil.copytree(_run(), folder, dirs_exist_ok=True)
    argv = draw.choice(_OPTIONS)
    return Case(" ".join(argv), argv, own_words=False)


KINDS: dict[str, Kind] = {
    "tokenizer": Kind(tokenizer, 150, 30),
    "cache": Kind(cache, 150, 30),
    "place": Kind(place, 100, 60),
    "train": Kind(train, 100, 60),
    "run": Kind(run_folder, 30, 120),
    "options": Kind(options, 20, 120),
}
