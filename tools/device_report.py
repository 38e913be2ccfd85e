"""Checks and measures lmobj on whatever accelerator is there, and writes the report as JSON and as a markdown table.

    python tools/device_report.py                                everything for this device, into device_report/
    python tools/device_report.py --quick                        fewer checks, one tiny shape: a few minutes on 2 cores
    python tools/device_report.py --only attention --only gpt2   checks and workloads with these words in their names

Checks (`device_checks.py`): every objective, every model family, every mask under every attention backend and the loss
without logits, values and gradients, against the CPU in float64. What a backend refuses is listed as refused; anything
else that does not agree makes the exit code 1.

Measurements (`lmobj.speed`, as `lmobj speed` takes them): compile time, time of a step, tokens/s, memory, model FLOPs
utilisation, beside PyTorch with Transformers (eager and compiled) where they are installed and have a peer, for the
experiments of `device_speed.py`; and the fastest matrix product, which says how much the device has to give. On a GPU
PyTorch must be a build for it. Where memory runs out the row says so, and the experiment is measured again with half
the rows.

Each part runs in a process of its own, so that memory is its own and a crash costs one row.
"""

from __future__ import annotations

import argparse
import concurrent.futures.process
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parent.parent)]
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs some of the memory too
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import device_checks as checks  # noqa: E402
import device_speed  # noqa: E402

from lmobj import speed  # noqa: E402
from lmobj.config import Experiment  # noqa: E402
from lmobj.errors import UserError  # noqa: E402
from lmobj.train.flops import FORMULA  # noqa: E402

QUICK_CEILINGS = (("float32", (256,)),)

Child = Callable[..., Any]
"""(function, *arguments) -> its result."""


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


def report(arguments: argparse.Namespace, child: Child = speed.in_process) -> dict[str, Any]:
    """Everything that was asked for, as JSON values."""
    only, quick = arguments.only, arguments.quick
    where = child(surroundings)
    platform = where["platform"]
    peers = {"torch", "transformers"} <= set(where["packages"])
    left_out = {*arguments.skip, *(() if peers else ("eager", "compiled")), *(("compiled",) if quick else ())}
    contenders = tuple(name for name in speed.CONTENDERS if name not in left_out)
    known = device_speed.quick() if quick else device_speed.workloads(platform)
    workloads = {name: experiment for name, experiment in known.items() if chosen(name, only)}
    found: dict[str, Any] = {
        "environment": where,
        "formula": FORMULA,
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
    ceilings = QUICK_CEILINGS if quick else device_speed.ceilings(platform)
    for dtype, sizes in ceilings if workloads else ():
        found["ceilings"].append(child(speed.matmul_ceiling, dtype, sizes))
    turns, seconds = (2, 0.05) if quick else (arguments.rounds, speed.TURN_SECONDS)
    for wanted, rows in by_contenders(workloads, contenders).items():
        found["workloads"] |= speed.measure_each(
            rows, wanted, turns=turns, seconds=seconds, fewer_rows=True, child=child
        )
    return found


def by_contenders(
    workloads: Mapping[str, Experiment], contenders: tuple[speed.Contender, ...]
) -> dict[tuple[speed.Contender, ...], dict[str, Experiment]]:
    """The workloads by who takes part in them: all, or lmobj alone where Transformers has no peer."""
    found: dict[tuple[speed.Contender, ...], dict[str, Experiment]] = {}
    for name, experiment in workloads.items():
        wanted = contenders
        try:
            if set(contenders) != {"lmobj"}:
                speed.check_peer(experiment)
        except UserError as error:
            print(f"{name} has no peer: {error}", file=sys.stderr)
            wanted = tuple(one for one in contenders if one == "lmobj")
        if wanted:
            found.setdefault(wanted, {})[name] = experiment
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
        parts += ["## Training steps", _ceilings(found["ceilings"]), _speed_table(found)]
        parts += speed.notes(found["workloads"].values())
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
    rows = [row for name, work in found["workloads"].items() for row in speed.speed_rows(name, work, ceilings)]
    return _table(speed.HEADER, rows)


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = (header, tuple("---" for _ in header), *rows)
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _e(x: float | None) -> str:
    return "" if x is None else f"{x:.1e}"


def main(argv: list[str] | None = None, child: Child = speed.in_process) -> int:
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
