"""What devices exchange in a compiled program: which collectives, how often, and how many bytes each device sends."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmobj.train.hlo import Computation, Instruction, array_bytes, dimensions, sum_over

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

    def own(line: Instruction, inside: Computation) -> Mapping[str, float]:
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
        key = f"{kind}/{'across' if across else 'within'}"
        return {f"{key}/count": 1, f"{key}/payload": payload, f"{key}/sent": sent}

    total = sum_over(hlo_text, own, what="collectives")
    return tuple(
        Collective(kind, across, int(total[f"{key}/count"]), int(total[f"{key}/payload"]), total[f"{key}/sent"])
        for kind in KINDS
        for across in (False, True)
        if f"{(key := f'{kind}/{"across" if across else "within"}')}/count" in total
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


def _groups(line: Instruction, inside: Computation) -> Sequence[Sequence[int]]:
    """The devices that exchange with one another. A permutation's are its pairs, those to oneself left out."""
    text = line.attributes
    if line.op.startswith("collective-permute"):
        pairs = re.search(r"source_target_pairs=\{(.*?)\}(?:,|$)", text.replace(" ", ""))
        found = _lists(pairs[1] if pairs else "")
        return [pair for pair in found if pair[0] != pair[1]] or [[0]]
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", text)
    if listed:
        return _lists(listed[1]) or [list(range(inside.devices))]
    counted = re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", text)
    if counted:
        return _counted(counted[1]).tolist()
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*(?:\([^)]*\))?[^)]*)\))? \{([^}]*)\}", text)
    if mesh is None:
        raise ValueError(f"groups of devices that cannot be read: {line.op} {text[:200]}")
    return _of_mesh(mesh[1], mesh[2], mesh[3])


def _lists(text: str) -> list[list[int]]:
    """`{0,1},{2,3}` -> [[0, 1], [2, 3]]."""
    return [[int(number) for number in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)]


def _counted(text: str) -> NDArray[np.int64]:
    """`[2,4]<=[4,2]T(1,0)`: 0, 1, 2, ... in the shape [4, 2], transposed, in the shape [2, 4]."""
    shapes = re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if shapes is None:
        raise ValueError(f"a list of devices that cannot be read: {text}")
    shape, counted, order = ([int(n) for n in part.split(",")] if part else None for part in shapes.groups())
    assert shape is not None and counted is not None
    ids = np.arange(math.prod(counted)).reshape(counted)
    return (ids if order is None else ids.transpose(order)).reshape(shape)


def _of_mesh(sizes: str, ids: str | None, axes: str) -> list[list[int]]:
    """Groups along some axes of a mesh: `'a'=2,'b'=4` and `'b'`; of an axis a part may be taken, `'b':(2)2`."""
    mesh = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    shape: list[int] = []
    grouped: list[int] = []
    wanted = {name: (before, size) for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)}
    for name, size in mesh.items():
        before, taken = wanted.get(name, ("", ""))
        parts = [int(before), int(taken), size // (int(before) * int(taken))] if taken else [size]
        if name in wanted:
            grouped.append(len(shape) + (1 if taken else 0))
        shape += parts
    devices = np.arange(math.prod(shape)) if ids is None else _device_ids(ids)
    kept = [axis for axis in range(len(shape)) if axis not in grouped]
    members = math.prod(shape[axis] for axis in grouped)
    return devices.reshape(shape).transpose([*kept, *grouped]).reshape(-1, members).tolist()


def _device_ids(text: str) -> NDArray[np.int64]:
    """`0,2,1,3`, or counted."""
    if "<=" in text:
        return _counted(text).reshape(-1)
    counts = re.fullmatch(r"\[(\d+)\]", text)
    return np.arange(int(counts[1])) if counts else np.array([int(number) for number in text.split(",")])
