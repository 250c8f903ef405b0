"""Where the time goes from `python deepy.py train.py CONFIG` to the end of the first step.

    python benchmarks/launch.py [--launches 9] [--only "pipeline 2 x tensor 2"]

The demo's configuration is launched with its index maps deleted, in turn with a script that only
imports torch, DeepSpeed and megatron-core under the same launcher: the floor. A stage ends when
the last rank has passed it. The table gives medians over the launches: wall time, and CPU time per
rank, which a busy machine disturbs less. `ours` is what lies between the start of the ranks and the
end of the first step, less the floor of the same pair of launches: the median, its quartiles in
brackets.
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
    """One launch: wall and CPU seconds of each stage of its ranks."""

    launcher_s: float  # from the start of deepy.py to that of the last rank
    stages: dict[str, tuple[float, float]]  # CPU: mean over ranks

    def total(self, clock: int) -> float:
        """Return the wall (0) or CPU (1) seconds of all stages."""
        return sum(spent[clock] for spent in self.stages.values())


def main() -> None:
    """Measure each topology and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--launches", type=int, default=9, help="pairs per topology")
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch, per rank; 0: as deepy.py sets them"
    )
    parser.add_argument("--only", choices=TOPOLOGIES, help="one topology")
    options = parser.parse_args()
    for name in [options.only] if options.only else TOPOLOGIES:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder)
            write_corpus(out)
            config = write_config(out, "launch", TOPOLOGIES[name], {"train_iters": 1})
            environ = {**os.environ, "LAUNCH_OUT": folder}
            if options.threads:
                environ["OMP_NUM_THREADS"] = str(options.threads)
            bare = {**environ, "LAUNCH_BARE": "1"}
            start(config, bare)  # fills the page cache
            pairs = [(start(config, bare), start(config, environ)) for _ in range(options.launches)]
        report(name, [bare for bare, _ in pairs], [full for _, full in pairs])


def start(config: Path, environ: dict[str, str]) -> Launch:
    """Launch once and return what the ranks noted."""
    out = config.parent
    for file in out.glob("corpus_*"):
        file.unlink()
    began = time.time()
    launch(RANK_SCRIPT, config, environ)
    ranks = [json.loads(path.read_text()) for path in out.glob("rank*.json")]
    started = max(rank["process"] for rank in ranks)
    stages = {}
    passed, used = started, 0.0
    for marks in zip(*(rank["marks"] for rank in ranks), strict=True):
        stage = marks[0][0]
        now, cpu = max(mark[1] for mark in marks), statistics.mean(mark[2] for mark in marks)
        stages[stage] = (now - passed, cpu - used)
        passed, used = now, cpu
    return Launch(started - began, stages)


def report(name: str, bare: list[Launch], full: list[Launch]) -> None:
    """Print the stages, the floor and what is ours."""
    print(f"{name:<40} {'wall s':>8} {'CPU s':>8}")
    print_row("deepy.py", statistics.median(launch.launcher_s for launch in full))
    for stage in full[0].stages:
        spent = [launch.stages[stage] for launch in full]
        print_row(stage, *(statistics.median(seconds) for seconds in zip(*spent, strict=True)))
    for label, launches in (("ranks to first step", full), ("floor: bare imports", bare)):
        totals = ([launch.total(clock) for launch in launches] for clock in (0, 1))
        print_row(label, *map(statistics.median, totals))
    for clock, unit in enumerate(("wall", "CPU")):
        ours = [a.total(clock) - b.total(clock) for a, b in zip(full, bare, strict=True)]
        low, middle, high = statistics.quantiles(ours, n=4)
        label = f"{name}, ours, {unit}"
        print(f"{label:<58} {middle:>8.2f} s ({low:.2f}..{high:.2f})", flush=True)


def print_row(label: str, *seconds: float) -> None:
    """Print one row of the table."""
    print(f"  {label:<38}" + "".join(f" {number:>8.2f}" for number in seconds))


if __name__ == "__main__":
    main()
