"""Tell what a configuration comes to: parameters, FLOPs, memory per rank, steps per data shard.

Example:
    python tools/estimate.py configs/pythia/12B.yml --world-size 256
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for use without an install

from megatron.cli.estimate import main

if __name__ == "__main__":
    sys.exit(main())
