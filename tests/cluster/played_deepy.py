"""Plays deepy.py where a test is about the batch script: records like a run, but trains nothing.

The first launch waits for a signal and stops, the next one finishes. With ``play: die`` in its
configuration every launch dies in step 8; with ``play: lose`` the first one ends as for a lost node
once a file ``lost`` is there.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from megatron.base.exit_codes import FAILED, FINISHED, NODE_LOST, STOPPED
from tests.ledger.queries.simulated_run import SimulatedRun

STOP_SIGNALS = {signal.SIGTERM, signal.SIGUSR1}


def main() -> int:
    """Play one launch; return its exit status."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    config = json.loads(Path(sys.argv[-1]).read_text())
    run = SimulatedRun(Path(config["save"]), [config["corpus"]])
    has_trained = (run.save / "attempts").exists()
    job = {name: value for name, value in os.environ.items() if name.startswith("SLURM_")}
    how = {"environment": {"job": job}, "train_iters": config["train_iters"]}
    if config["play"] == "die":
        run.launch(7, stop="failed: DatasetError", **how)
        return FAILED
    if has_trained:
        run.launch(config["train_iters"], saves=[config["train_iters"]], **how)
        return FINISHED
    print("played: waiting", flush=True)
    if config["play"] == "lose":
        while not Path("lost").exists():
            time.sleep(0.2)
        run.launch(10, saves=[10], stop="node lost: node2", **how)
        return NODE_LOST
    told = signal.Signals(signal.sigwait(STOP_SIGNALS))
    run.launch(10, saves=[10], stop=f"signal {told.name}", **how)
    print(f"played: stopped by {told.name}", flush=True)
    return STOPPED


if __name__ == "__main__":
    sys.exit(main())
