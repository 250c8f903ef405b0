"""What the ledger costs a training step: digests, lines, flushes.

    python benchmarks/ledger_overhead.py [--steps 300] [--only "plain engine, 1 process"]

The demo's model is trained by deepy.py as in step_time.py, and every call by which a rank records
is timed where it happens (ledger_overhead_rank.py): the digest of each micro batch, the line of
each step, and every few steps the digests' sum over the ranks with the lines' writing. What a rank
waits for slower ones meanwhile isn't the ledger's doing, so CPU time is what counts; wall time,
waiting included, stands beside it. Neither saves nor evaluations are in it.
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

RANK_SCRIPT = Path(__file__).with_name("ledger_overhead_rank.py")
WARM_UP = 20  # steps
BLOCK = 5  # steps between two flushes: the demo's log_interval


def main() -> None:
    """Measure each topology and print what share of a step recording is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="per topology, a multiple of 5")
    parser.add_argument("--only", choices=TOPOLOGIES, help="one topology")
    options = parser.parse_args()
    for name in [options.only] if options.only else TOPOLOGIES:
        ranks = measure(name, options.steps)
        report(f"{name}, CPU", ranks, "cpu")
        report(f"{name}, wall", ranks[:1], "wall")


def measure(name: str, steps: int) -> list[dict[str, list[float]]]:
    """Return what every rank measured per step, without the warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        write_corpus(out)
        # The last step's span would hold the save at the end.
        changes = {"train_iters": WARM_UP + steps + 1, "log_interval": BLOCK}
        config = write_config(out, "overhead", TOPOLOGIES[name], changes)
        environ = {**os.environ, "LEDGER_OVERHEAD_OUT": folder, "OMP_NUM_THREADS": "1"}
        launch(RANK_SCRIPT, config, environ)
        ranks = [json.loads(path.read_text()) for path in sorted(out.glob("rank*.json"))]
        return [
            {what: values[WARM_UP : WARM_UP + steps] for what, values in rank.items()}
            for rank in ranks
        ]


def report(label: str, ranks: list[dict[str, list[float]]], clock: str) -> None:
    """Print the ratio, block by block: every block has one flush."""
    recording, steps = (
        [
            sum(sum(rank[f"{clock} {what}"][start : start + BLOCK]) for rank in ranks) / BLOCK
            for start in range(0, len(ranks[0][f"{clock} of step"]), BLOCK)
        ]
        for what in ("of recording", "of step")
    )
    ratios = [mine / whole for mine, whole in zip(recording, steps, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(
        f"{label + ': recording / step':<58} {middle:>8.3%} ({low:.3%}..{high:.3%})  "
        f"{statistics.median(recording) * 1e6:.0f} us / {statistics.median(steps) * 1e3:.1f} ms",
        flush=True,
    )


if __name__ == "__main__":
    main()
