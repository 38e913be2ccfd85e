"""Mutants: small, deliberate errors that the tests must notice.

    MUTANTS = [
        Mutant("target shifted by two", _causal_lm, "ahead", lambda f: lambda x, places=1: f(x, 2 * places)),
        Mutant("no epsilon", MaskedLM, "epsilon", lambda _: {}),
    ]

    @pytest.mark.parametrize("mutant", MUTANTS, ids=str)
    def test_mutants_are_noticed(monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> None:
        assert_killed(monkeypatch, mutant, CHECKS)

where CHECKS are functions without arguments, cheap ones first: tests of the same file, so that they are known to pass
without a mutant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

__all__ = ["Mutant", "assert_killed"]


@dataclass(frozen=True)
class Mutant:
    """One error: `target.attribute` becomes `replacement(the original)`.

    target: a module or a class. A function is patched where it is looked up: the module that imported it by name.
    attribute: a function, method, property or class variable of the target.
    """

    name: str
    target: Any
    attribute: str
    replacement: Callable[[Any], Any]

    def __str__(self) -> str:
        return self.name


def assert_killed(monkeypatch: pytest.MonkeyPatch, mutant: Mutant, checks: Sequence[Callable[[], None]]) -> None:
    """Passes if at least one check fails under the mutant; a mutant that breaks with another error is no mutant.

    Checks must compile what they call anew, or the mutant would not be in it: no cached compiled functions.
    """
    with monkeypatch.context() as patch:
        patch.setattr(mutant.target, mutant.attribute, mutant.replacement(getattr(mutant.target, mutant.attribute)))
        for check in checks:
            try:
                check()
            except (AssertionError, pytest.fail.Exception):
                return
    raise AssertionError(f"{mutant} is noticed by none of {[_name(check) for check in checks]}")


def _name(check: Callable[[], None]) -> str:
    return getattr(check, "__name__", repr(check))
