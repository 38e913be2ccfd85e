"""Malformed configs for `tools/fuzz_inputs.py`: settings that the schema forbids, broken YAML, broken overrides.

Settings are reached by a random walk down the JSON schema, from each file of `configs/`, so whatever a later version
can be told is covered without a line here.
"""

from __future__ import annotations

import functools
import os
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import yaml
from fuzz_case import Case, Kind, flipped

from lmobj import _settings, _yaml, config

__all__ = ["KINDS", "Spot", "odd_setting", "walk"]

_FOLDER = Path(__file__).parent.parent / "configs"
_CONFIGS = sorted(path for path in _FOLDER.rglob("*.yaml") if path.parent.name not in ("bench", "search"))
_RAW = "@raw@"
"""Stands in a mapping for text that takes its place once the mapping is written as YAML."""

_NUMBERS = (
    0, -1, 1, 2, 3, 7, 2**31 - 1, 2**31, -(2**31), 2**53 + 1, 2**63, 2**63 - 1, -(2**63), -(2**63) - 1, 2**64, 10**30,
    10**400, 0.5, -0.5, 1.0, -1.0, 1.5, 0.999999, 1e-9, 5e-324, 1e38, 1e308, -1e308, -0.0,
)  # fmt: skip
_TEXTS = (
    "", " ", "\n", "a\nb\n\nc", "\t", "\x00", "\x1b[31m", "é" * 50, "\U0001f600", "\u2028", "\u0085", "../..", "/",
    ".", "..", "~", "null", "true", "1e5", "nan", "inf", "-", "x" * 5000, "a/b", "C:\\x", "{}", "[]", "%s%n", "{0}",
    "$HOME", "://", "gs://", "no\u200bspace", "\ufeff",
)  # fmt: skip
_RAW_VALUES = (
    ".nan", ".inf", "-.inf", ".NaN", "1e999", "-1e999", "1e-999", "1" * 300, "9" * 5000, "0x10", "0o17", "010", "1_0",
    "_1", "1__0", "1.", ".", "..", "+", "1:30", "2020-01-01", "y", "on", "~", "=", "<<", "!!int abc", "!!int ''",
    "!!float abc", "!!float ''", "!!float 1e999", "!!bool abc", "!!bool 1", "!!null abc", "!!str 5", "!!seq 5",
    "!!map 5", "!!map [1]", "!!seq {a: 1}", "!!int [1]", "!!str [a]", "!!set {a, b}", "!!omap [a: 1]",
    "!!pairs [a: 1]", "!!binary aGVsbG8=", "!!binary '***'", "!!timestamp 2020-01-01",
    "!!python/object/apply:os.system [exit]", "!!python/name:os.system", "!!python/tuple [1, 2]",
    "!!python/object:builtins.object {}", "!local x", "!", "! x", "!<tag:yaml.org,2002:int> abc", "!!merge x",
    "*nowhere", "&a [*a]", "&a {b: *a}", "&a", "&a &b x", "&a *a", "[" * 100_000, "[" * 900 + "]" * 900,
    "[" * 300 + "]" * 300, "[" * 60 + "]" * 60, "{a: " * 2000 + "}" * 2000, "{a: " * 200 + "}" * 200,
    "- " * 500 + "1", '"\\ud800"', '"\\0"', '"\\x"', '"\\u12"', '"\\U00110000"', '"\\UFFFFFFFF"', "'open", '"open',
    "[1, 2", "{a: 1", "{a: 1, a: 2}", "{1: 2}", "{null: 2}", "{[1]: 2}", "{{a: 1}: 2}", "{? a}", "{<<: 3}",
    "{<<: [1]}", "{<<: {a: 1}}", "{<<: *nowhere}", "{'': 1}", "{a.b: 1}", "@at", "`tick", "%percent", "]", "}", ",",
    ":", "?", "-", "|", ">", "|9\n", ">-5 x", "|\n  a", "#", "# x", "\t1", "a\tb", "a: b", "a: b: c", "x # y",
    "'a' b", "--- 1", "... 1", "\x07", "\x7f", "\u0085", "\u2028", "\ufeff", "\ud7ff", "\ue000", "\ufffe", "é: [",
)  # fmt: skip
"""What may stand where a value does, in YAML; most of it is wrong everywhere."""

_WRONG: dict[str, tuple[Any, ...]] = {
    "string": ("nonsense", "3", "1.5", "true", "null", "[]"),
    "integer": (3, -3, 10**25),
    "number": (1.5, -2.75),
    "boolean": (True, False),
    "null": (None,),
    "array": ([], [1], [None], ["a", 2], [[]], [{}]),
    "object": ({}, {"a": 1}, {"name": "nonsense"}, {"name": None}, {"name": []}, {"name": {}}, {"a": {"b": [1]}}),
}
"""Values of each type of JSON."""


# --- walking down the schema ---


@functools.cache
def _schema() -> dict[str, Any]:
    return config.schema()


def _alternatives(schema: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The schemas that a value may fit, without references and unions."""
    if "$ref" in schema:
        return _alternatives(_schema()["$defs"][schema["$ref"].rsplit("/", 1)[-1]])
    members = schema.get("anyOf") or schema.get("oneOf")
    return [dict(schema)] if members is None else [a for member in members for a in _alternatives(member)]


def _sections(schema: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [a for a in _alternatives(schema) if "properties" in a]


@dataclass(frozen=True)
class Spot:
    """A setting: its path, the `name` of each section on the way that is one of several, and its schema."""

    path: tuple[str, ...]
    names: dict[tuple[str, ...], str]
    schema: dict[str, Any]

    @property
    def key(self) -> str:
        return ".".join(self.path)

    def holding(self, value: Any) -> dict[str, Any]:
        """Nested settings with `value` in this place."""
        built: Any = value
        for depth in range(len(self.path), 0, -1):
            built = {self.path[depth - 1]: built}
            name = self.names.get(self.path[: depth - 1])
            if name is not None:
                built = {"name": name, **built}
        return built


def walk(draw: Random, *, section: bool = False) -> Spot:
    """A random setting, or a random section."""
    path: tuple[str, ...] = ()
    names: dict[tuple[str, ...], str] = {}
    schema: dict[str, Any] = _schema()
    while True:
        mappings = [a for a in _alternatives(schema) if isinstance(a.get("additionalProperties"), dict)]
        sections = _sections(schema)
        if path and not (sections or mappings):
            return Spot(path, names, schema)
        if path and (section if sections else not section) and draw.random() < 0.35:
            return Spot(path, names, schema)
        if not sections:
            path, schema = (*path, "some"), mappings[0]["additionalProperties"]
            continue
        chosen = draw.choice(sections)
        if len(sections) > 1:
            names = {**names, path: chosen["properties"]["name"]["const"]}
        keys = [k for k, s in chosen["properties"].items() if k != "base" and not (section and not _goes_on(s))]
        if not keys:
            return Spot(path, names, schema) if path else walk(draw, section=section)
        key = draw.choice(keys)
        path, schema = (*path, key), chosen["properties"][key]


def _goes_on(schema: Mapping[str, Any]) -> bool:
    return any("properties" in a or isinstance(a.get("additionalProperties"), dict) for a in _alternatives(schema))


def _types(schema: Mapping[str, Any]) -> set[str]:
    """The types of JSON that a setting accepts some value of."""
    types: set[str] = set()
    for alternative in _alternatives(schema):
        kind = alternative.get("type")
        types |= set(_WRONG) if kind is None else {kind} if isinstance(kind, str) else set(kind)
    return types | {"integer"} if "number" in types else types


def _wrong_values(schema: Mapping[str, Any]) -> list[Any]:
    """Values that the setting cannot have, whatever its range."""
    types = _types(schema)
    wrong = [value for kind, values in _WRONG.items() if kind not in types for value in values]
    texts = [a for a in _alternatives(schema) if a.get("type") == "string"]
    if texts and all("const" in a or "enum" in a for a in texts):
        wrong += ["nonsense", "", "Name", "ADAM"]
    arrays = [a for a in _alternatives(schema) if a.get("type") == "array"]
    if arrays and all(_types(a.get("items", {})) == {"string"} for a in arrays):
        wrong += [[1], [None], [["a"]], [{}], ["a", True]]
    return wrong


# --- files ---


@functools.cache
def _base(path: Path, complete: bool) -> _yaml.Document:
    """A config's settings as they stand in it and its base, or with every default."""
    values = _settings.plain(config.load(path)) if complete else _yaml.read(path).values
    return _yaml.Document(values)


def _mixed(draw: Random, changes: dict[str, Any]) -> dict[str, Any]:
    """A good config with some settings changed."""
    base = _base(draw.choice(_CONFIGS), draw.random() < 0.5)
    return _yaml.merge(base, _yaml.Document(changes)).values


def _write(draw: Random, folder: Path, values: dict[str, Any], raw: str | None = None) -> None:
    """Writes bad.yaml; `raw` takes the place of the mark in it."""
    flow = draw.choice((True, False, None)) if raw is None else False
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=draw.random() < 0.5, default_flow_style=flow)
    if raw is not None:
        text = text.replace(f"'{_RAW}'", raw).replace(_RAW, raw)
    (folder / "bad.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))


_CHECK = ("config", "bad.yaml")


def wrong_setting(draw: Random, folder: Path) -> Case:
    """A value of the wrong type, an unknown or misspelt key, a section left out or in the wrong place."""
    spot = walk(draw, section=(which := draw.randrange(6)) >= 3)
    if which <= 2 or not _sections(spot.schema):
        value = draw.choice(_wrong_values(spot.schema) or [{"": {}}])
        _write(draw, folder, _mixed(draw, spot.holding(value)))
        return Case(f"{spot.key} = {value!r}", _CHECK, names=(spot.key,))
    chosen = draw.choice(_sections(spot.schema))
    section = {} if len(_sections(spot.schema)) == 1 else {"name": chosen["properties"]["name"]["const"]}
    if which == 3:
        key = "".join(draw.choices(string.ascii_lowercase + "_-. é", k=draw.randint(1, 12)))
        key += "0" * (key in chosen["properties"] or not key.strip())
        value = draw.choice([v for values in _WRONG.values() for v in values])
    elif which == 4:
        key = _misspelt(draw, draw.choice(list(chosen["properties"])), chosen["properties"])
        value = draw.choice(_NUMBERS[:10])
    else:
        elsewhere = walk(draw, section=True)
        key = elsewhere.path[-1] if elsewhere.path[-1] not in chosen["properties"] else "elsewhere"
        value = {"name": "adamw"}
    _write(draw, folder, _mixed(draw, spot.holding({**section, key: value})))
    return Case(f"{spot.key}.{key} = {value!r}", _CHECK, names=(f"{spot.key}.{key}",))


def _misspelt(draw: Random, key: str, taken: Mapping[str, Any]) -> str:
    while True:
        at = draw.randrange(len(key))
        letter = draw.choice(string.ascii_letters + "_ ")
        wrong = draw.choice((key[:at] + key[at + 1 :], key[:at] + letter + key[at:], key[:at] + letter + key[at + 1 :]))
        if wrong.strip() and wrong not in taken:
            return wrong


def odd_setting(draw: Random, spot: Spot) -> Any:
    """A number, a text or a list of texts at the edge of what a setting accepts, or past it."""
    types = _types(spot.schema)
    if "array" in types and draw.random() < 0.7:
        return [draw.choice(_TEXTS) for _ in range(draw.randint(0, 3))]
    numbers = _NUMBERS if types & {"integer", "number"} else ()
    texts = _TEXTS if "string" in types else ()
    choices = [choice for a in _alternatives(spot.schema) for choice in a.get("enum", ())]
    if choices and draw.random() < 0.5:
        return draw.choice(choices)
    return draw.choice((*numbers, *texts, *((True, False) if "boolean" in types else ())) or _NUMBERS)


def odd_value(draw: Random, folder: Path) -> Case:
    """A setting at the edge of what it accepts, or past it."""
    spot = walk(draw)
    value = odd_setting(draw, spot)
    _write(draw, folder, _mixed(draw, spot.holding(value)))
    return Case(f"{spot.key} = {value!r:.60}", _CHECK, malformed=False)


def raw_value(draw: Random, folder: Path) -> Case:
    """Text that YAML or the settings refuse, or read in a way of their own, in the place of a value or a section."""
    spot = walk(draw, section=draw.random() < 0.3)
    raw = draw.choice(_RAW_VALUES)
    _write(draw, folder, _mixed(draw, spot.holding(_RAW)), raw)
    return Case(f"{spot.key}: {raw!r:.60}", _CHECK, malformed=False)


def missing(draw: Random, folder: Path) -> Case:
    """A config without its model, its objective or a section's name; or a line of it twice."""
    values = dict(_mixed(draw, {}))
    if draw.random() < 0.5:
        key = draw.choice(("model", "objective"))
        del values[key]
        _write(draw, folder, values)
        return Case(f"no {key}", _CHECK, names=(key,))
    if draw.random() < 0.5:
        key = draw.choice(("model", "objective"))
        values[key] = {k: v for k, v in values[key].items() if k != "name"}
        _write(draw, folder, values)
        return Case(f"no {key}.name", _CHECK, names=(f"{key}.name",))
    lines = yaml.safe_dump(values, sort_keys=False).splitlines()
    tops = [i for i, line in enumerate(lines) if line[0] not in " -"] + [len(lines)]
    at = draw.randrange(len(tops) - 1)
    (folder / "bad.yaml").write_text("\n".join(lines + lines[tops[at] : tops[at + 1]]) + "\n")
    return Case(f"{lines[tops[at]]} twice", _CHECK, names=(lines[tops[at]].split(":")[0], "twice"))


def damaged_yaml(draw: Random, folder: Path) -> Case:
    """The bytes of a config damaged at random."""
    text = draw.choice(_CONFIGS).read_bytes() if draw.random() < 0.3 else yaml.safe_dump(_mixed(draw, {})).encode()
    text = text.replace(b"base: ../", b"# ")
    match draw.randrange(4):
        case 0:
            what, text = flipped(draw, text)
        case 1:
            at, piece = draw.randrange(len(text)), draw.choice(_RAW_VALUES).encode("utf-8", "surrogatepass")[:50]
            what, text = f"{piece!r} at {at}", text[:at] + piece + text[at:]
        case 2:
            lines = text.splitlines(keepends=True)
            at, indent = draw.randrange(len(lines)), draw.choice((b"\t", b" ", b"  ", b"   ", b"\xc2\xa0", b"- "))
            what, lines[at] = f"line {at + 1} begins with {indent!r}", indent + lines[at]
            text = b"".join(lines)
        case _:
            lines = text.splitlines(keepends=True)
            draw.shuffle(lines)
            what, text = "lines shuffled", b"".join(lines)
    (folder / "bad.yaml").write_bytes(text)
    return Case(what, _CHECK, malformed=False)


def whole_file(draw: Random, folder: Path) -> Case:
    """A file that is no config at all, or whose base cannot be."""
    good = yaml.safe_dump(_base(_CONFIGS[-1], True).values)
    path = folder / "bad.yaml"
    files: dict[str, str | bytes] = {
        "empty": b"",
        "blanks": b" \n\n\t\n" if draw.random() < 0.5 else b"\n \n",
        "comments": b"# nothing\n",
        "binary": draw.randbytes(draw.choice((1, 10, 1000, 100_000))),
        "zero bytes": bytes(draw.choice((1, 100, 10_000))),
        "UTF-16": good.encode("utf-16"),
        "UTF-16 without a mark": good.encode("utf-16-le"),
        "UTF-32": good.encode("utf-32"),
        "Latin-1": f"name: é{draw.randrange(99)}\n".encode("latin-1") + good.encode(),
        "a long line": "name: " + "x" * draw.choice((10_000, 1_000_000)) + "\nmodel: {",
        "a long key": "k" * draw.choice((130, 1025, 100_000)) + ": 1\n" + good,
        "many keys": "".join(f"k{i}: {i}\n" for i in range(draw.choice((100, 5000)))) + good,
        "two documents": good + "---\n" + good,
        "a directive": "%YAML 9.9\n---\n" + good,
        "an unknown directive": "%NOPE\n---\n" + good,
        "a list": "- " + good.replace("\n", "\n  "),
        "a scalar": draw.choice(("3", "text", "null", "'", "true", "1.5", "---", "...", "!!str x", "[]", "[1]")),
        "alias bomb": "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, draw.choice((4, 9, 12)))),
        "alias bomb of mappings": "a0: &a0 {x: 1, y: 2}\n"
        + "".join(f"a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}\n" for i in range(1, draw.choice((10, 40)))),
        "merge bomb": "a0: &a0 {x: 1}\n"
        + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, draw.choice((4, 10)))),
        "alias cycle": "a: &a\n  b: *a\n" + good,
        "nested keys": "".join(" " * i + "a:\n" for i in range(draw.choice((100, 1200)))),
        "nested lists": "x: " + "[" * draw.choice((100, 3000, 200_000)),
        "nested lists, closed": "x: " + "[" * (n := draw.choice((90, 200, 500, 3000))) + "]" * n,
        "base: itself": "base: bad.yaml\n",
        "base: missing": "base: none.yaml\n" + good,
        "base: a folder": "base: .\n",
        "base: null": f"base: {draw.choice(('null', '3', '[]', '{}', 'true', chr(34) * 2, '1.5', '[a.yaml]'))}\n"
        + good,
        "base: zero byte": 'base: "a\\0b"\n' + good,
        "base: too long": f"base: {'x' * 5000}\n" + good,
        "base: URL": "base: https://example.org/x.yaml\n" + good,
        "base: surrogate": 'base: "\\ud800"\n' + good,
    }
    others = (
        "folder",
        "absent",
        "dangling link",
        "link to itself",
        "chain",
        "under a file",
        "device",
        "cycle of bases",
    )
    what = draw.choice((*files, *others, "bad base"))
    argv = _CHECK
    if what in files:
        content = files[what]
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    elif what == "folder":
        path.mkdir()
    elif what == "dangling link":
        os.symlink("nowhere", path)
    elif what == "link to itself":
        os.symlink("bad.yaml", path)
    elif what == "under a file":
        path.write_text(good)
        argv = ("config", "bad.yaml/deeper.yaml")
    elif what == "device":
        argv = ("config", "/dev/zero")
    elif what == "chain":
        path.write_text("base: b.yaml\n")
        (folder / "b.yaml").write_text("base: c.yaml\n")
        (folder / "c.yaml").write_text(good)
    elif what == "cycle of bases":
        path.write_text("base: b.yaml\n")
        (folder / "b.yaml").write_text("base: bad.yaml\n")
    elif what == "bad base":
        path.write_text("base: b.yaml\n")
        (folder / "b.yaml").write_bytes(flipped(draw, good.encode())[1][: draw.randrange(len(good))])
    maybe = {"merge bomb", "blanks", "a directive", "an unknown directive", "bad base", "a long line"}
    return Case(what, argv, malformed=what not in maybe)


def override(draw: Random, folder: Path) -> Case:
    """A malformed key=value on the command line."""
    spot = walk(draw, section=draw.random() < 0.2)
    wrong = draw.choice(_wrong_values(spot.schema) or [{"": {}}])
    shown = yaml.safe_dump(wrong, default_flow_style=True, width=10**9).removesuffix("...\n").strip()
    raw = draw.choice(_RAW_VALUES)[:2000]
    odd = draw.choice(_TEXTS + tuple(map(str, _NUMBERS))).replace("\x00", "\\0")
    choices: dict[str, tuple[str, bool]] = {
        "no equals sign": (spot.key, True),
        "no key": (f"={odd}", True),
        "no value": (f"{spot.key}=", True),
        "empty part": (spot.key.replace(".", "..", 1) if "." in spot.key else f".{spot.key}", True),
        "empty part and value": (f"{draw.choice(('.', '..', spot.key + '.', '.' + spot.key))}=1", True),
        "base": (f"base={odd or 'x'}", True),
        "wrong type": (f"{spot.key}={shown}", True),
        "unknown": (f"{draw.choice(('', spot.key + '.'))}{draw.choice(('nonsense', 'é', '0', 'a b', '-'))}=1", True),
        "raw": (f"{spot.key}={raw}", False),
        "odd": (f"{spot.key}={odd}", False),
        "option": (f"--{spot.key}={odd}", True),
        "flag": (f"-{draw.choice(string.ascii_letters.replace('h', ''))}", True),
        "surrogate": (f"{spot.key}=\udcff{odd}", False),
        "deep": (".".join(["a"] * draw.choice((50, 300, 2000))) + "=1", True),
    }
    what, (argument, malformed) = draw.choice(list(choices.items()))
    good = draw.choice(_CONFIGS)
    extra = ("train.steps=5",) if draw.random() < 0.3 else ()
    named = spot.names if what == "wrong type" else {}
    argv = ("config", str(good), *extra, *(f"{'.'.join((*p, 'name'))}={n}" for p, n in named.items()), argument)
    return Case(f"{what}: {argument!r:.70}", argv, malformed=malformed, own_words=not argument.startswith("-"))


_Maker = Callable[[Random, Path], Case]
KINDS: dict[str, Kind] = {
    "setting": Kind(wrong_setting, 2600, 10),
    "value": Kind(odd_value, 1000, 10),
    "raw": Kind(raw_value, 1400, 20),
    "missing": Kind(missing, 200, 10),
    "yaml": Kind(damaged_yaml, 1000, 10),
    "file": Kind(whole_file, 800, 20),
    "override": Kind(override, 1000, 10),
}
