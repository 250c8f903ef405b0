"""Evaluation, as ``python deepy.py eval.py CONFIG.yml …`` starts it on every rank."""

from megatron.cli.evaluate import main
from megatron.cli.exit_status import end_rank, run_command

if __name__ == "__main__":
    end_rank(run_command(main))
