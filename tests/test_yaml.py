"""The YAML reader: scalars of YAML 1.2, refusals with file and line, bases, overrides."""

from __future__ import annotations

import pathlib

import pytest
import yaml

from lmobj import _yaml
from lmobj.errors import UserError


def parse(text: str) -> dict:
    return _yaml.parse(text, "f.yaml").values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),  # text in YAML 1.1
        ("1E5", 1e5),
        (".5", 0.5),
        ("-2.", -2.0),
        ("100_000", 100_000),
        ("1_000.5", 1000.5),
        ("010", 10),  # eight in YAML 1.1
        ("+7", 7),
        ("-7", -7),
        ("1:30", "1:30"),  # ninety in YAML 1.1
        ("2020-01-01", "2020-01-01"),  # a date in YAML 1.1
        ("on", "on"),  # true in YAML 1.1
        ("No", "No"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("'1e-4'", "1e-4"),
        ("1.2.3", "1.2.3"),
        ("1e", "1e"),
        ("é", "é"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    read = parse(f"key: {text}")["key"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    "value",
    ["1e-4", "on", "no", "true", "null", "~", "", "010", "1_0", "2020-01-01", "<<", " a ", "a: b", "# x", "é\n",
     1e-05, 1e16, 3, -0.0, True, None, ["a", 1.0], {"a": {}}],
)  # fmt: skip
def test_written_values_read_back_the_same_here_and_elsewhere(value: object) -> None:
    text = _yaml.to_yaml({"key": value})
    here, elsewhere = parse(text)["key"], yaml.safe_load(text)["key"]
    assert here == elsewhere == value
    assert type(here) is type(elsewhere) is type(value)


def test_origins_name_file_and_line_of_every_key() -> None:
    document = _yaml.parse("a:\n  b: 1\n  c:\n  - d: 2\n\ne: 3\n", "f.yaml")
    assert document.origins == {
        "a": "f.yaml:1",
        "a.b": "f.yaml:2",
        "a.c": "f.yaml:3",
        "a.c.0": "f.yaml:4",
        "a.c.0.d": "f.yaml:4",
        "e": "f.yaml:6",
    }


@pytest.mark.parametrize(
    ("text", "start", "part"),
    [
        ("a: 1\nb: [1", "f.yaml:2:6: not valid YAML: ", "expected ',' or ']'"),
        ("a: 1\n\tb: 2", "f.yaml:2:1: not valid YAML: ", "'\\t'"),
        ("a: 1\nb: \x07", "f.yaml:2: not valid YAML: ", "'\\x07'"),
        ("a:\n  b: 1\n  c: 2\n  b: 3", "f.yaml:4:3: ", "the key 'b' is given twice, first in line 2"),
        ("1: a", "f.yaml:1:1: ", "the key '1' is not text"),
        ("? [a, b]\n: 1", "f.yaml:1:3: ", "is not text"),
        ("a: &x\n  b: *x", "f.yaml:1:4: ", "recursive"),
        ("a: !!python/object:os.system {}", "f.yaml:1:4: ", "tag"),
        ("a: !!binary aGk=", "f.yaml:1:4: ", "tag"),
        ("a: .inf", "f.yaml:1:4: ", "not finite"),
        ("a: 1e999", "f.yaml:1:4: ", "not finite"),
        ("a: " + "9" * 5000, "f.yaml:1:4: ", "too long"),
        ("a: 1\n---\nb: 1", "f.yaml:2:1: not valid YAML: ", "document"),
        ("- a\n- b", "f.yaml: ", "must be a mapping"),
        ("just text", "f.yaml: ", "must be a mapping"),
        ("a: " + "[" * 3000, "f.yaml", "not valid YAML"),
    ],
)
def test_bad_text_is_refused_with_its_place(text: str, start: str, part: str) -> None:
    with pytest.raises(UserError) as error:
        parse(text)
    message = str(error.value)
    assert message.startswith(start)
    assert part in message
    assert "\n" not in message


def test_anchors_and_merge_keys_work() -> None:
    assert parse("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}") == {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 3}}


def test_base_is_merged_under_the_file_section_by_section(tmp_path: pathlib.Path) -> None:
    (tmp_path / "bases").mkdir()
    (tmp_path / "bases" / "b.yaml").write_text(
        "a: 1\nsection: {x: 1, y: {z: 2}}\nsame: {name: p, old: 1}\nother: {name: p, old: 1}\n"
        "list: [1, 2]\nlate: {old: 1}\n"
    )
    (tmp_path / "f.yaml").write_text(
        "base: bases/b.yaml\nsection: {y: {w: 3}}\nsame: {name: p, new: 2}\nother: {name: q, new: 2}\nlist: [3]\n"
        "late: {name: p}\n"
    )
    document = _yaml.read(tmp_path / "f.yaml")
    assert document.values == {
        "a": 1,
        "section": {"x": 1, "y": {"z": 2, "w": 3}},
        "same": {"name": "p", "old": 1, "new": 2},
        "other": {"name": "q", "new": 2},  # another kind of thing keeps nothing of the old
        "list": [3],
        "late": {"old": 1, "name": "p"},
    }
    assert document.origins["section.y.z"] == f"{tmp_path / 'bases' / 'b.yaml'}:2"
    assert document.origins["section.y.w"] == f"{tmp_path / 'f.yaml'}:2"
    assert "base" not in document.origins


def test_a_base_may_have_a_base(tmp_path: pathlib.Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "c.yaml").write_text("a: 1\nb: 1\nc: 1\n")
    (tmp_path / "deep" / "b.yaml").write_text("base: ../c.yaml\na: 2\nb: 2\n")
    (tmp_path / "f.yaml").write_text("base: deep/b.yaml\na: 3\n")
    document = _yaml.read(tmp_path / "f.yaml")
    assert document.values == {"a": 3, "b": 2, "c": 1}
    assert document.origins["c"] == f"{tmp_path / 'deep' / '..' / 'c.yaml'}:3"


@pytest.mark.parametrize(
    ("base", "part"),
    [
        ("base: missing.yaml", "missing.yaml does not exist"),
        ("base: 3", "base is 3; it must be the path"),
        ("base: [a, b]", "base is [a, b]; it must be the path"),
        ("base: chained.yaml", 'chained.yaml:1: base is "other.yaml", and'),
        ("base: f.yaml", 'f.yaml:2: base is "f.yaml", and that file is built on this one'),
        ("base: round.yaml", 'round.yaml:1: base is "./f.yaml", and that file is built on this one'),
        ("base: broken.yaml", "broken.yaml:1:5"),
    ],
)
def test_bad_bases_are_refused(tmp_path: pathlib.Path, base: str, part: str) -> None:
    (tmp_path / "chained.yaml").write_text("base: other.yaml\n")
    (tmp_path / "round.yaml").write_text("base: ./f.yaml\n")
    (tmp_path / "broken.yaml").write_text("a: [")
    (tmp_path / "f.yaml").write_text(f"x: 1\n{base}\n")
    with pytest.raises(UserError) as error:
        _yaml.read(tmp_path / "f.yaml")
    assert part in str(error.value)


def test_unreadable_files_are_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"a: caf\xe9\n")
    with pytest.raises(UserError, match=r"latin\.yaml is not UTF-8 text: byte 6"):
        _yaml.read(tmp_path / "latin.yaml")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        _yaml.read(tmp_path)
    with pytest.raises(UserError, match=r"none\.yaml does not exist"):
        _yaml.read(tmp_path / "none.yaml")


def test_a_byte_order_mark_and_empty_files_are_accepted(tmp_path: pathlib.Path) -> None:
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfa: 1\n")
    (tmp_path / "empty.yaml").write_text("# nothing but this\n")
    assert _yaml.read(tmp_path / "bom.yaml").values == {"a": 1}
    assert _yaml.read(tmp_path / "empty.yaml").values == {}


def test_overrides_are_dotted_keys_with_yaml_values() -> None:
    document = _yaml.parse_overrides(["a.b=1e-4", "a.c=[x, y]", "d= on ", "a.b=2", "e=a=b", "f={g: 1}"])
    assert document.values == {"a": {"b": 2, "c": ["x", "y"]}, "d": "on", "e": "a=b", "f": {"g": 1}}
    assert document.origins["a.b"] == "override 'a.b=2'"


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("steps", "not of the form key=value"),
        ("=3", "not of the form key=value"),
        ("a..b=3", "not of the form key=value"),
        ("a.=3", "not of the form key=value"),
        ("a=", "has no value"),
        ("a=[1", "override 'a=[1':1:3: not valid YAML"),
        ("base=x.yaml", "can only be set in the file"),
    ],
)
def test_bad_overrides_are_refused(override: str, part: str) -> None:
    with pytest.raises(UserError) as error:
        _yaml.parse_overrides([override])
    assert part in str(error.value)


def test_values_are_shown_as_yaml_on_one_line() -> None:
    assert _yaml.show("text") == '"text"'
    assert _yaml.show("3") == "'3'"
    assert _yaml.show({"a": [1, None]}) == "{a: [1, null]}"
    assert _yaml.show("x" * 500, 20) == '"' + "x" * 16 + "..."
