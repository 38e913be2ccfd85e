"""Groups of runs on the command line: folders, patterns, and their names."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand

from lmobj.errors import UserError

__all__ = ["SeveralValues", "found_runs", "group_names"]


class SeveralValues(TyperCommand):
    """A command whose option `--with` takes all values up to the next option, as a shell leaves a pattern's matches."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Spells the option out before each of its values."""
        spelled: list[str] = []
        inside = False
        for index, argument in enumerate(args):
            if argument.startswith("-"):
                inside = argument == "--with" or argument.startswith("--with=")
            elif inside and args[index - 1] != "--with":
                spelled.append("--with")
            spelled.append(argument)
        return super().parse_args(ctx, spelled)


def found_runs(patterns: Sequence[str], option: str) -> list[str]:
    """Run folders by their paths, URLs and patterns (`runs/base_*`), each once; patterns find folders alone."""
    runs: list[str] = []
    for pattern in patterns:
        if "://" in pattern or os.path.lexists(pattern) or not glob.has_magic(pattern):
            runs.append(pattern)
            continue
        matches = sorted(filter(os.path.isdir, glob.glob(pattern)))
        if not matches:
            raise UserError(f"{option} is {pattern!r}, which no folder matches; accepted: run folders.")
        runs += matches
    return list(dict.fromkeys(runs))


def group_names(groups: Sequence[Sequence[str]], given: Sequence[str]) -> list[str]:
    """The names given; else that of a group's folders without their seeds, or a letter where that tells nothing."""
    if len(given) > len(groups) or len(set(given)) < len(given) or not all(given):
        raise UserError(
            f"--name is {', '.join(map(repr, given))}, and there are {len(groups)} groups of runs; accepted: a name "
            "for each, no two alike."
        )
    names = list(given)
    for runs in groups[len(given) :]:
        folders = [os.path.basename(run.rstrip("/")) for run in runs]
        common = {re.sub(r"[-_.]*(seed)?[-_.]*\d*$", "", folder) for folder in folders} if len(runs) > 1 else {*folders}
        letter = next(letter for letter in "AB" if letter not in names)
        names.append(common.pop() if len(common) == 1 and not common & {"", *names} else letter)
    return names
