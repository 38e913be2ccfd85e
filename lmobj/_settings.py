"""Plain mappings to settings dataclasses and back: strict, and with errors that say what would be accepted.

Sections are dataclasses; alternatives are unions of dataclasses told apart by `name`. The tree is walked here, so that
every error knows its dotted key, and each leaf is checked by pydantic in strict mode: a bool or a float never becomes
an int, nor text a number. Ranges are checked by the dataclasses themselves, in `__post_init__`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import enum
import functools
import inspect
import itertools
import json
import pathlib
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import pydantic

from lmobj._yaml import Document, show
from lmobj.errors import UserError

__all__ = ["build", "field_docs", "plain"]

T = TypeVar("T")


def build(kind: type[T], document: Document, source: str) -> T:
    """The dataclass `kind` with a document's settings; `source` is named in errors about keys written nowhere.

    Raises:
      UserError: an unknown key, a missing one, a value of the wrong type, or one that the dataclass refuses.
    """
    return _Builder(kind, document.origins, source).value(kind, document.values, "")


def plain(value: Any) -> Any:
    """Settings as mappings, lists and scalars, complete with defaults."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    return str(value) if isinstance(value, pathlib.PurePath) else value


@dataclasses.dataclass(frozen=True)
class _Builder:
    """One walk over (type, value), with what its errors need."""

    root: Any
    origins: Mapping[str, str]
    source: str

    def value(self, kind: Any, value: Any, path: str) -> Any:
        """`value` as `kind`: sections by name, containers item by item where they hold sections, leaves by pydantic."""
        if isinstance(value, Mapping):
            if sections := _sections(kind):
                return self.section(self.choose(sections, value, path), value, path)
            for mapping in filter(_is_mapping, _alternatives(kind)):
                item_kind = typing.get_args(mapping)[1]
                return {key: self.value(item_kind, item, _join(path, key)) for key, item in value.items()}
        if isinstance(value, list):
            for holder in filter(_is_list, _alternatives(kind)):
                item_kind = typing.get_args(holder)[0]
                if _sections(item_kind):
                    items = (self.value(item_kind, item, f"{path}.{i}") for i, item in enumerate(value))
                    return typing.get_origin(holder)(items)
        return self.leaf(kind, value, path)

    def choose(self, sections: tuple[type, ...], value: Mapping[str, Any], path: str) -> type:
        """The section that `name` asks for; where there is but one section it need not be named."""
        if len(sections) == 1:
            return sections[0]
        names = {_name(section): section for section in sections}
        key = _join(path, "name")
        if "name" not in value:
            raise self.error(path, f"{key} is missing; accepted: {', '.join(names)}.")
        if value["name"] not in list(names):
            raise self.error(
                key, f"{key} is {show(value['name'])}; accepted: {', '.join(names)}.{_nearest(value['name'], names)}"
            )
        return names[value["name"]]

    def section(self, section: type, value: Mapping[str, Any], path: str) -> Any:
        """A dataclass from a mapping: refuses unknown and missing keys, builds each field, lets the dataclass check."""
        hints = _hints(section)
        for key in value:
            if key not in hints:
                raise self.unknown(section, key, value[key], path)
        for field in dataclasses.fields(section):
            if field.init and _required(field) and field.name not in value:
                key = _join(path, field.name)
                raise self.error(path, f"{key} is missing; accepted: {_describe(hints[field.name])}.")
        fields = {key: self.value(hints[key], item, _join(path, key)) for key, item in value.items()}
        try:
            return section(**fields)
        except ValueError as error:
            before, _, last = path.rpartition(".")
            message = str(error)
            if message.startswith(f"{last}.") and before:  # the key where this section mostly stands
                message = f"{before}.{message}"
            elif not message.startswith(path):
                message = f"{path}: {message}"
            raise self.error(message.split(" ", 1)[0], message, path) from None

    def leaf(self, kind: Any, value: Any, path: str) -> Any:
        """A value without sections in it, checked by pydantic as strict JSON (where a list may be a tuple)."""
        try:
            return _adapter(kind).validate_json(json.dumps(value), strict=True)
        except pydantic.ValidationError:
            message = f"{path} is {show(value)}; accepted: {_describe(kind)}.{_hint(kind, value)}"
            raise self.error(path, message) from None

    def unknown(self, section: type, key: str, value: Any, path: str) -> UserError:
        """The error for an unknown key: names the nearest key of this section, or of any other."""
        accepted = list(_hints(section))
        here = difflib.get_close_matches(key, accepted, n=1, cutoff=0.6)
        dotted = _join(path, key)
        elsewhere = [known for known in _all_keys(self.root) if known.rsplit(".", 1)[-1] == key and known != dotted]
        if here:
            nearest = f" Did you mean {_join(path, here[0])}?"
        elif elsewhere:
            nearest = f" Did you mean {elsewhere[0]}?"
        else:
            nearest = ""
        owner = f"{path} ({_name(section)})" if path and _name(section) else path
        keys = f"The keys of {owner} are" if path else "The keys are"
        return self.error(
            dotted, f"unknown key {dotted} (value {show(value, 40)}).{nearest} {keys} {', '.join(accepted)}."
        )

    def error(self, key: str, message: str, fallback: str = "") -> UserError:
        """A UserError that opens with the place where `key` (else `fallback`) was written."""
        origin = self.origins.get(key) or self.origins.get(fallback) or self.source
        return UserError(f"{origin}: {message}")


def _hint(kind: Any, value: Any) -> str:
    """What to write instead, for the slips that are common."""
    types_ = {t for t in _alternatives(kind) if isinstance(t, type)}
    if isinstance(value, str):
        if types_ & {int, float} and _is_number(value):
            return f" Write it without quotes: {value}."
        if bool in types_ and value.lower() in ("on", "off", "yes", "no", "true", "false"):
            return " Write true or false, without quotes."
        return _nearest(value, _choices(kind))
    if isinstance(value, bool | int | float) and str in types_:
        return f' Put it in quotes: "{show(value)}".'
    if isinstance(value, float) and not isinstance(value, bool) and int in types_ and value.is_integer():
        return f" Write {int(value)}."
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _nearest(value: Any, accepted: Any) -> str:
    match = difflib.get_close_matches(str(value), [str(a) for a in accepted], n=1, cutoff=0.6)
    return f" Did you mean {match[0]}?" if match else ""


def _describe(kind: Any, plural: bool = False) -> str:
    """A type in words: what a user may write."""
    alternatives = _alternatives(kind)
    if len(alternatives) > 1:
        words = [_describe(a) for a in alternatives if a is not type(None) and a not in _sections(kind)]
        if _sections(kind):
            words.append(_describe_sections(_sections(kind)))
        return " or ".join(words + ["null"] * (type(None) in alternatives))
    (kind,) = alternatives
    if kind in _WORDS:
        return _WORDS[kind][plural]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return ("" if len(arguments) == 1 else "one of ") + ", ".join(str(a) for a in arguments)
    if _is_list(kind):
        if origin is tuple and arguments[-1] is not Ellipsis:
            return f"a list of exactly {len(arguments)}: {', '.join(_describe(a) for a in arguments)}"
        return f"{'lists' if plural else 'a list'} of {_describe(arguments[0], plural=True)}"
    if _is_mapping(kind):
        return f"{'mappings' if plural else 'a mapping'} of keys to {_describe(arguments[1], plural=True)}"
    if dataclasses.is_dataclass(kind):
        return _describe_sections((typing.cast(type, kind),))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return "one of " + ", ".join(str(member.value) for member in kind)
    return getattr(kind, "__name__", str(kind))


_WORDS: dict[Any, tuple[str, str]] = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    str: ("text", "text"),
    pathlib.Path: ("a path", "paths"),
    type(None): ("null", "null"),
    Any: ("any value", "values"),
}


def _describe_sections(sections: tuple[type, ...]) -> str:
    if len(sections) > 1:
        return f"a section with name one of {', '.join(_name(s) for s in sections)}"
    return f"a section with the keys {', '.join(_hints(sections[0]))}"


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union, in order; a type that is none is its own only member. Annotations are set aside."""
    if typing.get_origin(kind) is typing.Annotated:
        return _alternatives(typing.get_args(kind)[0])
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return tuple(m for member in typing.get_args(kind) for m in _alternatives(member))
    return (kind,)


def _sections(kind: Any) -> tuple[type, ...]:
    """The dataclasses among the alternatives of a type."""
    return tuple(a for a in _alternatives(kind) if isinstance(a, type) and dataclasses.is_dataclass(a))


def _choices(kind: Any) -> list[Any]:
    """Every value that literals among the alternatives accept."""
    return [v for a in _alternatives(kind) if typing.get_origin(a) is typing.Literal for v in typing.get_args(a)]


def _is_mapping(kind: Any) -> bool:
    origin = typing.get_origin(kind)
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _is_list(kind: Any) -> bool:
    return typing.get_origin(kind) in (list, tuple) and bool(typing.get_args(kind))


@functools.cache
def _hints(section: type) -> dict[str, Any]:
    """The types of a dataclass's fields, resolved."""
    hints = typing.get_type_hints(section, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(section) if field.init}


@functools.cache
def _adapter(kind: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(kind)


def _name(section: type) -> str:
    """The value of `name` that asks for this section; empty where it is not one of several."""
    choices = _choices(_hints(section).get("name"))
    return str(choices[0]) if choices else ""


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _all_keys(section: type, path: str = "", inside: tuple[type, ...] = ()) -> Iterator[str]:
    """Every dotted key of a section and of the sections in it; a section that holds itself is entered once."""
    if section in inside:
        return
    for key, kind in _hints(section).items():
        yield _join(path, key)
        for inner in _sections(kind):
            yield from _all_keys(inner, _join(path, key), (*inside, section))


@functools.cache
def field_docs(section: type) -> dict[str, str]:
    """The docstring literal under each field of a dataclass, inherited ones included, on one line each."""
    docs: dict[str, str] = {}
    for owner in reversed([c for c in section.__mro__ if dataclasses.is_dataclass(c)]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        body = typing.cast(ast.ClassDef, tree).body
        for line, following in itertools.pairwise(body):
            match line, following:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    docs[name] = " ".join(text.split())
    return {field.name: docs.get(field.name, "") for field in dataclasses.fields(section) if field.init}
