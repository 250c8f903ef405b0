"""Training, as ``python deepy.py train.py CONFIG.yml …`` starts it on every rank."""

import sys

from megatron.cli.exit_status import run_command
from megatron.cli.train import main

if __name__ == "__main__":
    sys.exit(run_command(main))
