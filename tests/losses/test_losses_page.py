"""The page of losses is what the docstrings give, and every public loss has a summary, a formula and a source."""

from __future__ import annotations

import inspect
import pathlib
import re

import make_losses_page
import pytest
from make_losses_page import PAGE, Entry

from lmobj import losses

ENTRIES = make_losses_page.public_entries()
FUNCTIONS = [entry for entry in ENTRIES if inspect.isfunction(getattr(losses, entry.name))]


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == make_losses_page.make_page(), "run: python tools/make_losses_page.py"


@pytest.mark.parametrize("entry", FUNCTIONS, ids=lambda entry: entry.name)
def test_docstrings_are_complete(entry: Entry) -> None:
    function = getattr(losses, entry.name)
    text = inspect.getdoc(function)
    assert re.fullmatch(r"[^\n]+\.", entry.summary)
    assert entry.formula
    assert re.search(r"\d{4}|`|definition", entry.source), f"{entry.name} has no source: {entry.source}"
    arguments = re.search(r"^Args:\n(.*?)(?:\n\n|\Z)", text, re.DOTALL | re.MULTILINE)
    assert arguments
    for name in inspect.signature(function).parameters:
        assert re.search(rf"^  (?:\w+, )*{name}(?:, \w+)*:", arguments[1], re.MULTILINE), f"{entry.name}: {name}?"
    if "raise UserError" in inspect.getsource(function) or "_check" in inspect.getsource(function):
        assert "\nRaises:\n  UserError: " in text


def test_other_entries_are_types_with_a_summary() -> None:
    others = [entry for entry in ENTRIES if entry not in FUNCTIONS]
    assert [entry.name for entry in others] == ["LogitStats"]
    assert others[0].summary


def test_every_loss_is_on_the_page_once_and_links_lead_somewhere() -> None:
    page = PAGE.read_text(encoding="utf-8")
    titles = re.findall(r"^### (\w+)$", page, re.MULTILINE)
    assert sorted(titles) == sorted(losses.__all__)
    for anchor in re.findall(r"\]\(#(.*?)\)", page):
        assert anchor in {title.lower() for title in titles}
    files = re.findall(r"\]\((\w+\.py)\)", page)
    assert files
    assert all((PAGE.parent / file).exists() for file in files)


def test_a_formula_or_a_source_that_is_missing_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(losses.nll, "__doc__", "Minus a logarithm.\n\n    Args:\n      stats: some.\n")
    entry = next(entry for entry in make_losses_page.public_entries() if entry.name == "nll")
    assert (entry.formula, entry.source) == ("", "")
    assert PAGE.read_text(encoding="utf-8") != make_losses_page.make_page()
