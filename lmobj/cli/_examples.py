"""Files of prompts and of examples for `generate`: JSON Lines, tab-separated values, or a text per line; and the
options that make a task of them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lmobj.errors import UserError
from lmobj.evaluate import Answers, FewShot, Shot

__all__ = ["few_shot", "read_prompts", "read_shots", "tell_left_out"]


def few_shot(
    examples: Path | None, shots: int | None, instruction: str | None, template: str | None, separator: str | None
) -> tuple[FewShot, list[Shot]] | None:
    """The task that the options of `generate` describe, and its examples; None if none of them is given.

    Raises:
      UserError: --shots without examples, or an option or file that cannot be used.
    """
    given = {"template": template, "separator": separator, "instruction": instruction}
    settings = {name: _unescaped(value) for name, value in given.items() if value is not None}
    if examples is None:
        if shots is not None:
            raise UserError(f"--shots is {shots}, and there are no examples; accepted: together with --examples FILE.")
        return (FewShot(**settings), []) if settings else None
    return FewShot(**settings), read_shots(examples)


def tell_left_out(queries: Sequence[str], answers: Answers) -> None:
    """Says on stderr, away from the answers, which prompts have fewer examples than they were to have."""
    for query, asked, shown in zip(queries, answers.asked, answers.shown, strict=True):
        if shown < asked:
            print(f"{query!r}: {shown} of {asked} examples fit before it into what the model can read", file=sys.stderr)


def read_shots(path: Path) -> list[Shot]:
    """Examples: objects with `input` and `output` (.jsonl), or else two columns with a tab between; no header.

    Empty lines are nothing, and quotation marks are text like any other.

    Raises:
      UserError: a file that cannot be read, a line that is no example, or no example at all.
    """
    shots = []
    for where, line in _lines(path):
        if path.suffix == ".jsonl":
            row = _parsed(where, line)
            shots.append(Shot(_field(where, row, "input"), _field(where, row, "output")))
        else:
            columns = line.split("\t")
            if len(columns) != 2:
                raise UserError(
                    f"{where} has {len(columns)} columns; accepted: an input and an output with a tab between, or a "
                    '.jsonl file of {"input": ..., "output": ...}.'
                )
            shots.append(Shot(*columns))
    return _some(shots, path, "example")


def read_prompts(path: Path) -> list[str]:
    """Prompts: `input` of objects, or texts (.jsonl); the first column (.tsv); or else a line each.

    Raises:
      UserError: a file that cannot be read, a line that is no prompt, or no prompt at all.
    """
    prompts = []
    for where, line in _lines(path):
        if path.suffix == ".jsonl":
            row = _parsed(where, line)
            prompts.append(_text(where, row) if isinstance(row, str) else _field(where, row, "input"))
        else:
            prompts.append(line.split("\t")[0] if path.suffix == ".tsv" else line)
    return _some(prompts, path, "prompt")


def _unescaped(text: str) -> str:
    r"""The text of an option, in which \n is a line break, \t a tab and \\ a backslash."""
    breaks = {"n": "\n", "t": "\t", "\\": "\\"}
    out, characters = [], iter(text)
    for character in characters:
        following = next(characters, "") if character == "\\" else None
        out.append(character if following is None else breaks.get(following, "\\" + following))
    return "".join(out)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(place, line) of every line that is not empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text at byte {error.start}; accepted: a file in UTF-8.") from error
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if line.strip():
            yield f"{path}:{number}", line


def _parsed(where: str, line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}.") from error


def _field(where: str, row: object, name: str) -> str:
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, str):
        raise UserError(
            f"{where} has no text {name!r}; accepted: an object such as " + '{"input": "2 + 2", "output": "4"}.'
        )
    return _text(where, value)


def _text(where: str, value: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in value):  # which JSON can spell, and UTF-8 cannot
        raise UserError(
            f"{where} has half of a surrogate pair in it, which is no character; accepted: whole characters."
        )
    return value


def _some(entries: list[Any], path: Path, what: str) -> list[Any]:
    if not entries:
        raise UserError(f"{path} holds no {what}; accepted: a file with at least one.")
    return entries
