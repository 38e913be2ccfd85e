"""Matrix products counted in a compiled program.

What is counted is matrix products, the convention behind "6 N D" and model FLOPs utilisation: a product of [m, k] and
[k, n] is 2 m k n operations, a multiplication and an addition each. Every product counts as often as the loops around
it turn. What the compiler removed is not counted, and what it computes twice (recomputation in the backward pass) is
counted twice.

Left out are elementwise operations, and products that the compiler turned into sums, such as those with a single
output column.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re

from lmobj.errors import UserError
from lmobj.train.assemble import Design
from lmobj.train.hlo import Computation, Instruction, dimensions, numbers, sum_over

__all__ = ["matmul_flops", "step_flops"]

_PRODUCTS = re.compile(r"gemm|matmul|fmha|attention|conv|dot|tpu_custom_call", re.IGNORECASE)
"""Names of library calls that hold matrix products, or may."""


def matmul_flops(hlo_text: str) -> int:
    """Operations of matrix products in one run of a compiled program, on one of its devices.

    Args:
      hlo_text: `compiled.as_text()` of a jitted function.

    Raises:
      UserError: products in a loop of which it is not known how often it turns, or in a library call or kernel whose
        size the text does not tell.
    """
    total = sum_over(hlo_text, lambda line, inside: {"flops": _own_flops(line, inside)}, what="matrix products")
    return int(total.get("flops", 0))


def step_flops(design: Design, hlo_text: str) -> int:
    """Operations of one training step on all devices. `hlo_text` is the program of one of them."""
    return matmul_flops(hlo_text) * design.mesh.size


def _own_flops(line: Instruction, inside: Computation) -> int:
    """Operations of the matrix product that an instruction is; 0 if it is none."""
    if line.op == "dot":
        return _product(line, inside, numbers(line.attributes, "lhs_contracting_dims"))
    if line.op == "convolution":
        return _convolution(line, inside)
    if line.op == "custom-call":
        return _library_call(line, inside)
    return 0


def _product(line: Instruction, inside: Computation, contracted: list[int]) -> int:
    """2 * elements of the result * length of the contracted axes."""
    left = dimensions(inside.shape_of(line.operands[0]))
    return 2 * math.prod(dimensions(line.shape)) * math.prod(left[axis] for axis in contracted)


def _convolution(line: Instruction, inside: Computation) -> int:
    """2 * rows * output features * input features * pairs of window and input elements that meet.

    TPUs write matrix products as convolutions, and batched ones with windows in which all but one element of each
    window falls on padding or between dilated elements, which costs nothing.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.attributes)
    if labels is None or numbers(line.attributes, "batch_group_count") not in ([], [1]):
        raise UserError(
            f"the compiled step has the convolution {line.name}, whose FLOPs cannot be counted; accepted: devices on "
            "which matrix products are compiled to dot instructions or cuBLAS calls (CPU, GPU)."
        )
    result, kernel = dimensions(line.shape), dimensions(inside.shape_of(line.operands[1]))
    left = dimensions(inside.shape_of(line.operands[0]))
    rows = math.prod(size for size, label in zip(result, labels[3], strict=True) if label in "bf")
    features = math.prod(size for size, label in zip(kernel, labels[2], strict=True) if label == "i")
    window = re.search(r"window=\{([^}]*)\}", line.attributes)
    if window is None:
        spatial = math.prod(size for size, label in zip(kernel, labels[2], strict=True) if label not in "io")
        return 2 * rows * features * spatial
    meetings = 1
    for axis, place in enumerate(sorted(label for label in labels[1] if label.isdigit())):
        inputs, outputs = left[labels[1].index(place)], result[labels[3].index(place)]
        meetings *= _meetings(window[1], axis, inputs, outputs)
    return 2 * rows * features * meetings


def _meetings(window: str, axis: int, inputs: int, outputs: int) -> int:
    """Pairs (output element, window element) along one axis that fall on an input element."""

    def of(key: str, default: str) -> str:
        found = re.search(rf"\b{key}=([\d_x\-]+)", window)
        return found[1].split("x")[axis] if found else default

    size, stride, padding = int(of("size", "1")), int(of("stride", "1")), int(of("pad", "0_0").split("_")[0])
    spread, dilation = int(of("lhs_dilate", "1")), int(of("rhs_dilate", "1"))
    places = (o * stride + k * dilation - padding for o in range(outputs) for k in range(size))
    return sum(place >= 0 and place % spread == 0 and place // spread < inputs for place in places)


def _library_call(line: Instruction, inside: Computation) -> int:
    """A call of cuBLAS, which says what it contracts. Other calls are no products, as far as their names tell."""
    target = re.search(r'custom_call_target="([^"]*)"', line.attributes)
    name = target[1] if target else ""
    if not _PRODUCTS.search(name):
        return 0
    told = re.search(r'"dot_dimension_numbers":(\{[^}]*\})', line.attributes)
    if told is None:
        raise UserError(
            f"the compiled step calls {name}, whose FLOPs cannot be counted; accepted: model.attention_backend=xla."
        )
    contracted = [int(axis) for axis in json.loads(told[1])["lhs_contracting_dimensions"]]
    result = re.search(r"\w+\[[\d,]*\]", line.shape)  # a tuple holds the workspace as well
    return _product(dataclasses.replace(line, shape=result[0] if result else line.shape), inside, contracted)
