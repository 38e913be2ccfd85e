"""Mappings to dataclasses: strict types, sections by name, and errors that say what is accepted."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import pydantic
import pytest

from lmobj import _settings, _yaml
from lmobj.errors import UserError

_FORBID: dict[str, str] = {"extra": "forbid"}


@dataclasses.dataclass(frozen=True)
class Circle:
    """A circle."""

    __pydantic_config__: ClassVar[Any] = _FORBID
    name: Literal["circle"] = "circle"
    """Selects it."""
    radius: float = 1.0
    """Radius in metres, above 0;
    a second line."""

    def __post_init__(self) -> None:
        if self.radius <= 0:
            raise UserError(f"circle: radius is {self.radius}; accepted: above 0.")


@dataclasses.dataclass(frozen=True)
class Square:
    """A square."""

    __pydantic_config__: ClassVar[Any] = _FORBID
    name: Literal["square"] = "square"
    """Selects it."""
    side: float = 1.0
    """Side in metres."""
    inside: Circle | Square | None = None
    """Another shape."""


Shape = Circle | Square


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    """Inherited."""

    __pydantic_config__: ClassVar[Any] = _FORBID
    count: int = 3
    """How many."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing(Base):
    """Every kind of field."""

    title: str
    """Its title."""
    size: float = 1.0
    """Its size."""
    visible: bool = True
    """Whether it shows."""
    mode: Literal["fast", "slow"] = "fast"
    """How."""
    limit: int | None = None
    """At most."""
    shape: Shape = dataclasses.field(default_factory=Circle)
    """One shape."""
    tagged: Annotated[Shape, pydantic.Field(discriminator="name")] | None = None
    """A shape or none."""
    shapes: tuple[Shape, ...] = ()
    """Many shapes."""
    weights: dict[str, float | Shape] = dataclasses.field(default_factory=dict)
    """Numbers or shapes by name."""
    rules: Mapping[str, tuple[str, ...]] | None = None
    """Lists by name."""
    pair: tuple[int, float] = (1, 2.0)
    """Two numbers."""
    folder: pathlib.Path = pathlib.Path("x")
    """A path."""
    computed: int = dataclasses.field(init=False, default=7)


def build(text: str) -> Drawing:
    document = _yaml.parse(text, "f.yaml")
    if "title" not in document.values:
        document.values["title"] = "t"
    return _settings.build(Drawing, document, "f.yaml")


def refusal(text: str) -> str:
    with pytest.raises(UserError) as error:
        build(text)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_kind_of_field_is_built() -> None:
    drawing = build(
        """
        count: 5
        size: 2
        visible: false
        mode: slow
        limit: 9
        shape: {name: square, side: 1e-3, inside: {name: circle}}
        tagged: {name: circle, radius: 4}
        shapes: [{name: circle}, {name: square}]
        weights: {a: 1, b: {name: circle}}
        rules: {x: [p, q], y: []}
        pair: [3, 4]
        folder: a/b
        """
    )
    assert drawing == Drawing(
        title="t",
        count=5,
        size=2.0,
        visible=False,
        mode="slow",
        limit=9,
        shape=Square(side=1e-3, inside=Circle()),
        tagged=Circle(radius=4.0),
        shapes=(Circle(), Square()),
        weights={"a": 1.0, "b": Circle()},
        rules={"x": ("p", "q"), "y": ()},
        pair=(3, 4.0),
        folder=pathlib.Path("a/b"),
    )
    assert type(drawing.size) is float
    assert type(drawing.shape.side) is float


def test_plain_values_are_complete_and_build_the_same_again() -> None:
    drawing = build("shapes: [{name: square, inside: {name: circle, radius: 2}}]\nrules: {x: [p]}")
    values = _settings.plain(drawing)
    assert values["shapes"] == [
        {"name": "square", "side": 1.0, "inside": {"name": "circle", "radius": 2.0}},
    ]
    assert values["folder"] == "x"
    assert "computed" not in values
    assert build(_yaml.to_yaml(values)) == drawing


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("count: true", "f.yaml:1: count is true; accepted: a whole number."),
        ("count: 1.5", "f.yaml:1: count is 1.5; accepted: a whole number."),
        ("count: 1e4", "f.yaml:1: count is 10000.0; accepted: a whole number. Write 10000."),
        ("count: '3'", "f.yaml:1: count is '3'; accepted: a whole number. Write it without quotes: 3."),
        ("count: three", 'f.yaml:1: count is "three"; accepted: a whole number.'),
        ("count: null", "f.yaml:1: count is null; accepted: a whole number."),
        ("count: [1]", "f.yaml:1: count is [1]; accepted: a whole number."),
        ("size: true", "f.yaml:1: size is true; accepted: a number."),
        ("size: '1e-3'", "f.yaml:1: size is '1e-3'; accepted: a number. Write it without quotes: 1e-3."),
        ("visible: 1", "f.yaml:1: visible is 1; accepted: true or false."),
        ("visible: off", "f.yaml:1: visible is 'off'; accepted: true or false. Write true or false, without quotes."),
        ("title: 12", 'f.yaml:1: title is 12; accepted: text. Put it in quotes: "12".'),
        ("title: {a: 1}", "f.yaml:1: title is {a: 1}; accepted: text."),
        ("mode: fsat", 'f.yaml:1: mode is "fsat"; accepted: one of fast, slow. Did you mean fast?'),
        ("limit: x", 'f.yaml:1: limit is "x"; accepted: a whole number or null.'),
        ("pair: [1]", "f.yaml:1: pair is [1]; accepted: a list of exactly 2: a whole number, a number."),
        ("rules: {x: p}", 'f.yaml:1: rules.x is "p"; accepted: a list of text.'),
        ("rules: [x]", "f.yaml:1: rules is [x]; accepted: a mapping of keys to lists of text or null."),
        ("folder: 3", "f.yaml:1: folder is 3; accepted: a path."),
    ],
)
def test_wrong_types_are_refused(text: str, message: str) -> None:
    assert refusal(text) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shape: circle", 'f.yaml:1: shape is "circle"; accepted: a section with name one of circle, square.'),
        ("shape: null", "f.yaml:1: shape is null; accepted: a section with name one of circle, square."),
        ("shape: {radius: 2}", "f.yaml:1: shape.name is missing; accepted: circle, square."),
        ("shape:\n  name: cirle", 'f.yaml:2: shape.name is "cirle"; accepted: circle, square. Did you mean circle?'),
        ("shape: {name: [1]}", "f.yaml:1: shape.name is [1]; accepted: circle, square."),
        ("tagged: {name: x}", 'f.yaml:1: tagged.name is "x"; accepted: circle, square.'),
        (
            "shapes: [{name: circle}, 3]",
            "f.yaml:1: shapes.1 is 3; accepted: a section with name one of circle, square.",
        ),
        (
            "weights: {a: x}",
            'f.yaml:1: weights.a is "x"; accepted: a number or a section with name one of circle, square.',
        ),
        ("weights: {a: {name: x}}", 'f.yaml:1: weights.a.name is "x"; accepted: circle, square.'),
        ("shape:\n  name: circle\n  radius: -1", "f.yaml:1: shape: circle: radius is -1.0; accepted: above 0."),
    ],
)
def test_wrong_sections_are_refused(text: str, message: str) -> None:
    assert refusal(text) == message


def test_unknown_keys_name_the_nearest_known_one() -> None:
    assert refusal("count: 1\ncuont: 2").startswith(
        "f.yaml:2: unknown key cuont (value 2). Did you mean count? The keys are "
    )
    assert refusal("shape: {name: square, sde: 2}") == (
        "f.yaml:1: unknown key shape.sde (value 2). Did you mean shape.side? "
        "The keys of shape (square) are name, side, inside."
    )
    assert "Did you mean shape.radius?" in refusal("radius: 2"), "a key of another section"
    assert "Did you mean" not in refusal("xyzzy: 2")
    assert refusal("shapes: [{name: circle, sid: 1}]").startswith("f.yaml:1: unknown key shapes.0.sid ")
    assert refusal("computed: 1").startswith("f.yaml:1: unknown key computed")


def test_missing_keys_are_refused() -> None:
    with pytest.raises(UserError) as error:
        _settings.build(Drawing, _yaml.parse("count: 1", "f.yaml"), "f.yaml")
    assert str(error.value) == "f.yaml: title is missing; accepted: text."


def test_an_override_is_named_as_the_place() -> None:
    document = _yaml.merge(_yaml.parse("title: t\ncount: 1", "f.yaml"), _yaml.parse_overrides(["count=x"]))
    with pytest.raises(UserError) as error:
        _settings.build(Drawing, document, "f.yaml")
    assert str(error.value) == """override 'count=x': count is "x"; accepted: a whole number."""


def test_field_docs_are_the_literals_under_the_fields() -> None:
    docs = _settings.field_docs(Drawing)
    assert docs["title"] == "Its title."
    assert docs["count"] == "How many.", "inherited"
    assert "computed" not in docs
    assert _settings.field_docs(Circle)["radius"] == "Radius in metres, above 0; a second line."
