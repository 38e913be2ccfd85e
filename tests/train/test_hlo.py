"""Programs as XLA prints them: loops, branches, asynchronous operations and groups of devices, in texts by hand."""

from __future__ import annotations

import pytest

from lmobj.errors import UserError
from lmobj.train.collectives import Collective, collectives
from lmobj.train.hlo import array_bytes
from lmobj.train.products import matmul_flops

_ADD = """
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}
"""


def program(*lines: str, computations: str = "", devices: int = 8) -> str:
    """A program of 1,024 floats on several devices, whose entry has these lines."""
    inside = "\n".join(f"  {line}" for line in lines)
    return (
        f"HloModule jit_f, is_scheduled=true, num_partitions={devices}\n{_ADD}{computations}\n"
        f"ENTRY %main (a: f32[1024]) -> f32[1024] {{\n  %a = f32[1024]{{0}} parameter(0)\n{inside}\n}}\n"
    )


def only(text: str, **options: object) -> Collective:
    (found,) = collectives(text, **options)  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("bf16[8,4]{1,0:T(8,128)(2,1)}", 64),
        ("f32[]", 4),
        ("(f32[2,3]{1,0}, /*index=1*/s8[5]{0}, pred[7])", 24 + 5 + 7),
        ("f8e4m3fn[16]", 16),
        ("s4[5]", 3),
        ("u32[]{:S(2)}", 4),
        ("token[]", 0),
    ],
)
def test_bytes_of_shapes(shape: str, expected: int) -> None:
    assert array_bytes(shape) == expected


# 1,024 floats are 4,096 bytes. Of eight devices each sends 7/8 of what is gathered (8 * 4,096), scattered or
# exchanged (4,096), and twice that to reduce; all of it to pass it on.
@pytest.mark.parametrize(
    ("line", "payload", "sent"),
    [
        ("all-gather(%a), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}", 32768, 28672),
        ("reduce-scatter(%a), replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add", 4096, 3584),
        ("all-reduce(%a), replica_groups={}, to_apply=%add", 4096, 7168),
        ("all-reduce(%a), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add", 4096, 4096),
        ("all-to-all(%a), replica_groups=mesh['x'=1,'y'=8] {'y'}, dimensions={0}", 4096, 3584),
        ("collective-permute(%a), source_target_pairs={{0,1},{1,2},{2,0}}", 4096, 4096),
    ],
)
def test_what_each_kind_sends(line: str, payload: int, sent: int) -> None:
    found = only(program(f"ROOT %r = f32[1024]{{0}} {line}"))
    assert (found.kind, found.count, found.payload, found.sent) == (line.partition("(")[0], 1, payload, sent)


def test_groups_of_one_send_nothing() -> None:
    assert collectives(program("ROOT %r = f32[1024]{0} all-reduce(%a), replica_groups=[8,1]<=[8], to_apply=%add")) == ()
    assert (
        collectives(program("ROOT %r = f32[1024]{0} collective-permute(%a), source_target_pairs={{0,0},{1,1}}")) == ()
    )


# Which groups these are: consecutive pairs, or devices four apart, which links of four do not join.
@pytest.mark.parametrize(
    ("groups", "members", "across"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", 2, False),
        ("[4,2]<=[8]", 2, False),
        ("[4,2]<=[2,4]T(1,0)", 2, True),
        ("mesh['x'=2,'y'=4] {'y'}", 4, False),
        ("mesh['x'=2,'y'=4] {'x'}", 2, True),
        ("mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y'}", 2, True),
        ("mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x'}", 4, False),
        ("mesh['x'=8] {'x':(1)2}", 2, True),
        ("mesh['x'=8] {'x':(4)2}", 2, False),
        ("mesh['x'=2,'y'=4] {'x','y'}", 8, True),
        ("mesh['x'=2,'y'=2], device_ids=(0,2,1,3) {'y'}", 2, False),
    ],
)
def test_groups_of_devices(groups: str, members: int, across: bool) -> None:
    text = program(f"ROOT %r = f32[8192]{{0}} all-gather(%a), replica_groups={groups}, dimensions={{0}}")
    found = only(text, domain=4)
    assert (found.payload, found.across) == (4096 * members, across)


def test_groups_that_nobody_knows_are_an_error() -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        collectives(program("ROOT %r = f32[1024]{0} all-reduce(%a), replica_groups=everyone, to_apply=%add"))


def test_asynchronous_collectives_count_once() -> None:
    started = program(
        "%s = (f32[1024]{0}, f32[8192]{0}) all-gather-start(%a), replica_groups=[1,8]<=[8], dimensions={0}",
        "ROOT %d = f32[8192]{0} all-gather-done(%s)",
    )
    assert only(started) == Collective("all-gather", False, 1, 32768, 28672)
    wrapped = program(
        "%s = ((f32[1024]{0}), f32[1024]{0}, u32[]) async-start(%a), calls=%inner",
        "%u = ((f32[1024]{0}), f32[1024]{0}, u32[]) async-update(%s), calls=%inner",
        "ROOT %d = f32[1024]{0} async-done(%u), calls=%inner",
        computations="""
%inner (p: f32[1024]) -> f32[1024] {
  %p = f32[1024]{0} parameter(0)
  ROOT %x = f32[1024]{0} all-to-all(%p), replica_groups=[1,8]<=[8], dimensions={0}
}
""",
    )
    assert only(wrapped) == Collective("all-to-all", False, 1, 4096, 3584)
    # A permutation's start has contexts in its tuple, which do not travel.
    permuted = program(
        "%s = (f32[1024]{0}, f32[1024]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%a), "
        "source_target_pairs={{0,1},{1,0}}",
        "ROOT %d = f32[1024]{0} collective-permute-done(%s)",
    )
    assert only(permuted).sent == 4096


def test_collectives_of_several_arrays() -> None:
    text = program(
        "%b = bf16[256]{0} convert(%c)",
        "%c = f32[256]{0} slice(%a), slice={[0:256]}",
        "%r = (f32[1024]{0}, bf16[256]{0}) all-reduce(%a, %b), replica_groups={{0,1}}, to_apply=%add",
        "ROOT %g = f32[1024]{0} get-tuple-element(%r), index=0",
    )
    assert only(text) == Collective("all-reduce", False, 1, 4096 + 512, 4608)


def _loop(start: int, end: int, step: int, *, told: str = "", initial: str = "constant({})") -> str:
    """A loop over i = start, start + step, ... below end, whose body has one product and one all-reduce."""
    state = "(s32[], f32[8,8])"
    return program(
        f"%i0 = s32[]{{:T(128)}} {initial.format(start)}",
        "%i1 = s32[] copy(%i0)",
        "%m = f32[8,8]{1,0} bitcast(%a)",
        f"%t = {state} tuple(%i1, %m)",
        f"%w = {state} while(%t), condition=%cond, body=%body{told}",
        "ROOT %r = f32[8,8]{1,0} get-tuple-element(%w), index=1",
        computations=f"""
%cond (s: {state}) -> pred[] {{
  %s = {state} parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] constant({end})
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}}

%next (p: s32[], q: s32[]) -> s32[] {{
  %p = s32[] parameter(0)
  %q = s32[] parameter(1)
  ROOT %plus = s32[] add(%p, %q)
}}

%body (s: {state}) -> {state} {{
  %s = {state} parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[8,8]{{1,0}} get-tuple-element(%s), index=1
  %one = s32[] constant({step})
  %j = s32[] fusion(%i, %one), kind=kLoop, calls=%next
  %y = f32[8,8]{{1,0}} dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  %z = f32[8,8]{{1,0}} all-reduce(%y), replica_groups={{{{0,1}}}}, to_apply=%add
  ROOT %out = {state} tuple(%j, %z)
}}
""",
    )


# 0, 1, ..., 11; 3, ..., 11; and 0, 2, ..., 10 of a loop that does two rounds at once.
@pytest.mark.parametrize(
    ("start", "end", "step", "turns"), [(0, 12, 1, 12), (3, 12, 1, 9), (0, 11, 2, 6), (5, 5, 1, 0)]
)
def test_loops_whose_turns_are_read_off_their_constants(start: int, end: int, step: int, turns: int) -> None:
    text = _loop(start, end, step)
    assert matmul_flops(text) == turns * 2 * 8 * 8 * 8
    assert sum(found.count for found in collectives(text)) == turns


def test_what_the_compiler_says_of_a_loop_goes_first() -> None:
    told = ', backend_config={"known_trip_count":{"n":"7"}}'
    assert only(_loop(0, 12, 1, told=told)).count == 7


def test_loops_that_start_anywhere_are_refused() -> None:
    for what, count in (("matrix products", matmul_flops), ("collectives", collectives)):
        with pytest.raises(UserError, match=f"has {what} in the loop w,"):
            count(_loop(0, 12, 1, initial="custom-call()"))  # type: ignore[operator]


def test_of_branches_the_one_that_exchanges_most_counts() -> None:
    branch = """
%{0} (p{0}: f32[1024]) -> f32[1024] {{
  %p{0} = f32[1024]{{0}} parameter(0)
  ROOT %x{0} = f32[1024]{{0}} all-reduce(%p{0}), replica_groups={1}, to_apply=%add
}}
"""
    text = program(
        "%k = s32[] constant(0)",
        "ROOT %r = f32[1024]{0} conditional(%k, %a, %a), branch_computations={%left, %right}",
        computations=branch.format("left", "[4,2]<=[8]") + branch.format("right", "[1,8]<=[8]"),
    )
    assert only(text).sent == 7168


def test_a_reduction_of_which_shares_are_read_is_a_scatter() -> None:
    lines = (
        "%r = f32[1024]{0} all-reduce(%a), replica_groups=[1,8]<=[8], to_apply=%add",
        "%k = s32[] constant(0)",
        "%c = f32[1024]{0} copy(%r)",
        "ROOT %d = f32[128]{0} dynamic-slice(%c, %k), dynamic_slice_sizes={128}",
    )
    assert only(program(*lines), partitioned=True) == Collective("reduce-scatter", False, 1, 4096, 3584)
    assert only(program(*lines)).kind == "all-reduce", "a backend that left it so has meant it"
    whole = (
        *lines[:3],
        "%d = f32[128]{0} dynamic-slice(%c, %k), dynamic_slice_sizes={128}",
        "ROOT %n = f32[1024]{0} negate(%r)",
    )
    assert only(program(*whole), partitioned=True).kind == "all-reduce"
    half = (*lines[:3], "ROOT %d = f32[512]{0} dynamic-slice(%c, %k), dynamic_slice_sizes={512}")
    assert only(program(*half), partitioned=True).kind == "all-reduce"


def test_a_scatter_as_tpus_write_it() -> None:
    text = program(
        "ROOT %f = f32[128]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1",
        computations="""
%all-reduce-scatter.1 (p: f32[1024]) -> f32[128] {
  %p = f32[1024]{0} parameter(0)
  %r = f32[1024]{0} all-reduce(%p), replica_groups=[1,8]<=[8], to_apply=%add
  %k = s32[] constant(0)
  ROOT %d = f32[128]{0} dynamic-slice(%r, %k), dynamic_slice_sizes={128}
}
""",
    )
    assert only(text).kind == "reduce-scatter"


# TPUs' products with a batch axis: 32 products of [8192, 4096] and [4096, 128]; and 8 of [6, 128] and [128, 10], each
# window of 8 meeting one element. A plain convolution: [2, 5, 3] with a window of 3 and padding 1 on either side meets
# 5 * 3 - 2 elements for each of 2 rows, 3 input and 4 output features.
@pytest.mark.parametrize(
    ("left", "right", "result", "attributes", "flops"),
    [
        (
            "bf16[8192,4096,1]", "bf16[32,128,4096]", "bf16[8192,32,128]",
            "window={size=32 pad=31_31 rhs_reversal=1}, dim_labels=bf0_0oi->b0f", 2 * 32 * 8192 * 4096 * 128,
        ),
        (
            "bf16[8,6,128]", "bf16[8,10,128]", "f32[8,6,10]",
            "window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0oi->0bf", 2 * 8 * 6 * 128 * 10,
        ),
        (
            "f32[2,5,3]", "f32[3,3,4]", "f32[2,5,4]",
            "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", 2 * 2 * 3 * 4 * 13,
        ),
    ],
)  # fmt: skip
def test_products_written_as_convolutions(left: str, right: str, result: str, attributes: str, flops: int) -> None:
    text = program(
        f"%l = {left} bitcast(%a)",
        f"%k = {right} bitcast(%a)",
        f"ROOT %c = {result} convolution(%l, %k), {attributes}",
    )
    assert matmul_flops(text) == flops


def test_kernels_whose_work_is_hidden_are_refused() -> None:
    with pytest.raises(UserError, match="calls tpu_custom_call, whose FLOPs cannot be counted"):
        matmul_flops(program('ROOT %c = f32[64] custom-call(%a), custom_call_target="tpu_custom_call"'))
