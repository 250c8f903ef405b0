"""Training, as ``python deepy.py train.py CONFIG.yml …`` starts it on every rank."""

from megatron.base.progress import progress_of_this_process
from megatron.engine.stop_signals import stop_signals

if __name__ == "__main__":
    # The imports below take seconds; from a file server that hangs, for ever.
    stop_signals().begin()
    progress_of_this_process().enter("imports", limit_s=1800.0)

from megatron.cli.exit_status import run_rank
from megatron.cli.train import main

if __name__ == "__main__":
    run_rank(main)
