"""Builds the prepared data once per (content, settings) and keeps it in a cache.

    <cache>/data/<key>/            complete: manifest.json, tokenizer.model, token shards, index arrays
    <cache>/data/<key>.partial/    under construction; what is finished in it is used again after an interruption
    <cache>/data/<key>.lock        held by the process that builds

The key is a digest of the inputs' content and of the settings. The fingerprint adds the tokenizer's digest, so that two
data sets with one fingerprint hold the same tokens. A folder is complete when it has its final name: it is built under
another and renamed. In the same way each part of the corpus is complete once its .json file stands beside its shards.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from lmobj.data._config import DataConfig
from lmobj.data._dataset import SPLITS, Dataset
from lmobj.data._shards import INDEX, ShardWriter, token_dtype
from lmobj.data._sources import Corpus, open_corpus
from lmobj.data._tokenizer import Tokenizer, train_tokenizer
from lmobj.errors import UserError

__all__ = ["prepare"]

_FORMAT = 1
"""Raised when the same inputs and settings would be stored otherwise."""
_PART_BYTES = 32 * 1024 * 1024
"""Text tokenised between two points that an interrupted preparation can continue from."""
_ENCODE_BYTES = 1024 * 1024
"""Text handed to the tokenizer's threads at once."""


def prepare(config: DataConfig, *, quiet: bool = False) -> Dataset:
    """Opens the data of `config`, tokenising it first if the cache does not hold it.

    Args:
      config: source, tokenizer, splits and cache.
      quiet: no progress bar.

    Raises:
      UserError: a file is missing, unreadable or not UTF-8; the corpus is empty or shorter than one row; a split is
        empty; the vocabulary does not fit the corpus; the cached data is damaged.
    """
    workers = config.workers or os.cpu_count() or 1
    corpus = open_corpus(config.source, workers)
    loaded = None if config.tokenizer.path is None else _load_tokenizer(config)
    settings = _settings(config, corpus, loaded)
    key = _digest(settings)
    folder = _cache_root(config) / key
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_name(key + ".lock"), quiet):
            if not folder.exists():  # another process may have built it while this one waited
                _build(config, corpus, loaded, settings, folder, workers, quiet)
    dataset = Dataset(folder)
    _check(config, dataset)
    return dataset


def _cache_root(config: DataConfig) -> Path:
    root = config.cache or os.environ.get("LMOBJ_CACHE") or "~/.cache/lmobj"
    return Path(root).expanduser() / "data"


def _load_tokenizer(config: DataConfig) -> Tokenizer:
    assert config.tokenizer.path is not None
    tokenizer = Tokenizer.load(Path(config.tokenizer.path).expanduser())
    size, asked = tokenizer.vocabulary.size, config.tokenizer.vocab_size
    if asked is not None and asked != size:
        raise UserError(
            f"data.tokenizer.vocab_size is {asked}, but the model {config.tokenizer.path} has {size} pieces; accepted: "
            f"{size}, or no vocab_size."
        )
    return tokenizer


def _settings(config: DataConfig, corpus: Corpus, loaded: Tokenizer | None) -> dict[str, Any]:
    """All that decides the prepared data, and nothing else: no paths, no times, no worker counts."""
    trained = config.tokenizer
    tokenizer: dict[str, Any] = {"digest": loaded.fingerprint} if loaded else {}
    if loaded is None:
        tokenizer = {
            "vocab_size": trained.trained_size,
            "model": trained.model,
            "character_coverage": trained.character_coverage,
            "sample_bytes": trained.sample_bytes,
        }
    return {
        "format": _FORMAT,
        "source": corpus.identity,
        "tokenizer": tokenizer,
        "validation": config.validation,
        "test": config.test,
    }


def _digest(value: Any) -> str:
    """blake2b of canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


@contextlib.contextmanager
def _lock(path: Path, quiet: bool) -> Iterator[None]:
    """One builder at a time; the system releases the lock when its process ends, however it ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not quiet:
                Console(stderr=True).print("another process is preparing this data; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write_json(path: Path, value: Any) -> None:
    """Writes under another name and renames, so that the file is whole or absent."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, sort_keys=True), encoding="utf-8")
    temporary.replace(path)


def _split_of(text: str, config: DataConfig) -> str:
    """The split of a document: where its hash falls in [0, 1)."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "little") / 2**64
    if place < config.test:
        return "test"
    return "validation" if place < config.test + config.validation else "train"


def _build(
    config: DataConfig,
    corpus: Corpus,
    loaded: Tokenizer | None,
    settings: dict[str, Any],
    folder: Path,
    workers: int,
    quiet: bool,
) -> None:
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(exist_ok=True)
    try:
        with _progress(quiet) as progress:
            tokenizer = loaded or _train(config, corpus, partial, progress)
            if loaded:
                loaded.save(partial / "tokenizer.model")
            parts = _tokenise(config, corpus, tokenizer, partial, workers, progress)
        _finish(settings, corpus, tokenizer, parts, partial)
    except UserError:
        shutil.rmtree(partial)  # the inputs or settings must change, so nothing in it will be used again
        raise
    partial.rename(folder)
    for path in itertools.chain(folder.glob("part-*.json"), folder.glob("*-[0-9]*-*.npy")):
        path.unlink()  # the manifest and the joined arrays hold all that they told


def _progress(quiet: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=quiet,
    )


def _train(config: DataConfig, corpus: Corpus, partial: Path, progress: Progress) -> Tokenizer:
    """The tokenizer trained on the training split, or the one an interrupted run already trained."""
    done = partial / "tokenizer.model"
    if done.exists():
        return Tokenizer.load(done)
    progress.add_task("training the tokenizer", total=None)
    texts = (text for text in corpus.documents() if _split_of(text, config) == "train")
    first = next(texts, None)
    if first is None:
        raise _no_training_text(corpus)
    tokenizer = train_tokenizer(config.tokenizer, itertools.chain([first], texts), corpus.size)
    temporary = partial / "tokenizer.tmp"
    tokenizer.save(temporary)
    temporary.replace(done)
    return tokenizer


def _no_training_text(corpus: Corpus) -> UserError:
    total = sum(1 for _ in corpus.documents())
    if total == 0:
        return UserError("data.source holds no text but blanks; accepted: at least one document with text in it.")
    return UserError(
        f"data.source has {total} documents, none of which fell into the training split; accepted: more documents "
        "(data.source.documents: blocks divides files at blank lines), or smaller data.validation and data.test."
    )


def _tokenise(
    config: DataConfig, corpus: Corpus, tokenizer: Tokenizer, partial: Path, workers: int, progress: Progress
) -> list[dict[str, Any]]:
    """Writes the shards, part by part; returns what each part's .json tells."""
    task = progress.add_task("tokenising", total=corpus.size)
    parts = []
    for number, texts in enumerate(_batched(corpus.documents(), _PART_BYTES)):
        record = partial / f"part-{number:05d}.json"
        part = _finished_part(record)
        if part is None:
            part = _write_part(config, tokenizer, texts, number, partial, workers)
            _write_json(record, part)
        parts.append(part)
        progress.advance(task, sum(split["bytes"] for split in part.values()))
    if not any("train" in part for part in parts):
        raise _no_training_text(corpus)
    return parts


def _batched(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """Lists of texts that hold `size` bytes or just over, in order."""
    batch: list[str] = []
    held = 0
    for text in texts:
        batch.append(text)
        held += len(text.encode())
        if held >= size:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _finished_part(record: Path) -> dict[str, Any] | None:
    """What an interrupted run wrote about a part, if its shards are as told there."""
    if not record.exists():
        return None
    part = json.loads(record.read_text(encoding="utf-8"))
    shards = [record.with_name(split["file"]) for split in part.values()]
    sizes = [split["size"] for split in part.values()]
    return part if [path.stat().st_size if path.exists() else -1 for path in shards] == sizes else None


def _write_part(
    config: DataConfig, tokenizer: Tokenizer, texts: list[str], number: int, partial: Path, workers: int
) -> dict[str, Any]:
    """Tokenises one part of the corpus into one shard per split that has documents in it."""
    writers: dict[str, ShardWriter] = {}
    dtype = token_dtype(tokenizer.vocabulary.size)
    for batch in _batched(texts, _ENCODE_BYTES):
        for text, tokens in zip(batch, tokenizer.encode_batch(batch, threads=workers), strict=True):
            if len(tokens) == 0:  # a loaded model may normalise a text to nothing
                continue
            split = _split_of(text, config)
            if split not in writers:
                writers[split] = ShardWriter(partial / _shard_name(split, number), dtype)
            writers[split].add(tokens, tokenizer.sentence_ends(tokens), len(text.encode()))
    return {split: _close_shard(writer, split, number, partial) for split, writer in sorted(writers.items())}


def _shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.arrayrecord"


def _close_shard(writer: ShardWriter, split: str, number: int, partial: Path) -> dict[str, Any]:
    index = writer.close()
    for name, values in index.items():
        np.save(partial / f"{split}-{number:05d}-{name}.npy", values, allow_pickle=False)
    path = partial / _shard_name(split, number)
    return {
        "file": path.name,
        "part": number,
        "size": path.stat().st_size,
        "digest": _file_digest(path),
        "records": writer.records,
        "documents": len(index["lengths"]),
        "tokens": int(index["lengths"].sum(dtype=np.int64)),
        "bytes": int(index["bytes"].sum()),
    }


def _finish(
    settings: dict[str, Any], corpus: Corpus, tokenizer: Tokenizer, parts: list[dict[str, Any]], partial: Path
) -> None:
    """Joins the parts' index arrays and writes the manifest."""
    splits: dict[str, Any] = {}
    files: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        shards = [part[split] for part in parts if split in part]
        for name, dtype in INDEX.items():
            arrays = [
                np.load(partial / f"{split}-{shard['part']:05d}-{name}.npy", allow_pickle=False) for shard in shards
            ]
            np.save(partial / f"{split}-{name}.npy", np.concatenate([np.zeros(0, dtype), *arrays]), allow_pickle=False)
            files[f"{split}-{name}.npy"] = {}
        files |= {shard["file"]: {"size": shard["size"], "digest": shard["digest"]} for shard in shards}
        splits[split] = {key: sum(shard[key] for shard in shards) for key in ("documents", "tokens", "bytes")}
        splits[split]["shards"] = [[shard["file"], shard["records"]] for shard in shards]
    files["tokenizer.model"] = {}
    for name, entry in files.items():
        if not entry:
            path = partial / name
            files[name] = {"size": path.stat().st_size, "digest": _file_digest(path)}
    manifest = {
        "format": _FORMAT,
        "fingerprint": _digest([settings, tokenizer.fingerprint]),
        "settings": settings,
        "splits": splits,
        "files": files,
        "skipped_files": corpus.skipped,
    }
    _write_json(partial / "manifest.json", manifest)


def _check(config: DataConfig, dataset: Dataset) -> None:
    """Refuses data that cannot be trained on as configured."""
    splits = dataset.summary()["splits"]
    tokens = splits["train"]["tokens"]
    if tokens < config.length:
        raise UserError(
            f"data.length is {config.length}, but the training split has {tokens} tokens in "
            f"{splits['train']['documents']} documents, less than one sequence; accepted: a length up to {tokens}, or "
            "more text."
        )
    if config.validation > 0 and splits["validation"]["documents"] == 0:
        total = sum(split["documents"] for split in splits.values())
        raise UserError(
            f"data.validation is {config.validation}, but none of the {total} documents fell into that share; "
            "accepted: more documents (data.source.documents: blocks divides files at blank lines), a larger share, 0."
        )
