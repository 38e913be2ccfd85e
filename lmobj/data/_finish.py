"""Completes a prepared folder: joins what the parts left into one array per split, and writes the manifest."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmobj.data._cleaning import Counts, add_counts
from lmobj.data._parts import digest_file, digest_json, write_json
from lmobj.data._prepared import SPLITS
from lmobj.data._shard_writer import INDEX, OPTIONAL, pack_bits
from lmobj.errors import UserError

__all__ = ["finish", "no_training_text", "sweep"]


def finish(
    folder: Path,
    records: Sequence[dict[str, Any]],
    settings: dict[str, Any],
    cleaning_steps: Sequence[str],
    key: str,
) -> None:
    """Joins the index arrays of a corpus's parts, and writes manifest.json.

    Args:
      folder: what `WriteShards` filled.
      records: the parts' records in order.
      settings: what decided the data; kept in the manifest, and their digest is the fingerprint.
      cleaning_steps: the steps that were switched on, in order.
      key: the setting that holds the source, for messages.

    Raises:
      UserError: no document fell into the training split.
    """
    if not any("train" in record["splits"] for record in records):
        documents = sum(split["documents"] for record in records for split in record["splits"].values())
        raise no_training_text(documents, key)
    classes = sorted({name for record in records for name in record["classes"]})
    cleaning: Counts = {step: {"changed": 0, "dropped": 0, "bytes": 0} for step in cleaning_steps}
    for record in records:
        add_counts(cleaning, record["cleaning"])
    splits: dict[str, Any] = {}
    files: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        shards = [record["splits"][split] for record in records if split in record["splits"]]
        arrays = _joined(folder, split, records, classes)
        for name, values in arrays.items():
            np.save(folder / f"{split}-{name}.npy", values, allow_pickle=False)
            files[f"{split}-{name}.npy"] = {}
        files |= {shard["file"]: {"size": shard["size"], "digest": shard["digest"]} for shard in shards}
        splits[split] = {key: sum(shard[key] for shard in shards) for key in ("documents", "tokens", "bytes")}
        splits[split]["shards"] = [[shard["file"], shard["records"]] for shard in shards]
    files["tokenizer.model"] = {}
    for name, entry in files.items():
        if not entry:
            files[name] = {"size": (folder / name).stat().st_size, "digest": digest_file(folder / name)}
    manifest = {
        "format": settings["format"],
        "fingerprint": digest_json(settings),
        "settings": settings,
        "splits": splits,
        "files": files,
        "skipped": sum(record["skipped"] for record in records),
        "cleaning": cleaning,
    }
    if classes:
        manifest["classes"] = classes
    augmented = Counter[str]()
    for record in records:
        augmented.update(record.get("augmented", {}))
    if augmented:
        manifest["augmented"] = dict(augmented)
    write_json(folder / "manifest.json", manifest | {"digest": digest_json(manifest)})


def sweep(folder: Path) -> None:
    """Removes what only a restart needed."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for path in folder.iterdir():
        if path.name not in manifest["files"] and path.name != "manifest.json":
            path.unlink()


def no_training_text(documents: int, key: str = "data.source") -> UserError:
    """The error for a corpus without documents, or with none to train on."""
    if documents == 0:
        return UserError(
            f"{key} holds no text but blanks, or data.clean (or a model that normalises, as data.tokenizer.path may "
            "name) leaves none of it; accepted: at least one document with text in it."
        )
    return UserError(
        f"{key} has {documents} documents, none of which fell into the training split; accepted: more documents "
        f"({key}.documents: blocks divides text files at blank lines), or smaller data.validation and data.test."
    )


def _joined(folder: Path, split: str, records: Iterable[dict[str, Any]], classes: list[str]) -> dict[str, NDArray]:
    """The index arrays of a split, its parts end to end. Optional ones only where there are documents with them."""
    parts: dict[str, list[NDArray]] = {name: [np.zeros(0, dtype)] for name, dtype in INDEX.items()}
    parts |= {name: [] for name in OPTIONAL}
    id_of = {name: number for number, name in enumerate(classes)}
    bits = _Bits()
    for record in records:
        if split not in record["splits"]:
            continue
        ids = np.array([id_of[name] for name in record["classes"]], np.int32)
        with np.load(folder / record["splits"][split]["index"], allow_pickle=False) as index:
            for name in index.files:
                values = index[name]
                if name == "word_starts":
                    bits.append(values, record["splits"][split]["tokens"])
                elif name == "labels" and len(ids):
                    parts[name].append(ids[values])
                else:
                    parts[name].append(values)
    if bits.parts:
        parts["word_starts"] = bits.close()
    return {name: np.concatenate(arrays) for name, arrays in parts.items() if arrays}


class _Bits:
    """Packed bits of several parts, end to end."""

    def __init__(self) -> None:
        self.parts: list[NDArray[np.uint8]] = []
        self._rest = np.zeros(0, np.bool_)

    def append(self, packed: NDArray[np.uint8], count: int) -> None:
        """Adds the first `count` of packed bits."""
        bits = np.concatenate([self._rest, np.unpackbits(packed, count=count, bitorder="little").astype(np.bool_)])
        whole = len(bits) - len(bits) % 8
        self.parts.append(pack_bits(bits[:whole]))
        self._rest = bits[whole:]

    def close(self) -> list[NDArray[np.uint8]]:
        """All of them."""
        return [*self.parts, pack_bits(self._rest)]
