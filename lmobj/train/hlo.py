"""Compiled programs as XLA prints them: their instructions, and sums over what runs.

XLA's own `cost_analysis` takes the body of a loop once, so that a model whose layers are scanned seems to have one
layer. `sum_over` counts every instruction as often as the loops around it turn.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field

from lmobj.errors import UserError

__all__ = ["Computation", "Cost", "Instruction", "array_bytes", "dimensions", "numbers", "parse", "sum_over"]

Cost = Mapping[Hashable, float]
"""What is counted, by any key."""


def sum_over(text: str, own: Callable[[Instruction, Computation], Cost], *, what: str) -> dict[Hashable, float]:
    """The sum of `own` over every instruction of a program, each as often as it runs.

    Of the branches of a conditional the one with the largest sum counts. What the trip count of a loop is, the
    compiler says; where it does not (TPU), it is read off a loop that counts up from one constant to another.

    Args:
      text: `compiled.as_text()` of a jitted function.
      own: (instruction, the computation that it stands in) -> what it costs by itself, without what it calls.
      what: names what is counted, for the message.

    Raises:
      UserError: something that counts is in a loop of which it is not known how often it turns.
      ValueError: the text holds no program.
    """
    computations = parse(text)
    entry = next((name for name, computation in computations.items() if computation.entry), None)
    if entry is None:
        raise ValueError(f"{what}: the text holds no ENTRY computation; give the text of a compiled program.")

    @functools.cache
    def total(name: str) -> dict[Hashable, float]:
        inside = computations[name]
        return _added(
            part for line in inside.instructions.values() for part in (own(line, inside), within(line, inside))
        )

    def within(line: Instruction, inside: Computation) -> Cost:
        """What the computations that an instruction calls take."""
        called = [total(name) for name in line.called if name in computations]
        if line.op == "conditional":
            return max(called, key=lambda cost: sum(cost.values()), default={})
        together = _added(called)
        if line.op != "while" or not any(together.values()):
            return together
        turns = _trip_count(line, inside, computations)
        if turns is None:
            raise UserError(
                f"the compiled step has {what} in the loop {line.name}, and the compiler does not know how often it "
                f"turns, so they cannot be counted; accepted: objectives and models whose loops turn a fixed number "
                "of times."
            )
        return {name: turns * cost for name, cost in together.items()}

    return total(entry)


def _added(costs: Iterable[Cost]) -> dict[Hashable, float]:
    together: dict[Hashable, float] = {}
    for cost in costs:
        for name, value in cost.items():
            together[name] = together.get(name, 0) + value
    return together


@dataclass(frozen=True)
class Instruction:
    """One line of a computation: `%name = type op(operands), attributes`."""

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    attributes: str

    @functools.cached_property
    def called(self) -> list[str]:
        """Computations that it runs. The end of an asynchronous operation names the same as its start: not twice."""
        if self.op in ("async-update", "async-done"):
            return []
        found: list[str] = []
        for one, several in _CALLED.findall(self.attributes):
            found += [one] if one else re.findall(r"[\w.\-]+", several)
        return found

    def attribute(self, key: str) -> str | None:
        """`key=%name` among the attributes: the name."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None


@dataclass
class Computation:
    """A list of instructions, by name."""

    name: str
    entry: bool
    devices: int
    """That run the program."""
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""

    def defined(self, operand: str) -> Instruction | None:
        """The instruction that an operand is the result of."""
        return self.instructions.get(operand.rpartition("%")[2].strip())

    def shape_of(self, operand: str) -> str:
        """The shape of an operand, which older compilers write beside its name."""
        shape, _, name = operand.rpartition("%")
        return shape if "[" in shape else self.instructions[name.strip()].shape

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that read each one's result."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for line in self.instructions.values():
            for operand in line.operands:
                read = self.defined(operand)
                if read is not None:
                    found[read.name].append(line)
        return found


# --- loops --------------------------------------------------------------------------------------------------------


def _trip_count(line: Instruction, inside: Computation, computations: Mapping[str, Computation]) -> int | None:
    """How often a loop turns, if that can be known."""
    told = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line.attributes)
    if told:
        return int(told[1])
    condition, body = (computations.get(line.attribute(key) or "") for key in ("condition", "body"))
    if condition is None or body is None:
        return None
    bound = _upper_bound(condition, computations)
    if bound is None:
        return None
    index, end = bound
    start, step = _constant_in_tuple(line.operands[0], index, inside), _increment(body, index, computations)
    if start is None or step is None or step < 1:
        return None
    return max(-(-(end - start) // step), 0)


def _upper_bound(condition: Computation, computations: Mapping[str, Computation]) -> tuple[int, int] | None:
    """(i, n) of a condition `state[i] < n`."""
    root, where = condition.instructions[condition.root], condition
    given: tuple[str, ...] = ()
    if root.op == "fusion":
        given, where = root.operands, computations[root.called[0]]
        root = where.instructions[where.root]
    if root.op != "compare" or "direction=LT" not in root.attributes:
        return None

    def outside(operand: str) -> Instruction | None:
        found = where.defined(operand)
        if found is not None and found.op == "parameter" and given:
            return condition.defined(given[int(found.operands[0])])
        return found

    left, right = (outside(operand) for operand in root.operands)
    if left is None or right is None or left.op != "get-tuple-element" or right.op != "constant":
        return None
    return numbers(left.attributes, "index")[0], int(right.operands[0])


def _constant_in_tuple(operand: str, index: int, inside: Computation) -> int | None:
    """The value of an element of a tuple, where it is a constant."""
    made = inside.defined(operand)
    if made is None or made.op != "tuple":
        return None
    element = inside.defined(made.operands[index])
    while element is not None and element.op in ("copy", "bitcast"):
        element = inside.defined(element.operands[0])
    return int(element.operands[0]) if element is not None and element.op == "constant" else None


def _increment(body: Computation, index: int, computations: Mapping[str, Computation]) -> int | None:
    """What a loop's body adds to an element of its state."""
    root = body.instructions[body.root]
    made = body.defined(root.operands[index]) if root.op == "tuple" else None
    where = body
    while made is not None and made.op in ("copy", "bitcast"):
        made = where.defined(made.operands[0])
    given: tuple[str, ...] = ()
    if made is not None and made.op == "fusion":
        given, where = made.operands, computations[made.called[0]]
        made = where.instructions[where.root]
    if made is None or made.op != "add":
        return None
    for operand in made.operands:
        part = where.defined(operand)
        if part is not None and part.op == "parameter" and given:
            part = body.defined(given[int(part.operands[0])])
        if part is not None and part.op == "constant":
            return int(part.operands[0])
    return None


# --- text ---------------------------------------------------------------------------------------------------------

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|true_computation|false_computation|branch_computations|called_computations)="
    r"(?:%?([\w.\-]+)|\{([^}]*)\})"
)
_ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+)(?:e\d+m\d+\w*)?)\[([\d,]*)\]")


def parse(text: str) -> dict[str, Computation]:
    """The computations of a program, by name."""
    header = text.split("\n", 1)[0]
    counts = (re.search(rf"\b{key}=(\d+)", header) for key in ("num_partitions", "replica_count"))
    devices = math.prod(int(count[1]) for count in counts if count)
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    for line in text.splitlines():
        if opened := _HEADER.match(line):
            current = computations[opened[2]] = Computation(opened[2], entry=bool(opened[1]), devices=devices)
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _LINE.match(line)):
            root, name, _, _, _ = found.groups()
            current.instructions[name] = _instruction(line, found)
            if root:
                current.root = name
    return computations


def _instruction(line: str, found: re.Match[str]) -> Instruction:
    """The parts of a line. A shape that is a tuple of tuples needs its brackets counted."""
    shape, op, rest = found[3], found[4], found[5]
    if shape.startswith("(("):
        whole = line.split(" = ", 1)[1]
        end = _closing(whole)
        shape = whole[: end + 1]
        op, _, rest = whole[end + 2 :].partition("(")
    inner, attributes = _split_operands(rest)
    return Instruction(found[2], shape, op, tuple(inner), attributes)


def _closing(text: str) -> int:
    """Where the bracket that the text begins with is closed."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return place
    raise ValueError(f"no closing bracket: {text[:80]}")


def _split_operands(rest: str) -> tuple[list[str], str]:
    """`a, b), attributes` -> operands and attributes. Operands may hold brackets."""
    depth, start, operands = 0, 0, []
    for place, character in enumerate(rest):
        if character in "([{":
            depth += 1
        elif character in ")]}" and depth:
            depth -= 1
        elif depth == 0 and character in ",)":
            operands.append(rest[start:place].strip())
            start = place + 1
            if character == ")":
                return operands, rest[place + 1 :]
    return operands, ""


def numbers(attributes: str, key: str) -> list[int]:
    """`key={1,2}` or `key=1` among attributes -> [1, 2] or [1]; none without it."""
    found = re.search(rf"\b{key}=(?:\{{([\d,]*)\}}|(\d+))", attributes)
    return [int(number) for number in (found[1] or found[2] or "").split(",") if number] if found else []


def dimensions(shape: str) -> list[int]:
    """`f32[8,32]{1,0}` -> [8, 32]."""
    found = re.search(r"\[([\d,]*)\]", shape)
    if found is None:
        raise ValueError(f"no array shape: {shape}")
    return [int(size) for size in found[1].split(",") if size]


def array_bytes(shape: str) -> int:
    """Bytes of an array, or of all arrays of a tuple: `bf16[8,4]{1,0}` -> 64. A truth value takes one."""
    plain = re.sub(r"\{[^}]*\}|/\*.*?\*/", "", shape)
    return sum(
        -(-math.prod(int(size) for size in sizes.split(",") if size) * (int(bits or 8)) // 8)
        for bits, sizes in _ARRAY.findall(plain)
    )
