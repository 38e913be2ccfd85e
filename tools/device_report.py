"""Checks and measures lmobj on whatever accelerator is there, and writes the report as JSON and as a markdown table.

    python tools/device_report.py                                everything for this device, into device_report/
    python tools/device_report.py --quick                        fewer checks, one tiny shape: a few minutes on 2 cores
    python tools/device_report.py --only attention --only gpt2   checks and workloads with these words in their names

Checks (`device_checks.py`): every objective, every model family, every mask under every attention backend and the loss
without logits, values and gradients, against the CPU in float64. What a backend refuses is listed as refused; anything
else that does not agree makes the exit code 1.

Measurements (`device_speed.py`): compile time, time of a step, tokens/s, memory, model FLOPs utilisation, beside
PyTorch with Transformers (eager and compiled) where they are installed, for a fixed list of shapes; and the fastest
matrix product, which says how much the device has to give. On a GPU PyTorch must be a build for it.

Each part runs in a process of its own, so that memory is its own and a crash costs one row.
"""

from __future__ import annotations

import argparse
import concurrent.futures.process
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parent.parent)]
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs some of the memory too
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import device_checks as checks  # noqa: E402
import device_speed as speed  # noqa: E402

CEILINGS = {"cpu": (("float32", (512, 1024, 2048)),)}
"""Matrix products by platform: dtype and sizes. Elsewhere `ACCELERATOR_CEILINGS`."""
ACCELERATOR_CEILINGS = (("bfloat16", (4096, 8192, 16384)), ("float32", (4096, 8192)))
QUICK_CEILINGS = (("float32", (256,)),)
QUICK = speed.Workload("gpt2", 4, 32, "float32", (), speed._gpt2(64, 2, 2, 512, 32, 0.1))

Child = Callable[..., Any]
"""(function, *arguments) -> its result."""


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a process of its own; its exception, or `BrokenProcessPool` if it died, is raised here."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_fresh, function, *arguments).result()


def _fresh(function: Callable[..., Any], *arguments: Any) -> Any:
    """The call, compiling anew whatever an earlier run has cached."""
    import jax

    jax.config.update("jax_enable_compilation_cache", False)
    return function(*arguments)


def surroundings() -> dict[str, Any]:
    """Date, versions and device."""
    import jax

    from lmobj.train.environment import environment

    found = environment()
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name):
            found["packages"][name] = importlib.metadata.version(name)
    device = jax.devices()[0]
    return found | {"platform": device.platform, "kind": device.device_kind, "load": os.getloadavg()[0]}


def run_checks(only: list[str], quick: bool) -> list[checks.Finding]:
    """The chosen checks. `quick` leaves out the variants of an objective's corruption."""
    return checks.run_checks(lambda name: chosen(name, only) and not (quick and "/" in name))


def chosen(name: str, only: list[str]) -> bool:
    """Whether a name has one of the words in it."""
    return not only or any(word in name for word in only)


def report(arguments: argparse.Namespace, child: Child = in_child) -> dict[str, Any]:
    """Everything that was asked for, as JSON values."""
    only, quick = arguments.only, arguments.quick
    where = child(surroundings)
    platform = where["platform"]
    peers = {"torch", "transformers"} <= set(where["packages"])
    left_out = {*arguments.skip, *(() if peers else ("eager", "compiled")), *(("compiled",) if quick else ())}
    contenders = tuple(name for name in speed.CONTENDERS if name not in left_out)
    workloads = {n: w for n, w in speed.WORKLOADS.items() if platform in w.platforms and chosen(n, only)}
    if quick:
        workloads = {"quick": QUICK} if chosen("quick", only) else {}
    found: dict[str, Any] = {
        "environment": where,
        "formula": speed.FLOPS,
        "checks": [],
        "ceilings": [],
        "workloads": {},
    }
    if "checks" not in arguments.skip:
        try:
            findings = child(run_checks, only, quick)
        except concurrent.futures.process.BrokenProcessPool as error:
            findings = [checks.Finding("all", "", "failed", f"the process died: {error}")]
        found["checks"] = [vars(finding) for finding in findings]
    ceilings = QUICK_CEILINGS if quick else CEILINGS.get(platform, ACCELERATOR_CEILINGS)
    for dtype, sizes in ceilings if workloads else ():
        found["ceilings"].append(child(speed.matmul_ceiling, dtype, sizes))
    for name, workload in workloads.items():
        print(f"measuring {name}", file=sys.stderr, flush=True)
        rounds, seconds = (2, 0.05) if quick else (arguments.rounds, speed.TURN_SECONDS)
        try:
            found["workloads"][name] = child(speed.measure, workload, contenders, rounds, seconds)
        except Exception as error:  # told in the table; the other rows go on
            found["workloads"][name] = {"error": f"{type(error).__name__}: {error}"}
    return found


# --- tables -------------------------------------------------------------------------------------------------------


def markdown(found: dict[str, Any]) -> str:
    """The report for a person to read."""
    where = found["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["packages"].items() if version)
    parts = [
        f"# lmobj {where['lmobj']} on {where['kind']}",
        f"{where['started']}; {where['devices']}; Python {where['python']}; {versions}; {where['system']}; "
        f"{where['cpu cores']} CPU cores, load {where['load']:.1f}; `{where['command']}`",
    ]
    if found["checks"]:
        parts += ["## Checks", _summary(found["checks"]), _checks_table(found["checks"])]
    if found["workloads"]:
        parts += ["## Training steps", _ceilings(found["ceilings"]), _speed_table(found), f"{found['formula']}."]
    return "\n\n".join(parts) + "\n"


def _summary(findings: list[dict[str, Any]]) -> str:
    counts = {status: sum(f["status"] == status for f in findings) for status in ("ok", "failed", "refused")}
    limits = "; ".join(
        f"{kind}s in {dtype}: {value:.0e} and {gradient:.0e}"
        for kind, by_dtype in checks.TOLERANCES.items()
        for dtype, (value, gradient) in by_dtype.items()
    )
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    return f"{told}. Largest distance of values and gradients from the reference, by norm; accepted: {limits}."


def _checks_table(findings: list[dict[str, Any]]) -> str:
    order = {"failed": 0, "ok": 1, "refused": 2}
    rows = [
        (f["check"], f["variant"], f["status"], _e(f["value_error"]), _e(f["gradient_error"]), f["detail"])
        for f in sorted(findings, key=lambda f: order[f["status"]])
    ]
    return _table(("check", "variant", "", "values", "gradients", ""), rows)


def _ceilings(ceilings: list[dict[str, Any]]) -> str:
    told = (
        f"{c['flops_per_second'] / 1e12:,.3g} TFLOP/s in {c['dtype']} ({c['size']} x {c['size']})" for c in ceilings
    )
    return f"Fastest matrix product: {'; '.join(told)}."


def _speed_table(found: dict[str, Any]) -> str:
    ceilings = {c["dtype"]: c["flops_per_second"] for c in found["ceilings"]}
    rows = []
    for name, work in found["workloads"].items():
        if "error" in work:
            rows.append((name, "", f"failed: {work['error']}", *[""] * 8))
            continue
        label = f"{name}, {work['parameters'] / 1e6:,.1f}M, {work['rows']} x {work['length']}, {work['dtype']}"
        for row in work["contenders"]:
            rows.append((label, row["contender"], *_speed_cells(row, ceilings.get(work["dtype"]))))
            label = ""
    header = ("workload", "", "tokens/s", "step, ms (10-90%)", "lmobj over it", "of ceiling", "MFU", "peak GiB")
    return _table((*header, "planned GiB", "compile, s", "first loss"), rows)


def _speed_cells(row: dict[str, Any], ceiling: float | None) -> tuple[str, ...]:
    if row["error"]:
        return (f"failed: {row['error']}", *[""] * 8)
    low, high = row["step_seconds_10_90"]
    return (
        f"{row['tokens_per_second']:,.0f}",
        f"{1e3 * row['median_step_seconds']:,.1f} ({1e3 * low:,.1f}-{1e3 * high:,.1f})",
        f"{row['lmobj_over_it']:.2f}" if "lmobj_over_it" in row else "",
        "" if ceiling is None else f"{row['model_flops_per_second'] / ceiling:.0%}",
        "" if row["utilisation"] is None else f"{row['utilisation']:.1%}",
        _gib(row["peak_bytes"]),
        _gib(row["planned_bytes"]),
        "" if row["compile_seconds"] is None else f"{row['compile_seconds']:.1f}",
        f"{row['first_loss']:.4f}",
    )


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = (header, tuple("---" for _ in header), *rows)
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _e(x: float | None) -> str:
    return "" if x is None else f"{x:.1e}"


def _gib(x: int | None) -> str:
    return "" if x is None else f"{x / 2**30:.2f}"


def main(argv: list[str] | None = None, child: Child = in_child) -> int:
    """Writes the report and prints the table; 1 if a check failed or nothing was chosen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer checks, one tiny workload")
    parser.add_argument(
        "--only", action="append", default=[], metavar="WORD", help="names that hold the word; repeatable"
    )
    parser.add_argument("--skip", action="append", default=[], choices=("checks", *speed.CONTENDERS), help="leave out")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contender (default: 9)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("device_report"), help="folder to write to")
    arguments = parser.parse_args(argv)
    found = report(arguments, child)
    if not found["checks"] and not found["workloads"]:
        print(
            f"--only {' '.join(arguments.only)}: no check and no workload of this device is called so.", file=sys.stderr
        )
        return 1
    table = markdown(found)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "device_report.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (arguments.out / "device_report.md").write_text(table, encoding="utf-8")
    print(table)
    return int(any(finding["status"] == "failed" for finding in found["checks"]))


if __name__ == "__main__":
    sys.exit(main())
