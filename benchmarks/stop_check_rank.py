"""One rank of stop_check.py: trains, and times every question whether to stop."""

import json
import os
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for use without an install

from megatron.cli.train import train
from megatron.config.transport import load_transported
from megatron.engine.distributed import rank_environment
from megatron.engine.stopping import Stop, Stopping

WHAT = ("wall of beat", "cpu of beat", "cpu of look", "wall of step", "cpu of step")


class Watch:
    """Notes what each beat took, and the step before it."""

    def __init__(self) -> None:
        self.steps: dict[str, list[float]] = {what: [] for what in WHAT}
        self._looking = 0.0  # processor time of the other thread since the last beat
        self._began: tuple[float, float] | None = None
        ask, read = Stopping.beat, Stopping._read

        def beat(stopping: Stopping) -> Stop | None:
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return ask(stopping)
            finally:
                self._close(time.perf_counter() - wall, time.thread_time() - cpu)

        def look(stopping: Stopping) -> bytes | None:
            cpu = time.thread_time()
            try:
                return read(stopping)
            finally:
                self._looking += time.thread_time() - cpu

        Stopping.beat, Stopping._read = beat, look  # type: ignore[method-assign]

    def _close(self, wall: float, cpu: float) -> None:
        now = time.perf_counter(), time.process_time()
        if self._began is not None:
            values = wall, cpu, self._looking, now[0] - self._began[0], now[1] - self._began[1]
            for what, value in zip(WHAT, values, strict=True):
                self.steps[what].append(value)
        self._looking = 0.0
        self._began = now


def main() -> None:
    """Train, measuring, and leave the times in $STOP_CHECK_OUT/rankN.json."""
    watch = Watch()
    environment = rank_environment()
    train(load_transported(), environment)
    path = Path(os.environ["STOP_CHECK_OUT"], f"rank{environment.rank}.json")
    path.write_text(json.dumps(watch.steps))


if __name__ == "__main__":
    main()
