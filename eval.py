"""Evaluation, as ``python deepy.py eval.py CONFIG.yml …`` starts it on every rank."""

from megatron.cli.evaluate import main
from megatron.cli.exit_status import run_rank

if __name__ == "__main__":
    run_rank(main)
