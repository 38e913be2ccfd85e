"""What devices exchange in a compiled program: which collectives, how often, and how many bytes each device sends."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmobj.train.hlo import Computation, Cost, Instruction, array_bytes, dimensions, sum_over

__all__ = ["KINDS", "Collective", "collectives"]

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
"""What is counted."""

_UNCHANGED = ("bitcast", "convert", "copy", "reshape", "transpose")
"""Operations through which an all-reduce is still followed to the slice that is taken of it."""


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind in one run of a program."""

    kind: str
    across: bool
    """Whether their groups reach beyond one domain of fast links."""
    count: int
    """How often a device takes part."""
    payload: int
    """Bytes of the whole arrays: what is gathered, reduced, exchanged or passed on, on one device."""
    sent: float
    """Bytes that each device sends, by the algorithms that send least: of an array of n bytes in a group of g devices
    (g - 1) / g n to gather, scatter or exchange it, twice that to reduce it on all of them (Thakur et al. 2005), and n
    to pass it on."""


def collectives(hlo_text: str, *, domain: int | None = None, partitioned: bool = False) -> tuple[Collective, ...]:
    """The collectives in one run of a compiled program, on each of its devices; loops multiply.

    Asynchronous ones count where they start. Groups of one device send nothing and are left out.

    Args:
      hlo_text: the program.
      domain: how many consecutive devices fast links join; None: all.
      partitioned: the text is the partitioner's, which no backend has rewritten. An all-reduce of which each device
        reads its share alone is then a reduce-scatter, as compilers for accelerators make it one.

    Raises:
      UserError: a collective in a loop of which it is not known how often it turns.
    """

    def own(line: Instruction, inside: Computation) -> Cost:
        kind = line.op.removesuffix("-start").removeprefix("ragged-")
        if kind not in KINDS:
            return {}
        groups = _groups(line, inside)
        members = len(groups[0])
        if members == 1:
            return {}
        if kind == "all-reduce" and _is_scattered(line, inside, members, partitioned):
            kind = "reduce-scatter"
        across = domain is not None and any(min(group) // domain != max(group) // domain for group in groups)
        given = sum(array_bytes(inside.shape_of(operand)) for operand in line.operands)
        payload = given * members if kind == "all-gather" else given
        share = {"all-reduce": 2 * (members - 1) / members, "collective-permute": 1}
        sent = payload * share.get(kind, (members - 1) / members)
        return {(kind, across, "count"): 1, (kind, across, "payload"): payload, (kind, across, "sent"): sent}

    total = sum_over(hlo_text, own, what="collectives")
    return tuple(
        Collective(kind, across, *(total[kind, across, part] for part in ("count", "payload", "sent")))  # type: ignore[arg-type]
        for kind in KINDS
        for across in (False, True)
        if (kind, across, "count") in total
    )


def _is_scattered(line: Instruction, inside: Computation, members: int, partitioned: bool) -> bool:
    """Whether an all-reduce is a reduce-scatter. TPUs write these as a fusion of an all-reduce and a slice."""
    if inside.name.startswith("all-reduce-scatter"):
        return True
    if not partitioned or len(line.operands) != 1:
        return False
    whole = math.prod(dimensions(line.shape))

    def only_sliced(read: Instruction) -> bool:
        users = inside.users[read.name]
        return bool(users) and all(
            (user.op == "dynamic-slice" and math.prod(dimensions(user.shape)) * members == whole)
            or (user.op in _UNCHANGED and only_sliced(user))
            for user in users
        )

    return only_sliced(line)


# --- groups -------------------------------------------------------------------------------------------------------


_COUNTED = r"\[[\d,]+\](?:T\([\d,]+\))?"
_MESH = re.compile(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(({_COUNTED}|[\d,]+)\))? \{{([^}}]*)\}}")


def _groups(line: Instruction, inside: Computation) -> Sequence[Sequence[int]]:
    """The devices that exchange with one another. A permutation's are its pairs, those to oneself left out."""
    text = line.attributes
    if line.op.startswith("collective-permute"):
        pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text)
        found = _lists(pairs[1] if pairs else "")
        return [pair for pair in found if pair[0] != pair[1]] or [[0]]
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", text)
    if listed:
        return _lists(listed[1]) or [list(range(inside.devices))]
    counted = re.search(rf"replica_groups=\[([\d,]+)\]<=({_COUNTED})", text)
    if counted:
        groups: list[list[int]] = _ids(counted[2]).reshape(_sizes(counted[1])).tolist()
        return groups
    mesh = _MESH.search(text)
    if mesh is None:
        raise ValueError(f"groups of devices that cannot be read: {line.op} {text[:200]}")
    return _of_mesh(mesh[1], mesh[2], mesh[3])


def _lists(text: str) -> list[list[int]]:
    """`{0,1},{2,3}` -> [[0, 1], [2, 3]]."""
    return [_sizes(group) for group in re.findall(r"\{([\d,]+)\}", text)]


def _sizes(text: str) -> list[int]:
    """`2,4` -> [2, 4]."""
    return [int(size) for size in text.split(",") if size]


def _ids(text: str) -> NDArray[np.int64]:
    """`[4,2]T(1,0)`: 0, 1, 2, ... in the shape [4, 2], transposed, in one row. Or the row itself: `0,2,1,3`."""
    counted = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if counted is None:
        return np.array(_sizes(text))
    shape = _sizes(counted[1])
    ids = np.arange(math.prod(shape)).reshape(shape)
    return (ids.transpose(_sizes(counted[2])) if counted[2] else ids).reshape(-1)


def _of_mesh(sizes: str, ids: str | None, axes: str) -> list[list[int]]:
    """Groups along some axes of a mesh: `'a'=2,'b'=4` and `'b'`; of an axis a part may be taken, `'b':(2)2`."""
    wanted = {name: (before, size) for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)}
    shape: list[int] = []
    grouped: list[int] = []
    for name, size in re.findall(r"'([^']+)'=(\d+)", sizes):
        before, taken = wanted.get(name, ("", ""))
        if name in wanted:
            grouped.append(len(shape) + bool(taken))
        shape += [int(before), int(taken), int(size) // (int(before) * int(taken))] if taken else [int(size)]
    devices = np.arange(math.prod(shape)) if ids is None else _ids(ids)
    kept = [axis for axis in range(len(shape)) if axis not in grouped]
    members = math.prod(shape[axis] for axis in grouped)
    found: list[list[int]] = devices.reshape(shape).transpose([*kept, *grouped]).reshape(-1, members).tolist()
    return found
