"""Runs on disks of many sizes that fill up: what is told, what is left, and does the run go on once there is room.

    sudo python tools/measure_full_disk.py          # about 3 minutes on two CPU cores; it mounts small tmpfs disks

For each size a run is trained in a disk that may be too small. It must end with exit code 2 and one paragraph on
stderr that says what to do, or reach its end; every checkpoint that is there must be whole; then the disk is made
larger, and the run resumed (or begun, where there was not even room for its config) must equal, bit for bit, the run
that always had room. Ends with exit code 1 where it does not.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from measure_kills import FailedError, Trial, last_complete, results

SIZES = (8, 32, 64, 96, 128, 1024, 2048, 5120, 6144, 8192, 10240, 12288, 14336, 15360, 16384, 18432)
"""Sizes of disks in KiB: from one that does not hold the first files to one that holds the whole run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="KiB")
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("Mounting a disk needs root.")
    with tempfile.TemporaryDirectory() as scratch:
        trial = Trial(Path(scratch), f"{scratch}/runs", random.Random(0))
        reference = f"{scratch}/reference"
        trial.finish(trial.train(reference))
        expected = results(reference)
        disk = Path(scratch) / "disk"
        disk.mkdir()
        print(f"{'KiB':>6}  {'exit':>4}  {'last':>4}  said")
        for size in options.sizes:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)], check=True)
            try:
                fill(trial, str(disk / "run"), size, disk)
                if results(str(disk / "run")) != expected:
                    sys.exit(f"FAILED: on {size} KiB, then more, the run differs from the one that always had room")
            except FailedError as error:
                sys.exit(f"FAILED: on {size} KiB: {error}")
            finally:
                subprocess.run(["umount", str(disk)], check=True)


def fill(trial: Trial, run: str, size: int, disk: Path) -> None:
    """Trains on a small disk, looks at what is left, and goes on with a larger one."""
    process = trial.train(run)
    try:
        _, error = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        raise FailedError("the run hangs") from None
    print(f"{size:>6}  {process.returncode:>4}  {last_complete(run) or 0:>4}  {error.strip()[:300]}", flush=True)
    trial.check(run)
    if process.returncode == 0:
        return
    told = error.strip()
    if process.returncode != 2 or "\n" in told or "space" not in told:
        raise FailedError(f"exit code {process.returncode} and {error}")
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    last = last_complete(run)
    trial.finish(trial.start("resume", run) if os.path.isfile(f"{run}/config.yaml") else trial.train(run), last)


if __name__ == "__main__":
    main()
