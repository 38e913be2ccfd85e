"""Writes lmobj/losses/README.md: every public loss with its formula and source, as its docstring has them.

    python tools/make_losses_page.py [--check]

With `--check` nothing is written, and it ends with 1 where the page is not what the docstrings give.
"""

from __future__ import annotations

import argparse
import inspect
import pathlib
import re
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from lmobj import losses

__all__ = ["PAGE", "Entry", "make_page", "public_entries"]

PAGE = pathlib.Path(losses.__file__).parent / "README.md"

_TITLES = {
    "_logit_stats": "One class among many",
    "_linear_token_nll": "Tokens straight from hidden states",
    "_linear_logit_stats": "Statistics of tokens straight from hidden states",
    "_linear_sample": "Samples straight from hidden states",
    "_binary": "Yes or no, and multi-label",
    "_focal": "Focal losses",
    "_regression": "Numbers",
    "_divergence": "Soft targets and distillation",
    "_contrastive": "One candidate among many",
    "_pairs": "Pairs",
    "_triplet": "Triplets",
    "_distances": "Distances of vectors",
}
"""Titles in the order of the page; a file that is missing here follows under its own name."""

_HEAD = """# Losses

<!-- Written by `python tools/make_losses_page.py` from the docstrings; a test compares. -->

Pure functions of arrays that need nothing of this package but JAX. Each gives **one value per element** (token, row or
pair), without mean, mask or ignored label: weigh, sum and divide as you like, and a mean over masked elements is

```python
import jax.numpy as jnp
from lmobj import losses

value = losses.token_nll(logits, targets)  # [B, L], nats
loss = (value * mask).sum() / jnp.maximum(mask.sum(), 1)
```

Everything is computed in float32 at least, whatever comes in, with finite values and gradients for logits of ±10,000.
A target that is no class has a loss of +inf, and 0 times that is NaN: replace it where the mask is 0. Variants are
functions of their own. The docstrings tell shapes and ranges.
"""


@dataclass(frozen=True)
class Entry:
    """What the page says of one public name."""

    name: str
    file: str
    signature: str
    summary: str
    formula: str
    """Empty where the docstring has no indented block before its first section."""
    source: str
    """Empty where the docstring has no `Source:`."""

    @property
    def anchor(self) -> str:
        return re.sub(r"[^a-z0-9_-]", "", self.name.lower())


def public_entries() -> list[Entry]:
    """One for each name in `losses.__all__`."""
    return [_entry(name, getattr(losses, name)) for name in losses.__all__]


def make_page() -> str:
    """The page's text."""
    entries = public_entries()
    files = sorted({entry.file for entry in entries}, key=_place)
    groups = {file: [entry for entry in _in_order(file) if entry.file == file] for file in files}
    parts = [_HEAD, "| | |\n|---|---|"]
    for file, group in groups.items():
        links = " · ".join(f"[`{entry.name}`](#{entry.anchor})" for entry in group)
        parts.append(f"| {_title(file)} | {links} |")
    parts.append("")
    for file, group in groups.items():
        parts.append(f"## {_title(file)}\n\n[{file}.py]({file}.py)\n")
        if about := inspect.getdoc(_module(file)):
            parts.append(f"{about}\n")
        parts.extend(_section(entry) for entry in group)
    return "\n".join(parts).rstrip() + "\n"


def _section(entry: Entry) -> str:
    lines = [f"### {entry.name}\n", f"{entry.summary}\n", f"`{entry.name}{entry.signature}`\n"]
    if entry.formula:
        lines.append(f"```text\n{entry.formula}\n```\n")
    if entry.source:
        lines.append(f"*Source:* {entry.source}\n")
    return "\n".join(lines)


def _entry(name: str, thing: Any) -> Entry:
    text = inspect.getdoc(thing) or ""
    body = re.split(r"^(?:Args|Returns|Raises|Source):", text, maxsplit=1, flags=re.MULTILINE)[0]
    blocks = re.split(r"\n\n+", body.strip())
    formula = next((inspect.cleandoc(block) for block in blocks[1:] if block.startswith("    ")), "")
    source = re.search(r"^Source: (.*?)(?:\n\n|\Z)", text, re.DOTALL | re.MULTILINE)
    return Entry(
        name,
        thing.__module__.rpartition(".")[2],
        _signature(thing),
        " ".join(blocks[0].split()),
        formula,
        " ".join(source[1].split()) if source else "",
    )


def _signature(thing: Any) -> str:
    """Names and defaults, without types: (logits, targets, *, gamma=2.0)."""
    given = inspect.signature(thing)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in given.parameters.values()]
    return str(given.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def _module(file: str) -> ModuleType:
    return sys.modules[f"{losses.__name__}.{file}"]


def _in_order(file: str) -> list[Entry]:
    """The public entries that a file defines, in its order."""
    names = [name for name in vars(_module(file)) if name in losses.__all__]
    return [_entry(name, getattr(losses, name)) for name in names]


def _title(file: str) -> str:
    return _TITLES.get(file, file)


def _place(file: str) -> tuple[int, str]:
    return list(_TITLES).index(file) if file in _TITLES else len(_TITLES), file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 where the page is not current")
    page = make_page()
    if not parser.parse_args().check:
        PAGE.write_text(page, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page:
        raise SystemExit(f"{PAGE} is not what the docstrings give: python tools/make_losses_page.py")


if __name__ == "__main__":
    main()
