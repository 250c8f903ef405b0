"""Starts ranks through the agent alone: ``run_agent.py NUM_RANKS SCRIPT [ARGUMENT ...]``."""

import os
import sys

from megatron.engine.launch.agent import GraceTimes, run_ranks
from megatron.engine.launch.placement import NodePlacement
from megatron.engine.launch.watchdog import Watchdog

if __name__ == "__main__":
    num_ranks, script, *arguments = sys.argv[1:]
    Watchdog.interval_s = float(os.environ.get("TEST_LOOK_EVERY_S", Watchdog.interval_s))
    end = run_ranks(
        NodePlacement(slots=tuple(range(int(num_ranks))), master_port=29500),
        script,
        tuple(arguments),
        environ=os.environ,
        grace=GraceTimes(settle_s=0.8, terminate_s=0.4),
    )
    sys.exit(end.status)
