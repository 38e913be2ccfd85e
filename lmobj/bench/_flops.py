"""Floating-point operations of a training step, counted in the compiled program.

What is counted is matrix products, the convention behind "6 N D" and model FLOPs utilisation: a product of [m, k] and
[k, n] is 2 m k n operations, a multiplication and an addition each. XLA's own `cost_analysis` will not do: it takes the
body of a loop once, so that a model whose layers are scanned seems to have one layer. Here every product counts as
often as the loops around it turn, by the trip counts that the compiler writes into the program. What the compiler
removed is not counted, and what it computes twice (recomputation in the backward pass) is counted twice.

Left out are elementwise operations, and products that the compiler turned into sums, such as those with a single
output column.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from dataclasses import dataclass, field

from lmobj.errors import UserError
from lmobj.train.assemble import Design

__all__ = ["matmul_flops", "step_flops"]


def step_flops(design: Design, hlo_text: str) -> int:
    """Counted operations of one training step on all devices. `hlo_text` is the program of one of them."""
    return matmul_flops(hlo_text) * design.mesh.size


def matmul_flops(hlo_text: str) -> int:
    """Operations of matrix products in one run of a compiled program.

    Args:
      hlo_text: `compiled.as_text()` of a jitted function.

    Raises:
      UserError: products in a loop of which the compiler does not know how often it turns, or in a library call or
        convolution whose size the text does not tell.
    """
    computations = _parse(hlo_text)
    entry = next((name for name, computation in computations.items() if computation.entry), None)
    if entry is None:
        raise ValueError("matmul_flops: the text holds no ENTRY computation; give the text of a compiled program.")

    @functools.cache
    def total(name: str) -> int:
        return sum(instruction.own_flops(computations[name]) + within(instruction)
                   for instruction in computations[name].instructions.values())  # fmt: skip

    def within(instruction: _Instruction) -> int:
        """What the computations that an instruction calls take."""
        called = [total(name) for name in instruction.called if name in computations]
        if instruction.op == "conditional":
            return max(called, default=0)
        if instruction.op != "while":
            return sum(called)
        if not sum(called):
            return 0
        turns = instruction.trip_count
        if turns is None:
            raise UserError(
                f"the compiled step has matrix products in the loop {instruction.name}, and the compiler does not know "
                "how often it turns, so its FLOPs cannot be counted; accepted: objectives and models whose loops turn "
                "a fixed number of times."
            )
        return turns * sum(called)

    return total(entry)


@dataclass(frozen=True)
class _Instruction:
    """One line of a computation: `%name = type op(operands), attributes`."""

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    attributes: str

    @functools.cached_property
    def called(self) -> list[str]:
        """Computations that it runs."""
        found: list[str] = []
        for one, several in _CALLED.findall(self.attributes):
            found += [one] if one else re.findall(r"[\w.\-]+", several)
        return found

    @property
    def trip_count(self) -> int | None:
        """How often a loop turns, where the compiler knows."""
        found = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', self.attributes)
        return int(found[1]) if found else None

    def own_flops(self, inside: _Computation) -> int:
        """Operations of the matrix product that this instruction is; 0 if it is none."""
        if self.op == "dot":
            contracted = _numbers(self.attributes, "lhs_contracting_dims")
            return self._product(inside, contracted)
        if self.op == "convolution":
            return self._convolution(inside)
        if self.op == "custom-call":
            return self._library_call(inside)
        return 0

    def _product(self, inside: _Computation, contracted: list[int]) -> int:
        """2 * elements of the result * length of the contracted axes."""
        left = _dimensions(inside.shape_of(self.operands[0]))
        return 2 * math.prod(_dimensions(self.shape)) * math.prod(left[axis] for axis in contracted)

    def _convolution(self, inside: _Computation) -> int:
        """Convolutions without a window are how TPUs write matrix products."""
        labels = re.search(r"dim_labels=\w+_(\w+)->", self.attributes)
        if "window={size" in self.attributes or labels is None:
            raise UserError(
                f"the compiled step has the convolution {self.name}, whose FLOPs cannot be counted; accepted: "
                "devices on which matrix products are compiled to dot instructions or cuBLAS calls (CPU, GPU)."
            )
        kernel = _dimensions(inside.shape_of(self.operands[1]))
        inner = math.prod(size for size, label in zip(kernel, labels[1], strict=True) if label != "o")
        return 2 * math.prod(_dimensions(self.shape)) * inner

    def _library_call(self, inside: _Computation) -> int:
        """A call of cuBLAS, which says what it contracts. Other calls are no products, as far as their names tell."""
        target = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        name = target[1] if target else ""
        if not re.search(r"gemm|matmul|fmha|attention|conv|dot", name, re.IGNORECASE):
            return 0
        numbers = re.search(r'"dot_dimension_numbers":(\{[^}]*\})', self.attributes)
        if numbers is None:
            raise UserError(
                f"the compiled step calls {name}, whose FLOPs cannot be counted; accepted: model.attention_backend=xla."
            )
        contracted = [int(axis) for axis in json.loads(numbers[1])["lhs_contracting_dimensions"]]
        result = re.search(r"\w+\[[\d,]*\]", self.shape)  # a tuple holds the workspace as well
        return dataclasses.replace(self, shape=result[0] if result else self.shape)._product(inside, contracted)


@dataclass
class _Computation:
    entry: bool
    instructions: dict[str, _Instruction] = field(default_factory=dict)

    def shape_of(self, operand: str) -> str:
        """The shape of an operand, which older compilers write beside its name."""
        shape, _, name = operand.rpartition("%")
        return shape if "[" in shape else self.instructions[name.strip()].shape


_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|true_computation|false_computation|branch_computations|called_computations)="
    r"(?:%?([\w.\-]+)|\{([^}]*)\})"
)


def _parse(text: str) -> dict[str, _Computation]:
    computations: dict[str, _Computation] = {}
    current: _Computation | None = None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations[header[2]] = _Computation(entry=bool(header[1]))
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _LINE.match(line)):
            name, shape, op, rest = found.groups()
            inner, attributes = _split_operands(rest)
            current.instructions[name] = _Instruction(name, shape, op, tuple(inner), attributes)
    return computations


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


def _numbers(attributes: str, key: str) -> list[int]:
    found = re.search(rf"{key}=\{{([\d,]*)\}}", attributes)
    return [int(number) for number in found[1].split(",") if number] if found else []


def _dimensions(shape: str) -> list[int]:
    """`f32[8,32]{1,0}` -> [8, 32]."""
    found = re.search(r"\[([\d,]*)\]", shape)
    if found is None:
        raise ValueError(f"no array shape: {shape}")
    return [int(size) for size in found[1].split(",") if size]
