"""What a checkpoint of a 500 MB state costs training, against DeepSpeed's own synchronous save.

    stall      seconds that a save keeps the loop from its next step: ours / DeepSpeed's, limit 0.10
    reread     bytes of tensor files read between the begin of a save and its commit; limit 0
    hashing    what digests add to the writer thread's processor time; limit 0.05

One process, the state of a GPT-NeoX in fp32 with ZeRO 1. Both write to the same disk, in turns,
with a pause for it in between. DeepSpeed doesn't sync what it writes; we do. A stall is the time
that save() and the looks at it take, and that the optimizer waits for its state to be copied.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STALL_LIMIT, HASHING_LIMIT = 0.10, 0.05
JSON_BYTES = 1 << 16  # entries, ledgers and manifests are read; a tensor file is larger
RANK = Path(__file__).with_name("save_rank.py")


def main() -> int:
    """Measure, print a line each, and return 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="saves of each kind")
    parser.add_argument("--megabytes", type=int, default=500, help="size of the state")
    parser.add_argument("--directory", type=Path, help="where to save; default: a temporary one")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    directory = Path(tempfile.mkdtemp(dir=options.directory))
    try:
        command = [
            sys.executable,
            str(RANK),
            str(directory),
            str(options.megabytes),
            str(options.rounds),
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            print(result.stderr, file=sys.stderr)
            return 2
        measured = json.loads(result.stdout.splitlines()[-1])
    finally:
        shutil.rmtree(directory)
    print(f"state {measured['bytes'] / 1e6:.0f} MB, {options.rounds} rounds, load {load:.1f}")
    return report(measured)


def report(measured: dict[str, list[float]]) -> int:
    """Print what was measured against its limits."""
    ours, theirs = measured["stall"], measured["deepspeed"]
    stall = statistics.median(ours) / statistics.median(theirs)
    unhashed = statistics.median(measured["writing_unhashed"])
    hashing = statistics.median(measured["writing"]) / unhashed - 1
    reread = max(measured["reread"])
    print(
        f"stall    {stall:.3f}  ours {spread(ours)}, DeepSpeed's {spread(theirs)}"
        f"  (limit {STALL_LIMIT})"
    )
    print(
        f"reread   {reread if reread > JSON_BYTES else 0}  bytes of tensor files, and {reread} of "
        "small JSON files  (limit 0)"
    )
    print(
        f"hashing  {hashing:.3f}  on top of {spread(measured['writing_unhashed'])}"
        f"  (limit {HASHING_LIMIT})"
    )
    print(
        f"steps    {spread(measured['slowdown'])} slower in all while a save is written, of "
        f"{statistics.median(measured['step']):.3f} s each"
    )
    print(f"first    {measured['first'][0]:.3f} s, the first save's stall: its memory is new")
    return int(stall > STALL_LIMIT or hashing > HASHING_LIMIT or reread > JSON_BYTES)


def spread(seconds: list[float]) -> str:
    """Return median and range."""
    return f"{statistics.median(seconds):.3f} s ({min(seconds):.3f}-{max(seconds):.3f})"


if __name__ == "__main__":
    started = time.monotonic()
    status = main()
    print(f"took {time.monotonic() - started:.0f} s")
    sys.exit(status)
