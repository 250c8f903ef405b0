"""Plays deepy.py where a test is about the batch script: records like a run, but trains nothing.

The first launch waits for a signal and stops, the next one finishes; with ``play: die`` in its
configuration every launch dies in step 8.
"""

import json
import os
import signal
import sys
from pathlib import Path

from megatron.base.exit_codes import FAILED, FINISHED, STOPPED
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
    told = signal.Signals(signal.sigwait(STOP_SIGNALS))
    run.launch(10, saves=[10], stop=f"signal {told.name}", **how)
    print(f"played: stopped by {told.name}", flush=True)
    return STOPPED


if __name__ == "__main__":
    sys.exit(main())
