"""Writes the made-up data of the configs in configs/tiny into this folder, as their headers say.

    python tools/make_tiny_data.py                                  # all of it
    python tools/make_tiny_data.py configs/tiny/extractive_qa.yaml  # what one config reads

A header has a script between `python -c '` and `' > FILE`. It is run with a fixed seed: everyone has the same data.
"""

from __future__ import annotations

import contextlib
import io
import pathlib
import random
import re
import sys
import textwrap
from collections.abc import Iterator

CONFIGS = pathlib.Path(__file__).parent.parent / "configs" / "tiny"


def header_scripts(config: pathlib.Path) -> Iterator[tuple[str, str]]:
    """(script, name of the file that it writes) of a config's header."""
    lines = config.read_text(encoding="utf-8").splitlines()
    header = "\n".join(line.removeprefix("#") for line in lines if line.startswith("#"))
    for script, file in re.findall(r"python -c '\n(.*?)\n *' > (\S+)", header, re.DOTALL):
        yield textwrap.dedent(script), file


def write_data(config: pathlib.Path, folder: pathlib.Path) -> list[pathlib.Path]:
    """Runs what a config's header says, and writes its files into a folder."""
    written = []
    for script, file in header_scripts(config):
        text = io.StringIO()
        random.seed(0)
        with contextlib.redirect_stdout(text):
            exec(script, {})
        path = folder / file
        path.write_text(text.getvalue(), encoding="utf-8")
        written.append(path)
    return written


def main() -> None:
    """Of the configs given, or of all."""
    for config in [pathlib.Path(name) for name in sys.argv[1:]] or sorted(CONFIGS.glob("*.yaml")):
        for path in write_data(config, pathlib.Path()):
            print(path)


if __name__ == "__main__":
    main()
