"""One rank of launch.py: notes when it has come how far, and leaves that in $LAUNCH_OUT/rankN.json.

With $LAUNCH_BARE it imports torch, DeepSpeed and megatron-core, and does nothing else.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for use without an install

MARKS = [("interpreter", time.time(), time.process_time())]

# What `train` calls, in order. The time between two of them is counted with the later one.
STAGES = {
    "load_transported": "configuration",
    "connect": "process groups",
    "open_run_data": "tokenizer, data, index maps",
    "_build_module": "model",
    "_build_engine": "optimizer, engine",
    "run": None,
}


def main() -> None:
    """Import, or import and train."""
    if os.environ.get("LAUNCH_BARE"):
        import deepspeed  # noqa: F401
        import megatron.core.tensor_parallel  # noqa: F401
        import torch  # noqa: F401

        mark("imports")
    else:
        from megatron.cli import train
        from megatron.engine.distributed import rank_environment

        mark("imports")
        for name, stage in STAGES.items():
            setattr(train, name, marking(stage, getattr(train, name)))
        config = train.load_transported()
        train.train(config, rank_environment(), on_loss=lambda loss: mark("first step"))
    path = Path(os.environ["LAUNCH_OUT"], f"rank{os.environ['RANK']}.json")
    path.write_text(json.dumps({"process": process_start(), "marks": MARKS}))


def mark(stage: str) -> None:
    """Note that ``stage`` is over."""
    MARKS.append((stage, time.time(), time.process_time()))


def marking(stage: str | None, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` with a mark at its end, or at its beginning if the stage has no name."""

    def marked(*arguments: Any, **named: Any) -> Any:
        if stage is None:
            mark("reporter, log, loaders")
            return function(*arguments, **named)
        result = function(*arguments, **named)
        mark(stage)
        return result

    return marked


def process_start() -> float:
    """Return when the kernel started this process, on `time.time`'s clock (to 10 ms)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot


if __name__ == "__main__":
    main()
