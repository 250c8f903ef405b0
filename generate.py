"""Text generation, as ``python deepy.py generate.py CONFIG.yml …`` starts it on every rank."""

from megatron.cli.exit_status import run_rank
from megatron.cli.generate import main

if __name__ == "__main__":
    run_rank(main)
