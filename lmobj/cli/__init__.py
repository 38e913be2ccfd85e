"""The command line: `lmobj`. Parses, builds from a config, calls; no logic lives here."""

from lmobj.cli._main import main

__all__ = ["main"]
