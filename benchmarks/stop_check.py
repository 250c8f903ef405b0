"""What it costs a training step to ask whether somebody wants the run to stop.

    python benchmarks/stop_check.py [--steps 300] [--only "plain engine, 1 process"]

The demo's model is trained by deepy.py as in step_time.py, and every question is timed where it is
asked (stop_check_rank.py): on the main thread, with the clock and SLURM's limit looked at on rank
0; and the look into the store of torch.distributed, on a thread of its own, while the next step is
computed. A step waits only for the former; processor time has both.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for use without an install

from demo_run import TOPOLOGIES, launch, write_config, write_corpus

RANK_SCRIPT = Path(__file__).with_name("stop_check_rank.py")
WARM_UP = 20  # steps


def main() -> None:
    """Measure each topology and print what share of a step the question is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="per topology")
    parser.add_argument("--only", choices=TOPOLOGIES, help="one topology")
    options = parser.parse_args()
    for name in [options.only] if options.only else TOPOLOGIES:
        ranks = measure(name, options.steps)
        report(f"{name}: asking / step, wall", ranks, ["wall of beat"], "wall of step")
        report(f"{name}, CPU", ranks, ["cpu of beat", "cpu of look"], "cpu of step")


def measure(name: str, steps: int) -> list[dict[str, list[float]]]:
    """Return what every rank measured per step, without the warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        write_corpus(out)
        # The last step's span would hold the save at the end.
        changes = {"train_iters": WARM_UP + steps + 1, "exit_duration_in_mins": 1e6}
        config = write_config(out, "stop", TOPOLOGIES[name], changes)
        environ = {**os.environ, "STOP_CHECK_OUT": folder, "OMP_NUM_THREADS": "1"}
        launch(RANK_SCRIPT, config, environ)
        ranks = [json.loads(path.read_text()) for path in sorted(out.glob("rank*.json"))]
        return [
            {what: values[WARM_UP : WARM_UP + steps] for what, values in rank.items()}
            for rank in ranks
        ]


def report(
    label: str, ranks: list[dict[str, list[float]]], asking: list[str], of_step: str
) -> None:
    """Print the ratio over all steps and ranks, and what a step of each kind takes."""
    spent = [
        sum(sum(rank[what][step] for what in asking) for rank in ranks) for step in steps_of(ranks)
    ]
    steps = [sum(rank[of_step][step] for rank in ranks) for step in steps_of(ranks)]
    low, middle, high = statistics.quantiles(
        [part / whole for part, whole in zip(spent, steps, strict=True)], n=4
    )
    print(
        f"{label:<58} {middle:>8.3%} ({low:.3%}..{high:.3%})  "
        f"{statistics.median(spent) / len(ranks) * 1e6:.0f} us / "
        f"{statistics.median(steps) / len(ranks) * 1e3:.1f} ms",
        flush=True,
    )


def steps_of(ranks: list[dict[str, list[float]]]) -> range:
    """Return the steps that every rank has measured."""
    return range(min(len(values) for rank in ranks for values in rank.values()))


if __name__ == "__main__":
    main()
