"""Time of a training step: our trainer against a plain PyTorch + DeepSpeed loop.

    python benchmarks/step_time.py [--steps 200] [--only "plain engine, 1 process"]

The demo's model (configs/demo.yml) is trained by `megatron.cli.train.train` under deepy.py. After
each of its steps the same processes take one step of `plain_neox`, with the same sizes, DeepSpeed
settings and optimizer, reading as many tokens from the same file (step_time_rank.py). The two
alternate, so that whatever else the machine does meets both. Our step is everything between two
plain ones: reading, training, clipping, schedule, attempt log, console. The plain loop reads and
trains, nothing else.

A line gives the median of the ratios of neighbouring steps, their quartiles in brackets, and the
two medians. CPU time is the processor seconds of all ranks together, which a busy machine disturbs
less than wall time.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for use without an install

from demo_run import TOPOLOGIES, launch, write_config, write_corpus

RANK_SCRIPT = Path(__file__).with_name("step_time_rank.py")
WARM_UP = 10  # steps
# Memory given back to the kernel costs page faults, paid by whichever of the two allocates next.
KEEP_MEMORY = dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), str(2**32))

Spans = list[tuple[float, float]]  # wall and CPU seconds of each step


def main() -> None:
    """Measure each topology and print its ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="pairs of steps per topology")
    parser.add_argument("--threads", type=int, default=1, help="of torch, per rank")
    parser.add_argument("--only", choices=TOPOLOGIES, help="one topology")
    options = parser.parse_args()
    for name in [options.only] if options.only else TOPOLOGIES:
        ranks = measure(name, options.steps, options.threads)
        ours, plain = ([rank[who][WARM_UP:] for rank in ranks] for who in ("ours", "plain"))
        report(f"{name}, wall", wall(ours), wall(plain))
        report(f"{name}, CPU", processor(ours), processor(plain))


def measure(name: str, steps: int, threads: int) -> list[dict[str, Spans]]:
    """Return what every rank measured, warm-up included."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        write_corpus(out)
        changes = {"train_iters": steps + WARM_UP}
        config = write_config(out, "step_time", TOPOLOGIES[name], changes)
        environ = {
            **os.environ,
            **KEEP_MEMORY,
            "STEP_TIME_OUT": folder,
            "OMP_NUM_THREADS": str(threads),
        }
        launch(RANK_SCRIPT, config, environ)
        return [json.loads(path.read_text()) for path in out.glob("rank*.json")]


def wall(ranks: Sequence[Spans]) -> list[float]:
    """Return each step's wall time; ranks meet after every step, so theirs are alike."""
    return [seconds for seconds, _ in ranks[0]]


def processor(ranks: Sequence[Spans]) -> list[float]:
    """Return each step's CPU time over all ranks."""
    return [sum(cpu for _, cpu in step) for step in zip(*ranks, strict=True)]


def report(label: str, ours: list[float], plain: list[float]) -> None:
    """Print one ratio."""
    ratios = [a / b for a, b in zip(ours, plain, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    medians = f"{statistics.median(ours) * 1e3:.1f} / {statistics.median(plain) * 1e3:.1f} ms"
    print(
        f"{label + ': ours / plain':<58} {middle:>8.3f}x ({low:.3f}..{high:.3f})  {medians}",
        flush=True,
    )


if __name__ == "__main__":
    main()
