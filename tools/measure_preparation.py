"""Measures how text is prepared: memory, throughput beside bare SentencePiece, and what a kill costs.

    python tools/measure_preparation.py                       1 GB as JSON Lines and as plain text, some 20 minutes
    python tools/measure_preparation.py --megabytes 60        a smaller corpus

The text is generated: words of the standard library's documentation by their frequency there, in lines of 6 to 16,
documents of 10 to 60 lines. The tokenizer is trained on a little of it beforehand and given by path.

throughput   bytes of text by the wall time of a process that calls `prepare`, start and imports included
bare         bytes by the wall time of `sp.encode` alone on text already in memory: as one list with a thread per
             core, and in as many processes as cores, each with its share; the faster counts. Before and after
memory       resident memory of that process and its workers added up, sampled every 250 ms: the largest sum. Pages that
             they share count for each
kill         the process is killed (SIGKILL) once a third of the parts is finished, and started again: the parts that it
             had finished must stay as they were, and the result must be that of the run that was not killed

The last line of the output holds everything as JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lmobj.data import DataConfig, JsonLines, SentencePieceConfig, StdlibSource, TextFiles, prepare
from lmobj.data._sources import open_corpus
from lmobj.data._tokenizer import train_tokenizer

MB = 10**6
_BLOCK_WORDS = 2_000_000


def generate(size: int, seed: int = 0) -> Iterator[str]:
    """Documents that hold `size` bytes together."""
    texts = (document.text for document in open_corpus(StdlibSource(), 1).documents())
    counts = Counter(word for text in texts for word in text.split() if word.isascii())
    words = np.array(list(counts), object)
    bounds = np.cumsum(np.array(list(counts.values()), np.float64))
    draw = np.random.default_rng(seed)
    made = 0
    while made < size:
        ranks = np.searchsorted(bounds, draw.random(_BLOCK_WORDS) * bounds[-1])
        chosen = iter(words[np.minimum(ranks, len(words) - 1)].tolist())
        lines = []
        for count in draw.integers(6, 17, _BLOCK_WORDS // 17).tolist():
            lines.append(" ".join(next(chosen) for _ in range(count)) + ".")
        start = 0
        while start + 60 <= len(lines) and made < size:
            count = int(draw.integers(10, 61))
            yield (text := "\n".join(lines[start : start + count]))
            made += len(text)
            start += count


def write_corpus(path: Path, kind: str, size: int) -> int:
    """Writes a corpus; returns the bytes of text in it."""
    held = 0
    with path.open("w", encoding="utf-8") as file:
        for text in generate(size):
            file.write(json.dumps({"text": text}) + "\n" if kind == "jsonl" else text + "\n\n")
            held += len(text)
    return held


def config(kind: str, corpus: Path, model: Path, cache: Path, workers: int) -> DataConfig:
    """Settings to prepare the corpus with."""
    files = (str(corpus),)
    source = JsonLines(files=files) if kind == "jsonl" else TextFiles(files=files, documents="blocks")
    return DataConfig(source, SentencePieceConfig(path=str(model)), cache=str(cache), workers=workers)


def bare(model: Path, size: int, workers: int) -> float:
    """MB/s of `sp.encode` alone, by the faster of its threads and processes."""
    import sentencepiece

    texts = list(generate(size, seed=1))
    held = sum(map(len, texts))
    start = time.perf_counter()
    sentencepiece.SentencePieceProcessor(model_file=str(model)).encode(texts, num_threads=workers)
    threads = held / (time.perf_counter() - start)
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(workers + 1)
    shares = [(model, texts[number::workers], ready) for number in range(workers)]
    processes = [context.Process(target=_encode_share, args=share) for share in shares]
    for process in processes:
        process.start()
    ready.wait()
    start = time.perf_counter()
    ready.wait()
    spread = held / (time.perf_counter() - start)
    for process in processes:
        process.join()
    print(
        f"bare SentencePiece: {threads / MB:.2f} MB/s in {workers} threads, {spread / MB:.2f} in processes", flush=True
    )
    return max(threads, spread) / MB


def _encode_share(model: Path, texts: list[str], ready: Any) -> None:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    ready.wait()
    processor.encode(texts, num_threads=1)
    ready.wait()


class Child:
    """A process that prepares, watched."""

    def __init__(self, *arguments: str):
        self.started = time.perf_counter()
        self.process = subprocess.Popen([sys.executable, __file__, "--child", *arguments])
        self.peak = 0
        self.largest: list[int] = []

    def watch(self) -> bool:
        """Samples the memory; whether the process still runs. Rarely enough to leave the cores to it."""
        time.sleep(0.25)
        resident = [_resident(pid) for pid in _family(self.process.pid)]
        if sum(resident) > self.peak:
            self.peak, self.largest = sum(resident), resident
        return self.process.poll() is None

    def finish(self) -> float:
        """Watches it to its end; seconds since its start."""
        while self.watch():
            pass
        if self.process.returncode:
            raise SystemExit(f"the preparation ended with {self.process.returncode}")
        return time.perf_counter() - self.started


def _family(root: int) -> list[int]:
    """A process and all below it."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:  # ended meanwhile
                continue
            parents.setdefault(parent, []).append(int(entry.name))
    family = [root]
    for pid in family:
        family.extend(parents.get(pid, ()))
    return family


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def folder_of(cache: Path) -> Path:
    """The one prepared folder in a cache, complete or not."""
    (folder,) = (path for path in cache.glob("data/*") if path.is_dir())
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Digests of the files of a folder."""
    return {path.name: hashlib.blake2b(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of writing of the shards of finished parts."""
    finished = [json.loads(path.read_text()) for path in folder.glob("part-*.json")]
    files = [split["file"] for record in finished for split in record["splits"].values()]
    return {name: ((stat := (folder / name).stat()).st_ino, stat.st_mtime_ns) for name in files}


def killed_and_continued(arguments: list[str], cache: Path, parts: int) -> dict[str, Any]:
    """Kills a preparation after a third of its parts, and starts it again."""
    child = Child(*arguments)
    while child.watch() and len(list(cache.glob("data/*.partial/part-*.json"))) < max(1, parts // 3):
        pass
    family = _family(child.process.pid)
    os.kill(child.process.pid, signal.SIGKILL)
    child.process.wait()
    killed = time.perf_counter()
    while any(Path(f"/proc/{pid}").exists() for pid in family):
        time.sleep(0.05)
    alone = time.perf_counter() - killed
    finished, before = len(list(cache.glob("data/*.partial/part-*.json"))), stamps(folder_of(cache))
    seconds = Child(*arguments).finish()
    after = {name: ((stat := (folder_of(cache) / name).stat()).st_ino, stat.st_mtime_ns) for name in before}
    redone = sum(after[name] != stamp for name, stamp in before.items())
    return {
        "parts": parts,
        "finished when killed": finished,
        "their shards": len(before),
        "shards redone": redone,
        "workers outlived it by s": round(alone, 2),
        "seconds to continue": round(seconds, 1),
    }


def measure(kind: str, size: int, folder: Path, model: Path, workers: int, bare_size: int) -> dict[str, Any]:
    """All figures for one kind of file."""
    corpus = folder / f"corpus.{kind}"
    held = write_corpus(corpus, kind, size)
    print(f"{kind}: {held / MB:.0f} MB of text", flush=True)
    before = bare(model, bare_size, workers)
    arguments = [kind, str(corpus), str(model)]
    child = Child(*arguments, str(folder / f"{kind}-whole"), str(workers))
    seconds = child.finish()
    after = bare(model, bare_size, workers)
    shards = json.loads((folder_of(folder / f"{kind}-whole") / "manifest.json").read_text())["splits"]["train"][
        "shards"
    ]
    cache = folder / f"{kind}-killed"
    continued = killed_and_continued([*arguments, str(cache), str(workers)], cache, len(shards))
    same = contents(folder_of(cache)) == contents(folder_of(folder / f"{kind}-whole"))
    rate = held / seconds / MB
    return {
        "text MB": round(held / MB, 1),
        "seconds": round(seconds, 1),
        "MB/s": round(rate, 2),
        "bare MB/s before, after": [round(before, 2), round(after, 2)],
        "share of bare": round(rate / max(before, after), 3),
        "peak MiB": round(child.peak / 2**20),
        "peak MiB by process": [round(resident / 2**20) for resident in child.largest],
        "kill": {**continued, "same bytes as without": same},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=1000, help="of text in each corpus (10**6 bytes)")
    parser.add_argument("--formats", nargs="+", choices=("jsonl", "text"), default=("jsonl", "text"))
    parser.add_argument("--vocab", type=int, default=32_000, help="pieces of the tokenizer")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--bare", type=float, default=60, help="megabytes that bare SentencePiece is timed on")
    parser.add_argument("--folder", help="where the corpora are written; by default a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        model = folder / "tokenizer.model"
        size = min(8 * MB, int(options.megabytes * MB))
        train_tokenizer(SentencePieceConfig(vocab_size=options.vocab), generate(size)).save(model)
        figures = {
            kind: measure(kind, int(options.megabytes * MB), folder, model, options.workers, int(options.bare * MB))
            for kind in options.formats
        }
    for kind, found in figures.items():
        print(f"\n{kind}")
        for label, value in found.items():
            print(f"  {label:<26} {value}")
    print("\n" + json.dumps(figures))


def child() -> None:
    kind, corpus, model, cache, workers = sys.argv[2:]
    prepare(config(kind, Path(corpus), Path(model), Path(cache), int(workers)), quiet=True)


if __name__ == "__main__":
    child() if sys.argv[1:2] == ["--child"] else main()
