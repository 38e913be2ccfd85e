"""A prepared folder: its manifest, checked against what lies there, and the tokens of its splits."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from lmobj.data._label_sets import names_of_set
from lmobj.data._parts import digest_file, digest_json
from lmobj.data._shards import TokenStore, damaged, token_dtype
from lmobj.data._tokenizer import Tokenizer
from lmobj.errors import UserError

__all__ = ["SPLITS", "Prepared"]

SPLITS = ("train", "validation", "test")

_ALWAYS_CHECKED_BYTES = 1 << 30
"""Shards are checked whole on opening up to this size together; beyond it ArrayRecord's own checks on reading serve."""


class Prepared:
    """Opens a folder that `prepare` wrote. Raises UserError naming what is damaged."""

    def __init__(self, folder: Path):
        self._folder = Path(folder)
        self.manifest = _read_manifest(self._folder)
        _verify(self._folder, self.manifest)
        self._stores: dict[str, TokenStore] = {}

    @property
    def fingerprint(self) -> str:
        """Digest of the inputs' content, the settings and the tokenizer: equal fingerprints, equal tokens."""
        fingerprint: str = self.manifest["fingerprint"]
        return fingerprint

    @property
    def label_kind(self) -> str | None:
        """What documents are labelled with, as `label_kind` of a source of records says; None: nothing."""
        label: list[str] | None = self.manifest["settings"]["source"].get("label")
        return None if label is None else label[1]

    @property
    def label_names(self) -> list[str]:
        """Names of the labels by their ids: of classes, or of sets of them; empty where labels are not stored by id."""
        names: list[str] = self.manifest.get("classes", [])
        return names

    @cached_property
    def classes(self) -> list[str]:
        """Names of the classes, in order; empty where the source has no such labels."""
        if self.label_kind == "classes":
            return sorted({name for one in self.label_names for name in names_of_set(one)})
        return self.label_names

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of this data."""
        return Tokenizer.load(self._folder / "tokenizer.model")

    def summary(self) -> dict[str, Any]:
        """What `Dataset.summary` tells of one source."""
        counts = ("documents", "tokens", "bytes")
        summary = {
            "skipped": self.manifest["skipped"],
            "splits": {name: {count: self.manifest["splits"][name][count] for count in counts} for name in SPLITS},
            "cleaning": self.manifest["cleaning"],
        }
        if "augmented" in self.manifest:
            summary["augmented"] = self.manifest["augmented"]
        return summary | {"classes": self.classes} if self.classes else summary

    def store(self, split: str) -> TokenStore:
        """The documents of a split."""
        if split not in SPLITS:
            raise UserError(f"the split is {split!r}; accepted: {', '.join(SPLITS)}.")
        if split not in self._stores:
            shards = [(name, records) for name, records in self.manifest["splits"][split]["shards"]]
            self._stores[split] = TokenStore(self._folder, split, shards, token_dtype(self.tokenizer.size))
        return self._stores[split]


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(folder, f"manifest.json cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.pop("digest", None) != digest_json(manifest):
        raise damaged(folder, "manifest.json does not match its checksum")
    return manifest


def _verify(folder: Path, manifest: dict[str, Any]) -> None:
    """Compares sizes, and checksums where that is quick, with the manifest."""
    small = sum(entry["size"] for entry in manifest["files"].values()) <= _ALWAYS_CHECKED_BYTES
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise damaged(folder, f"{name} is missing")
        if path.stat().st_size != entry["size"]:
            raise damaged(folder, f"{name} has {path.stat().st_size} bytes instead of {entry['size']}")
        if (small or not name.endswith(".arrayrecord")) and digest_file(path) != entry["digest"]:
            raise damaged(folder, f"{name} does not match its checksum")
