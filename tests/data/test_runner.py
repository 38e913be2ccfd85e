"""Work in several processes: what goes wrong in one of them, and a script that starts them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from data_corpus import generated_documents, write_blocks

from lmobj.data import _runner
from lmobj.data._corpus import Corpus, Document
from lmobj.data._inputs import Tally
from lmobj.data._parts import Part
from lmobj.data._runner import WorkerEndedError, run_here
from lmobj.errors import UserError


class OneDocument:
    """A group of one document."""

    size = 1

    def documents(self, tally: Tally) -> Iterator[Document]:
        yield Document("text")


class Failing:
    """Gives back the numbers of groups, but fails at the third."""

    def __init__(self, how: str):
        self.how = how

    def finished(self, group: int, index: int) -> None:
        return None

    def __call__(self, part: Part) -> int:
        if part.group == 2:
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise UserError("data.some is 3; accepted: 4.")
        return part.group


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("mistaken", UserError, r"^data\.some is 3; accepted: 4\.$"),
        (
            "killed",
            WorkerEndedError,
            r"^data\.workers is 2, and one .* ended from outside \(SIGKILL\(-9\)\), most.*\.$",
        ),
    ],
)
def test_what_ends_a_worker_is_told_once_and_clearly(monkeypatch, how, kind, message):
    monkeypatch.setattr(_runner, "_ALONE_BYTES", 0)
    corpus = Corpus({}, tuple(OneDocument() for _ in range(6)), "data.source")
    done = run_here(2)(corpus, Failing(how))
    with pytest.raises(UserError, match=message) as error:
        list(done)
    assert type(error.value) is kind
    assert "\n" not in str(error.value)


SCRIPT = """
import sys
print("begun")
from lmobj.data import DataConfig, SentencePieceConfig, TextFiles, _parts, _runner, prepare
_parts.PART_BYTES, _runner._ALONE_BYTES = 3000, 0
source = TextFiles(files=(sys.argv[1],), documents="blocks")
tokenizer = SentencePieceConfig(vocab_size=400)
config = DataConfig(source=source, tokenizer=tokenizer, length=16, cache=sys.argv[2], workers=2)
print(sum(split["documents"] for split in prepare(config, quiet=True).summary()["splits"].values()))
"""


def test_a_script_without_a_main_guard_may_use_workers(tmp_path: Path):
    corpus = write_blocks(tmp_path / "corpus.txt", generated_documents(60))
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(corpus), str(tmp_path / "cache")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "begun\n60\n", "")
