"""YAML files and `key=value` overrides as plain mappings that remember where each key was written.

The reader is PyYAML's safe loader with the scalars of YAML 1.2: `1e-4` is a number, `on`, `off`, `yes`, `no`, `1:30`
and dates are text, `010` is ten. Underscores in numbers are kept from YAML 1.1 (`100_000`). Keys given twice, keys
that are not text, and files that refer to themselves are refused.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml

from lmobj.errors import UserError

__all__ = ["Document", "merge", "parse", "parse_overrides", "read", "to_yaml"]


@dataclasses.dataclass(frozen=True)
class Document:
    """Nested settings, and the place where each was written: dotted key -> `file:line`."""

    values: dict[str, Any]
    origins: dict[str, str] = dataclasses.field(default_factory=dict)


def read(path: str | Path) -> Document:
    """The settings in a YAML file, over those of the file that it may name as `base:`, and so on.

    `base` is relative to the file that names it.

    Raises:
      UserError: the file is missing, unreadable, not UTF-8 or not valid YAML, or so is one of its bases; or a file is
        a base of itself.
    """
    return _read(Path(path), "", ())


def _read(path: Path, prefix: str, above: tuple[Path, ...]) -> Document:
    """As `read`, of a file that those `above` are built on; `prefix` begins what is said where it cannot be read."""
    document = parse(_text(path, prefix), str(path))
    if path.resolve() in above:
        raise UserError(f"{prefix}that file is built on this one; accepted: a file that is not.")
    if "base" not in document.values:
        return document
    name, origin = document.values.pop("base"), document.origins.pop("base", str(path))
    if not isinstance(name, str) or not name:
        raise UserError(f"{origin}: base is {show(name)}; it must be the path of a YAML file, relative to this one.")
    below = _read(path.parent / name, f"{origin}: base is {show(name)}, and ", (*above, path.resolve()))
    return merge(below, document)


def parse(text: str, source: str) -> Document:
    """The settings in YAML text; `source` names the text in errors. Empty text holds no settings.

    Raises:
      UserError: the text is not valid YAML, or its top level is not a mapping.
    """
    values, node = _load(text, source)
    if values is None:
        return Document({})
    if not isinstance(values, dict):
        raise UserError(f"{source}: the file holds {show(values)}; it must be a mapping of `key: value` lines.")
    return Document(values, dict(_origins(node, source)))


def parse_overrides(overrides: Sequence[str]) -> Document:
    """The settings in `dotted.key=value` arguments, each value read as YAML; the last of two equal keys wins.

    Raises:
      UserError: an argument has no key, no `=` or no value, or its value is not valid YAML.
    """
    document = Document({})
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise UserError(f"The override {override!r} is not of the form key=value, such as train.steps=100.")
        if len(parts) > _DEEPEST:
            raise UserError(f"The override {override!r:.120}... is nested too deeply; the deepest key has ten parts.")
        if not text.strip():
            raise UserError(f"The override {override!r} has no value; write {key}=null or {key}='\"\"' to empty it.")
        if key.strip() == "base":
            raise UserError(f"The override {override!r} sets base, which can only be set in the file.")
        value, _ = _load(text, f"override {override!r}")
        for part in reversed(parts):
            value = {part: value}
        origins = {".".join(parts[: i + 1]): f"override {override!r}" for i in range(len(parts))}
        document = merge(document, Document(value, origins))
    return document


def merge(low: Document, high: Document) -> Document:
    """`high` over `low`, mapping by mapping.

    A section with another `name` than before is another kind of thing (another optimizer, another model), and none
    of the old settings is kept in it.
    """
    return Document(_merge(low.values, high.values), {**low.origins, **high.origins})


def _merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**low, **high}
    for key in low.keys() & high.keys():
        old, new = low[key], high[key]
        if isinstance(old, dict) and isinstance(new, dict):
            another_kind = "name" in old and "name" in new and old["name"] != new["name"]
            merged[key] = new if another_kind else _merge(old, new)
    return merged


def to_yaml(values: Any) -> str:
    """YAML text that reads back as the same values, here and with readers of YAML 1.1."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def show(value: Any, limit: int = 120) -> str:
    """A value on one line as a user would write it in YAML, cut at `limit` characters."""
    text = yaml.dump(value, Dumper=_OneLineDumper, default_flow_style=True, allow_unicode=True, width=10**9)
    text = text.removesuffix("...\n").strip()
    if isinstance(value, str) and text == value:
        text = f'"{text}"'
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _text(path: Path, prefix: str = "") -> str:
    """A file's text. `prefix` opens the error where there is more to say than the path."""
    if "\0" in str(path) or not _is_unicode(str(path)):
        raise UserError(f"{prefix}{str(path)!a} cannot be the path of a file.")
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)  # a device such as /dev/zero has no end
        if len(content) > _MOST_BYTES:
            raise UserError(f"{prefix}{path} holds more than {_MOST_BYTES} bytes; give the path of a YAML file.")
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{prefix}{path} does not exist; give the path of a YAML file.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{prefix}{path} is not UTF-8 text: byte {error.start} cannot be decoded.") from None
    except OSError as error:
        raise UserError(f"{prefix}{path} cannot be read: {error.strerror}.") from None


_MOST_BYTES = 1 << 20
"""Bytes of a file."""
_DEEPEST = 100
"""Levels of nested values. Settings have fewer than ten."""
_MOST_VALUES = 100_000
"""Keys and values in a file, with what its aliases stand for."""


def _is_unicode(text: str) -> bool:
    """Whether the system can be given it as a path; half of a surrogate pair, which YAML can spell, it cannot."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


class _Loader(yaml.SafeLoader):
    """The safe loader with YAML 1.2 scalars; refuses duplicate keys and keys that are not text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  PyYAML's own class-level registry
    yaml_constructors: ClassVar[dict[str | None, Any]] = {}

    def construct_tree(self, node: yaml.SequenceNode | yaml.MappingNode) -> Any:
        # Deep construction makes PyYAML refuse an alias to a node that contains it.
        if isinstance(node, yaml.SequenceNode):
            return self.construct_sequence(node, deep=True)
        return self.construct_mapping(node, deep=True)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        # PyYAML leaves what was merged beside what is given, which would look like a key given twice.
        self.check_keys(node)
        super().flatten_mapping(node)
        node.value = list({key_node.value: (key_node, value_node) for key_node, value_node in node.value}.values())

    def check_keys(self, node: yaml.MappingNode) -> None:
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == _tag("merge"):
                continue
            if key_node.tag != _tag("str") or not isinstance(key_node, yaml.ScalarNode):
                shown = repr(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "a collection"
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {shown:.120} is not text; put it in quotes", key_node.start_mark
                )
            line = key_node.start_mark.line + 1
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"the key {key_node.value!r:.120} is given twice, first in line {seen[key_node.value]}",
                    key_node.start_mark,
                )
            seen[key_node.value] = line

    def construct_plain(self, node: yaml.Node) -> int | float | bool | None:
        """A number, true, false or null; a tag such as `!!int` may have been given to what is none."""
        kind = node.tag.rsplit(":", 1)[-1]
        if not isinstance(node, yaml.ScalarNode) or not _PATTERNS[kind].fullmatch(node.value):
            shown = repr(node.value) if isinstance(node, yaml.ScalarNode) else "a collection"
            raise yaml.constructor.ConstructorError(None, None, f"{shown:.120} is no !!{kind}", node.start_mark)
        if kind == "null":
            return None
        if kind == "bool":
            return node.value.lower() == "true"
        text = node.value.replace("_", "")
        if kind == "int":
            if len(text) > 4000:  # beyond this Python refuses the conversion
                raise yaml.constructor.ConstructorError(None, None, "the number is too long", node.start_mark)
            return int(text)
        number = float(re.sub(r"\.(inf|nan)", r"\1", text.lower()))
        if not math.isfinite(number):
            raise yaml.constructor.ConstructorError(
                None, None, f"the number {node.value:.120} is not finite; no setting accepts it", node.start_mark
            )
        return number


class _Dumper(yaml.SafeDumper):
    """Knows the scalars of both YAML versions, so text that either would read as a number is put in quotes."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


class _OneLineDumper(_Dumper):
    """Writes line breaks and what cannot be printed as escapes."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar(_tag("str"), text, style=None if text.isprintable() else '"')


def _tag(name: str) -> str:
    return f"tag:yaml.org,2002:{name}"


_SCALARS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9][0-9_]*", "-+0123456789"),
    (
        "float",
        r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
)
for _name, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag(_name), re.compile(f"^(?:{_pattern})$"), list(_first))
_PATTERNS = {name: re.compile(pattern) for name, pattern, _ in _SCALARS}
for _name in ("bool", "int", "float", "null"):
    _Loader.add_constructor(_tag(_name), _Loader.construct_plain)
for _name in ("map", "seq"):
    _Loader.add_constructor(_tag(_name), _Loader.construct_tree)
_Loader.add_constructor(_tag("str"), yaml.SafeLoader.yaml_constructors[_tag("str")])
_Loader.yaml_constructors[None] = yaml.SafeLoader.construct_undefined
_Dumper.add_representer(tuple, yaml.SafeDumper.represent_list)
_OneLineDumper.add_representer(str, _OneLineDumper.represent_text)


def _load(text: str, source: str) -> tuple[Any, yaml.Node | None]:
    """The value of YAML text and its node; syntax errors as UserError with the line."""
    try:
        loader = _Loader(text)
        node = _composed(loader, source)
        if node is None:
            return None, None
        _check_size(node, source)
        return loader.construct_document(node), node
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        context = f" ({error.context})" if error.context else ""
        what = "" if isinstance(error, yaml.constructor.ConstructorError) else "not valid YAML: "
        raise UserError(f"{place}: {what}{error.problem}{context}.") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(
            f"{source}:{line}: not valid YAML: the character {text[error.position]!a} is not allowed."
        ) from None
    except RecursionError:
        raise _too_deep(source) from None


def _composed(loader: _Loader, source: str) -> yaml.Node | None:
    """The node of the text."""
    try:
        return loader.get_single_node()
    except (ValueError, OverflowError):  # from `chr`, for an escape such as "\\UFFFFFFFF"
        raise UserError(
            f"{source}:{loader.line + 1}: not valid YAML: an escape stands for no character of Unicode."
        ) from None


def _check_size(root: yaml.Node, source: str) -> None:
    """Refuses nodes that are nested deeply, or that aliases multiply without end.

    What reads the values goes through all of them, and by recursion.
    """
    measured: dict[int, tuple[int, int]] = {}

    def measure(node: yaml.Node) -> tuple[int, int]:
        """(values, levels) of a node."""
        if id(node) not in measured:
            measured[id(node)] = (0, 0)  # an alias to a node that contains it is refused elsewhere
            inner = node.value if isinstance(node, yaml.CollectionNode) else ()
            pairs = ((child,) if isinstance(child, yaml.Node) else child for child in inner)
            found = [measure(child) for pair in pairs for child in pair]
            measured[id(node)] = (1 + sum(n for n, _ in found), 1 + max((n for _, n in found), default=0))
        return measured[id(node)]

    values, levels = measure(root)
    if levels > _DEEPEST:
        raise _too_deep(source)
    if values > _MOST_VALUES:
        raise UserError(f"{source}: the file holds more than {_MOST_VALUES} values, with what its aliases stand for.")


def _too_deep(source: str) -> UserError:
    return UserError(f"{source}: not valid YAML: the values are nested too deeply.")


def _origins(node: yaml.Node | None, source: str, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, `file:line`) of every key under a node."""
    children: list[tuple[str, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        children = [(key_node.value, key_node, value_node) for key_node, value_node in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(str(i), item_node, item_node) for i, item_node in enumerate(node.value)]
    for key, place, value_node in children:
        yield prefix + key, f"{source}:{place.start_mark.line + 1}"
        yield from _origins(value_node, source, f"{prefix}{key}.")
