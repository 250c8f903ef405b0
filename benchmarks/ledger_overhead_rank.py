"""One rank of ledger_overhead.py: trains, and times every call by which it records."""

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for use without an install

from megatron.cli.train import train
from megatron.config.transport import load_transported
from megatron.engine.consumed import ConsumedDigests
from megatron.engine.distributed import rank_environment
from megatron.engine.journal import Journal

WHAT = ("wall of recording", "cpu of recording", "wall of step", "cpu of step")


class Stopwatch:
    """Adds up the time spent recording, and closes the books after every step."""

    def __init__(self) -> None:
        self.steps: dict[str, list[float]] = {what: [] for what in WHAT}
        self._wall = self._cpu = 0.0
        self._began: tuple[float, float] | None = None

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function``, timed."""

        @functools.wraps(function)
        def call(*positional: Any, **named: Any) -> Any:
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return function(*positional, **named)
            finally:
                self._wall += time.perf_counter() - wall
                self._cpu += time.thread_time() - cpu

        return call

    def close_step(self, loss: float) -> None:
        """Note what was spent since the last call; a step's line counts to the step after it."""
        now = time.perf_counter(), time.process_time()
        if self._began is not None:
            values = self._wall, self._cpu, now[0] - self._began[0], now[1] - self._began[1]
            for what, value in zip(WHAT, values, strict=True):
                self.steps[what].append(value)
        self._wall = self._cpu = 0.0
        self._began = now


def main() -> None:
    """Train, measuring, and leave the times in $LEDGER_OVERHEAD_OUT/rankN.json."""
    stopwatch = Stopwatch()
    for owner, name in ((ConsumedDigests, "add"), (Journal, "step")):
        setattr(owner, name, stopwatch.timed(getattr(owner, name)))
    environment = rank_environment()
    train(load_transported(), environment, on_loss=stopwatch.close_step)
    path = Path(os.environ["LEDGER_OVERHEAD_OUT"], f"rank{environment.rank}.json")
    path.write_text(json.dumps(stopwatch.steps))


if __name__ == "__main__":
    main()
