"""Where the time goes from `python deepy.py train.py CONFIG` to the end of the first step.

    python benchmarks/launch.py [--launches 9] [--only "pipeline 2 x tensor 2"]

The demo's configuration is launched with its index maps deleted, in turn with a script that only
imports torch, DeepSpeed and megatron-core under the same launcher: the floor. A stage ends when
the last rank has passed it. The table gives medians over the launches: wall time, and CPU time per
rank. `ours` is what lies between the start of the ranks and the end of the first step, less the
floor of the same pair of launches, in brackets its quartiles.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for use without an install

from demo_run import TOPOLOGIES, launch, write_config, write_corpus

RANK_SCRIPT = Path(__file__).with_name("launch_rank.py")


@dataclass(frozen=True)
class Launch:
    """One launch: seconds each stage took, and those from the start of the ranks to the end."""

    wall: dict[str, float]
    cpu: dict[str, float]  # mean over ranks
    ranks_s: float


def main() -> None:
    """Measure each topology and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--launches", type=int, default=9, help="pairs per topology")
    parser.add_argument("--only", choices=TOPOLOGIES, help="one topology")
    options = parser.parse_args()
    for name in [options.only] if options.only else TOPOLOGIES:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder)
            write_corpus(out)
            config = write_config(out, "launch", TOPOLOGIES[name], {"train_iters": 1})
            start(config, is_bare=True)  # fills the page cache
            pairs = [
                (start(config, is_bare=True), start(config, is_bare=False))
                for _ in range(options.launches)
            ]
        report(name, [bare for bare, _ in pairs], [full for _, full in pairs])


def start(config: Path, *, is_bare: bool) -> Launch:
    """Launch once and return what the ranks noted."""
    out = config.parent
    for file in out.glob("corpus_*"):
        file.unlink()
    environ = {**os.environ, "LAUNCH_OUT": str(out)}
    if is_bare:
        environ["LAUNCH_BARE"] = "1"
    began = time.time()
    launch(RANK_SCRIPT, config, environ)
    ranks = [json.loads(path.read_text()) for path in sorted(out.glob("rank*.json"))]
    started = max(rank["process"] for rank in ranks)
    wall, cpu = {"deepy.py": started - began}, {}
    previous = started
    for index, (stage, _, _) in enumerate(ranks[0]["marks"]):
        marks = [rank["marks"][index] for rank in ranks]
        passed = max(when for _, when, _ in marks)
        wall[stage], previous = passed - previous, passed
        used = [
            rank["marks"][index][2] - (rank["marks"][index - 1][2] if index else 0.0)
            for rank in ranks
        ]
        cpu[stage] = statistics.mean(used)
    return Launch(wall, cpu, previous - started)


def report(name: str, bare: list[Launch], full: list[Launch]) -> None:
    """Print the stages, the floor and what is ours."""
    print(f"{name} {'wall s':>{44 - len(name)}} {'CPU s':>8}")
    for stage in full[0].wall:
        wall = statistics.median(launch.wall[stage] for launch in full)
        cpu = ""
        if stage in full[0].cpu:
            cpu = f"{statistics.median(launch.cpu[stage] for launch in full):.2f}"
        print(f"  {stage:<36} {wall:>6.2f} {cpu:>8}")
    print(f"  {'floor: interpreter, bare imports':<36} {median_total(bare):>6.2f}")
    ours = [ranks.ranks_s - floor.ranks_s for floor, ranks in zip(bare, full, strict=True)]
    low, middle, high = statistics.quantiles(ours, n=4)
    print(f"{f'{name}, ours: launch to first step':<58} {middle:>8.2f} s ({low:.2f}..{high:.2f})\n")


def median_total(launches: list[Launch]) -> float:
    """Return the median of the seconds between the start and the end of the ranks' work."""
    return statistics.median(launch.ranks_s for launch in launches)


if __name__ == "__main__":
    main()
