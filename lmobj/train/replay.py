"""The text of an earlier run in the mixture that goes on from it: `{name: replay}` resolved into that run's source.

A config that was resolved says nothing of replay any more: it can be read without the earlier run, and resumed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmobj._yaml import Document, merge
from lmobj.errors import UserError

__all__ = ["replayed", "replaying"]

_SHARES = ("validation", "test")


def replayed(document: Document) -> list[str]:
    """Names of the sources of a config's mixture that stand for the text of the run in `init.run`."""
    return [name for name, entry in _sources(document.values).items() if _is_replay(entry)]


def replaying(document: Document, earlier: Mapping[str, Any], names: Sequence[str]) -> Document:
    """The config with that text's sources in the place of these.

    Args:
      document: the config.
      earlier: `source`, `clean`, `validation` and `test` of the earlier run's data, resolved.
      names: what `replayed` found.

    Raises:
      UserError: two sources of one name, or a share held out that is not the earlier run's, so that text it was trained
        on would count as held out.
    """
    shares = {key: earlier[key] for key in _SHARES if not isinstance(earlier[key], Mapping)}
    document = merge(Document({"data": {**shares, "clean": earlier["clean"]}}), document)
    data = document.values["data"]
    for key, share in shares.items():
        if data[key] != share:
            where = document.origins.get(f"data.{key}")
            raise UserError(
                f"{f'{where}: ' if where else ''}data.{key} is {data[key]!r}, and {share!r} in the run of init.run, "
                f"whose text is replayed: it was trained on what would be held out here; accepted: {share!r}."
            )
    sources: dict[str, Any] = {}
    for name, entry in _sources(document.values).items():
        for key, value in (_parts(name, entry, earlier["source"]) if name in names else {name: entry}).items():
            if key in sources:
                raise UserError(
                    f"data.source.sources.{key} is there, and a part of the text that is replayed would have the same "
                    "name; accepted: another one."
                )
            sources[key] = value
    return Document(
        {**document.values, "data": {**data, "source": {**data["source"], "sources": sources}}}, document.origins
    )


def _parts(name: str, entry: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """What a source that is replayed is made of, by name: the parts of a mixture share its weight."""
    if source["name"] != "mixture":
        return {name: {**entry, "source": source}}
    whole, weight = sum(part["weight"] for part in source["sources"].values()), entry.get("weight", 1.0)
    return {
        f"{name}-{inner}": {
            **entry,  # with what does not belong there, to be refused
            **part,
            "weight": weight * part["weight"] / whole if type(weight) in (int, float) else weight,
        }
        for inner, part in source["sources"].items()
    }


def _sources(values: Mapping[str, Any]) -> dict[str, Any]:
    """The sources of a config's mixture, which nobody has looked at yet; none where it has no such thing."""
    found: Any = values
    for key in ("data", "source", "sources"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return dict(found) if isinstance(found, Mapping) else {}


def _is_replay(entry: Any) -> bool:
    source = entry.get("source") if isinstance(entry, Mapping) else None
    return source == {"name": "replay"}
