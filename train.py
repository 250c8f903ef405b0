"""Training, as ``python deepy.py train.py CONFIG.yml …`` starts it on every rank."""

from megatron.engine.stop_signals import stop_signals

if __name__ == "__main__":
    stop_signals().begin()  # the imports below take seconds

from megatron.cli.exit_status import end_rank, run_command
from megatron.cli.train import main

if __name__ == "__main__":
    end_rank(run_command(main))
