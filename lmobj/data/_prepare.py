"""Prepares data once per (content, settings) and keeps it in a cache.

    <cache>/tokenizers/<key>.model   trained, per training text and settings
    <cache>/duplicates/<key>.npz     which documents are dropped as duplicates, per source and cleaning
    <cache>/data/<key>/              complete: manifest.json, tokenizer.model, token shards, index arrays
    <cache>/data/<key>.partial/      under construction; what is finished in it is used again after an interruption
    <cache>/data/<key>.lock          held by the process that builds

Each source of a mixture is prepared on its own, with the tokenizer that all share. The key is a digest of the inputs'
content, the settings (with the versions of the packages that clean and segment) and the tokenizer; so is the
fingerprint: two data sets with one fingerprint hold the same tokens. A folder is complete when it has its final name:
it is built under another and renamed. In the same way each part of a corpus is complete once its .json file stands
beside its shards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from lmobj._cache import cache_name, cache_root
from lmobj.data._augment import open_augmenter
from lmobj.data._cleaning import Cleaner
from lmobj.data._cleaning_config import CleaningConfig, SegmentationConfig
from lmobj.data._config import DataConfig
from lmobj.data._corpus import Corpus
from lmobj.data._dataset import Dataset
from lmobj.data._extras import versions
from lmobj.data._fill_in_middle import Rearrangement, open_rearrangement
from lmobj.data._finish import finish, sweep
from lmobj.data._parts import Work, digest_json, temporary_name
from lmobj.data._progress import progress_bar
from lmobj.data._runner import Runner, WorkerEndedError, run_here
from lmobj.data._sampling import train_on_sample
from lmobj.data._segmentation import Segmenter
from lmobj.data._source_config import MixtureSource, ReplaySource, SingleSource, WeightedSource
from lmobj.data._sources import open_corpus
from lmobj.data._task_source_config import TaskSource
from lmobj.data._tokenizer import Tokenizer
from lmobj.data._work import Selection, SignDocuments, WriteShards, decide_duplicates
from lmobj.errors import UserError

__all__ = ["load_tokenizer", "prepare"]

_FORMAT = 2
"""Raised when the same inputs and settings would be stored otherwise."""


def prepare(config: DataConfig, *, quiet: bool = False, beam: Sequence[str] | None = None) -> Dataset:
    """Opens the data of `config`, tokenising it first if the cache does not hold it.

    Args:
      config: source, cleaning, tokenizer, splits and cache.
      quiet: no progress bar.
      beam: options of an Apache Beam pipeline to do the work in, as ("--runner=FlinkRunner",); None: this machine. The
        cache must be a folder that all its workers see. What is prepared is the same, byte for byte.

    Raises:
      UserError: a file is missing, unreadable or not UTF-8; the corpus is empty or shorter than one row; a split is
        empty; the vocabulary does not fit the corpus; the cached data is damaged.
    """
    workers = config.workers or os.cpu_count() or 1
    run = run_here(workers)
    if beam is not None:
        from lmobj.data._beam import run_beam

        run = run_beam(beam, _cache_root(config))
    if isinstance(config.source, TaskSource):
        raise UserError(
            f"data.source.name is {config.source.name!r}, which has {config.source.holds}; accepted: a source of texts."
        )
    corpora, weights = _open_corpora(config, workers)
    with progress_bar(quiet) as progress:
        preparation = _Preparation(config, run, progress, quiet)
        tokenizer = preparation.tokenizer(list(corpora.values()))
        folders = {name: preparation.folder(corpus, tokenizer) for name, corpus in corpora.items()}
        whole = dataclasses.replace(config, validation=0.0, test=0.0, clean=config.clean.one_by_one)
        whole = dataclasses.replace(whole, augment=None, fill_in_middle=None)
        apart = _Preparation(whole, run, progress, quiet)
        held_out = {split: apart.folder(corpus, tokenizer) for split, corpus in _held_out(config, workers).items()}
    dataset = Dataset(folders, weights, held_out)
    _check(config, dataset)
    return dataset


def _open_corpora(config: DataConfig, workers: int) -> tuple[dict[str, Corpus], dict[str, float]]:
    """The corpora by the names of their sources (a single one has none), and their weights."""
    assert not isinstance(config.source, TaskSource)
    if not isinstance(config.source, MixtureSource):
        return {"": open_corpus(config.source, workers)}, {"": 1.0}
    sources = config.source.sources
    corpora = {
        name: open_corpus(_found(name, entry), workers, f"data.source.sources.{name}.source")
        for name, entry in sources.items()
    }
    return corpora, {name: entry.weight for name, entry in sources.items()}


def _found(name: str, entry: WeightedSource) -> SingleSource:
    """The source of an entry of a mixture. UserError for one that no earlier run has told."""
    if isinstance(entry.source, ReplaySource):
        raise UserError(
            f"data.source.sources.{name}.source.name is 'replay', and init.run names no run whose text that is; "
            "accepted: init.run=RUN in a config file or beside it."
        )
    return entry.source


def _held_out(config: DataConfig, workers: int) -> dict[str, Corpus]:
    """The corpora of the splits that have documents of their own."""
    return {
        split: open_corpus(source, workers, f"data.{split}")
        for split, source in config.held_out.items()
        if not isinstance(source, TaskSource)
    }


def _cache_root(config: DataConfig) -> Path:
    try:
        path = cache_root(config.cache)
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: no name that a folder can have
        raise UserError(
            f"data.cache is {cache_name(config.cache)!r}, which cannot be made ({error}); accepted: a folder in a "
            "place that can be written to."
        ) from error
    return path


class _Preparation:
    """The steps for one config: the tokenizer, then a folder per corpus."""

    def __init__(self, config: DataConfig, run: Runner, progress: Progress, quiet: bool):
        self._config, self._run, self._progress, self._quiet = config, run, progress, quiet
        self._cache = _cache_root(config)
        self._augmenter = None if config.augment is None else open_augmenter(config.augment)

    def tokenizer(self, corpora: list[Corpus]) -> Tokenizer:
        """The tokenizer that is loaded, or trained on the training text of all corpora."""
        if self._config.tokenizer.path is not None:
            return load_tokenizer(self._config)
        corpora = sorted(corpora, key=lambda corpus: digest_json(corpus.identity))
        settings = self._text_settings() | {
            "format": _FORMAT,
            "sources": [corpus.identity for corpus in corpora],
            "vocab_size": self._config.tokenizer.trained_size,
            "model": self._config.tokenizer.model,
            "character_coverage": self._config.tokenizer.character_coverage,
            "sample_bytes": self._config.tokenizer.sample_bytes,
            "control_pieces": self._config.tokenizer.control_pieces,
        }
        path = self._cache / "tokenizers" / f"{digest_json(settings)}.model"
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path.with_suffix(".lock"), self._quiet):
            if not path.exists():
                tokenizer = train_on_sample(
                    self._config.tokenizer,
                    [(corpus, self._selection(corpus)) for corpus in corpora],
                    lambda corpus, work: self._tracked("reading for the tokenizer", corpus, work),
                )
                _save(tokenizer, path)
        return Tokenizer.load(path)

    def folder(self, corpus: Corpus, tokenizer: Tokenizer) -> Path:
        """The prepared folder of a corpus; builds it if it is not there."""
        settings = self._text_settings() | {
            "format": _FORMAT,
            "source": corpus.identity,
            "tokenizer": tokenizer.fingerprint,
            "segment": _settings(self._config.segment),
        }
        moving = self._config.fill_in_middle
        rearrangement = None if moving is None else open_rearrangement(moving, tokenizer)
        if self._augmenter is not None:
            settings["augment"] = self._augmenter.identity
        if rearrangement is not None:
            settings["fill_in_middle"] = rearrangement.identity
        key = digest_json(settings)
        folder = self._cache / "data" / key
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _lock(folder.with_name(key + ".lock"), self._quiet):
                if not folder.exists():  # another process may have built it while this one waited
                    self._build(corpus, tokenizer, rearrangement, settings, folder)
        return folder

    def _text_settings(self) -> dict[str, Any]:
        """All that decides which text there is in which split, but the source."""
        config = self._config
        return {**config.shares._asdict(), "clean": _settings(config.clean)}

    def _selection(self, corpus: Corpus) -> Selection:
        """What is kept of a corpus. Finds its duplicates first, if they are to be dropped."""
        clean = self._config.clean
        Cleaner(clean).check()
        selection = Selection(self._config.shares, clean)
        if not clean.finds_duplicates:
            return selection
        settings = {"format": _FORMAT, "source": corpus.identity, "clean": _settings(clean)}
        path = self._cache / "duplicates" / f"{digest_json(settings)}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path.with_suffix(".lock"), self._quiet):
            if not path.exists():
                parts = self._tracked("looking for duplicates", corpus, SignDocuments(selection))
                decide_duplicates(clean, parts, path)
        return dataclasses.replace(selection, duplicates=path)

    def _build(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        rearrangement: Rearrangement | None,
        settings: dict[str, Any],
        folder: Path,
    ) -> None:
        partial = folder.with_name(folder.name + ".partial")
        partial.mkdir(exist_ok=True)
        try:
            Segmenter(self._config.segment, tokenizer)  # raises here what it would raise in the workers
            _save(tokenizer, partial / "tokenizer.model")
            segment = self._config.segment
            work = WriteShards(self._selection(corpus), segment, partial, self._augmenter, rearrangement)
            records = list(self._tracked("tokenising", corpus, work))
            finish(partial, records, settings, self._config.clean.steps, corpus.key)
        except WorkerEndedError:
            raise
        except UserError:
            shutil.rmtree(partial)  # the inputs or settings must change, so nothing in it will be used again
            raise
        partial.rename(folder)
        sweep(folder)

    def _tracked(self, description: str, corpus: Corpus, work: Work[Any]) -> Iterator[Any]:
        """The results of the work, with a bar that goes by the input read."""
        task = self._progress.add_task(description, total=corpus.size)
        with contextlib.closing(self._run(corpus, work)) as results:
            for done in results:
                self._progress.advance(task, done.read)
                yield done.result
        self._progress.remove_task(task)


def _settings(config: CleaningConfig | SegmentationConfig) -> dict[str, Any]:
    """The settings, and the versions of the packages that carry them out, which may do it otherwise from one to the
    next."""
    settings = dataclasses.asdict(config)
    return settings | {"versions": versions(config.packages)} if config.packages else settings


def load_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer in `data.tokenizer.path`. UserError if it is not of the size that is asked for."""
    assert config.tokenizer.path is not None
    tokenizer = Tokenizer.load(Path(os.path.expanduser(config.tokenizer.path)))
    asked = config.tokenizer.vocab_size
    if asked is not None and asked != tokenizer.size:
        raise UserError(
            f"data.tokenizer.vocab_size is {asked}, but the model {config.tokenizer.path} has {tokenizer.size} pieces; "
            f"accepted: {tokenizer.size}, or no vocab_size."
        )
    return tokenizer.extended(config.tokenizer.control_pieces)


def _save(tokenizer: Tokenizer, path: Path) -> None:
    tokenizer.save(temporary_name(path))
    temporary_name(path).replace(path)


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


def _check(config: DataConfig, dataset: Dataset) -> None:
    """Refuses data that cannot be trained on as configured."""
    summary = dataset.summary()
    splits = summary["splits"]
    if config.augment is not None:
        synonyms, paraphrases = config.augment.synonyms, config.augment.paraphrases
        files = {"synonyms": ("synonyms.file", synonyms and synonyms.file), "paraphrases": ("paraphrases", paraphrases)}
        for name in (name for name, count in summary["augmented"].items() if not count):
            raise UserError(
                f"data.augment.{files[name][0]} is {files[name][1]!r}, which gives no training document another "
                "wording; accepted: a table of what stands in them."
            )
    tokens = splits["train"]["tokens"]
    if tokens < config.length:
        raise UserError(
            f"data.length is {config.length}, but the training split has {tokens} tokens in "
            f"{splits['train']['documents']} documents, less than one sequence; accepted: a length up to {tokens}, or "
            "more text."
        )
    if config.shares.validation > 0 and splits["validation"]["documents"] == 0:
        total = sum(split["documents"] for split in splits.values())
        raise UserError(
            f"data.validation is {config.validation}, but none of the {total} documents fell into that share; "
            "accepted: more documents (data.source.documents: blocks divides files at blank lines), a larger share, 0."
        )
