"""``python -m megatron.cli.slurm``: neox-slurm where no console script is installed."""

import sys

from megatron.cli.slurm.main import main

if __name__ == "__main__":
    sys.exit(main())
